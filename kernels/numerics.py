"""Elementary functions that keep their relative accuracy where the built-in ones do not."""

import triton
import triton.language as tl


@triton.jit
def exp_and_expm1(x):
    """exp(x) and exp(x) - 1, both to about one rounding (to 6e-7 in the last 0.4 before overflow); exp is 0 below -87.

    `tl.exp` rounds x * log2(e) before it exponentiates, which costs 1e-6 at |x| = 20, and `exp(x) - 1` cancels
    near 0, where a collapsed posterior has its log-variances.
    """
    if x.dtype == tl.float64:
        e = tl.exp(x)
        # Kahan's correction: the rounding of e cancels between e - 1 and log(e).
        plain = (e == 1.0) | (e < 0.5) | (e > 2.0)
        corrected = (e - 1.0) * (x / tl.log(tl.where(plain, 2.0, e)))
        expm1 = tl.where(e == 1.0, x, tl.where(plain, e - 1.0, corrected))
    else:
        # x = k ln 2 + f with |f| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to the integer k and leaves it in the low bits.
        tiny = x < -87.0  # written so that NaN passes through
        y = tl.where(tiny, -87.0, x)
        shifted = tl.minimum(y * 1.4426950408889634 + 12582912.0, 12583039.0)  # k <= 127
        k = shifted - 12582912.0
        f = (y - k * 0.693359375) + k * 2.12194440e-4  # ln 2 in two parts: the first product is exact
        # Taylor to f^7: the remainder is under 2e-8 of f.
        p = f * f * (0.5 + f * (1 / 6 + f * (1 / 24 + f * (1 / 120 + f * (1 / 720 + f * (1 / 5040)))))) + f
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # 2^k
        e = tl.where(tiny, 0.0, power + power * p)
        expm1 = power * p + (power - 1.0)
    return e, expm1


@triton.jit
def log1p(x):
    """log(1 + x) for x in [-1, 1]: the rounding of 1 + x cancels in the quotient."""
    u = 1.0 + x
    same = u == 1.0
    return tl.where(same, x, tl.log(u) * (x / tl.where(same, 1.0, u - 1.0)))
