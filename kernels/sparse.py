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
from .links import LINKS, of_softmax
from .operands import is_wrong, scalar
from .reconstruction import Family, Pass, Reconstruction
from .reduction import arrive_last, ordered_sum
from .terms import reconstruction_tile


@triton.jit(do_not_specialize=["width", "programs", "second_inner", "second_groups", "third_inner", "third_groups",
    "weight_apart", "weight_inner", "weight_groups"])  # fmt: skip
def nonzeros_kernel(
    first, second, third, starts, columns, values, weight, grad_first, grad_second, grad_third, factor, used, seen, partials,
    arrived, of_rows, zeros, recon_out, divisor, divisor_value: tl.float64, target_scale: tl.float64, constant: tl.float64,
    width: tl.int64, programs: tl.int32,
    second_inner: tl.int64, second_groups: tl.int64, third_inner: tl.int64, third_groups: tl.int64,
    weight_apart: tl.int64, weight_inner: tl.int64, weight_groups: tl.int64,
    LIKELIHOOD: tl.constexpr, AT_ZERO: tl.constexpr, FIRST_LINK: tl.constexpr, SECOND_LINK: tl.constexpr, SECOND: tl.constexpr,
    THIRD: tl.constexpr, WEIGHT: tl.constexpr, SECOND_WHOLE: tl.constexpr, THIRD_WHOLE: tl.constexpr, APART: tl.constexpr,
    PER_SAMPLE: tl.constexpr, SUMS_LIBRARY: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """`zeros`: the sums of zeros, float64 and over the divisor, to which those of nonzeros are added; in `of_rows` are the
    derivatives by libraries likewise."""
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    if PER_SAMPLE:
        sample, number = row, worker
    else:
        sample, number = 0, tl.program_id(0)
    if PER_SAMPLE or of_rows is not None:
        place, count = row, programs
    else:
        place, count = 0, tl.num_programs(0)
    if not APART:
        weight_apart = None
    by = tl.full([], 1.0, DTYPE)
    wrong = is_wrong(factor, used, seen, sample, number, DTYPE)
    if wrong:
        if factor is not None:
            by *= tl.load(factor + sample).to(DTYPE)
        if not SUMS_LIBRARY:
            by /= scalar(divisor, divisor_value, DTYPE)
        top, inverse, library, log_library, slope = None, None, None, None, None
        if of_rows is not None:
            top, inverse, library, log_library, slope = of_softmax(of_rows, row, programs, grad_first is not None, DTYPE)
        ts, extra = scalar(None, target_scale, DTYPE), scalar(None, constant, DTYPE)
        begin, end = tl.load(starts + row).to(tl.int64), tl.load(starts + row + 1).to(tl.int64)
        base = row.to(tl.int64) * width
        sums = tl.zeros([BLOCK], dtype=tl.float64)
        libraries = sums
        for start in tl.range(begin + worker * BLOCK, end, programs * BLOCK):
            k = start + tl.arange(0, BLOCK)
            mask = k < end
            o = base + tl.load(columns + k, mask=mask, other=0).to(tl.int64)
            if not WIDE:
                o = o.to(tl.int32)
            tiles = reconstruction_tile(
                first, second, third, values, weight, grad_first, grad_second, grad_third, o, k, mask, base, by,
                top, inverse, library, log_library, slope,
                second_inner, second_groups, third_inner, third_groups, weight_apart, weight_inner, weight_groups,
                None, ts, extra,
                LIKELIHOOD, AT_ZERO, FIRST_LINK, SECOND_LINK, False, SECOND, THIRD, WEIGHT, SECOND_WHOLE, THIRD_WHOLE, 0.0,
                False, False, SUMS_LIBRARY, WIDE, DTYPE,
            )  # fmt: skip
            if recon_out is not None:
                sums += tiles[0]
            if SUMS_LIBRARY:
                libraries += tiles[3]
        if recon_out is not None:
            if SUMS_LIBRARY:
                tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(libraries))
            if arrive_last(partials, arrived, place, count, tl.sum(sums)):
                total = ordered_sum(partials + place * programs, count, FINISH)
                total = tl.load(zeros + place) + total / scalar(divisor, divisor_value, tl.float64)
                tl.store(recon_out + place, total.to(DTYPE))
                if SUMS_LIBRARY:
                    rows = tl.num_programs(0) // programs
                    total = ordered_sum(partials + tl.num_programs(0) + row * programs, programs, FINISH)
                    tl.store(of_rows + 3 * rows + row, tl.load(of_rows + 4 * rows + row) + total)


class NonzerosPass(Pass):
    """Both launches for tensors of one kind."""

    __slots__ = "dtype", "gathered", "of_nonzeros", "per_sample", "places"

    def __init__(self, parameters, x, weight, wants, family: Family, per_sample, dtype) -> None:
        super().__init__(parameters, None, weight, wants, family._replace(likelihood=family.at_zero), per_sample, dtype)
        first, device, self.per_sample, self.dtype = parameters[0], parameters[0].device, per_sample, dtype
        given = *parameters[1:], *[None] * (3 - len(parameters)), weight
        self.gathered = second, third, weight = tuple(
            Operand.of(t, first, self.order, most) for t, most in zip(given, (1, 1, 2), strict=True)
        )
        self.places = second.inner, second.groups, third.inner, third.groups, weight.apart, weight.inner, weight.groups
        of_first, of_second = map(LINKS.__getitem__, family.links)
        constants = {
            "LIKELIHOOD": getattr(likelihoods, family.likelihood), "AT_ZERO": getattr(likelihoods, family.at_zero),
            "FIRST_LINK": of_first, "SECOND_LINK": of_second, "SECOND": second.mode, "THIRD": third.mode, "WEIGHT": weight.mode,
            "SECOND_WHOLE": second.whole, "THIRD_WHOLE": third.whole, "APART": weight.apart != 0, "PER_SAMPLE": per_sample,
            "SUMS_LIBRARY": self.sums_library, "DTYPE": TRITON_DTYPE[dtype], "WIDE": first.numel() >= 2**31, "BLOCK": BLOCK,
            "FINISH": FINISH,
        }  # fmt: skip
        self.of_nonzeros = Launch(nonzeros_kernel, device, constants, options_of(device))

    def forward(self, parameters, x, weight, divisor, guess, stateless=False, of_rows=None):
        zeros, *gradients = super().forward(parameters, None, weight, divisor, guess, stateless, of_rows)
        recon = allocator(zeros.device)(*self.recon[:2], self.dtype)
        self.nonzeros(parameters, x, weight, divisor, guess, None, None, gradients, zeros, recon, stateless, of_rows)
        return recon, *gradients

    def backward(self, parameters, x, weight, divisor, upstream, gradients, used, wants, of_rows=None):
        *found, seen = super().backward(parameters, None, weight, divisor, upstream, gradients, used, wants, of_rows)
        self.nonzeros(parameters, x, weight, divisor, upstream, used, seen, found, None, None, False, of_rows)
        return *found, seen

    def nonzeros(
        self, parameters, x, weight, divisor, factor, used, seen, gradients, zeros, recon, stateless, of_rows
    ) -> None:  # fmt: skip
        """The second launch: `zeros`, of the first, and `recon`, None in backward."""
        first, (starts, columns, values) = parameters[0], x
        batch, width = first.shape
        each = max(1, min(triton.cdiv(values.numel(), batch * BLOCK), resident_programs(first.device) // batch))
        partials = arrived = None
        if recon is not None:
            partials, arrived = scratch(first.device, self.rows, 2 * batch * each, stateless)
        given = *parameters[1:], *[None] * (3 - len(parameters)), weight
        second, third, weight = (operand.laid(t, first) for operand, t in zip(self.gathered, given, strict=True))
        pointer, value = pointer_and_value(divisor)
        self.of_nonzeros(
            batch * each,
            (first, second, third, starts, columns, values, weight, *gradients, factor, used, seen, partials, arrived, of_rows,
             zeros, recon, pointer),
            (value, self.values["target_scale"], self.values["constant"], width, each, *self.places),
        )  # fmt: skip


# Nonzeros of a program at a time.
BLOCK = 2048 if INTERPRETED else 256


class SparseReconstruction(Reconstruction):
    """The launches of the reconstruction of a sparse target for tensors of one kind: as those of `Reconstruction`, but that `x`
    is the three tensors of CSR: where rows start, columns, values. `parameters[0]` is contiguous, `[B, G]`, and the family has
    a device function for a target of 0.
    """

    __slots__ = ()

    kind_of_pass = NonzerosPass
