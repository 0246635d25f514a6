"""Schedules of beta, or of a capacity or any other number, as functions of the training step.

    schedule = fastelbo.schedules.cyclical(period=2500)
    loss, recon, kl = fastelbo.loss(recon_x, x, mu, logvar, beta=schedule(step))

Under `torch.compile` or in a CUDA graph, keep the step in a tensor: `schedule(step)` then is a tensor too, computed where
the step lies, and neither compiles anew nor waits for the device. Or keep beta in a tensor, and between the steps
`beta.fill_(schedule(step))`.
"""

from dataclasses import dataclass
from math import cos, inf, pi

import torch
from torch import Tensor

from .basics.arguments import check_count, check_reals
from .basics.scalars import check_real

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """What `linear`, `cosine` and `cyclical` return: `schedule(step)`. Without state, compared by value, and good to pickle."""

    start: float
    stop: float
    rise: float  # steps from start to stop
    delay: float = 0
    period: float = inf
    cycles: float = inf
    shape: str = "linear"

    def __call__(self, step: float | Tensor) -> float | Tensor:
        """The value at a step, counted from 0; a step below 0 is as 0.

        A number gives a float. A tensor of any shape gives a tensor, element by element: of the step's dtype if that is
        floating, otherwise of the default dtype.

        Raises:
            TypeError: `step` is neither a real number nor a real tensor.
        """
        if isinstance(step, Tensor):
            return self._of_tensor(step)
        number = check_real("step", step, "a number or a tensor")
        # Of an integer none of torch.compile's symbols has to become a float, of which it takes no remainder.
        since = max((step if isinstance(step, int) else number) - self.delay, 0)
        if self.period != inf:
            since = self.rise if since >= self.cycles * self.period else since % self.period
        share = min(since / self.rise, 1.0)
        if self.shape == "cosine":
            share = 0.5 - 0.5 * cos(pi * share)
        return self.start * (1 - share) + self.stop * share

    def _of_tensor(self, step: Tensor) -> Tensor:
        check_reals("step", step)
        if not step.is_floating_point():
            step = step.long()  # unsigned ones would wrap around below the delay
        since = (step - self.delay).clamp(min=0)
        if self.period != inf:  # of integers, so that no large step is rounded
            since = torch.where(since >= self.cycles * self.period, self.rise, since % self.period)
        share = (since / self.rise).clamp(max=1.0)
        if self.shape == "cosine":
            share = 0.5 - 0.5 * torch.cos(pi * share)
        return self.start * (1 - share) + self.stop * share


def linear(steps: float, start: float = 0.0, stop: float = 1.0, delay: float = 0) -> Schedule:
    """`start` until step `delay`, then on a straight line to `stop`, which is reached at step `delay + steps` and kept.

    For the weight of the KL: Bowman et al., Generating Sentences from a Continuous Space, 2016; Sonderby et al., Ladder VAE,
    2016. For a capacity: Burgess et al., Understanding disentangling in beta-VAE, 2018.

    Args:
        steps: length of the rise (or fall), positive. Steps may be epochs or their fractions as well.
        start, stop: values, finite.
        delay: steps before the rise, not negative.

    Raises:
        TypeError, ValueError: an argument is no number, or not such a number.
    """
    return _ramp(steps, start, stop, delay, "linear")


def cosine(steps: float, start: float = 0.0, stop: float = 1.0, delay: float = 0) -> Schedule:
    """As `linear`, but flat at both ends: at a part u of the rise, `start + (stop - start) * (1 - cos(pi * u)) / 2`."""
    return _ramp(steps, start, stop, delay, "cosine")


def cyclical(
    period: float,
    ratio: float = 0.5,
    start: float = 0.0,
    stop: float = 1.0,
    cycles: int | None = None,
    shape: str = "linear",
) -> Schedule:
    """Each `period` begins anew at `start`, rises to `stop` in its first part `ratio`, and stays there for the rest.

    Cyclical annealing (Fu et al., Cyclical Annealing Schedule, NAACL 2019): for T steps of training in M cycles, `period` is
    T/M, and `ratio` is the proportion R; the paper has M = 4 and R = 0.5. The first step is 0 here and 1 there.

    Args:
        period: steps of a cycle, positive.
        ratio: part of a cycle that rises, in (0, 1]. With 1, the last step before a restart falls short of `stop`.
        start, stop: values, finite.
        cycles: cycles before the value stays at `stop`; None: they do not end.
        shape: "linear" or "cosine".

    Raises:
        TypeError, ValueError: an argument is no number, or not such a number or name.
    """
    period, ratio = _positive("period", period), _positive("ratio", ratio)
    if ratio > 1:
        raise ValueError(f"ratio must be at most 1, got {ratio:g}")
    number = inf if cycles is None else check_count("cycles", cycles, "an integer or None")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(map(repr, SHAPES))}; got {shape!r}")
    return Schedule(_finite("start", start), _finite("stop", stop), period * ratio, 0, period, number, shape)


def _ramp(steps: float, start: float, stop: float, delay: float, shape: str) -> Schedule:
    delay = _finite("delay", delay)
    if delay < 0:
        raise ValueError(f"delay must not be negative, got {delay:g}")
    return Schedule(_finite("start", start), _finite("stop", stop), _positive("steps", steps), delay, shape=shape)


def _finite(name: str, value: float) -> float:
    """A whole number as an integer, so that arithmetic with integer tensors stays exact."""
    number = check_real(name, value)
    if not -inf < number < inf:  # torch.compile does not take `isfinite` of a number that it made a symbol of
        raise ValueError(f"{name} must be finite, got {number}")
    return int(number) if number.is_integer() else number


def _positive(name: str, value: float) -> float:
    number = _finite(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be positive, got {number:g}")
    return number
