"""The primitives in pure Torch: what runs on a CPU, and wherever Triton cannot.

`triton_backend` has the same ones, so the two can be read side by side: `draw_noise`, `loss_forward`, `loss_backward`,
`latents_forward` and `latents_backward`. Formulas are evaluated a block at a time, with results in scratch memory that stays
in cache, and gradients come from the same pass.

Tensors come as the plan's `dense` lays them out. A `beta` is a float, or a 0-d tensor on the device.
"""

import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ..likelihoods.base import HALF
from . import formula

# Elements of a block, and of each thread's part of it at least: a few buffers of 3 MB stay in the last-level cache. Smaller
# blocks would fit in a nearer one, but starting the threads for every operation costs more than that gains.
BLOCK, THREAD = 3 * 2**18, 2**16

# Elements that a temporary tensor may have without costing more than memory that is kept.
SMALL = 2**14


def draw_noise(like: Tensor, layout: torch.memory_format, generator: torch.Generator | None) -> Tensor:
    """Standard normals of the shape and dtype of `like`: the ones that `torch.randn_like` would give in that layout."""
    return torch.empty_like(like, memory_format=layout).normal_(generator=generator)


def loss_forward(plan, beta, tensors, divisor, known, wants, stateless=False):
    """Loss, reconstruction and KL, and the gradients of the reconstruction by the parameters in `wants`.

    - `divisor`: what the sum of the reconstruction is divided by.
    - `known`: the upstream factor of each row, `[B]`, where it is known; None: the plan's guess is taken.
    - `wants`: of each parameter, whether it wants a gradient.
    - `stateless`: keep nothing on the device for later calls; this backend never does.

    Returns `(loss, recon, kl, stored, sums, used)`: three results, `[]` or `[B]`, None where there is no KL; of each parameter
    its gradient times the factor `used`, or None. `sums`, of small parameters, are none of this backend's.
    """
    n, dtype, used = plan.count, plan.dtype, None
    x = tensors[n]
    # Elsewhere than on a CPU nothing could look at the guess in backward without a sync: it computes the gradient there.
    if True in wants and x.device.type == "cpu":
        used = plan.guess.known[1] if known is None else known
    recon, stored = _reconstruct(plan, tensors, divisor, used, wants, True)
    latents = plan.latents
    if latents == 0:
        return None, recon, None, stored, None, used
    if latents == 1:
        kl = tensors[-1].to(dtype, copy=True)
    else:
        kl = _divergence(tensors[-2], tensors[-1], plan.kl_weight, plan.per_sample, dtype)
    if isinstance(beta, Tensor):
        return recon + beta.to(dtype) * kl, recon, kl, stored, None, used
    return torch.add(recon, kl, alpha=beta), recon, kl, stored, None, used


def loss_backward(plan, beta, tensors, divisor, upstreams, stored, sums, used, needs):
    """Gradients by the tensors in `needs`, among which x and the weight never are.

    `upstreams`: the gradients that arrived at loss, reconstruction and KL, each `[]`, `[B]` or None. `stored` is what forward
    stored with the factor `used`, or both are None: handed on where the factor was right, computed anew where it was wrong.

    Returns the gradients, a list, and the upstream factor of the reconstruction, `[B]` or `[1]`, for the next forward to guess.
    """
    n, grads, seen = plan.count, [None] * len(tensors), None
    grad_loss, grad_recon, grad_kl = upstreams
    wants = needs[:n]
    if True in wants and not (grad_loss is None and grad_recon is None):
        seen = added(grad_loss, grad_recon).reshape(-1)
        if stored is not None and torch.equal(seen, used):  # a NaN equals nothing
            seen = used
        else:
            seen = seen.to(plan.dtype, copy=True)  # whoever passed it in may write to it
            _, stored = _reconstruct(plan, tensors, divisor, seen, wants, False)
        grads[:n] = stored
    if True in needs[n:] and not (grad_loss is None and grad_kl is None):
        factor = added(grad_loss, grad_kl, beta)
        if plan.latents == 1:
            grads[-1] = factor.to(tensors[-1].dtype, copy=True)
        else:
            grads[-2:] = _latent_gradients(None, *tensors[-2:], None, factor, plan.kl_weight, plan.dtype)
    return grads, seen


def latents_forward(plan, tensors, noise, stateless=False):
    """`(z, kl, weighted, sums, kept)` of latents, each None where it is not computed: z if there is noise, the normals
    themselves; the KL, `[]` or `[B]`, unless the call's kind is None; the KL with free bits; no sums, by this backend; and what
    backward needs of it."""
    kind, dtype, per_sample, (mu, logvar) = plan.call.kind, plan.dtype, plan.per_sample, tensors
    if noise is None:
        kl = _divergence(mu, logvar, plan.kl_weight, per_sample, dtype)
        found = (kl, None, None, None) if plan.call.groups is None else formula.with_free_bits(plan.call, mu, kl, None, None)
        return None, *found
    if plan.is_whole and noise.dtype == dtype:
        z = torch.mul(logvar, HALF).exp_().mul_(noise).add_(mu)  # addcmul would round otherwise than the naive code
        return z, None if kind is None else _divergence(mu, logvar, plan.kl_weight, per_sample, dtype), None, None, None
    z, parts = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype)), []
    for rows, m, lv, eps, out in _blocks(per_sample, mu, logvar, noise, z):
        m, lv, eps = _converted("mu", m, dtype), _converted("logvar", lv, dtype), _converted("noise", eps, dtype)
        sampled = out if out.dtype == dtype else _scratch("spare", lv, dtype)
        torch.mul(lv, HALF, out=sampled).exp_().mul_(eps).add_(m)
        if sampled is not out:
            out.copy_(sampled)
        if kind is not None:
            parts.append((rows, _kl_sum(m, lv, per_sample)))
    return z, None if kind is None else _total(parts, mu, plan.kl_weight, per_sample, dtype), None, None, None


def latents_backward(plan, tensors, noise, needs, grad_z, grad_kl, grad_weighted=None, kept=None):
    """Gradients by mu and logvar, from those that arrived at z, at the KL and at that with free bits, of which one at least is
    there; `kept` is what forward has."""
    if grad_z is not None:
        grad_z = grad_z.contiguous(memory_format=plan.layout)
    if kept is not None:
        grad_kl, _ = formula.without_free_bits(plan.call, tensors[0], kept, grad_kl, grad_weighted)
    return _latent_gradients(grad_z, *tensors, noise, grad_kl, plan.kl_weight, plan.dtype)


log_ratio_forward = None  # the formula is as good, and autograd differentiates it


def added(grad_loss: Tensor | None, own: Tensor | None, beta: float | Tensor = 1.0) -> Tensor:
    """What arrives at a term by way of the loss, in which it is times `beta`, and on its own; one of the two may be None."""
    if grad_loss is None:
        return own
    if isinstance(beta, Tensor) or beta != 1:
        grad_loss = grad_loss * beta
    return grad_loss if own is None else grad_loss + own


def _reconstruct(plan, tensors, divisor, factor, wants, wants_sum):
    """`(sum, gradients)`: the reduced sum if it is wanted, and the gradients that are, times `factor`, unless that is None."""
    n, by = plan.count, None
    x, divides = tensors[n], isinstance(divisor, Tensor) or divisor != 1
    if tensors[0].shape[0] != x.shape[0]:
        return _of_samples(plan, tensors, divisor, factor, wants, wants_sum)
    if factor is not None:
        by = factor.unsqueeze(1) if plan.per_sample else factor.item() if x.device.type == "cpu" else factor.squeeze(0)
        by = by / divisor if divides else by
    if plan.is_whole:
        weight = tensors[n + 1] if plan.weight_shape is not None else None
        gradients = [
            torch.empty_like(p) if want and by is not None else None for p, want in zip(tensors[:n], wants, strict=True)
        ]
        total, _ = _block(plan, tensors[:n], x, weight, by, gradients, wants_sum, plan.per_sample)
    else:
        compute = _in_blocks if plan.is_elementwise else _over_classes if plan.is_of_classes else _in_rows
        total, gradients = compute(plan, tensors, by, wants, wants_sum)
    return total / divisor if wants_sum and divides else total, gradients


def _of_samples(plan, tensors, divisor, factor, wants, wants_sum):
    """Likewise, of several samples of all of x, one after the other."""
    n, batch = plan.count, tensors[plan.count].shape[0]
    samples = list(zip(*(p.split(batch) for p in tensors[:n]), strict=True))
    factors = [None] * len(samples) if factor is None else factor.split(batch)
    found = [
        _reconstruct(plan, (*p, *tensors[n:]), divisor, f, wants, wants_sum) for p, f in zip(samples, factors, strict=True)
    ]
    sums, gradients = zip(*found, strict=True)
    joined = None if factor is None else [g if g[0] is None else torch.cat(g) for g in zip(*gradients, strict=True)]
    return torch.cat(sums) if wants_sum else None, joined


def _block(plan, parameters, x, weight, by, out, wants_sum, per_sample):
    """`(sum, gradients)` of a block: the weighted sum, if it is wanted, and the gradients times `by`, in the tensors of `out`
    that are not None. All come in one dtype, and the target as the likelihood's formula takes it.

    A weight broadcasts to the terms, and parameters to the first. The gradient by one that is smaller is given for each
    element, as large as the tensor of `out`, or summed.
    """
    likelihood, found = plan.likelihood, None
    # Something weighted by 0 may be NaN, which only the sum tells.
    if likelihood.one_pass is not None and (wants_sum or weight is None):
        found = likelihood.one_pass(parameters, x, wants_sum, out, _spare(parameters[0], plan.dtype))
    total = None
    if found is not None and wants_sum:
        values, scale, constant, _ = found
        total = _sum(values if weight is None else values.mul_(weight), per_sample)
        if scale != 1:
            total.mul_(_number(scale))
        if constant:
            counted = values.numel() / max(total.numel(), 1) if weight is None else _sum(weight.expand_as(values), per_sample)
            total.add_(constant * counted)
        if weight is not None and not torch.isfinite(total).all():
            found = None
    if found is None:
        return _by_formula(plan, parameters, x, weight, by, out, wants_sum, per_sample)
    for gradient, slope in zip(out, found.slopes, strict=True):
        if gradient is None:
            continue
        if weight is not None:
            gradient.mul_(weight if weight.dim() == gradient.dim() else weight.unsqueeze(likelihood.dim))
        factor = by if slope == 1 else by * slope
        if isinstance(factor, Tensor) or factor != 1:
            gradient.mul_(factor if isinstance(factor, Tensor) else _number(factor))
    return total, out


def _by_formula(plan, parameters, x, weight, by, out, wants_sum, per_sample):
    """Likewise, by the derivative of the formula."""
    wants = [gradient is not None for gradient in out]
    with torch.set_grad_enabled(any(wants)):
        leaves = [p.detach().requires_grad_(want) for p, want in zip(parameters, wants, strict=True)]
        values = formula.weighted_nll(plan.likelihood, leaves, x, weight)
    gradients = list(out)
    if any(wants):
        # Not afterwards: a derivative may overflow, as that by a rate of 1e-39.
        found = iter(_derivatives(values, [leaf for leaf in leaves if leaf.requires_grad], by))
        for i, gradient in enumerate(out):
            if gradient is not None:
                value = next(found)
                gradients[i] = gradient.copy_(value) if value.shape == gradient.shape else value
    return _sum(values.detach(), per_sample) if wants_sum else None, gradients


def _derivatives(values, leaves, by):
    """Those of the values by the leaves, times `by`, a float or a tensor that is one for all or for each row."""
    if isinstance(by, Tensor):
        by = by.reshape(-1, *[1] * (values.dim() - 1)) if by.dim() else by
        upstream = by.to(values.dtype).expand_as(values)
    else:
        upstream = torch.full_like(values, by)
    return torch.autograd.grad(values, leaves, upstream, materialize_grads=True)


def _sum(values, per_sample):
    """Of everything, or of each row."""
    if not per_sample:
        return values.sum()
    return values.sum(-1) if values.dim() == 2 else formula.reduced(values, "none")


@functools.lru_cache(1024)
def _number(value: float) -> Tensor:
    """A number as a tensor, which Torch makes of it at every operation."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device="cpu")


def _in_blocks(plan, tensors, by, wants, wants_sum):
    """`(sum, gradients)` of terms of one element each, a block at a time; the gradients times `by`."""
    dtype, per_sample, n = plan.dtype, plan.per_sample, plan.count
    parameters, x, weight = tensors[:n], tensors[n], None
    if plan.weight_shape is not None:
        weight = tensors[n + 1].expand_as(x).contiguous(memory_format=plan.layout)
    out = [torch.empty_like(p) if want and by is not None else None for p, want in zip(parameters, wants, strict=True)]
    (scale, shift), parts = plan.scaling, []
    for rows, t, w, *blocks in _blocks(per_sample, x, weight, *parameters, *out):
        t = _converted("target", t, dtype)
        if scale != 1:
            t = torch.mul(t, scale, out=_scratch("target", t, dtype))
        if shift != 0:
            t = torch.add(t, shift, out=_scratch("target", t, dtype))
        w = w if w is None else _converted("weight", w, dtype)
        given, slopes = _as_computed(blocks, n, dtype)
        f = by[rows] if isinstance(by, Tensor) and by.dim() else by
        parts.append((rows, _block(plan, given, t, w, f, slopes, wants_sum, per_sample)[0]))
        _put_back(slopes, blocks[n:])
    return _total(parts, x, 1.0, per_sample, dtype) if wants_sum else None, out


def _over_classes(plan, tensors, by, wants, wants_sum):
    """Likewise, of terms that are made of many elements, some rows at a time."""
    dtype, per_sample, likelihood = plan.dtype, plan.per_sample, plan.likelihood
    (logits,), x, weight, _ = plan.call.split(tensors)
    if weight is not None:
        weight = weight.expand(likelihood.terms(logits, x))
    out, parts = torch.empty_like(logits) if wants[0] and by is not None else None, []
    height = max(1, _limit() // max(1, logits[0].numel()))
    for i in range(0, logits.shape[0], height):
        rows = slice(i, i + height)
        block = [logits[rows], None if out is None else out[rows]]
        given, slopes = _as_computed(block, 1, dtype)
        target = likelihood.target(given[0], x[rows], dtype)
        w = None if weight is None else weight[rows].to(dtype)
        f = by[rows].reshape(-1, *[1] * (logits.dim() - 1)) if isinstance(by, Tensor) and by.dim() else by
        parts.append((rows, _block(plan, given, target, w, f, slopes, wants_sum, per_sample)[0]))
        _put_back(slopes, block[1:])
    return _total(parts, logits, 1.0, per_sample, dtype) if wants_sum else None, [out]


def _as_computed(blocks, n, dtype):
    """Of `n` parameters and as many gradients, which may be None, those in the dtype of the arithmetic, or memory for them."""
    given = [_converted(f"parameter {i}", p, dtype) for i, p in enumerate(blocks[:n])]
    slopes = [g if g is None or g.dtype == dtype else _scratch(f"gradient {i}", g, dtype) for i, g in enumerate(blocks[n:])]
    return given, slopes


def _put_back(slopes, gradients):
    for slope, gradient in zip(slopes, gradients, strict=True):
        if slope is not gradient:
            gradient.copy_(slope)


def _in_rows(plan, tensors, by, wants, wants_sum):
    """Likewise, of parameters smaller than the target, some rows at a time; all at once where a likelihood has no form of its
    own, since autograd then keeps small what is small."""
    dtype, per_sample, likelihood = plan.dtype, plan.per_sample, plan.likelihood
    parameters, x, weight, _ = plan.call.split(tensors)
    shape, batch, parts = parameters[0].shape, x.shape[0], []
    aligned = [p.reshape([1] * (len(shape) - p.dim()) + list(p.shape)) for p in parameters]
    totals = [
        None if not want or by is None else (torch.empty_like if p.shape == shape else torch.zeros_like)(p, dtype=dtype)
        for p, want in zip(aligned, wants, strict=True)
    ]

    def of_rows(value, rows):
        return value[rows] if value is not None and value.shape[0] == batch else value

    height = batch if likelihood.one_pass is None or likelihood.dim is not None else max(1, _limit() // max(1, x[0].numel()))
    for i in range(0, batch, height):
        rows = slice(i, i + height)
        given = [of_rows(p, rows).to(dtype) for p in aligned]
        target = likelihood.target(given[0], x[rows], dtype)
        w = None if weight is None else of_rows(weight, rows).to(dtype)
        f = by[rows].reshape(-1, *[1] * (len(shape) - 1)) if isinstance(by, Tensor) and by.dim() else by
        places = [of_rows(t, rows) for t in totals]
        out = [t if t is None or t.shape == given[0].shape else torch.empty_like(given[0]) for t in places]
        total, gradients = _block(plan, given, target, w, f, out, wants_sum, per_sample)
        parts.append((rows, total))
        for place, gradient in zip(places, gradients, strict=True):
            if place is not gradient:
                place.add_(gradient.sum_to_size(place.shape))
    found = [t if t is None else t.view(p.shape).to(p.dtype) for t, p in zip(totals, parameters, strict=True)]
    return _total(parts, x, 1.0, per_sample, dtype) if wants_sum else None, found


def _divergence(mu, logvar, weight, per_sample, dtype):
    """KL(N(mu, exp(logvar)) || N(0, 1)), reduced."""
    if mu.dtype == logvar.dtype == dtype and mu.numel() <= SMALL and (not per_sample or mu.dim() == 2):
        kl = torch.expm1(logvar).sub_(logvar).addcmul_(mu, mu).sum(-1 if per_sample else None)
        return kl.mul_(HALF) if weight == 1 else kl.mul_(0.5 * weight)
    parts = []
    for rows, m, lv in _blocks(per_sample, mu, logvar):
        parts.append((rows, _kl_sum(_converted("mu", m, dtype), _converted("logvar", lv, dtype), per_sample)))
    return _total(parts, mu, weight, per_sample, dtype)


def _kl_sum(mu, logvar, per_sample):
    """The KL of a block. expm1 keeps what cancels near logvar = 0."""
    terms = torch.expm1(logvar, out=_scratch("spare", logvar, logvar.dtype))
    return terms.sub_(logvar).addcmul_(mu, mu).sum(-1 if per_sample else None).mul_(HALF)


def _latent_gradients(grad_z, mu, logvar, noise, factor, weight, dtype):
    """Gradients by `mu` and `logvar` of `grad_z . z + factor . weight . KL`; `grad_z` or `factor` may be None."""
    per_sample = factor is not None and factor.dim() == 1
    if factor is not None:
        factor = factor.unsqueeze(1) if per_sample else factor
        factor = factor * weight if weight != 1 else factor
        half = factor * HALF
    is_small = mu.numel() <= SMALL and mu.dtype == logvar.dtype == dtype and not (per_sample and mu.dim() != 2)
    if is_small and factor is not None and (grad_z is None or grad_z.dtype == noise.dtype == dtype):
        grad_logvar = torch.expm1(logvar).mul_(half)
        if grad_z is None:
            return torch.mul(mu, factor), grad_logvar
        shift = torch.mul(logvar, HALF).exp_().mul_(noise)
        return torch.addcmul(grad_z, mu, factor), grad_logvar.addcmul_(shift, grad_z, value=0.5)
    grad_mu, grad_logvar = torch.empty_like(mu), torch.empty_like(logvar)
    for rows, m, lv, dz, eps, dm, dlv in _blocks(per_sample, mu, logvar, grad_z, noise, grad_mu, grad_logvar):
        m, lv = _converted("mu", m, dtype), _converted("logvar", lv, dtype)
        to_mu = dm if dm.dtype == dtype else _scratch("gradient", m, dtype)
        to_logvar = dlv if dlv.dtype == dtype else _scratch("slope", lv, dtype)
        if factor is not None:
            torch.expm1(lv, out=to_logvar).mul_(half[rows] if per_sample else half)
        if dz is not None:
            dz = _converted("grad_z", dz, dtype)
            shift = torch.mul(lv, HALF, out=_scratch("spare", lv, dtype)).exp_().mul_(eps)
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


def _total(parts: list[tuple], like: Tensor, weight: float, per_sample: bool, dtype: torch.dtype) -> Tensor:
    """The sums of blocks, `(index of the rows, sum)`, added up and times `weight`, `[]` or `[B]`."""
    if len(parts) == 1:
        return parts[0][1].mul_(weight) if weight != 1 else parts[0][1]
    if not per_sample:
        return torch.stack([part for _, part in parts]).sum(dtype=torch.float64).mul_(weight).to(dtype)
    total = torch.zeros(like.shape[:1], dtype=torch.float64, device=like.device)
    for rows, part in parts:
        total[rows] += part
    return total.mul_(weight).to(dtype)


def _converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else _scratch(name, value, dtype).copy_(value)


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}
        self.pairs: dict[torch.dtype, Tensor] = {}


_memory = _Memory()


def _scratch(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of the shape of `like`. Each thread keeps its own for the next call: the page faults of fresh memory cost as much
    as the arithmetic."""
    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=dtype)
    memory = _memory.buffers.get((name, dtype))
    if memory is None or memory.numel() < like.numel():
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            memory = _memory.buffers[name, dtype] = torch.empty(max(_limit(), like.numel()), dtype=dtype, device=like.device)
    return memory.as_strided(like.shape, like.stride())


def _spare(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two buffers of the shape of `like`, likewise."""
    if like.numel() <= SMALL:
        return torch.empty_like(like, dtype=dtype), torch.empty_like(like, dtype=dtype)
    if like.device.type != "cpu" or (found := _memory.pairs.get(dtype)) is None or found.shape[1] < like.numel():
        return _made_pair(like, dtype)
    shape, stride = like.shape, like.stride()
    return found.as_strided(shape, stride), found.as_strided(shape, stride, found.shape[1])


def _made_pair(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=dtype), torch.empty_like(like, dtype=dtype)
    with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
        _memory.pairs[dtype] = torch.empty(2, max(_limit(), like.numel()), dtype=dtype, device=like.device)
    return _spare(like, dtype)


def _limit() -> int:
    """Elements of a block on a CPU."""
    return max(BLOCK, THREAD * torch.get_num_threads())


def _blocks(per_sample: bool, *tensors: Tensor | None) -> Iterator[tuple]:
    """The tensors cut alike into blocks that fit in cache, flat or as `[rows, features]`: `(index of the rows, *blocks)`.

    The first of them is not None; None stays None. A device other than a CPU has nothing to gain from blocks and gets one.
    """
    first = tensors[0]
    numel = first.numel()
    limit = _limit() if first.device.type == "cpu" else numel
    if numel <= limit and not per_sample:
        yield ..., *tensors
        return
    rows = first.shape[0] if per_sample else 1
    columns = numel // max(rows, 1)
    if numel <= limit:
        yield ..., *(t if t is None else t.as_strided((rows, columns), (columns, 1)) for t in tensors)
        return
    height, width = max(1, limit // columns), min(limit, columns)
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            shape, start = (min(height, rows - i), min(width, columns - j)), i * columns + j
            index = slice(i, i + height) if per_sample else ...
            yield (
                index,
                *(t if t is None else t.as_strided(shape, (columns, 1), t.storage_offset() + start) for t in tensors),
            )
