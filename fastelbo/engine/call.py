"""What a call computes, beside its tensors: its options, canonical, and what follows from the tensors' types."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..basics.arguments import (
    OF_EACH,
    REDUCTIONS,
    check_batch,
    check_device,
    check_floats,
    check_reduction,
    check_weight,
    factor_of,
    result_dtype,
    split_reduction,
)
from ..basics.scalars import check_real
from ..basics.sparse import check_data, is_sparse
from ..latents.posterior import LOGVAR, CategoricalPosterior, Latents, Posterior, check_latents, find_posterior
from ..latents.weighting import Weighting, check_weighting, counts_of, shares_of
from ..likelihoods import Likelihood, find_likelihood

# What a loss multiplies its terms by: beta and `recon_weight`, each a float or a 0-d tensor.
Factors = tuple[float | Tensor, float | Tensor]
ONE: Factors = (1.0, 1.0)


class Objective(NamedTuple):
    """The options of a call that most calls have."""

    likelihood: Likelihood
    posterior: Posterior | CategoricalPosterior
    reduction: str
    kl_reduction: str
    is_sum: bool  # of the likelihood's terms, and not made of another one's sums
    is_direct: bool  # one Function computes it from mu and logvar, if these have no prior of their own
    given: str | Likelihood | None = None  # as the likelihood, by the user
    samples: int = 1  # of all of x, one after the other, that the parameters have

    @classmethod
    def of(cls, likelihood, posterior, reduction) -> "Objective":
        """From what users pass."""
        given, likelihood, posterior = likelihood, find_likelihood(likelihood), find_posterior(posterior)
        is_usual = posterior.parameter == "logvar" and posterior.clamp is None
        is_sum = likelihood.inner is None
        return cls(likelihood, posterior, *split_reduction(reduction), is_sum, is_usual and is_sum, given)


TENSORS = frozenset((Tensor, Parameter))


def with_numbers(name: str, given: Sequence, likelihood: Likelihood) -> tuple:
    """A likelihood's parameters, which errors call `name`, with a 0-d tensor for each number behind the first. What the number
    has to be needs no look at the device."""
    if not given or not isinstance(given[0], Tensor):
        return tuple(given)  # an error further in
    first, *others = given
    dtype = torch.promote_types(first.dtype, torch.float32)  # which keeps its digits
    found = [first]
    for i, value in enumerate(others, 1):
        if not isinstance(value, Tensor):
            value = check_real(f"{name}[{i}]", value, "a tensor or a number")
            if value != value:
                raise ValueError(f"{name}[{i}] must be a tensor or a number, got nan")
            if i < len(likelihood.ranges) and (allowed := likelihood.ranges[i]) is not None and not allowed.holds(value):
                raise ValueError(f"{name}[{i}] must {allowed.words} for the likelihood {likelihood.name!r}, got {value}")
            if isinstance(value, float):
                value = torch.full((), value, dtype=dtype, device=first.device)
            else:  # a symbol, which `full` would fix
                value = torch.ones((), dtype=dtype, device=first.device) * value
        found.append(value)
    return tuple(found)


class LossCall(NamedTuple):
    """What a call of `loss` computes. Its tensors: parameters of the likelihood, x, a weight, and what the KL is made of."""

    likelihood: Likelihood
    reduction: str
    kl_reduction: str
    dtype: torch.dtype
    parameters: int  # how many tensors are parameters
    weighted: bool
    latents: int  # 2: mu and logvar; 1: a KL that is reduced already; 0: none, and there is no KL

    def split(self, tensors: Sequence) -> tuple[Sequence, Tensor, Tensor | None, Sequence]:
        """`(parameters, x, weight or None, latents)`."""
        n = self.parameters
        return tensors[:n], tensors[n], tensors[n + 1] if self.weighted else None, tensors[n + 1 + self.weighted :]

    @property
    def per_sample(self) -> bool:
        return self.reduction == "none"

    @property
    def is_plain(self) -> bool:
        """Whether one kernel computes it all."""
        return self.likelihood.is_plain(self.parameters) and not self.weighted

    @property
    def operands(self) -> int:
        """The parameters, with the number that stands for a second one."""
        return self.parameters + (self.parameters == 1 and self.likelihood.fixed is not None)

    def kl_factor(self, mu: Tensor) -> float:
        """What the sum of the KL is times."""
        return factor_of(self.kl_reduction, mu)

    def shaped(self, weight: Tensor | None, first: Tensor, x: Tensor) -> Tensor | None:
        """A weight with as many dimensions as there are of terms."""
        return weight if weight is None else weight.reshape(self.weight_shape(weight, first, x))

    def weight_shape(self, weight: Tensor, first: Tensor, x: Tensor) -> torch.Size:
        shape = [1] * (x.dim() - weight.dim()) + list(weight.shape)
        dim = self.likelihood.term_dim(first, x)
        if dim is not None:  # classes or channels share one
            del shape[dim]
        return torch.Size(shape)

    def divisor(self, first: Tensor, x: Tensor, weight: Tensor | None) -> float | Tensor:
        """What the sum of the reconstruction is divided by."""
        if self.reduction == "batchmean":
            return torch.sym_float(x.shape[0])
        return self.likelihood.count(first, x, weight, self.dtype) if self.reduction == "mean" else 1.0


def check_loss(name: str, objective: Objective, tensors: Sequence, parameters: int, weighted: bool, latents: int) -> LossCall:
    """The call, once its tensors, of which errors call the first ones `name`, are found to fit together."""
    likelihood, _, reduction, kl_reduction, _, _, _, samples = objective
    given, x = tensors[:parameters], tensors[parameters]
    check_data("x", x)
    if likelihood.at_zero is None and is_sparse(x):
        raise TypeError(f"x must be dense for the likelihood {likelihood.name!r}, which has no closed form where x is 0")
    likelihood.check(name, given if samples == 1 else [p[: x.shape[0]] for p in given], x)
    first, rest = given[0], tensors[parameters + 1 + weighted :]
    if weighted:
        check_weight(tensors[parameters + 1], x, likelihood.term_dim(first, x))
        if tensors[parameters + 1].dim() == 0 and reduction == "mean":
            raise ValueError(
                "weight must not be 0-d with the reduction 'mean', which divides by it: recon_weight takes a number"
            )
    if latents == 2:
        mu, _ = check_latents(*rest, LOGVAR)[1]
        check_device("mu", mu, name, first)
        if reduction == "none":
            check_batch("mu", mu, name, first, OF_EACH)
    elif latents == 1:
        (kl,) = rest
        check_floats("kl", kl)
        expected = first.shape[:1] if reduction == "none" else ()
        if kl.shape != expected:
            raise ValueError(f"kl must have shape {tuple(expected)} for the reduction {reduction!r}, got {tuple(kl.shape)}")
        check_device("kl", kl, "the prediction", first)
    dtype = result_dtype(*given, *rest)
    return LossCall(likelihood, reduction, kl_reduction, dtype, parameters, weighted, latents)


REDUCTIONS_OF_KL = *REDUCTIONS, "dimension", "element"  # where no loss adds to it

KINDS = {"none": "row", "dimension": "column", "element": "element"}


class KLCall(NamedTuple):
    """What is computed of latents. Their tensors are mu, its second parameter and the prior's two, if it is not N(0, I); of
    classes, logits, and the prior's, if it is not uniform."""

    latents: Latents
    dtype: torch.dtype
    kind: str | None  # the KL is summed over everything ("sum"), each sample ("row"), the batch ("column") or not ("element")
    reduction: str = "sum"  # which decides what the sums are times
    floor: float | None = None  # under each element, in `weighted`
    shares: tuple[float, float] | None = None  # 1 in all: of the gradient of `weighted`, to the posterior and to the prior
    statistics: bool = False  # sums over the batch of mu and mu^2, with "column"
    free_bits: float | None = None  # under each group's mean over the batch: then the sums of a kind are added up
    groups: str | None = None  # "dimension", "channel", "sample" or "batch"

    @property
    def is_mean_of_weights(self) -> bool:
        """Whether the sums are divided by sums of weights, once they are there."""
        return self.latents.weighted and self.reduction in ("mean", "dimension")

    def scale(self, mu: Tensor) -> float:
        if self.is_mean_of_weights:
            return 1.0
        if self.reduction == "dimension":
            return 1 / mu.shape[0] if mu.shape[0] else math.nan
        return factor_of(self.reduction, mu)

    def floor_of_groups(self, mu: Tensor, weight: Tensor | None = None) -> float | Tensor:
        """What of a group's sum, times what sums are times, is free."""
        return self.free_bits * self.scale(mu) * counts_of(self.groups, weight, mu, self.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether it is what most calls are: N(mu, exp(logvar)) from N(0, I), in one sum or one for each sample."""
        return self.is_simple and self.kind in (None, "sum", "row")

    @property
    def is_whole(self) -> bool:
        """Whether all of the KL counts alike, of a posterior without clamp."""
        return self.latents.posterior.clamp is self.floor is self.shares is self.groups is None and not self.statistics

    @property
    def is_simple(self) -> bool:
        """Whether it is of N(mu, exp(logvar)) from N(0, I), and no element differs from the others."""
        posterior, prior, weighted = self.latents
        simple = posterior.parameter == "logvar" and posterior.clamp is None and prior is None and not weighted
        return simple and self.floor is self.shares is None and self.kind != "element"


def check_kl(
    mu, logvar, posterior, prior, reduction, samples: bool, weighting=None, kl_weight=None
) -> tuple[KLCall, tuple[Tensor, ...]]:
    """The call and its tensors, from what users pass. A reduction of None: no KL; `samples`: a sample is made, too; a
    `weighting` has no capacity."""
    latents, tensors = check_latents(mu, logvar, posterior, prior, kl_weight, samples=samples)
    if weighting is not None:
        weighting = check_weighting(weighting, tensors[0], prior is not None, 1.0, reduction)
        return weighted_call(latents, dtype_of(latents, tensors), weighting, reduction), tensors
    if reduction is not None:
        check_reduction(reduction, REDUCTIONS if samples else REDUCTIONS_OF_KL)
    kind = None if reduction is None else KINDS.get(reduction, "sum")
    return KLCall(latents, dtype_of(latents, tensors), kind, reduction or "sum"), tensors


def dtype_of(latents: Latents, tensors: Sequence[Tensor]) -> torch.dtype:
    """That of the KL, in which weights have no part."""
    posterior, prior, _ = latents.split(tensors)
    return result_dtype(*posterior, *prior)


def weighted_call(latents: Latents, dtype: torch.dtype, weighting: Weighting, reduction: str) -> KLCall:
    """The call of a KL and of what `weighting`, which has no capacity, makes of it."""
    free_bits, per = weighting.free_bits, weighting.free_bits_per
    _, shares = shares_of(weighting)
    if free_bits is None or per == "element":
        return KLCall(latents, dtype, "row" if reduction == "none" else "sum", reduction, free_bits, shares)
    kind = {"dimension": "column", "channel": "column", "sample": "row", "batch": "sum"}[per]
    return KLCall(latents, dtype, kind, reduction, None, shares, False, free_bits, per)
