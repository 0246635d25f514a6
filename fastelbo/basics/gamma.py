"""Gamma functions by formulas of Torch operations that keep their digits: ratios, whose two values may be alike, and
factorials."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .scalars import HALF, as_tensor
from .tracing import is_behind_dynamo, is_seen


def log_gamma_ratio(a: Tensor, n: Tensor) -> Tensor:
    """lgamma(a + n) - lgamma(a). Two values of the size of a log(a) leave nothing of a small difference, in float64 neither."""
    dtype = torch.promote_types(a.dtype, n.dtype)
    if dtype == torch.float32 and is_behind_dynamo():
        return _CompiledRatio.apply(a, n)
    a, n = a.double(), n.double()
    low = a < (16.0 if dtype == torch.float64 else 2.0**20)  # up to which the difference in float64 has the digits of `dtype`
    if is_seen(a) and low.all():
        return (torch.lgamma(a + n) - torch.lgamma(a)).to(dtype)
    near = torch.where(low, a, 1.0)
    # Stirling's series (Abramowitz and Stegun 6.1.40) of both, with what they share left out.
    far = torch.where(low, 2.0**20, a)
    top = far + n
    beyond = n * (torch.log(top) - 1) + (far - 0.5) * torch.log1p(n / far) + (_stirling(top) - _stirling(far))
    return torch.where(low, torch.lgamma(near + n) - torch.lgamma(near), beyond).to(dtype)


def _stirling(x: Tensor) -> Tensor:
    """What log Gamma(x) is more than (x - 1/2) log(x) - x + log(2 pi) / 2, for x of 16 or more."""
    u = 1 / x
    v = u * u
    return u * (1 / 12 + v * (-1 / 360 + v * (1 / 1260 + v * (-1 / 1680 + v * (1 / 1188 - v * (691 / 360360))))))


def log_factorial(n: Tensor) -> Tensor:
    """log n!; from a table where all are whole numbers that it has, which takes a fifth of the time."""
    if is_seen(n) and not n.requires_grad and n.numel():
        (low, high), fraction, table = torch.aminmax(n), torch.frac(n), _table(n.dtype)
        if low.item() >= 0 and high.item() < len(table) and fraction.sum().item() == 0:
            return torch.index_select(table, 0, n.reshape(-1).to(torch.int32), out=fraction.reshape(-1)).view(n.shape)
    if n.dtype == torch.float32 and is_behind_dynamo():
        return _CompiledRatio.apply(torch.ones((), dtype=n.dtype, device=n.device), torch.where(n < 0, torch.nan, n))
    return torch.lgamma(torch.where(n < 0, torch.nan, n) + 1)


class _CompiledRatio(torch.autograd.Function):
    """`log_gamma_ratio` in float32 for the compiler, which has no digamma and takes float64 a few elements at a time."""

    @staticmethod
    def forward(ctx, a, n):
        ctx.save_for_backward(a, n)
        return ratio_and_derivatives(a, n)[0]

    @staticmethod
    def backward(ctx, upstream):
        a, n = ctx.saved_tensors
        _, by_a, by_n = ratio_and_derivatives(a, n)
        return (upstream * by_a).sum_to_size(a.shape), (upstream * by_n).sum_to_size(n.shape)


# Of what log Gamma(x) is more than (x - 1/2) log(x) - x + log(2 pi) / 2, for x of 1 or more: minimax fits of the derivative, in
# powers of 1/x from the first on, which the kernels have, too.
_FIT = (
    0.5, 0.083329647170729325, 6.0338266159070335e-5, -0.0086852620121034721, 0.00086350995886548188, 0.0036078251299803805,
    -0.0025540863956764276, 0.00059369724317517584,
)  # fmt: skip


def ratio_and_derivatives(a: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lgamma(a + n) - lgamma(a) in float32, and its derivatives by a and by n, for positive a and n from 0 on.

    No term is a difference of larger numbers. One step up by Gamma(x + 1) = x Gamma(x), after which the fits hold.
    """
    inverse = 1 / (a + n)
    # A quotient may overflow, its logarithm does not.
    step_log = torch.where(a < 1e-20, torch.log(a + n) - torch.log(a), torch.log1p(n / a))
    step_fall = n * inverse / a
    lower, upper = a + 1, a + n + 1
    u, w = 1 / lower, 1 / upper
    quotient, log_upper = n * u, torch.log(upper)
    log_quotient, difference = torch.log1p(quotient), quotient * w
    # The polynomial's value at w, and its rise to u over the distance.
    of_value = [c / i for i, c in enumerate(_FIT) if i > 0]
    correction = difference * _value_and_rise(w, u, of_value)[1]
    at_upper, rise = _value_and_rise(w, u, _FIT)
    ratio = n * (log_upper - 1) + ((lower - 0.5) * log_quotient - correction) - step_log
    return ratio, log_quotient + difference * rise + step_fall, log_upper - at_upper - inverse


def _value_and_rise(x: Tensor, y: Tensor, coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
    """p(x) and (p(y) - p(x)) / (y - x), of p(x) = x * the polynomial with these coefficients from the constant upwards."""
    *rest, last = coefficients
    value = last * x + rest[-1]
    rise = last * y + value
    for coefficient in reversed(rest[:-1]):
        value = value * x + coefficient
        rise = rise * y + value
    return value * x, rise


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.lgamma(torch.arange(1, 1026, dtype=torch.float64, device="cpu")).to(dtype)


def log_gamma_ratio_in_parts(a: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(top, rest, derivative)` with the digits of float32: lgamma(a + n) - lgamma(a) is n (log(top) - 1) + rest, and its
    derivative by `a` is digamma(a + n) - digamma(a).

    From Stirling's series at a + 4 and a + n + 4, with what they share left out: three logarithms instead of two `lgamma` and
    two `digamma`, which take four times as long, and the third may go into another one. For `a` from 1e-6 on, and a + n up to
    1e8, where a product of four overflows.
    """
    lower, lower_product, lower_terms, lower_slopes = _shifted_stirling(a.clone())
    upper, upper_product, upper_terms, upper_slopes = _shifted_stirling(a + n)
    log_ratio = torch.div(n, lower).log1p_()
    derivative = torch.sub(lower_slopes, upper_slopes, out=upper_slopes).add_(log_ratio)  # `a` may be smaller than n
    rest = upper_terms.sub_(lower_terms).addcmul_(log_ratio, lower.sub_(0.5)).sub_(upper_product.div_(lower_product).log_())
    return upper, rest, derivative


# Of both series, the first coefficients; as tensors, since a sum and a product are then one operation.
_FIRST, _OF_TERMS, _OF_SLOPES = (as_tensor(c, torch.float32) for c in (1 / 12, -1 / 360, -1 / 120))


def _shifted_stirling(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of z, to which it writes: y = z + 4; z (z + 1) (z + 2) (z + 3) / 2; what lgamma(y) is more than (y - 1/2) log(y) - y +
    log(2 pi) / 2; and what log(y) is more than digamma(z) (Abramowitz and Stegun 6.1.40, 6.3.5 and 6.3.18)."""
    pair = torch.add(z, 3).mul_(z)  # and (z + 1) (z + 2) is 2 more
    product = torch.addcmul(pair, pair, pair, value=0.5)
    y = torch.add(z, 4)
    # 1/z + 1/(z+1) + 1/(z+2) + 1/(z+3) = 2 (z + 1.5) (pair + 1) / product
    fractions = z.add_(1.5)
    fractions.addcmul_(fractions, pair)
    inverse = torch.reciprocal(y, out=pair)
    square = inverse * inverse
    terms = torch.add(_OF_TERMS, square, alpha=1 / 1260)
    terms = torch.addcmul(_FIRST, terms, square, out=terms).mul_(inverse)
    slopes = torch.add(_OF_SLOPES, square, alpha=1 / 252)
    slopes = torch.addcmul(_FIRST, slopes, square, out=square)
    slopes = torch.addcmul(HALF, slopes, inverse, out=slopes).mul_(inverse).addcdiv_(fractions, product, value=2)
    return y, product, terms, slopes
