"""The autograd Functions: what is saved, what is computed anew, and who computes.

They have the plain form, with ctx in forward, which costs the least in eager mode. Calls that are traced or transformed never
come here but to `traced`. A backward pass whose own result will be differentiated again uses `formula`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import formula
from .backend import backend_for
from .guess import guess, remember
from .layout import dense, in_layout, layout_of
from .operators import differentiate_sample
from .tracing import is_differentiated, needs_formula, never_compiled


class Settings(NamedTuple):
    """What a call computes, beside its tensors: the keyword arguments of the loss primitives."""

    likelihood: str
    scale: float | Tensor
    target_scale: float
    weights: tuple[float, float]
    per_sample: bool
    dtype: torch.dtype


@never_compiled
def loss_forward(settings: Settings, recon_x, x, mu, logvar, kl, beta, factor: Tensor | None = None):
    """`(loss, recon, kl, gradient)` from the backend of the tensors' device; no gradient is stored without a `factor`."""
    backend = backend_for(recon_x.device)
    return backend.loss_forward(recon_x, x, mu, logvar, kl, _near(beta, recon_x), factor, **settings._asdict())


class Saved(NamedTuple):
    """What `Loss` and `Elbo` save. It is unpacked once in a backward pass: checkpointing allows no more."""

    recon_x: Tensor
    x: Tensor
    mu: Tensor | None
    logvar: Tensor | None
    kl: Tensor | None
    beta: Tensor | None  # None: a number, kept on ctx
    scale: Tensor | None  # here only so that a change in place is noticed
    kl_value: Tensor | None


class Loss(torch.autograd.Function):
    """Reconstruction, KL (or one that is given, already reduced) and their sum. The tensors come dense, in pairs alike.

    `known` is the upstream factor of each row, where it is known before backward; else it is guessed.
    """

    @staticmethod
    @never_compiled
    def forward(ctx, settings: Settings, recon_x, x, mu, logvar, kl, beta, known):
        _, wants_recon, _, _, _, _, wants_beta, _ = ctx.needs_input_grad
        return _forward(ctx, settings, recon_x, x, mu, logvar, kl, beta, wants_recon, wants_beta, known)

    @staticmethod
    @never_compiled
    def backward(ctx, *upstreams):
        saved = Saved(*ctx.saved_tensors)
        _, *needs = ctx.needs_input_grad
        if needs_formula(upstreams):
            return None, *_loss_differentiated(ctx, saved, needs[:6], upstreams), None
        wants_recon, wants_x, wants_mu, wants_logvar, wants_kl, wants_beta, _ = needs
        grad_recon_x, grad_mu, grad_logvar, grad_kl = _loss_backward(
            ctx, saved, upstreams, wants_recon, wants_mu or wants_logvar, wants_kl
        )
        grad_x, grad_beta = _seldom_wanted(ctx, saved, upstreams, wants_x, wants_beta)
        return None, grad_recon_x, grad_x, grad_mu, grad_logvar, grad_kl, grad_beta, None


class Sample(torch.autograd.Function):
    """z = mu + exp(logvar / 2) * noise, and the KL. `noise` is what `draw_noise` gave, or the user's own. All come dense."""

    @staticmethod
    @never_compiled
    def forward(ctx, mu, logvar, noise, kl_weight: float, per_sample: bool, dtype: torch.dtype, wants_kl: bool):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mu, logvar, noise)
        ctx.settings = kl_weight, per_sample, dtype
        ctx.latent_layout = layout_of(mu)
        return sample_forward(mu, logvar, noise, kl_weight, per_sample, dtype, wants_kl)

    @staticmethod
    @never_compiled
    def backward(ctx, grad_z, grad_kl):
        mu, logvar, noise = ctx.saved_tensors
        kl_weight, per_sample, dtype = ctx.settings
        needs = ctx.needs_input_grad[:3]
        if needs[2] or needs_formula((grad_z, grad_kl)):
            grads = differentiate_sample(
                mu, logvar, noise, ctx.latent_layout, kl_weight, per_sample, dtype, needs, (grad_z, grad_kl)
            )
        elif grad_z is None and grad_kl is None:
            grads = None, None, None
        else:
            grads = *_sample_backward(ctx, grad_z, mu, logvar, noise, 1.0, (None, grad_kl), kl_weight, per_sample, dtype), None
        return *grads, None, None, None, None


class Elbo(torch.autograd.Function):
    """Sampling, KL, decoder, reconstruction and their sum.

    The decoder has run already. `inner` holds its output and the edge of z in the graph in between, in a tuple, so that this
    graph does not become part of the outer one: it is differentiated in backward, by z and by its `leaves`, which are inputs.
    The tensors come dense, x as the prediction is.
    """

    @staticmethod
    @never_compiled
    def forward(ctx, settings: Settings, inner, noise, x, mu, logvar, kl, beta, *leaves):
        ctx.inner, ctx.leaves = inner, leaves
        (prediction,) = dense(inner[0].detach())
        wants_beta = ctx.needs_input_grad[7]
        terms = _forward(ctx, settings, prediction, x, None, None, kl, beta, True, wants_beta, None, mu, logvar, noise)
        ctx.latent_layout = layout_of(mu)
        return terms

    @staticmethod
    @never_compiled
    def backward(ctx, *upstreams):
        if is_differentiated(upstreams):
            raise RuntimeError(
                "fastelbo.elbo cannot be differentiated twice (create_graph=True) or in batches (is_grads_batched=True):"
                " use fastelbo.sample_kl, the decoder and fastelbo.loss(..., kl=kl), which can"
            )
        if any(leaf._backward_hooks for leaf in ctx.leaves):
            raise RuntimeError(
                "a tensor that the decoder of fastelbo.elbo uses was given a hook after the call, which would run twice:"
                " register it before, or use fastelbo.sample_kl, the decoder and fastelbo.loss(..., kl=kl)"
            )
        *saved, mu, logvar, noise = ctx.saved_tensors
        saved = Saved(*saved)
        _, _, _, wants_x, wants_mu, wants_logvar, _, wants_beta, *wants_leaves = ctx.needs_input_grad
        wants_latents = wants_mu or wants_logvar
        output, z = ctx.inner
        wrt = [edge for edge, wanted in zip((z, *ctx.leaves), (wants_latents, *wants_leaves), strict=True) if wanted]
        found = iter([None] * len(wrt))
        gradient, *_ = _loss_backward(ctx, saved, upstreams, bool(wrt), False, False)
        if gradient is not None:
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            found = iter(torch.autograd.grad(output, wrt, gradient, retain_graph=keep, allow_unused=True))
            if not keep:
                ctx.inner = None
        grad_z = next(found) if wants_latents else None
        grad_leaves = [next(found) if wanted else None for wanted in wants_leaves]
        grad_loss, _, grad_kl = upstreams
        grad_mu = grad_logvar = None
        if wants_latents and not (grad_z is None and grad_loss is None and grad_kl is None):
            settings = ctx.settings
            grad_mu, grad_logvar = _sample_backward(
                ctx, grad_z, mu, logvar, noise, _beta(ctx, saved), (grad_loss, grad_kl),
                settings.weights[1], settings.per_sample, settings.dtype,
            )  # fmt: skip
        grad_x, grad_beta = _seldom_wanted(ctx, saved, upstreams, wants_x, wants_beta)
        return None, None, None, grad_x, grad_mu, grad_logvar, None, grad_beta, *grad_leaves


@never_compiled
def sample_forward(mu, logvar, noise, kl_weight: float, per_sample: bool, dtype: torch.dtype, wants_kl: bool):
    """`(z, kl or None)` from the backend of the tensors' device."""
    backend = backend_for(mu.device)
    return backend.sample_forward(mu, logvar, noise, kl_weight=kl_weight, per_sample=per_sample, dtype=dtype, wants_kl=wants_kl)


def _near(number: float | Tensor, like: Tensor) -> float | Tensor:
    """A number that is not on the device of `like` is on the CPU, where reading it is no sync."""
    if isinstance(number, Tensor):
        return number.detach() if number.device == like.device else number.item()
    return number


def _sample_backward(ctx, grad_z, mu, logvar, noise, beta, upstreams, kl_weight, per_sample, dtype):
    mu, logvar, grad_z = in_layout(ctx.latent_layout, mu, logvar, grad_z)
    if noise.is_floating_point():
        (noise,) = in_layout(ctx.latent_layout, noise)
    backend = backend_for(mu.device)
    return backend.sample_backward(
        grad_z, mu, logvar, noise, _near(beta, mu), upstreams, kl_weight=kl_weight, per_sample=per_sample, dtype=dtype
    )


def _forward(ctx, settings: Settings, recon_x, x, mu, logvar, kl, beta, wants_recon, wants_beta, known, *also_saved):
    """Compute, and save what the backward passes need."""
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.key, ctx.used = settings, None, known if wants_recon else None
    # Those of this moment: a hook on saved tensors, such as `save_on_cpu`, may bring them back with other strides.
    ctx.recon_layout, ctx.latent_layout = layout_of(recon_x), None if mu is None else layout_of(mu)
    if wants_recon and known is None:
        rows = recon_x.shape[0] if settings.per_sample else 1
        ctx.key = (recon_x.device, recon_x.dtype, recon_x.shape, *settings._replace(scale=None))
        ctx.used = guess(ctx.key, rows, settings.dtype, recon_x.device)
    *terms, ctx.gradient = loss_forward(settings, recon_x, x, mu, logvar, kl, beta, ctx.used)
    ctx.beta, beta = (None, beta) if isinstance(beta, Tensor) else (beta, None)
    saved = Saved(
        recon_x, x, mu, logvar, kl, beta,
        settings.scale if isinstance(settings.scale, Tensor) else None,
        terms[2].clone() if wants_beta else None,  # the user may write to the KL that is returned
    )  # fmt: skip
    ctx.save_for_backward(*saved, *also_saved)
    return tuple(terms)


def _beta(ctx, saved: Saved) -> float | Tensor:
    return ctx.beta if saved.beta is None else saved.beta


def _loss_backward(ctx, saved: Saved, upstreams, wants_recon, wants_latents, wants_kl):
    """Gradients by prediction, mu, logvar and kl: None where unwanted, or where no upstream gradient arrives."""
    grad_loss, grad_recon, grad_kl = upstreams
    wants_recon = wants_recon and not (grad_loss is None and grad_recon is None)
    reaches_kl = not (grad_loss is None and grad_kl is None)
    wants_latents, wants_kl = wants_latents and reaches_kl, wants_kl and reaches_kl
    if not (wants_recon or wants_latents or wants_kl):
        return None, None, None, None
    gradient = None
    if wants_recon:
        # Handed out once, and without keeping a reference: it becomes `.grad` without a copy, and a second backward through a
        # retained graph, which finds None, leaves it alone.
        gradient, ctx.gradient = ctx.gradient, None
    recon_x, x = in_layout(ctx.recon_layout, saved.recon_x, saved.x)
    mu, logvar = in_layout(ctx.latent_layout, saved.mu, saved.logvar)
    backend = backend_for(recon_x.device)
    *grads, seen = backend.loss_backward(
        recon_x, x, mu, logvar, _near(_beta(ctx, saved), recon_x), upstreams, gradient, None if gradient is None else ctx.used,
        **ctx.settings._asdict(), wants_recon=wants_recon, wants_latents=wants_latents, wants_kl=wants_kl,
    )  # fmt: skip
    if wants_recon and ctx.key is not None:
        remember(ctx.key, seen)
    return grads


def _seldom_wanted(ctx, saved: Saved, upstreams, wants_x: bool, wants_beta: bool):
    """Gradients by the target, from the formula and without a kernel, and by beta."""
    grad_x = grad_beta = None
    if wants_x:
        grad_x = _loss_differentiated(ctx, saved, (False, True, False, False, False, False), upstreams)[1]
    if wants_beta and upstreams[0] is not None:
        grad_beta = (upstreams[0] * saved.kl_value).sum().to(saved.beta)
    return grad_x, grad_beta


def _loss_differentiated(ctx, saved: Saved, needs, upstreams):
    """Gradients of the formula by recon_x, x, mu, logvar, kl and beta."""

    def objective(recon_x, x, mu, logvar, kl, beta):
        return formula.objective(recon_x, x, mu, logvar, kl, ctx.beta if beta is None else beta, **ctx.settings._asdict())

    return formula.differentiate(objective, saved[:6], needs, upstreams)
