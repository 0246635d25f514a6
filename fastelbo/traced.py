"""What calls compute that are traced by `torch.compile` or transformed by `torch.func`.

They keep no state. Where Triton computes they reach the kernels by way of registered operators. Everywhere else, and where an
operator would be in the way of a transformation, they are the plain formula: Inductor can fuse it, `torch.func` transform it.
"""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import formula, torch_backend
from .backend import backend_for
from .operators import ops
from .plain import PLAIN
from .tracing import constant_when_compiled, is_transformed, is_wrapper


def _goes_to_kernels(*values) -> bool:
    """Whether Triton computes for the first of these, and an operator may stand for it."""
    if is_transformed() or any(is_wrapper(v) for v in values if not isinstance(v, FakeTensor)):
        return False
    return _has_kernels(values[0].device)


@constant_when_compiled
def _has_kernels(device: torch.device) -> bool:
    return backend_for(device) is not torch_backend


def draw(mu: Tensor, logvar: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise, or a seed for it."""
    if _goes_to_kernels(mu, logvar):
        from .kernels import draw_noise  # not above: Triton may be missing

        return draw_noise(logvar, torch.contiguous_format, generator)
    return torch.empty_like(logvar).normal_(generator=generator) if generator is not None else torch.randn_like(logvar)


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
    if not PLAIN[likelihood].has_scale:
        scale = None
    elif isinstance(scale, Tensor):
        scale = scale.to(recon_x.device)
    else:  # only in a product with a tensor does a number that changes not compile anew
        scale = torch.ones((), dtype=torch.float64, device=recon_x.device) * scale
    if not _goes_to_kernels(recon_x, x, mu, logvar, kl, beta, scale):
        return formula.objective(recon_x, x, mu, logvar, kl, beta, likelihood=likelihood, scale=scale, **options)
    weights, dtype = options["weights"], options["dtype"]
    x = formula.repeated(x, recon_x)
    recon, kl_sum = ops.loss(
        recon_x, x, mu, logvar, kl, scale, likelihood, options["target_scale"], options["per_sample"], dtype
    )
    recon = recon * weights[0]
    kl = kl_sum * weights[1] if kl is None else kl_sum
    if isinstance(beta, Tensor):
        beta = beta.to(dtype)
    return recon + beta * kl, recon, kl
