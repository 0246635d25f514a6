"""The formulas of categorical latents in plain Torch: the KL of each group of classes, and its derivatives in one pass.

The device functions are in `kernels/categorical_divergence.py`, which says why nothing cancels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.arguments import result_dtype
from ..basics.numerics import excess_of_logvar
from .posterior import Latents

# Differences of logarithms below which the terms of a KL would cancel; and up to which exponentials of them are exact enough.
NEAR, FAR = 1.0, 60.0


def kl_elements(latents: Latents, logits: Tensor, *prior: Tensor) -> Tensor:
    """KL of each group in nats, `[B, ...]` of logits `[B, ..., K]`; autograd can differentiate it any number of times."""
    dtype, classes = result_dtype(logits, *prior), logits.shape[-1]
    log_s, log_t = _log_probabilities([logits, *prior], dtype)
    unimix = latents.posterior.unimix
    s, t, delta = torch.exp(log_s), torch.exp(log_t), log_s - log_t
    if unimix:
        near = delta.abs() < NEAR
        difference = torch.where(near, t * torch.expm1(torch.where(near, delta, 0.0)), s - t)
        s, t = ((1 - unimix) * p + unimix / classes for p in (s, t))
        x = (1 - unimix) * difference / t
        near = x.abs() < 0.5
        delta = torch.where(near, torch.log1p(torch.where(near, x, 0.0)), torch.log(s) - torch.log(t))
    near = delta.abs() < NEAR  # not of infinities and NaN
    close = s * excess_of_logvar(torch.where(near, -delta, 0.0))
    # A class that is impossible on both sides adds nothing; one that is so under the prior alone, infinity.
    apart = s * torch.where(near | (s == 0), 0.0, delta) + (t - s)
    return torch.where(near, close, apart).sum(-1)


def kl_in_one_pass(
    latents: Latents, logits: Tensor, prior: Tensor | None, out: Sequence[Tensor | None], spare: Sequence[Tensor | None]
) -> Tensor | None:
    """The KL of each group of logits, and its derivatives by those of both sides, written to `out` unless None there.

    All tensors come in one dtype. Those of `out` have the shape of the logits, as `spare`, buffers to be written to, or None;
    a prior may be smaller. None where logarithms of probabilities are so far apart that `kl_elements` is needed.
    """
    unimix, classes = latents.posterior.unimix, logits.shape[-1]
    by_logits, by_prior = out
    s = torch.log_softmax(logits, -1, out=spare[0])
    delta = by_logits if by_logits is not None else spare[1]
    if prior is None:
        t: float | Tensor = 1 / classes
        delta = torch.add(s, math.log(classes), out=delta)
    else:
        t = torch.log_softmax(prior, -1)
        delta = torch.sub(s, t, out=delta)
    lowest, highest = torch.aminmax(delta)
    if not (lowest > -FAR and highest < FAR):  # NaN is neither
        return None
    s.exp_()
    less = torch.neg(delta, out=by_prior if by_prior is not None else spare[2]).expm1_()
    if not unimix:
        values = torch.add(less, delta, out=spare[3]).mul_(s).sum(-1)
        less.mul_(s)  # t - s, the derivative by the prior's logits
        if by_logits is not None:  # the sum of s delta, without the rounding of the normalizers that the KL does not have
            delta.sub_((values - less.sum(-1)).unsqueeze(-1)).mul_(s)
        return values
    if isinstance(t, Tensor):
        t = t.exp_()
    rho = t * (1 - unimix) + unimix / classes
    x = less.mul_(s).mul_(unimix - 1).div_(rho)
    delta = torch.log1p(x, out=delta)
    values = torch.mul(x, delta, out=spare[3]).add_(delta).sub_(x).mul_(rho).sum(-1)
    if by_prior is not None:
        x.sub_(torch.mul(x, t, out=spare[3]).sum(-1, keepdim=True)).mul_(t).mul_(unimix - 1)
    if by_logits is not None:
        delta.sub_(torch.mul(delta, s, out=spare[3]).sum(-1, keepdim=True)).mul_(s).mul_(1 - unimix)
    return values


def _log_probabilities(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of both sides, before the uniform distribution is mixed in; a prior that is not given is uniform."""
    found = [F.log_softmax(t.to(dtype), -1) for t in tensors]
    if len(found) == 1:
        found.append(torch.full_like(found[0], -math.log(found[0].shape[-1])))
    return found[0], found[1]
