"""Sample and KL of any posterior from any prior: the kernels of `latents.py` in full, and the KL of each dimension."""

from math import prod

import torch
import triton
import triton.language as tl

from . import posteriors
from .latents import clamped, divergence, divergence_bwd_kernel, divergence_fwd_kernel
from .launch import FINISH, MANY_REGISTERS, THREADS, TRITON_DTYPE, Segment, launch, resident_programs, scratch, tile_size


@triton.jit(do_not_specialize=["batch", "chunks"])
def columns_kernel(
    mu, second, prior_mu, prior_second, kl_sums, mu_sums, square_sums, batch: tl.int64, columns, chunks: tl.int32,
    POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over every so many rows of the KL and, unless None, of mu and mu^2: `[chunks, columns]`, float64."""
    blocks = tl.cdiv(columns, BLOCK)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(0) // blocks
    if not WIDE:
        batch = batch.to(tl.int32)
    kl_tile = tl.zeros([ROWS, BLOCK], dtype=DTYPE)
    mu_tile = tl.zeros([ROWS, BLOCK], dtype=DTYPE)
    square_tile = tl.zeros([ROWS, BLOCK], dtype=DTYPE)
    for start in tl.range(chunk * ROWS, batch, chunks * ROWS):
        row = start + tl.arange(0, ROWS)
        if WIDE:
            row = row.to(tl.int64)
        o = row[:, None] * columns + column[None, :]
        mask = (row < batch)[:, None] & (column < columns)[None, :]
        m = tl.load(mu + o, mask=mask, other=0.0).to(DTYPE)
        raw = clamped(tl.load(second + o, mask=mask, other=0.0).to(DTYPE), LOW, HIGH, DTYPE)
        std, _, lv, excess, _ = POSTERIOR(raw)
        place = tl.broadcast_to(column[None, :], [ROWS, BLOCK])
        kl, _, _, _, _ = divergence(
            m, raw, std, lv, excess, prior_mu, prior_second, o, place, mask, PRIOR, MU_ROW, SECOND_ROW, DTYPE
        )
        kl_tile += tl.where(mask, kl, 0.0)
        if mu_sums is not None:
            mu_tile += m
            square_tile += m * m
    out = chunk * columns + column
    tl.store(kl_sums + out, tl.sum(kl_tile.to(tl.float64), axis=0), mask=column < columns)
    if mu_sums is not None:
        tl.store(mu_sums + out, tl.sum(mu_tile.to(tl.float64), axis=0), mask=column < columns)
        tl.store(square_sums + out, tl.sum(square_tile.to(tl.float64), axis=0), mask=column < columns)


def _constants(mu, prior_mu, prior_second, posterior, clamp, prior) -> dict:
    """What the kernels have as constants of the arguments that the launchers share."""
    low, high = clamp or (None, None)
    function = None if prior is None else f"{prior}_prior"
    if prior in ("std", "var") and posterior in (prior, "var"):
        function = f"{prior}_of_{prior}_prior"
    return {
        "POSTERIOR": getattr(posteriors, posterior), "LOW": low, "HIGH": high,
        "PRIOR": function and getattr(posteriors, function),
        "MU_ROW": prior is not None and prior_mu.shape != mu.shape,
        "SECOND_ROW": prior is not None and prior_second.shape != mu.shape,
    }  # fmt: skip


def divergence_forward(
    mu, second, noise, prior_mu, prior_second, *, posterior, clamp, prior, kind, kl_weight, floor, dtype, stateless=False
):  # fmt: skip
    """A sample if there is `noise`, and KLs unless `kind` is None.

    - `mu`, `second`: of one shape `[B, ...]` and dense layout. `prior_mu`, `prior_second`: likewise, or one row of it for
      all, or None. `noise`: likewise, a seed from `draw_noise`, or None.
    - `posterior`, `prior`: what `second` and `prior_second` are, by name. `clamp`: None, or bounds of `second`.
    - `kind`: of the KL: "sum" over everything, of each "row" or "element". `floor`: None, or a least KL of an element.
    - `kl_weight`: what the sums are times; 1 for elements.

    Returns `(z, kl, the KL with the floor)`: what was not asked for is None.
    """
    rows = mu.shape[0] if kind == "row" else 1
    shape = mu.shape[:1] if kind == "row" else ()
    z = weighted = partials = arrived = None
    if noise is not None:
        z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, second.dtype))
    tile = tile_size(mu, second)
    latents = Segment.of(mu, rows, tile)
    programs = rows * latents.programs
    if kind in (None, "element"):
        kl = None if kind is None else torch.empty_like(mu, dtype=dtype)
    else:
        kl = mu.new_empty(shape, dtype=dtype)
        weighted = None if floor is None else mu.new_empty(shape, dtype=dtype)
        partials, arrived = scratch(mu.device, rows, programs if floor is None else 2 * programs, stateless)
    launch(
        divergence_fwd_kernel, programs, mu.device,
        mu, second, prior_mu, prior_second, noise, z, kl, weighted, partials, arrived,
        kl_weight, floor or 0.0, latents.columns, _columns(mu), latents.programs,
        **_constants(mu, prior_mu, prior_second, posterior, clamp, prior), ELEMENTS=kind == "element",
        DTYPE=TRITON_DTYPE[dtype], ALIGNED=latents.aligned, WIDE=latents.wide, BLOCK=tile, THREADS=THREADS, FINISH=FINISH,
    )  # fmt: skip
    return z, kl, weighted


def divergence_backward(
    grad_z, grad_kl, grad_weighted, mu, second, noise, prior_mu, prior_second, wants_prior, *,
    posterior, clamp, prior, kind, kl_weight, floor, shares, dtype,
):  # fmt: skip
    """Gradients by `mu`, `second`, `prior_mu` and `prior_second`, the latter of the shape of `mu` and None where unwanted.

    `grad_z`, `grad_kl` and `grad_weighted`, the gradients that arrived at what `divergence_forward` returns, or at sums over
    the batch if `kind` is "column", are dense and lie as `mu` does; not all are None. `shares`: what of `grad_weighted` goes to
    the posterior, and what to the prior.
    """
    rows = mu.shape[0] if kind == "row" else 1
    has_kl = grad_kl is not None or grad_weighted is not None
    grad_mu, grad_second = torch.empty_like(mu) if has_kl else grad_z, torch.empty_like(second)
    grad_priors = [
        torch.empty_like(mu, dtype=value.dtype) if wanted and has_kl else None
        for value, wanted in zip((prior_mu, prior_second), wants_prior, strict=True)
    ]
    tile = tile_size(mu, second)
    latents = Segment.of(mu, rows, tile)
    launch(
        divergence_bwd_kernel, rows * latents.programs, mu.device,
        grad_z, mu, second, prior_mu, prior_second, noise, grad_mu, grad_second, *grad_priors,
        grad_kl, grad_weighted, kl_weight, floor or 0.0, *shares, latents.columns, _columns(mu), latents.programs,
        HAS_KL=has_kl, **_constants(mu, prior_mu, prior_second, posterior, clamp, prior), FLOORED=floor is not None,
        PER=kind if kind in ("column", "element") else "row", DTYPE=TRITON_DTYPE[dtype],
        ALIGNED=latents.aligned, WIDE=latents.wide, BLOCK=tile,
    )  # fmt: skip
    return grad_mu, grad_second, *grad_priors


def divergence_columns(
    mu, second, prior_mu, prior_second, *, layout, posterior, clamp, prior, kl_weight, dtype, statistics
):  # fmt: skip
    """The KL summed over the batch, times `kl_weight`, and the sums of mu and mu^2 if `statistics`: `mu.shape[1:]`.

    The other arguments are those of `divergence_forward`; `layout` is the memory format of `mu`.
    """
    batch, columns = mu.shape[0], _columns(mu)
    block = min(max(16, triton.next_power_of_2(columns)), THREADS)
    rows = tile_size(mu, second) // block
    blocks = triton.cdiv(columns, block)
    chunks = max(1, min(triton.cdiv(batch, rows), resident_programs(mu.device) // max(blocks, 1)))
    # In the memory format of a batch of that many samples.
    partials = [
        torch.empty((chunks, *mu.shape[1:]), dtype=torch.float64, device=mu.device, memory_format=layout)
        for _ in range(3 if statistics else 1)
    ]
    launch(
        columns_kernel, blocks * chunks, mu.device,
        mu, second, prior_mu, prior_second, *(partials if statistics else (*partials, None, None)), batch, columns, chunks,
        **_constants(mu, prior_mu, prior_second, posterior, clamp, prior), DTYPE=TRITON_DTYPE[dtype],
        WIDE=mu.numel() + chunks * rows * columns >= 2**31, ROWS=rows, BLOCK=block,
        **(MANY_REGISTERS if mu.element_size() == 2 else {}),
    )  # fmt: skip
    kl, *sums = (partial.sum(0) for partial in partials)
    return (kl * kl_weight).to(dtype), tuple(s.to(dtype) for s in sums) or None


def _columns(mu) -> int:
    """Elements of a sample."""
    return prod(mu.shape[1:])
