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

# Differences of logarithms below which the terms of a KL would cancel.
NEAR = 1.0


def kl_elements(latents: Latents, logits: Tensor, *prior: Tensor) -> Tensor:
    """KL of each group in nats, `[B, ...]` of logits `[B, ..., K]`; autograd can differentiate it any number of times."""
    dtype, classes = result_dtype(logits, *prior), logits.shape[-1]
    log_s, log_t = _log_probabilities([logits, *prior], dtype)
    unimix = latents.posterior.unimix
    s, t, delta = torch.exp(log_s), torch.exp(log_t), log_s - log_t
    if unimix:
        difference = s - t
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
    a prior may be smaller. None where a class is impossible, or a logit infinite or NaN, which `kl_elements` is for.
    """
    if latents.posterior.unimix:
        return _mixed_in_one_pass(latents.posterior.unimix, logits, prior, out, spare)
    by_logits, by_prior = out
    s = torch.softmax(logits, -1, out=spare[0])
    # The largest probability is 1 over the normalizer, which takes less time than `log_softmax`; and the logarithm of the
    # likeliest class, which counts most, has one rounding.
    delta = torch.sub(logits, logits.amax(-1, keepdim=True), out=by_logits if by_logits is not None else spare[1])
    likeliest = s.amax(-1, keepdim=True)
    if prior is None:
        t: float | Tensor = 1 / logits.shape[-1]
        delta.add_(torch.log(likeliest / t))
    else:
        t = torch.softmax(prior, -1)
        less = torch.sub(prior, prior.amax(-1, keepdim=True), out=spare[2] if prior.shape == s.shape else None)
        delta.sub_(less).add_(torch.log(likeliest / t.amax(-1, keepdim=True)))
    lowest, largest = (end.item() for end in torch.aminmax(delta))
    if not -math.inf < lowest <= largest < math.inf:  # NaN is neither
        return None
    values = total = torch.mul(delta, s, out=spare[2]).sum(-1)
    if total.numel() and total.min().item() < LITTLE:
        values = _with_little_kept(total, s, t, delta, spare)
    if by_prior is not None:
        torch.sub(t, s, out=by_prior)
    if by_logits is not None:
        delta.sub_(total.unsqueeze(-1)).mul_(s)
    return values


# Below it a KL is one of differences that would cancel; and beyond this one of logarithms, differences of probabilities are as
# exact as these are.
LITTLE, APART = 0.05, 4.0


def _with_little_kept(values: Tensor, s: Tensor, t: float | Tensor, delta: Tensor, spare: Sequence[Tensor | None]) -> Tensor:
    """KLs with the digits of those that are little: sums of terms that are not negative."""
    little = values < LITTLE
    count = int(little.sum())
    if 2 * count > values.numel():
        return torch.where(little, _sum_of_excess(s, t, delta, spare), values)
    if isinstance(t, Tensor):
        t = t.expand(s.shape)[little]
    return values.masked_scatter(little, _sum_of_excess(s[little], t, delta[little], (None,) * 4))


def _sum_of_excess(s: Tensor, t: float | Tensor, delta: Tensor, spare: Sequence[Tensor | None]) -> Tensor:
    """The sum of s (delta + exp(-delta) - 1), which is s delta + t - s."""
    terms = torch.clamp(delta, min=-APART, out=spare[2]).neg_().expm1_().add_(delta).mul_(s)
    rest = torch.sub(t, s, alpha=math.exp(APART), out=spare[3]).clamp_(min=0)  # what was clamped away
    return terms.add_(rest).sum(-1)


def _mixed_in_one_pass(
    unimix: float, logits: Tensor, prior: Tensor | None, out: Sequence[Tensor | None], spare: Sequence[Tensor | None]
) -> Tensor:
    """Likewise, with a uniform share in both, so that all there is to be afraid of gives NaN."""
    (by_logits, by_prior), classes = out, logits.shape[-1]
    s = torch.softmax(logits, -1, out=spare[0])
    t: float | Tensor = 1 / classes if prior is None else torch.softmax(prior, -1)
    rho = t * (1 - unimix) + unimix / classes
    x = torch.sub(s, t, out=by_prior if by_prior is not None else spare[2]).mul_(1 - unimix).div_(rho)
    if unimix < 1e-6 * classes:  # where x may be rounded to -1
        x.clamp_(min=torch.finfo(x.dtype).eps / 2 - 1)
    delta = torch.log1p(x, out=by_logits if by_logits is not None else spare[1])
    values = torch.mul(x, delta, out=spare[3]).add_(delta).sub_(x).mul_(rho).sum(-1)
    if by_prior is not None:
        total = x.mul_(t).sum(-1, keepdim=True)
        x.addcmul_(t, total, value=-1).mul_(unimix - 1)
    if by_logits is not None:
        delta.sub_(torch.mul(delta, s, out=spare[3]).sum(-1, keepdim=True)).mul_(s).mul_(1 - unimix)
    return values


def _log_probabilities(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of both sides, before the uniform distribution is mixed in; a prior that is not given is uniform."""
    found = [F.log_softmax(t.to(dtype), -1) for t in tensors]
    if len(found) == 1:
        found.append(torch.full_like(found[0], -math.log(found[0].shape[-1])))
    return found[0], found[1]
