"""One device function per likelihood, found by name.

`(first, second, third, target, constant, upstream) -> (negative log-likelihood, upstream times its derivative by first, its
derivatives by second and third)`: tiles of the accumulation dtype, or scalars, and nothing of memory. The upstream factor comes
before a division that may overflow, as that by a rate of 1e-39. A parameter that a likelihood does not have it does not read,
and what it returns in its place means nothing. Those with a scale get its logarithm as `second` and its reciprocal as `third`,
and return the derivative by the logarithm. The formulas in Torch are in `fastelbo/likelihoods/`.

Those with `_at_zero` are the same for a target of 0, which they do not read.

One from elsewhere is found by the name "module:function".
"""

import importlib

import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

from .gamma import lgamma_and_digamma, log_gamma_ratio
from .numerics import exp_and_expm1, exp_and_softplus, exp_below, log, log1p, log_of_positive


def __getattr__(name: str):
    module, colon, function = name.partition(":")
    if not colon:
        raise AttributeError(f"kernel must be a device function of {__name__} or 'module:function', got {name!r}")
    found = getattr(importlib.import_module(module), function, None)
    if not isinstance(found, KernelInterface):
        raise TypeError(f"kernel {name!r} must be a function with triton.jit, got {found!r}")
    return found


@triton.jit
def bernoulli(probability, second, third, target, constant, upstream):
    log_p = tl.maximum(log_of_positive(probability), -100.0)
    log_q = tl.maximum(log1p(-probability), -100.0)
    nll = -(target * log_p + (1.0 - target) * log_q)
    nll = tl.where((probability >= 0.0) & (probability <= 1.0), nll, float("nan"))  # for NaN too
    # 1e-12 in float32, which Torch clamps by in every dtype.
    slope = (probability - target) / tl.maximum((1.0 - probability) * probability, 9.999999960041972e-13)
    return nll, slope * upstream, second, third


@triton.jit
def bernoulli_logits(logit, second, third, target, constant, upstream):
    e, softplus = exp_and_softplus(-tl.abs(logit))
    q = e / (1.0 + e)  # sigmoid(-|logit|)
    positive = logit >= 0.0
    rest = 1.0 - target
    nll = tl.where(positive, rest, -target) * logit + softplus
    return nll, tl.where(positive, rest - q, q - target) * upstream, second, third


@triton.jit
def bernoulli_logits_weighted(logit, pos_weight, third, target, constant, upstream):
    of_negative, p = softplus_and_sigmoid(logit)
    of_positive, q = softplus_and_sigmoid(-logit)
    rest, positive = 1.0 - target, target * of_positive
    slope = rest * p - pos_weight * target * q
    return rest * of_negative + pos_weight * positive, slope * upstream, positive, third


@triton.jit
def bernoulli_logits_at_zero(logit, pos_weight, third, target, constant, upstream):
    softplus, p = softplus_and_sigmoid(logit)
    return softplus, p * upstream, tl.zeros_like(logit), third


@triton.jit
def mse(prediction, second, third, target, constant, upstream):
    d = prediction - target
    return d * d, 2.0 * d * upstream, second, third


@triton.jit
def l1(prediction, second, third, target, constant, upstream):
    d = prediction - target
    return tl.abs(d), sign(d) * upstream, second, third


@triton.jit
def gaussian(mean, log_scale, inverse, target, constant, upstream):
    d = (mean - target) * inverse
    square = d * d
    return 0.5 * square + (log_scale + 0.9189385332046727), d * (upstream * inverse), 1.0 - square, inverse  # log(2 pi) / 2


@triton.jit
def fixed_gaussian(mean, log_scale, inverse, target, scale, upstream):
    """`gaussian` with fewer roundings, where the scale is one number."""
    d = mean - target
    gradient = d * (1.0 / (scale * scale))
    return 0.5 * (gradient * d) + (log_scale + 0.9189385332046727), gradient * upstream, log_scale, inverse


@triton.jit
def laplace(mean, log_scale, inverse, target, constant, upstream):
    d = (mean - target) * inverse
    distance = tl.abs(d)
    return distance + (log_scale + 0.6931471805599453), sign(d) * (upstream * inverse), 1.0 - distance, inverse


@triton.jit
def student_t(mean, log_scale, inverse, target, df, upstream):
    d = (mean - target) * inverse
    q = d * (d / df)
    share = 1.0 / (1.0 + q)
    half, _, _ = log_gamma_ratio(0.5 * df, 0.0 * df + 0.5)
    nll = 0.5 * (df + 1.0) * log1p_positive(q) + (log_scale + (0.5 * log(3.141592653589793 * df) - half))
    # What q is of 1 + q, without a difference where it is small.
    beyond = tl.where(q < 1.0, q * share, 1.0 - share)
    return nll, ((df + 1.0) / df) * (d * share) * (upstream * inverse), 1.0 - (df + 1.0) * beyond, inverse


@triton.jit
def poisson(rate, second, third, target, constant, upstream):
    divisor = tl.where((target == 0.0) & (rate == 0.0), 1.0, rate)  # 0 log 0 is 0, and so is 0 / 0
    slope = upstream - upstream * target / divisor
    return rate - target * log(divisor) + log_factorial(target), slope, second, third


@triton.jit
def poisson_at_zero(rate, second, third, target, constant, upstream):
    valid = rate >= 0.0
    return tl.where(valid, rate, float("nan")), tl.where(valid, upstream, float("nan")), second, third


@triton.jit
def poisson_log_at_zero(log_rate, second, third, target, constant, upstream):
    rate, _ = exp_and_expm1(log_rate)
    return rate, rate * upstream, second, third


@triton.jit
def poisson_log(log_rate, second, third, target, constant, upstream):
    rate, _ = exp_and_expm1(log_rate)
    return rate - target * log_rate + log_factorial(target), (rate - target) * upstream, second, third


@triton.jit
def poisson_of_both(rate, log_rate, third, target, constant, upstream):
    """Of a rate and its logarithm, which is right where the rate is not."""
    zero = target == 0.0
    slope = upstream - upstream * target / tl.where(zero, 1.0, rate)
    return rate - tl.where(zero, 0.0, target * log_rate) + log_factorial(target), slope, log_rate, third


@triton.jit
def poisson_softplus(given, second, third, target, constant, upstream):
    """Of the rate log(1 + exp(given))."""
    rate, slope = softplus_and_sigmoid(given)
    # Where it is exp(given) to the last digit, its logarithm needs none, and has one where it underflows.
    low = given < -40.0
    log_rate = tl.where(low, given, log_of_positive(rate))
    to_log_rate = slope - target * tl.where(low, 1.0, slope / rate)
    nll = rate - tl.where(target == 0.0, 0.0, target * log_rate) + log_factorial(target)
    return nll, to_log_rate * upstream, second, third


@triton.jit
def poisson_softplus_at_zero(given, second, third, target, constant, upstream):
    rate, slope = softplus_and_sigmoid(given)
    return rate, slope * upstream, second, third


@triton.jit
def continuous_bernoulli_logits(logit, second, third, target, constant, upstream):
    nll, slope, _, _ = bernoulli_logits(logit, second, third, target, constant, 1.0)
    # The normalizer's logarithm, log(l / tanh(l / 2)), which is even, and its derivative 1 / l - 1 / sinh(l).
    square = logit * logit
    if logit.dtype == tl.float64:
        small = square < 0.01
    else:
        small = square < 0.25
    s = tl.where(small, square, 0.0)
    near = s * (1 / 12 + s * (-7 / 1440 + s * (31 / 90720 + s * (-127 / 4838400 + s * (73 / 34214400)))))
    rise = logit * (1 / 6 + s * (-7 / 360 + s * (31 / 15120 + s * (-127 / 604800 + s * (73 / 3421440)))))
    far = tl.where(small, 1.0, tl.abs(logit))
    e, softplus = exp_and_softplus(-far)
    # An infinite logit makes `nll` infinite or NaN, whatever its logarithm.
    beyond = log_of_positive(far) + softplus - log1p(-e)
    inverse_sinh = 2.0 * e / (1.0 - e * e)
    steep = 1.0 / far - inverse_sinh
    nll -= tl.where(small, near + 0.6931471805599453, beyond)
    return nll, (slope - tl.where(small, rise, tl.where(logit > 0.0, steep, -steep))) * upstream, second, third


@triton.jit
def continuous_bernoulli(probability, second, third, target, constant, upstream):
    if probability.dtype == tl.float64:
        eps: tl.constexpr = 2.220446049250313e-16
    else:
        eps: tl.constexpr = 1.1920928955078125e-07
    p = tl.minimum(tl.maximum(probability, eps), 1.0 - eps)
    nll, slope, _, _ = continuous_bernoulli_logits(log_of_positive(p) - log1p(-p), second, third, target, constant, upstream)
    slope = tl.where(p == probability, slope / (p * (1.0 - p)), 0.0)
    valid = (probability >= 0.0) & (probability <= 1.0)  # NaN is not
    return tl.where(valid, nll, float("nan")), tl.where(valid, slope, float("nan")), second, third


@triton.jit
def discretized_logistic(mean, log_scale, inverse, target, half, upstream):
    """`half` is half of a bin."""
    log_p, slope, to_scale = log_bin(target - mean, log_scale, inverse, target < half - 1.0, target > 1.0 - half, half)
    nll = tl.where(tl.abs(target) > 1.0 + half, float("nan"), -log_p)
    return nll, -slope * (upstream * inverse), -to_scale, inverse


@triton.jit
def log_bin(distance, log_scale, inverse, lowest, highest, half):
    """What a logistic distribution holds of a bin: its logarithm, the derivative of that by the mean, times the scale, and by
    the log scale. `distance`: of the bin's centre from the mean; `half`: half of its width.

    With a and b the upper and lower end of the bin, in scales from the mean, a bin other than the lowest and highest holds

        P = sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))

    whose logarithm is a sum of negative terms: nothing cancels, however little the bin holds. They are taken as one, of
    u = (1 - exp(b - a)) / ((1 + exp(-|a|)) (1 + exp(-|b|))).
    """
    # So wide a scale only makes the bin's share less, by which a and b are 0 to all digits: nothing need underflow.
    beyond = tl.maximum(log_scale - 60.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.maximum(inverse, 8.756510762696521e-27, propagate_nan=tl.PropagateNan.ALL)  # exp(-60)
    at_end = lowest | highest
    # An end at infinity is one at which exponentials and their products are 0.
    a = tl.where(highest, 1e4, (distance + half) * inverse)
    b = tl.where(lowest, -1e4, (distance - half) * inverse)
    width = tl.where(at_end, 1e4, 2.0 * half * inverse)
    e_a = exp_below(-tl.abs(a))
    e_b = exp_below(-tl.abs(b))
    e, expm1 = exp_and_expm1(-width)
    share = 1.0 / ((1.0 + e_a) * (1.0 + e_b))
    q_a = tl.where(a >= 0.0, e_a, 1.0) * ((1.0 + e_b) * share)  # sigmoid(-a)
    q_b = tl.where(b >= 0.0, 1.0, e_b) * ((1.0 + e_a) * share)  # sigmoid(b)
    rest = (e + e_a + e_b + e_a * e_b) * share  # 1 - u
    full = rest < 0.5
    u = tl.where(full, 1.0 - rest, -expm1 * share)
    log_u = log_of_positive(u) + tl.where(full, (1.0 - u) - rest, 0.0)  # what 1 - rest rounds away
    a_or_0 = tl.minimum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_or_0 = tl.maximum(b, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return (
        (log_u + (a_or_0 - b_or_0)) - tl.where(at_end, 0.0, beyond),
        q_b - q_a,
        (q_b * b - q_a * a) + width * e / expm1,
    )


@triton.jit
def negative_binomial(mean, theta, third, target, constant, upstream):
    nll, to_mean, to_theta, _, _, _ = counts(mean, theta, target)
    return nll, to_mean * upstream, to_theta, third


@triton.jit
def negative_binomial_at_zero(mean, theta, third, target, constant, upstream):
    zeros, to_mean, to_theta = no_counts(mean, theta)
    return zeros, to_mean * upstream, to_theta, third


@triton.jit
def zero_inflated_negative_binomial(mean, theta, logit, target, constant, upstream):
    nll, to_mean, to_theta, zeros, zeros_to_mean, zeros_to_theta = counts(mean, theta, target)
    extra, share = softplus_and_sigmoid(logit)
    nll_zero, rest_zeros, rest = extra_zeros(zeros, logit, share)
    is_zero = (target < 1e-8) & (target >= 0.0)
    return (
        tl.where(is_zero, nll_zero, extra + nll),
        tl.where(is_zero, rest_zeros * zeros_to_mean, to_mean) * upstream,
        tl.where(is_zero, rest_zeros * zeros_to_theta, to_theta),
        tl.where(is_zero, rest_zeros - rest, share),
    )


@triton.jit
def zero_inflated_negative_binomial_at_zero(mean, theta, logit, target, constant, upstream):
    zeros, to_mean, to_theta = no_counts(mean, theta)
    _, share = softplus_and_sigmoid(logit)
    nll, rest_zeros, rest = extra_zeros(zeros, logit, share)
    return nll, rest_zeros * to_mean * upstream, rest_zeros * to_theta, rest_zeros - rest


@triton.jit
def extra_zeros(zeros, logit, share):
    """-log p(0) with this share of extra zeros, which is the sigmoid of `logit`, from that without; its derivative by that; and
    what is to be taken from this for the derivative by the logit."""
    # log p(0) = log(1 - q), q = sigmoid(-logit) (1 - exp(-zeros)); where q is near 1, as a difference.
    _, expm1 = exp_and_expm1(-zeros)
    q = -(1.0 - share) * expm1
    softplus, rest = softplus_and_sigmoid(-logit)
    softplus_zeros, rest_zeros = softplus_and_sigmoid(-logit - zeros)
    nll = tl.where(q < 0.5, -log1p(-tl.where(q < 0.5, q, 0.0)), softplus - softplus_zeros)
    return nll, rest_zeros, rest


@triton.jit
def no_counts(mean, theta):
    """A negative binomial's -log p(0), before its derivatives by mean and inverse dispersion: those of `counts`, alone."""
    share = mean / (theta + 1e-8)
    log_share = log1p_positive(share)
    to_mean = theta / (theta + mean + 1e-8)
    zeros = tl.where((mean >= 0.0) & (theta > 0.0), theta * log_share, float("nan"))
    return zeros, to_mean, log_share - to_mean * share


@triton.jit
def counts(mean, theta, target):
    """A negative binomial's -log p(target) and -log p(0), each before its derivatives by mean and inverse dispersion."""
    total = theta + mean + 1e-8
    share = mean / (theta + 1e-8)
    log_share = log1p_positive(share)
    zeros = theta * log_share
    zeros_to_mean = theta / total
    zeros_to_theta = log_share - zeros_to_mean * share
    ratio, ratio_to_theta, _ = log_gamma_ratio(theta, target)
    odds = theta / (mean + 1e-8)
    nll = zeros + (log_factorial(target) - ratio + target * log1p_positive(odds))
    valid = (mean >= 0.0) & (theta > 0.0)
    nll, zeros = tl.where(valid, nll, float("nan")), tl.where(valid, zeros, float("nan"))
    to_mean = odds * ((mean + 1e-8) - target) / total
    return nll, to_mean, zeros_to_theta + target / total - ratio_to_theta, zeros, zeros_to_mean, zeros_to_theta


@triton.jit
def log_factorial(n):
    value, _ = lgamma_and_digamma(n + 1.0)
    return tl.where(n >= 0.0, value, float("nan"))


@triton.jit
def log1p_positive(x):
    """log(1 + x) for x >= 0; NaN for infinity."""
    u = 1.0 + x
    return log_of_positive(u) + (x - (u - 1.0)) / u


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its derivative."""
    e, softplus = exp_and_softplus(-tl.abs(x))
    q = 1.0 / (1.0 + e)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + softplus, tl.where(x >= 0.0, q, e * q)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))  # 0 and NaN as they are
