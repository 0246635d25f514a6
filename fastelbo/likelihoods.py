"""The likelihoods p(x | z): what a decoder's output parametrizes.

Wherever a likelihood is asked for, a name stands for one with its defaults, and an object of this module for one with options
of its own. A likelihood of several parameters takes them as a tuple in place of `recon_x`, in the order given here; all but the
first may be smaller, as long as they broadcast to its shape: a 0-d tensor, a number a channel `[C, 1, 1]`, a number a feature
`[G]`.

| name | object | `recon_x` |
|---|---|---|
| `"bernoulli"` | | probabilities |
| `"bernoulli_logits"` | `BernoulliLogits` | logits |
| `"mse"`, `"l1"` | | values |
| `"gaussian"` | `Gaussian` | mean, or (mean, scale) |
| `"laplace"` | `Laplace` | mean, or (mean, scale) |
| `"categorical"` | `Categorical` | logits, with a dimension of classes |
| `"multinomial"` | `Multinomial` | logits, with a dimension of items |
| `"poisson"`, `"poisson_log"` | | rate, or its logarithm |
| `"negative_binomial"` | | (mean, inverse dispersion) |
| `"zero_inflated_negative_binomial"` | | (mean, inverse dispersion, logits of the extra zeros) |
| `"discretized_logistic"` | `DiscretizedLogistic` | (mean, log scale) |
| `"discretized_logistic_mixture"` | `DiscretizedLogisticMixture` | all parameters of the mixture, along one dimension |
| `"continuous_bernoulli"`, `"continuous_bernoulli_logits"` | | probabilities, or logits |

All are negative log-likelihoods in nats with their constants, so that they can be compared with others and be turned into bits;
but for `"mse"` and `"l1"`, which are no densities, and `"multinomial"`, without the coefficient that only the data determine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import mixture
from .numerics import log_bin, log_factorial, log_gamma_ratio, positive, softplus
from .plain import PLAIN
from .scalars import check_integer, check_real
from .tracing import is_seen
from .values import BITS, NONNEGATIVE, POSITIVE, Range

SCALES = ("scale", "log_scale", "logvar")


@dataclass(frozen=True)
class Likelihood:
    """What all of them have. `nll(parameters, x)` is the formula: nats of each element, or of each position of `[B, ...]`
    without the dimension of classes or channels. All of `parameters` and `x` come in one floating dtype, labels as int64.
    `ranges`: where the parameters must lie, in their order; None: anywhere, and so those that are not there."""

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]
    ranges: ClassVar[tuple[Range | None, ...]] = ()

    def support(self, parameters: Sequence[Tensor], x: Tensor) -> Range | None:
        """Where the target `x`, as it came, must lie; None: anywhere."""

    def plain(self, count: int) -> str | None:
        """The name of the row that computes it from `count` parameters, if there is one."""

    def nll(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Named(Likelihood):
    """One of a single parameter and no options."""

    name: str
    parameters = ("recon_x",)

    @property
    def ranges(self):
        return (PLAIN[self.name].allowed,)

    def support(self, parameters, x):
        return PLAIN[self.name].support

    def plain(self, count):
        return self.name

    def nll(self, parameters, x):
        return PLAIN[self.name].nll(parameters[0], x, 1.0)


@dataclass(frozen=True, eq=False)
class BernoulliLogits(Likelihood):
    """As `F.binary_cross_entropy_with_logits(logits, x, pos_weight=pos_weight)`.

    Args:
        pos_weight: weight of the positive part, such as negatives / positives: a number, or a tensor that broadcasts to `x`.
    """

    pos_weight: float | Tensor | None = None
    name = "bernoulli_logits"
    parameters = ("logits", "pos_weight")

    def __post_init__(self):
        if not isinstance(self.pos_weight, Tensor | None):
            _make_plain(self, "pos_weight", check_real)

    def support(self, parameters, x):
        return BITS

    def plain(self, count):
        return self.name if self.pos_weight is None else None

    def nll(self, parameters, x):
        logits, *pos_weight = parameters
        positive = x * softplus(-logits)
        return (1 - x) * softplus(logits) + (positive * pos_weight[0] if pos_weight else positive)


@dataclass(frozen=True)
class _Scaled(Likelihood):
    """
    Args:
        scale: what the second parameter is: `"scale"`, `"log_scale"` or `"logvar"`, each of the distribution's own scale.
        soft_min: a lower bound on the logarithm of the scale, softly: `soft_min + softplus(log_scale - soft_min)`, as sigma-VAE
            has it with -6 (Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, 2021).
    """

    scale: str = "scale"
    soft_min: float | None = None

    def __post_init__(self):
        _check_choice(f"{type(self).__name__}.scale", self.scale, self.scales())
        if self.soft_min is not None:
            _make_plain(self, "soft_min", check_real)

    @classmethod
    def scales(cls):
        return SCALES

    @property
    def ranges(self):
        return (None, POSITIVE if self.scale == "scale" else None)

    def scale_of(self, parameter: Tensor) -> Tensor:
        """The scale that a second parameter means, of its shape."""
        return torch.exp(self.log_and_inverse(parameter)[0])

    def log_and_inverse(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm and reciprocal of the scale."""
        # `check_values` raises for the NaN that the logarithm of a negative scale is. Where it does not look, all becomes NaN.
        if self.scale == "scale" and (self.soft_min is not None or not is_seen(given)):
            given = positive(given)
        if self.soft_min is None and self.scale == "scale":
            return torch.log(given), 1 / given
        log_scale = {"scale": torch.log, "log_scale": lambda t: t, "logvar": lambda t: 0.5 * t}[self.scale](given)
        if self.soft_min is not None:
            log_scale = self.soft_min + softplus(log_scale - self.soft_min)
        return log_scale, torch.exp(-log_scale)


@dataclass(frozen=True)
class Gaussian(_Scaled):
    """`-Normal(mean, scale).log_prob(x)`, with a scale that may be learned.

    Args:
        scale: what the second parameter is: `"scale"` (standard deviation), `"log_scale"` or `"logvar"`. Or `"optimal"`: there
            is none, and the scale is the one that minimizes the loss, the root of the mean squared error over all that
            `recon_x` holds (sigma-VAE's closed form).
        soft_min: a lower bound on the logarithm of the scale, softly: `soft_min + softplus(log_scale - soft_min)`; sigma-VAE
            has -6 (Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, 2021).
    """

    name = "gaussian"
    parameters = ("mean", "scale")

    @classmethod
    def scales(cls):
        return (*SCALES, "optimal")

    def plain(self, count):
        return self.name if count == 1 and self == Gaussian() else None

    def nll(self, parameters, x):
        mean, scale = parameters
        log_scale, inverse = self.log_and_inverse(scale)
        return 0.5 * ((x - mean) * inverse).square() + (log_scale + 0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class Laplace(_Scaled):
    """`-Laplace(mean, scale).log_prob(x)`, with a scale that may be learned.

    Args:
        scale: what the second parameter is: `"scale"` (mean absolute deviation), `"log_scale"`, or `"logvar"`, twice that.
        soft_min: as in `Gaussian`.
    """

    name = "laplace"
    parameters = ("mean", "scale")

    def plain(self, count):
        return self.name if count == 1 and self == Laplace() else None

    def nll(self, parameters, x):
        mean, scale = parameters
        log_scale, inverse = self.log_and_inverse(scale)
        return (x - mean).abs() * inverse + (log_scale + math.log(2))


@dataclass(frozen=True)
class DiscretizedLogistic(_Scaled):
    """Logistic distribution of values in [-1, 1], integrated over the bin of each of `levels` equal steps.

    The lowest bin reaches to -infinity, the highest to infinity. Integer targets are taken as the levels 0 to `levels` - 1. Of
    images in [0, 1], whose loss would be another one, a `UserWarning` tells on a CPU, once in a process.
    (Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016; Salimans et al., PixelCNN++, 2017,
    with their ends. The logarithm of a bin is exact, where theirs is that of a density once the bin holds less than 1e-5.)

    Args:
        scale: what the second parameter is: `"log_scale"`, `"scale"`, or `"logvar"`, twice the first.
        soft_min: as in `Gaussian`.
        levels: number of steps.
    """

    scale: str = "log_scale"
    levels: int = 256
    name = "discretized_logistic"
    parameters = ("mean", "scale")

    def __post_init__(self):
        super().__post_init__()
        _check_levels(self)

    def support(self, parameters, x):
        return levels_range(self.levels, x)

    def nll(self, parameters, x):
        mean, scale = parameters
        if self.scale == "scale":  # the first and last bin are without its logarithm, which shows what is not positive
            scale = positive(scale)
        log_scale, inverse = self.log_and_inverse(scale)
        half = 1 / (self.levels - 1)
        lower, upper = (x - mean - half) * inverse, (x - mean + half) * inverse
        log_width = math.log(2 * half) - log_scale
        log_p = log_bin(lower, upper, 2 * half * inverse, log_width, x < half - 1, x > 1 - half)
        return torch.where(x.abs() > 1 + half, torch.nan, -log_p)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """As `F.cross_entropy`: logits `[B, K, ...]` and labels `[B, ...]`, or a target of the shape of the logits.

    Targets of an integer dtype with one dimension less are labels; those of the shape of the logits are probabilities of the
    classes, one-hot or soft.

    Args:
        dim: the dimension of the classes in the logits; -1 for `[B, ..., K]`.
        ignore_index: positions with this label count neither in a sum nor in the number that a mean divides by.
    """

    dim: int = 1
    ignore_index: int = -100
    name = "categorical"
    parameters = ("logits",)

    def __post_init__(self):
        _check_dim(self)
        _make_plain(self, "ignore_index", check_integer)

    def support(self, parameters, x):
        (logits,) = parameters
        if x.dim() == logits.dim():
            return WEIGHTS
        highest, ignored = logits.shape[self.dim] - 1, self.ignore_index
        return Range(f"have labels from 0 to {highest}, or ignore_index={ignored},", 0, highest, unscaled=True, but=ignored)

    def nll(self, parameters, x):
        (logits,) = parameters
        if x.dim() == logits.dim():
            return multinomial_nll(logits, x, self.dim)
        logits = logits.movedim(self.dim, 1)
        ignored = x == self.ignore_index
        # NaN for labels that are none, as nothing can be raised where the values are not seen.
        outside = ~ignored & ((x < 0) | (x >= logits.shape[1]))
        if not is_seen(x) or ignored.any():
            logits = torch.where(ignored.unsqueeze(1), 0.0, logits)  # or the gradient by a NaN that does not count would be NaN
        nll = F.cross_entropy(logits, torch.where(ignored | outside, 0, x), reduction="none")
        return torch.where(outside, torch.nan, torch.where(ignored, 0.0, nll))


@dataclass(frozen=True)
class Multinomial(Likelihood):
    """`-(log_softmax(logits) * counts).sum(dim)`, without the multinomial coefficient (Liang et al., Variational Autoencoders
    for Collaborative Filtering, 2018). The counts have the shape of the logits.

    Args:
        dim: the dimension of the items.
    """

    dim: int = -1
    name = "multinomial"
    parameters = ("logits",)

    def __post_init__(self):
        _check_dim(self)

    def support(self, parameters, x):
        return WEIGHTS

    def nll(self, parameters, x):
        return multinomial_nll(parameters[0], x, self.dim)


WEIGHTS = NONNEGATIVE._replace(silent=True)  # of logarithms; a negative one gives a finite loss


def multinomial_nll(logits: Tensor, counts: Tensor, dim: int) -> Tensor:
    log_p = F.log_softmax(logits, dim)
    # An item that is masked by a logit of -infinity has no counts.
    return -torch.where((counts == 0) & log_p.isinf(), 0.0, log_p * counts).sum(dim)


EPS = 1e-8  # by which scvi-tools keeps its logarithms from 0, and so a mean of 0 with a count above it from infinity


@dataclass(frozen=True)
class NegativeBinomial(Likelihood):
    """Counts with mean mu and variance mu + mu^2 / theta, theta the inverse dispersion: scvi-tools'
    `NegativeBinomial(mu, theta)` (Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018)."""

    name = "negative_binomial"
    parameters = ("mean", "inverse_dispersion")
    ranges = (NONNEGATIVE, POSITIVE)

    def support(self, parameters, x):
        return NONNEGATIVE

    def nll(self, parameters, x):
        mean, theta = parameters
        return zeros_nll(mean, theta) + _beyond_zero(mean, theta, x)


@dataclass(frozen=True)
class ZeroInflatedNegativeBinomial(Likelihood):
    """A negative binomial with a share of extra zeros, whose logits are the third parameter: scvi-tools'
    `ZeroInflatedNegativeBinomial(mu, theta, zi_logits)`."""

    name = "zero_inflated_negative_binomial"
    parameters = ("mean", "inverse_dispersion", "zi_logits")
    ranges = (NONNEGATIVE, POSITIVE, None)

    def support(self, parameters, x):
        return NONNEGATIVE

    def nll(self, parameters, x):
        mean, theta, logits = parameters
        zeros = zeros_nll(mean, theta)
        # log p(0) = log(1 - q), q = sigmoid(-logits) (1 - exp(-zeros)); where q is near 1, as a difference.
        q = -torch.sigmoid(-logits) * torch.expm1(-zeros)
        near = q < 0.5
        is_zero = torch.where(near, -torch.log1p(-torch.where(near, q, 0.0)), softplus(-logits) - softplus(-logits - zeros))
        return torch.where((x < EPS) & (x >= 0), is_zero, softplus(logits) + zeros + _beyond_zero(mean, theta, x))


def zeros_nll(mean: Tensor, theta: Tensor) -> Tensor:
    """-log p(0) of a negative binomial."""
    return torch.where((mean >= 0) & (theta > 0), theta, torch.nan) * torch.log1p(mean / (theta + EPS))


def _beyond_zero(mean: Tensor, theta: Tensor, x: Tensor) -> Tensor:
    """What -log p(x) is more than -log p(0)."""
    return log_factorial(x) - log_gamma_ratio(theta, x) + x * torch.log1p(theta / (mean + EPS))


@dataclass(frozen=True)
class DiscretizedLogisticMixture(Likelihood):
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
    parameters = ("parameters",)

    def __post_init__(self):
        _check_dim(self)
        _check_levels(self)

    def support(self, parameters, x):
        return levels_range(self.levels, x)

    def nll(self, parameters, x):
        return mixture.nll(parameters[0], x, levels=self.levels, dim=self.dim)


def _check_choice(name: str, value, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _make_plain(likelihood, field: str, check: Callable) -> None:
    """Checks a number, and makes it Python's own: records are compared by value, printed and pickled."""
    object.__setattr__(likelihood, field, check(f"{type(likelihood).__name__}.{field}", getattr(likelihood, field)))


def _check_dim(likelihood) -> None:
    _make_plain(likelihood, "dim", check_integer)
    if likelihood.dim == 0:
        raise ValueError(f"{type(likelihood).__name__}.dim must not be 0, the dimension of the batch")


def levels_range(levels: int, x: Tensor) -> Range:
    """Where a target of so many steps must lie."""
    if not x.is_floating_point():
        return Range(f"have levels from 0 to {levels - 1}", 0, levels - 1, unscaled=True)
    end = 1 + 1 / (levels - 1)  # where the step ends whose middle is 1
    return Range("lie in [-1, 1]", -end, end)


def _check_levels(likelihood) -> None:
    _make_plain(likelihood, "levels", check_integer)
    if likelihood.levels < 2:
        raise ValueError(f"{type(likelihood).__name__}.levels must be at least 2, got {likelihood.levels}")


BY_NAME: dict[str, Likelihood] = {name: Named(name) for name in PLAIN} | {
    kind.name: kind()
    for kind in (
        BernoulliLogits, Gaussian, Laplace, Categorical, Multinomial, NegativeBinomial, ZeroInflatedNegativeBinomial,
        DiscretizedLogistic, DiscretizedLogisticMixture,
    )
}  # fmt: skip
"""The likelihood that a name stands for."""
