"""Likelihoods of real numbers around a location: Gaussian, Laplace, Student's t."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..basics.numerics import SOFTPLUS_IS_LINEAR, CompiledBound, fitting, positive, softplus
from ..basics.records import canonical, check_choice, record
from ..basics.scalars import ONE, check_finite, check_real
from ..basics.tracing import is_behind_dynamo, is_seen
from .base import Likelihood, OnePass, check_given_once
from .errors import MSE, CompiledDistances, CompiledSquares, absolute, squared
from .values import POSITIVE

SCALES = ("scale", "log_scale", "logvar")
NEAR = 20.0  # up to which neither factor of a bounded scale's reciprocal overflows or underflows


@record
class Scaled(Likelihood):
    """The base of those whose second parameter is a scale, its logarithm or twice that."""

    parameters = ("mean", "scale")
    if TYPE_CHECKING:  # fields, each class's in its own order

        @property
        def parameter(self) -> str: ...

        @property
        def soft_min(self) -> float | None: ...

    def __post_init__(self):
        super().__post_init__()
        check_choice(f"{type(self).__name__}.parameter", self.parameter, SCALES)
        if self.soft_min is not None:
            canonical(self, "soft_min", check_finite)

    @property
    def ranges(self):
        return (None, POSITIVE if self.parameter == "scale" else None)

    def scale_of(self, parameter: Tensor) -> Tensor:
        """The scale that a second parameter means, of its shape."""
        return torch.exp(self.log_and_inverse(parameter)[0])

    def log_and_inverse(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm and reciprocal of the scale."""
        # `check_values` raises for the NaN that the logarithm of a negative scale is. Where it does not look, all becomes NaN.
        if self.parameter == "scale" and (self.soft_min is not None or not is_seen(given)):
            given = positive(given)
        if self.soft_min is None and self.parameter == "scale":
            return torch.log(given), 1 / given
        log_scale = {"scale": torch.log, "log_scale": lambda t: t, "logvar": lambda t: 0.5 * t}[self.parameter](given)
        return self.bounded(log_scale)

    def spread(self, given: Tensor, spare) -> "Spread | None":
        """What a one-pass form needs of the scale, in `spare[2]` and the next; None where a branch would be needed for it."""
        number = {"scale": 1.0, "log_scale": 1.0, "logvar": 0.5}[self.parameter]
        if self.parameter == "scale" and not (is_seen(given) and given.min() > 0):
            return None
        logarithm = torch.log(given, out=fitting(spare[3], given)) if self.parameter == "scale" else given
        if self.soft_min is None and self.parameter == "scale":
            inverse = torch.reciprocal(given, out=fitting(spare[2], given))
            return Spread(inverse, logarithm, number, inverse, number)
        if self.soft_min is None:
            return Spread(torch.mul(given, -number, out=fitting(spare[2], given)).exp_(), logarithm, number, None, number)
        above = torch.mul(logarithm, number, out=fitting(spare[3], given)).sub_(self.soft_min)
        slope = torch.sigmoid(above, out=fitting(spare[4], given))
        if self.parameter == "scale":
            slope.div_(given)
        logarithm = torch.ops.aten.softplus.out(above, 1, SOFTPLUS_IS_LINEAR, out=above).add_(self.soft_min)
        return Spread(torch.neg(logarithm, out=fitting(spare[2], given)).exp_(), logarithm, 1.0, slope, number)

    def bounded(self, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise, from a logarithm that has no bound yet."""
        if self.soft_min is not None and is_behind_dynamo() and abs(self.soft_min) <= NEAR:
            above, inverse = CompiledBound.apply(log_scale - self.soft_min)
            return self.soft_min + above, inverse * math.exp(-self.soft_min)
        if self.soft_min is not None:
            log_scale = self.soft_min + softplus(log_scale - self.soft_min)
        return log_scale, torch.exp(-log_scale)

    def constants(self, parameters, x):
        return super().constants(parameters, x) | {"links": (None, self.parameter), "soft_min": self.soft_min}


class Spread(NamedTuple):
    """A scale: its reciprocal; its logarithm, which is `times` a tensor; the derivative of that by what was given for it, which
    is `number` times a tensor, None for 1."""

    inverse: Tensor
    logarithm: Tensor
    times: float
    slope: Tensor | None
    number: float

    def chained(self, by_logarithm: Tensor) -> float:
        """From a derivative by the logarithm that by what was given, in place but for the number that is returned."""
        if self.slope is not None:
            by_logarithm.mul_(self.slope)
        return self.number


@record
class Located(Scaled):
    """The base of those that have a fixed scale, for a single tensor of means."""

    if TYPE_CHECKING:

        @property
        def scale(self) -> Any: ...

    def __post_init__(self):
        super().__post_init__()
        name = f"{type(self).__name__}.scale"
        if isinstance(self.scale, Tensor):
            raise TypeError(f"{name} must be a number: pass a tensor as the second of the tuple (mean, scale)")
        if isinstance(self.scale, str) and self.scale in SCALES:
            raise ValueError(f"{name} must be a number: what the second of the tuple is, parameter={self.scale!r} says")
        canonical(self, "scale", self.check_scale)

    def check_scale(self, name: str, scale, expected: str = "a number") -> float:
        scale = check_real(name, scale, expected)
        if not 0 < scale < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {scale}")
        return scale

    @property
    def counts(self):
        return (1, 2)

    @property
    def fixed(self) -> Any:
        return self.scale

    def check(self, name, parameters, x):
        super().check(name, parameters, x)
        check_given_once(self, "scale", parameters)

    def constants(self, parameters, x):
        if len(parameters) == 2:
            return super().constants(parameters, x)
        return Likelihood.constants(self, parameters, x) | {"links": (None, "scale")}  # the fixed one


OPTIMAL = "optimal"
LEAST, MOST = 1e-18, 1e18  # between which the square of a fixed scale is a number of float32, and so is its reciprocal


@record
class Gaussian(Located):
    """Real values with a Gaussian error: `-Normal(mean, scale).log_prob(x)`.

    `recon_x` is the mean where the scale is a number or optimal, and the tuple (mean, scale) where the scale is a tensor: one
    that the decoder returns, or one that is learned.

    Args:
        scale: the standard deviation that goes with a mean alone, a positive number. `"optimal"`: the one that minimizes the
            loss, which is the root of the mean squared error over all that `recon_x` holds (sigma-VAE's closed form).
        parameter: what the second tensor of the tuple is: `"scale"` (the standard deviation), `"log_scale"` (its logarithm) or
            `"logvar"` (the logarithm of the variance).
        soft_min: a soft lower bound on the logarithm of the scale, `soft_min + softplus(log_scale - soft_min)`, for the second
            tensor and the optimal scale. None: no bound. sigma-VAE has -6 (Rybkin et al., Simple and Effective VAE Training
            with Calibrated Decoders, 2021).

    Raises:
        TypeError: `scale` is a tensor, which goes into the tuple; or an argument is of another wrong type.
        ValueError: `scale` is not positive, or `parameter` is unknown.
    """

    scale: float | str = 1.0
    parameter: str = "scale"
    soft_min: float | None = None
    name = kernel = "gaussian"

    def check_scale(self, name: str, scale: Any, expected: str = "") -> Any:
        is_optimal = isinstance(scale, str) and scale == OPTIMAL
        return scale if is_optimal else super().check_scale(name, scale, f"a number or {OPTIMAL!r}")

    def is_plain(self, parameters):
        """That kernel divides by the square of a fixed scale; the other one twice by the scale."""
        return super().is_plain(parameters) and (self.scale == OPTIMAL or LEAST < self.fixed < MOST)

    @property
    def inner(self):
        return MSE(target_scale=self.target_scale) if self.scale == OPTIMAL else None

    def compose(self, sums, counts, total):
        square = sums.sum() / total
        square = torch.where(square.isnan() & (sums.sum() == 0), 1.0, square)  # any, where nothing counts: the sum is 0
        if self.soft_min is not None:  # which bounds it without a derivative of log(0)
            square = square.clamp_min(torch.finfo(square.dtype).tiny)
        log_scale, inverse = self.bounded(0.5 * torch.log(square))
        return 0.5 * sums * inverse.square() + counts * (log_scale + HALF_LOG_2PI)

    def nll(self, parameters, x):
        mean, *scale = parameters
        if not scale:
            constant = math.log(self.fixed) + HALF_LOG_2PI
            if is_behind_dynamo() and LEAST < self.fixed < MOST:
                return CompiledSquares.apply(mean, x) * (0.5 / self.fixed**2) + constant
            return 0.5 * ((x - mean) / self.fixed).square() + constant
        log_scale, inverse = self.log_and_inverse(scale[0])
        return 0.5 * ((x - mean) * inverse).square() + (log_scale + HALF_LOG_2PI)

    def one_pass(self, parameters, x, wants_value, out, spare):
        if len(parameters) == 1:
            fixed = self.fixed
            if not LEAST < fixed < MOST:
                return None
            squares, precision = squared(parameters[0], x, wants_value, out[0], spare), 0.5 / fixed**2
            return OnePass(squares, precision, math.log(fixed) + HALF_LOG_2PI, (2 * precision,))
        (mean, given), (to_mean, to_given), slope = parameters, out, 1.0
        if (scale := self.spread(given, spare)) is None:
            return None
        errors = torch.sub(mean, x, out=spare[0]).mul_(scale.inverse)
        squares = torch.mul(errors, errors, out=spare[1])
        if to_mean is not None:
            torch.mul(errors, scale.inverse, out=to_mean)
        if to_given is not None:
            slope = scale.chained(torch.sub(ONE, squares, out=to_given))
        values = squares.add_(scale.logarithm, alpha=2 * scale.times) if wants_value else None
        return OnePass(values, 0.5, HALF_LOG_2PI, (1.0, slope))


HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@record
class Laplace(Located):
    """Real values with a Laplace error: `-Laplace(mean, scale).log_prob(x)`.

    `recon_x` is the mean where the scale is a number, and the tuple (mean, scale) where it is a tensor: one that the decoder
    returns, or one that is learned.

    Args:
        scale: the scale (mean absolute deviation) that goes with a mean alone, a positive number.
        parameter: what the second tensor of the tuple is: `"scale"`, `"log_scale"` (its logarithm) or `"logvar"` (twice the
            logarithm).
        soft_min: a soft lower bound on the logarithm of the second tensor's scale, as in `Gaussian`. None: no bound.

    Raises:
        TypeError: `scale` is a tensor, which goes into the tuple; or an argument is of another wrong type.
        ValueError: `scale` is not positive, or `parameter` is unknown.
    """

    scale: float = 1.0
    parameter: str = "scale"
    soft_min: float | None = None
    name = kernel = "laplace"

    def nll(self, parameters, x):
        mean, *scale = parameters
        if not scale:
            distances = CompiledDistances.apply(mean, x) if is_behind_dynamo() else (x - mean).abs()
            return distances / self.scale + (math.log(self.scale) + math.log(2))
        log_scale, inverse = self.log_and_inverse(scale[0])
        return (x - mean).abs() * inverse + (log_scale + math.log(2))

    def one_pass(self, parameters, x, wants_value, out, spare):
        mean, *given = parameters
        if not given:
            distances = absolute(mean, x, wants_value, out[0], spare)
            return OnePass(distances, 1 / self.scale, math.log(self.scale) + math.log(2), (1 / self.scale,))
        (given,), (to_mean, to_given), slope = given, out, 1.0
        if (scale := self.spread(given, spare)) is None:
            return None
        difference = torch.sub(mean, x, out=spare[0])
        errors = torch.abs(difference, out=spare[1]).mul_(scale.inverse)
        if to_mean is not None:
            torch.sign(difference, out=to_mean).mul_(scale.inverse)
        if to_given is not None:
            slope = scale.chained(torch.sub(ONE, errors, out=to_given))
        values = errors.add_(scale.logarithm, alpha=scale.times) if wants_value else None
        return OnePass(values, 1.0, math.log(2), (1.0, slope))


@record
class StudentT(Located):
    """Real values with outliers: `-StudentT(df, mean, scale).log_prob(x)`, in nats.

    Robust VAEs have it in place of a Gaussian, whose squares let a few far values outweigh the rest. `recon_x` is the mean, or
    the tuple (mean, scale) where the scale is a tensor.

    Args:
        df: the degrees of freedom, a positive and finite number: 1 is Cauchy's distribution, and a large one nearly Gaussian.
        scale: that of a mean alone, a positive number; the standard deviation is `sqrt(df / (df - 2))` times as large.
        parameter: what the second tensor of the tuple is: `"scale"`, `"log_scale"`, or `"logvar"`, twice that.
        soft_min: a soft lower bound on the logarithm of a scale that is a tensor, as in `Gaussian`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, not positive, or unknown.
    """

    df: float
    scale: float = 1.0
    parameter: str = "scale"
    soft_min: float | None = None
    name = kernel = "student_t"

    def __post_init__(self):
        super().__post_init__()
        canonical(self, "df", check_real)
        if not 0 < self.df < math.inf:
            raise ValueError(f"StudentT.df must be positive and finite, got {self.df}")

    @property
    def constant(self):
        return self.df

    def nll(self, parameters, x):
        mean, *scale = parameters
        log_scale, inverse = self.log_and_inverse(scale[0]) if scale else (math.log(self.scale), 1 / self.scale)
        tail = torch.log1p(((x - mean) * inverse).square() / self.df)
        return 0.5 * (self.df + 1) * tail + (log_scale + self.normalizer)

    def one_pass(self, parameters, x, wants_value, out, spare):
        mean, *given = parameters
        to_mean, to_given = (*out, None)[:2]
        factor, slope = 0.5 * (self.df + 1), 1.0
        fixed = Spread(torch.tensor(1 / self.scale, dtype=x.dtype, device=x.device), ONE, math.log(self.scale), None, 1.0)
        scale = self.spread(given[0], spare) if given else fixed
        if scale is None:
            return None
        errors = torch.sub(mean, x, out=spare[0]).mul_(scale.inverse)
        squares = torch.mul(errors, errors, out=spare[1])
        if to_mean is not None or to_given is not None:
            share = torch.add(squares, self.df, out=spare[5]).reciprocal_()
            if to_mean is not None:
                torch.mul(errors, scale.inverse, out=to_mean).mul_(share)
            if to_given is not None:
                slope = scale.chained(torch.mul(squares, share, out=to_given).mul_(-2 * factor).add_(1))
        values = None
        if wants_value:
            values = squares.div_(self.df).log1p_()
            values.add_(scale.logarithm, alpha=scale.times / factor)
        return OnePass(values, factor, self.normalizer, (2 * factor, slope)[: len(parameters)])

    @property
    def normalizer(self) -> float:
        return 0.5 * math.log(math.pi * self.df) - _log_gamma_beyond(self.df / 2)


def _log_gamma_beyond(a: float) -> float:
    """log Gamma(a + 1/2) - log Gamma(a)."""
    if a < 50:
        return math.lgamma(a + 0.5) - math.lgamma(a)
    u = 1 / (a * a)  # the asymptotic series, which keeps the digits that the difference would lose
    return 0.5 * math.log(a) - (1 / 8 - u * (1 / 192 - u * (1 / 640 - u * (17 / 14336)))) / a
