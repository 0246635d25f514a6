"""Positions that have a distribution of their own over what lies along one dimension: where a block of them is in memory, how
many programs share the blocks, and what launches the kernels of such likelihoods."""

import functools
import math

import torch
import triton
import triton.language as tl

from .direct import Launch, allocator, dtype_of
from .launch import MANY_REGISTERS, PROGRAMS, options_of, scratch


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


class Positions:
    """The launches of a likelihood over what lies along one dimension, for tensors of one kind.

    A subclass has the kernel: `layout(prediction, x, with_gradient)` gives it, its constants, the programs of a row, and its
    numbers but for the first, `recon_scale`.
    """

    def __init__(self, per_sample: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.per_sample, self.dtype, self.device = per_sample, dtype, device
        self._found: dict[bool, tuple] = {}

    def forward(self, prediction, x, weight, divisor, guess, stateless=False):
        """The negative log-likelihood, its sum over positions divided by `divisor`, and the gradient.

        - `prediction`: contiguous; with `per_sample` its first dimension is the batch. `x`: as the subclass has it, a
          tensor or a tuple of them.
        - `weight`: None, or a number for each position; where it is 0 nothing counts, not even NaN.
        - `divisor`: a float, or a 0-d tensor on the device.
        - `guess`: None, or `[B]` or `[1]` of `dtype`: the upstream factor to store the gradient with.
        - `stateless`: keep nothing for later calls.

        Returns `(recon, gradient)`: `[]`, or `[B]` with `per_sample`, of `dtype`; and the gradient like `prediction`, or None.
        """
        gradient = None if guess is None else torch.empty_like(prediction)
        shape = prediction.shape[:1] if self.per_sample else ()
        if prediction.numel() == 0:
            return prediction.new_zeros(shape, dtype=self.dtype), gradient
        recon = allocator(self.device)(shape, (1,) * len(shape), self.dtype)
        self._run(prediction, x, weight, gradient, guess, None, None, recon, divisor, stateless)
        return recon, gradient

    def backward(self, prediction, x, weight, divisor, upstream, gradient, used):
        """The gradient with the factor `upstream`, `[]` or `[B]`; a stored one is corrected where it lies.

        `gradient` is what forward stored with the factor `used`, or both are None. The rest is as in `forward`.

        Returns `(gradient, seen)`: `seen`, `[B]` or `[1]`, is a copy of `upstream` for the next forward to guess.
        """
        gradient = torch.empty_like(prediction) if gradient is None else gradient
        if prediction.numel() == 0:
            return gradient, upstream.reshape(-1).to(self.dtype, copy=True)
        seen = allocator(self.device)((prediction.shape[0] if self.per_sample else 1,), (1,), self.dtype)
        self._run(prediction, x, weight, gradient, upstream.contiguous(), used, seen, None, divisor)
        return gradient, seen

    def _run(self, prediction, x, weight, gradient, factor, used, seen, recon, divisor, stateless=False) -> None:
        """One launch: of forward where `recon` is to be written, else of backward."""
        found = self._found.get(gradient is not None)
        if found is None:
            kernel, constants, programs, numbers = self.layout(prediction, x, gradient is not None)
            options = {name: constants.pop(name) for name in MANY_REGISTERS if name in constants} | options_of(self.device)
            found = self._found[gradient is not None] = Launch(kernel, self.device, constants, options), programs, numbers
        launch, programs, numbers = found
        rows, partials, arrived = prediction.shape[0] if self.per_sample else 1, None, None
        if recon is not None:
            partials, arrived = scratch(self.device, rows, rows * programs, stateless)
        pointer, reciprocal = divisor_arguments(divisor)
        target = x if isinstance(x, tuple) else (x,)
        tensors = prediction, *target, weight, gradient, factor, used, seen, partials, arrived, recon, pointer
        # The dtypes of indices no plan knows.
        kind = gradient is None, recon is None, *map(dtype_of, (factor, used, pointer, *target[:-1]))
        launch(rows * programs, tensors, (reciprocal, *numbers), kind)
