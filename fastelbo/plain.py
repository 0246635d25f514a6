"""The likelihoods of one tensor of parameters, or of one and a fixed scale: what the four-argument call can have. One row each.

A row has the formula in plain Torch (`nll`, which autograd can differentiate as often as it likes), the same formula with
its gradient in one pass (`fused`, the Torch twin of the device function of the same name in `kernels/likelihoods.py`), and
what may be asked of the arguments. All other likelihoods are in `likelihoods.py`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import log_factorial, log_ratio_to_tanh, nan_unless
from .values import BITS, NONNEGATIVE, UNIT, Range

Number = float | Tensor

DENOMINATOR = 9.999999960041972e-13  # 1e-12 in float32, which Torch clamps by in every dtype

# Torch makes a tensor of a number at every operation, which costs as much as the operation on a small input; and it has no
# `rsub` that writes to given memory. Being 0-d, these go with every dtype and device.
ONE, HALF = torch.tensor(1.0, device="cpu"), torch.tensor(0.5, device="cpu")


class Plain(NamedTuple):
    """One row of the table.

    `nll(prediction, target, scale)` is the negative log-likelihood of each element, in nats.
    `fused(prediction, target, scale, dim, factor, a, b)` returns its sum over `dim` (-1; None: over everything; False: not
    wanted), and leaves its derivative by the prediction, times `factor`, in the buffer `a`, unless `factor` is None. `b` is
    scratch. All tensors have one shape and dtype; `factor` is a float or broadcasts.
    `name` is also that of the device function. `allowed` and `support`: where predictions and targets must lie.
    """

    name: str
    nll: Callable[[Tensor, Tensor, Number], Tensor]
    fused: Callable[[Tensor, Tensor, Number, int | bool | None, Number | None, Tensor, Tensor], Tensor | None]
    allowed: Range | None = None
    support: Range | None = None
    has_scale: bool = False


def _bernoulli(p: Tensor, x: Tensor, scale: Number) -> Tensor:
    # Torch's function raises on a CPU, and stops a GPU, where something is NaN or outside: NaN here, in value and derivatives.
    inside = (p.clamp(0, 1) == p) & (x.clamp(0, 1) == x)
    invalid = (p + x) * torch.where(inside, 0.0, torch.nan).to(p.dtype)
    p, x, kind = torch.where(inside, p, 0.5), torch.where(inside, x, 0.5), p.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # which refuses this function on a GPU, even for float32
            return F.binary_cross_entropy(p, x, reduction="none") + invalid
    return F.binary_cross_entropy(p, x, reduction="none") + invalid


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
    return _log(scale) + 0.5 * math.log(2 * math.pi)


def _log(number: Number) -> Number:
    return number.log() if isinstance(number, Tensor) else math.log(number)


def _l1(y: Tensor, x: Tensor, scale: Number) -> Tensor:
    return F.l1_loss(y, x, reduction="none")


def _laplace(mean: Tensor, x: Tensor, scale: Number) -> Tensor:
    return (x - mean).abs() / scale + (_log(scale) + math.log(2))


def _poisson(rate: Tensor, x: Tensor, scale: Number) -> Tensor:
    # At a rate of 0, x log(rate) has no derivative in Torch, though it is 0 for x = 0.
    zero = (rate == 0) & (x == 0)
    return rate - torch.where(zero, 0.0, x * torch.log(torch.where(zero, 1.0, rate))) + log_factorial(x)


def _poisson_log(log_rate: Tensor, x: Tensor, scale: Number) -> Tensor:
    return torch.exp(log_rate) - x * log_rate + log_factorial(x)


def _continuous_bernoulli(p: Tensor, x: Tensor, scale: Number) -> Tensor:
    p = nan_unless((p >= 0) & (p <= 1), p)
    eps = torch.finfo(p.dtype).eps  # by which `torch.distributions.ContinuousBernoulli` keeps them from 0 and 1
    p = torch.where(p < eps, eps, torch.where(p > 1 - eps, 1 - eps, p))  # as clamp, but that the gradient by NaN is not 0
    return _continuous_bernoulli_logits(torch.log(p) - torch.log1p(-p), x, scale)


def _continuous_bernoulli_logits(logit: Tensor, x: Tensor, scale: Number) -> Tensor:
    # The normalizer of Loaiza-Ganem and Cunningham, The Continuous Bernoulli (2019), at sigmoid(logit).
    return F.binary_cross_entropy_with_logits(logit, x, reduction="none") - log_ratio_to_tanh(logit)


def _fused(nll: Callable) -> Callable:
    """The gradient by autograd, a block at a time."""

    def fused(p, x, scale, dim, factor, a, b):
        with torch.enable_grad():
            leaf = p.detach().requires_grad_(factor is not None)
            values = nll(leaf, x.detach(), scale)
        if factor is not None:
            # Not afterwards: a derivative may overflow, as that by a rate of 1e-39.
            upstream = factor.expand_as(values) if isinstance(factor, Tensor) else torch.full_like(values, factor)
            a.copy_(torch.autograd.grad(values, leaf, upstream)[0])
        return None if dim is False else values.detach().sum(dim)

    return fused


def _times(gradient: Tensor, factor: Number) -> None:
    if isinstance(factor, Tensor) or factor != 1:
        gradient.mul_(factor)


PLAIN = {
    row.name: row
    for row in (
        Plain("bernoulli", _bernoulli, _bernoulli_fused, allowed=UNIT, support=UNIT),
        Plain("bernoulli_logits", _bernoulli_logits, _bernoulli_logits_fused, support=BITS),
        Plain("mse", _mse, _mse_fused),
        Plain("gaussian", _gaussian, _gaussian_fused, has_scale=True),
        Plain("l1", _l1, _fused(_l1)),
        Plain("laplace", _laplace, _fused(_laplace), has_scale=True),
        Plain("poisson", _poisson, _fused(_poisson), allowed=NONNEGATIVE, support=NONNEGATIVE),
        Plain("poisson_log", _poisson_log, _fused(_poisson_log), support=NONNEGATIVE),
        Plain("continuous_bernoulli", _continuous_bernoulli, _fused(_continuous_bernoulli), allowed=UNIT, support=UNIT),
        Plain("continuous_bernoulli_logits", _continuous_bernoulli_logits, _fused(_continuous_bernoulli_logits), support=BITS),
    )
}
