"""The discretized logistic mixture: its sum over pixels and the gradient by all its parameters in one launch. Backward is the
same kernel.

The parameters are seen as `[outer, P, inner]`, in the order of PixelCNN++ (see `fastelbo.mixture`), and the target as `[outer,
channels, inner]`. A tile is `[positions, components]`, with all components of a position, so that of three channels or one each
parameter is read once: what its gradient needs stays in registers. Other channels are read twice, one after the other.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import FINISH, INTERPRETED, TRITON_DTYPE
from .likelihoods import log_bin
from .numerics import exp_and_expm1, exp_below, log_of_positive
from .operands import is_wrong, reciprocal, scalar
from .positions import Positions, blocks_of, place, programs_of
from .reduction import arrive_last, ordered_sum


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)^2."""
    e, expm1 = exp_and_expm1(-2.0 * tl.abs(x))
    q = 1.0 / (1.0 + e)
    t = -expm1 * q
    return tl.where(x < 0.0, -t, t), 4.0 * e * (q * q)


@triton.jit
def parameter_tile(prediction, offsets, mask, DTYPE: tl.constexpr):
    return tl.load(prediction + offsets, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def pixel_column(
    x, offsets, inside, steps, half, INTEGER: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr
):
    """The target, a column: levels less half of their range in half steps, or a number in [-1, 1]; and that number; and whether
    it is of the lowest and of the highest bin."""
    value = tl.load(x + offsets, mask=inside, other=0).to(DTYPE)[:, None]
    if INTEGER:
        level = 2.0 * value - steps
        value = tl.where(tl.abs(level) > steps, float("nan"), level)  # is no level
        return value, value * half, level < 1.0 - steps, level > steps - 1.0
    else:
        if SCALE != 1.0:
            value *= SCALE
        if SHIFT != 0.0:
            value += SHIFT
        inside = tl.where(tl.abs(value) > 1.0 + half, float("nan"), value)
        return inside, inside, value < half - 1.0, value > 1.0 - half


@triton.jit
def channel(v, mean, shift, log_scale, lowest, highest, steps, half, INTEGER: tl.constexpr):
    """The logarithm of what a logistic around mean + shift holds of the bin of a target `v`, as `pixel_column` has it, and its
    derivatives by the mean and the log scale. A target near the mean cancels exactly."""
    if INTEGER:
        distance = (v - mean * steps) * half - shift  # one rounding, if the product and the sum are fused
    else:
        distance = (v - mean) - shift
    low = log_scale < -7.0  # written so that NaN passes through
    log_scale = tl.where(low, -7.0, log_scale)
    inverse = exp_below(-log_scale)
    log_p, slope, to_log_scale = log_bin(distance, log_scale, inverse, lowest, highest, half)
    return log_p, slope * inverse, tl.where(low, 0.0, to_log_scale)


@triton.jit
def store_parameter(gradient, offsets, slope, keep, mask):
    """What is not kept may be NaN."""
    tl.store(gradient + offsets, tl.where(keep[:, None], slope, 0.0).to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["outer", "components", "inner", "channels", "levels", "programs"])
def mixture_kernel(
    prediction, x, weight, gradient, factor, used, seen, partials, arrived, recon, divisor,
    recon_scale: tl.float64, half_step: tl.float64, levels: tl.int32,
    outer: tl.int64, components: tl.int32, inner: tl.int64, channels: tl.int32, programs: tl.int32,
    CHANNELS: tl.constexpr, INTEGER: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, PER_SAMPLE: tl.constexpr,
    DTYPE: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, POSITIONS: tl.constexpr,
    COMPONENTS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """CHANNELS: 3 or 1, or 0 for another number, `channels`. The rest is as in `categorical.categorical_kernel`."""
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
    if LAST:
        components = components // ALIGN * ALIGN
        inner = 1
    else:
        inner = inner // ALIGN * ALIGN
    if CHANNELS == 3:
        channels = 3
        parameters = 10 * components
    elif CHANNELS == 1:
        channels = 1
        parameters = 3 * components
    else:
        parameters = (1 + 2 * channels) * components
    if is_wrong(factor, used, seen, row, worker, DTYPE):
        half = scalar(None, half_step, DTYPE)
        steps = (levels - 1).to(DTYPE)
        sums = tl.zeros([POSITIONS], dtype=tl.float64)
        k = tl.arange(0, COMPONENTS)
        apart = components * inner  # from the tile of a parameter to that of the next
        for block in tl.range(worker, blocks_of(outer, inner, LAST, POSITIONS), programs):
            inside, index, i = place(block, first, outer, inner, LAST, POSITIONS)
            position = index * inner + i
            keep = inside
            factors = tl.full([POSITIONS], 1.0, DTYPE)
            if weight is not None:
                factors = tl.load(weight + position, mask=inside, other=0).to(DTYPE)
                keep = keep & (factors != 0.0)
            mask = inside[:, None] & (k < components)[None, :]
            o = (index * parameters * inner + i)[:, None] + (k * inner)[None, :]
            pixel = index * channels * inner + i
            logit = tl.load(prediction + o, mask=mask, other=-float("inf")).to(DTYPE)
            if CHANNELS == 3:
                v_r, r, low_r, high_r = pixel_column(x, pixel, inside, steps, half, INTEGER, SCALE, SHIFT, DTYPE)
                v_g, g, low_g, high_g = pixel_column(x, pixel + inner, inside, steps, half, INTEGER, SCALE, SHIFT, DTYPE)
                v_b, _, low_b, high_b = pixel_column(x, pixel + 2 * inner, inside, steps, half, INTEGER, SCALE, SHIFT, DTYPE)
                mean_r = parameter_tile(prediction, o + apart, mask, DTYPE)
                scale_r = parameter_tile(prediction, o + 2 * apart, mask, DTYPE)
                g_by_r, g_by_r_slope = tanh_and_slope(parameter_tile(prediction, o + 3 * apart, mask, DTYPE))
                mean_g = parameter_tile(prediction, o + 4 * apart, mask, DTYPE)
                scale_g = parameter_tile(prediction, o + 5 * apart, mask, DTYPE)
                b_by_r, b_by_r_slope = tanh_and_slope(parameter_tile(prediction, o + 6 * apart, mask, DTYPE))
                mean_b = parameter_tile(prediction, o + 7 * apart, mask, DTYPE)
                scale_b = parameter_tile(prediction, o + 8 * apart, mask, DTYPE)
                b_by_g, b_by_g_slope = tanh_and_slope(parameter_tile(prediction, o + 9 * apart, mask, DTYPE))
                g_shift, b_shift = g_by_r * r, b_by_r * r + b_by_g * g
                log_r, mean_r, scale_r = channel(v_r, mean_r, 0.0, scale_r, low_r, high_r, steps, half, INTEGER)
                log_g, mean_g, scale_g = channel(v_g, mean_g, g_shift, scale_g, low_g, high_g, steps, half, INTEGER)
                log_b, mean_b, scale_b = channel(v_b, mean_b, b_shift, scale_b, low_b, high_b, steps, half, INTEGER)
                log_p = log_r + log_g + log_b
            elif CHANNELS == 1:
                v_r, _, low_r, high_r = pixel_column(x, pixel, inside, steps, half, INTEGER, SCALE, SHIFT, DTYPE)
                mean_r = parameter_tile(prediction, o + apart, mask, DTYPE)
                scale_r = parameter_tile(prediction, o + 2 * apart, mask, DTYPE)
                log_p, mean_r, scale_r = channel(v_r, mean_r, 0.0, scale_r, low_r, high_r, steps, half, INTEGER)
            else:
                log_p = tl.zeros([POSITIONS, COMPONENTS], dtype=DTYPE)
                for c in tl.range(0, channels):
                    v, _, low, high = pixel_column(x, pixel + c * inner, inside, steps, half, INTEGER, SCALE, SHIFT, DTYPE)
                    mean = parameter_tile(prediction, o + (1 + 2 * c) * apart, mask, DTYPE)
                    scale = parameter_tile(prediction, o + (2 + 2 * c) * apart, mask, DTYPE)
                    log_c, _, _ = channel(v, mean, 0.0, scale, low, high, steps, half, INTEGER)
                    log_p += log_c
            # The sums are 1 or more, and the largest logit is taken off before what is as large can cancel.
            logit -= tl.max(logit, 1)[:, None]
            prior = exp_below(logit)
            prior_sum = tl.sum(prior, 1)
            joint = logit + log_p
            top = tl.max(joint, 1)
            posterior = exp_below(joint - top[:, None])
            posterior_sum = tl.sum(posterior, 1)
            if partials is not None:
                nll = log_of_positive(prior_sum) - (top + log_of_positive(posterior_sum))
                nll = tl.where((prior_sum > 0.0) & (posterior_sum > 0.0), nll, float("nan"))
                sums += tl.where(keep, factors * nll, 0.0)
            if gradient is not None:
                factors *= (tl.load(factor + row).to(tl.float64) * reciprocal(divisor, recon_scale)).to(DTYPE)
                slope = posterior * (factors / posterior_sum)[:, None]
                store_parameter(gradient, o, prior * (factors / prior_sum)[:, None] - slope, keep, mask)
                slope = -slope
                if CHANNELS == 3:
                    mean_r, mean_g, mean_b = mean_r * slope, mean_g * slope, mean_b * slope
                    store_parameter(gradient, o + apart, mean_r, keep, mask)
                    store_parameter(gradient, o + 2 * apart, scale_r * slope, keep, mask)
                    store_parameter(gradient, o + 3 * apart, mean_g * r * g_by_r_slope, keep, mask)
                    store_parameter(gradient, o + 4 * apart, mean_g, keep, mask)
                    store_parameter(gradient, o + 5 * apart, scale_g * slope, keep, mask)
                    store_parameter(gradient, o + 6 * apart, mean_b * r * b_by_r_slope, keep, mask)
                    store_parameter(gradient, o + 7 * apart, mean_b, keep, mask)
                    store_parameter(gradient, o + 8 * apart, scale_b * slope, keep, mask)
                    store_parameter(gradient, o + 9 * apart, mean_b * g * b_by_g_slope, keep, mask)
                elif CHANNELS == 1:
                    store_parameter(gradient, o + apart, mean_r * slope, keep, mask)
                    store_parameter(gradient, o + 2 * apart, scale_r * slope, keep, mask)
                else:
                    for c in tl.range(0, channels):
                        v, _, low, high = pixel_column(x, pixel + c * inner, inside, steps, half, INTEGER, SCALE, SHIFT, DTYPE)
                        mean = parameter_tile(prediction, o + (1 + 2 * c) * apart, mask, DTYPE)
                        scale = parameter_tile(prediction, o + (2 + 2 * c) * apart, mask, DTYPE)
                        _, mean, scale = channel(v, mean, 0.0, scale, low, high, steps, half, INTEGER)
                        store_parameter(gradient, o + (1 + 2 * c) * apart, mean * slope, keep, mask)
                        store_parameter(gradient, o + (2 + 2 * c) * apart, scale * slope, keep, mask)
        if partials is not None:
            if arrive_last(partials, arrived, row, programs, tl.sum(sums)):
                total = ordered_sum(partials + row * programs, programs, FINISH)
                tl.store(recon + row, (total * reciprocal(divisor, recon_scale)).to(DTYPE))


# Elements of a tile, of which a thread holds nine slopes each, of three channels; with one channel, or one at a time, two.
THREE_TILE, OTHER_TILE = 512, 1024
# Positions that lie together in memory: 128 bytes of float32; fewer for very many components.
TOGETHER, FEWEST = 32, 8


def tile_shape(components: int, inner: int, most: int | None, channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Positions and components of a tile; a block need not have more than `most` positions. `dtype`: that of the arithmetic."""
    size = 8192 if INTERPRETED else THREE_TILE if channels == 3 else OTHER_TILE
    if dtype == torch.float64:
        size //= 4
    width = triton.next_power_of_2(components)
    height = max(1, size // width)
    if inner > 1:
        most = inner
        height = max(height, FEWEST)
    if most is not None:
        height = min(height, triton.next_power_of_2(most))
    return height, width


class Mixture(Positions):
    """Of pixels: `likelihoods.mixture.nll`.

    - The prediction: parameters, seen as `[outer, P, inner]`.
    - The target: `[outer, channels, inner]`, in [-1, 1] once it is multiplied by `target_scale` and `target_shift` is added,
      or levels of an integer dtype.
    """

    def __init__(
        self, *, per_sample, dtype, device, levels, inner, channels, target_scale: float = 1.0, target_shift: float = 0.0
    ) -> None:
        super().__init__(per_sample, dtype, device)
        self.levels, self.inner, self.channels = levels, inner, channels
        self.target_scale, self.target_shift = target_scale, target_shift

    def layout(self, prediction, x, with_gradient):
        channels, inner, dtype, numel = self.channels, self.inner, self.dtype, prediction.numel()
        rows = prediction.shape[0] if self.per_sample else 1
        outer = x.numel() // (channels * inner * rows)
        components = numel // (outer * rows * inner) // (10 if channels == 3 else 1 + 2 * channels)
        height, width = tile_shape(components, inner, outer if self.per_sample or INTERPRETED else None, channels, dtype)
        blocks = triton.cdiv(outer, height) if inner == 1 else outer * triton.cdiv(inner, height)
        programs = programs_of(blocks, rows, self.device, 0)
        constants = {
            "CHANNELS": channels if channels in (1, 3) else 0, "INTEGER": not x.is_floating_point(),
            "SCALE": self.target_scale, "SHIFT": self.target_shift,
            "PER_SAMPLE": self.per_sample, "DTYPE": TRITON_DTYPE[dtype], "LAST": inner == 1,
            "ALIGN": math.gcd(components if inner == 1 else inner, 16),
            # The last tiles reach beyond the end, and so do the blocks.
            "WIDE": numel + (width + height) * max(numel // (outer * rows * inner), inner) + programs * height >= 2**31,
            "POSITIONS": height, "COMPONENTS": width, "FINISH": FINISH,
        }  # fmt: skip
        numbers = 1 / (self.levels - 1), self.levels, outer, components, inner, channels, programs
        return mixture_kernel, constants, programs, numbers
