"""Samples of the posterior, by the reparameterization of Kingma and Welling (2013), and its KL from the standard normal."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import traced
from .arguments import check_alike, check_latents, check_prediction, check_reduction, weight
from .autograd import Sample, sample_forward
from .backend import backend_for
from .layout import dense_latents, layout_of
from .tracing import is_traced


class SampleKL(NamedTuple):
    """A sample z of the shape of `mu`, and the KL in nats: `[]`, or `[B]` with `reduction="none"`."""

    z: Tensor
    kl: Tensor


def reparameterize(
    mu: Tensor, logvar: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """A sample `mu + exp(logvar / 2) * eps` of N(mu, exp(logvar)), differentiable by `mu`, `logvar` and `eps`.

    On a CPU the noise is what `torch.randn_like` gives for the same seed. On a GPU it comes from a Philox stream of this
    library's own, whose seed follows `torch.manual_seed`: other values than `torch.randn_like`, made again in backward
    instead of stored.

    Args:
        mu: mean, `[B, ...]`, float16, bfloat16, float32 or float64.
        logvar: logarithm of the variance, of the shape of `mu`.
        eps: noise to use, of the shape of `mu`.
        generator: draws the noise, in place of the default generator; on the device of `mu`.

    Returns:
        z, of the shape of `mu` and the wider of the two dtypes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or both `eps` and `generator` came.
    """
    check_latents(mu, logvar)
    return sample(mu, logvar, draw(mu, logvar, eps, generator), 1.0, False, wants_kl=False)[0]


def sample_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    reduction: str = "sum",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SampleKL:
    """A sample as from `reparameterize`, and `KL(N(mu, exp(logvar)) || N(0, I))`, from one read of both.

    Args:
        mu, logvar, eps, generator: as in `reparameterize`.
        reduction: of the KL: `"sum"`, `"batchmean"`, `"mean"` (over all elements) or `"none"` (one value a sample).

    Returns:
        `SampleKL(z, kl)`. The KL is float64 if an input is, otherwise float32; it goes into `loss(..., kl=kl)`.

    Raises:
        TypeError, ValueError: as `reparameterize`, or `reduction` is unknown.
    """
    check_latents(mu, logvar)
    reduction = check_reduction(reduction)
    noise = draw(mu, logvar, eps, generator)
    return SampleKL(*sample(mu, logvar, noise, weight(reduction, mu), reduction == "none", wants_kl=True))


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Results and arithmetic are float64 if an input is, otherwise float32: sums overflow float16, and bfloat16 has 8 bits."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def draw(mu: Tensor, logvar: Tensor, eps: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The noise of a call, in whatever form the backend keeps it."""
    if eps is not None:
        if generator is not None:
            raise ValueError("give eps or generator, not both")
        check_prediction("eps", eps)
        check_alike("eps", eps, "mu", mu)
        return eps
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device != mu.device:
        raise ValueError(f"generator must be on the device of mu: got {generator.device} and {mu.device}")
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
