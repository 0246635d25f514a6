"""The objective as a formula of Torch operations, which autograd can differentiate as often as it likes.

What calls use that are traced where there are no kernels or transformed by `torch.func`, what backward uses with
`create_graph=True`, and what gradients come from that are seldom wanted.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..basics.sparse import Nonzeros
from ..basics.tracing import behind_upstream, is_behind_dynamo
from ..latents import categorical, gaussian
from ..latents.posterior import LOGVAR, Latents
from ..latents.weighting import counts_of
from ..likelihoods import Likelihood
from .call import Factors, KLCall, LossCall


def terms(call: LossCall, factors: Factors, divisor: float | Tensor, tensors: Sequence[Tensor]):
    """`(loss, recon, kl)`, as the backends' `loss_forward` computes them."""
    parameters, x, weight, latents = call.split(tensors)
    recon = reduced(elements(call, parameters, repeated(x, parameters[0]), weight), call.reduction)
    recon = divided(recon, divisor)
    if not latents:
        return None, recon, None
    if call.latents == 1:
        kl = latents[0].to(call.dtype, copy=True)
    else:
        values = gaussian.kl_elements(Latents(LOGVAR), *(t.to(call.dtype) for t in latents))
        kl = scaled(reduced(values, call.kl_reduction), call.kl_factor(latents[0]))
    return with_loss(recon, kl, factors)


def with_loss(recon: Tensor, kl: Tensor, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, recon, kl)`, three tensors that users may write to."""
    beta, recon_weight = factors
    if isinstance(beta, Tensor):  # the product keeps the KL, for the gradient by beta
        weighted_kl, kl = beta.to(kl.dtype) * kl, kl.clone()
    else:
        weighted_kl = beta * kl
    if isinstance(recon_weight, Tensor):
        weighted, recon = recon_weight.to(recon.dtype) * recon, recon.clone()
    else:
        weighted = weighted_by(recon_weight, recon)
    return weighted + weighted_kl, recon, kl


def weighted_by(recon_weight: float | Tensor, recon: Tensor) -> Tensor:
    """The reconstruction as the loss has it."""
    if isinstance(recon_weight, Tensor):
        return recon_weight.to(recon.dtype) * recon
    return recon if type(recon_weight) is float and recon_weight == 1.0 else recon_weight * recon


def elements(call: LossCall, parameters: Sequence[Tensor], x: Tensor, weight: Tensor | None) -> Tensor:
    """The negative log-likelihood of each term, times its weight."""
    target = call.likelihood.target(parameters[0], x, call.dtype)
    parameters = [p.to(call.dtype) for p in parameters]
    return weighted_nll(call.likelihood, parameters, target, None if weight is None else weight.to(call.dtype))


def weighted_nll(
    likelihood: Likelihood, parameters: Sequence[Tensor], target: Tensor | Nonzeros, weight: Tensor | None
) -> Tensor:
    """Likewise, of tensors of one dtype, and the target as `nll` takes it."""
    if isinstance(target, Nonzeros):
        return _weighted_sparse_nll(likelihood, parameters, target, weight)
    if weight is None:
        return likelihood.nll(parameters, target)
    if is_behind_dynamo() and not likelihood.by_rows and not (weight.requires_grad or target.requires_grad):
        return _CompiledWeights.apply(likelihood, weight, target, *parameters)
    # What is weighted by 0 may be NaN: neither it nor its derivative may reach a product.
    keep = weight != 0
    in_target = keep if keep.dim() == target.dim() else keep.unsqueeze(likelihood.dim)
    in_first = in_target if in_target.dim() == parameters[0].dim() else in_target.unsqueeze(likelihood.dim)
    target = torch.where(in_target, target, torch.zeros((), dtype=target.dtype, device=target.device))
    values = likelihood.nll(_counted(likelihood, parameters, in_first), target)
    return torch.where(keep, weight * values, 0.0)


def _counted(likelihood: Likelihood, parameters: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
    """Parameters without what is weighted by 0; of logits that others in their row go with, without the rows that are."""
    in_first = keep.any(-1, keepdim=True) if likelihood.by_rows else keep
    return [torch.where(keep if i else in_first, p, 0.5) for i, p in enumerate(parameters)]


def _weighted_sparse_nll(
    likelihood: Likelihood, parameters: Sequence[Tensor], target: Nonzeros, weight: Tensor | None
) -> Tensor:
    """Likewise."""
    if weight is None:
        return likelihood.sparse_nll(parameters, target)
    keep = weight != 0
    in_first = keep if keep.dim() == 2 else keep.unsqueeze(likelihood.dim)
    target = target._replace(values=torch.where(target.of(in_first), target.values, 0.0))
    values = likelihood.sparse_nll(_counted(likelihood, parameters, in_first), target)
    return torch.where(keep, weight * values, 0.0)


class _CompiledWeights(torch.autograd.Function):
    """Likewise, for the compiler, on a CPU bound by how often it chooses: once in each pass, at its end."""

    @staticmethod
    def forward(ctx, likelihood, weight, target, *parameters):
        ctx.save_for_backward(weight, target, *parameters)
        ctx.likelihood = likelihood
        return torch.where(weight != 0, weight * likelihood.nll(parameters, target), 0.0)

    @staticmethod
    def backward(ctx, upstream):
        weight, target, *parameters = ctx.saved_tensors
        first, needs = parameters[0], ctx.needs_input_grad[3:]
        aligned = upstream if upstream.dim() == first.dim() else upstream.unsqueeze(ctx.likelihood.dim)
        with torch.enable_grad():  # by elements, since a NaN among those that a parameter goes with would be in their sum
            leaves = [
                p.expand(first.shape).requires_grad_(need)
                for p, need in zip(behind_upstream(aligned, *(p.detach() for p in parameters)), needs, strict=True)
            ]
            values = ctx.likelihood.nll(leaves, target)
        found = iter(torch.autograd.grad(values, [v for v in leaves if v.requires_grad], upstream * weight))
        keep = weight != 0
        keep = keep if keep.dim() == first.dim() else keep.unsqueeze(ctx.likelihood.dim)
        by_parameters = (
            torch.where(keep, next(found), 0.0).sum_to_size(p.shape) if need else None
            for p, need in zip(parameters, needs, strict=True)
        )
        return None, None, None, *by_parameters


def reduced(values: Tensor, reduction: str) -> Tensor:
    """The sum of each sample, or of all."""
    if reduction != "none":
        return values.sum()
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def repeated(x: Tensor, prediction: Tensor) -> Tensor:
    """The target, as often as the prediction has samples of it."""
    rows, batch = prediction.shape[0], x.shape[0]  # which `len` would make constants of torch.export
    return x if rows == batch else x.expand(rows // batch, *x.shape).flatten(0, 1)


def divergence(call: KLCall, noise: Tensor | None, *tensors: Tensor):
    """`(z, kl, weighted, sums of mu and mu^2)` of latents, as the backends compute them; each may be None."""
    latents, kind, mu = call.latents, call.kind, call.latents.terms(tensors)
    posterior, prior, weight = latents.split(tensors)
    kl_elements = categorical.kl_elements if latents.is_categorical else gaussian.kl_elements
    z = weighted = sums = None
    if noise is not None:
        z = gaussian.sample(latents.posterior, *posterior, noise, call.dtype)
    if kind is None:
        return z, None, None, None
    posterior, prior = ([t.to(call.dtype) for t in given] for given in (posterior, prior))  # a prediction's, maybe
    if weight is not None:  # what does not count may be NaN
        weight = weight.to(call.dtype)
        uncounted = (weight == 0).unsqueeze(-1) if latents.is_categorical else weight == 0
        posterior, prior = ([torch.where(uncounted, 0.5, t) for t in given] for given in (posterior, prior))
    values = to_weight = kl_elements(latents, *posterior, *prior)
    if call.shares is not None:
        to_posterior = kl_elements(latents, *posterior, *(p.detach() for p in prior))
        to_prior = kl_elements(latents, *(p.detach() for p in posterior), *prior)
        to_weight = call.shares[0] * to_posterior + call.shares[1] * to_prior
    if call.floor is not None:
        to_weight = torch.where(values <= call.floor, call.floor, to_weight)
    if weight is not None:  # no gradient by a weight of 0, either
        is_all, values = to_weight is values, torch.where(weight == 0, 0.0, values * weight)
        to_weight = values if is_all else torch.where(weight == 0, 0.0, to_weight * weight)
    kl = scaled(by_kind(values, kind), call.scale(mu))
    if to_weight is not values:
        weighted = scaled(by_kind(to_weight, kind), call.scale(mu))
    if call.statistics:
        means = mu.detach().to(call.dtype)
        sums = means.sum(0), means.square().sum(0)
    return z, *((kl, weighted, sums) if call.groups is None else with_free_bits(call, mu, kl, weighted, sums, weight)[:3])


def with_free_bits(
    call: KLCall, mu: Tensor, kl: Tensor, weighted: Tensor | None, sums: Sequence | None, weight: Tensor | None = None,
    floor: float | None = None,
):  # fmt: skip
    """`(kl, weighted, sums, low)`: where groups have free bits, the sums of a kind all added up, and likewise with what is free
    in place of `low` groups. Before `sums` comes the KL of each column then. `floor`: what is free, if it is known."""
    if call.groups is None:
        return kl, weighted, sums, None
    of_groups = kl if weighted is None else weighted
    if call.groups == "channel" and kl.dim() > 1:
        of_groups = of_groups.flatten(1).sum(1)
    elif call.groups == "batch":
        of_groups = of_groups.sum()
    floor = call.floor_of_groups(mu, weight) if floor is None else floor
    low = of_groups <= floor
    weighted = torch.where(low, floor, of_groups) if isinstance(floor, Tensor) else of_groups.masked_fill(low, floor)
    sums = None if sums is None else (kl.detach(), *sums)
    if call.kind == "row" and call.reduction == "none":
        return kl, weighted, sums, low
    kl, weighted = kl.sum(), weighted.sum()
    if not mu.shape[0]:  # of nothing, which no sum was times
        kl, weighted = scaled(kl, call.scale(mu)), scaled(weighted, call.scale(mu))
    return kl, weighted, sums, low


def without_free_bits(call: KLCall, mu: Tensor, low: Tensor, grad_kl: Tensor | None, grad_weighted: Tensor | None):
    """What arrives at each sum of a kind, and at the same with shares, from what arrives at what `with_free_bits` returns."""
    shape = {"column": mu.shape[1:], "row": mu.shape[:1]}.get(call.kind, ())
    if grad_kl is not None:
        grad_kl = grad_kl.expand(shape)
    if grad_weighted is not None:
        grad_weighted = grad_weighted.expand(low.shape).masked_fill(low, 0.0)
        if low.dim() != len(shape):
            grad_weighted = grad_weighted.view([*low.shape, *[1] * (len(shape) - low.dim())]).expand(shape)
        if call.shares is None:
            return grad_weighted if grad_kl is None else grad_kl + grad_weighted, None
    return grad_kl, grad_weighted


def over_weights(call: KLCall, tensors: Sequence[Tensor], found: Sequence) -> tuple:
    """What was computed of latents, where the KL is a mean, which sums of weights divide."""
    mu, weight = call.latents.terms(tensors), call.latents.split(tensors)[2]
    if call.reduction == "dimension":
        total = counts_of("dimension", weight, mu, call.dtype)
    else:
        total = weight.sum(dtype=call.dtype) * (mu.numel() // max(weight.numel(), 1))
    z, kl, weighted, sums = found
    return z, kl / total, weighted if weighted is None else weighted / total, sums


def by_kind(values: Tensor, kind: str) -> Tensor:
    """The KL of elements, summed as a call's kind says."""
    if kind == "sum":
        return values.sum()
    if kind == "element":
        return values
    return values.sum(0) if kind == "column" else reduced(values, "none")


def divided(value: Tensor, divisor: float | Tensor) -> Tensor:
    return value / divisor if isinstance(divisor, Tensor) or divisor != 1 else value


def scaled(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor


def differentiate(function: Callable, inputs: Sequence, needs: Sequence[bool], upstreams: Sequence) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` by the inputs that need one; differentiable in turn if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, because one input may be computed from another: only the direct paths are this function's own.
        aliases = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        pairs = [(o, g) for o, g in zip(function(*aliases), upstreams, strict=True) if g is not None and o.requires_grad]
        wrt = [a for a, need in zip(aliases, needs, strict=True) if need]
        if not pairs or not wrt:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wrt, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
