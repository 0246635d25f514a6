"""The latents: noise, reparameterized sample and KL in one launch; their backward, which makes the noise again, in another.

Rows and programs are as in `loss.py`.
"""

import torch
import triton
import triton.language as tl

from .launch import FINISH, THREADS, TRITON_DTYPE, Segment, arrivals, launch, pointer_and_value, tile_size
from .noise import normals
from .numerics import exp_and_expm1
from .operands import kl_factor, row_bounds, scalar
from .reduction import arrive_last, fold, ordered_sum


@triton.jit
def seed_or_noise(noise):
    """The seed that `noise` points to if it is an integer, read once; else the pointer itself."""
    if noise.dtype.element_ty == tl.int64:
        return tl.load(noise)
    else:
        return noise


@triton.jit
def noise_tile(noise, start, o, mask, SIZE: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """Standard normals of a tile: made from the seed `noise`, or read from where it points to."""
    if noise.dtype == tl.int64:
        return normals(noise, start, SIZE, ALIGNED).to(DTYPE)
    else:
        return tl.load(noise + o, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def sample_tile(
    mu, logvar, noise, z, start, end, SIZE: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Store z = mu + exp(logvar / 2) * noise; return the KL of the tile, in nats."""
    o = start + tl.arange(0, SIZE)
    mask = o < end
    m = tl.load(mu + o, mask=mask, other=0.0).to(DTYPE)
    lv = tl.load(logvar + o, mask=mask, other=0.0).to(DTYPE)
    std, q = exp_and_expm1(0.5 * lv)
    eps = noise_tile(noise, start, o, mask, SIZE, ALIGNED, DTYPE)
    tl.store(z + o, (m + std * eps).to(z.dtype.element_ty), mask=mask)
    return tl.where(mask, 0.5 * (m * m + (q * (q + 2.0) - lv)), 0.0)  # q (q + 2) = exp(logvar) - 1


@triton.jit
def sample_backward_tile(
    grad_z, mu, logvar, noise, grad_mu, grad_logvar, start, end, factor,
    HAS_KL: tl.constexpr, SIZE: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    o = start + tl.arange(0, SIZE)
    mask = o < end
    lv = tl.load(logvar + o, mask=mask, other=0.0).to(DTYPE)
    std, q = exp_and_expm1(0.5 * lv)
    to_mu = tl.zeros([SIZE], dtype=DTYPE)
    to_logvar = tl.zeros([SIZE], dtype=DTYPE)
    if grad_z is not None:
        to_mu += tl.load(grad_z + o, mask=mask, other=0.0).to(DTYPE)
        to_logvar += 0.5 * to_mu * std * noise_tile(noise, start, o, mask, SIZE, ALIGNED, DTYPE)
    if HAS_KL:
        to_mu += factor * tl.load(mu + o, mask=mask, other=0.0).to(DTYPE)
        to_logvar += 0.5 * factor * (q * (q + 2.0))
        tl.store(grad_mu + o, to_mu.to(grad_mu.dtype.element_ty), mask=mask)
    tl.store(grad_logvar + o, to_logvar.to(grad_logvar.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["latents", "programs"])
def sample_fwd_kernel(
    mu, logvar, noise, z, kl_out, partials, arrived, kl_weight: tl.float64, latents: tl.int64, programs: tl.int32,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    base, end = row_bounds(row, latents, ALIGNED, WIDE)
    noise = seed_or_noise(noise)
    sums = tl.zeros([THREADS], dtype=DTYPE)
    for start in tl.range(worker * BLOCK, end, programs * BLOCK):
        sums += fold(sample_tile(mu, logvar, noise, z, base + start, base + end, BLOCK, ALIGNED, DTYPE), BLOCK, THREADS)
    if ALIGNED:
        if worker == 0:
            sums += sample_tile(mu, logvar, noise, z, base + end, base + latents, THREADS, ALIGNED, DTYPE)
    if kl_out is not None:
        if arrive_last(partials, arrived, row, programs, tl.sum(sums.to(tl.float64))):
            tl.store(kl_out + row, (ordered_sum(partials + row * programs, programs, FINISH) * kl_weight).to(DTYPE))


@triton.jit(do_not_specialize=["latents", "programs"])
def sample_bwd_kernel(
    grad_z, mu, logvar, noise, grad_mu, grad_logvar, grad_loss, grad_kl, beta,
    beta_value: tl.float64, kl_weight: tl.float64, latents: tl.int64, programs: tl.int32,
    HAS_KL: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    factor = kl_factor(grad_loss, grad_kl, row, beta, beta_value, DTYPE) * scalar(None, kl_weight, DTYPE)
    base, end = row_bounds(row, latents, ALIGNED, WIDE)
    noise = seed_or_noise(noise)
    for start in tl.range(worker * BLOCK, end, programs * BLOCK):
        sample_backward_tile(
            grad_z, mu, logvar, noise, grad_mu, grad_logvar, base + start, base + end, factor, HAS_KL, BLOCK, ALIGNED, DTYPE
        )  # fmt: skip
    if ALIGNED:
        if worker == 0:
            sample_backward_tile(
                grad_z, mu, logvar, noise, grad_mu, grad_logvar, base + end, base + latents, factor, HAS_KL, 16, ALIGNED, DTYPE
            )  # fmt: skip


def draw_noise(like: torch.Tensor, layout: torch.memory_format, generator: torch.Generator | None) -> torch.Tensor:
    """The seed of a stream of normals: a 0-d int64 tensor on the device, drawn from Torch's generator without a sync."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=like.device, generator=generator)


def sample_forward(mu, logvar, noise, *, kl_weight, per_sample, dtype, wants_kl, stateless=False):
    """See `fastelbo.torch_backend.sample_forward`. `noise` may be a seed from `draw_noise`."""
    rows = mu.shape[0] if per_sample else 1
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    kl = mu.new_empty(rows if per_sample else (), dtype=dtype) if wants_kl else None
    tile = tile_size(mu, logvar)
    latents = Segment.of(mu, rows, tile)
    programs = rows * latents.programs
    partials = mu.new_empty(programs, dtype=torch.float64) if wants_kl else None
    arrived = arrivals(mu.device, rows, stateless) if wants_kl else None
    launch(
        sample_fwd_kernel, programs, mu.device,
        mu, logvar, noise, z, kl, partials, arrived, kl_weight, latents.columns, latents.programs,
        DTYPE=TRITON_DTYPE[dtype], ALIGNED=latents.aligned, WIDE=latents.wide, BLOCK=tile,
        THREADS=THREADS, FINISH=FINISH,
    )  # fmt: skip
    return z, kl


def sample_backward(grad_z, mu, logvar, noise, beta, upstreams, *, kl_weight, per_sample, dtype):
    """See `fastelbo.torch_backend.sample_backward`. `noise` may be a seed from `draw_noise`."""
    rows = mu.shape[0] if per_sample else 1
    upstreams = [g if g is None else g.contiguous() for g in upstreams]
    has_kl = any(g is not None for g in upstreams)
    grad_mu, grad_logvar = torch.empty_like(mu) if has_kl else grad_z, torch.empty_like(logvar)
    tile = tile_size(mu, logvar)
    latents = Segment.of(mu, rows, tile)
    launch(
        sample_bwd_kernel, rows * latents.programs, mu.device,
        grad_z, mu, logvar, noise, grad_mu, grad_logvar, *upstreams, *pointer_and_value(beta),
        kl_weight, latents.columns, latents.programs,
        HAS_KL=has_kl, DTYPE=TRITON_DTYPE[dtype], ALIGNED=latents.aligned, WIDE=latents.wide, BLOCK=tile,
    )  # fmt: skip
    return grad_mu, grad_logvar
