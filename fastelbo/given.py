"""Checks of what an objective is given, beside those of its tensors' shapes."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from .basics.arguments import OF_EACH, REALS, check_batch, check_device, check_number
from .basics.sparse import check_data
from .diagnostics import Monitor
from .engine.call import Objective
from .latents.posterior import LOGVAR
from .latents.weighting import ALL, is_of_each


def checked_beta(beta: Any, x: Any) -> float | Tensor:
    """A number as a float; a tensor as it is, which for each latent dimension is checked with the latents."""
    if is_of_each(beta):
        return beta
    check_data("x", x)
    return check_number("beta", beta, x)


def checked_recon_weight(recon_weight: Any, x: Any) -> float | Tensor:
    check_data("x", x)
    return check_number("recon_weight", recon_weight, x)


def check_target(x: Any, mu: Tensor, reduction: str) -> None:
    """A target for these latents."""
    if isinstance(x, Tensor) and x.dtype in REALS and x.layout == torch.strided and x.device == mu.device:
        if not x.is_nested and x.shape[:1] == mu.shape[:1]:
            return
    check_data("x", x)
    check_device("x", x, "mu", mu)
    if reduction == "none":
        check_batch("x", x, "mu", mu, OF_EACH)


def check_sources(
    mu: Any, logvar: Any, kl: Any, objective: Objective, prior: Any, weighting: Any, kl_weight: Any, reduction: Any,
    monitor: Any,
) -> None:  # fmt: skip
    """Raise unless it is clear where the KL comes from."""
    if not isinstance(monitor, Monitor | None):
        raise TypeError(f"monitor must be a Monitor, got {type(monitor).__name__}")
    if kl is None:
        if mu is None or (logvar is None and not isinstance(mu, Distribution) and objective.posterior.parameter != "logits"):
            advice = "; the reconstruction alone is fastelbo.nll" if mu is logvar is None else ""
            raise ValueError("give mu and logvar, or kl: got " + _given_or_not(mu=mu, logvar=logvar) + advice)
        return
    if mu is not None or logvar is not None:
        raise ValueError("give mu and logvar, or kl, not both: got " + _given_or_not(mu=mu, logvar=logvar, kl=kl))
    if prior is not None or weighting not in (None, ALL) or kl_weight is not None or objective.posterior != LOGVAR:
        raise ValueError("posterior, prior, weighting and kl_weight must not be given with kl, which is reduced already")
    if isinstance(reduction, tuple | list):
        raise ValueError(f"reduction must be one name where kl is given, which is reduced already; got {reduction!r}")


def _given_or_not(**arguments: Any) -> str:
    return ", ".join(f"{name} {'None' if value is None else 'given'}" for name, value in arguments.items())
