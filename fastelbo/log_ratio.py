"""Samples of the posterior with their log densities, log q(z | x) and log p(z), of which importance weights are made.

On a GPU one kernel each way. Elsewhere, and where calls are traced or transformed, a formula.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from . import formula, posteriors, torch_backend
from .arguments import check_alike, check_count, check_device, check_noise, check_prediction
from .backend import backend_for
from .posteriors import Posterior, Prior, check_gaussian, check_prior, result_dtype
from .sampling import draw
from .tracing import is_differentiated, is_traced, needs_formula, never_compiled


class SampleLogRatio(NamedTuple):
    """A sample z, `[B, ...]`, and its log densities in nats, `[B]`; with `n_samples` behind a dimension of so many."""

    z: Tensor
    log_q: Tensor
    log_p: Tensor


def sample_log_ratio(
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    *,
    posterior: str | Posterior = "logvar",
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    flow: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    n_samples: int | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SampleLogRatio:
    """A sample as from `reparameterize` of contiguous latents, with log q(z | x) and log p(z), sums over each sample's latents.

    The mean of `log_q - log_p` over many samples is the KL; that of one sample is an estimate of it, for posteriors and priors
    whose KL has no closed form. It goes into `loss(..., kl=log_q - log_p, reduction="none")`.

    Args:
        mu, logvar, posterior: as in `reparameterize`.
        prior: as in `kl_divergence`; None: N(0, I).
        flow: a normalizing flow (Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015): a callable from z0,
            `[rows, ...]`, to `(z, log_det)`, of the same shape and `[rows]`, the logarithm of |det dz / dz0|. Then
            `log_q = log q(z0 | x) - log_det`, and `log_p` is that of the transformed z, which is returned.
        n_samples: how many samples of each; None: one, without a dimension for it. A flow sees all as rows.
        eps: noise to use, of the shape of z.
        generator: draws the noise, in place of the default generator.

    Returns:
        `SampleLogRatio(z, log_q, log_p)`, differentiable by all that went in. z has the wider dtype of `mu` and `logvar`; the
        densities are float64 if these, the prior or what the flow returns is, otherwise float32.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or has an unknown name; `n_samples` is
            less than 1; both `eps` and `generator` came; or the flow returned anything else.
    """
    mu, second, posterior = check_gaussian(mu, logvar, posterior)
    prior = check_prior(prior, mu)
    if flow is not None and not callable(flow):
        raise TypeError(f"flow must be callable, got {type(flow).__name__}")
    count = 1 if n_samples is None else check_count("n_samples", n_samples)
    if eps is not None:
        check_noise(eps, generator, mu, n_samples)
    noise = draw_rows(mu, second, count, eps, generator)
    z, log_q, log_p = log_ratio(mu, second, posterior, prior, noise, count)
    if flow is not None:
        z, log_det = _check_flow(flow(z), z)
        dtype = torch.promote_types(log_q.dtype, result_dtype(z, log_det))
        log_q = log_q.to(dtype) - log_det
        log_p = log_density(z.to(dtype).unflatten(0, (count, mu.shape[0])), prior, dtype)
    if n_samples is None:
        return SampleLogRatio(z, log_q, log_p)
    return SampleLogRatio(*(t.unflatten(0, (count, mu.shape[0])) for t in (z, log_q, log_p)))


def _check_flow(found, z0: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"flow(z) must be a pair (z, log_det) of tensors, got {type(found).__name__}")
    z, log_det = found
    check_prediction("flow(z)[0]", z)
    check_alike("flow(z)[0]", z, "z", z0)
    check_prediction("flow(z)[1]", log_det)
    check_device("flow(z)[1]", log_det, "z", z0)
    if log_det.shape != z0.shape[:1]:
        raise ValueError(f"flow(z)[1] must have one log_det a row, {tuple(z0.shape[:1])}: got {tuple(log_det.shape)}")
    return z, log_det


class Held:
    """Says that log q is that of a fixed q: its gradient reaches the encoder through z alone.

    `scale`, `[rows]` or None for 1: what all that arrives at z is multiplied by on its way to the encoder. It may be known only
    when all samples have been decoded, but must be by backward.
    """

    def __init__(self, scale: Tensor | None = None) -> None:
        self.scale = scale


def draw_rows(mu: Tensor, second: Tensor, samples: int, eps: Tensor | None, generator) -> Tensor:
    """The noise of so many samples of each, in whatever form the backend keeps it."""
    if eps is not None:
        return eps
    return draw(mu, second.expand(samples, *second.shape), None, generator, formula=is_traced(mu, second))


def log_ratio(
    mu: Tensor, second: Tensor, posterior: Posterior, prior: Prior | None, noise: Tensor, samples: int,
    *, held: Held | None = None, wants_logs: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`(z, log_q, log_p)` in rows, `[samples * B, ...]` and `[samples * B]`: all of the batch for each sample in turn.

    `noise` is what `draw_rows` gives. The log densities are None unless they are wanted.
    """
    tensors = mu, second, *(prior or ())[:2]
    dtype = result_dtype(*tensors)
    if is_traced(*tensors, noise) or backend_for(mu.device) is torch_backend or noise.requires_grad:
        return _formula(mu, second, prior, noise, posterior, samples, held, wants_logs, dtype)
    settings = Settings(posterior, None if prior is None else prior.parameter, samples, wants_logs, dtype)
    tensors = [t.contiguous() for t in tensors[:2]] + [t.contiguous() for t in map(_one_row, tensors[2:])]
    tensors += [None] * (4 - len(tensors))
    if noise.is_floating_point():
        noise = noise.contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return LogRatio.apply(settings, held, noise, *tensors)
    return _forward(settings, noise, *tensors)


def log_density(z: Tensor, prior: Prior | None, dtype: torch.dtype) -> Tensor:
    """log p(z) of `[samples, B, ...]` in rows, `[samples * B]`."""
    if prior is None:
        return _rows(-0.5 * z.square() - HALF_LOG_2PI)
    raw, distance = prior.second.to(dtype), z - prior.mu.to(dtype)
    if prior.parameter == "std":
        raw = posteriors.not_negative(raw)
    log_sigma = 0.5 * posteriors.log_variance(raw, prior.parameter)
    inverse = torch.exp(-log_sigma) if prior.parameter == "logvar" else 1 / raw
    return _rows(-0.5 * (distance * inverse).square() - log_sigma - HALF_LOG_2PI)


HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _one_row(t: Tensor) -> Tensor:
    """What is the same for the whole batch, as one sample of it."""
    return t[:1] if t.shape[0] > 1 and t.stride(0) == 0 else t


def _rows(values: Tensor) -> Tensor:
    values = values.flatten(0, 1)
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _formula(mu, second, prior, noise, posterior, samples, held, wants_logs, dtype):
    eps = noise.to(dtype).reshape(samples, *mu.shape)
    raw = posteriors.clamped(second, posterior, dtype)
    sigma = posteriors.std(raw, posterior.parameter)
    z = mu.to(dtype) + sigma * eps
    if held is not None and not is_traced(z):
        z = _ToEncoder.apply(z, held)
    result = z.flatten(0, 1).to(torch.promote_types(mu.dtype, second.dtype), copy=True)  # which the user may write to
    if not wants_logs:
        return result, None, None
    log_sigma = 0.5 * posteriors.log_variance(raw, posterior.parameter)
    if held is None:
        log_q = (z - z).detach() - 0.5 * eps.square() - log_sigma  # NaN for a mean that is NaN or infinite
    else:  # 0 times its derivative by z, -eps / sigma, with the value that it has
        log_q = -0.5 * eps.square() - log_sigma.detach() - (eps / sigma.detach()) * (z - z.detach())
    return result, _rows(log_q - HALF_LOG_2PI), log_density(z, prior, dtype)


class _ToEncoder(torch.autograd.Function):
    """What arrives at z, on its way to the encoder: see `Held`."""

    @staticmethod
    @never_compiled
    def forward(ctx, z, held: Held):
        ctx.held = held
        return z.view_as(z)

    @staticmethod
    @never_compiled
    def backward(ctx, gradient):
        _check_once((gradient,))
        scale = ctx.held.scale
        if scale is not None:
            gradient = gradient * scale.view(*gradient.shape[:2], *[1] * (gradient.dim() - 2))
        return gradient, None


def _check_once(upstreams) -> None:
    if is_differentiated(upstreams):
        raise RuntimeError(
            "the gradient estimators 'stl' and 'dreg' cannot be differentiated (create_graph=True or is_grads_batched=True):"
            " they are not the derivative of the loss, only of the same expectation. Use 'standard'"
        )


class Settings(NamedTuple):
    """What `LogRatio` computes, beside its tensors."""

    posterior: Posterior
    prior: str | None  # what its second tensor is
    samples: int
    wants_logs: bool
    dtype: torch.dtype

    def primitive(self) -> dict:
        """The arguments that the primitives have in common."""
        return {
            "posterior": self.posterior.parameter, "clamp": self.posterior.clamp, "prior": self.prior,
            "samples": self.samples, "dtype": self.dtype,
        }  # fmt: skip


class LogRatio(torch.autograd.Function):
    """`log_ratio` by its kernels. The tensors come contiguous; the prior's may be one row for all."""

    @staticmethod
    @never_compiled
    def forward(ctx, settings: Settings, held: Held | None, noise, mu, second, prior_mu, prior_second):
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.held = settings, held
        ctx.save_for_backward(noise, mu, second, prior_mu, prior_second)
        return _forward(settings, noise, mu, second, prior_mu, prior_second)

    @staticmethod
    @never_compiled
    def backward(ctx, *upstreams):
        settings, held, needs = ctx.settings, ctx.held, ctx.needs_input_grad[3:]
        noise, *tensors = ctx.saved_tensors
        if held is not None:
            _check_once(upstreams)
        if all(g is None for g in upstreams):
            return (None,) * 7
        if needs_formula(upstreams):
            return None, None, None, *_differentiated(settings, held, noise, tensors, needs, upstreams)
        from .kernels import log_ratio_backward  # not above: Triton may be missing

        noise, *tensors = (t if t is None else t.contiguous() for t in (noise, *tensors))
        grads = log_ratio_backward(
            *(g if g is None else g.contiguous() for g in upstreams), *tensors[:2], noise, *tensors[2:], needs[2:],
            held=held is not None, path_scale=None if held is None else held.scale, **settings.primitive(),
        )  # fmt: skip
        return None, None, None, *(_as_given(g, t) for g, t in zip(grads, tensors, strict=True))


def _as_given(gradient: Tensor | None, value: Tensor | None) -> Tensor | None:
    """The gradient by one row for all is the sum of all rows'."""
    return gradient if gradient is None or gradient.shape == value.shape else gradient.sum(0, keepdim=True)


@never_compiled
def _forward(settings: Settings, noise, mu, second, prior_mu, prior_second):
    from .kernels import log_ratio_forward

    return log_ratio_forward(mu, second, noise, prior_mu, prior_second, wants_logs=settings.wants_logs, **settings.primitive())


def _differentiated(settings: Settings, held, noise, tensors, needs, upstreams) -> list[Tensor | None]:
    """Gradients of the formula by mu, second, and the prior's two tensors."""
    posterior, prior_parameter, samples, wants_logs, dtype = settings
    if not noise.is_floating_point():  # a sample with mean 0 and logvar 0 is the noise itself
        zeros = torch.zeros_like(tensors[0], dtype=dtype)
        normal = settings._replace(posterior=posteriors.LOGVAR, prior=None, wants_logs=False)
        noise, _, _ = _forward(normal, noise, zeros, zeros, None, None)

    def outputs(mu, second, prior_mu, prior_second):
        prior = None if prior_parameter is None else Prior(prior_mu, prior_second, prior_parameter)
        found = _formula(mu, second, prior, noise, posterior, samples, held, wants_logs, dtype)
        return found if wants_logs else found[:1]

    return formula.differentiate(outputs, tensors, needs, upstreams if wants_logs else upstreams[:1])
