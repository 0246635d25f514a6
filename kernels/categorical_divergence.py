"""KL of categorical distributions: one for each group of classes, of logits from a prior's logits or from the uniform one.

The logits are seen as `[groups, classes]`. A tile is some groups with all of their classes, where these fit in one: then each
side is read once. Else a group is gone through tile by tile: for the normalizers, then for the KL, and in backward once more
for the gradients.

With s and t the softmax of either side, u the share of the uniform distribution that is mixed into both, K classes, and

    pi = (1 - u) s + u / K        rho = (1 - u) t + u / K        delta = log(pi / rho)

the KL is the sum of pi (delta + exp(-delta) - 1), since the pi and the rho each add up to 1. No term is negative, and what is
rounded of a normalizer changes the sum by its square: a collapsed KL keeps its digits. The gradients are

    by the logits:          (1 - u) s (delta - sum_j s_j delta_j)
    by those of the prior: -(1 - u) t (x - sum_j t_j x_j)             x = pi / rho - 1

in which an error that all delta or x have in common cancels.
"""

import math

import torch
import triton
import triton.language as tl

from .direct import Launch, allocator, lies
from .launch import FINISH, INTERPRETED, MANY_REGISTERS, TRITON_DTYPE, options_of, scratch
from .numerics import exp_and_expm1, exp_below, log_of_positive
from .operands import scalar
from .positions import programs_of
from .reduction import arrive_last, ordered_sum

# Differences of logarithms below which a series stands for what would cancel.
NEAR = tl.constexpr(0.35)


@triton.jit
def excess(d):
    """exp(-d) - 1 + d, for |d| < NEAR."""
    if d.dtype == tl.float64:
        _, e = exp_and_expm1(-d)
        return e + d
    else:
        f = -d
        # Taylor to f^8: the remainder is under 4e-9 of the value.
        series = 1 / 24 + f * (1 / 120 + f * (1 / 720 + f * (1 / 5040 + f * (1 / 40320))))
        return f * f * (0.5 + f * (1 / 6 + f * series))


@triton.jit
def take_in(logit, m, r):
    """The largest logit and the sum of the exponentials of what they are less than it, after one more tile."""
    top = tl.maximum(m, tl.max(logit, 1))
    return top, r * exp_below(m - top) + tl.sum(exp_below(logit - top[:, None]), 1)


@triton.jit
def logit_tile(logits, base, k, mask, DTYPE: tl.constexpr):
    """Where there is none, an impossible class, which counts nothing."""
    return tl.load(logits + (base[:, None] + k[None, :]), mask=mask, other=-float("inf")).to(DTYPE)


@triton.jit
def log_quotient(rq, rp):
    """log(rq / rp), or NaN."""
    quotient = rq / rp
    return tl.where(quotient > 0.0, log_of_positive(quotient), float("nan"))


@triton.jit
def compared(q, p, k, mq, rq, mp, rp, shift, classes, one_less, uniform, PRIOR: tl.constexpr, UNIMIX: tl.constexpr):
    """Of each class of a tile: s, t, delta, what it adds to the KL, and t x. Of two impossible ones delta is 0."""
    a = q - mq[:, None]
    s = exp_below(a) / rq[:, None]
    if PRIOR:
        b = p - mp[:, None]
        t = exp_below(b) / rp[:, None]
        d = (a - b) - shift[:, None]
    else:
        t = tl.where((k < classes)[None, :], rp[:, None], 0.0)
        d = a - shift[:, None]
    y = s - t
    pi, rho, delta = s, t, d
    if UNIMIX:
        pi, rho = one_less * s + uniform, one_less * t + uniform
        inverse = 1.0 / rho
        x = one_less * y * inverse
        # Of equal probabilities 1, which an approximate division does not promise.
        quotient = tl.where(tl.abs(x) < NEAR, 1.0 + x, pi * inverse)
        delta = tl.where(quotient > 0.0, log_of_positive(quotient), float("nan"))
        y = t * x
    near = tl.abs(delta) < NEAR  # not of infinities and NaN
    delta = tl.where(pi == 0.0, 0.0, delta)
    term = tl.where(near, pi * excess(tl.where(near, delta, 0.0)), pi * delta + (rho - pi))
    return s, t, delta, term, y


@triton.jit
def normalizers(
    logits, prior, base, prior_base, k, inside, classes, LOWEST: tl.constexpr, DTYPE: tl.constexpr,
    GROUPS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The largest logits and sums of exponentials of both sides, tile by tile."""
    mq, mp = tl.full([GROUPS], LOWEST, DTYPE), tl.full([GROUPS], LOWEST, DTYPE)
    rq, rp = tl.zeros([GROUPS], dtype=DTYPE), tl.zeros([GROUPS], dtype=DTYPE)
    for start in tl.range(0, classes, CLASSES):
        mask = inside[:, None] & (start + k < classes)[None, :]
        mq, rq = take_in(logit_tile(logits, base, start + k, mask, DTYPE), mq, rq)
        if prior is not None:
            mp, rp = take_in(logit_tile(prior, prior_base, start + k, mask, DTYPE), mp, rp)
    return mq, rq, mp, rp


@triton.jit
def both_tiles(logits, prior, base, prior_base, k, mask, DTYPE: tl.constexpr):
    q = logit_tile(logits, base, k, mask, DTYPE)
    if prior is not None:
        return q, logit_tile(prior, prior_base, k, mask, DTYPE)
    else:
        return q, q


@triton.jit
def against_uniform(rq, mp, rp, classes, prior):
    """`(rp, shift)`: the sum of the prior's exponentials, or one class's probability of a uniform one; and what the
    logarithms of the probabilities differ by beside the logits."""
    if prior is not None:
        return rp, log_quotient(rq, rp)
    else:
        count = rq * 0.0 + classes
        return 1.0 / count, log_quotient(rq, count)


@triton.jit
def shares_of(unimix, classes, DTYPE: tl.constexpr):
    """What the softmax is times, and what is added to it."""
    unimix = scalar(None, unimix, tl.float64)
    return (1.0 - unimix).to(DTYPE), (unimix / classes).to(DTYPE)


@triton.jit
def place(block, first, groups, prior_groups, classes, PRIOR_ROW: tl.constexpr, GROUPS: tl.constexpr):
    """Of the groups of a block: which ones there are, their numbers, and where their classes start on either side."""
    index = block * GROUPS + tl.arange(0, GROUPS)
    group = first + index
    prior_group = group % prior_groups if PRIOR_ROW else group
    return index < groups, group, group * classes, prior_group * classes


@triton.jit(do_not_specialize=["groups", "prior_groups", "classes", "programs"])
def categorical_divergence_fwd_kernel(
    logits, prior, of_groups, kl, weighted, partials, arrived,
    kl_scale: tl.float64, floor: tl.float64, unimix: tl.float64,
    groups: tl.int64, prior_groups: tl.int64, classes: tl.int32, programs: tl.int32,
    UNIMIX: tl.constexpr, PRIOR_ROW: tl.constexpr, PER_ROW: tl.constexpr, DTYPE: tl.constexpr, LOWEST: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, SINGLE: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """The KL of each group, or of all `groups` of a row and, unless None, the same `weighted`, with a floor under each."""
    if not WIDE:
        groups, prior_groups = groups.to(tl.int32), prior_groups.to(tl.int32)
    row, worker, first = 0, tl.program_id(0), 0
    if PER_ROW:
        row, worker = tl.program_id(0) // programs, tl.program_id(0) % programs
        first = row * groups
    classes = classes // ALIGN * ALIGN  # which the compiler has to see to make its accesses wide
    one_less, uniform = shares_of(unimix, classes, DTYPE)
    least = scalar(None, floor, DTYPE)
    sums, floored = tl.zeros([GROUPS], dtype=tl.float64), tl.zeros([GROUPS], dtype=tl.float64)
    k = tl.arange(0, CLASSES)
    for block in tl.range(worker, tl.cdiv(groups, GROUPS), programs):
        inside, group, base, prior_base = place(block, first, groups, prior_groups, classes, PRIOR_ROW, GROUPS)
        if SINGLE:
            mask = inside[:, None] & (k < classes)[None, :]
            q, p = both_tiles(logits, prior, base, prior_base, k, mask, DTYPE)
            empty, lowest = tl.zeros([GROUPS], dtype=DTYPE), tl.full([GROUPS], LOWEST, DTYPE)
            mq, rq = take_in(q, lowest, empty)
            mp, rp = take_in(p, lowest, empty)
            rp, shift = against_uniform(rq, mp, rp, classes, prior)
            _, _, _, term, _ = compared(q, p, k, mq, rq, mp, rp, shift, classes, one_less, uniform, prior is not None, UNIMIX)
            value = tl.sum(term, 1)
        else:
            mq, rq, mp, rp = normalizers(logits, prior, base, prior_base, k, inside, classes, LOWEST, DTYPE, GROUPS, CLASSES)
            rp, shift = against_uniform(rq, mp, rp, classes, prior)
            value = tl.zeros([GROUPS], dtype=DTYPE)
            for start in tl.range(0, classes, CLASSES):
                mask = inside[:, None] & (start + k < classes)[None, :]
                q, p = both_tiles(logits, prior, base, prior_base, start + k, mask, DTYPE)
                _, _, _, term, _ = compared(
                    q, p, start + k, mq, rq, mp, rp, shift, classes, one_less, uniform, prior is not None, UNIMIX
                )
                value += tl.sum(term, 1)
        if of_groups is not None:
            tl.store(of_groups + group, value, mask=inside)
        else:
            sums += tl.where(inside, value, 0.0)
            if weighted is not None:
                floored += tl.where(inside, tl.where(value <= least, least, value), 0.0)
    if of_groups is None:
        total = tl.sum(sums)
        if weighted is not None:
            tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(floored))
        if arrive_last(partials, arrived, row, programs, total):
            sum_of_row = ordered_sum(partials + row * programs, programs, FINISH)
            tl.store(kl + row, (sum_of_row * kl_scale).to(DTYPE))
            if weighted is not None:
                sum_of_row = ordered_sum(partials + tl.num_programs(0) + row * programs, programs, FINISH)
                tl.store(weighted + row, (sum_of_row * kl_scale).to(DTYPE))


@triton.jit
def factors_of(upstream, index, inside, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """What arrives at the KL of each group; None stands for zero."""
    if upstream is None:
        return tl.zeros([GROUPS], dtype=DTYPE)
    else:
        return tl.load(upstream + index, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def store_slopes(grad_logits, grad_prior, base, k, mask, s, t, delta, y, mean, total, to_logits, to_prior):
    """`mean`: sum s delta; `total`: sum t x."""
    offsets = base[:, None] + k[None, :]
    if grad_logits is not None:
        slope = s * (delta - mean[:, None]) * to_logits[:, None]
        tl.store(grad_logits + offsets, slope.to(grad_logits.dtype.element_ty), mask=mask)
    if grad_prior is not None:
        slope = (t * total[:, None] - y) * to_prior[:, None]
        tl.store(grad_prior + offsets, slope.to(grad_prior.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups", "prior_groups", "per", "classes", "programs"])
def categorical_divergence_bwd_kernel(
    logits, prior, grad_kl, grad_weighted, grad_logits, grad_prior,
    kl_scale: tl.float64, floor: tl.float64, unimix: tl.float64, posterior_share: tl.float64, prior_share: tl.float64,
    groups: tl.int64, prior_groups: tl.int64, per: tl.int64, classes: tl.int32, programs: tl.int32,
    UNIMIX: tl.constexpr, PRIOR_ROW: tl.constexpr, PER: tl.constexpr, FLOORED: tl.constexpr, DTYPE: tl.constexpr,
    LOWEST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, SINGLE: tl.constexpr, GROUPS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """Gradients by the logits of both sides, unless None. A number of an upstream gradient is for `per` groups one after the
    other ("row"), for each `per`-th ("column"), or for one ("element"). FLOORED: what arrived at `weighted` is for groups
    above the floor."""
    if not WIDE:
        groups, prior_groups, per = groups.to(tl.int32), prior_groups.to(tl.int32), per.to(tl.int32)
    classes = classes // ALIGN * ALIGN
    one_less, uniform = shares_of(unimix, classes, DTYPE)
    least, scale = scalar(None, floor, DTYPE), scalar(None, kl_scale, DTYPE) * one_less
    k = tl.arange(0, CLASSES)
    for block in tl.range(tl.program_id(0), tl.cdiv(groups, GROUPS), programs):
        inside, group, base, prior_base = place(block, 0, groups, prior_groups, classes, PRIOR_ROW, GROUPS)
        if SINGLE:
            mask = inside[:, None] & (k < classes)[None, :]
            q, p = both_tiles(logits, prior, base, prior_base, k, mask, DTYPE)
            empty, lowest = tl.zeros([GROUPS], dtype=DTYPE), tl.full([GROUPS], LOWEST, DTYPE)
            mq, rq = take_in(q, lowest, empty)
            mp, rp = take_in(p, lowest, empty)
            rp, shift = against_uniform(rq, mp, rp, classes, prior)
            s, t, delta, term, y = compared(
                q, p, k, mq, rq, mp, rp, shift, classes, one_less, uniform, prior is not None, UNIMIX
            )
            value, mean, total = tl.sum(term, 1), tl.sum(s * delta, 1), tl.sum(y, 1)
        else:
            mq, rq, mp, rp = normalizers(logits, prior, base, prior_base, k, inside, classes, LOWEST, DTYPE, GROUPS, CLASSES)
            rp, shift = against_uniform(rq, mp, rp, classes, prior)
            value = tl.zeros([GROUPS], dtype=DTYPE)
            mean, total = value, value
            for start in tl.range(0, classes, CLASSES):
                mask = inside[:, None] & (start + k < classes)[None, :]
                q, p = both_tiles(logits, prior, base, prior_base, start + k, mask, DTYPE)
                s, t, delta, term, y = compared(
                    q, p, start + k, mq, rq, mp, rp, shift, classes, one_less, uniform, prior is not None, UNIMIX
                )
                value += tl.sum(term, 1)
                mean += tl.sum(s * delta, 1)
                total += tl.sum(y, 1)
        index = group
        if PER == "row":
            index = group // per
        elif PER == "column":
            index = group % per
        factor = factors_of(grad_kl, index, inside, DTYPE, GROUPS)
        to_weighted = factors_of(grad_weighted, index, inside, DTYPE, GROUPS)
        if FLOORED:
            to_weighted = tl.where(value <= least, 0.0, to_weighted)
        to_logits = (factor + to_weighted * scalar(None, posterior_share, DTYPE)) * scale
        to_prior = (factor + to_weighted * scalar(None, prior_share, DTYPE)) * scale
        if SINGLE:
            store_slopes(grad_logits, grad_prior, base, k, mask, s, t, delta, y, mean, total, to_logits, to_prior)
        else:
            for start in tl.range(0, classes, CLASSES):
                mask = inside[:, None] & (start + k < classes)[None, :]
                q, p = both_tiles(logits, prior, base, prior_base, start + k, mask, DTYPE)
                s, t, delta, _, y = compared(
                    q, p, start + k, mq, rq, mp, rp, shift, classes, one_less, uniform, prior is not None, UNIMIX
                )
                store_slopes(grad_logits, grad_prior, base, start + k, mask, s, t, delta, y, mean, total, to_logits, to_prior)


# Elements of a tile of either side, of 4 bytes or fewer and of 8: with more, ptxas spills registers.
TILE = 2048, 1024
# Of one that has several groups.
SMALL_TILE = 1024, 512


def tile_shape(classes: int, most: int | None, dtype: torch.dtype) -> tuple[int, int]:
    """Groups and classes of a tile, which need not have more than `most` groups. `dtype`: that of the arithmetic."""
    large, small = (65536, 65536) if INTERPRETED else (TILE[dtype.itemsize > 4], SMALL_TILE[dtype.itemsize > 4])
    width = min(triton.next_power_of_2(classes), large)
    height = max(1, small // width)
    return height if most is None else min(height, triton.next_power_of_2(most)), width


class CategoricalDivergence:
    """The launches of the KL of categorical latents of one kind.

    Args:
        logits: `[B, ..., K]`, contiguous.
        prior: the prior's logits: likewise, or, contiguous, of the last dimensions alone; or None, a uniform prior.
        unimix: the share of the uniform distribution in both.
        kind: "sum" of all groups, of those of each "row", which is an index of the first dimension, or of each "element", which
            is a group. "column" is as "element" in forward; in backward, gradients come of each group of a row.
        floor: None, or a least KL of a group, with "sum" and "row".
        shares: what of the gradient of the KL with the floor goes to the posterior, and what to the prior.
        kl_scale: what the sums are times; 1 for elements.
        dtype: that of KLs and arithmetic.
    """

    __slots__ = "_backward", "_forward", "_numbers", "_result", "_sizes", "device", "floor", "is_each", "programs", "rows"

    def __init__(self, logits, prior, *, unimix, kind, floor, shares, kl_scale, dtype) -> None:
        *shape, classes = logits.shape
        groups, per = math.prod(shape), kind if kind in ("column", "element") else "row"
        self.rows = shape[0] if kind == "row" else 1
        self.device, self.floor, self.is_each = logits.device, floor, kind in ("column", "element")
        result = torch.empty({"row": shape[:1], "sum": ()}.get(kind, shape), device="meta")
        self._result = *lies(result), dtype
        prior_groups = 0 if prior is None else prior.numel() // classes
        of_row = groups // self.rows
        height, width = tile_shape(classes, of_row if kind == "row" or INTERPRETED else None, dtype)
        self.programs = programs_of(triton.cdiv(of_row, height), self.rows, self.device, 0)
        backward = programs_of(triton.cdiv(groups, height), 1, self.device, 0)
        constants = {
            "UNIMIX": unimix > 0, "PRIOR_ROW": prior is not None and prior_groups != groups, "DTYPE": TRITON_DTYPE[dtype],
            "LOWEST": torch.finfo(dtype).min, "ALIGN": math.gcd(classes, 16), "SINGLE": classes <= width, "GROUPS": height,
            # The last tiles reach beyond the end, and so do the blocks.
            "WIDE": logits.numel() + (width + height) * classes + backward * height >= 2**31, "CLASSES": width,
        }  # fmt: skip
        options = options_of(self.device) | MANY_REGISTERS
        self._forward = Launch(
            categorical_divergence_fwd_kernel, self.device, {"PER_ROW": kind == "row", "FINISH": FINISH} | constants, options
        )
        constants["FLOORED"] = floor is not None
        self._backward = Launch(categorical_divergence_bwd_kernel, self.device, {"PER": per} | constants, options)
        self._numbers = (kl_scale, floor or 0.0, unimix), shares
        of_upstream = math.prod(shape[1:]) if per == "column" else of_row
        self._sizes = (of_row, prior_groups, classes, self.programs), (groups, prior_groups, of_upstream, classes, backward)

    def forward(self, logits, prior, stateless=False):
        """`(kl, the KL with the floor, or None)`."""
        empty = allocator(self.device)
        kl = empty(*self._result)
        weighted = partials = arrived = None
        if not self.is_each:
            weighted = None if self.floor is None else empty(*self._result)
            count = self.rows * self.programs
            partials, arrived = scratch(self.device, self.rows, count if weighted is None else 2 * count, stateless)
        outputs = (kl, None, None) if self.is_each else (None, kl, weighted)
        tensors = logits, prior, *outputs, partials, arrived
        self._forward(self.rows * self.programs, tensors, (*self._numbers[0], *self._sizes[0]))
        return kl, weighted

    def backward(self, logits, prior, grad_kl, grad_weighted, wants):
        """Gradients by the logits and by the prior's, of the shape of the logits, each None where `wants` says so.

        `grad_kl` and `grad_weighted`, the gradients that arrived at what `forward` returns, or at its sums over the batch if
        the kind is "column", are contiguous; not both are None.
        """
        of_logits = torch.empty_like(logits) if wants[0] else None
        of_prior = torch.empty_like(logits, dtype=prior.dtype) if wants[1] else None
        (numbers, shares), sizes = self._numbers, self._sizes[1]
        self._backward(sizes[-1], (logits, prior, grad_kl, grad_weighted, of_logits, of_prior), (*numbers, *shares, *sizes))
        return [of_logits, of_prior]
