"""The KL of categorical latents by the Torch backend, on a CPU: some rows at a time, value and derivatives in one pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..basics.layout import without_copies
from ..latents.categorical import kl_elements, kl_in_one_pass
from . import formula
from .blocks import block_size, converted, spare


class Kept(NamedTuple):
    """What backward needs: derivatives of each group's KL, which are handed out once; and which groups, or which of their sums,
    lie below what is free."""

    slopes: list[Tensor | None]
    low: Tensor | None


def forward(plan, tensors: Sequence[Tensor]):
    """`torch_backend.latents_forward` of classes."""
    call, like = plan.call, plan.call.latents.terms(tensors)
    values, slopes = _kl_of_groups(plan, tensors)
    kl, weighted, low = formula.scaled(formula.by_kind(values, call.kind), plan.kl_scale), None, None
    if call.floor is not None:
        low = values <= call.floor
        weighted = formula.scaled(formula.by_kind(values.masked_fill(low, call.floor), call.kind), plan.kl_scale)
    if call.groups is not None:
        kl, weighted, _, low = formula.with_free_bits(call, like, kl, weighted, None)
    return None, kl, weighted, None, Kept(slopes, low)


def backward(plan, tensors: Sequence[Tensor], needs: Sequence[bool], grad_kl, grad_weighted, kept: Kept):
    """`torch_backend.latents_backward` of classes."""
    factors = factors_of(plan.call, plan.call.latents.terms(tensors), grad_kl, grad_weighted, kept.low)
    found: list[Tensor | None] = [None] * len(tensors)
    for i, t in enumerate(tensors):
        if needs[i]:
            if kept.slopes[i] is None:  # handed out before: the graph was retained
                kept.slopes[:] = _kl_of_groups(plan, tensors)[1]
            slope, kept.slopes[i] = kept.slopes[i], None
            factor = factors[i] if plan.kl_scale == 1 else factors[i] * plan.kl_scale
            if factor.dim() or factor.item() != 1:
                slope.mul_(factor.unsqueeze(-1))
            found[i] = slope.to(t.dtype)
    return found


def factors_of(call, like: Tensor, grad_kl: Tensor | None, grad_weighted: Tensor | None, low: Tensor | None) -> list[Tensor]:
    """What arrives at the KL of each group, or of all of them: of the posterior, and of the prior."""
    if call.groups is not None:
        grad_kl, grad_weighted = formula.without_free_bits(call, like, low, grad_kl, grad_weighted)
    if call.kind == "row":
        shape = [-1, *[1] * (like.dim() - 1)]
        grad_kl, grad_weighted = (g if g is None else g.reshape(shape) for g in (grad_kl, grad_weighted))
    if call.floor is not None and grad_weighted is not None:
        grad_weighted = grad_weighted.expand(like.shape).masked_fill(low, 0.0)
    if grad_weighted is None:
        return [grad_kl, grad_kl]
    shared = [grad_weighted * share for share in call.shares or (1.0, 1.0)]
    return shared if grad_kl is None else [grad_kl + g for g in shared]


def _kl_of_groups(plan, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The KL of each group, and its derivatives by the logits of both sides, if gradients are wanted."""
    latents, dtype, (logits, *prior) = plan.call.latents, plan.dtype, tensors
    prior = [without_copies(p, last=1) for p in prior]
    slopes: list[Tensor | None] = [None, None]
    if plan.wants:
        slopes[: len(tensors)] = (torch.empty_like(logits, dtype=dtype) if t.requires_grad else None for t in tensors)
    rows, parts = logits.shape[0], []
    height = max(1, rows * block_size() // logits.numel())
    for start in range(0, rows, height):
        q, p, out = logits, prior, slopes
        if height < rows:
            block = slice(start, start + height)
            q, p = q[block], [t if t.shape[0] == 1 else t[block] for t in prior]
            out = [s if s is None else s[block] for s in slopes]
        q = converted("logits", q, dtype)
        p = [converted("prior", t, dtype) for t in p]
        found = kl_in_one_pass(latents, q, p[0] if p else None, out, spare(q, dtype))
        parts.append(_by_autograd(latents, (q, *p), out) if found is None else found)
    return parts[0] if len(parts) == 1 else torch.cat(parts), slopes


def _by_autograd(latents, tensors: Sequence[Tensor], out: Sequence[Tensor | None]) -> Tensor:
    """Where there are impossible classes, infinities or NaN."""
    with torch.enable_grad():
        leaves = [t.detach().expand(tensors[0].shape).requires_grad_() for t in tensors]
        values = kl_elements(latents, *leaves)
        for slope, found in zip(out, torch.autograd.grad(values.sum(), leaves), strict=False):
            if slope is not None:
                slope.copy_(found)
    return values.detach()
