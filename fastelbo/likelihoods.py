"""The likelihoods p(x | z) that a decoder can parametrize, one row each.

A row has the formula in plain Torch (`nll`, which autograd can differentiate as often as it likes), the same formula with
its gradient in one pass (`fused`, the Torch twin of the device function of the same name in `kernels/likelihoods.py`), and
what may be asked of the arguments.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Number = float | Tensor

DENOMINATOR = 9.999999960041972e-13  # 1e-12 in float32, which Torch clamps by in every dtype

# Torch makes a tensor of a number at every operation, which costs as much as the operation on a small input; and it has no
# `rsub` that writes to given memory. Being 0-d, these go with every dtype and device.
ONE, HALF = torch.tensor(1.0, device="cpu"), torch.tensor(0.5, device="cpu")


class Likelihood(NamedTuple):
    """One row of the table.

    `nll(prediction, target, scale)` is the negative log-likelihood of each element, in nats.
    `fused(prediction, target, scale, dim, factor, a, b)` returns its sum over `dim` (-1; None: over everything; False: not
    wanted), and leaves its derivative by the prediction, times `factor`, in the buffer `a`, unless `factor` is None. `b` is
    scratch. All tensors have one shape and dtype; `factor` is a float or broadcasts.
    `name` is also that of the device function. `probabilities`: predictions must lie in [0, 1]. `binary`: so must targets.
    """

    name: str
    nll: Callable[[Tensor, Tensor, Number], Tensor]
    fused: Callable[[Tensor, Tensor, Number, int | bool | None, Number | None, Tensor, Tensor], Tensor | None]
    probabilities: bool = False
    binary: bool = False
    has_scale: bool = False


def _bernoulli(p: Tensor, x: Tensor, scale: Number) -> Tensor:
    kind = p.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # which refuses this function on a GPU, even for float32
            return F.binary_cross_entropy(p, x, reduction="none")
    return F.binary_cross_entropy(p, x, reduction="none")


def _bernoulli_fused(p, x, scale, dim, factor, a, b):
    # As in Torch: logarithms clamped at -100.
    total = None
    if dim is not False:
        torch.log(p, out=a).clamp_(min=-100)
        torch.neg(p, out=b).log1p_().clamp_(min=-100)
        total = torch.lerp(b, a, x, out=b).sum(dim).neg_()
    if factor is not None:
        torch.sub(ONE, p, out=b).mul_(p).clamp_(min=DENOMINATOR)
        _times(torch.sub(p, x, out=a).div_(b), factor)
    return total


def _bernoulli_logits(logit: Tensor, x: Tensor, scale: Number) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit, x, reduction="none")


def _bernoulli_logits_fused(logit, x, scale, dim, factor, a, b):
    # max(l, 0) - x l + log1p(exp(-|l|)); the last term is -log(1 - q) with q = sigmoid(-|l|), which is cheaper than exp.
    total = None
    if dim is not False:
        positive = torch.clamp_min(logit, 0, out=a)
        torch.sub(logit, positive, alpha=2, out=b).sigmoid_().neg_().log1p_()
        total = positive.addcmul_(logit, x, value=-1).sub_(b).sum(dim)
    if factor is not None:
        _times(torch.sigmoid(logit, out=a).sub_(x), factor)
    return total


def _mse(y: Tensor, x: Tensor, scale: Number) -> Tensor:
    return F.mse_loss(y, x, reduction="none")


def _mse_fused(y, x, scale, dim, factor, a, b):
    if factor is None:
        return torch.ops.aten.mse_loss.out(y, x, 0, out=a).sum(dim)  # not reduced; a pass less than below
    torch.sub(y, x, out=a)
    # torch.dot would be one pass less, but is off by 2e-4 for half a million elements.
    total = None if dim is False else torch.mul(a, a, out=b).sum(dim)
    a.mul_(2 * factor)
    return total


def _gaussian(mean: Tensor, x: Tensor, scale: Number) -> Tensor:
    return 0.5 * ((x - mean) / scale).square() + _log_normalizer(scale)


def _gaussian_fused(mean, x, scale, dim, factor, a, b):
    total = _mse_fused(mean, x, scale, dim, None if factor is None else factor * 0.5 / scale**2, a, b)
    if dim is not False:
        terms = a.numel() // max(total.numel(), 1)
        total.mul_(0.5 / scale**2).add_(terms * _log_normalizer(scale))
    return total


def _log_normalizer(scale: Number) -> Number:
    """log(scale sqrt(2 pi))."""
    log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    return log_scale + 0.5 * math.log(2 * math.pi)


def _times(gradient: Tensor, factor: Number) -> None:
    if isinstance(factor, Tensor) or factor != 1:
        gradient.mul_(factor)


LIKELIHOODS = {
    row.name: row
    for row in (
        Likelihood("bernoulli", _bernoulli, _bernoulli_fused, probabilities=True, binary=True),
        Likelihood("bernoulli_logits", _bernoulli_logits, _bernoulli_logits_fused, binary=True),
        Likelihood("mse", _mse, _mse_fused),
        Likelihood("gaussian", _gaussian, _gaussian_fused, has_scale=True),
    )
}
