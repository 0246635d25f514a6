"""The autograd Functions: what is saved, what is computed anew, and who computes.

They have the plain form, with ctx in forward, which costs the least in eager mode. Traced and transformed calls never come
here but use `formula`, and so does every backward whose own result will be differentiated again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import formula
from .backend import backend_for
from .guess import guess, remember
from .layout import dense


class Settings(NamedTuple):
    """What a call computes, beside its tensors: the keyword arguments of the loss primitives."""

    likelihood: str
    scale: float | Tensor
    target_scale: float
    weights: tuple[float, float]
    per_sample: bool
    dtype: torch.dtype


def is_traced() -> bool:
    """Whether the call is traced by torch.compile or transformed by torch.func, where no state may be kept."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def loss_forward(settings: Settings, recon_x, x, mu, logvar, kl, beta, factor: Tensor | None = None):
    """`(loss, recon, kl, gradient)` from the backend of the tensors' device; no gradient is stored without a `factor`."""
    backend = backend_for(recon_x.device)
    recon_x, x = dense(recon_x, x)
    if mu is not None:
        mu, logvar = dense(mu, logvar)
    return backend.loss_forward(recon_x, x, mu, logvar, kl, _near(beta, recon_x), factor, **settings._asdict())


class Loss(torch.autograd.Function):
    """Reconstruction, KL (or one that is given, already reduced) and their sum."""

    @staticmethod
    def forward(ctx, settings: Settings, recon_x, x, mu, logvar, kl, beta):
        _, wants_recon, _, _, _, _, wants_beta = ctx.needs_input_grad
        return _forward(ctx, settings, recon_x, x, mu, logvar, kl, beta, wants_recon, wants_beta)

    @staticmethod
    def backward(ctx, *upstreams):
        recon_x, x, mu, logvar, kl, beta, *_ = ctx.saved_tensors
        inputs, needs = (recon_x, x, mu, logvar, kl, beta), ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or is_traced():
            return None, *_differentiate(_objective(ctx), inputs, needs, upstreams)
        wants_recon, wants_x, wants_mu, wants_logvar, wants_kl, wants_beta = needs
        grad_recon_x, grad_mu, grad_logvar, grad_kl = _loss_backward(
            ctx, recon_x, upstreams, wants_recon, wants_mu or wants_logvar, wants_kl
        )
        grad_x = _target_gradient(ctx, recon_x, upstreams) if wants_x else None
        grad_beta = _beta_gradient(ctx, upstreams) if wants_beta else None
        return None, grad_recon_x, grad_x, grad_mu, grad_logvar, grad_kl, grad_beta


class Sample(torch.autograd.Function):
    """z = mu + exp(logvar / 2) * noise, and the KL. `noise` is what `draw_noise` gave, or the user's own."""

    @staticmethod
    def forward(ctx, mu, logvar, noise, kl_weight: float, per_sample: bool, dtype: torch.dtype, wants_kl: bool):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mu, logvar, noise)
        ctx.settings = kl_weight, per_sample, dtype
        return sample_forward(mu, logvar, noise, kl_weight, per_sample, dtype, wants_kl)

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        mu, logvar, noise = ctx.saved_tensors
        kl_weight, per_sample, dtype = ctx.settings
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or is_traced() or needs[2]:

            def outputs(mu, logvar, noise):
                eps = _normals(mu, noise, dtype)
                return formula.sample(mu, logvar, eps, dtype), formula.divergence(mu, logvar, kl_weight, per_sample, dtype)

            grads = _differentiate(outputs, (mu, logvar, noise), needs, (grad_z, grad_kl))
        elif grad_z is None and grad_kl is None:
            grads = None, None, None
        else:
            grads = *_sample_backward(grad_z, mu, logvar, noise, 1.0, (None, grad_kl), kl_weight, per_sample, dtype), None
        return *grads, None, None, None, None


class Elbo(torch.autograd.Function):
    """Sampling, KL, decoder, reconstruction and their sum.

    The decoder has run already. `inner` holds its output and the edge of z in the graph in between, in a tuple, so that this
    graph does not become part of the outer one: it is differentiated in backward, by z and by its `leaves`, which are inputs.
    """

    @staticmethod
    def forward(ctx, settings: Settings, inner, noise, x, mu, logvar, kl, beta, *leaves):
        ctx.inner = inner
        ctx.leaves = leaves
        prediction = inner[0].detach()
        terms = _forward(ctx, settings, prediction, x, None, None, kl, beta, True, ctx.needs_input_grad[7], mu, logvar, noise)
        return terms

    @staticmethod
    def backward(ctx, *upstreams):
        prediction, x, _, _, _, beta, *_, mu, logvar, noise = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastelbo.elbo cannot be differentiated twice (create_graph=True): use fastelbo.sample_kl, the decoder and"
                " fastelbo.loss(..., kl=kl), which can"
            )
        _, _, _, wants_x, wants_mu, wants_logvar, _, wants_beta, *wants_leaves = ctx.needs_input_grad
        settings = ctx.settings
        wants_latents = wants_mu or wants_logvar
        output, z = ctx.inner
        wrt = [edge for edge, wanted in zip((z, *ctx.leaves), (wants_latents, *wants_leaves), strict=True) if wanted]
        gradient, *_ = _loss_backward(ctx, prediction, upstreams, bool(wrt), False, False)
        found = iter([None] * len(wrt))
        if gradient is not None:
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            found = iter(torch.autograd.grad(output, wrt, gradient, retain_graph=keep, allow_unused=True))
            if not keep:
                ctx.inner = ctx.leaves = None
        grad_z = next(found) if wants_latents else None
        grad_mu = grad_logvar = None
        grad_loss, _, grad_kl = upstreams
        if wants_latents and not (grad_z is None and grad_loss is None and grad_kl is None):
            grad_mu, grad_logvar = _sample_backward(
                grad_z, mu, logvar, noise, ctx.beta if beta is None else beta, (grad_loss, grad_kl),
                settings.weights[1], settings.per_sample, settings.dtype,
            )  # fmt: skip
        grad_x = _target_gradient(ctx, prediction, upstreams) if wants_x else None
        grad_beta = _beta_gradient(ctx, upstreams) if wants_beta else None
        return None, None, None, grad_x, grad_mu, grad_logvar, None, grad_beta, *(next(found) if w else None for w in wants_leaves)


def decoder_leaves(output: Tensor, z: torch.autograd.graph.GradientEdge) -> list[Tensor] | None:
    """The leaves, z aside, of the graph that a decoder has built from z to `output`; None where `Elbo` cannot hold that graph.

    That is so where the graph reaches into an older one, which the outer graph may need as well; where a leaf has hooks,
    which would run twice; and where a reentrant checkpoint hides the leaves inside it.
    """
    oldest = z.node._sequence_nr()  # nodes are numbered as they are made, per thread; leaves come last
    seen, leaves, todo = {z.node, None}, [], [output.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if leaf._backward_hooks:
                return None
            leaves.append(leaf)
        elif node._sequence_nr() < oldest or node.name() == "CheckpointFunctionBackward":
            return None
        todo.extend(following for following, _ in node.next_functions)
    return leaves


def sample_forward(mu, logvar, noise, kl_weight: float, per_sample: bool, dtype: torch.dtype, wants_kl: bool):
    """`(z, kl or None)` from the backend of the tensors' device."""
    mu, logvar, noise = _latents(mu, logvar, noise)
    backend = backend_for(mu.device)
    return backend.sample_forward(
        mu, logvar, noise, kl_weight=kl_weight, per_sample=per_sample, dtype=dtype, wants_kl=wants_kl
    )


def _near(number: float | Tensor, like: Tensor) -> float | Tensor:
    """A number that is not on the device of `like` is on the CPU, where reading it is no sync."""
    if isinstance(number, Tensor):
        return number.detach() if number.device == like.device else number.item()
    return number


def _latents(mu, logvar, noise, *others):
    """In one dense layout; noise that is a seed stays as it is."""
    if noise.is_floating_point():
        return dense(mu, logvar, noise, *others)
    mu, logvar, *others = dense(mu, logvar, *others)
    return mu, logvar, noise, *others


def _sample_backward(grad_z, mu, logvar, noise, beta, upstreams, kl_weight, per_sample, dtype):
    mu, logvar, noise, grad_z = _latents(mu, logvar, noise, grad_z)
    backend = backend_for(mu.device)
    return backend.sample_backward(
        grad_z, mu, logvar, noise, _near(beta, mu), upstreams, kl_weight=kl_weight, per_sample=per_sample, dtype=dtype
    )


def _normals(mu: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise itself: what a sample with mean 0 and logvar 0 is."""
    if noise.is_floating_point():
        return noise
    zeros = torch.zeros_like(mu, dtype=dtype)
    return sample_forward(zeros, zeros, noise, 1.0, False, dtype, False)[0]


def _forward(ctx, settings: Settings, recon_x, x, mu, logvar, kl, beta, wants_recon, wants_beta, *also_saved):
    """Compute, and save what `_loss_backward` needs."""
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.key, ctx.used = settings, None, None
    if wants_recon:
        rows = recon_x.shape[0] if settings.per_sample else 1
        ctx.key = (recon_x.device, recon_x.dtype, recon_x.shape, *settings._replace(scale=None))
        ctx.used = guess(ctx.key, rows, settings.dtype, recon_x.device)
    *terms, ctx.gradient = loss_forward(settings, recon_x, x, mu, logvar, kl, beta, ctx.used)
    ctx.beta = None if isinstance(beta, Tensor) else beta
    ctx.save_for_backward(
        recon_x, x, mu, logvar, kl,
        beta if isinstance(beta, Tensor) else None,
        settings.scale if isinstance(settings.scale, Tensor) else None,  # so that a change in place is noticed
        terms[2].clone() if wants_beta else None,  # the user may write to the KL that is returned
        *also_saved,
    )  # fmt: skip
    return tuple(terms)


def _loss_backward(ctx, recon_x, upstreams, wants_recon, wants_latents, wants_kl):
    """Gradients by prediction, mu, logvar and kl: None where unwanted, or where no upstream gradient arrives."""
    _, x, mu, logvar, _, beta, *_ = ctx.saved_tensors
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
    used = None if gradient is None else ctx.used
    recon_x, x = dense(recon_x, x)
    if mu is not None:
        mu, logvar = dense(mu, logvar)
    backend = backend_for(recon_x.device)
    *grads, seen = backend.loss_backward(
        recon_x, x, mu, logvar, _near(ctx.beta if beta is None else beta, recon_x), upstreams, gradient, used,
        **ctx.settings._asdict(), wants_recon=wants_recon, wants_latents=wants_latents, wants_kl=wants_kl,
    )  # fmt: skip
    if wants_recon:
        remember(ctx.key, seen)
    return grads


def _target_gradient(ctx, recon_x, upstreams):
    """Seldom wanted, so without a kernel: by the formula."""
    _, x, mu, logvar, kl, beta, *_ = ctx.saved_tensors
    return _differentiate(_objective(ctx), (recon_x, x, mu, logvar, kl, beta), (False, True) + (False,) * 4, upstreams)[1]


def _beta_gradient(ctx, upstreams):
    beta, kl = ctx.saved_tensors[5], ctx.saved_tensors[7]
    return None if upstreams[0] is None else (upstreams[0] * kl).sum().to(beta)


def _objective(ctx) -> Callable:
    def objective(recon_x, x, mu, logvar, kl, beta):
        return formula.objective(recon_x, x, mu, logvar, kl, ctx.beta if beta is None else beta, **ctx.settings._asdict())

    return objective


def _differentiate(function: Callable, inputs: Sequence, needs: Sequence[bool], upstreams: Sequence) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` by the inputs that need one; differentiable in turn if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, because one input may be computed from another: only the direct paths are this function's own.
        aliases = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        pairs = [(o, g) for o, g in zip(function(*aliases), upstreams, strict=True) if g is not None and o.requires_grad]
        wrt = [a for a, need in zip(aliases, needs, strict=True) if need]
        if not pairs or not wrt:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wrt, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
