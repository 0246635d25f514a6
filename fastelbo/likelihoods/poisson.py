"""Likelihoods of counts: Poisson, by the rate and by its logarithm."""

import torch
from torch import Tensor

from ..basics.gamma import log_factorial
from ..basics.numerics import nan_unless
from ..basics.records import record
from ..basics.scalars import ONE
from ..basics.tracing import is_seen
from .base import Likelihood, OnePass
from .links import Linked, linked
from .values import NONNEGATIVE


@record
class Poisson(Linked):
    """Counts by their rate: `-Poisson(recon_x).log_prob(x)`. Rates and counts are not negative.

    Args:
        mean: what makes the rate of the first of `recon_x`: "identity", "softplus", or "softmax", as in `NegativeBinomial`, of
            (logits, library). For "log" there is `PoissonLog`.
    """

    mean: str = "identity"
    name = "poisson"
    unlinked, unlinked_ranges = ("recon_x",), (NONNEGATIVE,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean == "log":
            raise ValueError("Poisson.mean must not be 'log': that likelihood is PoissonLog, or 'poisson_log'")

    @property
    def kernel(self) -> str | None:  # type: ignore[override]
        return {"identity": "poisson", "softplus": "poisson_softplus", "softmax": "poisson_of_both"}[self.mean]

    @property
    def kernel_at_zero(self) -> str | None:  # type: ignore[override]
        return "poisson_softplus_at_zero" if self.mean == "softplus" else "poisson_at_zero"

    def constants(self, parameters, x):
        """The device functions of softplus have it in them, for the logarithm of a rate that underflows."""
        found = super().constants(parameters, x)
        return found | {"links": (None, None)} if self.mean == "softplus" else found

    def support(self, first, x):
        return NONNEGATIVE

    def nll(self, parameters, x):
        rate, log_rate = self._rates(parameters)
        return _poisson_nll(rate, log_rate, x)

    def sparse_nll(self, parameters, x):
        rate, log_rate = self._rates(parameters)
        own = _poisson_nll(x.of(rate), x.of(log_rate), x.values)
        return nan_unless(rate >= 0, rate).reshape(-1).index_copy(0, x.index, own).view(rate.shape)

    def _rates(self, parameters) -> tuple[Tensor, Tensor]:
        """The rate and its logarithm, which may be finite where the rate is too small for its dtype."""
        (rate,), given = self.link(parameters), parameters[0]
        if self.mean == "softmax":
            library = parameters[1]
            none = library == 0
            log_library = torch.where(none, -torch.inf, torch.log(torch.where(none, 1.0, library)))
            return rate, torch.log_softmax(given, -1) + log_library
        if self.mean == "softplus":
            low = given < -40  # where it is exp to the last digit
            return rate, torch.where(low, given, torch.log(linked("softplus", torch.where(low, 0.0, given))))
        none = rate == 0  # where a logarithm has no derivative in Torch
        return rate, torch.where(none, -torch.inf, torch.log(torch.where(none, 1.0, rate)))

    def at_zero(self, parameters):
        (rate,) = self.link(parameters)
        return nan_unless(rate >= 0, rate)

    def one_pass(self, parameters, x, wants_value, out, spare):
        (rate,), (gradient,), values = parameters, out, None
        if not is_seen(rate) or not rate.min() > SMALLEST:  # of 0, or whose reciprocal overflows, or of NaN
            return None
        if wants_value:
            values = torch.log(rate, out=spare[0]).mul_(x).neg_().add_(rate).add_(log_factorial(x))
        if gradient is not None:
            torch.div(x, rate, out=gradient).neg_().add_(ONE)
        return OnePass(values)

    def one_pass_at_zero(self, parameters, wants_value, out, spare):
        (rate,), (gradient,), values = parameters, out, None
        if not is_seen(rate) or not rate.min() >= 0:
            return None
        if wants_value:
            values = rate.clone() if (own := spare[0]) is None else own.copy_(rate)
        if gradient is not None:
            gradient.fill_(1)
        return OnePass(values)


@record
class PoissonLog(Likelihood):
    """Counts by the logarithm of their rate: `-Poisson(recon_x.exp()).log_prob(x)`. Counts are not negative."""

    name = kernel = "poisson_log"
    kernel_at_zero = "poisson_log_at_zero"

    def support(self, first, x):
        return NONNEGATIVE

    def nll(self, parameters, x):
        (log_rate,) = parameters
        return torch.exp(log_rate) - x * log_rate + log_factorial(x)

    def at_zero(self, parameters):
        return torch.exp(parameters[0])

    def one_pass(self, parameters, x, wants_value, out, spare):
        (log_rate,), (gradient,), values = parameters, out, None
        rate = torch.exp(log_rate, out=spare[0] if gradient is None else gradient)
        if wants_value:
            values = torch.addcmul(rate, x, log_rate, value=-1, out=spare[1]).add_(log_factorial(x))
        if gradient is not None:
            gradient.sub_(x)
        return OnePass(values)

    def one_pass_at_zero(self, parameters, wants_value, out, spare):
        (log_rate,), (gradient,) = parameters, out
        rate = torch.exp(log_rate, out=spare[0] if gradient is None else gradient)
        if gradient is None or not wants_value:
            return OnePass(rate)
        return OnePass(rate.clone() if (own := spare[0]) is None else own.copy_(rate))


def _poisson_nll(rate: Tensor, log_rate: Tensor, x: Tensor) -> Tensor:
    # At a rate of 0, x log(rate) has no derivative in Torch, though it is 0 for x = 0.
    zero = (rate == 0) & (x == 0)
    return rate - x * torch.where(zero, 0.0, log_rate) + log_factorial(x)


SMALLEST = 1e-30  # of a rate by which a count is divided
