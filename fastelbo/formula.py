"""The objective as a formula of Torch operations, which autograd can differentiate as often as it likes.

What calls use that `torch.func` transforms, calls that `torch.compile` traces where there are no kernels, and backward with
`create_graph=True`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .numerics import excess_of_logvar, positive
from .plain import PLAIN


def objective(recon_x, x, mu, logvar, kl, beta, *, likelihood, scale, target_scale, weights, per_sample, dtype):
    """`(loss, recon, kl)` as `torch_backend.loss_forward` computes them."""
    target = repeated(x, recon_x).to(dtype)
    if target_scale != 1:
        target = target * target_scale
    if isinstance(scale, Tensor):
        scale = positive(scale)
    recon = _reduce(PLAIN[likelihood].nll(recon_x.to(dtype), target, scale), weights[0], per_sample)
    kl = divergence(mu, logvar, weights[1], per_sample, dtype) if kl is None else kl.to(dtype, copy=True)
    if isinstance(beta, Tensor):
        beta = beta.to(dtype)
    return recon + beta * kl, recon, kl


def repeated(x: Tensor, recon_x: Tensor) -> Tensor:
    """The target, as often as the prediction has samples of it."""
    rows, batch = recon_x.shape[0], x.shape[0]  # which `len` would make constants of torch.export
    return x if rows == batch else x.expand(rows // batch, *x.shape).flatten(0, 1)


def divergence(mu: Tensor, logvar: Tensor, weight: float, per_sample: bool, dtype: torch.dtype) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats, reduced."""
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    return _reduce(0.5 * (mu.square() + excess_of_logvar(logvar)), weight, per_sample)


def sample(mu: Tensor, logvar: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """z = mu + exp(logvar / 2) * eps."""
    z = mu.to(dtype) + eps.to(dtype) * torch.exp(0.5 * logvar.to(dtype))
    return z.to(torch.promote_types(mu.dtype, logvar.dtype))


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


def _reduce(values: Tensor, weight: float, per_sample: bool) -> Tensor:
    if not per_sample:
        return values.sum() * weight
    return values.flatten(1).sum(1) if values.dim() > 1 else values
