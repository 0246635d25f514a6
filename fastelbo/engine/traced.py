"""What calls compute that are traced by `torch.compile` or transformed by `torch.func`, and eager ones that no backend takes.

They keep no state. Large ones reach the kernels, where Triton computes, by way of registered operators. Everywhere else, and
where an operator would be in the way, they are the plain formula: Inductor can fuse it, `torch.func` transform it, and what
`torch.export` makes of it needs no fastelbo.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..basics.tracing import is_compiling, is_transformed, is_wrapper
from ..likelihoods import code_of
from . import formula
from .backend import has_kernels
from .call import Factors, KLCall, LossCall
from .operators import encoded, ops

TRACERS = FakeTensor, FunctionalTensor

# An operator costs the host some 100 us a step more than what Inductor launches. Its kernels pay from so many bytes on that
# the formula moves more than they do: at 3 TB/s these take 90 us.
KERNELS_PAY = 2**28
EXCESS_OF_LATENTS = 2  # passes over mu: the formula of a sample and its KL stores the noise


def _goes_to_kernels(excess: int, *values) -> bool:
    """Whether Triton computes for the first of these, which a compiled formula passes over so much more often, and an operator
    may stand for it."""
    if is_transformed() or any(is_wrapper(v) for v in values if not isinstance(v, TRACERS)):
        return False
    if not has_kernels(values[0].device) or torch.compiler.is_exporting():
        return False
    return not is_compiling() or excess * values[0].numel() * values[0].dtype.itemsize >= KERNELS_PAY


def loss(call: LossCall, factors: Factors, tensors: Sequence[Tensor], divisor: float | Tensor | None = None):
    """`(loss, recon, kl)` of tensors that have been checked."""
    parameters, x, weight, latents = call.split(tensors)
    if divisor is None:
        weight = call.shaped(weight, parameters[0], x)
        divisor = call.divisor(parameters[0], x, weight)
    code = code_of(call.likelihood)
    has_kernel = code is not None and call.likelihood.kernel is not None
    if not has_kernel or not _goes_to_kernels(call.likelihood.compiled_excess, *tensors, *factors):
        tensors = (*parameters, x, *latents) if weight is None else (*parameters, x, weight, *latents)
        return formula.terms(call, factors, divisor, tensors)
    first, second, third, fourth = (*parameters, None, None, None)[:4]
    mu, logvar, kl = {0: (None, None, None), 1: (None, None, *latents), 2: (*latents, None)}[call.latents]
    recon, kl_sum = ops.loss(
        first, second, third, fourth, formula.repeated(x, first), weight, mu, logvar, kl, *code, call.per_sample, call.dtype
    )
    recon = formula.divided(recon, divisor)
    if not latents:
        return None, recon, None
    if kl is None:
        kl_sum = formula.scaled(kl_sum, call.kl_factor(mu))
    return formula.with_loss(recon, kl_sum, factors)


def draw(mu: Tensor, second: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise, or a seed for it."""
    if _goes_to_kernels(EXCESS_OF_LATENTS, mu, second):  # `kernels.draw_noise`, which asks CUDA for more than a tracer can see
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=second.device, generator=generator)
    return normals_like(second, generator)


def normals_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normals. Many on a CPU are not the compiler's own, which take ten times as long: Torch 2.13 leaves those of
    `torch.normal` to an eager operator."""
    compiled = is_compiling() and like.device.type == "cpu" and not torch.compiler.is_exporting() and not is_transformed()
    if compiled and like.numel() >= MANY_NORMALS:
        return torch.normal(torch.zeros_like(like), 1.0, generator=generator)
    return torch.randn_like(like) if generator is None else torch.empty_like(like).normal_(generator=generator)


MANY_NORMALS = 2**11


def latents(call: KLCall, tensors: Sequence[Tensor], noise: Tensor | None):
    """`(z, kl, weighted, sums)` of latents, each None where it is not computed."""
    if call.latents.weighted:  # which the operator does not have
        found = formula.divergence(call, noise, *tensors)
        return formula.over_weights(call, tensors, found) if call.is_mean_of_weights and call.kind is not None else found
    # Of classes, the compiler fuses the formula about as well, and there is no operator.
    if call.latents.is_categorical or not _goes_to_kernels(EXCESS_OF_LATENTS, *tensors, noise):
        return formula.divergence(call, noise, *tensors)
    z, kl, weighted, *sums = ops.latents(*(*tensors, None, None)[:4], noise, *encoded(call))
    if call.kind is None:
        return z, None, None, None
    scale = call.scale(tensors[0])
    weighted = None if call.floor is None and call.shares is None else formula.scaled(weighted, scale)
    kl, sums = formula.scaled(kl, scale), sums if call.statistics else None
    return None if noise is None else z, *formula.with_free_bits(call, tensors[0], kl, weighted, sums)[:3]
