"""Likelihoods of values in steps: the discretized logistic distribution, and mixtures of it."""

import math
import sys
from typing import TYPE_CHECKING

import torch

from ..basics.numerics import bin_in_one_pass, log_bin, positive
from ..basics.records import canonical, record
from ..basics.scalars import check_integer, check_real, is_real
from ..basics.tracing import is_seen
from . import mixture
from .base import Likelihood, OnePass, check_labelled_dim, check_own_dim
from .location import Scaled
from .values import Range


@record
class Steps(Likelihood):
    """The base of both: targets in an interval, which becomes [-1, 1], or the levels that integers are."""

    if TYPE_CHECKING:  # fields

        @property
        def levels(self) -> int: ...

        @property
        def interval(self) -> tuple[float, float]: ...

    def __post_init__(self):
        super().__post_init__()
        canonical(self, "levels", check_integer)
        if self.levels < 2:
            raise ValueError(f"{type(self).__name__}.levels must be at least 2, got {self.levels}")
        canonical(self, "interval", _checked_interval)

    def support(self, first, x):
        if not x.is_floating_point():
            return Range(f"have levels from 0 to {self.levels - 1}", 0, self.levels - 1, unscaled=True)
        low, high = self.interval
        half = (high - low) / (self.levels - 1) / 2  # of a step, whose middle an end of the interval is
        return Range(f"lie in [{low:g}, {high:g}]", low - half, high + half, signed=self.interval == SIGNED)

    def scaling(self, x):
        if not x.is_floating_point():
            return 2 / (self.levels - 1), -1.0
        scale, shift = _onto_signed(*self.interval)
        return self.target_scale * scale, shift


SIGNED = -1.0, 1.0


def _onto_signed(low: float, high: float) -> tuple[float, float]:
    """What numbers in this interval are multiplied by, and what is added then, to lie in [-1, 1]."""
    scale = 1 / (0.5 * high - 0.5 * low)  # a difference that does not overflow
    return scale, 0.0 - scale * (0.5 * low + 0.5 * high)


def _checked_interval(name: str, interval) -> tuple[float, float]:
    ends = tuple(interval) if isinstance(interval, tuple | list) else ()
    if len(ends) == 2 and all(is_real(end) for end in ends):
        low, high = (check_real(name, end) for end in ends)
        if -math.inf < low < high < math.inf and 0.5 * high - 0.5 * low >= sys.float_info.min:  # which has a reciprocal
            return low, high
    raise ValueError(f"{name} must be a pair (low, high) of finite numbers with low < high; got {interval!r}")


@record
class DiscretizedLogistic(Scaled, Steps):
    """The levels of images or sounds: a logistic distribution of values in [-1, 1], integrated over the bin of each level.

    `recon_x` is the tuple (mean, log scale). A floating target holds values in `interval`, over which the levels lie evenly; an
    integer target holds the levels 0 to `levels` - 1 themselves, to which neither `interval` nor `target_scale` applies. Both
    are read as numbers in [-1, 1], in whose units mean and scale are, whatever the interval: a mean of values in [0, 1] is
    `2 * mean - 1` here, and its log scale `log_scale + log(2)`. The lowest bin reaches to -infinity and the highest to
    infinity. For a floating target that lies in [0, 1], where the interval is [-1, 1] and the loss would be another one, a
    `UserWarning` is given on a CPU, once in a process. (Kingma et al., Improved Variational Inference with Inverse
    Autoregressive Flow, 2016; the ends are those of Salimans et al., PixelCNN++, 2017. The logarithm of a bin is exact, where
    theirs is that of a density once the bin holds less than 1e-5.)

    Args:
        parameter: what the second tensor of the tuple is: `"log_scale"`, `"scale"`, or `"logvar"` (twice the logarithm).
        levels: the number of levels, at least 2.
        soft_min: a soft lower bound on the logarithm of the scale, as in `Gaussian`. None: no bound.
        interval: where the values of a floating target lie, (low, high), once they are multiplied by `target_scale`: (0, 1) for
            images as torchvision's `ToTensor` makes them. It becomes [-1, 1] on the fly.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, `parameter` is unknown, there are fewer than 2 levels, or
            `interval` is no pair of finite numbers with low < high.
    """

    parameter: str = "log_scale"
    levels: int = 256
    soft_min: float | None = None
    interval: tuple[float, float] = SIGNED
    name = kernel = "discretized_logistic"

    def nll(self, parameters, x):
        mean, scale = parameters
        if self.parameter == "scale":  # the first and last bin are without its logarithm, which shows what is not positive
            scale = positive(scale)
        log_scale, inverse = self.log_and_inverse(scale)
        half = 1 / (self.levels - 1)
        lower, upper = (x - mean - half) * inverse, (x - mean + half) * inverse
        log_width = math.log(2 * half) - log_scale
        log_p = log_bin(lower, upper, 2 * half * inverse, log_width, x, half)
        return torch.where(x.abs() > 1 + half, torch.nan, -log_p)

    def one_pass(self, parameters, x, wants_value, out, spare):
        (mean, given), (to_mean, to_given), slope = parameters, out, 1.0
        if not is_seen(x) or (scale := self.spread(given, spare)) is None:
            return None
        buffers = spare[0], spare[1], spare[5], spare[6], spare[7], spare[8], spare[9]
        centered = torch.sub(x, mean, out=spare[9])
        found = bin_in_one_pass(x, centered, scale.inverse, 1 / (self.levels - 1), buffers)
        if found is None:
            return None
        values, by_mean, by_scale = found
        if to_mean is not None:
            torch.mul(by_mean, scale.inverse, out=to_mean)
        if to_given is not None:
            slope = scale.chained(to_given.copy_(by_scale))
        return OnePass(values, 1.0, 0.0, (1.0, slope))

    @property
    def constant(self):
        return 1 / (self.levels - 1)


@record
class DiscretizedLogisticMixture(Steps):
    """A mixture of discretized logistic distributions of each pixel in [-1, 1] (Salimans et al., PixelCNN++, 2017; Child, Very
    Deep VAEs, 2021).

    For targets of three channels, K components take 10 K parameters a pixel, G depends linearly on R and B on both; for C other
    channels, they take K (1 + 2 C). They lie as in PixelCNN++: K logits of the components, then for each channel K means, K log
    scales (not below -7) and, of three channels, K coefficients (through tanh). Targets, bins and units are those of
    `DiscretizedLogistic`, so that parameters mean the same whatever the interval.

    Args:
        levels: number of steps.
        dim: the dimension of parameters and channels; -1 for channels last.
        interval: where the values of a floating target lie, as in `DiscretizedLogistic`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, there are fewer than 2 levels, `dim` is 0, or `interval` is no
            pair of finite numbers with low < high.
    """

    levels: int = 256
    dim: int = 1
    interval: tuple[float, float] = SIGNED
    name = "discretized_logistic_mixture"
    kernel = "mixture"
    compiled_excess = 18
    parameters = ("parameters",)

    def __post_init__(self):
        super().__post_init__()
        check_own_dim(self)

    def check_target(self, name, first, x):
        dim, last = check_labelled_dim(self, first), x.shape[:-1] == first.shape[:-1]
        if x.dim() != first.dim() or any(n != m for d, (n, m) in enumerate(zip(x.shape, first.shape, strict=True)) if d != dim):
            raise ValueError(
                f"x must have the shape of {name} but for dimension {dim}, its channels:"
                f" got {name} {tuple(first.shape)} and x {tuple(x.shape)}"
                + ("; for channels that come last, use likelihoods.DiscretizedLogisticMixture(dim=-1)" if last else "")
            )
        channels, found = x.shape[dim], first.shape[dim]
        each = mixture.parameters_of(channels)
        if found % each or found == 0:
            raise ValueError(
                f"{name} must have {each} parameters a component for {channels} channels, along dimension {dim}:"
                f" got {found} in all"
            )

    def count(self, first, x, weight, dtype):
        return super().count(first, x, weight, dtype) * x.shape[self.dim]

    def nll(self, parameters, x):
        return mixture.nll(parameters[0], x, levels=self.levels, dim=self.dim)

    def one_pass(self, parameters, x, wants_value, out, spare):
        if not is_seen(x):
            return None
        values = mixture.in_one_pass(parameters[0], x, out[0], levels=self.levels, dim=self.dim)
        return values if values is None else OnePass(values)

    def constants(self, parameters, x):
        dim = self.dim % x.dim()
        places = {"levels": self.levels, "channels": x.shape[dim], "inner": x.shape[dim + 1 :].numel()}
        return super().constants(parameters, x) | places
