"""The reconstruction of likelihoods with several parameters, and under weights: value and all gradients in one launch.

The first parameter and the target are streamed, as in `loss.py`. A second and third parameter and the weights may be tensors as
large, or smaller ones that broadcast: these are read by index, from cache, and never expanded in memory. A backward pass is the
same kernel: it leaves at once where the factor that forward used was the right one.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import likelihoods
from .broadcast import ABSENT, BROADCAST, ELEMENT, ROW, Operand
from .direct import Launch, lies
from .launch import FINISH, THREADS, TRITON_DTYPE, Segment, options_of, tile_size
from .links import LINKS, of_softmax
from .operands import is_wrong, row_bounds, scalar
from .prepared import Like, Prepared, number_kinds
from .reduction import arrive_last, fold, ordered_sum
from .terms import reconstruction_tile


@triton.jit(do_not_specialize=["columns", "programs", "share", "second_inner", "second_groups", "third_inner", "third_groups",
    "weight_apart", "weight_inner", "weight_groups"])  # fmt: skip
def reconstruction_kernel(
    first, second, third, target, weight, grad_first, grad_second, grad_third, factor, used, seen, partials, arrived, of_rows,
    recon_out, second_out, third_out, divisor, divisor_value: tl.float64, soft_min: tl.float64, target_scale: tl.float64,
    constant: tl.float64,
    columns: tl.int64, programs: tl.int32, share: tl.int32,
    second_inner: tl.int64, second_groups: tl.int64, third_inner: tl.int64, third_groups: tl.int64,
    weight_apart: tl.int64, weight_inner: tl.int64, weight_groups: tl.int64,
    LIKELIHOOD: tl.constexpr, FIRST_LINK: tl.constexpr, SECOND_LINK: tl.constexpr, SPREAD: tl.constexpr, SOFT: tl.constexpr,
    SECOND: tl.constexpr, THIRD: tl.constexpr, WEIGHT: tl.constexpr, SECOND_WHOLE: tl.constexpr, THIRD_WHOLE: tl.constexpr,
    SHIFT: tl.constexpr, APART: tl.constexpr, SUMS_LIBRARY: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """A `target` of None is 0 everywhere. Its sums are in float64, since what is no zero is taken out of them again."""
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    floor = None
    if SOFT:
        floor = scalar(None, soft_min, DTYPE)
    if not APART:
        weight_apart = None
    by = tl.full([], 1.0, DTYPE)
    wrong = is_wrong(factor, used, seen, row // share, worker + row % share, DTYPE)
    if wrong:
        if factor is not None:
            by *= tl.load(factor + row // share).to(DTYPE)
        if not SUMS_LIBRARY:  # the derivative by the library is of the sum
            by /= scalar(divisor, divisor_value, DTYPE)
        top, inverse, library, log_library, slope = None, None, None, None, None
        if of_rows is not None:
            top, inverse, library, log_library, slope = of_softmax(of_rows, row, programs, grad_first is not None, DTYPE)
        ts, extra = scalar(None, target_scale, DTYPE), scalar(None, constant, DTYPE)
        base, end = row_bounds(row, columns, ALIGNED, WIDE)
        sums = tl.zeros([THREADS], dtype=tl.float64 if target is None else DTYPE)
        seconds = tl.zeros([THREADS], dtype=DTYPE)
        thirds = tl.zeros([THREADS], dtype=DTYPE)
        libraries = tl.zeros([THREADS], dtype=sums.dtype)
        for start in tl.range(worker * BLOCK, end, programs * BLOCK):
            o = start + tl.arange(0, BLOCK)
            tiles = reconstruction_tile(
                first, second, third, target, weight, grad_first, grad_second, grad_third, base + o, base + o, o < end,
                base, by, top, inverse, library, log_library, slope,
                second_inner, second_groups, third_inner, third_groups, weight_apart, weight_inner, weight_groups,
                floor, ts, extra,
                LIKELIHOOD, None, FIRST_LINK, SECOND_LINK, SPREAD, SECOND, THIRD, WEIGHT, SECOND_WHOLE, THIRD_WHOLE, SHIFT,
                second_out is not None, third_out is not None, SUMS_LIBRARY, WIDE, DTYPE,
            )  # fmt: skip
            if recon_out is not None:
                sums += fold(tiles[0].to(sums.dtype), BLOCK, THREADS)
            if second_out is not None:
                seconds += fold(tiles[1], BLOCK, THREADS)
            if third_out is not None:
                thirds += fold(tiles[2], BLOCK, THREADS)
            if SUMS_LIBRARY:
                libraries += fold(tiles[3].to(sums.dtype), BLOCK, THREADS)
        if ALIGNED:
            if worker == 0:
                o = end + tl.arange(0, THREADS)  # more than are left, to fit the sums
                tiles = reconstruction_tile(
                    first, second, third, target, weight, grad_first, grad_second, grad_third, base + o, base + o, o < columns,
                    base, by, top, inverse, library, log_library, slope,
                    second_inner, second_groups, third_inner, third_groups, weight_apart, weight_inner, weight_groups,
                    floor, ts, extra,
                    LIKELIHOOD, None, FIRST_LINK, SECOND_LINK, SPREAD, SECOND, THIRD, WEIGHT, SECOND_WHOLE, THIRD_WHOLE, SHIFT,
                    second_out is not None, third_out is not None, SUMS_LIBRARY, WIDE, DTYPE,
                )  # fmt: skip
                sums += tiles[0]
                if second_out is not None:
                    seconds += tiles[1]
                if third_out is not None:
                    thirds += tiles[2]
                if SUMS_LIBRARY:
                    libraries += tiles[3]
        if recon_out is not None:
            # A row's partial sums of each kind lie together, behind those of the kind before.
            if second_out is not None:
                tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(seconds.to(tl.float64)))
            if third_out is not None:
                tl.store(partials + 2 * tl.num_programs(0) + tl.program_id(0), tl.sum(thirds.to(tl.float64)))
            if SUMS_LIBRARY:
                tl.store(partials + 3 * tl.num_programs(0) + tl.program_id(0), tl.sum(libraries.to(tl.float64)))
            if arrive_last(partials, arrived, row, programs, tl.sum(sums.to(tl.float64))):
                mine = partials + row * programs
                total = ordered_sum(mine, programs, FINISH) / scalar(divisor, divisor_value, tl.float64)
                tl.store(recon_out + row, total.to(recon_out.dtype.element_ty))
                if second_out is not None:
                    total = ordered_sum(mine + tl.num_programs(0), programs, FINISH)
                    tl.store(second_out + row, total.to(DTYPE))
                if third_out is not None:
                    total = ordered_sum(mine + 2 * tl.num_programs(0), programs, FINISH)
                    tl.store(third_out + row, total.to(DTYPE))
                if SUMS_LIBRARY:
                    total = ordered_sum(mine + 3 * tl.num_programs(0), programs, FINISH)
                    place = 4 if target is None else 3  # of zeros, beside that of all, or of all
                    tl.store(of_rows + place * (tl.num_programs(0) // programs) + row, total)


class Family(NamedTuple):
    """What a likelihood is to the kernel, beside its tensors."""

    likelihood: str  # the name of its device function
    at_zero: str | None = None  # and of that for a target of 0, by which targets are sparse
    links: tuple[str | None, str | None] = None, None  # of the first and of the second parameter, see `links.LINKS`
    soft_min: float | None = None  # the soft lower bound of the scale's logarithm
    constant: float = 0.0
    target_scale: float = 1.0  # the target is multiplied by it
    target_shift: float = 0.0  # and this is added then


# What the kernel is given, and where it puts what it finds for each of three parameters.
TAKES = "first", "second", "third", "weight", "target", "divisor", "of_rows", "factor"
GRADIENTS = "grad_first", "grad_second", "grad_third"
SUMS = "", "second_out", "third_out"

# A row of fewer elements is not worth programs of its own.
LEAST_COLUMNS = 512


class Pass:
    """A launch of the kernel for tensors of one kind: how it reads its operands, the rows that it sees, and its constants."""

    __slots__ = (
        "_backwards", "_forwards", "gives", "launch", "lays", "like", "makes", "operands", "order", "programs", "recon", "rows",
        "seen", "smaller", "sums_library", "values",
    )  # fmt: skip

    def __init__(self, parameters, x, weight, wants, family: Family, per_sample, dtype) -> None:
        first = parameters[0]
        self.like = lies(first)
        self.order = order = tuple(sorted(range(first.dim()), key=lambda d: (-first.stride(d), d)))
        given = *parameters[1:], *[None] * (3 - len(parameters)), weight
        second, third, weight = (Operand.of(t, first, order, most) for t, most in zip(given, (1, 1, 2), strict=True))
        rows, by_softmax = first.shape[0] if per_sample else 1, family.links[0] == "softmax"
        self.sums_library = by_softmax and bool(wants) and wants[-1]  # which comes behind the parameters in memory
        if by_softmax:
            rows = first.numel() // first.shape[-1]
        # Where a parameter to differentiate by has long stretches in common, these are rows, and the kernel adds them up.
        for wanted, operand in zip(wants[1:], (second, third), strict=False):
            if (
                wanted
                and not by_softmax
                and x is not None
                and operand.mode == BROADCAST
                and LEAST_COLUMNS <= operand.inner < first.numel() // max(rows, 1)
            ):
                rows = first.numel() // operand.inner
        columns = first.numel() // max(rows, 1)
        self.rows, self.operands = rows, tuple(operand.read_by(columns) for operand in (second, third, weight))
        self.lays = any(operand.laid(t, first) is not t for operand, t in zip(self.operands, given, strict=True))
        second, third, weight = self.operands
        streamed = [t for t, operand in zip(given, self.operands, strict=True) if operand.mode == ELEMENT]
        tile = min(tile_size(first, t) for t in (first if x is None else x, *streamed))
        if third.mode != ABSENT:
            tile //= 2  # registers would be spilled otherwise
        segment = Segment.of(first, rows, tile)
        self.programs = rows * segment.programs
        samples = first.shape[0] if per_sample else 1
        self.values = {
            "soft_min": family.soft_min or 0.0, "target_scale": family.target_scale, "constant": family.constant,
            "columns": segment.columns, "programs": segment.programs, "share": rows // max(samples, 1),
            "second_inner": second.inner, "second_groups": second.groups, "third_inner": third.inner,
            "third_groups": third.groups, "weight_apart": weight.apart, "weight_inner": weight.inner,
            "weight_groups": weight.groups,
        }  # fmt: skip
        of_first, of_second = map(LINKS.__getitem__, family.links)
        # Likelihoods take a scale as a scalar, from which one comes, and all else as a tile.
        spread = second.mode == ROW and family.links[1] in (None, "log")
        constants = {
            "LIKELIHOOD": getattr(likelihoods, family.likelihood), "FIRST_LINK": of_first, "SECOND_LINK": of_second,
            "SPREAD": spread, "SOFT": family.soft_min is not None, "SECOND": second.mode, "THIRD": third.mode,
            "WEIGHT": weight.mode, "SECOND_WHOLE": second.whole, "THIRD_WHOLE": third.whole, "SHIFT": family.target_shift,
            "APART": weight.apart != 0, "SUMS_LIBRARY": self.sums_library, "DTYPE": TRITON_DTYPE[dtype],
            "ALIGNED": segment.aligned, "WIDE": segment.wide, "BLOCK": tile, "THREADS": THREADS, "FINISH": FINISH,
        }  # fmt: skip
        # What is made: shape, strides and dtype. Smaller parameters have the whole sum, that of each row, or a derivative for
        # each element: of these, the place, whether it is the whole one, and whether it is of rows.
        shape = (rows,) if per_sample or rows > 1 else ()
        self.recon = shape, (1,) * len(shape), torch.float64 if x is None else dtype
        self.seen = (samples,), (1,), dtype
        self.makes: dict[str, Like] = {}
        self.gives: list[str | None] = [None] * 3
        self.smaller = []
        for i, parameter in enumerate(parameters):
            if not wants or not wants[i]:
                continue
            name, like = GRADIENTS[i], (*self.like, parameter.dtype)
            if i and parameter.shape != first.shape:
                is_whole = rows == parameter.numel() == 1 and not per_sample and x is not None
                of_rows = x is not None and (is_whole or self.operands[i - 1].mode == ROW)  # else nonzeros come on top
                shape = (1,) * parameter.dim() if is_whole else (rows,)
                name, like = (SUMS[i], (shape, (1,) * len(shape), dtype)) if of_rows else (name, (*self.like, dtype))
                self.smaller.append((i, is_whole, of_rows))
            self.gives[i], self.makes[name] = name, like
        self.launch = Launch(reconstruction_kernel, first.device, constants, options_of(first.device))
        self._forwards: dict[Hashable, Prepared] = {}  # by kind
        self._backwards: dict[Hashable, Prepared] = {}

    def laid(self, parameters, weight):
        """Three parameters and the weight as the kernel reads them."""
        first, second, third = (*parameters, None, None)[:3]
        given = second, third, weight
        if self.lays:
            given = [operand.laid(t, first) for operand, t in zip(self.operands, given, strict=True)]
        return first, *given

    def forward(self, parameters, x, weight, divisor, guess, stateless=False, of_rows=None):
        """The sum over the divisor, and of each of three parameters what is made for it; `of_rows`: see `softmax.py`."""
        given = *self.laid(parameters, weight), x, divisor, of_rows, guess
        kind: Hashable = guess if guess is None else guess.dtype
        if isinstance(divisor, torch.Tensor):
            kind = kind, divisor.dtype
        prepared = self._forwards.get(kind)
        if prepared is None:
            prepared = self._forwards[kind] = Prepared(
                self.launch, kind, self.programs, takes=dict(zip(TAKES, given, strict=True)),
                makes={"recon_out": self.recon} | self.makes, values=self.values, gives=("recon_out", *self.gives),
                rows=self.rows, sums=4 * self.programs,
            )  # fmt: skip
        return prepared.by_parts(*given, stateless=True) if stateless else prepared.run(*given)

    def backward(self, parameters, x, weight, divisor, upstream, gradients, used, wants, of_rows=None):
        """Of each of three parameters the gradient or None, and `seen`: see `Reconstruction.backward`."""
        wants = tuple(wants) if used is None else tuple([g is not None for g in gradients])
        stored = (None, None, None) if used is None else (*gradients, None, None)[:3]
        given = *self.laid(parameters, weight), x, divisor, of_rows, upstream, used, *stored
        kind = wants, upstream.dtype, used if used is None else used.dtype, *number_kinds(divisor)
        prepared = self._backwards.get(kind)
        if prepared is None:
            first, makes = parameters[0], {"seen": self.seen}
            large = [wanted and p.shape == first.shape for p, wanted in zip(parameters, wants, strict=False)]
            gives = [name if at else None for name, at in zip(GRADIENTS, (*large, False, False), strict=False)]
            if used is None:
                makes |= {name: (*self.like, p.dtype) for name, p in zip(gives, parameters, strict=False) if name}
            prepared = self._backwards[kind] = Prepared(
                self.launch, kind, self.programs, takes=dict(zip((*TAKES, "used", *GRADIENTS), given, strict=True)),
                makes=makes, values=self.values, gives=(*gives, "seen"),
            )  # fmt: skip
        return prepared.run(*given)

    def spread(self, sums: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`[rows]` as a tensor of the dimensions of `like`, which broadcasts to it."""
        shape, left = [1] * like.dim(), self.rows
        for i, d in enumerate(self.order):
            if left == 1:
                break
            shape[i] = like.shape[d]
            left //= like.shape[d]
        inverse = sorted(range(like.dim()), key=self.order.__getitem__)
        return sums.view(shape).permute(inverse)


class Reconstruction:
    """The launches of the reconstruction for tensors of one kind, with all that follows from shapes and options.

    `parameters[0]` and `x` have one shape and dense layout; the others and `weight` broadcast to it.
    """

    __slots__ = "_kind", "_passes", "device"

    kind_of_pass = Pass

    def __init__(self, *, family: Family, per_sample, dtype, device) -> None:
        self._kind, self.device = (family, per_sample, dtype), device
        self._passes: dict[tuple, Pass] = {}  # by which gradients are wanted

    def _pass(self, parameters, x, weight, wants) -> Pass:
        made = self._passes[wants] = self.kind_of_pass(parameters, x, weight, wants, *self._kind)
        return made

    def forward(self, parameters, x, weight, divisor, guess, wants, stateless=False, of_rows=None):
        """The weighted negative log-likelihood, added up and over `divisor`; its derivatives by the `parameters` in `wants`, a
        tuple.

        `guess`, `[B]` or `[1]`, is the upstream factor to store gradients with, None where no gradient of a large parameter is
        wanted.

        Returns `(recon, gradients)`: `[]` or `[B]`; for each parameter None, or its gradient times `guess` if it is as large as
        `x`; of smaller ones the derivative of the sum, neither times a factor nor over the divisor, each sample's own if
        `per_sample`.
        """
        first, (_, per_sample, dtype) = parameters[0], self._kind
        launch = self._passes.get(wants) or self._pass(parameters, x, weight, wants)
        recon, *gradients = launch.forward(parameters, x, weight, divisor, guess, stateless, of_rows)
        for i, is_whole, is_of_rows in launch.smaller:
            if not is_whole:
                found = launch.spread(gradients[i], first) if is_of_rows else gradients[i]
                gradients[i] = summed(found, parameters[i], first, per_sample)
        batch = first.shape[0] if per_sample else 1
        if launch.rows != batch:  # no view is handed out
            recon = recon.view(batch, -1).sum(1 if per_sample else None, dtype=torch.float64).to(dtype)
        return recon, gradients[: len(parameters)]

    def backward(self, parameters, x, weight, divisor, upstream, gradients, used, wants, of_rows=None):
        """Gradients by the large parameters that are wanted: `gradients` as forward stored them with the factor `used`,
        corrected where they lie if `upstream` is another; new ones if there is none that was `used`.

        Returns `(gradients, seen)`, `seen` a copy of the factor, `[B]` or `[1]`.
        """
        launch = self._passes.get(()) or self._pass(parameters, x, weight, ())
        *found, seen = launch.backward(parameters, x, weight, divisor, upstream.contiguous(), gradients, used, wants, of_rows)
        return found[: len(parameters)], seen


def summed(full: torch.Tensor, parameter: torch.Tensor, first: torch.Tensor, per_sample: bool) -> torch.Tensor:
    """What broadcasts to `first`, added up to the shape of `parameter`, or to that for each sample."""
    shape = [1] * (first.dim() - parameter.dim()) + list(parameter.shape)
    if per_sample:
        shape[0] = first.shape[0]
    return full.sum_to_size(shape)
