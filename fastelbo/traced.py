"""What calls compute that are traced by `torch.compile` or transformed by `torch.func`.

They keep no state. Where Triton computes they reach the kernels by way of registered operators. Everywhere else, and where an
operator would be in the way of a transformation, they are the plain formula: Inductor can fuse it, `torch.func` transform it.
"""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import formula, torch_backend
from .backend import backend_for
from .likelihoods import LIKELIHOODS
from .operators import ops

# Types of arguments behind which nothing else can be.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, float, int, type(None)))


def is_traced(*values) -> bool:
    """Whether a call is traced by torch.compile or a dispatch mode (fake tensors, counters), transformed by torch.func, carries
    forward-mode tangents, or has tensors among its values that stand for others (DTensor, fake tensors)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _is_transformed()
        or (not _PLAIN.issuperset(map(type, values)) and any(map(_is_wrapper, values)))
    )


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _is_wrapper(value) -> bool:
    """Whether it is a tensor whose operations are Python's, so that there may be no memory of its own behind it."""
    return isinstance(value, Tensor) and type(value).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _goes_to_kernels(*values) -> bool:
    """Whether Triton computes for the first of these, and an operator may stand for it."""
    if _is_transformed() or any(_is_wrapper(v) for v in values if not isinstance(v, FakeTensor)):
        return False
    return _has_kernels(values[0].device)


def _has_kernels(device: torch.device) -> bool:
    return backend_for(device) is not torch_backend


# A constant to torch.compile, which does not look inside. `torch.compiler.assume_constant_result` does just this, but takes a
# second and more to import all of the compiler.
_has_kernels._dynamo_marked_constant = True


def draw(like: Tensor, layout: torch.memory_format, generator: torch.Generator | None) -> Tensor:
    """Noise, or a seed for it."""
    if _goes_to_kernels(like):
        from .kernels import draw_noise  # not above: Triton may be missing

        return draw_noise(like, layout, generator)
    return torch.empty_like(like).normal_(generator=generator) if generator is not None else torch.randn_like(like)


def sample(mu, logvar, noise, kl_weight: float, per_sample: bool, dtype: torch.dtype, wants_kl: bool):
    """`(z, kl or None)`."""
    if not _goes_to_kernels(mu, logvar, noise):
        kl = formula.divergence(mu, logvar, kl_weight, per_sample, dtype) if wants_kl else None
        return formula.sample(mu, logvar, noise, dtype), kl
    if not wants_kl:
        return ops.reparameterize(mu, logvar, noise, dtype), None
    z, kl = ops.sample_kl(mu, logvar, noise, per_sample, dtype)
    return z, kl * kl_weight


def objective(recon_x, x, mu, logvar, kl, beta, *, likelihood, scale, **options):
    """`(loss, recon, kl)` as `torch_backend.loss_forward` computes them."""
    if not LIKELIHOODS[likelihood].has_scale:
        scale = None
    elif not isinstance(scale, Tensor):  # only in a product with a tensor does a number that changes not compile anew
        scale = torch.ones((), dtype=torch.float64, device=recon_x.device) * scale
    if not _goes_to_kernels(recon_x, x, mu, logvar, kl, beta, scale):
        return formula.objective(recon_x, x, mu, logvar, kl, beta, likelihood=likelihood, scale=scale, **options)
    weights, dtype = options["weights"], options["dtype"]
    recon, kl_sum = ops.loss(
        recon_x, x, mu, logvar, kl, scale, likelihood, options["target_scale"], options["per_sample"], dtype
    )
    recon = recon * weights[0]
    kl = kl_sum * weights[1] if kl is None else kl_sum
    if isinstance(beta, Tensor):
        beta = beta.to(dtype)
    return recon + beta * kl, recon, kl
