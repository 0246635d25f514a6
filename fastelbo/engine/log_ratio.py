"""Samples of the posterior with their log densities, log q(z | x) and log p(z), of which importance weights are made.

On a GPU one kernel each way. Elsewhere, and where calls are traced or transformed, a formula.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..basics.arguments import result_dtype
from ..basics.tracing import is_differentiated, is_traced, needs_formula, never_compiled
from ..latents import gaussian
from ..latents.gaussian import HALF_LOG_2PI
from ..latents.posterior import LOGVAR, Latents
from . import formula
from .backend import backend_for
from .latents import draw
from .traced import normals_like


class RatioCall(NamedTuple):
    """What is computed, beside the tensors of the latents and the noise."""

    latents: Latents
    samples: int
    wants_logs: bool
    dtype: torch.dtype


class Held:
    """Says that log q is that of a fixed q: its gradient reaches the encoder through z alone.

    `scale`, `[rows]` or None for 1: what all that arrives at z is multiplied by on its way to the encoder. It may be known only
    when all samples have been decoded, but must be by backward.
    """

    def __init__(self, scale: Tensor | None = None) -> None:
        self.scale = scale


def draw_rows(mu: Tensor, second: Tensor, samples: int, eps: Tensor | None, generator) -> Tensor:
    """The noise of so many samples of each, in whatever form `log_ratio` takes it."""
    if eps is not None:
        return eps
    if is_traced(mu, second):  # there is no operator for it
        return normals_like(second.expand(samples, *second.shape), generator)
    return draw(mu, second.expand(samples, *second.shape), None, generator)


def log_ratio(
    latents: Latents, tensors: Sequence[Tensor], noise: Tensor, samples: int,
    *, held: Held | None = None, wants_logs: bool = True,
) -> tuple[Tensor, Any, Any]:  # fmt: skip
    """`(z, log_q, log_p)` in rows, `[samples * B, ...]` and `[samples * B]`: all of the batch for each sample in turn.

    The tensors have been checked; `noise` is what `draw_rows` gives. The log densities are None unless they are wanted.
    """
    call = RatioCall(latents, samples, wants_logs, result_dtype(*tensors))
    if is_traced(*tensors, noise) or any(t.is_neg() for t in (*tensors, noise)):
        return _formula(call, held, noise, *tensors)
    if noise.requires_grad or backend_for(noise.device).log_ratio_forward is None:
        return _formula(call, held, noise, *tensors)
    tensors = [t.contiguous() for t in (*tensors[:2], *map(_one_row, tensors[2:]))]
    if noise.is_floating_point():
        noise = noise.contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return LogRatio.apply(call, held, noise, *tensors)
    return backend_for(noise.device).log_ratio_forward(call, tensors, noise)


def log_density(z: Tensor, latents: Latents, prior: Sequence[Tensor]) -> Tensor:
    """log p(z) of `[samples, B, ...]` in rows, `[samples * B]`."""
    return _rows(gaussian.log_prior(z, latents, prior))


def _one_row(t: Tensor) -> Tensor:
    """What is the same for the whole batch, as one sample of it."""
    return t[:1] if t.shape[0] > 1 and t.stride(0) == 0 else t


def _rows(values: Tensor) -> Tensor:
    values = values.flatten(0, 1)
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _formula(call: RatioCall, held: Held | None, noise: Tensor, mu: Tensor, second: Tensor, *prior: Tensor):
    posterior, dtype = call.latents.posterior, call.dtype
    eps = noise.to(dtype).reshape(call.samples, *mu.shape)
    raw = gaussian.clamped(second, posterior, dtype)
    sigma = gaussian.std(raw, posterior.parameter)
    z = mu.to(dtype) + sigma * eps
    if held is not None and not is_traced(z):
        z = _ToEncoder.apply(z, held)
    result = z.flatten(0, 1).to(torch.promote_types(mu.dtype, second.dtype), copy=True)  # which the user may write to
    if not call.wants_logs:
        return result, None, None
    log_sigma = 0.5 * gaussian.log_variance(raw, posterior.parameter)
    if held is None:
        log_q = (z - z).detach() - 0.5 * eps.square() - log_sigma  # NaN for a mean that is NaN or infinite
    else:  # 0 times its derivative by z, -eps / sigma, with the value that it has
        log_q = -0.5 * eps.square() - log_sigma.detach() - (eps / sigma.detach()) * (z - z.detach())
    return result, _rows(log_q - HALF_LOG_2PI), log_density(z, call.latents, prior)


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


class LogRatio(torch.autograd.Function):
    """`log_ratio` by its kernels. The tensors come contiguous; the prior's may be one row for all."""

    @staticmethod
    @never_compiled
    def forward(ctx, call: RatioCall, held: Held | None, noise, *tensors):
        ctx.set_materialize_grads(False)
        ctx.call, ctx.held = call, held
        ctx.save_for_backward(noise, *tensors)
        return backend_for(tensors[0].device).log_ratio_forward(call, tensors, noise)

    @staticmethod
    @never_compiled
    def backward(ctx, *upstreams):
        call, held, needs = ctx.call, ctx.held, ctx.needs_input_grad[3:]
        noise, *tensors = ctx.saved_tensors
        if held is not None:
            _check_once(upstreams)
        if all(g is None for g in upstreams):
            return (None,) * (3 + len(tensors))
        if needs_formula(upstreams):
            return None, None, None, *_differentiated(call, held, noise, tensors, needs, upstreams)
        noise, *tensors = (t.contiguous() for t in (noise, *tensors))
        upstreams = [g if g is None else g.contiguous() for g in upstreams]
        backend = backend_for(tensors[0].device)
        scale = None if held is None else held.scale
        grads = backend.log_ratio_backward(call, tensors, noise, needs, upstreams, held is not None, scale)
        return None, None, None, *(_as_given(g, t) for g, t in zip(grads, tensors, strict=True))


def _as_given(gradient: Tensor | None, value: Tensor) -> Tensor | None:
    """The gradient by one row for all is the sum of all rows'."""
    return gradient if gradient is None or gradient.shape == value.shape else gradient.sum(0, keepdim=True)


def _differentiated(call: RatioCall, held, noise, tensors, needs, upstreams) -> list[Tensor | None]:
    """Gradients of the formula by the latents' tensors."""
    if not noise.is_floating_point():  # a sample with mean 0 and logvar 0 is the noise itself
        zeros = torch.zeros_like(tensors[0], dtype=call.dtype)
        normal = call._replace(latents=Latents(LOGVAR), wants_logs=False)
        noise, _, _ = backend_for(zeros.device).log_ratio_forward(normal, (zeros, zeros), noise)
    wanted = 3 if call.wants_logs else 1
    return formula.differentiate(lambda *t: _formula(call, held, noise, *t)[:wanted], tensors, needs, upstreams[:wanted])
