"""The KL, and what of it enters the objective: free bits, capacity, balance, a beta for each dimension."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..basics.arguments import REDUCTIONS, factor_of, result_dtype
from ..latents.posterior import Latents, check_latents
from ..latents.weighting import ALL, Weighting, check_weighting, counts_of, is_of_each, shares_of
from .call import KINDS, REDUCTIONS_OF_KL, KLCall, dtype_of, weighted_call
from .formula import over_weights, reduced
from .latents import draw, latents_terms, run
from .plan import latents_plan_of


class Statistics(NamedTuple):
    """What diagnostics are made of: sums over the batch, `mu.shape[1:]`, without gradient."""

    kl: Tensor
    mu: Tensor
    mu_square: Tensor
    batch: int  # of the latents, which may be another than that of the data
    weight: Tensor | None = None


def kl_of(latents: Latents, tensors: Sequence[Tensor], reduction: str) -> Tensor:
    """The reduced KL."""
    kind = KINDS.get(reduction, "sum")
    return latents_terms(KLCall(latents, dtype_of(latents, tensors), kind, reduction), tensors)[1]


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
    each = is_of_each(beta)
    statistics = statistics and not latents.is_categorical  # which have no means
    if statistics and latents.weighted:
        kl, counted, _ = divergence_terms(latents, tensors, weighting=weighting, beta=beta, reduction=reduction)
        return kl, counted, _weighted_statistics(latents, tensors)
    if weighting.capacity is None and not each:
        call = weighted_call(latents, dtype_of(latents, tensors), weighting, reduction)
        return _in_one_pass(call, tensors, weighting, statistics)
    mu, weight = latents.terms(tensors), latents.split(tensors)[2]
    free_bits, capacity = weighting.free_bits, weighting.capacity
    total, shares = shares_of(weighting)
    floor = free_bits if weighting.free_bits_per == "element" else None

    # What is computed of each column, row or element, and what of all.
    per_sample = reduction == "none" or (capacity is not None and weighting.capacity_per == "sample")
    if each and (per_sample or floor is not None):
        kind = "element"
    elif per_sample:
        kind = "row"
    else:
        kind = "column" if each or statistics else "sum"
    call = KLCall(latents, dtype_of(latents, tensors), kind, "sum", None, shares, statistics and kind == "column")
    _, kl, weighted, sums = latents_terms(call, tensors)
    found = _statistics(call, tensors, kl, sums) if statistics else None

    weighted = kl if weighted is None else weighted
    if each:
        of = "element" if kind == "element" else "dimension"
        bound = None if free_bits is None else free_bits * counts_of(of, weight, mu, call.dtype)
        if bound is not None:  # once more from what is written anyway
            weighted = torch.where(kl <= bound, bound, weighted)
        weighted = weighted * beta.to(kl.dtype)
    if kind == "element":
        kl, weighted = reduced(kl, reduction), reduced(weighted, reduction)
    elif kind == "column":
        kl, weighted = kl.sum(), weighted.sum()
    if capacity is not None:
        if isinstance(capacity, Tensor):
            capacity = capacity.to(kl.device, kl.dtype)
        of = "sample" if per_sample else "batch"
        weighted = (weighted - capacity * counts_of(of, weight, mu, call.dtype)).abs()
    if kind == "row" and reduction != "none":
        kl, weighted = kl.sum(), weighted.sum()
    scale = factor_of("sum" if call.latents.weighted and reduction == "mean" else reduction, mu)
    kl = times(scale, kl)
    weighted = times(scale * total, weighted)
    if latents.weighted and reduction == "mean":
        _, kl, weighted, _ = over_weights(call._replace(reduction=reduction), tensors, (None, kl, weighted, None))
    return kl.clone() if kl is weighted else kl, weighted, found


def weighted_kl(mu, logvar, posterior, prior, weighting, kl_weight, reduction: str, surrounded: bool) -> Tensor:
    """What a weighting makes of the KL, also of each dimension or element; from what users pass."""
    if not surrounded and isinstance(weighting, Weighting) and weighting.capacity is None and reduction in REDUCTIONS:
        plan, tensors = latents_plan_of(mu, logvar, posterior, prior, reduction, None, False, weighting, kl_weight)
        _, kl, weighted, _ = run(plan, tensors, None)
        return times(shares_of(weighting)[0], kl if weighted is None else weighted)
    latents, tensors = check_latents(mu, logvar, posterior, prior, kl_weight, samples=False)
    weighting = check_weighting(weighting, tensors[0], latents.prior is not None, 1.0, reduction, REDUCTIONS_OF_KL)
    if reduction in REDUCTIONS:
        return divergence_terms(latents, tensors, weighting=weighting, reduction=reduction)[1]
    free_bits, (total, shares) = weighting.free_bits, shares_of(weighting)
    of = "element" if free_bits is not None and weighting.free_bits_per == "element" else reduction
    mu, dtype, weight = latents.terms(tensors), dtype_of(latents, tensors), latents.split(tensors)[2]
    _, kl, weighted, _ = latents_terms(KLCall(latents, dtype, KINDS[of], of, None, shares), tensors)
    weighted = kl if weighted is None else weighted
    if free_bits is not None:
        bound = free_bits if of == "dimension" else free_bits * counts_of("element", weight, mu, dtype)
        weighted = torch.where(kl <= bound, bound, weighted)
    return times(total, weighted if of == reduction else weighted.sum(0) / counts_of("dimension", weight, mu, dtype))


def weighted_sample(
    mu, logvar, posterior, prior, weighting, kl_weight, reduction: str, eps: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A sample, and what a weighting makes of the KL, from what users pass."""
    latents, tensors = check_latents(mu, logvar, posterior, prior, kl_weight)
    weighting = check_weighting(weighting, tensors[0], latents.prior is not None, 1.0, reduction)
    noise, dtype = draw(tensors[0], tensors[1], eps, generator), dtype_of(latents, tensors)
    call = weighted_call(latents, dtype, weighting, reduction)
    if weighting.capacity is None and call.kind != "column":  # no pass over columns makes a sample
        z, kl, weighted, _ = latents_terms(call, tensors, noise)
        return z, kl if weighted is None else times(shares_of(weighting)[0], weighted)
    z = latents_terms(KLCall(Latents(latents.posterior), result_dtype(*tensors[:2]), None), tensors[:2], noise)[0]
    return z, divergence_terms(latents, tensors, weighting=weighting, reduction=reduction)[1]


def _in_one_pass(call: KLCall, tensors: Sequence[Tensor], weighting: Weighting, statistics: bool):
    """Likewise, of what one call of the latents has in it."""
    if statistics and call.kind in ("sum", "column") and call.floor is None:
        call = call._replace(kind="column", statistics=True)
    _, kl, weighted, sums = latents_terms(call, tensors)
    found = _statistics(call, tensors, kl, sums) if statistics else None
    if call.kind == "column" and call.groups is None:
        kl, weighted = kl.sum(), weighted if weighted is None else weighted.sum()
    return kl, kl.clone() if weighted is None else times(shares_of(weighting)[0], weighted), found


def _statistics(call: KLCall, tensors: Sequence[Tensor], kl: Tensor, sums: Sequence[Tensor] | None) -> Statistics:
    """From what a pass over the latents gave; from one more, if it was not of columns."""
    if call.kind != "column":
        call = KLCall(call.latents, call.dtype, "column", statistics=True)
        with torch.no_grad():
            _, kl, _, sums = latents_terms(call, tensors)
    elif call.groups is not None:
        kl, *sums = sums
    mu, batch = tensors[0], tensors[0].shape[0]
    return Statistics(kl.detach() * (1 / call.scale(mu) if batch else torch.nan), *sums, batch)


@torch.no_grad()
def _weighted_statistics(latents: Latents, tensors: Sequence[Tensor]) -> Statistics:
    """What has the weight 0 does not count, even if it is NaN."""
    (mu, *_), _, weight = latents.split(tensors)
    dtype = dtype_of(latents, tensors)
    kl = latents_terms(KLCall(latents, dtype, "element"), tensors)[1]
    weight = counts_of("element", weight, mu, dtype)
    mu = torch.where(weight == 0, 0, mu.to(dtype))
    return Statistics(kl.sum(0), (weight * mu).sum(0), (weight * mu.square()).sum(0), len(mu), weight.sum(0))


def times(factor: float | Tensor, value: Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return value * factor.to(value.dtype)
    return value if factor == 1 else value * factor
