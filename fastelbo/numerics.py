"""Formulas of Torch operations that keep their digits, in value and in derivatives, where the textbook's do not."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); `F.softplus` becomes x beyond a threshold, where its derivative jumps by 2e-9."""
    return -F.logsigmoid(-x)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0 (Maechler, Accurately computing log(1 - exp(-|a|)), 2012)."""
    small = x < math.log(2)
    near = torch.log(-torch.expm1(-torch.where(small, x, 1.0)))
    return torch.where(small, near, torch.log1p(-torch.exp(-torch.where(small, 1.0, x))))


def log_gamma_ratio(a: Tensor, n: Tensor) -> Tensor:
    """lgamma(a + n) - lgamma(a). Two float32 values of the size of a log(a) leave nothing of a small difference."""
    wide = a.double()  # once, so that the derivatives of both terms meet in float64 too
    return (torch.lgamma(wide + n.double()) - torch.lgamma(wide)).to(torch.promote_types(a.dtype, n.dtype))


def log_factorial(n: Tensor) -> Tensor:
    return torch.lgamma(torch.where(n < 0, torch.nan, n) + 1)


def log_ratio_to_tanh(x: Tensor) -> Tensor:
    """log(x / tanh(x / 2)), which is even, and log 2 at 0."""
    square = x * x
    small = square < (0.01 if x.dtype == torch.float64 else 0.25)  # as far as the series goes
    s = torch.where(small, square, 0.0)
    near = math.log(2) + s * (1 / 12 + s * (-7 / 1440 + s * (31 / 90720 + s * (-127 / 4838400 + s * (73 / 34214400)))))
    far = torch.where(small, 1.0, x.abs())
    return torch.where(small, near, far.log() + softplus(-far) - log1mexp(far))
