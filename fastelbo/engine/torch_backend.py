"""The primitives in pure Torch: what runs on a CPU, and wherever Triton cannot.

`triton_backend` has the same ones, so the two can be read side by side: `draw_noise`, `loss_forward`, `loss_backward`,
`latents_forward`, `latents_backward`, `sparse_forward` and `sparse_backward`. Formulas are evaluated a block at a time, with
results in scratch memory that stays in cache, and gradients come from the same pass.

Tensors come as the plan's `dense` lays them out. A `beta` is a float, or a 0-d tensor on the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..basics.scalars import HALF, as_tensor
from ..basics.tracing import is_seen
from ..latents.gaussian import Slope, kl_elements, kl_in_one_pass, sample_in_one_pass
from . import categorical, formula, sparse_reconstruction
from .blocks import KEPT, SMALL, added_up, converted, cut_alike, scratch
from .reconstruction import multiplied, reconstruct


def draw_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normals of the shape, strides and dtype of `like`: the ones that `torch.randn_like` gives."""
    return torch.randn_like(like) if generator is None else torch.empty_like(like).normal_(generator=generator)


def loss_forward(plan, factors, tensors, divisor, known, wants, stateless=False):
    """Loss, reconstruction and KL, and the gradients of the reconstruction by the parameters in `wants`.

    - `factors`: of the loss, beta and `recon_weight`. `divisor`: what the sum of the reconstruction is divided by.
    - `known`: the upstream factor of each row, `[B]`, where it is known; None: the plan's guess is taken.
    - `wants`: of each parameter, whether it wants a gradient.
    - `stateless`: keep nothing on the device for later calls; this backend never does.

    Returns `(loss, recon, kl, stored, sums, used)`: three results, `[]` or `[B]`, None where there is no KL; of each parameter
    its gradient times the factor `used`, or None, and behind them, if there are few latents, what the KL's gradient is made of.
    `sums`, of small parameters, are none of this backend's.
    """
    n, dtype, used = plan.count, plan.dtype, None
    x = tensors[n]
    # Elsewhere than on a CPU nothing could look at the guess in backward without a sync: it computes the gradient there.
    if True in wants and x.device.type == "cpu":
        used = known if known is not None else plan.guess.known[1] if plan.per_sample else plan.guess.number
    recon, stored = reconstruct(plan, tensors, divisor, used, wants, True)
    latents = plan.latents
    if latents == 0:
        return None, recon, None, stored, None, used
    if latents == 1:
        kl = tensors[-1]
        kl = kl.clone() if kl.dtype is dtype else kl.to(dtype)  # where there is nothing to do, `to` takes as long again
    else:
        kl, slope = _divergence(tensors[-2], tensors[-1], plan.kl_scale, plan.per_sample, dtype, used is not None)
        if used is not None and slope is not None:
            stored.append(slope)
    beta, recon_weight = factors
    if type(recon_weight) is float and recon_weight == 1 and type(beta) is float:  # `total`, without the call
        return torch.add(recon, kl, alpha=beta), recon, kl, stored, None, used
    return total(factors, recon, kl), recon, kl, stored, None, used


def loss_backward(plan, factors, tensors, divisor, upstreams, stored, sums, used, needs):
    """Gradients by the tensors in `needs`, among which x and the weight never are.

    `upstreams`: the gradients that arrived at loss, reconstruction and KL, each `[]`, `[B]` or None. `stored` is what forward
    stored with the factor `used`, or `used` is None: handed on where the factor was right, computed anew where it was wrong.

    Returns the gradients, a list, and the upstream factor of the reconstruction, a number or `[B]`, for the next forward to
    guess.
    """
    n, grads, seen = plan.count, [None] * len(tensors), None
    grad_loss, grad_recon, grad_kl = upstreams
    wants, slope = needs[:n], stored[n] if stored is not None and len(stored) > n else None
    if True in wants and not (grad_loss is None and grad_recon is None):
        seen = added(grad_loss, grad_recon, factors[1])
        is_number = not plan.per_sample and seen.device.type == "cpu"
        if is_number:
            seen = seen.item()
        if used is not None and (seen == used if is_number else torch.equal(seen, used)):  # a NaN equals nothing
            seen = used  # not what was passed in, to which its owner may write
        else:
            if not is_number:
                seen = seen.to(plan.dtype, copy=True)
            if not (is_number and used == 1 and multiplied(stored[:n], seen, plan.dtype)):
                _, stored = reconstruct(plan, tensors, divisor, seen, wants, False)
        grads[:n] = stored[:n]
    if True in needs[n:] and not (grad_loss is None and grad_kl is None):
        factor = added(grad_loss, grad_kl, factors[0])
        if plan.latents == 1:
            grads[-1] = factor.clone() if factor.dtype is tensors[-1].dtype else factor.to(tensors[-1].dtype)
        else:
            grads[-2:] = _latent_gradients(None, *tensors[-2:], None, factor, plan.kl_scale, plan.dtype, slope)
    return grads, seen


def latents_forward(plan, tensors, noise, stateless=False):
    """`(z, kl, weighted, sums, kept)` of latents, each None where it is not computed: z if there is noise, the normals
    themselves; the KL, `[]`, `[B]` or of each column, unless the call's kind is None; the KL with free bits; the sums of
    columns over the batch; and what backward needs of it."""
    if not plan.is_simple:
        return categorical.forward(plan, tensors) if plan.is_categorical else _any_latents(plan, tensors, noise)
    kind, dtype, per_sample, (mu, logvar) = plan.call.kind, plan.dtype, plan.per_sample, tensors
    if kind == "column":
        wide = mu.to(dtype)
        kl = torch.expm1(logvar.to(dtype)).sub_(logvar).addcmul_(wide, wide).sum(0)
        kl.mul_(HALF if plan.kl_scale == 1 else 0.5 * plan.kl_scale)
        sums = (wide.sum(0), wide.square().sum(0)) if plan.call.statistics else None
        return None, *formula.with_free_bits(plan.call, mu, kl, None, sums, None, plan.floor)
    if noise is None:
        kl, slope = _divergence(mu, logvar, plan.kl_scale, per_sample, dtype, plan.wants)
        if plan.call.groups is None:
            return None, kl, None, None, None if slope is None else (None, slope)
        return None, *formula.with_free_bits(plan.call, mu, kl, None, None, None, plan.floor)
    if plan.is_whole and (not per_sample or mu.dim() == 2):
        of_z = None
        if not mu.dtype == logvar.dtype == noise.dtype == dtype:
            of_z = torch.promote_types(mu.dtype, logvar.dtype)
            mu, logvar, noise = mu.to(dtype), logvar.to(dtype), noise.to(dtype)
        shift, slope, kl = torch.mul(logvar, HALF).exp_().mul_(noise), None, None
        if kind is not None:
            slope = torch.expm1(logvar)
            kl = torch.sub(slope, logvar).addcmul_(mu, mu).sum(-1 if per_sample else None)
            kl.mul_(HALF if plan.kl_scale == 1 else 0.5 * plan.kl_scale)
        z = shift + mu  # addcmul would round otherwise than the naive code
        return z if of_z is None else z.to(of_z), kl, None, None, (shift, slope)
    z, parts = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype)), []
    for rows, m, lv, eps, out in cut_alike(per_sample, mu, logvar, noise, z):
        m, lv, eps = converted("mu", m, dtype), converted("logvar", lv, dtype), converted("noise", eps, dtype)
        sampled = out if out.dtype == dtype else scratch("spare", lv, dtype)
        torch.mul(lv, HALF, out=sampled).exp_()
        if kind is not None:
            parts.append((rows, _kl_beside(sampled, m, lv, per_sample)))
        sampled.mul_(eps).add_(m)
        if sampled is not out:
            out.copy_(sampled)
    return z, None if kind is None else added_up(parts, mu, plan.kl_scale, per_sample, dtype), None, None, None


def latents_backward(plan, tensors, noise, needs, grad_z, grad_kl, grad_weighted=None, kept=None):
    """Gradients by mu and logvar, from those that arrived at z, at the KL and at that with free bits, of which one at least is
    there; `kept` is what forward has."""
    if grad_z is not None:
        grad_z = grad_z.contiguous(memory_format=plan.layout)
    if isinstance(kept, Slopes):
        return _of_slopes(plan, tensors, needs, grad_z, grad_kl, kept)
    if isinstance(kept, categorical.Kept):
        return categorical.backward(plan, tensors, needs, grad_kl, grad_weighted, kept)
    if isinstance(kept, tuple):
        return _of_kept(grad_z, *tensors, *kept, grad_kl, plan.kl_scale, plan.dtype)
    if kept is not None:
        grad_kl, _ = formula.without_free_bits(plan.call, tensors[0], kept, grad_kl, grad_weighted)
    if plan.call.kind == "column":
        (mu, logvar), factor = tensors, grad_kl if plan.kl_scale == 1 else grad_kl * plan.kl_scale
        slopes = torch.expm1(logvar.to(plan.dtype)).mul_(factor * HALF)
        return torch.mul(mu, factor).to(mu.dtype), slopes.to(logvar.dtype)
    return _latent_gradients(grad_z, *tensors, noise, grad_kl, plan.kl_scale, plan.dtype)


class Slopes(NamedTuple):
    """What backward needs of latents that `_any_latents` computed: derivatives of the KL, of z by the second tensor, and the
    weights of the KL's elements."""

    of_kl: list[Slope]
    of_z: Slope | None
    weight: Tensor | None


def _any_latents(plan, tensors, noise):
    """`latents_forward` of any posterior and prior, with the derivatives that backward needs."""
    call, dtype = plan.call, plan.dtype
    wide = [t if t.dtype is dtype else t.to(dtype) for t in tensors]  # `to` takes long to find that it has nothing to do
    weight = wide.pop() if call.latents.weighted else None
    kl, z, slopes, of_z = None, None, [], None
    if noise is not None:
        z, of_z = sample_in_one_pass(call.latents.posterior.parameter, *wide[:2], noise.to(dtype))
        z = z.to(torch.promote_types(tensors[0].dtype, tensors[1].dtype))
    if call.kind is not None:
        found = kl_in_one_pass(call.latents, *wide[:2], wide[2:])
        if found is None:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in wide]
                values = kl_elements(call.latents, *leaves)
                slopes = [Slope(t, 1.0) for t in torch.autograd.grad(values.sum(), leaves)]
            values = 2 * values.detach()
        else:
            values, slopes = found
        if weight is not None:
            values = without_nan(values.mul_(weight), weight)
        kl = formula.by_kind(values, call.kind).mul_(HALF if plan.kl_scale == 1 else 0.5 * plan.kl_scale)
    return z, kl, None, None, Slopes(slopes, of_z, weight)


def without_nan(product: Tensor, weight: Tensor) -> Tensor:
    """0 where the weight is, whatever it was times."""
    return product if math.isfinite(product.sum().item()) else product.masked_fill_(weight == 0, 0.0)


def _of_slopes(plan, tensors, needs, grad_z, grad_kl, kept):
    """`latents_backward` of these."""
    found, mu = [None] * len(tensors), tensors[0]
    if grad_kl is not None:
        factor = grad_kl.reshape([-1, *[1] * (mu.dim() - 1)]) if plan.call.kind == "row" else grad_kl
        factor = factor if plan.kl_scale == 1 else factor * plan.kl_scale
        factor = factor if kept.weight is None else factor * kept.weight
        for i, (tensor, number) in enumerate(kept.of_kl):
            if needs[i]:
                found[i] = torch.mul(tensor, factor if number == 1 else factor * as_tensor(number))
                if kept.weight is not None:
                    found[i] = without_nan(found[i], kept.weight)
    if grad_z is not None:
        wide = grad_z.to(plan.dtype)
        tensor, number = kept.of_z
        if needs[0]:
            found[0] = wide.clone() if found[0] is None else found[0].add_(wide)
        if needs[1]:
            moved = torch.mul(tensor, wide)
            found[1] = moved.mul_(number) if found[1] is None else found[1].add_(moved, alpha=number)
    return [g if g is None or g.dtype is t.dtype else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]


sparse_forward, sparse_backward = sparse_reconstruction.forward, sparse_reconstruction.backward
log_ratio_forward = None  # the formula is as good, and autograd differentiates it


def total(factors, recon: Tensor, kl: Tensor) -> Tensor:
    """The loss of its two terms."""
    beta, recon_weight = factors
    if type(recon_weight) is not float or recon_weight != 1:
        recon = formula.weighted_by(recon_weight, recon)
    if isinstance(beta, Tensor):
        return recon + beta.to(kl.dtype) * kl
    return recon + kl if beta == 1 else torch.add(recon, kl, alpha=beta)


def added(grad_loss: Tensor | None, own: Tensor | None, factor: float | Tensor) -> Tensor:
    """What arrives at a term by way of the loss, in which it is times `factor`, and on its own; one of the two may be None."""
    if grad_loss is None:
        return own
    if isinstance(factor, Tensor) or factor != 1:
        grad_loss = grad_loss * factor
    return grad_loss if own is None else grad_loss + own


def _divergence(mu, logvar, weight, per_sample, dtype, keeps):
    """KL(N(mu, exp(logvar)) || N(0, 1)), reduced; and of few latents twice its derivative by each of `logvar`: of more, if it
    is kept."""
    same = mu.dtype == logvar.dtype == dtype
    if mu.numel() <= (KEPT if keeps and same else SMALL) and (not per_sample or mu.dim() == 2):
        if not same:
            mu, logvar = mu.to(dtype), logvar.to(dtype)
        slope = torch.expm1(logvar)
        kl = torch.sub(slope, logvar).addcmul_(mu, mu).sum(-1 if per_sample else None)
        return kl.mul_(HALF) if weight == 1 else kl.mul_(0.5 * weight), slope
    parts = []
    for rows, m, lv in cut_alike(per_sample, mu, logvar):
        parts.append((rows, _kl_sum(converted("mu", m, dtype), converted("logvar", lv, dtype), per_sample)))
    return added_up(parts, mu, weight, per_sample, dtype), None


# Of each latent in the mean: the least squares of `mu`, and the greatest variance, for squares of deviations to do.
FAR, WIDE = 2**-4, 1.8


def _kl_beside(std, mu, logvar, per_sample):
    """The KL of a block whose deviations are there: their squares are the variances, which saves an exponential.

    Beside the exact form they lose the digits of a KL that is small beside its terms, below 1/32 nats, and half a rounding of
    each variance, which is within what sums are off by unless variances are most of the terms. Where one of both could show,
    the exact form computes it.
    """
    dim, count = (-1, mu.shape[-1]) if per_sample else (None, mu.numel())
    if mu.numel() > SMALL and is_seen(mu, logvar):
        distance = torch.linalg.vector_norm(mu, dim=dim)
        if (distance.min() if per_sample else distance).item() >= math.sqrt(FAR * count):
            variance = torch.mul(std, std, out=scratch("terms", std, std.dtype))
            total = variance.sum(dim)
            if (total.max() if per_sample else total).item() <= WIDE * count:
                return variance.sub_(logvar).addcmul_(mu, mu).sum(dim).sub_(count).mul_(HALF)
    return _kl_sum(mu, logvar, per_sample)


def _kl_sum(mu, logvar, per_sample):
    """The KL of a block. expm1 keeps what cancels near logvar = 0."""
    terms = torch.expm1(logvar, out=scratch("terms", logvar, logvar.dtype))
    return terms.sub_(logvar).addcmul_(mu, mu).sum(-1 if per_sample else None).mul_(HALF)


def _of_kept(grad_z, mu, logvar, shift, slope, factor, weight, dtype):
    """Likewise, from what forward kept of few elements: what the noise moved them by, and the KL's derivative, twice."""
    if not mu.dtype == logvar.dtype == dtype:
        grad_z = grad_z if grad_z is None else grad_z.to(dtype)
        to_mu, to_logvar = _of_kept(grad_z, mu.to(dtype), logvar.to(dtype), shift, slope, factor, weight, dtype)
        return to_mu.to(mu.dtype), to_logvar.to(logvar.dtype)
    if factor is None:
        return grad_z.clone(), torch.mul(shift, grad_z).mul_(HALF)
    factor = factor.unsqueeze(1) if factor.dim() == 1 else factor
    factor = factor * weight if weight != 1 else factor
    to_logvar = torch.mul(slope, factor * HALF)
    if grad_z is None:
        return torch.mul(mu, factor), to_logvar
    return torch.addcmul(grad_z, mu, factor), to_logvar.addcmul_(shift, grad_z, value=0.5)


def _latent_gradients(grad_z, mu, logvar, noise, factor, weight, dtype, slope=None):
    """Gradients by `mu` and `logvar` of `grad_z . z + factor . weight . KL`; `grad_z` or `factor` may be None. `slope`: the
    KL's, from `_divergence`, which nobody else has."""
    per_sample = factor is not None and factor.dim() == 1
    if factor is not None:
        factor = factor.unsqueeze(1) if per_sample else factor
        factor = factor * weight if weight != 1 else factor
        half = factor * HALF
    if slope is not None or (mu.numel() <= SMALL and not (per_sample and mu.dim() != 2) and grad_z is None):
        same = mu.dtype == logvar.dtype == dtype
        slope = torch.expm1(logvar if same else logvar.to(dtype)) if slope is None else slope
        if same:
            return torch.mul(mu, factor), slope.mul_(half)
        return torch.mul(mu.to(dtype), factor).to(mu.dtype), slope.mul_(half).to(logvar.dtype)
    grad_mu, grad_logvar = torch.empty_like(mu), torch.empty_like(logvar)
    for rows, m, lv, dz, eps, dm, dlv in cut_alike(per_sample, mu, logvar, grad_z, noise, grad_mu, grad_logvar):
        m, lv = converted("mu", m, dtype), converted("logvar", lv, dtype)
        to_mu = dm if dm.dtype == dtype else scratch("gradient", m, dtype)
        to_logvar = dlv if dlv.dtype == dtype else scratch("slope", lv, dtype)
        if factor is not None:
            torch.expm1(lv, out=to_logvar).mul_(half[rows] if per_sample else half)
        if dz is not None:
            dz = converted("grad_z", dz, dtype)
            shift = torch.mul(lv, HALF, out=scratch("spare", lv, dtype)).exp_().mul_(eps)
        if factor is None:
            to_mu.copy_(dz)
            torch.mul(shift, dz, out=to_logvar).mul_(0.5)
        elif dz is None:
            torch.mul(m, factor[rows] if per_sample else factor, out=to_mu)
        else:
            torch.addcmul(dz, m, factor[rows] if per_sample else factor, out=to_mu)
            to_logvar.addcmul_(shift, dz, value=0.5)
        if to_mu is not dm:
            dm.copy_(to_mu)
        if to_logvar is not dlv:
            dlv.copy_(to_logvar)
    return grad_mu, grad_logvar
