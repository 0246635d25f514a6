"""The reconstruction term of every likelihood that has several parameters, classes or weights.

On a GPU it is one kernel, whose gradients are made in forward with a guessed factor as in `autograd.Loss`. Elsewhere, and where
calls are traced, transformed or differentiated twice, it is the likelihood's formula.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import formula, torch_backend
from .backend import backend_for
from .guess import guess, remember
from .layout import dense, in_layout, layout_of
from .likelihoods import (
    BY_NAME,
    BernoulliLogits,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Likelihood,
)
from .tracing import is_traced, needs_formula, never_compiled


class Request(NamedTuple):
    """What a call computes, beside its tensors."""

    likelihood: Likelihood
    target_scale: float
    reduction: str
    dtype: torch.dtype
    known: Tensor | None = None  # the upstream factor of each row, where it is known before backward; else it is guessed


def reconstruct(request: Request, parameters: Sequence[Tensor], x: Tensor, weight: Tensor | None) -> Tensor:
    """The reconstruction, `[]` or `[B]`. All have been checked."""
    if isinstance(request.likelihood, DiscretizedLogisticMixture) and x.is_floating_point() and request.target_scale != 1:
        x, request = x.to(request.dtype) * request.target_scale, request._replace(target_scale=1.0)  # not in its kernel
    if isinstance(request.likelihood, Gaussian) and request.likelihood.scale == "optimal":
        return _optimal(request, parameters, x, weight)
    divisor = count(request, parameters, x, weight)
    tensors = (*parameters, x, weight)
    by_formula = is_traced(*tensors) or backend_for(x.device) is torch_backend or parameters[0].numel() == 0
    if by_formula or (weight is not None and weight.requires_grad):
        return _formula(request, parameters, x, weight, divisor)
    x, weight, parameters = _prepared(request, parameters, x, weight)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*parameters, x)):
        return Reconstruction.apply(request, x, weight, divisor, *parameters)
    return launch_forward(request, parameters, x, weight, divisor, None, [False] * len(parameters))[0]


def positions(likelihood: Likelihood, parameters: Sequence[Tensor], x: Tensor) -> torch.Size:
    """The shape of the negative log-likelihood's terms: `x` without its dimension of classes or channels, if it has one."""
    dim = class_dim(likelihood, parameters, x)
    if dim is None:
        return x.shape
    return x.shape[:dim] + x.shape[dim + 1 :]


def class_dim(likelihood: Likelihood, parameters: Sequence[Tensor], x: Tensor) -> int | None:
    """The dimension of classes or channels in `x`: labels have none."""
    dim = getattr(likelihood, "dim", None)
    if dim is None or (isinstance(likelihood, Categorical) and x.dim() < parameters[0].dim()):
        return None
    return dim % x.dim()


def count(request: Request, parameters: Sequence[Tensor], x: Tensor, weight: Tensor | None) -> float | Tensor:
    """What the sum is divided by: the number of elements, or of positions, for a mean; that of their weights."""
    likelihood, dtype = request.likelihood, request.dtype
    if request.reduction == "batchmean":
        return torch.sym_float(x.shape[0])
    if request.reduction != "mean":
        return 1.0
    shape = positions(likelihood, parameters, x)
    channels = x.shape[likelihood.dim] if isinstance(likelihood, DiscretizedLogisticMixture) else 1
    if isinstance(likelihood, Categorical) and x.dim() < parameters[0].dim():
        counted = x.long() != likelihood.ignore_index
        return (counted if weight is None else counted * weight.to(dtype)).sum(dtype=dtype)
    if weight is None:
        return torch.sym_float(math.prod(shape) * channels)
    return weight.to(dtype).sum() * (math.prod(shape) * channels / max(weight.numel(), 1))


def _formula(request: Request, parameters, x: Tensor, weight: Tensor | None, divisor: float | Tensor) -> Tensor:
    likelihood, dtype = request.likelihood, request.dtype
    dim = class_dim(likelihood, parameters, x)
    values = likelihood.nll([p.to(dtype) for p in parameters], _target(request, parameters, x)) if weight is None else None
    if weight is not None:
        # What is weighted by 0 may be NaN: neither it nor its derivative may reach a product.
        keep = weight != 0
        masked = keep if dim is None else keep.unsqueeze(dim)
        at = masked.unsqueeze(likelihood.dim) if isinstance(likelihood, Categorical) and dim is None else masked
        target = _target(request, parameters, x)
        target = torch.where(masked, target, torch.zeros((), dtype=target.dtype, device=target.device))
        values = likelihood.nll([torch.where(at, p.to(dtype), 0.5) for p in parameters], target)
        values = torch.where(keep, weight.to(dtype) * values, 0.0)
    if request.reduction == "none":
        return values.flatten(1).sum(1) if values.dim() > 1 else values
    total = values.sum()
    return total if request.reduction == "sum" else total / divisor


def _target(request: Request, parameters, x: Tensor) -> Tensor:
    """The target as the formula takes it: labels in 64 bits, since a short dtype may not hold what they are compared with;
    levels in [-1, 1], everything else scaled."""
    likelihood = request.likelihood
    if isinstance(likelihood, Categorical) and x.dim() < parameters[0].dim():
        return x.long()
    target = x.to(request.dtype)
    scale, centered = _scaling(request, x)
    if scale != 1:
        target = target * scale
    return target - 1 if centered else target


def _scaling(request: Request, x: Tensor) -> tuple[float, bool]:
    """What the target is multiplied by, and whether 1 is taken away then, as from levels to bring them to [-1, 1]."""
    if isinstance(request.likelihood, DiscretizedLogistic | DiscretizedLogisticMixture) and not x.is_floating_point():
        return 2 / (request.likelihood.levels - 1), True
    return request.target_scale, False


def _optimal(request: Request, parameters, x: Tensor, weight: Tensor | None) -> Tensor:
    """The Gaussian whose variance is the mean squared error."""
    likelihood, mean = request.likelihood, parameters[0]
    of_squares = request._replace(likelihood=BY_NAME["mse"], reduction="none" if request.reduction == "none" else "sum")
    error = reconstruct(of_squares, [mean], x, weight)
    number = count(request._replace(reduction="mean"), [mean], x, weight)
    squares = error.sum()
    square = squares / number
    square = torch.where(square.isnan() & (squares == 0), 1.0, square)  # any, where nothing counts: the sum is 0
    if likelihood.soft_min is not None:  # which bounds it without a derivative of log(0)
        square = square.clamp_min(torch.finfo(square.dtype).tiny)
    log_scale, inverse = Gaussian("logvar", likelihood.soft_min).log_and_inverse(torch.log(square))
    if request.reduction == "none":
        own = (
            torch.full_like(error, x.numel() / max(x.shape[0], 1))
            if weight is None
            else weight.to(request.dtype).expand(x.shape).reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)
        )
    else:
        own = number
    total = 0.5 * error * inverse.square() + own * (log_scale + 0.5 * math.log(2 * math.pi))
    return total / count(request, parameters, x, weight)


def _layout(request: Request, first: Tensor) -> torch.memory_format:
    """In which the kernel takes what is as large as the first parameter."""
    return torch.contiguous_format if hasattr(request.likelihood, "dim") else layout_of(first)


def _prepared(request: Request, parameters, x: Tensor, weight: Tensor | None):
    """The tensors as the kernels take them."""
    first, *others = parameters
    if getattr(request.likelihood, "dim", None) is None:
        layout = _layout(request, first)
        large = [t if t.shape != first.shape else t.contiguous(memory_format=layout) for t in others]
        first, x = dense(first, x)
        return x, weight if weight is None or weight.shape != x.shape else in_layout(layout, weight)[0], [first, *large]
    if weight is not None:
        weight = weight.expand(positions(request.likelihood, parameters, x)).contiguous()
    return x.contiguous(), weight, [first.contiguous(), *others]


class Reconstruction(torch.autograd.Function):
    """The reconstruction by its kernel. The tensors come as the kernel takes them."""

    @staticmethod
    @never_compiled
    def forward(ctx, request: Request, x, weight, divisor, *parameters):
        wants = ctx.needs_input_grad[4:]
        first = parameters[0]
        # What is as large as the target is stored times the factor that upstream is guessed to be.
        stores = any(wanted and p.shape == first.shape for p, wanted in zip(parameters, wants, strict=True))
        ctx.key, ctx.used = None, request.known if stores else None
        if stores and request.known is None:
            rows = x.shape[0] if request.reduction == "none" else 1
            shapes = tuple((p.shape, p.dtype) for p in parameters)
            ctx.key = (x.device, shapes, type(request.likelihood).__name__, *request[1:4], weight is None)
            ctx.used = guess(ctx.key, rows, request.dtype, x.device)
        recon, gradients = launch_forward(request, parameters, x, weight, divisor, ctx.used, wants)
        large = [p.shape == first.shape for p in parameters]
        ctx.stored = [g if at else None for g, at in zip(gradients, large, strict=True)]
        ctx.request, ctx.wants, ctx.large, ctx.layout = request, wants, large, _layout(request, first)
        ctx.divisor, divisor = (None, divisor) if isinstance(divisor, Tensor) else (divisor, None)
        ctx.count = len(parameters)
        ctx.save_for_backward(
            x, weight, divisor, *parameters, *(None if at else g for g, at in zip(gradients, large, strict=True))
        )
        return recon

    @staticmethod
    @never_compiled
    def backward(ctx, upstream):
        x, weight, divisor, *rest = ctx.saved_tensors
        parameters, sums = rest[: ctx.count], rest[ctx.count :]
        divisor = ctx.divisor if divisor is None else divisor
        request, needs = ctx.request, ctx.needs_input_grad
        if needs[1] or needs_formula((upstream,)):

            def function(x, *parameters):
                return (_formula(request, parameters, x, weight, divisor),)

            found = formula.differentiate(function, (x, *parameters), (needs[1], *needs[4:]), (upstream,))
            return None, found[0], None, None, *found[1:]
        gradients = [None] * ctx.count
        if ctx.used is not None:
            # Handed out once: a second backward through a retained graph finds None, and leaves alone what is somebody's now.
            stored, ctx.stored = ctx.stored, None
            # A hook on saved tensors may have brought them back with other strides.
            large = parameters[0].shape
            x, weight, *parameters = (
                t if t is None else t.contiguous(memory_format=ctx.layout) if t.shape == large else t.contiguous()
                for t in (x, weight, *parameters)
            )
            gradients, seen = launch_backward(
                request, parameters, x, weight, divisor, upstream, stored, None if stored is None else ctx.used, ctx.wants
            )
            if ctx.key is not None:
                remember(ctx.key, seen)
        for i, total in enumerate(sums):
            if total is not None:
                gradients[i] = _times_upstream(total, upstream, divisor, parameters[i])
        return None, None, None, None, *gradients


def _times_upstream(total: Tensor, upstream: Tensor, divisor: float | Tensor, parameter: Tensor) -> Tensor:
    """The gradient by a smaller parameter, from the sum's derivative by it: each sample's where each has an upstream."""
    factor = upstream / divisor
    if factor.dim():
        factor = factor.view(-1, *[1] * (total.dim() - 1))
    return (
        (total * factor)
        .sum_to_size([1] * (total.dim() - parameter.dim()) + list(parameter.shape))
        .view_as(parameter)
        .to(parameter.dtype)
    )


def launch_forward(request: Request, parameters, x, weight, divisor, guessed, wants):
    """`(recon, gradients)`: see `kernels.reconstruction.forward`."""
    module, options = _kernels(request, parameters, x)
    if len(parameters) == 1 and hasattr(request.likelihood, "dim"):
        recon, gradient = module.forward(parameters[0], x, weight, divisor, guessed, **options)
        return recon, [gradient]
    return module.forward(parameters, x, weight, divisor, guessed, wants, **options)


def launch_backward(request: Request, parameters, x, weight, divisor, upstream, stored, used, wants):
    """`(gradients, seen)`: see `kernels.reconstruction.backward`."""
    module, options = _kernels(request, parameters, x)
    if len(parameters) == 1 and hasattr(request.likelihood, "dim"):
        gradient, seen = module.backward(
            parameters[0], x, weight, divisor, upstream, None if stored is None else stored[0], used, **options
        )
        return [gradient], seen
    return module.backward(parameters, x, weight, divisor, upstream, stored, used, wants, **options)


def _kernels(request: Request, parameters, x: Tensor):
    """The module that launches a likelihood's kernel, and what it asks for beside tensors."""
    from . import kernels  # not above: Triton may be missing

    likelihood, common = request.likelihood, {"per_sample": request.reduction == "none", "dtype": request.dtype}
    first = parameters[0]
    if hasattr(likelihood, "dim"):
        dim = likelihood.dim % first.dim()
        inner = math.prod(first.shape[dim + 1 :])
        if isinstance(likelihood, DiscretizedLogisticMixture):
            return kernels.mixture, common | {"levels": likelihood.levels, "inner": inner, "channels": x.shape[dim]}
        ignore = getattr(likelihood, "ignore_index", 0)
        options = {"classes": first.shape[dim], "inner": inner, "ignore_index": ignore, "target_scale": request.target_scale}
        return kernels.categorical, common | options
    name = likelihood.name
    if isinstance(likelihood, BernoulliLogits) and len(parameters) > 1:
        name = "bernoulli_logits_weighted"
    family = kernels.reconstruction.Family(
        name,
        getattr(likelihood, "scale", None),
        getattr(likelihood, "soft_min", None),
        1 / (likelihood.levels - 1) if isinstance(likelihood, DiscretizedLogistic) else 0.0,
        *_scaling(request, x),
    )
    return kernels.reconstruction, common | {"family": family}
