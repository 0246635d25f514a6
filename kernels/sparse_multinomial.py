"""The multinomial of a sparse target: value and gradient in one launch, in which a program has whole rows. Backward is the same
kernel.

The logits of a row are streamed, and those at its nonzeros gathered. What there is of a dense target, see `categorical.py`,

    nll = sum_k t_k (m - l_k) + sum_k t_k log(1 + r)    gradient = sum_k t_k exp(l - m) / (1 + r) - t

has targets in its sums, and nowhere else but at nonzeros. So the gradient of a row without them is stored, and that at nonzeros
over it, once all of the program's threads have stored theirs. A place has one nonzero at most, so that no two write to one. A
row that fits in one tile is read once, a longer one once more for the gradient.
"""

import math

import torch
import triton
import triton.language as tl

from .categorical import Categorical, dense_slope_tile, log_of_sum, logit_tile, take_in_all, target_tile, tile_shape
from .launch import FINISH, MANY_REGISTERS, TRITON_DTYPE
from .numerics import exp_below
from .operands import is_wrong, reciprocal, scalar
from .positions import programs_of
from .reduction import arrive_last, ordered_sum
from .sparse import BLOCK


@triton.jit(do_not_specialize=["rows", "width", "programs"])
def sparse_multinomial_kernel(
    prediction, starts, columns, values, weight, gradient, factor, used, seen, partials, arrived, recon, divisor,
    recon_scale: tl.float64, target_scale: tl.float64, rows: tl.int64, width: tl.int32, programs: tl.int32,
    PER_SAMPLE: tl.constexpr, DTYPE: tl.constexpr, LOWEST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    SINGLE: tl.constexpr, CLASSES: tl.constexpr, GATHERED: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Of a sample, `programs`. The rest is as in `categorical.categorical_kernel`."""
    sample, worker = 0, tl.program_id(0)
    if PER_SAMPLE:
        sample, worker = tl.program_id(0), 0
    width = width // ALIGN * ALIGN  # which the compiler has to see to make its accesses wide
    if is_wrong(factor, used, seen, sample, worker, DTYPE):
        ts = scalar(None, target_scale, DTYPE)
        sums = tl.zeros([1], dtype=tl.float64)
        k, n = tl.arange(0, CLASSES), tl.arange(0, GATHERED)
        none = tl.zeros([1, 1], dtype=DTYPE)
        for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
            index = row + tl.arange(0, 1)
            if not WIDE:
                index = index.to(tl.int32)
            base = index * width
            begin, end = tl.load(starts + row).to(tl.int64), tl.load(starts + row + 1).to(tl.int64)
            keep = index >= 0
            factors = tl.full([1], 1.0, DTYPE)
            if weight is not None:
                factors = tl.load(weight + index).to(DTYPE)
                keep = factors != 0.0
            m = tl.full([1], LOWEST, DTYPE)
            r = tl.full([1], -1.0, DTYPE)
            if SINGLE:
                offsets = base[:, None] + k[None, :]
                inside = (k < width)[None, :]
                logit = logit_tile(prediction, offsets, keep[:, None] & inside, DTYPE)
                m, r, e = take_in_all(logit, m, r)
            else:
                for start in tl.range(0, width, CLASSES):
                    offsets = base[:, None] + (start + k)[None, :]
                    inside = (start + k < width)[None, :]
                    m, r, _ = take_in_all(logit_tile(prediction, offsets, keep[:, None] & inside, DTYPE), m, r)
            r = tl.where(m == float("inf"), float("nan"), r)  # infinity less itself is what was left out
            sum_of_counts = tl.zeros([1], dtype=tl.float64)  # which costs as little as `sums` does
            spread = sum_of_counts
            for start in tl.range(begin, end, GATHERED):
                at = (start + n)[None, :]
                mask = keep[:, None] & (at < end)
                t = target_tile(values, at, mask, ts, DTYPE)
                chosen = logit_tile(prediction, base[:, None] + tl.load(columns + at, mask=mask, other=0), mask, DTYPE)
                # No weight on an item that is masked by -inf: 0, not NaN.
                spread += tl.sum(tl.where(t == 0.0, 0.0, t * (m[:, None] - chosen)), 1).to(tl.float64)
                sum_of_counts += tl.sum(t, 1).to(tl.float64)
            total = sum_of_counts.to(DTYPE)
            if partials is not None:
                sums += tl.where(keep, factors * (spread + total * log_of_sum(1.0, r)), 0.0)
            if gradient is not None:
                factors *= (tl.load(factor + sample).to(tl.float64) * reciprocal(divisor, recon_scale)).to(DTYPE)
                of_others = tl.where(keep, total / (1.0 + r) * factors, 0.0)
                of_largest = tl.where(keep, -r * of_others, 0.0)
                if SINGLE:
                    slope = dense_slope_tile(logit, e, none, m, r, of_largest, of_others, total, factors)
                    slope = tl.where(keep[:, None], slope, 0.0)
                    tl.store(gradient + offsets, slope.to(gradient.dtype.element_ty), mask=inside)
                else:
                    for start in tl.range(0, width, CLASSES):
                        offsets = base[:, None] + (start + k)[None, :]
                        inside = (start + k < width)[None, :]
                        logit = logit_tile(prediction, offsets, keep[:, None] & inside, DTYPE)
                        e = exp_below(logit - m[:, None])
                        slope = dense_slope_tile(logit, e, none, m, r, of_largest, of_others, total, factors)
                        slope = tl.where(keep[:, None], slope, 0.0)
                        tl.store(gradient + offsets, slope.to(gradient.dtype.element_ty), mask=inside)
                tl.debug_barrier()  # what another thread has stored is written over
                for start in tl.range(begin, end, GATHERED):
                    at = (start + n)[None, :]
                    mask = keep[:, None] & (at < end)
                    t = target_tile(values, at, mask, ts, DTYPE)
                    places = base[:, None] + tl.load(columns + at, mask=mask, other=0)
                    chosen = logit_tile(prediction, places, mask, DTYPE)
                    share = exp_below(chosen - m[:, None])
                    instead = dense_slope_tile(chosen, share, t, m, r, of_largest, of_others, total, factors)
                    tl.store(gradient + places, instead.to(gradient.dtype.element_ty), mask=mask)
        if partials is not None:
            if arrive_last(partials, arrived, sample, programs, tl.sum(sums)):
                total_sum = ordered_sum(partials + sample * programs, programs, FINISH)
                tl.store(recon + sample, (total_sum * reciprocal(divisor, recon_scale)).to(DTYPE))


class SparseMultinomial(Categorical):
    """Of multinomials.

    - The prediction: logits `[B, G]`.
    - The target: the three tensors of CSR: where rows start, columns, values. These are multiplied by `target_scale`.
    """

    def layout(self, prediction, x, with_gradient):
        (rows, width), dtype = prediction.shape, self.dtype
        _, classes = tile_shape(width, 1, 1, True, dtype)
        single = width <= classes
        read_again = 0 if single or not with_gradient else width * prediction.element_size()
        # A row is a sample, or a block of all.
        programs = programs_of(1 if self.per_sample else rows, rows if self.per_sample else 1, self.device, read_again)
        constants = {
            "PER_SAMPLE": self.per_sample, "DTYPE": TRITON_DTYPE[dtype], "LOWEST": torch.finfo(dtype).min,
            "ALIGN": math.gcd(width, 16), "WIDE": prediction.numel() + classes >= 2**31, "SINGLE": single, "CLASSES": classes,
            "GATHERED": BLOCK, "FINISH": FINISH, **MANY_REGISTERS,
        }  # fmt: skip
        return sparse_multinomial_kernel, constants, programs, (self.target_scale, rows, width, programs)
