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
    """The KL, and what of it is added to the reconstruction: `(kl, weighted, statistics or None)`.

    All has been checked; a `beta` for each dimension has the shape `mu.shape[1:]`. `kl` is the true KL, reduced. `weighted` is
    beta times what `weighting` makes of it, which is a mean over samples, scaled likewise: times B with the reduction "sum",
    over D with "mean"; with "none" it is one value a sample.
    """
    mu, batch = tensors[0], tensors[0].shape[0]
    scale = factor_of(reduction, mu)
    each = isinstance(beta, Tensor) and beta.dim() > 0
    free_bits, capacity, balance = weighting.free_bits, weighting.capacity, weighting.balance
    floor = free_bits if weighting.free_bits_per == "element" else None

    per_sample = reduction == "none" or (free_bits is not None and weighting.free_bits_per == "sample")
    per_sample = per_sample or (capacity is not None and weighting.capacity_per == "sample")
    per_dimension = each or (free_bits is not None and weighting.free_bits_per in ("dimension", "channel"))
    if per_dimension and (per_sample or floor is not None):
        kind = "element"
    elif per_sample or floor is not None:
        kind = "row" if per_sample else "sum"
    else:
        kind = "column" if per_dimension or statistics else "sum"

    total, shares = 1.0, None
    if balance is not None:
        total = balance[0] + balance[1]
        shares = balance[0] / total, balance[1] / total
    call = KLCall(latents, result_dtype(*tensors), kind, "sum", None if kind == "element" else floor, shares)
    _, kl, weighted, sums = latents_terms(call._replace(statistics=statistics and kind == "column"), tensors)
    weighted = kl if weighted is None else weighted
    if kind == "element" and floor is not None:  # once more from what is written anyway
        weighted = torch.where(kl <= floor, floor, weighted)
    found = None
    if statistics:
        columns = kl.detach()
        if kind != "column":
            with torch.no_grad():
                of_columns = KLCall(latents, call.dtype, "column", statistics=True)
                _, columns, _, sums = latents_terms(of_columns, tensors)
        found = Statistics(columns * (1 / batch if batch else torch.nan), *sums)

    if isinstance(beta, Tensor):
        beta = beta.to(kl.dtype)
    if free_bits is not None and floor is None:
        if weighting.free_bits_per == "channel" and weighted.dim() > 1:
            weighted = weighted.flatten(1).sum(1)
        elif weighting.free_bits_per == "batch":
            weighted = weighted.sum()
        bound = free_bits if weighting.free_bits_per == "sample" else free_bits * batch  # of sums over the batch
        weighted = torch.where(weighted <= bound, bound, weighted)
    if each:
        weighted = weighted * beta
    elif kind == "column":
        weighted = weighted.sum()
    if each and kind == "column":
        weighted = weighted.sum()
    if kind == "element":
        kl, weighted = reduced(kl, reduction), reduced(weighted, reduction)
    elif kind == "column":
        kl = kl.sum()
    if capacity is not None:
        if isinstance(capacity, Tensor):
            capacity = capacity.to(kl.device, kl.dtype)
        weighted = (weighted - (capacity if per_sample else capacity * batch)).abs()
    if kind == "row" and reduction != "none":
        kl, weighted = kl.sum(), weighted.sum()
    if not each:
        weighted = times(beta, weighted)
    return times(scale, kl), times(scale * total, weighted), found


def times(factor: float | Tensor, value: Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return value * factor.to(value.dtype)
    return value if factor == 1 else value * factor
