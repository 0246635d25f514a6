"""Samples of the posterior, by the reparameterization of Kingma and Welling (2013), and its KL from the prior."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from . import traced
from .arguments import check_generator, check_latents, check_noise, check_reduction, factor_of
from .autograd import Sample, sample_forward
from .backend import backend_for
from .divergence import KINDS, Reduced, reduced
from .layout import dense_latents, layout_of
from .posteriors import LOGVAR, Posterior, Prior, check_gaussian, check_prior, result_dtype
from .tracing import is_traced


class SampleKL(NamedTuple):
    """A sample z of the shape of `mu`, and the KL in nats: `[]`, or `[B]` with `reduction="none"`."""

    z: Tensor
    kl: Tensor


def reparameterize(
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    *,
    posterior: str | Posterior = "logvar",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample `mu + sigma * eps` of N(mu, sigma^2), differentiable by `mu`, `logvar` and `eps`.

    On a CPU the noise is what `torch.randn_like` gives for the same seed. On a GPU it comes from a Philox stream of this
    library's own, whose seed follows `torch.manual_seed`: other values than `torch.randn_like`, made again in backward
    instead of stored.

    Args:
        mu: mean, `[B, ...]`, float16, bfloat16, float32 or float64; or a `torch.distributions.Normal`, or an `Independent` of
            one, which stands for `mu` and `logvar`.
        logvar: logarithm of the variance, of the shape of `mu`, or what `posterior` says that it is.
        posterior: what `logvar` is: `"logvar"`, `"log_std"`, `"std"`, `"var"`, or a `Posterior`.
        eps: noise to use, of the shape of `mu`.
        generator: draws the noise, in place of the default generator; on the device of `mu`.

    Returns:
        z, of the shape of `mu` and the wider of the two dtypes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or both `eps` and `generator` came.
    """
    if posterior != "logvar" or not isinstance(mu, Tensor):
        mu, logvar, posterior = check_gaussian(mu, logvar, posterior)
        if posterior != LOGVAR:
            return sample_of(mu, logvar, posterior, None, None, eps, generator).z
    check_latents(mu, logvar)
    return sample(mu, logvar, draw(mu, logvar, eps, generator), 1.0, False, wants_kl=False)[0]


def sample_kl(
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    *,
    posterior: str | Posterior = "logvar",
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    reduction: str = "sum",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SampleKL:
    """A sample as from `reparameterize`, and its KL from the prior, from one read of all of them.

    Args:
        mu, logvar, posterior, eps, generator: as in `reparameterize`.
        prior: as in `kl_divergence`; None: N(0, I).
        reduction: of the KL: `"sum"`, `"batchmean"`, `"mean"` (over all elements) or `"none"` (one value a sample).

    Returns:
        `SampleKL(z, kl)`. The KL is float64 if `mu`, `logvar` or the prior is, otherwise float32; it goes into
        `loss(..., kl=kl)`.

    Raises:
        TypeError, ValueError: as `reparameterize`, or `prior` is none, or `reduction` is unknown.
    """
    if posterior != "logvar" or prior is not None or not isinstance(mu, Tensor):
        mu, logvar, posterior = check_gaussian(mu, logvar, posterior)
        prior = check_prior(prior, mu)
        reduction = check_reduction(reduction)
        if posterior != LOGVAR or prior is not None:
            return SampleKL(*sample_of(mu, logvar, posterior, prior, reduction, eps, generator)[:2])
    check_latents(mu, logvar)
    reduction = check_reduction(reduction)
    noise = draw(mu, logvar, eps, generator)
    return SampleKL(*sample(mu, logvar, noise, factor_of(reduction, mu), reduction == "none", wants_kl=True))


def draw(mu: Tensor, logvar: Tensor, eps: Tensor | None, generator: torch.Generator | None, *, formula: bool = False) -> Tensor:
    """The noise of a call, in whatever form the backend keeps it; the normals themselves if a formula will take them."""
    if eps is not None:
        check_noise(eps, generator, mu)
        return eps
    check_generator(generator, mu)
    if formula:
        return torch.empty_like(logvar).normal_(generator=generator) if generator is not None else torch.randn_like(logvar)
    if is_traced(mu, logvar):
        return traced.draw(mu, logvar, generator)
    return backend_for(mu.device).draw_noise(logvar, layout_of(logvar), generator)


def sample(mu, logvar, noise, kl_weight: float, per_sample: bool, *, wants_kl: bool) -> tuple[Tensor, Tensor | None]:
    """z and, if wanted, the reduced KL."""
    dtype = result_dtype(mu, logvar)
    if is_traced(mu, logvar, noise):
        return traced.sample(mu, logvar, noise, kl_weight, per_sample, dtype, wants_kl)
    mu, logvar, noise = dense_latents(mu, logvar, noise)
    arguments = (mu, logvar, noise, kl_weight, per_sample, dtype, wants_kl)
    if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad or noise.requires_grad):
        return Sample.apply(*arguments)
    return sample_forward(*arguments)


def sample_of(
    mu: Tensor, second: Tensor, posterior: Posterior, prior: Prior | None, reduction: str | None, eps, generator
) -> Reduced:
    """z and, unless `reduction` is None, the reduced KL, of any posterior and prior."""
    noise = draw(mu, second, eps, generator, formula=is_traced(mu, second, *(prior or ())[:2]))
    kind, scale = (None, 1.0) if reduction is None else (KINDS.get(reduction, "sum"), factor_of(reduction, mu))
    return reduced(mu, second, posterior, prior, kind, noise=noise, scale=scale)
