"""The reconstruction of means that are a library times the softmax of a row: three launches, and no mean in memory.

With m the largest logit of a row, s the sum of exp(l - m), and L the library,

    share = exp(l - m) / s        mean = L share
    d sum / d L = S = sum_k w_k share_k dnll_k / dmean        d sum / d l = mean (w dnll / dmean - S)

so a row's gradient needs its S, as its values need s. The first launch finds m and s; that of `reconstruction.py`, or those of
`sparse.py`, add up values and S; and backward, which knows all of them and the upstream factor, is such a launch again. Nothing
is guessed: a gradient that was stored in forward would have to be gone through once more.
"""

import torch
import triton
import triton.language as tl

from .direct import INTERPRETED, Launch, allocator
from .launch import FINISH, THREADS, TRITON_DTYPE, Segment, options_of, scratch, tile_size
from .numerics import exp_below
from .operands import row_bounds
from .reconstruction import Family, Reconstruction, summed
from .reduction import arrive_last
from .sparse import SparseReconstruction


@triton.jit
def take_in(logits, o, mask, top, total, SIZE: tl.constexpr, THREADS: tl.constexpr, DTYPE: tl.constexpr):
    """A thread's largest logit, and its sum of the exponentials of what the others are below that, after one more tile."""
    tile = tl.load(logits + o, mask=mask, other=-float("inf")).to(DTYPE).reshape([THREADS, SIZE // THREADS])
    largest = tl.maximum(top, tl.max(tile, 1))
    return largest, total * exp_below(top - largest) + tl.sum(exp_below(tile - largest[:, None]), 1)


@triton.jit(do_not_specialize=["columns", "programs", "step"])
def softmax_kernel(
    logits, library, of_rows, partials, arrived, columns: tl.int64, programs: tl.int32, step: tl.int32,
    LOWEST: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """To `of_rows`, float64, go of each row its largest logit, the reciprocal of the sum of exponentials, and its library."""
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    base, end = row_bounds(row, columns, ALIGNED, WIDE)
    # Finite, so that its difference from itself is 0. A NaN is in the sum, if not in the largest.
    top = tl.full([THREADS], LOWEST, DTYPE)
    total = tl.zeros([THREADS], dtype=DTYPE)
    for start in tl.range(worker * BLOCK, end, programs * BLOCK):
        o = start + tl.arange(0, BLOCK)
        top, total = take_in(logits, base + o, o < end, top, total, BLOCK, THREADS, DTYPE)
    if ALIGNED:
        if worker == 0:
            o = end + tl.arange(0, THREADS)
            top, total = take_in(logits, base + o, o < columns, top, total, THREADS, THREADS, DTYPE)
    largest = tl.max(top, 0)
    own = tl.sum((total * exp_below(top - largest)).to(tl.float64))
    tl.store(partials + tl.num_programs(0) + tl.program_id(0), largest.to(tl.float64))
    if arrive_last(partials, arrived, row, programs, own):
        sums = partials + row * programs
        tops = sums + tl.num_programs(0)
        most = tl.full([FINISH], LOWEST, tl.float64)
        for start in tl.range(0, programs, FINISH):
            i = start + tl.arange(0, FINISH)
            most = tl.maximum(most, tl.load(tops + i, mask=i < programs, other=LOWEST, cache_modifier=".cg"))
        lead = tl.max(most, 0)
        every = tl.zeros([FINISH], dtype=tl.float64)
        for start in tl.range(0, programs, FINISH):
            i = start + tl.arange(0, FINISH)
            below = tl.load(tops + i, mask=i < programs, other=LOWEST, cache_modifier=".cg") - lead
            part = tl.load(sums + i, mask=i < programs, other=0.0, cache_modifier=".cg")
            every += part * exp_below(below.to(DTYPE)).to(tl.float64)
        rows = tl.num_programs(0) // programs
        tl.store(of_rows + row, lead)
        tl.store(of_rows + rows + row, 1.0 / tl.sum(every))
        tl.store(of_rows + 2 * rows + row, tl.load(library + row * step).to(tl.float64))


# As much as a thread loads of two tensors elsewhere.
TILES = 1 if INTERPRETED else 2


class RowReconstruction:
    """The launches for tensors of one kind, as those of `Reconstruction`, or of `SparseReconstruction` if the family has a
    function for a target of 0. The last of the parameters is the library, with a number for each row or for all.
    `parameters[0]` is contiguous; its rows lie along its last dimension.
    """

    __slots__ = "_launches", "_softmax", "device", "dtype", "per_sample"

    def __init__(self, *, family: Family, per_sample, dtype, device) -> None:
        self.per_sample, self.dtype, self.device = per_sample, dtype, device
        kind = Reconstruction if family.at_zero is None else SparseReconstruction
        self._launches = kind(family=family, per_sample=per_sample, dtype=dtype, device=device)
        self._softmax: tuple[Launch, Segment] | None = None

    def forward(self, parameters, x, weight, divisor, wants, stateless=False):
        """`(recon, sums)`: as in `Reconstruction.forward`; and, where some of `wants` is, the derivatives of the sum by
        parameters smaller than the first that are, None for the others, and behind them what backward needs of the rows."""
        *given, library = parameters
        first = given[0]
        of_rows = self.of_rows(first, library, stateless)
        small = *(want and p.shape != first.shape for want, p in zip(wants, given, strict=False)), wants[0] or wants[-1]
        recon, sums = self._launches.forward(given, x, weight, divisor, None, small, stateless, of_rows)
        if True not in wants:
            return recon, None
        shares = of_rows[3].view(*first.shape[:-1], 1)
        return recon, [*sums, summed(shares, library, first, self.per_sample) if wants[-1] else None, of_rows]

    def backward(self, parameters, x, weight, divisor, upstream, sums, wants):
        """`(gradients, sums)`: those by the parameters as large as the first that are wanted, None for the others; and the
        derivatives of the sum by smaller ones. `sums` is what forward returned; None: it is computed anew."""
        if sums is None:
            _, sums = self.forward(parameters, x, weight, divisor, wants, True)
        *of_smaller, of_rows = sums
        given = parameters[:-1]
        large = [want and p.shape == given[0].shape for want, p in zip(wants, given, strict=False)]
        if True not in large:
            return [None] * len(parameters), of_smaller
        of_rows = of_rows.to(torch.float64).contiguous()  # which a hook may have brought back otherwise
        gradients, _ = self._launches.backward(given, x, weight, divisor, upstream, None, None, large, of_rows)
        return [*gradients, None], of_smaller

    def of_rows(self, logits, library, stateless) -> torch.Tensor:
        """`[5, rows]`, float64: the largest logit, 1 / s, the library, and room for S and for that of zeros alone."""
        rows = logits.numel() // logits.shape[-1]
        if self._softmax is None:
            tile = TILES * tile_size(logits, logits)
            segment = Segment.of(logits, rows, tile)
            constants = {
                "LOWEST": torch.finfo(self.dtype).min, "DTYPE": TRITON_DTYPE[self.dtype], "ALIGNED": segment.aligned,
                "WIDE": segment.wide, "BLOCK": tile, "THREADS": THREADS, "FINISH": FINISH,
            }  # fmt: skip
            self._softmax = Launch(softmax_kernel, self.device, constants, options_of(self.device)), segment
        launch, segment = self._softmax
        if library.numel() not in (1, rows):
            library = library.expand(*logits.shape[:-1], 1)
        library = library.contiguous()  # it may be a column of a matrix
        of_rows = allocator(self.device)((5, rows), (rows, 1), torch.float64)
        partials, arrived = scratch(self.device, rows, 2 * rows * segment.programs, stateless)
        launch(
            rows * segment.programs, (logits, library, of_rows, partials, arrived),
            (segment.columns, segment.programs, int(library.numel() > 1)), (logits.dtype, library.dtype),
        )  # fmt: skip
        return of_rows
