"""The terms of the objective, once it is clear where they come from: reconstruction and KL, computed, checked and added up."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from . import traced
from .arguments import (
    check_fits,
    check_parameters,
    check_reals,
    check_scale,
    check_weight,
    factor_of,
    find_likelihood,
    split_reduction,
)
from .autograd import Loss, Settings, loss_forward
from .diagnostics import Monitor
from .divergence import check_beta, check_weighting, divergence_terms
from .layout import dense
from .likelihoods import BY_NAME
from .posteriors import check_gaussian, check_prior, result_dtype
from .reconstruction import Request, class_dim, count, reconstruct
from .scalars import check_real
from .tracing import is_traced
from .values import check_values


class ELBOTerms(NamedTuple):
    """The negative ELBO and its two terms, in nats: three separate tensors, `[]`, or `[B]` with `reduction="none"`."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


class Term(NamedTuple):
    """A reconstruction that has been checked and waits to be computed."""

    name: str
    request: Request
    parameters: list[Tensor]
    x: Tensor
    weight: Tensor | None
    row: str | None  # of the plain likelihood that it is
    scale: float | Tensor


def check_terms(mu, logvar, kl, posterior, prior, weighting, reduction, monitor) -> tuple[str, str]:
    """The reductions of both terms, once it is clear where the KL comes from."""
    if not isinstance(monitor, Monitor | None):
        raise TypeError(f"monitor must be a Monitor, got {type(monitor).__name__}")
    if kl is None:
        if mu is None or (logvar is None and not isinstance(mu, Distribution)):
            raise ValueError("give mu and logvar, or kl: got " + given_or_not(mu=mu, logvar=logvar))
        return split_reduction(reduction)
    if mu is not None or logvar is not None:
        raise ValueError("give mu and logvar, or kl, not both: got " + given_or_not(mu=mu, logvar=logvar, kl=kl))
    if prior is not None or weighting is not None or posterior != "logvar":
        raise ValueError("posterior, prior and weighting must not be given with kl, which is reduced already")
    if isinstance(reduction, tuple | list):
        raise ValueError(f"reduction must be one name where kl is given, which is reduced already; got {reduction!r}")
    return split_reduction(reduction)


def given_or_not(**arguments) -> str:
    return ", ".join(f"{name} {'None' if value is None else 'given'}" for name, value in arguments.items())


def check_reconstruction(name, recon_x, x, likelihood, weight, reduction, scale, target_scale) -> Term:
    likelihood = find_likelihood(likelihood)
    parameters = check_parameters(name, recon_x, likelihood, scale)
    check_reals("x", x)
    check_fits(name, parameters, x, likelihood)
    weight = check_weight(weight, x, class_dim(likelihood, parameters, x))
    request = Request(likelihood, check_real("target_scale", target_scale), reduction, result_dtype(*parameters))
    fixed = isinstance(recon_x, Tensor) and not (isinstance(scale, Tensor) and (scale.requires_grad or scale.dim() > 0))
    row = likelihood.plain(1) if weight is None and fixed else None
    return Term(name, request, parameters, x, weight, row, check_scale(scale, likelihood, x))


def divergence_of(mu, logvar, beta, posterior, prior, weighting, reduction, monitor):
    """The KL, what of it is added to the reconstruction, and the monitor's statistics."""
    mu, second, posterior = check_gaussian(mu, logvar, posterior)
    prior = check_prior(prior, mu)
    beta = check_beta(beta, mu)
    weighting = check_weighting(weighting, mu, prior, beta, reduction)
    return divergence_terms(
        mu, second, posterior=posterior, prior=prior, weighting=weighting, beta=beta, reduction=reduction,
        statistics=monitor is not None,
    )  # fmt: skip


def times(beta: float | Tensor, kl: Tensor) -> Tensor:
    return kl * (beta.to(kl.dtype) if isinstance(beta, Tensor) else beta)


def add_terms(term: Term, divergence, monitor: Monitor | None, known: Tensor | None = None) -> ELBOTerms:
    """The reconstruction, and its sum with the KL's part. `known`: the upstream factor of each row, where it is known."""
    name, request, parameters, x, w, row, scale = term
    kl, weighted, statistics = divergence
    dtype = result_dtype(*parameters, weighted)
    kl = kl.to(dtype, copy=True)  # which the user may write to
    if row is not None:
        settings = Settings(
            likelihood=row,
            scale=scale,
            target_scale=request.target_scale,
            weights=(factor_of(request.reduction, x), 1.0),
            per_sample=request.reduction == "none",
            dtype=dtype,
        )
        terms = plain_terms(settings, name, parameters[0], x, None, None, weighted, 1.0, known)._replace(kl=kl)
    else:
        recon = reconstruct(request._replace(dtype=dtype, known=known), parameters, x, w)
        check_values(request.likelihood, name, parameters, x, w, request.target_scale, recon, scale)
        terms = ELBOTerms(recon + weighted.to(dtype), recon, kl)
    if monitor is not None:
        _record(monitor, term, terms.recon, statistics)
    return terms


def plain_terms(settings: Settings, name: str, recon_x, x, mu, logvar, kl, beta, known: Tensor | None = None) -> ELBOTerms:
    """What `Loss` computes; the prediction may have several rows, one after the other, for each of `x`."""
    if is_traced(recon_x, x, mu, logvar, kl, beta):
        return ELBOTerms(*traced.objective(recon_x, x, mu, logvar, kl, beta, **settings._asdict()))
    (recon_x, x), (mu, logvar) = dense(recon_x, x), dense(mu, logvar)
    tensors = (recon_x, x, mu, logvar, kl, beta)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        terms = Loss.apply(settings, *tensors, known)
    else:
        terms = loss_forward(settings, *tensors)[:3]
    return finish(settings, name, recon_x, x, terms)


def finish(settings: Settings, name: str, recon_x: Tensor, x: Tensor, terms) -> ELBOTerms:
    check_values(BY_NAME[settings.likelihood], name, [recon_x], x, None, settings.target_scale, terms[1])
    return ELBOTerms(*terms)


def _record(monitor: Monitor, term: Term, recon: Tensor, statistics) -> None:
    request, batch = term.request, term.x.shape[0]
    elements = count(request._replace(reduction="mean"), term.parameters, term.x, term.weight)
    factors = {"sum": 1.0, "none": 1.0, "batchmean": batch, "mean": elements}
    monitor.record(batch, recon.detach().sum() * factors[request.reduction], elements, statistics)
