"""Reconstruction, KL and their sum: one autograd Function for every likelihood.

It has the plain form, with ctx in forward, which costs the least in eager mode. Calls that are traced or transformed go to
`traced`. A backward pass whose own result will be differentiated again uses `formula`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..basics.sparse import is_sparse
from ..basics.tracing import is_surrounded, never_compiled
from ..likelihoods.values import check_values, is_well
from . import formula, traced
from .call import ONE, Factors, Objective, check_loss
from .latents import run
from .plan import LossPlan, is_usual, loss_plan
from .sparse import sparse_terms
from .torch_backend import total


class ELBOTerms(NamedTuple):
    """The negative ELBO and its two terms, in nats: three separate tensors, `[]`, or `[B]` with `reduction="none"`."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


def loss_terms(*call, known: Tensor | None = None) -> ELBOTerms:
    """The terms of tensors as users passed them: see `planned_terms` and `traced_terms`."""
    return traced_terms(*call) if is_surrounded() else planned_terms(*call, known=known)


def traced_terms(
    name: str, objective: Objective, tensors: Sequence, parameters: int, weighted: bool, latents: int, factors: Factors
) -> ELBOTerms:
    """Likewise, of a call that something surrounds."""
    call = check_loss(name, objective, tensors, parameters, weighted, latents)
    if is_sparse(tensors[parameters]):
        return ELBOTerms(*sparse_terms(name, objective, tensors, parameters, weighted, latents, factors))
    return ELBOTerms(*traced.loss(call, factors, tensors))


def planned_terms(
    name: str, objective: Objective, tensors: Sequence, parameters: int, weighted: bool, latents: int, factors: Factors,
    known: Tensor | None = None,
) -> ELBOTerms:  # fmt: skip
    """Likewise, of an eager call.

    The tensors are the parameters of the likelihood, which errors call `name`, x, a weight if `weighted`, and the latents: mu
    and logvar, a KL that is reduced already, or none, as `latents` says: 2, 1 or 0. Without a KL, only `recon` is not None.
    With the reduction "none" the parameters may have several samples of all of x, one after the other. `known`: the upstream
    factor of each row, where it is known before backward.
    """
    plan = loss_plan(name, objective, tensors, parameters, weighted, latents, factors)
    if plan is None:
        found = sparse_terms(name, objective, tensors, parameters, weighted, latents, factors, known)
        return tuple.__new__(ELBOTerms, found)
    terms = _by_autograd(plan, tensors, factors) if plan.is_by_autograd else None
    if terms is None:
        if not plan.is_dense:
            tensors = plan.dense(tensors)
        divisor = plan.divisor_of(tensors) if plan.divisor is None else plan.divisor
        if plan.backend is None:
            terms = traced.loss(plan.call, factors, tensors, divisor)
        elif plan.path.wants:
            terms = _apply((plan, factors, divisor, known), *tensors)
        else:
            terms = plan.backend.loss_forward(plan, factors, tensors, divisor, None, plan.path.stores)[:3]
    elif plan.is_whole and plan.likelihood.checked_by_torch:  # as it came, and not in another dtype
        return tuple.__new__(ELBOTerms, terms)
    if plan.looks and not is_well(plan.silent, tensors[plan.count], terms[1]):
        check_values(plan, name, tensors, terms[1])
    return tuple.__new__(ELBOTerms, terms)


def _by_autograd(plan: LossPlan, tensors: Sequence[Tensor], factors: Factors):
    """Likewise, where Torch has a function for the reconstruction that costs less than ours; None where it has not."""
    n, dtype, likelihood = plan.count, plan.dtype, plan.likelihood
    given, x, weight = tensors[:n], tensors[n], None if plan.weight_shape is None else tensors[n + 1]
    if not plan.is_whole:
        given = [p.to(dtype) for p in given]
        x, weight = likelihood.target(given[0], x, dtype), None if weight is None else weight.to(dtype)
    recon = likelihood.sum_by_torch(given, x, weight)
    if recon is None:
        return None
    if plan.divisor != 1:
        recon = recon / plan.divisor
    if plan.latents == 0:
        return None, recon, None
    if plan.kl_plan is None:
        kl = tensors[-1] if tensors[-1].dtype == plan.dtype else tensors[-1].to(plan.dtype)
        return total(factors, recon, kl), recon, kl.clone()
    kl = run(plan.kl_plan, tensors[-2:], None)[1]
    return total(factors, recon, kl), recon, kl


def composed_terms(
    name: str, objective: Objective, tensors: Sequence, parameters: int, weighted: bool, kl: Tensor | None,
    factors: Factors = ONE, known: Tensor | None = None,
) -> ELBOTerms:  # fmt: skip
    """Likewise, of a KL that is reduced already, or of none; the likelihood may be made of the sums of another one."""
    behind = () if kl is None else (kl,)
    if objective.is_sum:
        return loss_terms(name, objective, (*tensors, *behind), parameters, weighted, len(behind), factors, known=known)
    likelihood, inner = objective.likelihood, objective.likelihood.inner
    call = check_loss(name, objective, (*tensors, *behind), parameters, weighted, len(behind))
    given, x, weight, _ = call.split(tensors)
    weight = call.shaped(weight, given[0], x)
    of_sums = objective._replace(likelihood=inner, reduction="none" if call.per_sample else "sum")
    sums = loss_terms(name, of_sums, tensors, parameters, weighted, 0, ONE).recon
    counts = total = likelihood.count(given[0], x, weight, call.dtype)
    if call.per_sample:
        counts = math.prod(x.shape[1:])
        if weight is not None:
            counts = formula.reduced(weight.to(call.dtype).expand(x.shape), "none")
    recon = likelihood.compose(sums, counts, total) / call.divisor(given[0], x, weight)
    if kl is None:
        return tuple.__new__(ELBOTerms, (None, recon, None))
    return ELBOTerms(*formula.with_loss(recon, kl.to(recon.dtype, copy=True), factors))


def record_reconstruction(monitor, objective: Objective, tensors: Sequence, parameters: int, weighted: bool, recon, statistics):
    """Tell a monitor of a call."""
    call = check_loss("recon_x", objective, tensors, parameters, weighted, 0)
    given, x, weight, _ = call.split(tensors)
    batch, elements = x.shape[0], objective.likelihood.count(given[0], x, call.shaped(weight, given[0], x), call.dtype)
    factors = {"sum": 1.0, "none": 1.0, "batchmean": batch, "mean": elements}
    total = recon.detach().sum() * factors[call.reduction]
    if call.reduction == "mean":  # of nothing it is NaN, and the sum 0
        is_nothing = elements == 0
        if isinstance(is_nothing, Tensor):
            total = total.masked_fill(is_nothing, 0.0)
        elif is_nothing:
            total = torch.zeros_like(total)
    monitor.record(batch, total, elements, statistics)


class Loss(Function):
    """Its tensors come as the plan lays them out. What else a call has comes in one argument, each of which costs: the plan,
    the factors, the divisor, and the upstream factor of each row, or None where it is guessed."""

    @staticmethod
    @never_compiled
    def forward(ctx, given: tuple[LossPlan, Factors, float | Tensor, Tensor | None], *tensors):
        ctx.set_materialize_grads(False)
        plan, factors, divisor, known = given
        loss, recon, kl, stored, sums, used = plan.backend.loss_forward(
            plan, factors, tensors, divisor, known, plan.path.stores
        )
        beta, recon_weight = factors
        saved: Sequence[Tensor | None] = ()
        if type(beta) is not float or type(recon_weight) is not float or type(divisor) is not float:
            numbers = beta, recon_weight, divisor
            saved = [n if isinstance(n, Tensor) else None for n in numbers]
            (*factors, divisor) = (n if t is None else None for n, t in zip(numbers, saved, strict=True))
        sums = sums or ()
        ctx.save_for_backward(*tensors, *sums, *saved)
        # In one attribute, each of which costs.
        ctx.state = plan, factors, divisor, known is None, used, len(tensors), len(sums), [stored]
        return loss, recon, kl

    @staticmethod
    @never_compiled
    def backward(ctx, *upstreams):
        plan, factors, divisor, guesses, used, count, more, kept = ctx.state
        tensors, sums = ctx.saved_tensors, None
        if len(tensors) > count:
            tensors, sums, saved = tensors[:count], tensors[count : count + more], tensors[count + more :]
            if saved:
                (*factors, divisor) = (n if t is None else t for n, t in zip((*factors, divisor), saved, strict=True))
        needs = ctx.needs_input_grad[1:]
        if not is_usual(plan, upstreams):
            found = formula.differentiate(lambda *t: formula.terms(plan.call, factors, divisor, t), tensors, needs, upstreams)
            return None, *found
        stored = None
        if upstreams[0] is not None or upstreams[1] is not None:
            # Handed out once, and without keeping a reference: it becomes `.grad` without a copy, and a second backward through
            # a retained graph, which finds None, leaves it alone.
            stored, kept[0] = kept[0], None
        used = None if stored is None else used
        tensors = plan.again(tensors)
        found, seen = plan.backend.loss_backward(plan, factors, tensors, divisor, upstreams, stored, sums or None, used, needs)
        if seen is not None and guesses:
            plan.remember(seen)
        return None, *found


_apply = super(Function, Loss).apply  # not the one in Python, which looks for transformations again
