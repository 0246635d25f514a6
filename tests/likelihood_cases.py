"""Every likelihood, with inputs and with the truth about them from `torch.distributions` or a formula written down here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

from fastelbo.likelihoods import (
    BernoulliLogits,
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    Laplace,
    Likelihood,
    Multinomial,
    NegativeBinomial,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
)

SHAPE = (3, 4, 5, 6)


class Case(NamedTuple):
    """`parameters(*shapes)` draws what parametrizes the likelihood, `target(shape)` a target, both in float64.

    `truth(parameters, x)` is the negative log-likelihood of each term. `shapes`: of the parameters.
    """

    name: str
    likelihood: str | Likelihood
    parameters: Callable[..., list[Tensor]]
    target: Callable[[], Tensor]
    truth: Callable[[list[Tensor], Tensor], Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def make(self, dtype=torch.float64, device="cpu") -> tuple[list[Tensor], Tensor]:
        parameters = [p.to(device, dtype).requires_grad_() for p in self.parameters(*self.shapes)]
        x = self.target().to(device)
        return parameters, x if not x.is_floating_point() else x.to(dtype)

    def elementwise(self) -> bool:
        return self.name.split(",")[0] not in ("categorical", "multinomial")


def _double(shape) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _real(*shapes) -> list[Tensor]:
    return [_double(shape) for shape in shapes]


def _first_real_others_positive(first, *others) -> list[Tensor]:
    return [_double(first), *(torch.exp(_double(shape)) for shape in others)]


def _positive(*shapes) -> list[Tensor]:
    return [torch.exp(_double(shape)) for shape in shapes]


def _counts() -> Tensor:
    return torch.poisson(torch.exp(1.5 * _double(SHAPE)))


def _bins() -> Tensor:
    """Of 256 levels in [-1, 1], with both ends."""
    levels = torch.randint(0, 256, SHAPE)
    levels.view(-1)[:4] = torch.tensor([0, 255, 1, 254])
    return 2 * levels.double() / 255 - 1


def _normal(kind: str, soft_min: float | None = None):
    def truth(parameters, x):
        return -D.Normal(parameters[0], scale_of(kind, parameters[1], soft_min)).log_prob(x)

    return truth


def _laplace(kind: str, soft_min: float | None = None):
    def truth(parameters, x):
        return -D.Laplace(parameters[0], scale_of(kind, parameters[1], soft_min)).log_prob(x)

    return truth


def _student_t(df: float, kind: str = "scale"):
    def truth(parameters, x):
        scale = scale_of(kind, parameters[1]) if len(parameters) == 2 else 0.3
        return -D.StudentT(df, parameters[0], scale, validate_args=False).log_prob(x)

    return truth


def scale_of(kind: str, given: Tensor, soft_min: float | None = None) -> Tensor:
    log_scale = {"scale": given.log() if kind == "scale" else given, "log_scale": given, "logvar": given / 2}[kind]
    if soft_min is not None:
        log_scale = soft_min + torch.logaddexp(log_scale - soft_min, torch.zeros_like(given))
    return log_scale.exp()


def _negative_binomial(parameters, x):
    """torch.distributions' formula, with scvi-tools' 1e-8 in the logarithms."""
    (mean, theta), eps = parameters, 1e-8
    logits = (mean + eps).log() - (theta + eps).log()
    if mean.dtype == torch.float64:
        log_p = theta * ((theta + eps) / (theta + mean + eps)).log() + x * ((mean + eps) / (theta + mean + eps)).log()
        return -(log_p + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1))
    return -D.NegativeBinomial(theta, logits=logits).log_prob(x)


def _zero_inflated(parameters, x):
    mean, theta, logits = parameters
    log_count = -_negative_binomial((mean, theta), x) + F.logsigmoid(-logits)
    with_zero = torch.logaddexp(F.logsigmoid(logits), log_count)
    return -torch.where(x == 0, with_zero, log_count)


def _weighted_bernoulli(parameters, x):
    logits, weight = parameters if len(parameters) == 2 else (parameters[0], 3.0)
    return -(weight * x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits))


def _bins_over(low: float, high: float):
    return lambda: low + (_bins() + 1) * (high - low) / 2


def _discretized_over(low: float, high: float, levels: int = 256):
    """In the interval's own units."""

    def truth(parameters, x):
        half = (high - low) / (levels - 1) / 2
        mean, scale = low + (parameters[0] + 1) * (high - low) / 2, parameters[1].exp() * (high - low) / 2
        b, a = ((x + side - mean) / scale for side in (-half, half))
        a, b = torch.where(x > high - half / 2, torch.inf, a), torch.where(x < low + half / 2, -torch.inf, b)
        a, b = torch.where(a + b > 0, -b, a), torch.where(a + b > 0, -a, b)
        upper, lower = F.logsigmoid(a), F.logsigmoid(b)
        return -(upper + torch.log(-torch.expm1(lower - upper)))

    return truth


def _discretized(kind: str, levels: int = 256):
    def truth(parameters, x):
        mean, inverse, half = parameters[0], 1 / scale_of(kind, parameters[1]), 1 / (levels - 1)
        a, b = (x + half - mean) * inverse, (x - half - mean) * inverse
        a, b = torch.where(x > 1 - half / 2, torch.inf, a), torch.where(x < -1 + half / 2, -torch.inf, b)
        # Both on the side of the mean where neither sigmoid is near 1.
        a, b = torch.where(a + b > 0, -b, a), torch.where(a + b > 0, -a, b)
        upper, lower = F.logsigmoid(a), F.logsigmoid(b)
        return -(upper + torch.log(-torch.expm1(lower - upper)))

    return truth


def _soft(dim: int):
    def truth(parameters, x):
        return -(F.log_softmax(parameters[0], dim) * x).sum(dim)

    return truth


def _labels(ignored: bool = False) -> Tensor:
    labels = torch.randint(0, 4, (3, 5, 6))
    if ignored:
        labels[labels == 2] = -100
    return labels


def _categorical(parameters, x):
    log_prob = D.Categorical(logits=parameters[0].movedim(1, -1)).log_prob(x.clamp_min(0))
    return torch.where(x < 0, 0.0, -log_prob)


CHANNEL, FEATURE = (4, 1, 1), (6,)


def _uniform(shape) -> list[Tensor]:
    return [torch.rand(shape, dtype=torch.float64)]


def _reals() -> Tensor:
    return _double(SHAPE)


def _units() -> Tensor:
    return torch.rand(SHAPE, dtype=torch.float64)


def _zero_inflated_parameters(mean, theta, logits) -> list[Tensor]:
    return [*_positive(mean, theta), _double(logits)]


def _linked(mean: Callable[[Tensor], Tensor], truth):
    """The truth of what a likelihood with its links inside takes."""
    return lambda p, x: truth([mean(p[0]), *(value.exp() for value in p[1:2]), *p[2:]], x)


def _poisson(parameters, x):
    return -D.Poisson(parameters[0], validate_args=False).log_prob(x)


def _logits_and_library(*shapes) -> list[Tensor]:
    return [*map(_double, shapes[:-1]), 40 * torch.rand(shapes[-1], dtype=torch.float64) + 1]


def _of_library(truth):
    """Of logits, dispersions by their logarithm, and a library."""
    return lambda p, x: truth([p[-1] * p[0].softmax(-1), *(value.exp() for value in p[1:-1])], x)


def _logistic(log: bool):
    def parameters(mean, scale):
        log_scale = _double(scale) - 2.5
        return [0.5 * _double(mean), log_scale if log else torch.exp(log_scale)]

    return parameters


def _continuous(parameters, x):
    return -D.ContinuousBernoulli(parameters[0], validate_args=False).log_prob(x)


def _continuous_logits(parameters, x):
    return -D.ContinuousBernoulli(logits=parameters[0], validate_args=False).log_prob(x)


WHOLE, EACH = (SHAPE,), (SHAPE, SHAPE)
LIBRARY = (*SHAPE[:-1], 1)
OF_CHANNELS, OF_FEATURES = (SHAPE, CHANNEL), (SHAPE, FEATURE)
POSITIVE_SECOND = _first_real_others_positive

CASES = {
    case.name: case
    for case in (
        Case("l1", "l1", _real, _reals, lambda p, x: (p[0] - x).abs(), WHOLE),
        Case("gaussian, scale", "gaussian", POSITIVE_SECOND, _reals, _normal("scale"), EACH),
        Case("gaussian, log scale 0-d", Gaussian(parameter="log_scale"), _real, _reals, _normal("log_scale"), (SHAPE, ())),
        Case(
            "gaussian, soft log scale", Gaussian(parameter="log_scale", soft_min=-1.0), _real, _reals,
            _normal("log_scale", -1.0), OF_CHANNELS,
        ),
        Case("gaussian, soft scale", Gaussian(soft_min=-1.0), POSITIVE_SECOND, _reals, _normal("scale", -1.0), EACH),
        Case("gaussian, logvar", Gaussian(parameter="logvar"), _real, _reals, _normal("logvar"), OF_FEATURES),
        Case("laplace, scale", "laplace", POSITIVE_SECOND, _reals, _laplace("scale"), OF_FEATURES),
        Case("laplace, log scale", Laplace(parameter="log_scale"), _real, _reals, _laplace("log_scale"), EACH),
        Case(
            "laplace, logvar", Laplace(parameter="logvar", soft_min=-2.0), _real, _reals, _laplace("logvar", -2.0), OF_CHANNELS
        ),
        Case("student_t", StudentT(3.0), POSITIVE_SECOND, _reals, _student_t(3.0), EACH),
        Case(
            "student_t, log scale", StudentT(5.0, parameter="log_scale"), _real, _reals, _student_t(5.0, "log_scale"),
            OF_FEATURES,
        ),
        Case("student_t, alone", StudentT(2.0, scale=0.3), _real, _reals, _student_t(2.0), WHOLE),
        Case("poisson", "poisson", _positive, _counts, lambda p, x: -D.Poisson(p[0]).log_prob(x), WHOLE),
        Case("poisson_log", "poisson_log", _real, _counts, lambda p, x: -D.Poisson(p[0].exp()).log_prob(x), WHOLE),
        Case("negative_binomial", "negative_binomial", _positive, _counts, _negative_binomial, OF_FEATURES),
        Case("negative_binomial, each", "negative_binomial", _positive, _counts, _negative_binomial, EACH),
        Case(
            "zero_inflated", "zero_inflated_negative_binomial", _zero_inflated_parameters, _counts, _zero_inflated,
            (SHAPE, FEATURE, SHAPE),
        ),
        Case("poisson, softplus", Poisson("softplus"), _real, _counts, _linked(F.softplus, _poisson), WHOLE),
        Case(
            "poisson, softmax", Poisson("softmax"), _logits_and_library, _counts, _of_library(_poisson), (SHAPE, LIBRARY)
        ),
        Case(
            "negative_binomial, log", NegativeBinomial("log", "log"), _real, _counts, _linked(torch.exp, _negative_binomial),
            OF_FEATURES,
        ),
        Case(
            "negative_binomial, softmax", NegativeBinomial("softmax", "log"), _logits_and_library, _counts,
            _of_library(_negative_binomial), (SHAPE, FEATURE, LIBRARY),
        ),
        Case(
            "zero_inflated, softplus", ZeroInflatedNegativeBinomial("softplus", "log"), _real, _counts,
            _linked(F.softplus, _zero_inflated), (SHAPE, FEATURE, SHAPE),
        ),
        Case("discretized_logistic", "discretized_logistic", _logistic(True), _bins, _discretized("log_scale"), EACH),
        Case(
            "discretized_logistic, scale", DiscretizedLogistic("scale"), _logistic(False), _bins, _discretized("scale"),
            OF_CHANNELS,
        ),
        Case(
            "discretized_logistic, [0, 1]", DiscretizedLogistic(interval=(0, 1)), _logistic(True), _bins_over(0, 1),
            _discretized_over(0, 1), EACH,
        ),
        Case("continuous_bernoulli", "continuous_bernoulli", _uniform, _units, _continuous, WHOLE),
        Case("continuous_bernoulli_logits", "continuous_bernoulli_logits", _real, _units, _continuous_logits, WHOLE),
        Case("pos_weight", BernoulliLogits(3.0), _real, _units, _weighted_bernoulli, WHOLE),
        Case("pos_weight of features", "bernoulli_logits", POSITIVE_SECOND, _units, _weighted_bernoulli, OF_FEATURES),
        Case("categorical", "categorical", _real, _labels, _categorical, WHOLE),
        Case("categorical, ignored", Categorical(), _real, lambda: _labels(True), _categorical, WHOLE),
        Case("categorical, soft", Categorical(), _real, lambda: _double(SHAPE).softmax(1), _soft(1), WHOLE),
        Case("multinomial", "multinomial", _real, _counts, _soft(-1), WHOLE),
        Case("multinomial, dim 2", Multinomial(2), _real, _counts, _soft(2), WHOLE),
    )
}  # fmt: skip


def recon_x(parameters: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return parameters[0] if len(parameters) == 1 else tuple(parameters)


def reduce(terms: Tensor, reduction: str, weight: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """The reduction of terms under weights, of which `counted` says the ones that a mean divides by."""
    w = torch.ones_like(terms) if weight is None else weight.to(terms).expand_as(terms)
    if counted is not None:
        w = w * counted
    values = torch.where(w == 0, 0.0, terms * w)
    if reduction == "none":
        return values.flatten(1).sum(1)
    return {"sum": 1.0, "batchmean": 1 / max(len(terms), 1), "mean": 1 / w.sum()}[reduction] * values.sum()
