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

# Elements of a block for each thread: in float32, three buffers of it fit in the second-level cache.
BLOCK = 65536


def draw_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normals of the shape, dtype and layout of `like`: the ones that `torch.randn_like` would give."""
    return torch.empty_like(like).normal_(generator=generator)


def loss_forward(recon_x, x, mu, logvar, kl, beta, guess, *, likelihood, scale, target_scale, weights, per_sample, dtype):
    """Loss, reconstruction and KL, and the gradient of the reconstruction.

    `kl`, a KL that is already reduced, stands for `mu` and `logvar` where they are None. `guess`, `[B]` or `[1]`, is the
    upstream factor to store the gradient with; None: no gradient is wanted.

    Returns `(loss, recon, kl, gradient)`: three tensors `[]` or `[B]`, and `guess * d recon / d recon_x` or None.
    """
    shape = recon_x.shape[:1] if per_sample else ()
    # Elsewhere than on a CPU nothing could look at the guess in backward without a sync: it computes the gradient there.
    gradient = torch.empty_like(recon_x) if guess is not None and recon_x.device.type == "cpu" else None
    recon = _reconstruct(recon_x, x, gradient, guess, likelihood, scale, target_scale, weights[0], dtype, shape, sums=True)
    kl = _kl_sum(mu, logvar, weights[1], dtype, shape) if kl is None else kl.to(dtype, copy=True)
    if isinstance(beta, Tensor):
        beta = beta.to(dtype)
    return recon + beta * kl, recon, kl, gradient


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
    shape = recon_x.shape[:1] if per_sample else ()
    grad_loss, grad_recon, grad_kl = upstreams
    grad_mu = grad_logvar = seen = factor = None
    if wants_recon:
        seen = _add(grad_loss, grad_recon).to(dtype, copy=True).reshape(-1)
        if gradient is None or not torch.equal(seen, used):  # a NaN equals nothing
            gradient = torch.empty_like(recon_x)
            _reconstruct(recon_x, x, gradient, seen, likelihood, scale, target_scale, weights[0], dtype, shape, sums=False)
    if wants_latents or wants_kl:
        factor = _kl_factor(beta, grad_loss, grad_kl)
    if wants_latents:
        grad_mu, grad_logvar = _latent_gradients(None, mu, logvar, None, factor * weights[1], dtype)
    return gradient if wants_recon else None, grad_mu, grad_logvar, factor if wants_kl else None, seen


def sample_forward(mu, logvar, noise, *, kl_weight, per_sample, dtype, wants_kl):
    """z = mu + exp(logvar / 2) * noise and, if `wants_kl`, the KL, `[]` or `[B]`. Returns `(z, kl or None)`."""
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    for _, m, lv, eps, out in _blocks(1, mu, logvar, noise, z):
        out.copy_(_std(lv, dtype).mul_(eps).add_(m))
    return z, _kl_sum(mu, logvar, kl_weight, dtype, mu.shape[:1] if per_sample else ()) if wants_kl else None


def sample_backward(grad_z, mu, logvar, noise, beta, upstreams, *, kl_weight, per_sample, dtype):
    """Gradients by `mu` and `logvar`: `grad_z` arrived at z, `upstreams` at loss and KL, each `[]`, `[B]` or None.

    At least one of the three is there.
    """
    factor = None
    if any(g is not None for g in upstreams):
        factor = _kl_factor(beta, *upstreams) * kl_weight
    return _latent_gradients(grad_z, mu, logvar, noise, factor, dtype)


def _reconstruct(recon_x, x, gradient, factor, likelihood, scale, target_scale, weight, dtype, shape, *, sums):
    """The reduced reconstruction of the given shape, if `sums`; its gradient times `factor` into `gradient`, unless None."""
    fused = LIKELIHOODS[likelihood].fused
    total = _zeros(recon_x, dtype, shape)
    if gradient is not None:
        factor = (factor * weight).reshape(-1, 1)
        scaled = recon_x.device.type != "cpu" or factor.ne(1).any()
    p = None
    for rows, prediction, target, out in _blocks(total.numel(), recon_x, x, gradient):
        if p is None or p.shape != prediction.shape:
            p, t, nll, slope, spare = recon_x.new_empty((5, *prediction.shape), dtype=dtype).unbind()
        if prediction.dtype != dtype:
            prediction = p.copy_(prediction)
        if target.dtype != dtype:
            target = t.copy_(target)
        if target_scale != 1:
            target = torch.mul(target, target_scale, out=t)
        if out is not None:
            slope = out if out.dtype == dtype else slope
        fused(prediction, target, scale, nll if sums else None, slope if out is not None else None, spare)
        if sums:
            total[rows] += nll.sum(1)
        if out is not None:
            if scaled:
                slope.mul_(factor[rows])
            if slope is not out:
                out.copy_(slope)
    return total.mul_(weight).to(dtype).reshape(shape)


def _kl_sum(mu, logvar, weight, dtype, shape):
    """KL(N(mu, exp(logvar)) || N(0, 1)), reduced to the given shape. expm1 keeps what cancels near logvar = 0."""
    total = _zeros(mu, dtype, shape)
    for rows, m, lv in _blocks(total.numel(), mu, logvar):
        m, lv = m.to(dtype), lv.to(dtype)
        total[rows] += torch.expm1(lv).sub_(lv).addcmul_(m, m).sum(1)
    return total.mul_(0.5 * weight).to(dtype).reshape(shape)


def _latent_gradients(grad_z, mu, logvar, noise, factor, dtype):
    """Gradients by `mu` and `logvar` of `grad_z . z + factor . KL`; `grad_z` or `factor` may be None."""
    rows = 1
    if factor is not None:
        factor = factor.to(dtype).reshape(-1, 1)
        rows = factor.numel()
    grad_mu, grad_logvar = torch.empty_like(mu), torch.empty_like(logvar)
    for index, m, lv, dz, eps, dm, dlv in _blocks(rows, mu, logvar, grad_z, noise, grad_mu, grad_logvar):
        to_mu = to_logvar = None
        if factor is not None:
            to_mu, to_logvar = m * factor[index], torch.expm1(lv.to(dtype)).mul_(factor[index])
        if dz is not None:
            to_mu, to_logvar = _add(to_mu, dz), _add(to_logvar, _std(lv, dtype).mul_(eps).mul_(dz))
        dm.copy_(to_mu)
        dlv.copy_(to_logvar.mul_(0.5))
    return grad_mu, grad_logvar


def _std(logvar: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(logvar.to(dtype), 0.5).exp_()


def _kl_factor(beta, grad_loss, grad_kl):
    return _add(None if grad_loss is None else grad_loss * beta, grad_kl)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _zeros(like: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """One zero a row. Blocks are added up in float64; only a CPU has more than one."""
    return like.new_zeros(shape or 1, dtype=torch.float64 if like.device.type == "cpu" else dtype)


def _blocks(rows: int, *tensors: Tensor | None) -> Iterator[tuple]:
    """The tensors as `[rows, columns]`, cut alike into blocks that fit in cache: `(slice of rows, *blocks)`; None stays None.

    The first is no None. A device other than a CPU has nothing to gain from blocks and gets one.
    """
    numel = tensors[0].numel()
    columns = numel // max(rows, 1)
    views = [t if t is None else t.as_strided((rows, columns), (columns, 1)) for t in tensors]
    size = BLOCK * torch.get_num_threads() if tensors[0].device.type == "cpu" else numel
    if numel <= size:
        yield slice(None), *views
        return
    height, width = max(1, size // columns), min(size, columns)
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            yield slice(i, i + height), *(v if v is None else v[i : i + height, j : j + width] for v in views)
