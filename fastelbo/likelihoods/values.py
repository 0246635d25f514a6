"""Checks of values, on a CPU: where looking costs no sync, and traced calls have none.

A target or parameter outside of where its likelihood has it raises, but not what has the weight 0, or is an ignored label.
NaN passes, and becomes a loss of NaN. To cost nothing where all is well, this looks where the loss is NaN or infinite already,
which is what a value outside makes of it; a target that would not (`Range.silent`) is looked at every time.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..basics.warnings import stacklevel_of_user


class Range(NamedTuple):
    """Where numbers must lie: from `low` to `high`."""

    words: str  # "x must ..."
    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False  # `low` itself is outside
    silent: bool = False  # a target outside may leave the loss finite
    integers: bool = False  # it is one of integer targets alone
    unscaled: bool = False  # it is one of targets before `target_scale`, which does not apply
    but: int | None = None  # a target that may lie outside
    signed: bool = False  # it is [-1, 1], where a target in [0, 1], or bytes that are none, may be meant otherwise

    def holds(self, value: float) -> bool:
        """Whether a parameter may be this number."""
        return self.low <= value <= self.high and not (self.is_open and value == self.low)


UNIT = Range("lie in [0, 1]", 0, 1, silent=True)
# As Torch does, logits go with any floating target; bytes above 1 are images that were not scaled.
BITS = UNIT._replace(integers=True)
NONNEGATIVE = Range("not be negative", 0)
POSITIVE = Range("be positive", 0, is_open=True)


def support_to_check(likelihood, first: Tensor, x: Tensor) -> Range | None:
    """Where the target must lie, if it is one that is looked at."""
    support = likelihood.support(first, x)
    return None if support is not None and support.integers and x.is_floating_point() else support


def silent_range(support: Range | None, factor: float, x: Tensor) -> tuple[float, float] | None:
    """Where a target has to lie, whose loss may be finite outside, before it is multiplied by `factor`; None: anywhere. Nothing
    lies in an empty one, for which `check_values` has to look closely."""
    if support is not None and support.signed:  # it warns of a target that lies inside
        return math.inf, -math.inf
    if support is None or not support.silent or x.dtype == torch.bool or x.numel() == 0:
        return None
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64) or not factor > 0 or x.requires_grad:
        return math.inf, -math.inf
    factor = 1.0 if support.unscaled else factor
    return support.low / factor, support.high / factor


def is_well(silent: tuple[float, float] | None, x: Tensor, recon: Tensor) -> bool:
    """Whether `check_values` has nothing to look for."""
    if not math.isfinite((recon.sum() if recon.dim() else recon).item()):
        return False
    if silent is None:
        return True
    low, high = silent
    if high == math.inf:
        return torch.amin(x).item() >= low
    if high < low:
        return False
    lowest, highest = torch.aminmax(x)
    return lowest.item() >= low and highest.item() <= high


def check_values(plan, name: str, tensors: Sequence[Tensor], recon: Tensor) -> None:
    """Raise for a value that made the reconstruction NaN or infinite, or finite and meaningless.

    `plan` has the `likelihood` and the `support` that is looked at; the tensors are its parameters, of which errors speak as
    `name`, x and, with `weight_shape`, a weight.
    """
    support, likelihood = plan.support, plan.likelihood
    parameters, x, *others = tensors[: plan.count], *tensors[plan.count :]
    factor = 1.0 if support is None or support.unscaled else likelihood.target_scale
    if support is not None and support.signed:
        _warn_of_unit_interval(likelihood.name, x, factor)
    if math.isfinite((recon.sum() if recon.dim() else recon).item()):
        if support is None or not support.silent or x.dtype == torch.bool or x.numel() == 0:
            return
        # A NaN hides the others, and may have the weight 0.
        low, high = _bounds(x, factor)
        if low >= support.low and high <= support.high:
            return
    counts = None if plan.weight_shape is None else others[0].reshape(plan.weight_shape) != 0
    if counts is not None and counts.dim() < x.dim():
        counts = counts.unsqueeze(likelihood.dim)  # one for all classes or channels
    of = f"for the likelihood {likelihood.name!r}"
    if support is not None and (found := _span(support, x, factor, counts)):
        raise ValueError(f"x must {support.words} {of}, got values from {found}{_advice(support, x, *found, factor)}")
    for i, (value, allowed) in enumerate(zip(parameters, likelihood.ranges, strict=False)):
        if allowed is not None and (found := _span(allowed, value, 1.0, counts)):
            label = name if len(parameters) == 1 else f"{name}[{i}]"
            advice = f"; for logits use likelihood={likelihood.name + '_logits'!r}" if allowed is UNIT else ""
            raise ValueError(f"{label} must {allowed.words} {of}, got values from {found}{advice}")


class Span(NamedTuple):
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


def _bounds(x: Tensor, factor: float) -> tuple[float, float]:
    """The lowest and the highest of a target, in one pass; NaN if one is."""
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which have no minimum in Torch
        x = x.double()
    lowest, highest = torch.aminmax(x.detach())
    low, high = lowest.item() * factor, highest.item() * factor
    return (low, high) if factor >= 0 else (high, low)


def _span(allowed: Range, value: Tensor, factor: float, counts: Tensor | None) -> Span | None:
    """From where to where the values lie that count, if one of them is outside."""
    wide = value.detach().double() * factor
    outside = (wide < allowed.low) | (wide > allowed.high)
    if allowed.is_open:
        outside = outside | (wide == allowed.low)
    seen = ~wide.isnan() if allowed.but is None else wide != allowed.but
    if counts is not None:
        seen = seen & counts
    if not (outside & seen).any():
        return None
    return Span(*(v.item() for v in torch.aminmax(wide.expand_as(seen)[seen])))


def _advice(support: Range, x: Tensor, low: float, high: float, factor: float) -> str:
    """What to do about a target outside."""
    if factor != 1:
        return f" once multiplied by target_scale={factor:g}"
    integers = not x.is_floating_point()
    if support.high == 1:
        if low >= 0 and (integers or high > 2):
            return "; for 8-bit images give the likelihood target_scale=1/255"
        if low >= -1 and high <= 1:
            return "; for targets in [-1, 1] pass (x + 1) / 2, or take a likelihood of real numbers, such as 'gaussian'"
        return "; for others take a likelihood of real numbers, such as 'gaussian'"
    if support.signed and low >= 0:
        return "; for 8-bit images pass integers, or give the likelihood interval=(0, 255)"
    return ""


MANY = 64  # fewer targets may lie in [0, 1] by chance
_warned = False


def _warn_of_unit_interval(likelihood: str, x: Tensor, factor: float) -> None:
    """Once, of a target in [0, 1] where one in [-1, 1] is meant: its loss is finite, and another one.

    Where all is well it costs a look at the first datum, which tells.
    """
    global _warned
    if _warned or x.numel() < MANY or not (x[0].detach() * factor).min() >= 0:
        return
    low, high = _bounds(x, factor)
    if not (low >= 0 and high <= 1):
        return
    _warned = True
    warnings.warn(
        f"all of x lies in [0, 1], where the likelihood {likelihood!r} has targets in [-1, 1]: give it"
        " interval=(0, 1), or pass integers as levels (this is said once)",
        stacklevel=stacklevel_of_user(),
    )
