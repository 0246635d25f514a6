"""What calls compute that are traced by `torch.compile` or transformed by `torch.func`, and eager ones that no backend takes.

They keep no state. Where Triton computes they reach the kernels by way of registered operators. Everywhere else, and where an
operator would be in the way of a transformation, they are the plain formula: Inductor can fuse it, `torch.func` transform it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..basics.tracing import is_transformed, is_wrapper
from ..likelihoods import code_of
from . import formula
from .backend import has_kernels
from .call import KLCall, LossCall
from .operators import encoded, ops


def _goes_to_kernels(*values) -> bool:
    """Whether Triton computes for the first of these, and an operator may stand for it."""
    if is_transformed() or any(is_wrapper(v) for v in values if not isinstance(v, FakeTensor)):
        return False
    return has_kernels(values[0].device)


def loss(call: LossCall, beta: float | Tensor, tensors: Sequence[Tensor], divisor: float | Tensor | None = None):
    """`(loss, recon, kl)` of tensors that have been checked."""
    parameters, x, weight, latents = call.split(tensors)
    if divisor is None:
        weight = call.shaped(weight, parameters[0], x)
        divisor = call.divisor(parameters[0], x, weight)
    code = code_of(call.likelihood)
    if code is None or call.likelihood.kernel is None or not _goes_to_kernels(*tensors, beta):
        tensors = (*parameters, x, *latents) if weight is None else (*parameters, x, weight, *latents)
        return formula.terms(call, beta, divisor, tensors)
    first, second, third = (*parameters, None, None)[:3]
    mu, logvar, kl = {0: (None, None, None), 1: (None, None, *latents), 2: (*latents, None)}[call.latents]
    recon, kl_sum = ops.loss(
        first, second, third, formula.repeated(x, first), weight, mu, logvar, kl, *code, call.per_sample, call.dtype
    )
    recon = formula.divided(recon, divisor)
    if not latents:
        return None, recon, None
    if kl is None:
        kl_sum = formula.scaled(kl_sum, call.kl_factor(mu))
    return formula.with_loss(recon, kl_sum, beta)


def draw(mu: Tensor, second: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise, or a seed for it."""
    if _goes_to_kernels(mu, second):
        from .triton_backend import draw_noise  # not above: Triton may be missing

        return draw_noise(second, torch.contiguous_format, generator)
    return torch.empty_like(second).normal_(generator=generator) if generator is not None else torch.randn_like(second)


def latents(call: KLCall, tensors: Sequence[Tensor], noise: Tensor | None):
    """`(z, kl, weighted, sums)` of latents, each None where it is not computed."""
    if not _goes_to_kernels(*tensors, noise):
        return formula.divergence(call, noise, *tensors)
    z, kl, weighted, *sums = ops.latents(*(*tensors, None, None)[:4], noise, *encoded(call))
    if call.kind is None:
        return z, None, None, None
    scale = call.scale(tensors[0])
    weighted = None if call.floor is None and call.shares is None else formula.scaled(weighted, scale)
    kl, sums = formula.scaled(kl, scale), sums if call.statistics else None
    return None if noise is None else z, *formula.with_free_bits(call, tensors[0], kl, weighted, sums)[:3]
