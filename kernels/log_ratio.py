"""Several samples of a diagonal Gaussian posterior, each with its log densities under the posterior and the prior.

What importance weights are made of. Rows and programs are as in `loss.py`, but for this: a row of a tensor of samples is a
sample of a datum, `s * data + b`, and that of the latents is the datum's, `b`. Forward has a row for each sample; backward has
one for each datum, and sums over its samples in registers, so that the latents are read and their gradients written once.
"""

from math import log, pi

import torch
import triton
import triton.language as tl

from . import posteriors
from .divergence import constants_of
from .latents import clamped, noise_tile, seed_or_noise
from .launch import FINISH, MANY_REGISTERS, THREADS, TRITON_DTYPE, Segment, launch, scratch, tile_size
from .operands import row_bounds, upstream_of
from .reduction import arrive_last, fold, ordered_sum


@triton.jit
def prior_tile(
    prior_mu, prior_second, o, column, mask, PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`(mean, 1 / sigma, d, -logvar)` of the prior; `d` is half the derivative of its logvar."""
    if PRIOR is None:
        return 0.0, 1.0, 0.0, 0.0
    else:
        mean = tl.load(prior_mu + (column if MU_ROW else o), mask=mask, other=0.0).to(DTYPE)
        raw = tl.load(prior_second + (column if SECOND_ROW else o), mask=mask, other=1.0).to(DTYPE)
        inverse, d, delta, _ = PRIOR(raw, 1.0, 0.0, tl.full([], 1.0, DTYPE))  # its variance to that of N(0, 1)
        return mean, inverse, d, delta


@triton.jit
def log_ratio_tile(
    mu, second, prior_mu, prior_second, noise, z, start, end, base, first,
    POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr,
    SIZE: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store z = mu + sigma * noise; return log q and log p of each element, in nats, both without -log(2 pi) / 2.

    `base` and `first`: where the row starts in mu and in z.
    """
    column = start + tl.arange(0, SIZE)
    mask = column < end
    o = base + column
    m = tl.load(mu + o, mask=mask, other=0.0).to(DTYPE)
    raw = clamped(tl.load(second + o, mask=mask, other=0.0).to(DTYPE), LOW, HIGH, DTYPE)
    std, _, lv, _, _ = POSTERIOR(raw)
    eps = noise_tile(noise, first + start, first + column, mask, SIZE, ALIGNED, DTYPE)
    sample = m + std * eps
    tl.store(z + (first + column), sample.to(z.dtype.element_ty), mask=mask)
    mean, inverse, _, delta = prior_tile(prior_mu, prior_second, o, column, mask, PRIOR, MU_ROW, SECOND_ROW, DTYPE)
    t = (sample - mean) * inverse
    log_q = (sample - sample) - 0.5 * (eps * eps + lv)  # NaN for a mean that is NaN or infinite
    return tl.where(mask, log_q, 0.0), tl.where(mask, 0.5 * (delta - t * t), 0.0)


@triton.jit(do_not_specialize=["data", "columns", "programs"])
def log_ratio_fwd_kernel(
    mu, second, prior_mu, prior_second, noise, z, log_q_out, log_p_out, partials, arrived,
    constant: tl.float64, data: tl.int32, columns: tl.int64, programs: tl.int32,
    POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    first, end = row_bounds(row, columns, ALIGNED, WIDE)
    base = row_bounds(row % data, columns, ALIGNED, WIDE)[0]
    noise = seed_or_noise(noise)
    q_sums = tl.zeros([THREADS], dtype=DTYPE)
    p_sums = tl.zeros([THREADS], dtype=DTYPE)
    for start in tl.range(worker * BLOCK, end, programs * BLOCK):
        q, p = log_ratio_tile(
            mu, second, prior_mu, prior_second, noise, z, start, end, base, first,
            POSTERIOR, LOW, HIGH, PRIOR, MU_ROW, SECOND_ROW, BLOCK, ALIGNED, DTYPE,
        )  # fmt: skip
        q_sums += fold(q, BLOCK, THREADS)
        p_sums += fold(p, BLOCK, THREADS)
    if partials is not None:
        p_partials = partials + tl.num_programs(0)
        tl.store(p_partials + tl.program_id(0), tl.sum(p_sums.to(tl.float64)))
        if arrive_last(partials, arrived, row, programs, tl.sum(q_sums.to(tl.float64))):
            mine = row * programs
            tl.store(log_q_out + row, (ordered_sum(partials + mine, programs, FINISH) + constant).to(DTYPE))
            tl.store(log_p_out + row, (ordered_sum(p_partials + mine, programs, FINISH) + constant).to(DTYPE))


@triton.jit
def log_ratio_backward_tile(
    grad_z, grad_log_q, grad_log_p, path_scale, mu, second, prior_mu, prior_second, noise,
    grad_mu, grad_second, grad_prior_mu, grad_prior_second, start, end, base, row, samples, data, columns,
    HELD: tl.constexpr, POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr,
    SIZE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, SIZE)
    mask = column < end
    o = base + column
    given = tl.load(second + o, mask=mask, other=0.0).to(DTYPE)
    std, d_std, _, _, d = POSTERIOR(clamped(given, LOW, HIGH, DTYPE))
    if grad_log_p is not None:
        m = tl.load(mu + o, mask=mask, other=0.0).to(DTYPE)
        mean, inverse, prior_d, _ = prior_tile(prior_mu, prior_second, o, column, mask, PRIOR, MU_ROW, SECOND_ROW, DTYPE)
        to_prior_mu = tl.zeros([SIZE], dtype=DTYPE)
        to_prior_second = tl.zeros([SIZE], dtype=DTYPE)
    to_mu = tl.zeros([SIZE], dtype=DTYPE)
    to_std = tl.zeros([SIZE], dtype=DTYPE)
    to_log_std = tl.zeros([], dtype=DTYPE)
    for s in tl.range(0, samples):
        number = row + s * data
        if grad_log_q is not None:
            from_q = upstream_of(grad_log_q, number, DTYPE)
            if not HELD:
                to_log_std -= from_q
        if grad_z is not None or grad_log_p is not None or HELD:
            first = row_bounds(number, columns, ALIGNED, WIDE)[0]
            eps = noise_tile(noise, first + start, first + column, mask, SIZE, ALIGNED, DTYPE)
            path = tl.zeros([SIZE], dtype=DTYPE)
            if grad_z is not None:
                path += tl.load(grad_z + (first + column), mask=mask, other=0.0).to(DTYPE)
            if grad_log_p is not None:
                from_p = upstream_of(grad_log_p, number, DTYPE)
                t = (m + std * eps - mean) * inverse
                path -= from_p * (t * inverse)
                to_prior_mu += from_p * t
                to_prior_second += from_p * (t * t - 1.0)
            if grad_log_q is not None and HELD:
                path -= from_q * (eps / std)
            if path_scale is not None:
                path *= tl.load(path_scale + number).to(DTYPE)
            to_mu += path
            to_std += path * eps
    to_second = to_std * d_std + to_log_std * d
    if LOW is not None:
        outside = (given < tl.full([], LOW, DTYPE)) | (given > tl.full([], HIGH, DTYPE))
        to_second = tl.where(outside, 0.0, to_second)
    tl.store(grad_mu + o, to_mu.to(grad_mu.dtype.element_ty), mask=mask)
    tl.store(grad_second + o, to_second.to(grad_second.dtype.element_ty), mask=mask)
    if grad_prior_mu is not None:
        tl.store(grad_prior_mu + o, (to_prior_mu * inverse).to(grad_prior_mu.dtype.element_ty), mask=mask)
    if grad_prior_second is not None:
        tl.store(grad_prior_second + o, (to_prior_second * prior_d).to(grad_prior_second.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples", "data", "columns", "programs"])
def log_ratio_bwd_kernel(
    grad_z, grad_log_q, grad_log_p, path_scale, mu, second, prior_mu, prior_second, noise,
    grad_mu, grad_second, grad_prior_mu, grad_prior_second,
    samples: tl.int32, data: tl.int32, columns: tl.int64, programs: tl.int32,
    HELD: tl.constexpr, POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    base, end = row_bounds(row, columns, ALIGNED, WIDE)
    noise = seed_or_noise(noise)
    for start in tl.range(worker * BLOCK, end, programs * BLOCK):
        log_ratio_backward_tile(
            grad_z, grad_log_q, grad_log_p, path_scale, mu, second, prior_mu, prior_second, noise,
            grad_mu, grad_second, grad_prior_mu, grad_prior_second, start, end, base, row, samples, data, columns,
            HELD, POSTERIOR, LOW, HIGH, PRIOR, MU_ROW, SECOND_ROW, BLOCK, ALIGNED, WIDE, DTYPE,
        )  # fmt: skip


def log_ratio_forward(
    mu, second, noise, prior_mu, prior_second, *, samples, wants_logs, posterior, clamp, prior, dtype
):  # fmt: skip
    """`(z, log_q, log_p)` of so many samples of each datum: `[samples * B, ...]`, and twice `[samples * B]` of `dtype`.

    Row `s * B + b` is sample s of datum b. The log densities, in nats and with their constants, are None unless `wants_logs`.

    - `mu`, `second`: of one shape `[B, ...]`, contiguous. `prior_mu`, `prior_second`: likewise, or `[1, ...]`, one row for all,
      or None for N(0, I).
    - `noise`: of the shape of z, contiguous, or a seed from `draw_noise`, whose stream z takes in the order of its elements.
    - `posterior`, `clamp`, `prior`: as in `Divergence`.
    """
    batch = mu.shape[0]
    z = mu.new_empty((samples * batch, *mu.shape[1:]), dtype=torch.promote_types(mu.dtype, second.dtype))
    log_q = log_p = partials = arrived = None
    if not wants_logs:
        batch, prior_mu, prior_second, prior = 1, None, None, None
    rows = samples * batch
    tile = tile_size(mu, second)
    latents = Segment.of(z, rows, tile)
    programs = rows * latents.programs
    if wants_logs:
        log_q, log_p = (mu.new_empty(rows, dtype=dtype) for _ in range(2))
        partials, arrived = scratch(mu.device, rows, 2 * programs, False)
    launch(
        log_ratio_fwd_kernel, programs, mu.device,
        mu, second, prior_mu, prior_second, noise, z, log_q, log_p, partials, arrived,
        -0.5 * log(2 * pi) * latents.columns, batch, latents.columns, latents.programs,
        **_densities(mu, prior_mu, prior_second, posterior, clamp, prior),
        DTYPE=TRITON_DTYPE[dtype], ALIGNED=latents.columns % 16 == 0, WIDE=latents.wide, BLOCK=tile, THREADS=THREADS,
        FINISH=FINISH,
    )  # fmt: skip
    return z, log_q, log_p


def log_ratio_backward(
    grad_z, grad_log_q, grad_log_p, mu, second, noise, prior_mu, prior_second, wants_prior, *,
    samples, held, path_scale, posterior, clamp, prior, dtype,
):  # fmt: skip
    """Gradients by `mu`, `second`, `prior_mu` and `prior_second`, summed over the samples; the latter two of the shape of `mu`,
    None where unwanted.

    `grad_z`, `grad_log_q`, `grad_log_p`: what arrived at the results of `log_ratio_forward`, contiguous; not all are None.
    `held`: log q has no gradient by the posterior's parameters but by way of z (sticking the landing: Roeder et al., 2017);
    `path_scale`, `[samples * B]` or None, is then what the gradient that reaches each sample is times (doubly
    reparameterized: Tucker et al., 2019). Gradients of the prior are never times that.
    """
    # Where there is nothing that differs from sample to sample, all data are one row.
    batch = 1 if grad_log_q is None and grad_log_p is None and path_scale is None else mu.shape[0]
    if grad_log_p is None:
        prior_mu = prior_second = prior = None
    grad_mu, grad_second = torch.empty_like(mu), torch.empty_like(second)
    grad_priors = [
        torch.empty_like(mu, dtype=value.dtype) if wanted and value is not None else None
        for value, wanted in zip((prior_mu, prior_second), wants_prior, strict=True)
    ]
    tile = tile_size(mu, second)
    latents = Segment.of(mu, batch, tile)
    launch(
        log_ratio_bwd_kernel, batch * latents.programs, mu.device,
        grad_z, grad_log_q, grad_log_p, path_scale, mu, second, prior_mu, prior_second, noise,
        grad_mu, grad_second, *grad_priors, samples, batch, latents.columns, latents.programs,
        HELD=held and grad_log_q is not None, **_densities(mu, prior_mu, prior_second, posterior, clamp, prior),
        DTYPE=TRITON_DTYPE[dtype], ALIGNED=latents.columns % 16 == 0,
        WIDE=samples * mu.numel() + latents.programs * tile >= 2**31, BLOCK=tile,
        **(MANY_REGISTERS if dtype == torch.float64 else {}),
    )  # fmt: skip
    return grad_mu, grad_second, *grad_priors


def _densities(mu, prior_mu, prior_second, posterior, clamp, prior) -> dict:
    """The constants of the divergence, but that the prior's density is on its own, not in a ratio to the posterior's."""
    constants = constants_of(mu, prior_mu, prior_second, posterior, clamp, prior)
    return constants | {"PRIOR": prior and getattr(posteriors, f"{prior}_prior")}
