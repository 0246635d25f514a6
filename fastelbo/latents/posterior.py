"""What the latents of a call are: the posterior that the encoder parametrizes, and the prior that its KL is from."""

from collections.abc import Sequence
from math import inf
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, OneHotCategorical

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


@record
class CategoricalPosterior(metaclass=Record):
    """Latents that are groups of classes, by logits `[B, ..., K]` of K classes, which stand in the place of `mu`; there is no
    `logvar`. Pass it as `posterior=`, or its name, `"categorical"`, which stands for one without `unimix`. It is frozen and
    compared by value. A `Categorical` or `OneHotCategorical` in the place of `mu` has it by itself.

    The KL is from a prior's logits, which broadcast to those of the posterior; None: from the uniform distribution.

    Args:
        unimix: the share of the uniform distribution over the K classes that is mixed into the probabilities of posterior and
            prior, so that no KL is infinite: 0.01 in DreamerV3 (Hafner et al., Mastering Diverse Domains through World Models,
            2023). A sample has to be drawn from the same mixture.

    Raises:
        TypeError, ValueError: `unimix` is no number from 0 to less than 1.
    """

    unimix: float = 0.0
    parameter: ClassVar[str] = "logits"
    clamp: ClassVar[None] = None

    def __post_init__(self) -> None:
        canonical(self, "unimix", _checked_share)


def _checked_share(name: str, share) -> float:
    share = check_real(name, share)
    if not 0 <= share < 1:
        raise ValueError(f"{name} must be a share from 0 to less than 1, got {share}")
    return share


LOGVAR, STD, CATEGORICAL = Posterior(), Posterior("std"), CategoricalPosterior()
BY_NAME: dict[str, Posterior | CategoricalPosterior] = {parameter: Posterior(parameter) for parameter in PARAMETERS}
BY_NAME["categorical"] = CATEGORICAL


class Latents(NamedTuple):
    """What the tensors of a call's latents are: those of the posterior, mu and its second parameter or logits alone, those of a
    prior that is not N(0, I) or uniform, and the weights of the KL's elements."""

    posterior: Posterior | CategoricalPosterior
    prior: str | None = None  # what the prior's second tensor is, as `Posterior.parameter`; or "logits"
    weighted: bool = False

    @property
    def is_categorical(self) -> bool:
        return self.posterior.parameter == "logits"

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
        """The posterior's, the prior's, and the weights or None."""
        count = 1 if self.is_categorical else 2
        behind = count if self.prior is None else 2 * count
        return tensors[:count], tensors[count:behind], tensors[behind] if self.weighted else None

    def terms(self, tensors: Sequence[Tensor]) -> Tensor:
        """A tensor of the shape of what has a KL of its own: mu, or a class of the logits."""
        return tensors[0].select(-1, 0) if self.is_categorical else tensors[0]


CLASSES = Categorical, OneHotCategorical


def find_posterior(posterior) -> Posterior | CategoricalPosterior:
    """The posterior that a name stands for, or the object that it is."""
    if isinstance(posterior, Posterior | CategoricalPosterior):
        return posterior
    if not isinstance(posterior, str):
        raise TypeError(f"posterior must be a name, a Posterior or a CategoricalPosterior, got {type(posterior).__name__}")
    check_choice("posterior", posterior, (*PARAMETERS, "categorical"))
    return BY_NAME[posterior]


def is_categorical(mu, posterior) -> bool:
    """Whether latents are classes, from what users pass."""
    if isinstance(mu, Distribution):
        return isinstance(_inner(mu), CLASSES)
    return posterior == "categorical" or isinstance(posterior, CategoricalPosterior)


def as_logits(mu, posterior, prior):
    """The same of logits where distributions of classes came that go together; else as it came, for `check_latents` to see."""
    if isinstance(prior, CLASSES):
        found = _logits("prior", prior)
    elif prior is None:
        found = None
    else:
        return mu, posterior, prior
    if posterior == "logvar":
        posterior = CATEGORICAL
    elif not isinstance(posterior, CategoricalPosterior):
        return mu, posterior, prior
    return _logits("mu", mu), posterior, found


def check_latents(
    mu, logvar, posterior, prior=None, kl_weight=None, *, samples: bool = True
) -> tuple[Latents, tuple[Tensor, ...]]:
    """What the latents are, and their tensors, the prior's expanded to the shape of mu; from what users pass. `samples`: they
    are to be drawn."""
    latents, tensors = _unweighted(mu, logvar, posterior, prior, samples)
    if kl_weight is None:
        return latents, tensors
    if isinstance(kl_weight, int | float):
        raise TypeError(f"kl_weight must be a tensor, with weights of elements of mu, got {kl_weight!r}: beta takes a number")
    check_reals("kl_weight", kl_weight)
    check_broadcasts("kl_weight", kl_weight, "mu", latents.terms(tensors).shape)
    check_device("kl_weight", kl_weight, "mu", tensors[0])
    return latents._replace(weighted=True), (*tensors, kl_weight)


def _unweighted(mu, logvar, posterior, prior, samples: bool) -> tuple[Latents, tuple[Tensor, ...]]:
    posterior, is_normal = find_posterior(posterior), isinstance(mu, Distribution)
    if posterior.parameter == "logits" or (is_normal and is_categorical(mu, posterior)):
        if samples:
            raise ValueError(
                "categorical latents have no sample by a shift and a scale, which this function draws: draw one by"
                " OneHotCategoricalStraightThrough(logits=logits).rsample() or F.gumbel_softmax(logits), decode it, and call"
                " loss(recon_x, x, Categorical(logits=logits)), or loss(recon_x, x, kl=kl_divergence(...))"
            )
        return _check_categorical(mu, logvar, posterior, prior)
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


def _inner(distribution: Distribution) -> Distribution:
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _normal(name: str, distribution: Distribution) -> Normal:
    found = _inner(distribution)
    if not isinstance(found, Normal):
        raise TypeError(f"{name} must be a Normal, or an Independent of one, if a distribution; got {distribution}")
    return found


def _check_categorical(mu, logvar, posterior, prior) -> tuple[Latents, tuple[Tensor, ...]]:
    """`check_latents` of classes."""
    if logvar is not None:
        raise ValueError(
            "logvar must be None where the latents are categorical, whose logits stand in the place of mu; beta goes by name"
        )
    is_distribution = isinstance(mu, Distribution)
    logits = _logits("mu", mu) if is_distribution else mu
    if posterior.parameter != "logits":
        if posterior != LOGVAR:
            raise ValueError(f"posterior must be a CategoricalPosterior where mu is a Categorical; got {posterior!r}")
        posterior = CATEGORICAL
    check_prediction("mu", logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(f"mu must have logits [B, ..., K] of K classes, with the batch first; got {tuple(logits.shape)}")
    if prior is None:
        return Latents(posterior), (logits,)
    name = "prior"
    if isinstance(prior, Distribution):
        name, prior = "prior.logits", _logits("prior", prior)
    elif is_distribution or not isinstance(prior, Tensor):
        expected = "None, a tensor of logits or a Categorical"
        if is_distribution:
            expected = "None, a Categorical or a OneHotCategorical where mu is a distribution"
        raise TypeError(f"prior must be {expected}; got {type(prior).__name__}")
    check_floats(name, prior)
    if prior.dim() == 0 or prior.shape[-1] != logits.shape[-1]:
        raise ValueError(f"{name} must have {logits.shape[-1]} classes in its last dimension, as mu; got {tuple(prior.shape)}")
    return Latents(posterior, "logits"), (logits, _expanded(name, prior, logits))


def _logits(name: str, distribution: Distribution) -> Tensor:
    """Logits of a distribution, by what it was made of: its own are clamped where that were probabilities."""
    found = _inner(distribution)
    if not isinstance(found, CLASSES):
        raise TypeError(
            f"{name} must be a Categorical or a OneHotCategorical, or an Independent of one, where the latents are categorical;"
            f" got {distribution}"
        )
    made = vars(getattr(found, "_categorical", found))
    if "probs" not in made or made.get("_param") is made.get("logits"):
        return found.logits
    possible = found.probs > 0
    return torch.where(possible, torch.log(torch.where(possible, found.probs, 1.0)), -inf)


def _expanded(name: str, value, mu: Tensor) -> Tensor:
    check_floats(name, value)
    check_device(name, value, "mu", mu)
    if not broadcasts(value, mu.shape):
        raise ValueError(
            f"{name} must have the shape of mu or one that broadcasts to it:"
            f" got {name} {tuple(value.shape)} and mu {tuple(mu.shape)}"
        )
    return value.expand(mu.shape)
