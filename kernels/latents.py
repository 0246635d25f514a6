"""The latents: noise, reparameterized sample and KL in one pass; their backward, which makes the noise again, in another.

Rows and programs are as in `loss.py`. The kernels that have these functions to do are in `sample.py`, for plain latents, and in
`divergence.py`: every argument of a launch costs the host time, and most calls need few.
"""

import triton
import triton.language as tl

from .broadcast import BROADCAST, broadcast_index
from .noise import normals
from .operands import factor_of_term, row_bounds, scalar, upstream_of
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
def clamped(raw, LOW: tl.constexpr, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """As torch.clamp; LOW is None for no clamp."""
    if LOW is None:
        return raw
    else:
        low, high = tl.full([], LOW, DTYPE), tl.full([], HIGH, DTYPE)
        return tl.where(raw < low, low, tl.where(raw > high, high, raw))


@triton.jit
def column_of(o, columns):
    """The place within a sample."""
    return o % columns.to(o.dtype)


@triton.jit
def divergence(
    m, raw, std, lv, excess, prior_mu, prior_second, o, column, mask,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`(kl, t, inverse, excess, d)` of a tile: the KL in nats; (mu - prior's mu) / prior's sigma; 1 / that sigma; the ratio of
    the variances - 1; half the derivative of the prior's logvar. MU_ROW, SECOND_ROW: the prior's is one row for all samples."""
    if PRIOR is None:
        return 0.5 * (m * m + (excess - lv)), m, 1.0, excess, 0.0
    else:
        mean = tl.load(prior_mu + (column if MU_ROW else o), mask=mask, other=0.0).to(DTYPE)
        second = tl.load(prior_second + (column if SECOND_ROW else o), mask=mask, other=1.0).to(DTYPE)
        inverse, d, delta, ratio = PRIOR(second, std, lv, raw)
        t = (m - mean) * inverse
        return 0.5 * (t * t + (ratio - delta)), t, inverse, ratio, d


@triton.jit
def weight_tile(kl_weight, o, mask, apart, inner, groups, MODE: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of the KL's elements, which lie as `broadcast.Operand` has it."""
    if MODE == BROADCAST:
        o = broadcast_index(o, None if apart is None else apart.to(o.dtype), inner.to(o.dtype), groups.to(o.dtype))
    return tl.load(kl_weight + o, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def sample_tile(
    mu, logvar, prior_mu, prior_second, kl_weight, noise, z, kl_out, start, end, columns, floor, apart, inner, groups,
    POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, WEIGHT: tl.constexpr,
    ELEMENTS: tl.constexpr, SIZE: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store z = mu + sigma * noise unless `z` is None; return the KL of the tile, in nats, and the same with a floor."""
    o = start + tl.arange(0, SIZE)
    mask = o < end
    m = tl.load(mu + o, mask=mask, other=0.0).to(DTYPE)
    raw = clamped(tl.load(logvar + o, mask=mask, other=0.0).to(DTYPE), LOW, HIGH, DTYPE)
    std, _, lv, excess, _ = POSTERIOR(raw)
    if z is not None:
        eps = noise_tile(noise, start, o, mask, SIZE, ALIGNED, DTYPE)
        tl.store(z + o, (m + std * eps).to(z.dtype.element_ty), mask=mask)
    column = o
    if MU_ROW or SECOND_ROW:
        column = column_of(o, columns)
    kl, _, _, _, _ = divergence(
        m, raw, std, lv, excess, prior_mu, prior_second, o, column, mask, PRIOR, MU_ROW, SECOND_ROW, DTYPE
    )
    floored = tl.where(kl <= floor, floor, kl)  # NaN is not
    if kl_weight is not None:
        w = weight_tile(kl_weight, o, mask, apart, inner, groups, WEIGHT, DTYPE)
        kl, floored = tl.where(w == 0, 0.0, w * kl), tl.where(w == 0, 0.0, w * floored)
    if ELEMENTS:
        tl.store(kl_out + o, kl, mask=mask)
    return tl.where(mask, kl, 0.0), tl.where(mask, floored, 0.0)


@triton.jit
def upstream_tile(pointer, scalar_upstream, weight, o, mask, columns, PER: tl.constexpr, DTYPE: tl.constexpr):
    """What arrives at a KL of each row, the scalar that has been read, or of each column or element."""
    if PER == "row":
        return scalar_upstream
    elif pointer is None:
        return tl.zeros([], dtype=DTYPE)
    else:
        if PER == "column":
            o = column_of(o, columns)
        return tl.load(pointer + o, mask=mask, other=0.0).to(DTYPE) * weight


@triton.jit
def sample_backward_tile(
    grad_z, mu, logvar, prior_mu, prior_second, kl_weight, noise, grad_mu, grad_logvar, grad_prior_mu, grad_prior_second,
    grad_kl, grad_weighted, of_columns, start, end, factor, weighted_factor, weight, columns, floor, apart, inner, groups,
    posterior_share, prior_share,
    HAS_KL: tl.constexpr, POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRIOR: tl.constexpr,
    MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, WEIGHT: tl.constexpr, FLOORED: tl.constexpr, PER: tl.constexpr,
    SIZE: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    o = start + tl.arange(0, SIZE)
    mask = o < end
    given = tl.load(logvar + o, mask=mask, other=0.0).to(DTYPE)
    raw = clamped(given, LOW, HIGH, DTYPE)
    std, d_std, lv, excess, d = POSTERIOR(raw)
    to_mu = tl.zeros([SIZE], dtype=DTYPE)
    to_logvar = tl.zeros([SIZE], dtype=DTYPE)
    if grad_z is not None:
        to_mu += tl.load(grad_z + o, mask=mask, other=0.0).to(DTYPE)
        to_logvar += d_std * to_mu * noise_tile(noise, start, o, mask, SIZE, ALIGNED, DTYPE)
    if HAS_KL:
        m = tl.load(mu + o, mask=mask, other=0.0).to(DTYPE)
        column = o
        if MU_ROW or SECOND_ROW:
            column = column_of(o, columns)
        kl, t, inverse, excess, prior_d = divergence(
            m, raw, std, lv, excess, prior_mu, prior_second, o, column, mask, PRIOR, MU_ROW, SECOND_ROW, DTYPE
        )
        to_posterior = upstream_tile(grad_kl, factor, weight, o, mask, columns, PER, DTYPE)
        to_prior = to_posterior
        if grad_weighted is not None:
            share = upstream_tile(grad_weighted, weighted_factor, weight, o, mask, columns, PER, DTYPE)
            if FLOORED:
                if of_columns is not None:
                    kl = tl.load(of_columns + column_of(o, columns), mask=mask, other=0.0).to(DTYPE)
                share = tl.where(kl <= floor, 0.0, share)
            to_prior = to_posterior + prior_share * share
            to_posterior += posterior_share * share
        by_mu = t * inverse
        if kl_weight is not None:
            # Of what does not count, nothing may come through: it may be NaN.
            w = weight_tile(kl_weight, o, mask, apart, inner, groups, WEIGHT, DTYPE)
            counts = w != 0
            to_posterior, to_prior = to_posterior * w, to_prior * w
            by_mu, d, excess = tl.where(counts, by_mu, 0.0), tl.where(counts, d, 0.0), tl.where(counts, excess, 0.0)
            if PRIOR is not None:
                prior_d, t = tl.where(counts, prior_d, 0.0), tl.where(counts, t, 0.0)
        to_mu += to_posterior * by_mu
        to_logvar += d * to_posterior * excess
        tl.store(grad_mu + o, to_mu.to(grad_mu.dtype.element_ty), mask=mask)
        if grad_prior_mu is not None:
            tl.store(grad_prior_mu + o, (-to_prior * by_mu).to(grad_prior_mu.dtype.element_ty), mask=mask)
        if grad_prior_second is not None:
            to_second = -to_prior * (prior_d * (excess + t * t))
            tl.store(grad_prior_second + o, to_second.to(grad_prior_second.dtype.element_ty), mask=mask)
    if LOW is not None:
        outside = (given < tl.full([], LOW, DTYPE)) | (given > tl.full([], HIGH, DTYPE))
        to_logvar = tl.where(outside, 0.0, to_logvar)
    tl.store(grad_logvar + o, to_logvar.to(grad_logvar.dtype.element_ty), mask=mask)


@triton.jit
def forward(
    mu, logvar, prior_mu, prior_second, kl_weight, noise, z, kl_out, weighted_out, partials, arrived, recon, loss_out, beta,
    recon_weight, beta_value, recon_weight_value, kl_scale, floor, latents, columns, programs, apart, inner, groups,
    POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, WEIGHT: tl.constexpr,
    ELEMENTS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """A kernel's whole work. `kl_out`: the KL of each row or, with ELEMENTS, of each element, without the weight.
    `weighted_out`: that of each row, with the floor. `loss_out`: `recon_weight` times `recon` of each row, and `beta` times its
    KL. Any of `z` and these may be None."""
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    base, end = row_bounds(row, latents, ALIGNED, WIDE)
    if z is not None:
        noise = seed_or_noise(noise)
    least = scalar(None, floor, DTYPE)
    sums = tl.zeros([THREADS], dtype=DTYPE)
    floored_sums = tl.zeros([THREADS], dtype=DTYPE)
    for start in tl.range(worker * BLOCK, end, programs * BLOCK):
        kl, floored = sample_tile(
            mu, logvar, prior_mu, prior_second, kl_weight, noise, z, kl_out, base + start, base + end, columns, least,
            apart, inner, groups, POSTERIOR, LOW, HIGH, PRIOR, MU_ROW, SECOND_ROW, WEIGHT, ELEMENTS, BLOCK, ALIGNED, DTYPE,
        )  # fmt: skip
        sums += fold(kl, BLOCK, THREADS)
        if weighted_out is not None:
            floored_sums += fold(floored, BLOCK, THREADS)
    if ALIGNED:
        if worker == 0:
            kl, floored = sample_tile(
                mu, logvar, prior_mu, prior_second, kl_weight, noise, z, kl_out, base + end, base + latents, columns, least,
                apart, inner, groups, POSTERIOR, LOW, HIGH, PRIOR, MU_ROW, SECOND_ROW, WEIGHT, ELEMENTS, THREADS, ALIGNED,
                DTYPE,
            )  # fmt: skip
            sums += kl
            if weighted_out is not None:
                floored_sums += floored
    if partials is not None:
        floored_partials = partials + tl.num_programs(0)
        if weighted_out is not None:
            tl.store(floored_partials + tl.program_id(0), tl.sum(floored_sums.to(tl.float64)))
        if arrive_last(partials, arrived, row, programs, tl.sum(sums.to(tl.float64))):
            first = row * programs
            kl = (ordered_sum(partials + first, programs, FINISH) * kl_scale).to(DTYPE)
            tl.store(kl_out + row, kl)
            if loss_out is not None:
                weighted = scalar(recon_weight, recon_weight_value, DTYPE) * tl.load(recon + row)
                tl.store(loss_out + row, weighted + scalar(beta, beta_value, DTYPE) * kl)
            if weighted_out is not None:
                total = ordered_sum(floored_partials + first, programs, FINISH)
                tl.store(weighted_out + row, (total * kl_scale).to(DTYPE))


@triton.jit
def backward(
    grad_z, mu, logvar, prior_mu, prior_second, kl_weight, noise, grad_mu, grad_logvar, grad_prior_mu, grad_prior_second,
    grad_loss, grad_kl, grad_weighted, of_columns, beta, beta_value, kl_scale, floor, posterior_share, prior_share,
    latents, columns, programs, apart, inner, groups,
    HAS_KL: tl.constexpr, POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, WEIGHT: tl.constexpr,
    FLOORED: tl.constexpr, PER: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A kernel's whole work. PER: `grad_kl` and `grad_weighted` arrived at a KL of each "row", "column" (dimension of the
    latents) or "element". `posterior_share` and `prior_share` are what of `grad_weighted` goes to either, of elements above the
    floor if FLOORED; of columns above it, if there are the KLs `of_columns`."""
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    weight = scalar(None, kl_scale, DTYPE)
    factor = weight
    weighted_factor = weight
    if PER == "row":
        factor *= factor_of_term(grad_loss, grad_kl, row, beta, beta_value, DTYPE)
        weighted_factor *= upstream_of(grad_weighted, row, DTYPE)
    least = scalar(None, floor, DTYPE)
    to_posterior, to_prior = scalar(None, posterior_share, DTYPE), scalar(None, prior_share, DTYPE)
    base, end = row_bounds(row, latents, ALIGNED, WIDE)
    if grad_z is not None:
        noise = seed_or_noise(noise)
    for start in tl.range(worker * BLOCK, end, programs * BLOCK):
        sample_backward_tile(
            grad_z, mu, logvar, prior_mu, prior_second, kl_weight, noise, grad_mu, grad_logvar, grad_prior_mu,
            grad_prior_second, grad_kl, grad_weighted, of_columns, base + start, base + end, factor, weighted_factor,
            weight, columns, least, apart, inner, groups, to_posterior, to_prior,
            HAS_KL, POSTERIOR, LOW, HIGH, PRIOR, MU_ROW, SECOND_ROW, WEIGHT, FLOORED, PER,
            BLOCK, ALIGNED, DTYPE,
        )  # fmt: skip
    if ALIGNED:
        if worker == 0:
            sample_backward_tile(
                grad_z, mu, logvar, prior_mu, prior_second, kl_weight, noise, grad_mu, grad_logvar, grad_prior_mu,
                grad_prior_second, grad_kl, grad_weighted, of_columns, base + end, base + latents, factor, weighted_factor,
                weight, columns, least, apart, inner, groups, to_posterior, to_prior,
                HAS_KL, POSTERIOR, LOW, HIGH, PRIOR, MU_ROW, SECOND_ROW, WEIGHT, FLOORED, PER,
                16, ALIGNED, DTYPE,
            )  # fmt: skip
