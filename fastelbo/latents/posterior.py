"""What the latents of a call are: the posterior that the encoder parametrizes, and the prior that its KL is from."""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ..basics.arguments import (
    broadcasts,
    check_alike,
    check_broadcasts,
    check_device,
    check_floats,
    check_prediction,
    check_reals,
)
from ..basics.records import Record, canonical, check_choice, record
from ..basics.scalars import check_real

PARAMETERS = ("logvar", "log_std", "std", "var")


@record
class Posterior(metaclass=Record):
    """What an encoder's second output is, and the bounds that it is clamped to. Pass it, or the name of a parameter alone, as
    `posterior=`: `"logvar"` and `Posterior()` are the same. It is frozen and compared by value.

    A prior that is a pair of tensors is parametrized alike: log sigmas go with log sigmas. `clamp` does not apply to it.

    Args:
        parameter: `"logvar"` (log sigma^2), `"log_std"` (log sigma), `"std"` (sigma) or `"var"` (sigma^2). The last two have to
            be positive, which nothing checks: sigma = 0 has an infinite KL, and a negative sigma becomes NaN.
        clamp: the bounds (low, high), numbers, or None for a side without one. The gradient outside of them is 0, and NaN stays
            NaN. `(-30.0, 20.0)` is what latent diffusion does to `logvar` (Rombach et al., 2022:
            `DiagonalGaussianDistribution`).

    Raises:
        TypeError, ValueError: `parameter` is unknown, or `clamp` is no pair of numbers with low <= high.
    """

    parameter: str = "logvar"
    clamp: tuple[float | None, float | None] | None = None

    def __post_init__(self) -> None:
        check_choice("Posterior.parameter", self.parameter, PARAMETERS)
        canonical(self, "clamp", _checked_clamp)


def _checked_clamp(name: str, clamp) -> tuple[float, float] | None:
    if clamp is None:
        return None
    if not isinstance(clamp, tuple | list) or len(clamp) != 2:
        raise ValueError(f"{name} must be a pair (low, high); got {clamp!r}")
    ends = zip(clamp, (-inf, inf), strict=True)
    low, high = (
        end if bound is None else check_real(f"{name}[{i}]", bound, "a number or None") for i, (bound, end) in enumerate(ends)
    )
    if not low <= high:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high; got {clamp!r}")
    return None if (low, high) == (-inf, inf) else (low, high)


LOGVAR, STD = Posterior(), Posterior("std")
BY_NAME = {parameter: Posterior(parameter) for parameter in PARAMETERS}


class Latents(NamedTuple):
    """What the tensors of a call's latents are: mu and its second parameter, then those of a prior that is not N(0, I), and the
    weights of the KL's elements."""

    posterior: Posterior
    prior: str | None = None  # what the prior's second tensor is, as `Posterior.parameter`
    weighted: bool = False

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
        """`(mu and second, the prior's two or none, weights or None)`."""
        n = 2 if self.prior is None else 4
        return tensors[:2], tensors[2:n], tensors[n] if self.weighted else None


def find_posterior(posterior) -> Posterior:
    """The posterior that a name stands for, or the object that it is."""
    if isinstance(posterior, Posterior):
        return posterior
    if not isinstance(posterior, str):
        raise TypeError(f"posterior must be a name or a Posterior, got {type(posterior).__name__}")
    check_choice("posterior", posterior, PARAMETERS)
    return BY_NAME[posterior]


def check_latents(mu, logvar, posterior, prior=None, kl_weight=None) -> tuple[Latents, tuple[Tensor, ...]]:
    """What the latents are, and their tensors, the prior's expanded to the shape of mu; from what users pass."""
    latents, tensors = _gaussians(mu, logvar, posterior, prior)
    if kl_weight is None:
        return latents, tensors
    if isinstance(kl_weight, int | float):
        raise TypeError(f"kl_weight must be a tensor, with weights of elements of mu, got {kl_weight!r}: beta takes a number")
    check_reals("kl_weight", kl_weight)
    check_broadcasts("kl_weight", kl_weight, "mu", tensors[0].shape)
    check_device("kl_weight", kl_weight, "mu", tensors[0])
    return latents._replace(weighted=True), (*tensors, kl_weight)


def _gaussians(mu, logvar, posterior, prior) -> tuple[Latents, tuple[Tensor, ...]]:
    posterior, is_normal = find_posterior(posterior), isinstance(mu, Distribution)
    if is_normal:
        normal = _normal("mu", mu)
        if logvar is not None:
            raise ValueError("give mu and logvar, or a Normal, not both: mu is a distribution, and logvar was given")
        if (posterior.parameter, posterior.clamp) not in (("logvar", None), ("std", None)):
            raise ValueError(f"posterior is for tensors, and a Normal has its own parameters; got {posterior!r}")
        mu, logvar, posterior = normal.loc, normal.scale, STD
        if mu.dim() == 0:
            raise ValueError("mu must have the batch as its first dimension, got a distribution without dimensions")
    check_prediction("mu", mu)
    check_prediction("logvar", logvar)
    check_alike("logvar", logvar, "mu", mu)
    if prior is None:
        return Latents(posterior), (mu, logvar)
    if isinstance(prior, Distribution):
        normal = _normal("prior", prior)
        tensors = _expanded("prior.loc", normal.loc, mu), _expanded("prior.scale", normal.scale, mu)
        return Latents(posterior, "std"), (mu, logvar, *tensors)
    if not isinstance(prior, tuple | list):
        raise TypeError(f"prior must be None, a pair (mu, logvar) or a Normal, got {type(prior).__name__}")
    if len(prior) != 2:
        raise ValueError(f"prior must be a pair (mu, logvar) or a Normal; got {len(prior)} values")
    if is_normal:
        raise ValueError("prior must be a Normal where mu is one: a pair is parametrized as the posterior's tensors are")
    tensors = _expanded("prior[0]", prior[0], mu), _expanded("prior[1]", prior[1], mu)
    return Latents(posterior, posterior.parameter), (mu, logvar, *tensors)


def _normal(name: str, distribution: Distribution) -> Normal:
    found = distribution
    while isinstance(found, Independent):
        found = found.base_dist
    if not isinstance(found, Normal):
        raise TypeError(f"{name} must be a Normal, or an Independent of one, if a distribution; got {distribution}")
    return found


def _expanded(name: str, value, mu: Tensor) -> Tensor:
    check_floats(name, value)
    check_device(name, value, "mu", mu)
    if not broadcasts(value, mu.shape):
        raise ValueError(
            f"{name} must have the shape of mu or one that broadcasts to it:"
            f" got {name} {tuple(value.shape)} and mu {tuple(mu.shape)}"
        )
    return value.expand(mu.shape)
