"""log Gamma, its derivative digamma, and how both grow from one argument to another.

Each is Stirling's leading term, a correction that falls as 1/x, and for small x a shift by Gamma(x + 1) = x Gamma(x)
(Abramowitz and Stegun 6.1.40, 6.3.18, 6.1.15). The corrections are minimax fits in float32, the asymptotic series in float64.
"""

import triton
import triton.language as tl

from .numerics import log_of_positive


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    """The polynomial with these coefficients, the highest power's first."""
    value = COEFFICIENTS[0] * x + COEFFICIENTS[1]
    for i in tl.static_range(2, len(COEFFICIENTS)):
        value = value * x + COEFFICIENTS[i]
    return value


@triton.jit
def polynomial_and_slope(x, y, COEFFICIENTS: tl.constexpr):
    """p(x) and (p(y) - p(x)) / (y - x), without either difference, of p(x) = x * polynomial(x)."""
    value = COEFFICIENTS[0] * x + COEFFICIENTS[1]
    slope = COEFFICIENTS[0] * y + value
    for i in tl.static_range(2, len(COEFFICIENTS)):
        value = value * x + COEFFICIENTS[i]
        slope = slope * y + value
    return value * x, slope


@triton.jit
def log_one_plus(x, inverse):
    """log(1 + x) for x >= 0, given about 1 / (1 + x): the first order of what 1 + x rounds away is added again."""
    u = tl.maximum(1.0 + x, 1.0)  # it is no less; the compiler now knows, and leaves out what is done for subnormals
    return log_of_positive(u) + (x - (u - 1.0)) * inverse


@triton.jit
def lgamma_and_digamma(x):
    """log Gamma(x) and digamma(x) for x > 0; NaN elsewhere.

    In float32 the errors are below 2.5 eps of the result, near the zeros (1 and 2, where log Gamma is exactly 0, and 1.4616)
    below 4; in float64 about 1e-14 for log Gamma and 3e-15 for digamma, of the result or of 1, whichever is larger.
    """
    x = tl.where(x > 0.0, x, float("nan"))
    if x.dtype == tl.float64:
        # Ten steps up. In pairs from the two ends, (x + i) (x + 9 - i) = x (x + 9) + i (9 - i), they are five, and their
        # product's derivative gives the sum of all reciprocals with a single division.
        low = x < 10.0
        start = tl.where(low, x, 1.0)
        pair = start * (start + 9.0)
        product, derivative = pair, pair * 0.0 + 1.0
        for i in tl.static_range(1, 5):
            derivative = derivative * (pair + i * (9 - i)) + product
            product = product * (pair + i * (9 - i))
        step_end = tl.where(low, (2.0 * start + 9.0) * derivative / product, 0.0)
        z = tl.where(low, x + 10.0, x)
        log_z = tl.log(z)
        u = 1.0 / z
        r = polynomial(u * u, (1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12))
        s = polynomial(u * u, (1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12))
        lgamma = (z - 0.5) * (log_z - 1.0) + (0.4189385332046727 + u * r) - tl.where(low, tl.log(product), 0.0)
        lgamma = tl.where((x == 1.0) | (x == 2.0), 0.0, lgamma)
        digamma = log_z - u * (0.5 + u * s) - step_end
    else:
        # Below 3 polynomials on [1, 2], which have the zeros there as factors, and one step down or up from there, or none.
        low = x < 3.0
        step = tl.where(x < 1.0, -1.0, tl.where(x < 2.0, 0.0, 1.0))
        d = tl.where(low, x - (step + 1.0), 0.0)
        p = polynomial(
            d,
            (0.0024493691348913766, -0.013772119283850042, 0.036381519451429702, -0.063261958258897289, 0.088069530074175798,
             -0.11441702682645023, 0.15536841657968805, -0.24524903683464385, 0.57721565114098573),
        )  # fmt: skip
        q = polynomial(
            d,
            (-0.016221204652065631, 0.096919718754169385, -0.26756045779473499, 0.46770805304624618, -0.61116778970579643,
             0.67955590322681872, -0.71189310738983534, 0.75227402537637892, -0.85468772959604095, 1.2503801101760114),
        )  # fmt: skip
        base = tl.where(low, x - 0.5 * (step + 1.0), x)
        u = 1.0 / base
        log_base = log_of_positive(base)
        v = tl.minimum(u * u, 1 / 9)
        r = polynomial(v, (0.00069671416383788129, -0.0027727269525947403, 0.083333265879402741))
        s = polynomial(v, (0.0032649024328009538, -0.0082916645027795307, 0.083332605525181701))
        high_lgamma = (x - 0.5) * (log_base - 1.0) + (0.4189385332046727 + u * r)
        lgamma = tl.where(low, step * log_base + d * (d - 1.0) * p, high_lgamma)
        root = (d - 0.461632132530212402) - 1.243814996e-08  # the zero of digamma in two parts
        digamma = tl.where(low, step * u + root * q, log_base - (0.5 * u + v * s))
    return lgamma, tl.where(x == float("inf"), x, digamma)  # `log` knows no infinity


@triton.jit
def lgamma(x):
    """log Gamma(x), as in `lgamma_and_digamma`; log(n!) is that of n + 1."""
    value, _ = lgamma_and_digamma(x)
    return value


@triton.jit
def digamma(x):
    """The derivative of log Gamma at x, as in `lgamma_and_digamma`."""
    _, value = lgamma_and_digamma(x)
    return value


@triton.jit
def log_gamma_ratio(a, n):
    """log(Gamma(a + n) / Gamma(a)), digamma(a + n) - digamma(a) and digamma(a + n) for a > 0 and n >= 0; NaN elsewhere.

    Every term of the first two is proportional to n where n is small, none is a difference of larger numbers: the errors are
    roundings of the result, however small n is beside a, and none where n is 0. Only where log Gamma falls and rises again
    between a and a + n are they, for the first, roundings of the fall, log(1 + n/a). Made for 1e-8 <= a <= 1e8 and n <= 1e8.
    """
    a = tl.where((a > 0.0) & (n >= 0.0), a, float("nan"))
    if a.dtype == tl.float64:
        # Ten steps up, in pairs as above. Of the products from a and from a + n: their difference, the latter's derivative,
        # and how much the sum of the pairs' reciprocals falls, over the common denominator; all of positive terms.
        low = a < 10.0
        start, rise = tl.where(low, a, 1.0), tl.where(low, n, 0.0)
        end = start + rise
        pair, end_pair, pair_rise = start * (start + 9.0), end * (end + 9.0), rise * (start + end + 9.0)
        product, end_product = pair, end_pair
        difference, fall, derivative = pair_rise, pair_rise, pair * 0.0 + 1.0
        for i in tl.static_range(1, 5):
            fall = fall * ((pair + i * (9 - i)) * (end_pair + i * (9 - i))) + pair_rise * (product * end_product)
            difference = difference * (end_pair + i * (9 - i)) + product * pair_rise
            derivative = derivative * (end_pair + i * (9 - i)) + end_product
            product = product * (pair + i * (9 - i))
            end_product = end_product * (end_pair + i * (9 - i))
        inverse = 1.0 / (product * end_product)
        step_log = log_one_plus(difference * (end_product * inverse), product * (product * inverse))
        step_fall = ((2.0 * start + 9.0) * fall - 2.0 * rise * (derivative * product)) * inverse
        step_end = tl.where(low, (2.0 * end + 9.0) * derivative * (product * inverse), 0.0)
        a = tl.where(low, a + 10.0, a)
    else:
        # One step up, after which the fits hold. A longer one would cancel more of the leading terms.
        step_end = 1.0 / (a + n)
        quotient = n / a
        step_log = log_one_plus(quotient, a * step_end)
        step_fall = quotient * step_end
        a = a + 1.0
    b = a + n
    u, w = 1.0 / a, 1.0 / b
    quotient = n * u
    log_b, log_quotient = log_of_positive(tl.maximum(b, 1.0)), log_one_plus(quotient, a * w)
    if a.dtype == tl.float64:
        _, r = polynomial_and_slope(
            w, u, (1 / 156, 0.0, -691 / 360360, 0.0, 1 / 1188, 0.0, -1 / 1680, 0.0, 1 / 1260, 0.0, -1 / 360, 0.0, 1 / 12)
        )
        s_b, s = polynomial_and_slope(
            w, u, (1 / 12, 0.0, -691 / 32760, 0.0, 1 / 132, 0.0, -1 / 240, 0.0, 1 / 252, 0.0, -1 / 120, 0.0, 1 / 12, 0.5)
        )
    else:
        # The first is the integral of the second, so that the one result is the other's derivative.
        _, r = polynomial_and_slope(
            w, u,
            (0.00059369724317517584 / 7, -0.0025540863956764276 / 6, 0.0036078251299803805 / 5, 0.00086350995886548188 / 4,
             -0.0086852620121034721 / 3, 6.0338266159070335e-5 / 2, 0.083329647170729325),
        )  # fmt: skip
        s_b, s = polynomial_and_slope(
            w, u,
            (0.00059369724317517584, -0.0025540863956764276, 0.0036078251299803805, 0.00086350995886548188,
             -0.0086852620121034721, 6.0338266159070335e-5, 0.083329647170729325, 0.5),
        )  # fmt: skip
    difference = quotient * w  # u - w
    ratio = n * (log_b - 1.0) + ((a - 0.5) * log_quotient - difference * r) - step_log
    increase = log_quotient + difference * s + step_fall
    digamma = log_b - s_b - step_end
    return ratio, increase, tl.where(b == float("inf"), b, digamma)
