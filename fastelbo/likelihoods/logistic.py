"""Likelihoods of values in steps: the discretized logistic distribution, and mixtures of it."""

import math
from typing import TYPE_CHECKING

import torch

from ..basics.numerics import bin_in_one_pass, log_bin, positive
from ..basics.records import canonical, record
from ..basics.scalars import check_integer
from ..basics.tracing import is_seen
from . import mixture
from .base import Likelihood, OnePass, check_labelled_dim, check_own_dim
from .location import Scaled
from .values import Range


@record
class Steps(Likelihood):
    """The base of both: targets in [-1, 1], or the levels that integers are."""

    if TYPE_CHECKING:  # a field

        @property
        def levels(self) -> int: ...

    def __post_init__(self):
        super().__post_init__()
        canonical(self, "levels", check_integer)
        if self.levels < 2:
            raise ValueError(f"{type(self).__name__}.levels must be at least 2, got {self.levels}")

    def support(self, first, x):
        if not x.is_floating_point():
            return Range(f"have levels from 0 to {self.levels - 1}", 0, self.levels - 1, unscaled=True)
        end = 1 + 1 / (self.levels - 1)  # where the step ends whose middle is 1
        return Range("lie in [-1, 1]", -end, end)

    def scaling(self, x):
        return super().scaling(x) if x.is_floating_point() else (2 / (self.levels - 1), -1.0)


@record
class DiscretizedLogistic(Scaled, Steps):
    """The levels of images or sounds: a logistic distribution of values in [-1, 1], integrated over the bin of each level.

    `recon_x` is the tuple (mean, log scale). A floating target holds values in [-1, 1]; an integer target holds the levels 0 to
    `levels` - 1. The lowest bin reaches to -infinity and the highest to infinity. For a floating target that lies in [0, 1],
    where the loss would be another one, a `UserWarning` is given on a CPU, once in a process. (Kingma et al., Improved
    Variational Inference with Inverse Autoregressive Flow, 2016; the ends are those of Salimans et al., PixelCNN++, 2017. The
    logarithm of a bin is exact, where theirs is that of a density once the bin holds less than 1e-5.)

    Args:
        parameter: what the second tensor of the tuple is: `"log_scale"`, `"scale"`, or `"logvar"` (twice the logarithm).
        levels: the number of levels, at least 2.
        soft_min: a soft lower bound on the logarithm of the scale, as in `Gaussian`. None: no bound.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, `parameter` is unknown, or there are fewer than 2 levels.
    """

    parameter: str = "log_scale"
    levels: int = 256
    soft_min: float | None = None
    name = kernel = "discretized_logistic"
    compiled_passes = 13

    def nll(self, parameters, x):
        mean, scale = parameters
        if self.parameter == "scale":  # the first and last bin are without its logarithm, which shows what is not positive
            scale = positive(scale)
        log_scale, inverse = self.log_and_inverse(scale)
        half = 1 / (self.levels - 1)
        lower, upper = (x - mean - half) * inverse, (x - mean + half) * inverse
        log_width = math.log(2 * half) - log_scale
        log_p = log_bin(lower, upper, 2 * half * inverse, log_width, x < half - 1, x > 1 - half)
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
    scales (not below -7) and, of three channels, K coefficients (through tanh). Targets and bins are those of
    `DiscretizedLogistic`.

    Args:
        levels: number of steps.
        dim: the dimension of parameters and channels; -1 for channels last.
    """

    levels: int = 256
    dim: int = 1
    name = "discretized_logistic_mixture"
    kernel = "mixture"
    compiled_passes = 13
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
        return {"levels": self.levels, "channels": x.shape[dim], "inner": x.shape[dim + 1 :].numel()}
