"""What a distribution of Torch, or of scvi-tools, stands for in the place of `recon_x`: a likelihood and its tensors.

A distribution that was made of logits gives its logits, and any gives the tensors that it was made of, so that gradients reach
them. The negative log-likelihood is minus the sum of its own `log_prob`, but for a `Bernoulli` of probabilities, which
clamps logarithms at -100 and not the probabilities.
"""

from collections.abc import Callable

import torch
import torch.distributions as D
from torch import Tensor
from torch.distributions import Distribution, Independent

from ..basics.gamma import log_factorial, log_gamma_ratio
from ..basics.layout import without_copies
from ..basics.records import record
from ..basics.sparse import Nonzeros
from ..basics.tracing import is_seen
from . import BY_NAME, find_likelihood
from .base import Likelihood, OnePass
from .bernoulli import Bernoulli, BernoulliLogits, ContinuousBernoulli, ContinuousBernoulliLogits
from .classes import Categorical, Multinomial
from .counts import NegativeBinomial, NegativeBinomialLogits, ZeroInflatedNegativeBinomial
from .location import Gaussian, Laplace, StudentT
from .poisson import Poisson
from .values import POSITIVE

Found = tuple[Likelihood, tuple[Tensor, ...]]


def of_distribution(name: str, distribution: Distribution, likelihood: str | Likelihood | None) -> Found:
    """The likelihood of a distribution, which errors call `name`, and the tensors that parametrize it. `likelihood` is what was
    given beside it: None, or the one that is found."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    found, (first, *others) = _parametrized(name, distribution)
    if likelihood is not None and find_likelihood(likelihood) not in (BY_NAME.get(found.name), found):
        raise ValueError(
            f"likelihood must not be given beside a distribution, which has its own: {name} is a {type(distribution).__name__},"
            f" {found.name!r}; got {likelihood!r}"
        )
    return found, (first, *map(without_copies, others))


class Parametrized(Distribution):
    """What a distribution was found to stand for."""

    def __init__(self, likelihood: Likelihood, tensors: tuple[Tensor, ...]) -> None:
        self.found = likelihood, tensors


def _parametrized(name: str, distribution: Distribution) -> Found:
    if isinstance(distribution, Parametrized):
        return distribution.found
    for kind, parametrized in KNOWN:
        # One that overrides it is another distribution.
        if isinstance(distribution, kind) and type(distribution).log_prob is kind.log_prob:
            return parametrized(distribution)
    if hasattr(distribution, "mu") and hasattr(distribution, "theta"):
        return _of_scvi_tools(distribution)
    known = ", ".join(kind.__name__ for kind, _ in KNOWN)
    raise TypeError(
        f"{name} must be a tensor, a tuple of tensors or one of the distributions {known}, scvi-tools' NegativeBinomial or"
        f" ZeroInflatedNegativeBinomial, or an Independent of one; got {type(distribution).__name__}"
    )


def _is_of_logits(distribution) -> bool:
    """Whether it was made of logits: it computes the other ones when it is asked for them, and keeps both then."""
    return "logits" in distribution.__dict__ and distribution.logits is distribution._param


def _of_bits(of_logits: Likelihood, of_probabilities: Likelihood) -> Callable[[Distribution], Found]:
    def parametrized(distribution) -> Found:
        if _is_of_logits(distribution):
            return of_logits, (distribution.logits,)
        return of_probabilities, (distribution.probs,)

    return parametrized


def _of_student_t(distribution) -> Found:
    df = without_copies(distribution.df)
    # A number in the kernel, where to read it costs no sync.
    if df.numel() == 1 and is_seen(df) and not df.requires_grad:
        return StudentT(df.item()), (distribution.loc, distribution.scale)
    return StudentTOfTensors(), (distribution.loc, distribution.scale, distribution.df)


def _of_scvi_tools(distribution) -> Found:
    if hasattr(distribution, "zi_logits"):
        return _INFLATED, (distribution.mu, distribution.theta, distribution.zi_logits)
    return _DISPERSED, (distribution.mu, distribution.theta)


@record
class StudentTOfTensors(Likelihood):
    """`StudentT` with degrees of freedom that are a tensor: learned ones, some for each feature, or on a GPU."""

    name = "student_t"
    parameters = ("mean", "scale", "df")
    ranges = (None, POSITIVE, POSITIVE)

    def nll(self, parameters, x):
        mean, scale, df = parameters
        tail = torch.log1p(((x - mean) / scale).square() / df)
        normalizer = 0.5 * torch.log(torch.pi * df) - log_gamma_ratio(0.5 * df, torch.full_like(df, 0.5))
        return 0.5 * (df + 1) * tail + torch.log(scale) + normalizer


@record
class MultinomialOfCounts(Multinomial):
    """Torch's `Multinomial`: with its coefficient, n! over the product of all x!, which `Multinomial` leaves out."""

    name = "multinomial"

    def nll(self, parameters, x):
        return super().nll(parameters, x) - self.log_coefficient(x)

    at_zero = Multinomial.at_zero

    def sparse_nll(self, parameters, x):
        return super().sparse_nll(parameters, x) - self.sparse_log_coefficient(x)

    def sparse_one_pass(self, parameters, x, wants_value, out, spare) -> OnePass | None:
        found = super().sparse_one_pass(parameters, x, wants_value, out, spare)
        if found is None or found.values is None:
            return found
        return found._replace(values=found.values + self.sparse_log_coefficient(x))

    def one_pass(self, parameters, x, wants_value, out, spare) -> OnePass | None:
        found = super().one_pass(parameters, x, wants_value, out, spare)
        if found is None or found.values is None:
            return found
        return found._replace(values=found.values + self.log_coefficient(x))  # whose scale is -1

    def log_coefficient(self, x: Tensor) -> Tensor:
        return log_factorial(x.sum(self.dim)) - log_factorial(x).sum(self.dim)

    def sparse_log_coefficient(self, x: Nonzeros) -> Tensor:
        return log_factorial(x.sums(x.values)) - x.sums(log_factorial(x.values))


# Made once: a record is checked when it is made.
_NORMAL, _LAPLACE, _POISSON = Gaussian(), Laplace(), Poisson()
_CLASSES, _COUNTS = Categorical(dim=-1), MultinomialOfCounts()
_FAILURES, _DISPERSED, _INFLATED = NegativeBinomialLogits(), NegativeBinomial(), ZeroInflatedNegativeBinomial()

KNOWN: tuple[tuple[type[Distribution], Callable[..., Found]], ...] = (
    (D.Normal, lambda d: (_NORMAL, (d.loc, d.scale))),
    (D.Laplace, lambda d: (_LAPLACE, (d.loc, d.scale))),
    (D.StudentT, _of_student_t),
    (D.Bernoulli, _of_bits(BernoulliLogits(), Bernoulli())),
    (D.ContinuousBernoulli, _of_bits(ContinuousBernoulliLogits(), ContinuousBernoulli())),
    (D.Poisson, lambda d: (_POISSON, (d.rate,))),
    (D.NegativeBinomial, lambda d: (_FAILURES, (d.logits, d.total_count))),
    (D.Categorical, lambda d: (_CLASSES, (d.logits,))),
    (D.OneHotCategorical, lambda d: (_CLASSES, (d.logits,))),
    (D.Multinomial, lambda d: (_COUNTS, (d.logits,))),
)
"""Distributions of Torch, each with what its likelihood and tensors are; from a subclass before what it is one of."""
