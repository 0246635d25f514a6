"""Samples of the latents and their KL: one autograd Function for every posterior and prior."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..basics.arguments import check_generator, check_noise
from ..basics.scalars import HALF
from ..basics.tracing import is_surrounded, is_traced, never_compiled
from . import formula, traced
from .backend import backend_for
from .call import KLCall, check_kl
from .operators import normals
from .plan import LatentsPlan, is_usual, latents_plan, latents_plan_of

Found = tuple[Any, Any, Any, Any]  # tensors, each None where it is not asked for


def latents_terms(call: KLCall, tensors: Sequence[Tensor], noise: Tensor | None = None) -> Found:
    """`(z, kl, weighted, sums)` of latents that have been checked, each None where `call` does not ask for it.

    z, if there is noise, as `draw` returns it; the KL, reduced; the same with a floor under each element, with free bits, or
    with shares of its gradient, None where that is the KL itself; and the sums over the batch of mu and mu^2, without gradient,
    after the KL of each dimension where groups have free bits.
    """
    if is_surrounded():
        return traced.latents(call, tensors, noise)
    return run(latents_plan(call, tensors, noise), tensors, noise)


def run(plan: LatentsPlan, tensors: Sequence[Tensor], noise: Tensor | None) -> Found:
    """Likewise, once the plan is found."""
    if plan.backend is None:
        return traced.latents(plan.call, tensors, noise)
    if not plan.is_dense:
        tensors = plan.dense(tensors)
    if plan.has_normals and noise is not None and noise.is_floating_point():
        noise = noise.contiguous(memory_format=plan.layout)
    if plan.wants:
        z, kl, weighted, *sums = _apply((plan, noise), *tensors)
    else:
        z, kl, weighted, sums, _ = plan.backend.latents_forward(plan, tensors, noise)
    found = z, kl, weighted, sums or None
    return formula.over_weights(plan.call, tensors, found) if plan.is_mean_of_weights else found


class Latents(Function):
    """Its tensors come as the plan lays them out, the prior's expanded to the shape of mu, and weights as they are; the plan
    and the noise come in one argument."""

    @staticmethod
    @never_compiled
    def forward(ctx, given: tuple[LatentsPlan, Tensor | None], *tensors):
        ctx.set_materialize_grads(False)
        plan, noise = given
        ctx.save_for_backward(noise, *tensors)
        z, kl, weighted, sums, kept = plan.backend.latents_forward(plan, tensors, noise)
        ctx.state = plan, kept
        if plan.call.shares is not None and weighted is None:
            weighted = kl.clone()  # the same number, whose gradient is another
        if sums is None:
            return z, kl, weighted
        ctx.mark_non_differentiable(*sums)
        return z, kl, weighted, *sums

    @staticmethod
    @never_compiled
    def backward(ctx, grad_z, grad_kl, grad_weighted, *_):
        (plan, kept), upstreams = ctx.state, (grad_z, grad_kl, grad_weighted)
        noise, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if not is_usual(plan, upstreams):
            return None, *differentiated(plan, noise, tensors, needs, upstreams)
        if grad_z is None and grad_kl is None and grad_weighted is None:
            return (None,) * (1 + len(tensors))
        tensors, noise = plan.again(tensors, noise)
        return None, *plan.backend.latents_backward(plan, tensors, noise, needs, *upstreams, kept)


_apply = super(Function, Latents).apply  # not the one in Python, which looks for transformations again


def differentiated(plan: LatentsPlan, noise: Tensor | None, tensors, needs, upstreams) -> list[Tensor | None]:
    """Gradients of the formula by the latents' tensors, made of Torch operations."""
    noise = normals(noise, tensors[0], plan.call.dtype, plan.layout)
    return formula.differentiate(lambda *t: formula.divergence(plan.call, noise, *t)[:3], tensors, needs, upstreams)


def sample(
    mu, logvar, posterior, prior, reduction: str | None, eps: Tensor | None, generator, surrounded: bool | None = None,
    kl_weight: Tensor | None = None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """A sample, and its KL, None if `reduction` is None, from what users pass. `surrounded`: whether the call is, if known."""
    if is_surrounded() if surrounded is None else surrounded:
        call, tensors = check_kl(mu, logvar, posterior, prior, reduction, True, None, kl_weight)
        return traced.latents(call, tensors, draw(tensors[0], tensors[1], eps, generator))[:2]
    plan, tensors = latents_plan_of(mu, logvar, posterior, prior, reduction, eps, True, None, kl_weight)
    if eps is not None and generator is None:
        noise = eps  # which is checked
    elif eps is None and plan.backend is not None:
        if generator is not None:
            check_generator(generator, tensors[0])
        noise = plan.backend.draw_noise(tensors[1], generator)
    else:
        noise = draw(tensors[0], tensors[1], eps, generator)
    if plan.is_by_autograd and noise.dtype == plan.dtype:
        return tensors[0] + torch.exp(tensors[1] * HALF) * noise, None
    return run(plan, tensors, noise)[:2]


def draw(mu: Tensor, second: Tensor, eps: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The noise of a call, in whatever form the backend keeps it: the normals themselves, or a seed."""
    if eps is not None:
        check_noise(eps, generator, mu)
        return eps
    if generator is not None:
        check_generator(generator, mu)
    if is_traced(mu, second):
        return traced.draw(mu, second, generator)
    return backend_for(mu.device).draw_noise(second, generator)
