"""The primitives as registered operators, by which traced calls reach the kernels.

To a tracer each is one opaque node. They keep no state: no gradient is stored with a guessed factor, so backward computes it
from prediction and target. What changes from step to step, beta and the weights of the reductions, is applied outside, by
operations of Torch, where neither a new beta nor a new batch size compiles anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import formula
from .backend import backend_for
from .layout import dense, dense_latents, in_layout, layout_of
from .tracing import has_symbolic_zeros, is_differentiated, never_compiled

_library = torch.library.Library("fastelbo", "DEF")
ops = torch.ops.fastelbo


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Registers a function as the operator `schema`, on every device; `fake` makes its outputs without their values."""

    def register(function: Callable) -> Callable:
        name = _library.define(schema).partition("(")[0]
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastelbo::{name}", fake, lib=_library)
        return function

    return register


def _scalars_like(value: Tensor, per_sample: bool, dtype: torch.dtype) -> Tensor:
    return value.new_empty(value.shape[:1] if per_sample else (), dtype=dtype)


def _latents_like(mu: Tensor, logvar: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=layout_of(mu)) for t in (mu, logvar)]


def _loss_fake(recon_x, x, mu, logvar, kl, scale, likelihood, target_scale, per_sample, dtype):
    return _scalars_like(recon_x, per_sample, dtype), _scalars_like(recon_x, per_sample, dtype)


@_operator(
    "loss(Tensor recon_x, Tensor x, Tensor? mu, Tensor? logvar, Tensor? kl, Tensor? scale, str likelihood, float target_scale,"
    " bool per_sample, ScalarType dtype) -> (Tensor, Tensor)",
    _loss_fake,
)
def _loss(recon_x, x, mu, logvar, kl, scale, likelihood, target_scale, per_sample, dtype):
    """Reconstruction and KL, each its sum or one sum a sample; a `kl` that is given is handed on."""
    (recon_x, x), (mu, logvar) = dense(recon_x, x), dense(mu, logvar)
    _, recon, kl, _ = backend_for(recon_x.device).loss_forward(
        recon_x, x, mu, logvar, kl, 1.0, None, stateless=True,
        likelihood=likelihood, scale=1.0 if scale is None else scale, target_scale=target_scale, weights=(1.0, 1.0),
        per_sample=per_sample, dtype=dtype,
    )  # fmt: skip
    return recon, kl


def _loss_backward_fake(grad_recon, grad_kl, recon_x, x, mu, logvar, scale, likelihood, target_scale, per_sample, dtype):
    gradients = [] if grad_recon is None else [torch.empty_like(recon_x, memory_format=layout_of(recon_x))]
    return gradients if grad_kl is None else gradients + _latents_like(mu, logvar)


@_operator(
    "loss_backward(Tensor? grad_recon, Tensor? grad_kl, Tensor recon_x, Tensor x, Tensor? mu, Tensor? logvar, Tensor? scale,"
    " str likelihood, float target_scale, bool per_sample, ScalarType dtype) -> Tensor[]",
    _loss_backward_fake,
)
def _loss_backward(grad_recon, grad_kl, recon_x, x, mu, logvar, scale, likelihood, target_scale, per_sample, dtype):
    """The gradient by `recon_x` if `grad_recon` arrived; those by `mu` and `logvar` if `grad_kl` did."""
    (recon_x, x), (mu, logvar) = dense(recon_x, x), dense(mu, logvar)
    grad_recon_x, grad_mu, grad_logvar, _, _ = backend_for(recon_x.device).loss_backward(
        recon_x, x, mu, logvar, 1.0, (None, grad_recon, grad_kl), None, None,
        likelihood=likelihood, scale=1.0 if scale is None else scale, target_scale=target_scale, weights=(1.0, 1.0),
        per_sample=per_sample, dtype=dtype,
        wants_recon=grad_recon is not None, wants_latents=grad_kl is not None, wants_kl=False,
    )  # fmt: skip
    return [g for g in (grad_recon_x, grad_mu, grad_logvar) if g is not None]


def _reparameterize_fake(mu, logvar, noise, dtype):
    return torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype), memory_format=layout_of(mu))


@_operator("reparameterize(Tensor mu, Tensor logvar, Tensor noise, ScalarType dtype) -> Tensor", _reparameterize_fake)
def _reparameterize(mu, logvar, noise, dtype):
    """z. `noise` is the noise itself, or a seed."""
    return _sampled(mu, logvar, noise, False, dtype, wants_kl=False)[0]


def _sample_kl_fake(mu, logvar, noise, per_sample, dtype):
    return _reparameterize_fake(mu, logvar, noise, dtype), _scalars_like(mu, per_sample, dtype)


@_operator(
    "sample_kl(Tensor mu, Tensor logvar, Tensor noise, bool per_sample, ScalarType dtype) -> (Tensor, Tensor)", _sample_kl_fake
)
def _sample_kl(mu, logvar, noise, per_sample, dtype):
    """z, and the KL: its sum, or one sum a sample."""
    return _sampled(mu, logvar, noise, per_sample, dtype, wants_kl=True)


def _sampled(mu, logvar, noise, per_sample, dtype, wants_kl):
    mu, logvar, noise = dense_latents(mu, logvar, noise)
    return backend_for(mu.device).sample_forward(
        mu, logvar, noise, stateless=True, kl_weight=1.0, per_sample=per_sample, dtype=dtype, wants_kl=wants_kl
    )


def _sample_backward_fake(grad_z, grad_kl, mu, logvar, noise, per_sample, dtype):
    return _latents_like(mu, logvar)[grad_kl is None :]


@_operator(
    "sample_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor noise, bool per_sample,"
    " ScalarType dtype) -> Tensor[]",
    _sample_backward_fake,
)
def _sample_backward(grad_z, grad_kl, mu, logvar, noise, per_sample, dtype):
    """Gradients by `mu` and `logvar`; by `logvar` alone where no `grad_kl` arrived, since that by `mu` is `grad_z` then."""
    (grad_z,) = in_layout(layout_of(mu), grad_z)
    mu, logvar, noise = dense_latents(mu, logvar, noise)
    gradients = backend_for(mu.device).sample_backward(
        grad_z, mu, logvar, noise, 1.0, (None, grad_kl), kl_weight=1.0, per_sample=per_sample, dtype=dtype
    )
    return list(gradients)[grad_kl is None :]


def _save_loss(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


@never_compiled
def _differentiate_loss(ctx, grad_recon, grad_kl):
    *values, scale = ctx.saved_tensors
    recon_x, x, mu, logvar, kl = values
    likelihood, target_scale, per_sample, dtype = ctx.options
    wants_recon, wants_x, wants_mu, wants_logvar, wants_kl, *_ = needs = ctx.needs_input_grad
    if wants_x or is_differentiated((grad_recon, grad_kl)) or has_symbolic_zeros((grad_recon, grad_kl)):

        def terms(recon_x, x, mu, logvar, kl):
            return formula.objective(
                recon_x, x, mu, logvar, kl, 1.0, likelihood=likelihood, scale=1.0 if scale is None else scale,
                target_scale=target_scale, weights=(1.0, 1.0), per_sample=per_sample, dtype=dtype,
            )[1:]  # fmt: skip

        return *formula.differentiate(terms, values, needs[:5], (grad_recon, grad_kl)), *[None] * 5
    to_recon = grad_recon if wants_recon else None
    to_latents = grad_kl if wants_mu or wants_logvar else None
    found = iter(())
    if not (to_recon is None and to_latents is None):
        found = iter(ops.loss_backward(to_recon, to_latents, recon_x, x, mu, logvar, scale, *ctx.options))
    grad_recon_x = None if to_recon is None else next(found)
    grad_mu, grad_logvar = (None, None) if to_latents is None else found
    grad_kl = grad_kl.to(kl.dtype) if wants_kl and grad_kl is not None else None
    return grad_recon_x, None, grad_mu, grad_logvar, grad_kl, *[None] * 5


def _save_sample(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    mu, logvar, noise, *per_sample, ctx.dtype = inputs
    ctx.save_for_backward(mu, logvar, noise)
    ctx.layout, ctx.per_sample, ctx.options = layout_of(mu), any(per_sample), len(inputs) - 3


@never_compiled
def _differentiate_sample(ctx, grad_z, grad_kl=None):
    (mu, logvar, noise), needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
    upstreams = grad_z, grad_kl
    if needs[2] or is_differentiated(upstreams) or has_symbolic_zeros(upstreams):
        grads = differentiate_sample(mu, logvar, noise, ctx.layout, 1.0, ctx.per_sample, ctx.dtype, needs, upstreams)
    elif grad_z is None and grad_kl is None:
        grads = None, None, None
    else:
        mu, logvar = in_layout(ctx.layout, mu, logvar)  # in which the noise was numbered
        *grad_mu, grad_logvar = ops.sample_backward(*upstreams, mu, logvar, noise, ctx.per_sample, ctx.dtype)
        grads = *(grad_mu or [grad_z]), grad_logvar, None
    return *grads, *[None] * ctx.options


def differentiate_sample(mu, logvar, noise, layout, kl_weight, per_sample, dtype, needs, upstreams):
    """Gradients by `mu`, `logvar` and `noise`, made of Torch operations; `layout` is that in which the noise was numbered."""

    def outputs(mu, logvar, noise):
        return formula.sample(mu, logvar, noise, dtype), formula.divergence(mu, logvar, kl_weight, per_sample, dtype)

    if not noise.is_floating_point():  # a sample with mean 0 and logvar 0 is the noise itself
        zeros = torch.zeros_like(mu, dtype=dtype, memory_format=layout)
        noise = ops.reparameterize(zeros, zeros, noise, dtype)
    return formula.differentiate(outputs, (mu, logvar, noise), needs, upstreams)


torch.library.register_autograd("fastelbo::loss", _differentiate_loss, setup_context=_save_loss, lib=_library)
for _name in ("reparameterize", "sample_kl"):
    torch.library.register_autograd(f"fastelbo::{_name}", _differentiate_sample, setup_context=_save_sample, lib=_library)
