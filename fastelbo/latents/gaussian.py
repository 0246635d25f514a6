"""The formulas of Gaussian latents in plain Torch, which autograd can differentiate any number of times: sample, KL, densities.

The device functions of the same names are in `kernels/posteriors.py`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..basics.arguments import result_dtype
from ..basics.numerics import excess_of_logvar, excess_of_std, excess_of_var, nan_unless
from ..basics.scalars import as_tensor
from .posterior import Latents, Posterior

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

MINUS_HALF = as_tensor(-0.5, torch.float32)  # for eager calls: see ONE in `likelihoods/base.py`


def clamped(second: Tensor, posterior: Posterior, dtype: torch.dtype) -> Tensor:
    """Within its bounds, and NaN where a deviation or a variance is negative."""
    second = bounded(second, posterior, dtype)
    return not_negative(second) if posterior.parameter in ("std", "var") else second


def bounded(second: Tensor, posterior: Posterior, dtype: torch.dtype) -> Tensor:
    """Within its bounds."""
    second = second.to(dtype)
    if posterior.clamp is not None:
        low, high = posterior.clamp
        # As torch.clamp, but that the gradient by NaN is not zero.
        second = torch.where(second < low, low, torch.where(second > high, high, second))
    return second


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


def inverse_std(raw: Tensor, parameter: str) -> Tensor:
    if parameter == "logvar":
        return torch.exp(-0.5 * raw)
    return torch.exp(-raw) if parameter == "log_std" else 1 / std(raw, parameter)


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


def kl_elements(latents: Latents, mu: Tensor, second: Tensor, *prior: Tensor | None) -> Tensor:
    """KL(N(mu, sigma^2) || prior) of each element, in nats."""
    posterior, kind = latents.posterior, latents.prior
    dtype = result_dtype(mu, second, *(p for p in prior if p is not None))
    mu, parameter = mu.to(dtype), posterior.parameter
    if kind is None:  # whose logarithm is NaN of what is negative
        return 0.5 * (mu.square() + excess(bounded(second, posterior, dtype), parameter))
    raw = clamped(second, posterior, dtype)
    prior_mu, prior_raw = (p.to(dtype) for p in prior)
    if kind in ("std", "var"):
        prior_raw = not_negative(prior_raw)
    distance = mu - prior_mu
    distance = distance / prior_raw if kind == "std" else distance * inverse_std(prior_raw, kind)
    # Both terms from one quotient: what its rounding does to them cancels, where the two deviations are nearly alike.
    if kind == parameter == "var":
        beyond = excess_of_var(raw / prior_raw)
    elif kind == "std" and parameter in ("std", "var"):
        beyond = excess_of_std(std(raw, parameter) / prior_raw)
    else:
        beyond = excess_of_logvar(log_variance(raw, parameter) - log_variance(prior_raw, kind))
    return 0.5 * (distance.square() + beyond)


class Slope(NamedTuple):
    """A derivative of each element: a number times a tensor."""

    tensor: Tensor
    number: float

    def by_log_variance(self, raw: Tensor, parameter: str) -> "Slope":
        """That by the parameter, from that by the logarithm of the variance."""
        if parameter == "logvar":
            return self
        number = self.number if parameter == "var" else 2 * self.number
        return Slope(self.tensor if parameter == "log_std" else self.tensor / raw, number)


def kl_in_one_pass(latents: Latents, mu: Tensor, raw: Tensor, prior: Sequence[Tensor]) -> tuple[Tensor, list[Slope]] | None:
    """Twice the KL of each element of a posterior without clamp, and the derivatives of the KL by all tensors, which come in
    one dtype; None where a deviation or variance is not positive, which `kl_elements` is for."""
    parameter, kind = latents.posterior.parameter, latents.prior
    if parameter in ("std", "var") and not raw.min() > 0:
        return None
    if kind in ("std", "var") and not prior[1].min() > 0:
        return None
    distance = by_mu = mu
    if kind is not None:
        prior_mu, prior_raw = prior
        inverse = torch.exp(prior_raw * MINUS_HALF) if kind == "logvar" else inverse_std(prior_raw, kind)
        distance = torch.sub(mu, prior_mu)
        distance = distance.div_(prior_raw) if kind == "std" else distance.mul_(inverse)
        by_mu = distance * inverse
    if parameter == "var" and kind in (None, "var"):
        ratio = raw if kind is None else raw / prior_raw
        slope, log, times = ratio - 1, torch.log(ratio), 1
    elif parameter in ("std", "var") and kind in (None, "std"):
        ratio = std(raw, parameter) if kind is None else std(raw, parameter) / prior_raw
        slope = ratio - 1
        slope, log, times = slope.addcmul_(slope, ratio), torch.log(ratio), 2  # ratio^2 - 1
    else:
        log = log_variance(raw, parameter)
        log = log if kind is None else log - log_variance(prior_raw, kind)
        slope, times = torch.expm1(log), 1
    slopes = [Slope(by_mu, 1.0), Slope(slope, 0.5).by_log_variance(raw, parameter)]
    beyond = torch.addcmul(slope, distance, distance)
    if kind is None:
        return beyond.sub_(log, alpha=times), slopes
    slopes += [Slope(by_mu, -1.0), Slope(beyond, -0.5).by_log_variance(prior_raw, kind)]
    return torch.sub(beyond, log, alpha=times), slopes


def sample_in_one_pass(parameter: str, mu: Tensor, raw: Tensor, eps: Tensor) -> tuple[Tensor, Slope]:
    """z, and its derivative by the second parameter."""
    if parameter == "std" and not raw.min() >= 0:
        eps = not_negative(raw) * 0 + eps
    sigma = std(raw, parameter)
    moved = torch.mul(sigma, eps)
    if parameter in ("logvar", "log_std"):
        return moved + mu, Slope(moved, 0.5 if parameter == "logvar" else 1.0)
    return moved + mu, Slope(eps, 1.0) if parameter == "std" else Slope(eps / sigma, 0.5)


def sample(posterior: Posterior, mu: Tensor, second: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """z = mu + sigma * eps, computed in `dtype`."""
    z = mu.to(dtype) + eps.to(dtype) * std(clamped(second, posterior, dtype), posterior.parameter)
    return z.to(torch.promote_types(mu.dtype, second.dtype))


def log_prior(z: Tensor, latents: Latents, prior: tuple[Tensor, ...]) -> Tensor:
    """log p(z) of each element, in nats."""
    if latents.prior is None:
        return -0.5 * z.square() - HALF_LOG_2PI
    prior_mu, raw = (p.to(z.dtype) for p in prior)
    if latents.prior in ("std", "var"):
        raw = not_negative(raw)
    distance = (z - prior_mu) * inverse_std(raw, latents.prior)
    return -0.5 * distance.square() - 0.5 * log_variance(raw, latents.prior) - HALF_LOG_2PI
