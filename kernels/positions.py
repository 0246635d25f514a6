"""Positions that have a distribution of their own over what lies along one dimension: where a block of them is in memory, and
how many programs share the blocks."""

import functools
import math

import torch
import triton
import triton.language as tl

from .launch import PROGRAMS


@triton.jit
def blocks_of(outer, inner, LAST: tl.constexpr, POSITIONS: tl.constexpr):
    if LAST:
        return tl.cdiv(outer, POSITIONS)
    else:
        return outer * tl.cdiv(inner, POSITIONS)  # a block stays within one index of `outer`


@triton.jit
def place(block, first, outer, inner, LAST: tl.constexpr, POSITIONS: tl.constexpr):
    """Of the positions of a block: which ones there are; the index of `outer`, one for all unless LAST; and that of `inner`."""
    lanes = tl.arange(0, POSITIONS)
    if LAST:
        index = block * POSITIONS + lanes
        return index < outer, first + index, 0
    else:
        across = tl.cdiv(inner, POSITIONS)
        i = block % across * POSITIONS + lanes
        return i < inner, first + block // across, i


@functools.cache
def _multiprocessors_and_cache(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 1, 2**20
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def programs_of(blocks: int, rows: int, device: torch.device, read_again: int) -> int:
    """Programs of a row, with about equally many blocks each.

    What a program has read of a block, `read_again` bytes, it should find in the L2 cache when it comes back for the gradient:
    half of the cache is for that, but two programs stay on each multiprocessor.
    """
    multiprocessors, cache = _multiprocessors_and_cache(device)
    most = PROGRAMS * multiprocessors
    if read_again:
        most = min(most, max(2 * multiprocessors, cache // 2 // read_again))
    return max(1, triton.cdiv(blocks, triton.cdiv(blocks, max(1, most // rows))))


def divisor_arguments(divisor: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    if isinstance(divisor, torch.Tensor):
        return divisor, 1.0
    return None, 1 / divisor if divisor else math.copysign(math.inf, divisor)


def forward(launch, prediction, x, weight, divisor, guess, *, per_sample, dtype, **options):
    """The sum and the gradient by `launch`, which has a likelihood's kernel: see its own `forward`."""
    gradient = None if guess is None else torch.empty_like(prediction)
    shape = prediction.shape[:1] if per_sample else ()
    if prediction.numel() == 0:
        return prediction.new_zeros(shape, dtype=dtype), gradient
    recon = prediction.new_empty(shape, dtype=dtype)
    launch(prediction, x, weight, gradient, guess, None, None, recon, divisor, per_sample=per_sample, dtype=dtype, **options)
    return recon, gradient


def backward(launch, prediction, x, weight, divisor, upstream, gradient, used, *, per_sample, dtype, **options):
    """The gradient with the factor `upstream`, `[]` or `[B]`; a stored one is corrected where it lies.

    `gradient` is what forward stored with the factor `used`, or both are None. The rest is as in `forward`.

    Returns `(gradient, seen)`: `seen`, `[B]` or `[1]`, is a copy of `upstream` for the next forward to guess.
    """
    gradient = torch.empty_like(prediction) if gradient is None else gradient
    if prediction.numel() == 0:
        return gradient, upstream.reshape(-1).to(dtype, copy=True)
    seen = prediction.new_empty(prediction.shape[0] if per_sample else 1, dtype=dtype)
    upstream = upstream.contiguous()
    launch(prediction, x, weight, gradient, upstream, used, seen, None, divisor, per_sample=per_sample, dtype=dtype, **options)
    return gradient, seen
