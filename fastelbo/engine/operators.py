"""The primitives as registered operators, by which traced calls reach the kernels.

To a tracer each is one opaque node. They keep no state: no gradient is stored with a guessed factor, so backward computes it
from prediction and target. What changes from step to step, beta and what a mean divides by, is applied outside, by operations
of Torch, where neither a new beta nor a new batch size compiles anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..basics.layout import layout_of
from ..basics.tracing import has_symbolic_zeros, is_differentiated, never_compiled
from ..latents.posterior import LOGVAR, Latents, Posterior
from ..likelihoods import likelihood_of
from . import formula
from .backend import has_kernels
from .call import ONE, KLCall, LossCall
from .plan import find_objective, latents_plan, loss_plan

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


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _needs_formula(upstreams, *tensors: Tensor | None) -> bool:
    """Whether a backward pass must be made of Torch operations; no kernel computes of nothing."""
    if is_differentiated(upstreams) or has_symbolic_zeros(upstreams) or not has_kernels(tensors[0].device):
        return True
    return any(t.numel() == 0 for t in _given(*tensors))


# --- the loss

LOSS = (
    "Tensor first, Tensor? second, Tensor? third, Tensor? fourth, Tensor x, Tensor? weight, Tensor? mu, Tensor? logvar,"
    " Tensor? kl, str likelihood, Scalar[] numbers, bool per_sample, ScalarType dtype"
)


def _loss_plan(first, second, third, fourth, x, weight, mu, logvar, kl, likelihood, numbers, per_sample):
    """The plan of a sum, the tensors as it takes them, and those as they came. The weight has the terms' dimensions."""
    parameters, latents = _given(first, second, third, fourth), _given(mu, logvar, kl)
    objective = find_objective(likelihood_of(likelihood, tuple(numbers)), LOGVAR, "none" if per_sample else "sum")
    if weight is not None and (dim := objective.likelihood.term_dim(first, x)) is not None:
        weight = weight.unsqueeze(dim)
    tensors = [*parameters, x, *_given(weight), *latents]
    plan = loss_plan("recon_x", objective, tensors, len(parameters), weight is not None, len(latents), ONE)
    return plan, plan.dense(tensors), tensors


def _loss_fake(first, second, third, fourth, x, weight, mu, logvar, kl, likelihood, numbers, per_sample, dtype):
    return _scalars_like(first, per_sample, dtype), _scalars_like(first, per_sample, dtype)


@_operator(f"loss({LOSS}) -> (Tensor, Tensor)", _loss_fake)
@torch.no_grad()
def _loss(first, second, third, fourth, x, weight, mu, logvar, kl, likelihood, numbers, per_sample, dtype):
    """Reconstruction and KL, each its sum or one sum a sample; a `kl` that is given is handed on, and one of 0 where there is
    none."""
    plan, tensors, _ = _loss_plan(first, second, third, fourth, x, weight, mu, logvar, kl, likelihood, numbers, per_sample)
    if plan.backend is None:
        _, recon, kl = formula.terms(plan.call, ONE, 1.0, tensors)
    else:
        wants = (False,) * plan.call.parameters
        _, recon, kl, *_ = plan.backend.loss_forward(plan, ONE, tensors, 1.0, None, wants, stateless=True)
    return recon, recon.new_zeros(recon.shape) if kl is None else kl


def _loss_backward_fake(
    grad_recon, grad_kl, first, second, third, fourth, x, weight, mu, logvar, kl, likelihood, numbers, per_sample, dtype, wants
):  # fmt: skip
    gradients = []
    if grad_recon is not None:
        gradients = [_empty_like(p) for p, want in zip((first, second, third, fourth), wants, strict=True) if want]
    return (
        gradients if grad_kl is None else [*gradients, _empty_like(mu), torch.empty_like(logvar, memory_format=layout_of(mu))]
    )


def _empty_like(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=layout_of(value))


@_operator(f"loss_backward(Tensor? grad_recon, Tensor? grad_kl, {LOSS}, bool[] wants) -> Tensor[]", _loss_backward_fake)
@torch.no_grad()
def _loss_backward(
    grad_recon, grad_kl, first, second, third, fourth, x, weight, mu, logvar, kl, likelihood, numbers, per_sample, dtype, wants
):
    """The gradients by the parameters that are in `wants`, if `grad_recon` arrived; those by `mu` and `logvar` if
    `grad_kl` did."""
    plan, tensors, given = _loss_plan(first, second, third, fourth, x, weight, mu, logvar, kl, likelihood, numbers, per_sample)
    n = plan.call.parameters
    needs = [want and grad_recon is not None for want in wants[:n]] + [False] * (len(tensors) - n)
    if grad_kl is not None:
        needs[-2:] = True, True
    upstreams = None, grad_recon, grad_kl
    grads, _ = plan.backend.loss_backward(plan, ONE, tensors, 1.0, upstreams, None, None, None, tuple(needs))
    promised = zip(grads, given, needs, strict=True)
    return [gradient.contiguous(memory_format=layout_of(t)) for gradient, t, need in promised if need]


def _save_loss(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


@never_compiled
def _differentiate_loss(ctx, grad_recon, grad_kl):
    saved, needs, upstreams = ctx.saved_tensors, ctx.needs_input_grad, (grad_recon, grad_kl)
    *_, mu, _, kl = saved
    code, numbers, per_sample, dtype = ctx.options
    if mu is None and kl is None:  # and the KL of 0 depends on nothing
        upstreams = grad_recon, None
    if needs[4] or needs[5] or _needs_formula(upstreams, *saved):
        there = [t is not None for t in saved]
        reduction = "none" if per_sample else "sum"
        likelihood = likelihood_of(code, tuple(numbers))
        call = LossCall(likelihood, reduction, reduction, dtype, sum(there[:4]), there[5], sum(there[6:]))
        wanted = [need for need, has in zip(needs[:9], there, strict=True) if has]
        found = iter(formula.differentiate(lambda *t: formula.terms(call, ONE, 1.0, t)[1:], _given(*saved), wanted, upstreams))
        return *(next(found) if has else None for has in there), *[None] * len(ctx.options)
    wants = [bool(need) for need in needs[:4]]
    to_recon = grad_recon if True in wants else None
    to_latents = grad_kl if needs[6] or needs[7] else None
    found = iter(())
    if to_recon is not None or to_latents is not None:
        found = iter(ops.loss_backward(to_recon, to_latents, *saved, *ctx.options, wants))
    grads = [next(found) if want and to_recon is not None else None for want in wants]
    grad_mu, grad_logvar = (None, None) if to_latents is None else found
    own = grad_kl.to(kl.dtype) if needs[8] and grad_kl is not None else None
    return *grads, None, None, grad_mu, grad_logvar, own, *[None] * len(ctx.options)


# --- the latents

LATENTS = (
    "Tensor mu, Tensor second, Tensor? prior_mu, Tensor? prior_second, Tensor? noise, str posterior, float[]? clamp,"
    " str? prior, str? kind, float? floor, float[]? shares, bool statistics, ScalarType dtype"
)


def encoded(call: KLCall) -> tuple:
    """The call as the last arguments of the operators, less what its sums are times."""
    (posterior, prior, _), clamp, shares = call.latents, call.latents.posterior.clamp, call.shares
    return (
        posterior.parameter, clamp and list(clamp), prior, call.kind, call.floor, shares and list(shares), call.statistics,
        call.dtype,
    )  # fmt: skip


def _decoded(posterior, clamp, prior, kind, floor, shares, statistics, dtype) -> KLCall:
    latents = Latents(Posterior(posterior, clamp and tuple(clamp)), prior)
    return KLCall(latents, dtype, kind, "sum", floor, shares and tuple(shares), statistics)


def _latents_fake(mu, second, prior_mu, prior_second, noise, posterior, clamp, prior, kind, floor, shares, statistics, dtype):
    shape = {None: (0,), "sum": (), "row": mu.shape[:1], "column": mu.shape[1:], "element": mu.shape}[kind]
    z = mu.new_empty(0)
    if noise is not None:
        z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, second.dtype), memory_format=layout_of(mu))
    kl = mu.new_empty(shape, dtype=dtype)
    weighted = mu.new_empty((0,) if floor is None and shares is None else shape, dtype=dtype)
    sums = (mu.new_empty(mu.shape[1:] if statistics else (0,), dtype=dtype) for _ in range(2))
    return z, kl, weighted, *sums


@_operator(f"latents({LATENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _latents_fake)
@torch.no_grad()
def _latents(mu, second, prior_mu, prior_second, noise, *options):
    """z, the KL, the KL with a floor or shares, and the sums of mu and mu^2; empty where not asked for. `noise` is the noise
    itself, or a seed."""
    plan, tensors, noise = _latents_plan(mu, second, prior_mu, prior_second, noise, options)
    if plan.backend is None:  # of nothing
        z, kl, weighted, sums = formula.divergence(plan.call, noise, *tensors)
    else:
        z, kl, weighted, sums, _ = plan.backend.latents_forward(plan, tensors, noise, stateless=True)
        if plan.call.shares is not None and weighted is None:
            weighted = kl.clone()
    nothing = mu.new_empty(0)
    return tuple(
        nothing.clone() if t is None else t if t is z else t.contiguous() for t in (z, kl, weighted, *(sums or (None,) * 2))
    )


def _latents_plan(mu, second, prior_mu, prior_second, noise, options):
    tensors = _given(mu, second, prior_mu, prior_second)
    plan = latents_plan(_decoded(*options), tensors, noise)
    return plan, *plan.again(tensors, noise)


def _latents_backward_fake(
    grad_z, grad_kl, grad_weighted, mu, second, prior_mu, prior_second, noise, posterior, clamp, prior, kind, floor, shares,
    statistics, dtype, wants_prior,
):  # fmt: skip
    grads = [torch.empty_like(t, memory_format=layout_of(mu)) for t in (mu, second)]
    if grad_kl is None and grad_weighted is None:
        return grads[1:]
    priors = [p for p, want in zip((prior_mu, prior_second), wants_prior, strict=True) if want]
    return grads + [torch.empty_like(mu, dtype=p.dtype, memory_format=layout_of(mu)) for p in priors]


@_operator(
    f"latents_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_weighted, {LATENTS}, bool[] wants_prior) -> Tensor[]",
    _latents_backward_fake,
)
@torch.no_grad()
def _latents_backward(grad_z, grad_kl, grad_weighted, mu, second, prior_mu, prior_second, noise, *options):
    """Gradients by mu, its second parameter and those of the prior's two tensors that are wanted; by the second parameter alone
    where only `grad_z` arrived, since that by mu is `grad_z` then."""
    *options, wants_prior = options
    plan, tensors, noise = _latents_plan(mu, second, prior_mu, prior_second, noise, options)
    only_z = grad_kl is None and grad_weighted is None
    needs = (True, True, *wants_prior)[: len(tensors)]
    grads = plan.backend.latents_backward(plan, tensors, noise, needs, grad_z, grad_kl, grad_weighted)
    wanted = [g for g, need in zip(grads, needs, strict=True) if need]
    return wanted[1:2] if only_z else wanted


def _save_latents(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.options, ctx.layout = inputs[5:], layout_of(inputs[0])


@never_compiled
def _differentiate_latents(ctx, *upstreams):
    *tensors, noise = ctx.saved_tensors
    call, needs = _decoded(*ctx.options), ctx.needs_input_grad
    there = noise is not None, call.kind is not None, call.floor is not None or call.shares is not None
    upstreams = [g if has else None for g, has in zip(upstreams, there, strict=False)]  # the other outputs are empty
    if needs[4] or _needs_formula(upstreams, *tensors):
        eps = normals(noise, tensors[0], call.dtype, ctx.layout)
        given = [*_given(*tensors), *_given(eps)]
        wanted = [need for need, t in zip(needs[:5], (*tensors, noise), strict=True) if t is not None]

        def outputs(*given):
            latents, eps = (given, None) if noise is None else (given[:-1], given[-1])
            return formula.divergence(call, eps, *latents)[:3]

        found = iter(formula.differentiate(outputs, given, wanted, upstreams))
        return *(None if t is None else next(found) for t in (*tensors, noise)), *[None] * len(ctx.options)
    grads = [None] * 4
    if any(g is not None for g in upstreams):
        # In the layout in which the noise was numbered.
        laid = [t if t is None else t.contiguous(memory_format=ctx.layout) if t.stride(0) else t for t in tensors]
        wants_prior = [bool(need) for need in needs[2:4]]
        found = iter(ops.latents_backward(*upstreams, *laid, noise, *ctx.options, wants_prior))
        only_z = upstreams[1] is None and upstreams[2] is None
        grads[0] = upstreams[0] if only_z else next(found)
        grads[1] = next(found)
        if not only_z:
            grads[2:] = (next(found) if want else None for want in wants_prior)
    return *grads, None, *[None] * len(ctx.options)


def normals(noise: Tensor | None, like: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor | None:
    """The noise itself, of which a seed may have come; `layout` is that in which the noise was numbered."""
    if noise is None or noise.is_floating_point():
        return noise
    zeros = torch.zeros_like(like, dtype=dtype, memory_format=layout)  # a sample with mean 0 and logvar 0 is the noise itself
    return ops.latents(zeros, zeros, None, None, noise, *encoded(KLCall(Latents(LOGVAR), dtype, None)))[0]


torch.library.register_autograd("fastelbo::loss", _differentiate_loss, setup_context=_save_loss, lib=_library)
torch.library.register_autograd("fastelbo::latents", _differentiate_latents, setup_context=_save_latents, lib=_library)
