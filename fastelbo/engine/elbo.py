"""Sampling, KL, decoder, reconstruction and their sum as one autograd Function."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..basics.tracing import is_differentiated, is_surrounded, never_compiled
from ..likelihoods.values import check_values
from .call import Objective
from .graph import decoder_leaves
from .latents import Sample
from .loss import ELBOTerms, loss_backward, loss_terms, planned_terms, save_loss, saved_loss
from .plan import LatentsPlan, LossPlan, loss_plan


def edge_of(sample: Sample) -> GradientEdge | None:
    """Where the graph of all that is computed from z ends, if a Function may hold it.

    To be taken before the decoder runs, which may write to z. It is what `get_gradient_edge` gives, less its calls.
    """
    plan, z = sample.plan, sample.z
    if plan is None or plan.backend is None or not plan.wants:
        return None
    return tuple.__new__(GradientEdge, (z.grad_fn, z.output_nr, z.view_as(z).grad_fn)) if SHORT else get_gradient_edge(z)


SHORT = GradientEdge._fields == ("node", "output_nr", "ownership_token")


def decoded_terms(
    objective: Objective,
    sample: Sample,
    edge: GradientEdge | None,
    parameters: Sequence[Tensor],
    x: Tensor,
    weight: Tensor | None,
    beta: float | Tensor,
) -> ELBOTerms:
    """The terms of what the decoder made of a sample."""
    tensors = (*parameters, x, sample.kl) if weight is None else (*parameters, x, weight, sample.kl)
    arguments = "decoder(z)", objective, tensors, len(parameters), weight is not None, 1, beta
    if edge is None or is_surrounded():
        return loss_terms(*arguments)
    plan = loss_plan(*arguments)
    leaves = None if plan.backend is None else decoder_leaves(parameters, edge)
    if leaves is None:
        return planned_terms(*arguments)
    # Not in the Function, whose gradients are by the tensors that it is given.
    latents = sample.tensors if sample.plan.is_dense else sample.plan.dense(sample.tensors)
    given = tensors[len(parameters) : -1]
    terms = _apply(
        plan, sample.plan, beta, (parameters, edge), sample.noise, len(given), *given, sample.kl.detach(), *latents, *leaves
    )
    if plan.looks:
        check_values(plan, "decoder(z)", tensors, terms[1])
    return tuple.__new__(ELBOTerms, terms)


class Elbo(Function):
    """The decoder has run already. `inner` holds its outputs and the edge of z in the graph between them, in a tuple, so that
    this graph does not become part of the outer one: backward differentiates it, by z and by its leaves, which are inputs.

    The tensors: x and maybe a weight, of which there are `given`, the KL, the latents, laid out, and the leaves.
    """

    @staticmethod
    @never_compiled
    def forward(ctx, plan: LossPlan, latents: LatentsPlan, beta, inner, noise, given, *tensors):
        ctx.set_materialize_grads(False)
        ctx.inner, loss_tensors = inner, list(tensors[: given + 1])
        loss_tensors[:0] = map(Tensor.detach, inner[0])
        if not plan.is_dense:
            loss_tensors = plan.dense(loss_tensors)
        divisor = plan.divisor_of(loss_tensors) if plan.divisor is None else plan.divisor
        count = 2 if latents.call.latents.prior is None else 4
        ctx.latents, ctx.latent_tensors, ctx.leaves = latents, count, tensors[given + 1 + count :]
        loss, recon, kl, *found = plan.backend.loss_forward(plan, beta, loss_tensors, divisor, None, plan.path.stores)
        save_loss(ctx, plan, beta, divisor, None, loss_tensors, found, noise, *tensors[given + 1 : given + 1 + count])
        return loss, recon, kl

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
        upstreams = [g if g is None else g.resolve_neg() for g in upstreams]
        plan, latents, count = ctx.plan, ctx.latents, ctx.latent_tensors
        saved = ctx.saved_tensors
        noise, latent_tensors = saved[0], saved[1 : 1 + count]
        tensors, beta, divisor, sums = saved_loss(ctx, saved[1 + count :])
        _, _, _, _, _, _, *needs = ctx.needs_input_grad
        given = len(needs) - 1 - count - len(ctx.leaves)
        wants_latents, wants_leaves = needs[given + 1 : given + 1 + count], needs[given + 1 + count :]
        parameters, z = ctx.inner
        wants_z = True in wants_latents
        wrt = [edge for edge, wanted in zip((z, *ctx.leaves), (wants_z, *wants_leaves), strict=True) if wanted]
        found = iter([None] * len(wrt))
        if wrt:
            wants = (*plan.path.stores, *[False] * (given + 1))
            grads = loss_backward(ctx, plan, beta, divisor, tensors, sums, upstreams, wants)
            pairs = [(p, g) for p, g in zip(parameters, grads, strict=False) if g is not None]
            if pairs:
                keep = torch._C._autograd._get_current_graph_task_keep_graph()
                outputs, arrived = zip(*pairs, strict=True)
                found = iter(torch.autograd.grad(outputs, wrt, arrived, retain_graph=keep, allow_unused=True))
                if not keep:
                    ctx.inner = None
        grad_z = next(found) if wants_z else None
        grad_leaves = [next(found) if wanted else None for wanted in wants_leaves]
        grad_loss, _, grad_kl = upstreams
        grad_latents = [None] * count
        if grad_z is not None:
            grad_z = grad_z.resolve_neg()
        if wants_z and not (grad_z is None and grad_loss is None and grad_kl is None):
            latent_tensors, noise = latents.again(latent_tensors, noise)
            grad_latents = latents.backend.latents_backward(
                latents, latent_tensors, noise, wants_latents, grad_z, grad_kl, None, grad_loss, beta
            )
        return (*[None] * (7 + given), *grad_latents, *grad_leaves)


_apply = super(Function, Elbo).apply  # not the one in Python, which looks for transformations again
