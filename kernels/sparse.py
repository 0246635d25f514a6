"""The reconstruction of a sparse target: what all would be as zeros, and then what the nonzeros are instead.

The first launch is that of `reconstruction.py` without a target: it streams the parameters and writes the gradients. In the
second, the programs of a row gather the parameters at its nonzeros, take what these were as zeros out of the sum again, and
write their gradients over the others. A place has one nonzero at most, so that no two write to one. Derivatives by parameters
that are smaller than the first are written for each element, and added up when both are done.
"""

import triton
import triton.language as tl

from . import likelihoods
from .broadcast import Operand
from .direct import INTERPRETED, Launch, allocator
from .launch import FINISH, TRITON_DTYPE, options_of, pointer_and_value, resident_programs, scratch
from .links import LINKS
from .operands import is_wrong, scalar
from .reconstruction import Family, Pass, reconstruction_tile, summed
from .reduction import arrive_last, ordered_sum


@triton.jit(do_not_specialize=["width", "programs", "second_inner", "second_groups", "third_inner", "third_groups",
    "weight_apart", "weight_inner", "weight_groups"])  # fmt: skip
def nonzeros_kernel(
    first, second, third, starts, columns, values, weight, grad_first, grad_second, grad_third, factor, used, seen, partials,
    arrived, zeros, recon_out, divisor, divisor_value: tl.float64, target_scale: tl.float64, constant: tl.float64,
    width: tl.int64, programs: tl.int32,
    second_inner: tl.int64, second_groups: tl.int64, third_inner: tl.int64, third_groups: tl.int64,
    weight_apart: tl.int64, weight_inner: tl.int64, weight_groups: tl.int64,
    LIKELIHOOD: tl.constexpr, AT_ZERO: tl.constexpr, FIRST_LINK: tl.constexpr, SECOND_LINK: tl.constexpr, SECOND: tl.constexpr,
    THIRD: tl.constexpr, WEIGHT: tl.constexpr, SECOND_WHOLE: tl.constexpr, THIRD_WHOLE: tl.constexpr, APART: tl.constexpr,
    PER_SAMPLE: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """`zeros`: the sums of zeros, float64 and over the divisor, to which those of nonzeros are added."""
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    if PER_SAMPLE:
        place, number, count = row, worker, programs
    else:
        place, number, count = 0, tl.program_id(0), tl.num_programs(0)
    if not APART:
        weight_apart = None
    by = tl.full([], 1.0, DTYPE)
    wrong = is_wrong(factor, used, seen, place, number, DTYPE)
    if wrong:
        if factor is not None:
            by *= tl.load(factor + place).to(DTYPE)
        by /= scalar(divisor, divisor_value, DTYPE)
        ts, extra = scalar(None, target_scale, DTYPE), scalar(None, constant, DTYPE)
        begin, end = tl.load(starts + row).to(tl.int64), tl.load(starts + row + 1).to(tl.int64)
        base = row.to(tl.int64) * width
        sums = tl.zeros([BLOCK], dtype=tl.float64)
        for start in tl.range(begin + worker * BLOCK, end, programs * BLOCK):
            k = start + tl.arange(0, BLOCK)
            mask = k < end
            o = base + tl.load(columns + k, mask=mask, other=0).to(tl.int64)
            if not WIDE:
                o = o.to(tl.int32)
            tiles = reconstruction_tile(
                first, second, third, values, weight, grad_first, grad_second, grad_third, o, k, mask, base, by,
                second_inner, second_groups, third_inner, third_groups, weight_apart, weight_inner, weight_groups,
                None, ts, extra,
                LIKELIHOOD, AT_ZERO, FIRST_LINK, SECOND_LINK, SECOND, THIRD, WEIGHT, SECOND_WHOLE, THIRD_WHOLE, 0.0,
                False, False, WIDE, DTYPE,
            )  # fmt: skip
            if recon_out is not None:
                sums += tiles[0]
        if recon_out is not None:
            if arrive_last(partials, arrived, place, count, tl.sum(sums)):
                total = ordered_sum(partials + place * programs, count, FINISH)
                total = tl.load(zeros + place) + total / scalar(divisor, divisor_value, tl.float64)
                tl.store(recon_out + place, total.to(DTYPE))


class NonzerosPass:
    """Both launches for tensors of one kind."""

    __slots__ = "constant", "launch", "numbers", "operands", "per_sample", "results", "target_scale", "zeros"

    def __init__(self, parameters, weight, wants, family: Family, at_zero: str, per_sample, dtype) -> None:
        first, device = parameters[0], parameters[0].device
        self.zeros = Pass(parameters, None, weight, wants, family._replace(likelihood=at_zero), per_sample, dtype)
        self.per_sample, self.target_scale, self.constant = per_sample, family.target_scale, family.constant
        given = *parameters[1:], *[None] * (3 - len(parameters)), weight
        self.operands = second, third, weight = tuple(
            Operand.of(t, first, self.zeros.order, most) for t, most in zip(given, (1, 1, 2), strict=True)
        )
        self.numbers = (
            second.inner, second.groups, third.inner, third.groups, weight.apart, weight.inner, weight.groups,
        )  # fmt: skip
        of_first, of_second = map(LINKS.__getitem__, family.links)
        constants = {
            "LIKELIHOOD": getattr(likelihoods, family.likelihood), "AT_ZERO": getattr(likelihoods, at_zero),
            "FIRST_LINK": of_first, "SECOND_LINK": of_second, "SECOND": second.mode, "THIRD": third.mode, "WEIGHT": weight.mode,
            "SECOND_WHOLE": second.whole, "THIRD_WHOLE": third.whole, "APART": weight.apart != 0, "PER_SAMPLE": per_sample,
            "DTYPE": TRITON_DTYPE[dtype], "WIDE": first.numel() >= 2**31, "BLOCK": BLOCK, "FINISH": FINISH,
        }  # fmt: skip
        self.launch = Launch(nonzeros_kernel, device, constants, options_of(device))

    def run(self, parameters, x, weight, divisor, factor, used, seen, gradients, zeros, recon, stateless=False) -> None:
        """`gradients`, three: where they go, or None; `zeros` and `recon`: where sums do, or None."""
        first, (starts, columns, values) = parameters[0], x
        self.zeros.run(parameters, None, weight, divisor, factor, used, seen, gradients, (zeros, None, None), stateless)
        batch, width = first.shape
        each = max(1, min(triton.cdiv(values.numel(), batch * BLOCK), resident_programs(first.device) // batch))
        partials = arrived = None
        if recon is not None:
            partials, arrived = scratch(first.device, batch if self.per_sample else 1, batch * each, stateless)
        given = *parameters[1:], *[None] * (3 - len(parameters)), weight
        second, third, weight = (operand.laid(t, first) for operand, t in zip(self.operands, given, strict=True))
        pointer, value = pointer_and_value(divisor)
        self.launch(
            batch * each,
            (first, second, third, starts, columns, values, weight, *gradients, factor, used, seen, partials, arrived, zeros,
             recon, pointer),
            (value, self.target_scale, self.constant, width, each, *self.numbers),
        )  # fmt: skip


# Nonzeros of a program at a time.
BLOCK = 2048 if INTERPRETED else 256


class SparseReconstruction:
    """The launches of the reconstruction of a sparse target for tensors of one kind: as those of `Reconstruction`, but that `x`
    is the three tensors of CSR: where rows start, columns, values. `parameters[0]` is contiguous, `[B, G]`.

    `at_zero` is the name of the device function for a target of 0.
    """

    __slots__ = "_kind", "_passes", "device"

    def __init__(self, *, family: Family, at_zero: str, per_sample, dtype, device) -> None:
        self._kind, self.device = (family, at_zero, per_sample, dtype), device
        self._passes: dict[tuple, NonzerosPass] = {}  # by which gradients are wanted

    def _pass(self, parameters, weight, wants) -> NonzerosPass:
        made = self._passes[wants] = NonzerosPass(parameters, weight, wants, *self._kind)
        return made

    def forward(self, parameters, x, weight, divisor, guess, wants, stateless=False):
        """See `Reconstruction.forward`."""
        first, (_, _, per_sample, dtype) = parameters[0], self._kind
        launch = self._passes.get(wants) or self._pass(parameters, weight, wants)
        gradients, empty = [None] * 3, allocator(self.device)
        for i, _, *kind in launch.zeros.results:
            gradients[i] = empty(*kind)
        shape, strides, wide = launch.zeros.recon
        zeros, recon = empty(shape, strides, wide), empty(shape, strides, dtype)
        launch.run(parameters, x, weight, divisor, guess, None, None, gradients, zeros, recon, stateless)
        found = [
            g if g is None or p.shape == first.shape else summed(g, p, first, per_sample)
            for g, p in zip(gradients, parameters, strict=False)
        ]
        return recon, found

    def backward(self, parameters, x, weight, divisor, upstream, gradients, used, wants):
        """See `Reconstruction.backward`."""
        first, (_, _, per_sample, dtype), empty = parameters[0], self._kind, allocator(self.device)
        launch = self._passes.get(()) or self._pass(parameters, weight, ())
        if used is None:
            large = [wanted and p.shape == first.shape for p, wanted in zip(parameters, wants, strict=True)]
            gradients = [empty(*launch.zeros.like, p.dtype) if at else None for p, at in zip(parameters, large, strict=True)]
        seen = empty((first.shape[0] if per_sample else 1,), (1,), dtype)
        padded = (*gradients, None, None)[:3]
        launch.run(parameters, x, weight, divisor, upstream.contiguous(), used, seen, padded, None, None)
        return gradients, seen
