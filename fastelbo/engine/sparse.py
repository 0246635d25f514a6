"""The loss of a sparse target: the reconstruction is one autograd Function, and the KL another.

A target in CSR comes to it from `planned_terms`, where the plan of a dense one ends, so that a dense call looks for nothing.
"""

from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..basics.sparse import Rows
from ..basics.tracing import is_seen, is_surrounded, is_wrapper, needs_formula, never_compiled
from ..latents.posterior import LOGVAR, Latents
from ..likelihoods import Likelihood
from ..likelihoods.base import check_own
from ..likelihoods.values import check_values, is_well, silent_range, support_to_check
from . import formula, torch_backend
from .backend import backend_for
from .blocks import block_size
from .call import KINDS, Factors, KLCall, LossCall, Objective, check_loss
from .guess import Guess
from .latents import latents_terms
from .plan import keep

_plans: dict[Hashable, "SparsePlan"] = {}


@never_compiled  # torch.compile takes no sparse tensor: it leaves the call as it is, and tries each function by itself
def sparse_terms(
    name: str, objective: Objective, tensors: Sequence, parameters: int, weighted: bool, latents: int, factors: Factors,
    known: Tensor | None = None,
) -> tuple[Any, Tensor, Any]:  # fmt: skip
    """See `engine.loss.planned_terms`; calls may be surrounded."""
    plan = _plan_of(name, objective, tensors, parameters, weighted, latents)
    call = plan.call
    given, x, weight, behind = call.split(tensors)
    rows = Rows.of(x)
    seen = is_seen(rows.values)
    if seen:
        rows = rows.checked("x", block_size())
    recon = _reconstruction(plan, given, rows, call.shaped(weight, given[0], x), known)
    if seen and plan.looks and not is_well(plan.silent if rows.values.numel() else None, rows.values, recon):
        check_values(plan, name, (*given, rows.dense(), *tensors[parameters + 1 :]), recon)
    if not behind:
        return None, recon, None
    if latents == 1:
        return formula.with_loss(recon, behind[0].to(call.dtype, copy=True), factors)
    of_kl = KLCall(Latents(LOGVAR), call.dtype, KINDS.get(call.kl_reduction, "sum"), call.kl_reduction)
    return formula.with_loss(recon, latents_terms(of_kl, behind)[1], factors)


def _plan_of(name: str, objective: Objective, tensors: Sequence, parameters: int, weighted: bool, latents: int) -> "SparsePlan":
    grad_mode = torch.is_grad_enabled()
    try:
        key = (
            objective, parameters, weighted, latents, grad_mode, is_surrounded(),
            *((type(t), t.dtype, t.device, t.layout, t.requires_grad, t.shape, t.is_neg()) for t in tensors),
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # not tensors, or nested ones
        check_loss(name, objective, tensors, parameters, weighted, latents)
        raise
    found = _plans.get(key)
    if found is None:
        call = check_loss(name, objective, tensors, parameters, weighted, latents)
        found = SparsePlan(call, tensors, grad_mode)
        if found.backend is not None and call.likelihood.is_own:
            check_own(name, call.likelihood, tensors[:parameters], tensors[parameters], call.dtype, grad_mode)
        keep(_plans, key, found)
    return found


class SparsePlan:
    """What is known of a call before its values are. `guess` is the one thing that changes."""

    __slots__ = (
        "backend", "call", "count", "divisor", "dtype", "guess", "likelihood", "looks", "loss_launches", "options",
        "per_sample", "silent", "stores", "support", "weight_shape",
    )  # fmt: skip

    def __init__(self, call: LossCall, tensors: Sequence[Tensor], grad_mode: bool) -> None:
        parameters, x, weight, _ = call.split(tensors)
        first, likelihood = parameters[0], call.likelihood
        self.call, self.likelihood, self.dtype, self.per_sample = call, likelihood, call.dtype, call.per_sample
        self.count = call.parameters
        self.stores = tuple(grad_mode and p.requires_grad for p in parameters)
        strange = is_surrounded() or any(t.is_neg() or is_wrapper(t) for t in tensors)
        seldom = grad_mode and weight is not None and weight.requires_grad
        self.backend = None if strange or seldom or not first.numel() else _backend_of(likelihood, x.device)
        self.guess = Guess(first.shape[0] if call.per_sample else 1, call.dtype, first.device)
        by_values = call.reduction == "mean" and weight is not None
        self.divisor = None if by_values else call.divisor(first, x, None)
        self.weight_shape = None if weight is None else call.weight_shape(weight, first, x)
        self.support = support_to_check(likelihood, first, x)
        self.silent = silent_range(self.support, likelihood.target_scale, x)
        self.looks = self.support is not None or any(likelihood.ranges)
        self.options, self.loss_launches = likelihood.constants(parameters, x), None

    def large_of(self, wants: Sequence[bool], parameters: Sequence[Tensor]) -> tuple[bool, ...]:
        """Which of the wanted gradients are as large as the first parameter."""
        return tuple(want and p.shape == parameters[0].shape for want, p in zip(wants, parameters, strict=True))


def _backend_of(likelihood: Likelihood, device: torch.device) -> ModuleType:
    return torch_backend if likelihood.kernel_at_zero is None else backend_for(device)


def _reconstruction(plan: SparsePlan, parameters: Sequence[Tensor], x: Rows, weight: Tensor | None, known) -> Tensor:
    divisor = plan.call.divisor(parameters[0], parameters[0], weight) if plan.divisor is None else plan.divisor
    if plan.backend is None:
        return _formula(plan, divisor, x, parameters, weight)
    dense = [p.contiguous() if p.device == x.values.device else p.to(x.values.device) for p in parameters]
    weight = weight if weight is None else weight.contiguous()
    if True in plan.stores:
        return Reconstruction.apply((plan, divisor, known, x), *dense, *x[:3], *(() if weight is None else (weight,)))
    return plan.backend.sparse_forward(plan, dense, x, weight, divisor, None)[0]


def _formula(plan: SparsePlan, divisor, x: Rows, parameters: Sequence[Tensor], weight: Tensor | None) -> Tensor:
    """The reconstruction of Torch operations, which autograd can differentiate as often as it likes."""
    parameters = [p.to(plan.dtype) for p in parameters]
    target = x.all()
    target = target._replace(values=plan.likelihood.target(parameters[0], target.values, plan.dtype))
    weight = weight if weight is None else weight.to(plan.dtype)
    values = formula.weighted_nll(plan.likelihood, parameters, target, weight)
    return formula.divided(formula.reduced(values, plan.call.reduction), divisor)


class Reconstruction(Function):
    """Its tensors are the parameters, the rows' three and a weight, which has the terms' dimensions."""

    @staticmethod
    @never_compiled
    def forward(ctx, given, *tensors):
        plan, divisor, known, x = given
        parameters, _, weight = _apart(plan, tensors, x.shape)
        recon, ctx.stored, used = plan.backend.sparse_forward(plan, parameters, x, weight, divisor, known)
        ctx.save_for_backward(*tensors)
        ctx.state = plan, divisor, known is None, used, x.shape
        return recon

    @staticmethod
    @never_compiled
    def backward(ctx, upstream):
        plan, divisor, guesses, used, shape = ctx.state
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        parameters, x, weight = _apart(plan, tensors, shape)
        none = [None] * (len(tensors) - plan.count)
        if needs_formula((upstream,)):
            found = formula.differentiate(
                lambda *p: (_formula(plan, divisor, x, p, weight),), parameters, needs[: plan.count], (upstream,)
            )
            return None, *found, *none
        # Handed out once: it becomes `.grad` without a copy, and a second backward through a retained graph leaves it alone.
        stored, ctx.stored = ctx.stored, None
        used = None if stored is None else used
        # A hook may bring them back with other strides.
        parameters, weight = [p.contiguous() for p in parameters], weight if weight is None else weight.contiguous()
        found, seen = plan.backend.sparse_backward(
            plan, parameters, x, weight, divisor, upstream, stored, used, needs[: plan.count]
        )
        if seen is not None and guesses:
            plan.guess.remember(seen)
        return None, *found, *none


def _apart(plan: SparsePlan, tensors: Sequence[Tensor], shape) -> tuple[Sequence[Tensor], Rows, Tensor | None]:
    n = plan.count
    return tensors[:n], Rows(*tensors[n : n + 3], shape), tensors[n + 3] if len(tensors) > n + 3 else None
