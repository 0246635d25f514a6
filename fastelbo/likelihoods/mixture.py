"""The discretized logistic mixture as a formula of Torch operations, which autograd can differentiate twice.

Salimans et al., PixelCNN++, 2017 (its `discretized_mix_logistic_loss` and order of parameters); Child, Very Deep VAEs, 2021.
Theirs takes a density for the probability of a bin that holds less than 1e-5; here it is exact, however little the bin holds.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.numerics import bin_in_one_pass, log_bin

LOWEST_LOG_SCALE = -7.0


def parameters_of(channels: int) -> int:
    """How many parameters a component has."""
    return 10 if channels == 3 else 1 + 2 * channels


def nll(prediction: Tensor, x: Tensor, *, levels: int, dim: int) -> Tensor:
    """Negative log-likelihood of each pixel in nats, `[B, *spatial]`, of the dtype of `prediction`.

    - `prediction`: `[B, P, *spatial]`, or with the P parameters along another `dim`: K logits of components, then for each of
      the C channels K means, K log scales and, if C = 3, K coefficients. If C = 3, P = 10 K and two means move: that of G by
      R times tanh of R's coefficient, that of B by R times tanh of G's and by G times tanh of B's. Else P = K (1 + 2 C).
    - `x`: `[B, C, *spatial]` in [-1, 1]. The lowest step reaches to -infinity, the highest to infinity. Log scales below -7
      count as -7.
    """
    prediction, x = prediction.movedim(dim, 1), x.movedim(dim, 1)
    channels = x.shape[1]
    count = prediction.shape[1] // parameters_of(channels)
    logits, rest = prediction[:, :count], prediction[:, count:].unflatten(1, (channels, -1, count))
    means, log_scales = rest[:, :, 0], rest[:, :, 1].clamp(min=LOWEST_LOG_SCALE)
    x = x.unsqueeze(2)
    if channels == 3:
        (mean_r, mean_g, mean_b), (g_by_r, b_by_r, b_by_g) = means.unbind(1), torch.tanh(rest[:, :, 2]).unbind(1)
        r, g, _ = x.unbind(1)
        means = torch.stack((mean_r, mean_g + g_by_r * r, mean_b + b_by_r * r + b_by_g * g), dim=1)
    half = 1 / (levels - 1)
    inverse = torch.exp(-log_scales)
    upper, lower = (x - means + half) * inverse, (x - means - half) * inverse
    log_p = log_bin(lower, upper, 2 * half * inverse, math.log(2 * half) - log_scales, x, half)
    nll = -torch.logsumexp(F.log_softmax(logits, 1) + log_p.sum(1), 1)
    return torch.where((x.abs() > 1 + half).any(1).squeeze(1), torch.nan, nll)


def in_one_pass(prediction: Tensor, x: Tensor, gradient: Tensor | None, *, levels: int, dim: int) -> Tensor | None:
    """Likewise, with the derivatives by `prediction` in `gradient`, unless that is None. None: `nll` is needed."""
    prediction, x = prediction.movedim(dim, 1), x.movedim(dim, 1)
    channels = x.shape[1]
    count = prediction.shape[1] // parameters_of(channels)
    logits, rest = prediction[:, :count], prediction[:, count:].unflatten(1, (channels, -1, count))
    log_scales = rest[:, :, 1].clamp(min=LOWEST_LOG_SCALE)
    each = x.unsqueeze(2)
    centered = torch.sub(each, rest[:, :, 0])
    if channels == 3:
        links = torch.tanh(rest[:, :, 2])
        r, g, _ = each.unbind(1)
        centered[:, 1].addcmul_(links[:, 0], r, value=-1)
        centered[:, 2].addcmul_(links[:, 1], r, value=-1).addcmul_(links[:, 2], g, value=-1)
    inverse = torch.neg(log_scales).exp_()
    found = bin_in_one_pass(each, centered, inverse, 1 / (levels - 1), (None,) * 7)
    if found is None:
        return None
    bins, by_mean, by_scale = found
    log_share = F.log_softmax(logits, 1)
    joint = torch.sub(log_share, bins.sum(1))
    values = torch.logsumexp(joint, 1)
    if not math.isfinite(values.sum().item()):
        return None
    if gradient is not None:
        gradient = gradient.movedim(dim, 1)
        chance = torch.sub(joint, values.unsqueeze(1), out=joint).exp_()  # of each component, given x
        torch.sub(log_share.exp_(), chance, out=gradient[:, :count])
        to_rest, chance = gradient[:, count:].unflatten(1, (channels, -1, count)), chance.unsqueeze(1)
        by_mean.mul_(inverse).mul_(chance)
        to_rest[:, :, 0] = by_mean
        is_free = torch.ge(rest[:, :, 1], LOWEST_LOG_SCALE, out=torch.empty_like(by_scale))
        torch.mul(by_scale.mul_(chance), is_free, out=to_rest[:, :, 1])
        if channels == 3:
            by_link = torch.addcmul(torch.ones((), dtype=links.dtype, device=links.device), links, links, value=-1)
            moved = torch.stack((by_mean[:, 1] * r, by_mean[:, 2] * r, by_mean[:, 2] * g), dim=1)
            torch.mul(moved, by_link, out=to_rest[:, :, 2])
    return values.neg_()
