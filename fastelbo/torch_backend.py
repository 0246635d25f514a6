"""The primitives in pure Torch: what runs on a CPU, and wherever Triton cannot.

Their signatures are those of `fastelbo.kernels`, so the two can be read side by side. The formulas are evaluated a block
at a time with results written into scratch memory that stays in cache, and the gradient comes from the same pass.

Arguments that several of them take:

- `recon_x`, `x`: prediction and target of one shape `[B, ...]` and one dense memory layout. `mu`, `logvar`: likewise, or None.
  With `per_sample`, `recon_x` may be `[S * B, ...]`: S samples of all of `x`, one after the other.
- `beta`, `scale`: a float, or a 0-d tensor on the device.
- `weights`: the factors that turn the sums of reconstruction and KL into the reduction asked for.
- `per_sample`: one result a sample, `[B]`, instead of one, `[]`.
- `dtype`: that of the results and of the arithmetic, float32 or float64.
- `stateless`: keep nothing on a GPU for later calls. Nothing is kept there by this backend.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .numerics import positive
from .plain import HALF, PLAIN

# Elements of a block, and of each thread's part of it at least: a few buffers of 3 MB stay in the last-level cache. Smaller
# blocks would fit in a nearer one, but starting the threads for every operation costs more than that gains.
BLOCK, THREAD = 3 * 2**18, 2**16


def draw_noise(like: Tensor, layout: torch.memory_format, generator: torch.Generator | None) -> Tensor:
    """Standard normals of the shape and dtype of `like`: the ones that `torch.randn_like` would give in that layout."""
    return torch.empty_like(like, memory_format=layout).normal_(generator=generator)


def loss_forward(
    recon_x, x, mu, logvar, kl, beta, guess, *,
    likelihood, scale, target_scale, weights, per_sample, dtype, stateless=False,
):  # fmt: skip
    """Loss, reconstruction and KL, and the gradient of the reconstruction.

    `kl`, a KL that is already reduced, stands for `mu` and `logvar` where they are None. `guess`, `[B]` or `[1]`, is the
    upstream factor to store the gradient with; None: no gradient is wanted.

    Returns `(loss, recon, kl, gradient)`: three tensors `[]` or `[B]`, and `guess * d recon / d recon_x` or None.
    """
    # Elsewhere than on a CPU nothing could look at the guess in backward without a sync: it computes the gradient there.
    gradient = torch.empty_like(recon_x) if guess is not None and recon_x.device.type == "cpu" else None
    recon = _reconstruct(recon_x, x, gradient, guess, likelihood, scale, target_scale, weights[0], per_sample, dtype, True)
    kl = _divergence(mu, logvar, weights[1], per_sample, dtype) if kl is None else kl.to(dtype, copy=True)
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


def sample_forward(mu, logvar, noise, *, kl_weight, per_sample, dtype, wants_kl, stateless=False):
    """z = mu + exp(logvar / 2) * noise and, if `wants_kl`, the KL, `[]` or `[B]`. Returns `(z, kl or None)`."""
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    parts = []
    for rows, m, lv, eps, out in _blocks(per_sample, mu, logvar, noise, z):
        m, lv, eps = (_converted(name, t, dtype) for name, t in (("mu", m), ("logvar", lv), ("noise", eps)))
        sampled = out if out.dtype == dtype else _scratch("spare", lv, dtype)
        torch.mul(lv, HALF, out=sampled).exp_().mul_(eps).add_(m)  # addcmul would round otherwise than the naive code
        if sampled is not out:
            out.copy_(sampled)
        if wants_kl:
            parts.append((rows, _kl_sum(m, lv, per_sample)))
    return z, _total(parts, mu, kl_weight, per_sample, dtype) if wants_kl else None


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
    if len(recon_x) != len(x):
        options = likelihood, scale, target_scale, weight, per_sample, dtype, wants_sum
        nothing = [None] * (len(recon_x) // len(x))
        samples = (nothing if t is None else t.split(len(x)) for t in (recon_x, gradient, factor))
        sums = [_reconstruct(p, x, g, f, *options) for p, g, f in zip(*samples, strict=True)]
        return torch.cat(sums) if wants_sum else None
    fused, scale = PLAIN[likelihood].fused, positive(scale) if isinstance(scale, Tensor) else scale
    dim = (-1 if per_sample else None) if wants_sum else False
    factor = None if gradient is None else _column(factor, weight, per_sample)
    parts = []
    for rows, p, t, g in _blocks(per_sample, recon_x, x, gradient):
        t = _converted("target", t, dtype)
        if target_scale != 1:
            t = torch.mul(t, target_scale, out=_scratch("target", t, dtype))
        p = _converted("prediction", p, dtype)
        slope = g if g is not None and g.dtype == dtype else _scratch("gradient", p, dtype)
        f = factor[rows] if isinstance(factor, Tensor) else factor
        parts.append((rows, fused(p, t, scale, dim, f, slope, _scratch("spare", p, dtype))))
        if g is not None and slope is not g:
            g.copy_(slope)
    return _total(parts, recon_x, weight, per_sample, dtype) if wants_sum else None


def _divergence(mu, logvar, weight, per_sample, dtype):
    """KL(N(mu, exp(logvar)) || N(0, 1)), reduced."""
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
