"""Cross entropy over classes: its sum over positions and the gradient by the logits in one launch. Backward is the same kernel.

The logits are seen as `[outer, classes, inner]`; each of the `outer * inner` positions has a distribution of its own. A tile is
`[positions, classes]`, whichever of the two lies together in memory. A program takes every so many blocks of positions. Where
the classes fit in one tile it reads them once; else it reads them tile by tile, and once more for the gradient.

The sum of the exponentials is kept without one of them: the label's, or, where all classes have targets, that of a largest
logit. With m the largest logit, u the exponential left out and r the sum of the others, all of them of l - m,

    label y:     nll = m - l_y + log(u + r)                          gradient = exp(l - m) / (u + r), at y -r / (u + r)
    targets t:   nll = sum_k t_k (m - l_k) + sum_k t_k log(1 + r)    gradient = sum_k t_k exp(l - m) / (1 + r) - t

in which nothing cancels: a confident distribution keeps the digits of its small loss, and of its small gradient.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import FINISH, INTERPRETED, MANY_REGISTERS, TRITON_DTYPE
from .numerics import exp_below, log_of_positive
from .operands import is_wrong, reciprocal, scalar
from .positions import Positions, blocks_of, place, programs_of
from .reduction import arrive_last, ordered_sum


@triton.jit
def log_of_sum(u, r):
    """log(u + r) for u in [0, 1] and r >= 0, as exact for u = 1 as log1p; NaN where the sum is not positive."""
    s = u + r
    # What the sum rounds away matters only where the logarithm is small.
    y = log_of_positive(s) + tl.where(r <= 1.0, r - (s - u), 0.0)
    return tl.where(s > 0.0, y, float("nan"))


@triton.jit
def take_in(logit, m, r, k, label):
    """The largest logit and the sum of the exponentials, less the label's, after one more tile; and those of the tile."""
    top = tl.maximum(m, tl.max(logit, 1))
    e = exp_below(logit - top[:, None])
    return top, r * exp_below(m - top) + tl.sum(tl.where(k[None, :] == label[:, None], 0.0, e), 1), e


@triton.jit
def take_in_all(logit, m, r):
    """Likewise, less that of one of the largest logits, so r = -1 before the first tile."""
    top = tl.maximum(m, tl.max(logit, 1))
    e = exp_below(logit - top[:, None])
    largest = logit == top[:, None]
    rest = tl.sum(tl.where(largest, 0.0, e), 1)
    ties = tl.sum(largest.to(e.dtype), 1)
    before = (1.0 + r) * exp_below(m - top)
    return top, tl.where(top > m, before + (rest + (ties - 1.0)), r + (rest + ties)), e


@triton.jit
def take_in_dense(logit, t, m, r, total, spread):
    """Likewise, and sum t, and sum t (top - logit)."""
    top, r, e = take_in_all(logit, m, r)
    # No weight on a class that is masked by -inf: 0, not NaN.
    spread += tl.where(total == 0.0, 0.0, total * (top - m)) + tl.sum(tl.where(t == 0.0, 0.0, t * (top[:, None] - logit)), 1)
    return top, r, total + tl.sum(t, 1), spread, e


@triton.jit
def logit_tile(prediction, offsets, mask, DTYPE: tl.constexpr):
    return tl.load(prediction + offsets, mask=mask, other=-float("inf")).to(DTYPE)


@triton.jit
def target_tile(x, offsets, mask, target_scale, DTYPE: tl.constexpr):
    return tl.load(x + offsets, mask=mask, other=0).to(DTYPE) * target_scale


@triton.jit
def slope_tile(e, k, label, of_label, of_others):
    return tl.where(k[None, :] == label[:, None], of_label[:, None], e * of_others[:, None])


@triton.jit
def dense_slope_tile(logit, e, t, m, r, of_label, of_others, total, factor):
    """At a largest logit, whose e is 1, total / (1 + r) - t is written as total - t - r total / (1 + r) where r is small, which
    keeps its digits there, and loses them where r is large."""
    of_largest = (total[:, None] - t) * factor[:, None] + of_label[:, None]
    confident = (logit == m[:, None]) & (r <= 1.0)[:, None]
    return tl.where(confident, of_largest, e * of_others[:, None] - t * factor[:, None])


@triton.jit
def store_tile(gradient, offsets, slope, keep, mask, READ: tl.constexpr):
    """READ: what is not kept was read nonetheless, and may be NaN."""
    if READ:
        slope = tl.where(keep[:, None], slope, 0.0)
    tl.store(gradient + offsets, slope.to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["outer", "classes", "inner", "programs", "ignore_index"])
def categorical_kernel(
    prediction, x, weight, gradient, factor, used, seen, partials, arrived, recon, divisor,
    recon_scale: tl.float64, target_scale: tl.float64, ignore_index: tl.int64,
    outer: tl.int64, classes: tl.int32, inner: tl.int64, programs: tl.int32,
    DENSE: tl.constexpr, PER_SAMPLE: tl.constexpr, DTYPE: tl.constexpr, LOWEST: tl.constexpr, LAST: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, SINGLE: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """`outer`: of a row. Forward has the guess for a `factor`, and `partials`; backward has the true factor, and `seen`."""
    if not WIDE:
        outer, inner = outer.to(tl.int32), inner.to(tl.int32)
    if PER_SAMPLE:
        row = tl.program_id(0) // programs
        worker = tl.program_id(0) % programs
        first = row * outer
    else:  # which keeps a register free
        row = 0
        worker = tl.program_id(0)
        first = 0
    # What lies together in memory is a multiple of ALIGN, which the compiler has to see to make its accesses wide.
    if LAST:
        classes = classes // ALIGN * ALIGN
        inner = 1
    else:
        inner = inner // ALIGN * ALIGN
    wrong = is_wrong(factor, used, seen, row, worker, DTYPE)
    if wrong:
        ts = scalar(None, target_scale, DTYPE)
        sums = tl.zeros([POSITIONS], dtype=tl.float64)  # a number for each position costs little, beside that for each class
        k = tl.arange(0, CLASSES)
        for block in tl.range(worker, blocks_of(outer, inner, LAST, POSITIONS), programs):
            inside, index, i = place(block, first, outer, inner, LAST, POSITIONS)
            position = index * inner + i
            base = index * classes * inner + i
            keep = inside
            factors = tl.full([POSITIONS], 1.0, DTYPE)
            if weight is not None:
                factors = tl.load(weight + position, mask=inside, other=0).to(DTYPE)
                keep = keep & (factors != 0.0)
            m = tl.full([POSITIONS], LOWEST, DTYPE)
            if DENSE:
                total = tl.zeros([POSITIONS], dtype=DTYPE)
                spread = total
                r = total - 1.0
            else:
                # Labels are compared in 64 bits; of those that are classes, 32 are kept.
                y = tl.load(x + position, mask=inside, other=0).to(tl.int64)
                keep = keep & (y != ignore_index)
                valid = (y >= 0) & (y < classes)
                label = tl.where(valid, y, -1).to(tl.int32)
                at = base + tl.where(valid, label, 0) * inner
                picked = tl.load(prediction + at, mask=keep & valid, other=0.0).to(DTYPE)
                m = tl.maximum(m, picked)
                r = tl.zeros([POSITIONS], dtype=DTYPE)
            if LAST:
                wanted = keep  # whole rows are not read; elsewhere that would break accesses up
            else:
                wanted = inside
            if SINGLE:
                offsets = base[:, None] + (k * inner)[None, :]
                mask = wanted[:, None] & (k < classes)[None, :]
                logit = logit_tile(prediction, offsets, mask, DTYPE)
                if DENSE:
                    t = target_tile(x, offsets, mask, ts, DTYPE)
                    m, r, total, spread, e = take_in_dense(logit, t, m, r, total, spread)
                else:
                    m, r, e = take_in(logit, m, r, k, label)
            else:
                for start in tl.range(0, classes, CLASSES):
                    offsets = base[:, None] + ((start + k) * inner)[None, :]
                    mask = wanted[:, None] & (start + k < classes)[None, :]
                    logit = logit_tile(prediction, offsets, mask, DTYPE)
                    if DENSE:
                        t = target_tile(x, offsets, mask, ts, DTYPE)
                        m, r, total, spread, _ = take_in_dense(logit, t, m, r, total, spread)
                    else:
                        m, r, _ = take_in(logit, m, r, start + k, label)
            if DENSE:
                u = tl.full([POSITIONS], 1.0, DTYPE)
                r = tl.where(m == float("inf"), float("nan"), r)  # infinity less itself is what was left out
            else:
                u = exp_below(picked - m)
                total = tl.where(valid, 1.0, float("nan")).to(DTYPE)
                spread = m - picked
            if partials is not None:
                sums += tl.where(keep, factors * (spread + total * log_of_sum(u, r)), 0.0)
            if gradient is not None:
                # Not before the classes, over which it would take registers.
                factors *= (tl.load(factor + row).to(tl.float64) * reciprocal(divisor, recon_scale)).to(DTYPE)
                of_others = tl.where(keep, total / (u + r) * factors, 0.0)
                of_label = tl.where(keep, -r * of_others, 0.0)
                if SINGLE:
                    if DENSE:
                        slope = dense_slope_tile(logit, e, t, m, r, of_label, of_others, total, factors)
                    else:
                        slope = slope_tile(e, k, label, of_label, of_others)
                    mask = inside[:, None] & (k < classes)[None, :]
                    store_tile(gradient, offsets, slope, keep, mask, not LAST)
                else:
                    for start in tl.range(0, classes, CLASSES):
                        offsets = base[:, None] + ((start + k) * inner)[None, :]
                        mask = wanted[:, None] & (start + k < classes)[None, :]
                        logit = logit_tile(prediction, offsets, mask, DTYPE)
                        e = exp_below(logit - m[:, None])
                        if DENSE:
                            t = target_tile(x, offsets, mask, ts, DTYPE)
                            slope = dense_slope_tile(logit, e, t, m, r, of_label, of_others, total, factors)
                        else:
                            slope = slope_tile(e, start + k, label, of_label, of_others)
                        mask = inside[:, None] & (start + k < classes)[None, :]
                        store_tile(gradient, offsets, slope, keep, mask, not LAST)
        if partials is not None:
            if arrive_last(partials, arrived, row, programs, tl.sum(sums)):
                total_sum = ordered_sum(partials + row * programs, programs, FINISH)
                tl.store(recon + row, (total_sum * reciprocal(divisor, recon_scale)).to(DTYPE))


# Elements of a tile, of 4 bytes or fewer, where classes need several: 32 a thread, of logits and maybe of targets.
TILE = 4096
# Where only logits are held, and all classes fit in: they are read once.
SINGLE_TILE = 8192
# Where all classes fit in less, a tile has several positions.
SMALL_TILE = 1024
# Positions that lie together in memory, where these are not the classes: 128 bytes of float32, 64 of 16-bit numbers.
TOGETHER = 32


def tile_shape(classes: int, inner: int, most: int | None, dense: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Positions and classes of a tile; a block need not have more than `most` positions. `dtype`: that of the arithmetic."""
    if INTERPRETED:
        single = multiple = small = 65536
    else:
        single, multiple, small = (size * 4 // dtype.itemsize for size in (TILE if dense else SINGLE_TILE, TILE, SMALL_TILE))
    width = triton.next_power_of_2(classes)
    height = max(1, small // width)
    if inner > 1:
        most = inner
        height = max(height, TOGETHER)
    if most is not None:
        height = min(height, triton.next_power_of_2(most))
    if width * height > single:
        width = max(1, multiple // height)
    return height, width


class Categorical(Positions):
    """Of categorical distributions.

    - The prediction: logits, seen as `[outer, classes, inner]`.
    - The target: of one dimension less, labels `[outer, inner]` of an integer dtype; of as many, targets of the shape of the
      logits and of any real dtype, which are multiplied by `target_scale`. A label equal to `ignore_index` counts nothing; one
      that is no class makes NaN.
    """

    def __init__(self, *, per_sample, dtype, device, classes, inner, ignore_index, target_scale) -> None:
        super().__init__(per_sample, dtype, device)
        self.classes, self.inner, self.ignore_index, self.target_scale = classes, inner, ignore_index, target_scale

    def layout(self, prediction, x, with_gradient):
        classes, inner, dtype, numel = self.classes, self.inner, self.dtype, prediction.numel()
        rows = prediction.shape[0] if self.per_sample else 1
        outer = numel // (classes * inner * rows)
        dense = x.dim() == prediction.dim()
        height, width = tile_shape(classes, inner, outer if self.per_sample or INTERPRETED else None, dense, dtype)
        blocks = triton.cdiv(outer, height) if inner == 1 else outer * triton.cdiv(inner, height)
        single = classes <= width
        read_again = 0
        if not single and with_gradient:
            read_again = height * classes * (prediction.element_size() + (x.element_size() if dense else 0))
        programs = programs_of(blocks, rows, self.device, read_again)
        constants = {
            "DENSE": dense, "PER_SAMPLE": self.per_sample, "DTYPE": TRITON_DTYPE[dtype], "LOWEST": torch.finfo(dtype).min,
            "LAST": inner == 1, "ALIGN": math.gcd(classes if inner == 1 else inner, 16),
            # The last tiles reach beyond the end, and so do the blocks.
            "WIDE": numel + (width + height) * max(classes, inner) + programs * height >= 2**31,
            "SINGLE": single, "POSITIONS": height, "CLASSES": width, "FINISH": FINISH, **MANY_REGISTERS,
        }  # fmt: skip
        return categorical_kernel, constants, programs, (self.target_scale, self.ignore_index, outer, classes, inner, programs)
