"""Elementary functions that keep their relative accuracy where the built-in ones do not, without branches.

A branch inside a tile, such as the ones of libdevice's logarithm, keeps the compiler from issuing a tile's loads together.
Float64 uses the built-in functions. The polynomials are minimax fits of the relative error.
"""

import triton
import triton.language as tl


@triton.jit
def exp_parts(x):
    """`(power, f)` with exp(x) = power * exp(f), a power of two and |f| <= ln(2) / 2, for x in [-87, 88.7]; NaN gives NaN."""
    # Adding 1.5 * 2^23 rounds to the integer k and leaves it in the low bits.
    shifted = tl.minimum(x * 1.4426950408889634 + 12582912.0, 12583039.0)  # k <= 127
    k = shifted - 12582912.0
    f = (x - k * 0.693359375) + k * 2.12194440e-4  # ln 2 in two parts: the first product is exact
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return power, f


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
        tiny = x < -87.0  # written so that NaN passes through
        power, f = exp_parts(tl.where(tiny, -87.0, x))
        # Taylor to f^7: the remainder is under 2e-8 of f.
        p = f * f * (0.5 + f * (1 / 6 + f * (1 / 24 + f * (1 / 120 + f * (1 / 720 + f * (1 / 5040)))))) + f
        e = tl.where(tiny, 0.0, power + power * p)
        expm1 = power * p + (power - 1.0)
    return e, expm1


@triton.jit
def exp_below(x):
    """exp(x) for x below 88, to about one rounding; 0 below -87."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # As `exp_parts`, without the ends; what comes out far below -87 is not used.
        shifted = x * 1.4426950408889634 + 12582912.0
        k = shifted - 12582912.0
        f = (x - k * 0.693359375) + k * 2.12194440e-4
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
        return tl.where(x < -87.0, 0.0, power * tl.exp2(f * 1.4426950408889634))  # NaN passes through


@triton.jit
def exp_and_softplus(x):
    """exp(x) and log(1 + exp(x)) for x <= 0, both to about one rounding; below -87, those of -87."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
        softplus = log1p(e)
    else:
        power, f = exp_parts(tl.maximum(x, -87.0, propagate_nan=tl.PropagateNan.ALL))
        e = power * tl.exp2(f * 1.4426950408889634)
        p = 0.10603654849517535 + e * (-0.05695953404516165 + e * (0.019851462303930416 - e * 0.003244025174828582))
        p = -0.24954133652315333 + e * (0.19675939243445606 + e * (-0.15305592541844473 + e * p))
        softplus = e * (0.9999999952872204 + e * (-0.49999902422756515 + e * (0.33329962416166653 + e * p)))
    return e, softplus


@triton.jit
def log_of_positive(x):
    """log(x) for 0 < x < inf; some finite number below -100 where x is 0, of either sign; anything elsewhere, NaN included.

    It leaves out five instructions of `log`, which most callers do not need.
    """
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        # x = 2^k (1 + f) with f in [-1/3, 1/3).
        subnormal = x < 1.1754943508222875e-38
        bits = tl.where(subnormal, x * 8388608.0 + 0.0, x).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
        exponent = (bits - 0x3F2AAAAB) & -0x800000
        k = exponent.to(tl.float32) * 1.1920928955078125e-07 - tl.where(subnormal, 23.0, 0.0)
        f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
        p = -0.16419354182872425 + f * (0.13920899706731457 + f * (-0.15372720965545278 + f * 0.14374222425711894))
        p = -0.4999994016904787 + f * (0.3333310631814459 + f * (-0.2500759859809704 + f * (0.20016060769833055 + f * p)))
        return k * 0.6931471805599453 + (f + f * (f * p))


@triton.jit
def log(x):
    """log(x) to about one rounding, subnormal numbers included: -inf for 0 of either sign, inf for inf, NaN for what is
    negative or NaN."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        # As unsigned integers, all that is negative, infinite or NaN comes after the finite numbers.
        finite = x.to(tl.uint32, bitcast=True) < 0x7F800000
        y = tl.where(finite, log_of_positive(x), x * float("inf") + float("inf"))
        return tl.where(x == 0.0, float("-inf"), y)


@triton.jit
def log1p(x):
    """log(1 + x) for x in (-1, 1]; NaN for NaN, some finite number below -100 at -1, and anything elsewhere. The first order of
    what 1 + x rounds away is added again."""
    u = 1.0 + x
    return log_of_positive(u) + (x - (u - 1.0))
