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


class Likelihood(NamedTuple):
    """One row of the table.

    `nll(prediction, target, scale)` is the negative log-likelihood of each element, in nats.
    `fused(prediction, target, scale, nll, gradient, spare)` writes it and its derivative by the prediction into the buffers
    `nll` and `gradient`, either of which may be None; `spare` is scratch. All have one shape and dtype.
    `name` is also that of the device function. `bounded`: prediction and target must lie in [0, 1].
    """

    name: str
    nll: Callable[[Tensor, Tensor, Number], Tensor]
    fused: Callable[[Tensor, Tensor, Number, Tensor | None, Tensor | None, Tensor], None]
    bounded: bool = False
    has_scale: bool = False


def _bernoulli(p: Tensor, x: Tensor, scale: Number) -> Tensor:
    return F.binary_cross_entropy(p, x, reduction="none")


def _bernoulli_fused(p, x, scale, nll, gradient, spare):
    # As in Torch: logarithms clamped at -100, the gradient's denominator at 1e-12.
    if nll is not None:
        torch.log(p, out=nll).clamp_(min=-100)
        torch.neg(p, out=spare).log1p_().clamp_(min=-100)
        torch.lerp(spare, nll, x, out=nll).neg_()
    if gradient is not None:
        torch.neg(p, out=spare).add_(1).mul_(p).clamp_(min=1e-12)
        torch.sub(p, x, out=gradient).div_(spare)


def _bernoulli_logits(logit: Tensor, x: Tensor, scale: Number) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit, x, reduction="none")


def _bernoulli_logits_fused(logit, x, scale, nll, gradient, spare):
    # max(l, 0) - x l + log1p(exp(-|l|)); the last term is -log(1 - q) with q = sigmoid(-|l|), which is cheaper than exp.
    if nll is not None:
        torch.abs(logit, out=spare).neg_().sigmoid_().neg_().log1p_()
        torch.clamp(logit, min=0, out=nll).addcmul_(logit, x, value=-1).sub_(spare)
    if gradient is not None:
        torch.sigmoid(logit, out=gradient).sub_(x)


def _mse(y: Tensor, x: Tensor, scale: Number) -> Tensor:
    return F.mse_loss(y, x, reduction="none")


def _mse_fused(y, x, scale, nll, gradient, spare):
    torch.sub(y, x, out=spare)
    if nll is not None:
        torch.mul(spare, spare, out=nll)
    if gradient is not None:
        torch.mul(spare, 2, out=gradient)


def _gaussian(mean: Tensor, x: Tensor, scale: Number) -> Tensor:
    return 0.5 * ((x - mean) / scale).square() + _log_normalizer(scale)


def _gaussian_fused(mean, x, scale, nll, gradient, spare):
    torch.sub(mean, x, out=spare).div_(scale)
    if nll is not None:
        torch.mul(spare, spare, out=nll).mul_(0.5).add_(_log_normalizer(scale))
    if gradient is not None:
        torch.div(spare, scale, out=gradient)


def _log_normalizer(scale: Number) -> Number:
    log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    return log_scale + 0.5 * math.log(2 * math.pi)


LIKELIHOODS = {
    row.name: row
    for row in (
        Likelihood("bernoulli", _bernoulli, _bernoulli_fused, bounded=True),
        Likelihood("bernoulli_logits", _bernoulli_logits, _bernoulli_logits_fused),
        Likelihood("mse", _mse, _mse_fused),
        Likelihood("gaussian", _gaussian, _gaussian_fused, has_scale=True),
    )
}
