"""Decide once, then run: what follows from a call's options and its tensors, kept for the next call like it.

A *path* follows from options, and from the tensors' types, dtypes, devices and who wants gradients; a *plan* from their shapes
and strides on top of it. One look-up finds both, and a new shape costs some arithmetic. What the key does not hold is looked at
each time: tracers and transformations, streams, capture, the upstream gradients. Neither holds a tensor of a user, or memory
that a launch writes to.
"""

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.nn import Parameter

from ..basics.arguments import check_noise
from ..basics.layout import layout_of
from ..basics.sparse import is_sparse
from ..basics.tracing import has_values, is_surrounded, is_wrapper, needs_formula
from ..latents.posterior import CLASSES, LOGVAR, Latents, as_logits
from ..latents.weighting import Weighting
from ..likelihoods import Likelihood
from ..likelihoods.base import check_own
from ..likelihoods.values import Range, silent_range, support_to_check
from . import torch_backend
from .backend import backend_for
from .blocks import BLOCK, KEPT, SMALL
from .call import Factors, KLCall, LossCall, Objective, check_kl, check_loss
from .guess import Guess

LIMIT = 4096  # entries of a table, which is cleared then

_objectives: dict[Hashable, Objective] = {}
_paths: dict[Hashable, "LossPath"] = {}
_plans: dict[Hashable, "LossPlan | LatentsPlan"] = {}
_last: dict[Hashable, "LossPlan | LatentsPlan"] = {}  # of the last call with these options, which the next one is probably like

_of_types = attrgetter("dtype", "device", "layout", "requires_grad")
_of_shapes = attrgetter("dtype", "device", "layout", "requires_grad", "shape")
_stride, _is_neg = Tensor.stride, Tensor.is_neg
_is_nested, _dtype = attrgetter("is_nested"), attrgetter("dtype")


def keep(table: dict, key: Hashable, made):
    if len(table) >= LIMIT:
        table.clear()
    table[key] = made
    return made


def likeness(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether other tensors have all that a plan's key holds of these, asked in one call instead of seven a tensor.

    These are the guards of torch.compile. Autocast and inference mode make them differ, too. They hold no tensor. A nested
    tensor, which has no sizes, makes them end the process: it must not be asked for.
    """
    if not {Tensor, Parameter}.issuperset(map(type, tensors)):
        return _unlike
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _unlike(*tensors) -> bool:
    return False


def is_usual(plan: "LossPlan | LatentsPlan", upstreams: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass may launch what `plan` has: it is not differentiated, and upstreams have memory of their own.

    One look by the compiler's guards takes a third of the time of the many that `needs_formula` takes.
    """
    if torch.is_grad_enabled() or is_surrounded():
        return False
    arrived = [g for g in upstreams if g is not None]
    count, fits = plan.upstreams
    if count == len(arrived) and fits(*arrived):
        return True
    if needs_formula(upstreams):
        return False
    if arrived:
        plan.upstreams = len(arrived), likeness(arrived)
    return True


def _again(start: Hashable, plan: "LossPlan | LatentsPlan", tensors: Sequence[Tensor]) -> None:
    """The plan of these tensors is the first to be asked the next time."""
    if not plan.fits(*tensors):
        plan.fits = likeness(tensors)
    keep(_last, start, plan)


def _of_number(factor: float | Tensor):
    return None if type(factor) is float else (type(factor), factor.requires_grad)


class LossPath:
    """The share of a plan that follows from types. `backend` is None where autograd differentiates the formula."""

    __slots__ = "backend", "guess", "is_plain", "stores", "wants"

    def __init__(self, call: LossCall, tensors: Sequence[Tensor], factors: Factors, grad_mode: bool) -> None:
        parameters, x, weight, _ = call.split(tensors)
        self.is_plain = call.is_plain
        self.stores = tuple(grad_mode and p.requires_grad for p in parameters)
        self.wants = grad_mode and any(t.requires_grad for t in tensors)
        self.guess: Guess | None = None  # with which a new shape begins
        # Gradients that are seldom wanted, and tensors that are not what they seem.
        seldom = grad_mode and any(isinstance(t, Tensor) and t.requires_grad for t in (x, weight, *factors))
        strange = any(t.is_neg() or is_wrapper(t) for t in tensors) or any(map(is_wrapper, factors))
        self.backend = None if seldom or strange or x.is_meta else backend_for(x.device)
        if self.backend is not None and self.backend is not torch_backend and call.likelihood.kernel is None:
            self.backend = torch_backend


class LossPlan:
    """What is known of a call of `loss` before its values are. `guess` is the one thing that changes."""

    __slots__ = (
        "backend", "call", "count", "divisor", "dtype", "dtypes", "fits", "guess", "is_by_autograd", "is_dense",
        "is_elementwise", "is_of_classes", "is_whole", "kl_plan", "kl_scale", "large", "latents", "latents_launches",
        "latents_layout", "layout", "likelihood", "looks", "loss_launches", "options", "path", "per_sample", "rows", "scaling",
        "silent", "strides", "support", "upstreams", "weight_shape",
    )  # fmt: skip

    path: LossPath
    call: LossCall
    likelihood: Likelihood
    dtype: torch.dtype
    per_sample: bool
    count: int  # of the parameters
    latents: int
    backend: ModuleType | None
    divisor: float | None  # of the reconstruction's sum; None: it depends on values
    kl_scale: float
    large: tuple[bool, ...]  # of the parameters, whether one is as large as the first
    rows: int  # results; 1 for a sum
    layout: torch.memory_format  # of what is as large as the first parameter
    latents_layout: torch.memory_format
    is_dense: bool  # all tensors lie as the backends take them
    strides: tuple  # of those that do
    dtypes: tuple[torch.dtype, ...]
    is_elementwise: bool  # to the Torch backend: parameters are as large as the target
    is_of_classes: bool  # a term is made of many elements, by a form of its own
    is_whole: bool  # and one block, in the dtype of the arithmetic
    is_by_autograd: bool  # a function of Torch's own may compute the reconstruction
    kl_plan: "LatentsPlan | None"  # beside it
    scaling: tuple[float, float]  # of the target
    looks: bool  # at values
    support: Range | None
    silent: tuple[float, float] | None  # where the target must lie, of which the loss tells nothing
    options: dict  # of the likelihood's kernel
    weight_shape: torch.Size | None
    guess: Guess
    fits: Callable[..., bool]  # other tensors
    upstreams: tuple[int, Callable[..., bool]]  # of the last backward: how many there were, and whether others are like them
    loss_launches: Any  # of the Triton backend, which makes them when they are first needed
    latents_launches: Any

    def __init__(self, path: LossPath, call: LossCall, tensors: Sequence[Tensor]) -> None:
        parameters, x, weight, latents = call.split(tensors)
        likelihood, first = call.likelihood, parameters[0]
        self.path, self.call, self.loss_launches, self.latents_launches, self.fits = path, call, None, None, _unlike
        self.upstreams, self.kl_plan = (0, _unlike), None
        self.likelihood, self.dtype, self.per_sample = likelihood, call.dtype, call.per_sample
        self.count, self.latents = call.parameters, call.latents
        self.rows = first.shape[0] if call.per_sample else 1
        self.large = tuple(p.shape == first.shape for p in parameters)
        self.guess = Guess(self.rows, call.dtype, first.device, path.guess)
        by_values = call.reduction == "mean" and (weight is not None or likelihood.counts_by_values(first, x))
        self.divisor = None if by_values else call.divisor(first, x, None)
        self.kl_scale = call.kl_factor(latents[0]) if call.latents == 2 else 1.0
        self.weight_shape = None if weight is None else call.weight_shape(weight, first, x)
        self.backend = path.backend if first.numel() and all(t.numel() for t in latents) else None
        self.support = support_to_check(likelihood, first, x)
        self.silent = silent_range(self.support, likelihood.target_scale, x)
        self.looks = has_values(tensors) and (self.support is not None or any(likelihood.ranges))
        self.options, self.scaling = likelihood.constants(parameters, x), likelihood.scaling(x)
        in_rows = likelihood.dim is not None or likelihood.by_rows
        self.layout = torch.contiguous_format if in_rows else layout_of(first)
        self.latents_layout = layout_of(latents[0]) if call.latents == 2 else torch.contiguous_format
        dense = self.dense(tensors)
        self.is_dense = all(a is b for a, b in zip(dense, tensors, strict=True))
        self.strides, self.dtypes = tuple(map(_stride, dense)), tuple(map(_dtype, dense))
        dtype = call.dtype
        self.is_elementwise = likelihood.dim is None and not likelihood.by_rows and all(self.large)
        self.is_of_classes = likelihood.dim is not None and likelihood.one_pass is not None
        same = self.scaling == (1.0, 0.0) and all(t.dtype == dtype for t in (*parameters, x, *([weight] * call.weighted)))
        small = x.numel() <= BLOCK and (first.dim() == 2 or not call.per_sample)  # of several samples, each
        self.is_whole = self.is_elementwise and same and small
        on_cpu = self.backend is torch_backend and x.device.type == "cpu"
        has_sum = likelihood.sum_by_torch is not None and not by_values and not call.per_sample and call.parameters == 1
        few = min(BLOCK if self.is_whole else SMALL, likelihood.few(call.weighted))
        self.is_by_autograd = on_cpu and has_sum and self.is_elementwise and first.numel() <= few
        if self.is_by_autograd and call.latents == 2:
            self.kl_plan = latents_plan(KLCall(Latents(LOGVAR), dtype, "sum", call.kl_reduction), latents, None)

    def dense(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as the backends take them; copied only where they are not so yet."""
        call, layout = self.call, self.layout
        found = list(tensors)
        n, shape = call.parameters, tensors[0].shape
        for i in range(n + 1):
            t = found[i]
            if t.shape == shape or i == n:
                found[i] = t.contiguous(memory_format=layout if t.dim() == len(shape) else torch.contiguous_format)
            elif t.device != found[0].device:  # a 0-d tensor on the CPU
                found[i] = t.to(found[0].device)
        if call.weighted:
            weight = found[n + 1]
            if weight.shape != self.weight_shape:
                weight = weight.view(self.weight_shape)
            found[n + 1] = weight.contiguous(memory_format=layout) if weight.shape == shape else weight
        if call.latents == 2:
            found[-2] = found[-2].contiguous(memory_format=self.latents_layout)
            found[-1] = found[-1].contiguous(memory_format=self.latents_layout)
        elif call.latents == 1:
            found[-1] = found[-1].contiguous()
        return found

    def again(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Likewise, of what was saved: a hook, such as `save_on_cpu`, may bring it back with other strides, or rounded."""
        if self.is_dense and self.fits(*tensors):
            return tensors
        if tuple(map(_dtype, tensors)) != self.dtypes:
            tensors = [t.to(dtype) for t, dtype in zip(tensors, self.dtypes, strict=True)]
        return tensors if tuple(map(_stride, tensors)) == self.strides else self.dense(tensors)

    def large_of(self, wants: tuple[bool, ...]) -> tuple[bool, ...]:
        """Which of the wanted gradients are as large as the first parameter."""
        return wants if self.is_elementwise else tuple(map(operator.and_, wants, self.large))

    def divisor_of(self, tensors: Sequence[Tensor]) -> float | Tensor:
        """What the sum is divided by, where it depends on values."""
        parameters, x, weight, _ = self.call.split(tensors)
        return self.call.divisor(parameters[0], x, weight)

    def remember(self, factor: Tensor | float) -> None:
        """The upstream factor that the last backward saw, which the next forward guesses."""
        self.guess.remember(factor)
        if not self.per_sample:
            self.path.guess = self.guess


def find_objective(likelihood, posterior, reduction) -> Objective:
    """The options that users pass, as they were checked and made canonical when they first came."""
    try:
        key = likelihood, posterior, tuple(reduction) if type(reduction) is list else reduction
        found = _objectives.get(key)
    except TypeError:  # of what is no option
        return Objective.of(likelihood, posterior, reduction)
    return found or keep(_objectives, key, Objective.of(likelihood, posterior, reduction))


def loss_plan(
    name: str, objective: Objective, tensors: Sequence, parameters: int, weighted: bool, latents: int, factors: Factors
) -> LossPlan | None:
    """The plan of a call of `loss` with these tensors, of which errors call the first ones `name`; None where the target is
    sparse."""
    grad_mode = torch.is_grad_enabled()
    beta, recon_weight = factors
    numbers = None if type(beta) is float and type(recon_weight) is float else tuple(map(_of_number, factors))
    start = objective, parameters, weighted, latents, grad_mode, numbers
    try:
        plan = _last.get(start)
        if plan is not None and True not in map(_is_nested, tensors) and plan.fits(*tensors):
            return plan
        if is_sparse(tensors[parameters]):  # or looking for its strides raises, which takes as long as some operators
            return None
        key = *start, *map(type, tensors), *map(_of_shapes, tensors), *map(_is_neg, tensors), *map(_stride, tensors)
        plan = _plans.get(key)
    except (AttributeError, TypeError, RuntimeError):  # not tensors, or none with strides
        check_loss(name, objective, tensors, parameters, weighted, latents)
        if is_sparse(tensors[parameters]):
            return None
        raise
    if plan is None:
        call = check_loss(name, objective, tensors, parameters, weighted, latents)
        types = *start, *map(type, tensors), *map(_of_types, tensors), *map(_is_neg, tensors)
        path = _paths.get(types) or keep(_paths, types, LossPath(call, tensors, factors, grad_mode))
        plan = LossPlan(path, call, tensors)
        if plan.backend is not None and call.likelihood.is_own:
            check_own(name, call.likelihood, tensors[:parameters], tensors[parameters], call.dtype, grad_mode)
        return keep(_plans, key, plan)
    _again(start, plan, tensors)  # not of a shape that may never come again, of which no memory is to stay
    return plan


def is_little(mu, logvar) -> bool:
    """Whether autograd samples these latents at less cost than a Function of the Torch backend does, and as exactly."""
    if not isinstance(mu, Tensor) or not isinstance(logvar, Tensor) or not mu.is_cpu or mu.numel() > SMALL:
        return False
    return mu.dtype == logvar.dtype and mu.dtype in (torch.float32, torch.float64) and _is_torch_on_cpu()


@functools.cache
def _is_torch_on_cpu() -> bool:
    return backend_for(torch.device("cpu")) is torch_backend


class LatentsPlan:
    """What is known of a sample or a KL before its values are."""

    __slots__ = (
        "backend", "call", "dtype", "dtypes", "fits", "floor", "has_normals", "is_by_autograd", "is_categorical",
        "is_dense", "is_mean_of_weights", "is_plain", "is_simple", "is_whole", "kl_scale", "latents_launches", "layout",
        "per_sample", "strides", "upstreams", "wants",
    )  # fmt: skip

    def __init__(self, call: KLCall, tensors: Sequence[Tensor], noise: Tensor | None, grad_mode: bool) -> None:
        mu, self.call, self.latents_launches, self.fits, self.upstreams = tensors[0], call, None, _unlike, (0, _unlike)
        self.dtype, self.per_sample, self.kl_scale = call.dtype, call.kind == "row", call.scale(call.latents.terms(tensors))
        self.is_plain, self.is_simple, self.is_categorical = call.is_plain, call.is_simple, call.latents.is_categorical
        self.is_mean_of_weights = call.is_mean_of_weights and call.kind is not None
        self.wants = grad_mode and any(t.requires_grad for t in tensors)
        strange = any(t.is_neg() or is_wrapper(t) for t in tensors) or (
            noise is not None and (is_wrapper(noise) or noise.is_neg())
        )
        weight = call.latents.split(tensors)[2]
        self.floor = call.floor_of_groups(call.latents.terms(tensors)) if call.groups is not None and weight is None else None
        seldom = grad_mode and any(t is not None and t.requires_grad for t in (noise, weight))
        seldom = seldom or (self.is_categorical and weight is not None)  # which no kernel has
        self.backend = None if strange or seldom or not mu.numel() else backend_for(mu.device)
        in_one_pass = mu.device.type == "cpu" and (call.is_whole or self.is_categorical)
        if self.backend is torch_backend and not self.is_simple and not in_one_pass:
            self.backend = None
        if self.backend is torch_backend and call.groups is not None and noise is not None:
            self.backend = None  # which has no sample beside free bits
        self.layout = torch.contiguous_format if self.is_categorical else layout_of(mu)
        # To the Torch backend: few latents, of which forward keeps more; a small sample alone costs autograd less than it.
        same = all(t.dtype == call.dtype for t in tensors[:2])
        self.is_whole = mu.numel() <= (KEPT if self.wants and same else SMALL)
        is_sample = self.backend is torch_backend and call.kind is None and self.is_simple
        self.is_by_autograd = is_sample and same and mu.numel() <= SMALL
        dense = self.dense(tensors)
        self.is_dense = all(a is b for a, b in zip(dense, tensors, strict=True))
        self.has_normals = noise is not None or self.backend is torch_backend  # which may be a seed where it is given
        self.strides, self.dtypes = tuple(map(_stride, dense)), tuple(map(_dtype, dense))

    def dense(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as the backends take them; copied only where they are not so yet."""
        posterior, prior, weight = self.call.latents.split(tensors)
        found = [*(t.contiguous(memory_format=self.layout) for t in posterior), *prior]
        if weight is not None:
            found.append(weight.contiguous(memory_format=self.layout) if weight.shape == tensors[0].shape else weight)
        return found

    def again(self, tensors: Sequence[Tensor], noise: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Likewise, with the noise, or the seed of it, of what was saved: hooks may bring it back with other strides."""
        if self.is_dense and not self.has_normals and self.fits(*tensors):
            return tensors, noise
        if noise is not None and noise.is_floating_point():
            noise = noise.contiguous(memory_format=self.layout)
        if tuple(map(_dtype, tensors)) != self.dtypes:
            tensors = [t.to(dtype) for t, dtype in zip(tensors, self.dtypes, strict=True)]
        return tensors if tuple(map(_stride, tensors)) == self.strides else self.dense(tensors), noise


def latents_plan(call: KLCall, tensors: Sequence[Tensor], noise: Tensor | None) -> LatentsPlan:
    """The plan of a sample or a KL of latents that have been checked."""
    grad_mode = torch.is_grad_enabled()
    key = (
        call, grad_mode, noise is not None and (type(noise), noise.requires_grad, noise.is_neg()),
        *map(type, tensors), *map(_of_shapes, tensors), *map(_is_neg, tensors), *map(_stride, tensors),
    )  # fmt: skip
    return _plans.get(key) or keep(_plans, key, LatentsPlan(call, tensors, noise, grad_mode))


def latents_plan_of(
    mu, logvar, posterior, prior, reduction: str | None, eps: Tensor | None, samples: bool, weighting: Weighting | None = None,
    kl_weight: Tensor | None = None,
) -> tuple[LatentsPlan, Sequence[Tensor]]:  # fmt: skip
    """The plan and the tensors of a call from what users pass; of a sample, its KL (unless `reduction` is None), or both, with
    what a `weighting` without capacity makes of the latter."""
    key = None
    if logvar is None and isinstance(mu, CLASSES):
        mu, posterior, prior = as_logits(mu, posterior, prior)
    if isinstance(mu, Tensor) and (prior is None or type(prior) is tuple or logvar is None):
        if logvar is None:  # of classes
            tensors = (mu,) if prior is None else (mu, prior)
        else:
            tensors = (mu, logvar) if prior is None else (mu, logvar, *prior)
        if kl_weight is not None:
            tensors = *tensors, kl_weight
        given = tensors if eps is None else (*tensors, eps)
        start = (
            posterior, reduction, samples, weighting, eps is None, logvar is None, kl_weight is None, len(given),
            torch.is_grad_enabled(),
        )  # fmt: skip
        try:
            found = _last.get(start)
            if found is not None and True not in map(_is_nested, given) and found.fits(*given):
                return found, tensors
            key = *start, *map(type, given), *map(_of_shapes, given), *map(_is_neg, given), *map(_stride, given)
            found = _plans.get(key)
        except (AttributeError, TypeError, RuntimeError):  # not tensors, none with strides, or options that are none
            key = found = None
        if found is not None:
            _again(start, found, given)
            return found, tensors
    call, tensors = check_kl(mu, logvar, posterior, prior, reduction, samples, weighting, kl_weight)
    if eps is not None:
        check_noise(eps, None, tensors[0])
    plan = latents_plan(call, tensors, eps)
    if key is not None and all(t is kl_weight or t.shape == mu.shape for t in given):  # none is expanded
        keep(_plans, key, plan)
    return plan, tensors
