"""The KL, and what of it enters the objective: free bits, capacity, balance, a beta for each dimension."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..basics.arguments import factor_of, result_dtype
from ..latents.posterior import Latents
from ..latents.weighting import ALL, Weighting
from .call import KINDS, KLCall
from .formula import reduced
from .latents import latents_terms


class Statistics(NamedTuple):
    """What diagnostics are made of, from the pass that computed the KL: each of the shape `mu.shape[1:]`, without gradient."""

    kl: Tensor  # the mean over the batch
    mu_sum: Tensor  # sums over the batch
    mu_square_sum: Tensor


def kl_of(latents: Latents, tensors: Sequence[Tensor], reduction: str) -> Tensor:
    """The reduced KL."""
    kind = KINDS.get(reduction, "sum")
    return latents_terms(KLCall(latents, result_dtype(*tensors), kind, reduction), tensors)[1]


def divergence_terms(
    latents: Latents, tensors: Sequence[Tensor], *, weighting: Weighting = ALL, beta: float | Tensor = 1.0,
    reduction: str = "sum", statistics: bool = False,
) -> tuple[Tensor, Tensor, Statistics | None]:  # fmt: skip
    """The KL, and what of it is weighted in the objective: `(kl, weighted, statistics or None)`.

    All has been checked; a `beta` for each dimension has the shape `mu.shape[1:]`. `kl` is the true KL, reduced, in memory of
    its own. `weighted` is what `weighting` makes of it, which is a mean over samples, scaled likewise: times B with the
    reduction "sum", over D with "mean"; with "none" it is one value a sample. It has a beta for each dimension in it, and no
    other.
    """
    mu, batch = tensors[0], tensors[0].shape[0]
    each = isinstance(beta, Tensor) and beta.dim() > 0
    free_bits, per, capacity = weighting.free_bits, weighting.free_bits_per, weighting.capacity
    floor = free_bits if per == "element" else None
    groups = None if free_bits is None or each or per == "element" else per
    total, shares = 1.0, None
    if weighting.balance is not None:
        total = sum(weighting.balance)
        shares = weighting.balance[0] / total, weighting.balance[1] / total

    # What is computed of each column, row or element, and what of all.
    per_sample = reduction == "none" or groups == "sample" or (capacity is not None and weighting.capacity_per == "sample")
    per_dimension = each or groups in ("dimension", "channel")
    if each and (per_sample or floor is not None):
        kind = "element"
    elif per_sample or floor is not None:
        kind = "row" if per_sample else "sum"
    else:
        kind = "column" if per_dimension or statistics else "sum"
    call = KLCall(
        latents, result_dtype(*tensors), kind, "sum" if groups is None else reduction, None if kind == "element" else floor,
        shares, statistics and kind == "column", None if groups is None else free_bits, groups,
    )  # fmt: skip
    _, kl, weighted, sums = latents_terms(call, tensors)
    found = None
    if statistics:
        found = _statistics(call, tensors, kl, sums)
    scale = factor_of(reduction, mu)
    if groups is not None:
        if not batch:  # of nothing, which no sum was times
            kl, weighted = times(scale, kl), times(scale, weighted)
        return kl, times(total, weighted), found

    weighted = kl if weighted is None else weighted
    if each:
        if kind == "element" and floor is not None:  # once more from what is written anyway
            weighted = torch.where(kl <= floor, floor, weighted)
        elif free_bits is not None:
            weighted = torch.where(weighted <= free_bits * batch, free_bits * batch, weighted)
        weighted = weighted * beta.to(kl.dtype)
    if kind == "element":
        kl, weighted = reduced(kl, reduction), reduced(weighted, reduction)
    elif kind == "column":
        kl, weighted = kl.sum(), weighted.sum()
    if capacity is not None:
        if isinstance(capacity, Tensor):
            capacity = capacity.to(kl.device, kl.dtype)
        weighted = (weighted - (capacity if per_sample else capacity * batch)).abs()
    if kind == "row" and reduction != "none":
        kl, weighted = kl.sum(), weighted.sum()
    kl = times(scale, kl)
    return kl.clone() if kl is weighted else kl, times(scale * total, weighted), found


def _statistics(call: KLCall, tensors: Sequence[Tensor], kl: Tensor, sums: Sequence[Tensor] | None) -> Statistics:
    """From what a pass over the latents gave; from one more, if it was not of columns."""
    mu, scale = tensors[0], 1.0
    if call.kind != "column":
        with torch.no_grad():
            of_columns = KLCall(call.latents, call.dtype, "column", statistics=True)
            _, kl, _, sums = latents_terms(of_columns, tensors)
    elif call.groups is not None:
        (kl, *sums), scale = sums, call.scale(mu)
    return Statistics(kl.detach() * (1 / (scale * mu.shape[0]) if mu.shape[0] else torch.nan), *sums)


def times(factor: float | Tensor, value: Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return value * factor.to(value.dtype)
    return value if factor == 1 else value * factor
