"""The primitives in pure Torch: what runs on a CPU, and wherever Triton cannot.

Their signatures are those of `fastelbo.kernels`, so the two can be read side by side. The formulas are evaluated a block
at a time with results written into scratch memory that stays in cache, and the gradient comes from the same pass.

Arguments that several of them take:

- `recon_x`, `x`: prediction and target of one shape `[B, ...]` and one dense memory layout. `mu`, `logvar`: likewise, or None.
- `beta`, `scale`: a float, or a 0-d tensor on the device.
- `weights`: the factors that turn the sums of reconstruction and KL into the reduction asked for.
- `per_sample`: one result a sample, `[B]`, instead of one, `[]`.
- `dtype`: that of the results and of the arithmetic, float32 or float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .likelihoods import LIKELIHOODS

# Elements of a block, and of each thread's part of it at least: a few buffers of 2 MB stay in the last-level cache. Smaller
# blocks would fit in a nearer one, but starting the threads for every operation costs more than that gains.
BLOCK, THREAD = 2**19, 2**16


def draw_noise(like: Tensor, layout: torch.memory_format, generator: torch.Generator | None) -> Tensor:
    """Standard normals of the shape and dtype of `like`: the ones that `torch.randn_like` would give in that layout."""
    return torch.empty_like(like, memory_format=layout).normal_(generator=generator)


def loss_forward(recon_x, x, mu, logvar, kl, beta, guess, *, likelihood, scale, target_scale, weights, per_sample, dtype):
    """Loss, reconstruction and KL, and the gradient of the reconstruction.

    `kl`, a KL that is already reduced, stands for `mu` and `logvar` where they are None. `guess`, `[B]` or `[1]`, is the
    upstream factor to store the gradient with; None: no gradient is wanted.

    Returns `(loss, recon, kl, gradient)`: three tensors `[]` or `[B]`, and `guess * d recon / d recon_x` or None.
    """
    # Elsewhere than on a CPU nothing could look at the guess in backward without a sync: it computes the gradient there.
    gradient = torch.empty_like(recon_x) if guess is not None and recon_x.device.type == "cpu" else None
    recon = _reconstruct(recon_x, x, gradient, guess, likelihood, scale, target_scale, weights[0], per_sample, dtype, True)
    kl = _kl_sum(mu, logvar, weights[1], per_sample, dtype) if kl is None else kl.to(dtype, copy=True)
    if isinstance(beta, Tensor):
        loss = recon + beta.to(dtype) * kl
    else:
        loss = torch.add(recon, kl, alpha=beta)
    return loss, recon, kl, gradient


def loss_backward(
    recon_x, x, mu, logvar, beta, upstreams, gradient, used, *,
    likelihood, scale, target_scale, weights, per_sample, dtype, wants_recon, wants_latents, wants_kl,
):  # fmt: skip
    """Gradients by `recon_x`, `mu`, `logvar` and `kl`, each of which may be unwanted.

    `upstreams`: the gradients that arrived at loss, reconstruction and KL, each `[]`, `[B]` or None; one that a wanted
    gradient needs is there. `gradient` is what forward stored with the factor `used`, or None: handed on where the factor
    was right, computed anew where it was wrong.

    Returns `(grad_recon_x, grad_mu, grad_logvar, grad_kl, seen)`, None where unwanted; `seen`, `[B]` or `[1]`, is the upstream
    factor of the reconstruction, for the next forward to guess.
    """
    grad_loss, grad_recon, grad_kl = upstreams
    grad_mu = grad_logvar = seen = factor = None
    if wants_recon:
        seen = _add(grad_loss, grad_recon).reshape(-1)
        if gradient is not None and torch.equal(seen, used):  # a NaN equals nothing
            seen = used
        else:
            seen = seen.to(dtype, copy=True)  # whoever passed it in may write to it
            gradient = torch.empty_like(recon_x)
            _reconstruct(recon_x, x, gradient, seen, likelihood, scale, target_scale, weights[0], per_sample, dtype, False)
    if wants_latents or wants_kl:
        factor = _kl_factor(beta, grad_loss, grad_kl)
    if wants_latents:
        grad_mu, grad_logvar = _latent_gradients(None, mu, logvar, None, factor, weights[1], dtype)
    return gradient if wants_recon else None, grad_mu, grad_logvar, factor if wants_kl else None, seen


def sample_forward(mu, logvar, noise, *, kl_weight, per_sample, dtype, wants_kl):
    """z = mu + exp(logvar / 2) * noise and, if `wants_kl`, the KL, `[]` or `[B]`. Returns `(z, kl or None)`."""
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    for _, m, lv, eps, out in _blocks(False, mu, logvar, noise, z):
        out.copy_(_std(lv, dtype).mul_(eps).add_(m))
    return z, _kl_sum(mu, logvar, kl_weight, per_sample, dtype) if wants_kl else None


def sample_backward(grad_z, mu, logvar, noise, beta, upstreams, *, kl_weight, per_sample, dtype):
    """Gradients by `mu` and `logvar`: `grad_z` arrived at z, `upstreams` at loss and KL, each `[]`, `[B]` or None.

    At least one of the three is there.
    """
    factor = _kl_factor(beta, *upstreams) if any(g is not None for g in upstreams) else None
    return _latent_gradients(grad_z, mu, logvar, noise, factor, kl_weight, dtype)


def _reconstruct(
    recon_x, x, gradient, factor, likelihood, scale, target_scale, weight, per_sample, dtype, wants_sum
):  # fmt: skip
    """The reduced reconstruction if `wants_sum`; its gradient times `factor` goes into `gradient`, unless that is None."""
    fused = LIKELIHOODS[likelihood].fused
    dim = (-1 if per_sample else None) if wants_sum else False
    factor = None if gradient is None else _column(factor, weight, per_sample)
    sums = _Sums()
    scratch: dict[tuple, Tensor] = {}

    def buffer(name: str, like: Tensor) -> Tensor:
        key = (name, like.shape)
        if key not in scratch:
            scratch[key] = torch.empty(like.shape, dtype=dtype, device=like.device)
        return scratch[key]

    for rows, p, t, g in _blocks(per_sample, recon_x, x, gradient):
        if t.dtype != dtype:
            t = buffer("target", t).copy_(t)
        if target_scale != 1:
            t = torch.mul(t, target_scale, out=buffer("target", t))
        slope = g if g is not None and g.dtype == dtype else buffer("gradient", p)
        if p.dtype != dtype:
            p = buffer("prediction", p).copy_(p)
        part = fused(p, t, scale, dim, factor[rows] if isinstance(factor, Tensor) else factor, slope, buffer("spare", p))
        sums.add(rows, part)
        if g is not None and slope is not g:
            g.copy_(slope)
    return sums.total(recon_x, weight, per_sample, dtype) if wants_sum else None


def _kl_sum(mu, logvar, weight, per_sample, dtype):
    """KL(N(mu, exp(logvar)) || N(0, 1)), reduced. expm1 keeps what cancels near logvar = 0."""
    sums = _Sums()
    for rows, m, lv in _blocks(per_sample, mu, logvar):
        m, lv = m.to(dtype), lv.to(dtype)
        sums.add(rows, torch.expm1(lv).sub_(lv).addcmul_(m, m).sum(-1 if per_sample else None))
    return sums.total(mu, 0.5 * weight, per_sample, dtype)


def _latent_gradients(grad_z, mu, logvar, noise, factor, weight, dtype):
    """Gradients by `mu` and `logvar` of `grad_z . z + factor . weight . KL`; `grad_z` or `factor` may be None."""
    per_sample = factor is not None and factor.dim() == 1
    factor = None if factor is None else _column(factor, weight, per_sample)
    grad_mu, grad_logvar = torch.empty_like(mu), torch.empty_like(logvar)
    for rows, m, lv, dz, eps, dm, dlv in _blocks(per_sample, mu, logvar, grad_z, noise, grad_mu, grad_logvar):
        f = factor[rows] if isinstance(factor, Tensor) else factor
        to_mu = dm if dm.dtype == dtype else torch.empty_like(dm, dtype=dtype)
        to_logvar = dlv if dlv.dtype == dtype else torch.empty_like(dlv, dtype=dtype)
        lv = lv.to(dtype)
        if factor is not None:
            torch.mul(m, f, out=to_mu)
            torch.expm1(lv, out=to_logvar).mul_(0.5 * f)
            if dz is not None:
                to_mu.add_(dz)
                to_logvar.add_(_std(lv, dtype).mul_(eps).mul_(dz), alpha=0.5)
        else:
            to_mu.copy_(dz)
            torch.mul(_std(lv, dtype).mul_(eps), dz, out=to_logvar).mul_(0.5)
        if to_mu is not dm:
            dm.copy_(to_mu)
        if to_logvar is not dlv:
            dlv.copy_(to_logvar)
    return grad_mu, grad_logvar


def _std(logvar: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(logvar.to(dtype), 0.5).exp_()


def _kl_factor(beta, grad_loss, grad_kl):
    if grad_loss is not None and (isinstance(beta, Tensor) or beta != 1):
        grad_loss = grad_loss * beta
    return _add(grad_loss, grad_kl)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _column(factor: Tensor, weight: float, per_sample: bool) -> Tensor | float:
    """`factor * weight`, `[B, 1]` to multiply rows with; one number, on a CPU, is read."""
    if per_sample:
        return (factor * weight).unsqueeze(1)
    return (factor.item() if factor.device.type == "cpu" else factor) * weight


class _Sums:
    """The sums of the blocks. More than one, which only a CPU has, are added up in float64."""

    def __init__(self) -> None:
        self.parts: list[tuple] = []

    def add(self, rows, part: Tensor | None) -> None:
        self.parts.append((rows, part))

    def total(self, like: Tensor, weight: float, per_sample: bool, dtype: torch.dtype) -> Tensor:
        """Their sum times `weight`, `[]` or `[B]`."""
        if len(self.parts) == 1:
            return self.parts[0][1].mul_(weight) if weight != 1 else self.parts[0][1]
        total = torch.zeros(like.shape[:1] if per_sample else (), dtype=torch.float64)
        for rows, part in self.parts:
            total[rows] += part
        return total.mul_(weight).to(dtype)


def _blocks(per_sample: bool, *tensors: Tensor | None) -> Iterator[tuple]:
    """The tensors cut alike into blocks that fit in cache, flat or as `[rows, features]`: `(index of the rows, *blocks)`.

    The first of them is not None; None stays None. A device other than a CPU has nothing to gain from blocks and gets one.
    """
    first = tensors[0]
    numel = first.numel()
    limit = max(BLOCK, THREAD * torch.get_num_threads()) if first.device.type == "cpu" else numel
    if numel <= limit and not per_sample:
        yield ..., *tensors
        return
    rows = first.shape[0] if per_sample else 1
    columns = numel // max(rows, 1)
    views = [t if t is None else t.as_strided((rows, columns), (columns, 1)) for t in tensors]
    if numel <= limit:
        yield ..., *views
        return
    height, width = max(1, limit // columns), min(limit, columns)
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            index = slice(i, i + height) if per_sample else ...
            yield index, *(v if v is None else v[i : i + height, j : j + width] for v in views)
