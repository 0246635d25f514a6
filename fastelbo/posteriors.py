"""Posteriors and priors: what encoders parametrize them by, the checks, and the formulas in plain Torch.

The device functions of the same names are in `kernels/posteriors.py`.
"""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from .arguments import check_device, check_floats, check_latents
from .numerics import excess_of_logvar, excess_of_std, excess_of_var, nan_unless
from .scalars import check_real

PARAMETERS = ("logvar", "log_std", "std", "var")


class Posterior(NamedTuple):
    """What an encoder's second output means. Wherever there is `posterior=`, the name of a parameter alone will do.

    Attributes:
        parameter: `"logvar"`: log sigma^2; `"log_std"`: log sigma; `"std"`: sigma; `"var"`: sigma^2. The last two have to be
            positive, which nothing looks at: sigma = 0 has an infinite KL, a negative one becomes NaN.
        clamp: bounds that this output is clamped to, None for one that is not; its gradient is zero outside of them.
            `(-30.0, 20.0)` is what latent diffusion does to `logvar` (Rombach et al., 2022: `DiagonalGaussianDistribution`).
            NaN stays NaN.
    """

    parameter: str = "logvar"
    clamp: tuple[float | None, float | None] | None = None


LOGVAR = Posterior()


class Prior(NamedTuple):
    """The prior N(mu, sigma^2) of a call, of the shape of the latents; `parameter` is what `second` is."""

    mu: Tensor
    second: Tensor
    parameter: str  # "logvar" or "std"


def check_posterior(posterior) -> Posterior:
    """A name, or a `Posterior`."""
    if isinstance(posterior, str):
        posterior = Posterior(posterior)
    if not isinstance(posterior, Posterior):
        raise TypeError(f"posterior must be a name or a Posterior, got {type(posterior).__name__}")
    parameter, clamp = posterior
    if not isinstance(parameter, str) or parameter not in PARAMETERS:
        raise ValueError(f"posterior must be one of {', '.join(map(repr, PARAMETERS))}; got {parameter!r}")
    if clamp is not None:
        if not isinstance(clamp, tuple | list) or len(clamp) != 2:
            raise ValueError(f"posterior.clamp must be a pair (low, high); got {clamp!r}")
        ends = zip(clamp, (-inf, inf), strict=True)
        low, high = (
            end if bound is None else check_real(f"posterior.clamp[{i}]", bound, "a number or None")
            for i, (bound, end) in enumerate(ends)
        )
        if not low <= high:
            raise ValueError(f"posterior.clamp must be a pair (low, high) with low <= high; got {clamp!r}")
        clamp = None if (low, high) == (-inf, inf) else (low, high)
    return Posterior(parameter, clamp)


def check_gaussian(mu, second, posterior) -> tuple[Tensor, Tensor, Posterior]:
    """The mean, the second parameter and what that is, from two tensors or from a Normal in place of `mu`."""
    posterior = check_posterior(posterior)
    if isinstance(mu, Distribution):
        normal = _normal("mu", mu)
        if second is not None:
            raise ValueError("give mu and logvar, or a Normal, not both: mu is a distribution, and logvar was given")
        if posterior not in (LOGVAR, Posterior("std")):
            raise ValueError(f"posterior is for tensors, and a Normal has its own parameters; got {posterior!r}")
        mu, second, posterior = normal.loc, normal.scale, Posterior("std")
        if mu.dim() == 0:
            raise ValueError("mu must have the batch as its first dimension, got a distribution without dimensions")
    check_latents(mu, second)
    return mu, second, posterior


def check_prior(prior, mu: Tensor) -> Prior | None:
    """None, a pair `(mu, logvar)` or a Normal; expanded to the shape of `mu`."""
    if prior is None or isinstance(prior, Prior):
        return prior
    if isinstance(prior, Distribution):
        normal = _normal("prior", prior)
        found = Prior(_expanded("prior.loc", normal.loc, mu), _expanded("prior.scale", normal.scale, mu), "std")
    elif isinstance(prior, tuple | list):
        if len(prior) != 2:
            raise ValueError(f"prior must be a pair (mu, logvar) or a Normal; got {len(prior)} values")
        found = Prior(*(_expanded(f"prior[{i}]", value, mu) for i, value in enumerate(prior)), "logvar")
    else:
        raise TypeError(f"prior must be None, a pair (mu, logvar) or a Normal, got {type(prior).__name__}")
    return found


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
    try:
        return value.expand(mu.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must have the shape of mu or one that broadcasts to it:"
            f" got {name} {tuple(value.shape)} and mu {tuple(mu.shape)}"
        ) from None


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Results and arithmetic are float64 if an input is, otherwise float32: sums overflow float16, and bfloat16 has 8 bits."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def clamped(second: Tensor, posterior: Posterior, dtype: torch.dtype) -> Tensor:
    second = second.to(dtype)
    if posterior.clamp is not None:
        low, high = posterior.clamp
        # As torch.clamp, but that the gradient by NaN is not zero.
        second = torch.where(second < low, low, torch.where(second > high, high, second))
    return not_negative(second) if posterior.parameter in ("std", "var") else second


def not_negative(raw: Tensor) -> Tensor:
    """NaN with a gradient of NaN where it is negative: squares would hide the sign from the KL, and sums from z."""
    return nan_unless(raw >= 0, raw)


def std(raw: Tensor, parameter: str) -> Tensor:
    """sigma, from a parameter that is clamped already."""
    if parameter == "logvar":
        return torch.exp(0.5 * raw)
    if parameter == "log_std":
        return torch.exp(raw)
    return torch.sqrt(raw) if parameter == "var" else raw


def log_variance(raw: Tensor, parameter: str) -> Tensor:
    if parameter == "logvar":
        return raw
    if parameter == "log_std":
        return 2 * raw
    return torch.log(raw) if parameter == "var" else 2 * torch.log(raw)


def excess(raw: Tensor, parameter: str) -> Tensor:
    """sigma^2 - 1 - log sigma^2, without cancellation in its derivative."""
    if parameter == "std":
        return excess_of_std(raw)
    return excess_of_var(raw) if parameter == "var" else excess_of_logvar(log_variance(raw, parameter))


def kl_elements(mu: Tensor, second: Tensor, prior: Prior | None, posterior: Posterior, dtype: torch.dtype) -> Tensor:
    """KL(N(mu, sigma^2) || prior) of each element, in nats."""
    mu, raw = mu.to(dtype), clamped(second, posterior, dtype)
    parameter = posterior.parameter
    if prior is None:
        return 0.5 * (mu.square() + excess(raw, parameter))
    prior_raw = prior.second.to(dtype)
    distance = mu - prior.mu.to(dtype)
    if prior.parameter == "logvar":
        distance = distance * torch.exp(-0.5 * prior_raw)
    else:
        prior_raw = not_negative(prior_raw)
        distance = distance / prior_raw
    if prior.parameter == "std" and parameter in ("std", "var"):
        # Both terms from one quotient: what its rounding does to them cancels, where the two deviations are nearly alike.
        beyond = excess_of_std(std(raw, parameter) / prior_raw)
    else:
        beyond = excess_of_logvar(log_variance(raw, parameter) - log_variance(prior_raw, prior.parameter))
    return 0.5 * (distance.square() + beyond)


def sample(mu: Tensor, second: Tensor, eps: Tensor, posterior: Posterior, dtype: torch.dtype) -> Tensor:
    """z = mu + sigma * eps."""
    z = mu.to(dtype) + eps.to(dtype) * std(clamped(second, posterior, dtype), posterior.parameter)
    return z.to(torch.promote_types(mu.dtype, second.dtype))
