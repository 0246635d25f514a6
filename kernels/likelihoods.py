"""One device function per likelihood, found by name.

`(first, second, third, target, constant) -> (negative log-likelihood, its derivatives by first, second and third)`: tiles of
the accumulation dtype, or scalars, and nothing of memory. A parameter that a likelihood does not have it does not read, and
what it returns in its place means nothing. Those with a scale get its logarithm as `second` and its reciprocal as `third`, and
return the derivative by the logarithm. The formulas in Torch are in `fastelbo/plain.py` and `fastelbo/likelihoods.py`.
"""

import triton
import triton.language as tl

from .gamma import lgamma_and_digamma, log_gamma_ratio
from .numerics import exp_and_expm1, exp_and_softplus, log, log1p


@triton.jit
def bernoulli(probability, second, third, target, constant):
    log_p = tl.maximum(log(probability), -100.0)
    log_q = tl.maximum(log1p(-probability), -100.0)
    nll = -(target * log_p + (1.0 - target) * log_q)
    nll = tl.where((probability >= 0.0) & (probability <= 1.0), nll, float("nan"))  # for NaN too
    # 1e-12 in float32, which Torch clamps by in every dtype.
    slope = (probability - target) / tl.maximum((1.0 - probability) * probability, 9.999999960041972e-13)
    return nll, slope, second, third


@triton.jit
def bernoulli_logits(logit, second, third, target, constant):
    e, softplus = exp_and_softplus(-tl.abs(logit))
    q = e / (1.0 + e)  # sigmoid(-|logit|)
    positive = logit >= 0.0
    rest = 1.0 - target
    nll = tl.where(positive, rest, -target) * logit + softplus
    return nll, tl.where(positive, rest - q, q - target), second, third


@triton.jit
def bernoulli_logits_weighted(logit, pos_weight, third, target, constant):
    of_negative, p = softplus_and_sigmoid(logit)
    of_positive, q = softplus_and_sigmoid(-logit)
    rest, positive = 1.0 - target, target * of_positive
    return rest * of_negative + pos_weight * positive, rest * p - pos_weight * target * q, positive, third


@triton.jit
def mse(prediction, second, third, target, constant):
    d = prediction - target
    return d * d, 2.0 * d, second, third


@triton.jit
def l1(prediction, second, third, target, constant):
    d = prediction - target
    return tl.abs(d), sign(d), second, third


@triton.jit
def gaussian(mean, log_scale, inverse, target, constant):
    d = (mean - target) * inverse
    square = d * d
    return 0.5 * square + (log_scale + 0.9189385332046727), d * inverse, 1.0 - square, inverse  # log(2 pi) / 2


@triton.jit
def fixed_gaussian(mean, log_scale, inverse, target, scale):
    """`gaussian` with fewer roundings, where the scale is one number."""
    d = mean - target
    gradient = d * (1.0 / (scale * scale))
    return 0.5 * (gradient * d) + (log_scale + 0.9189385332046727), gradient, log_scale, inverse


@triton.jit
def laplace(mean, log_scale, inverse, target, constant):
    d = (mean - target) * inverse
    distance = tl.abs(d)
    return distance + (log_scale + 0.6931471805599453), sign(d) * inverse, 1.0 - distance, inverse


@triton.jit
def poisson(rate, second, third, target, constant):
    none = target == 0.0
    at_zero = tl.where(rate == 0.0, tl.where(none, 0.0, float("-inf")), float("nan"))
    nll = rate - tl.where(rate > 0.0, target * log(rate), at_zero) + log_factorial(target)
    return nll, 1.0 - target / tl.where(none, 1.0, rate), second, third


@triton.jit
def poisson_log(log_rate, second, third, target, constant):
    rate, _ = exp_and_expm1(log_rate)
    return rate - target * log_rate + log_factorial(target), rate - target, second, third


@triton.jit
def continuous_bernoulli_logits(logit, second, third, target, constant):
    nll, slope, _, _ = bernoulli_logits(logit, second, third, target, constant)
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
    beyond = log(far) + softplus - log1p(-e)
    inverse_sinh = 2.0 * e / (1.0 - e * e)
    steep = 1.0 / far - inverse_sinh
    nll -= tl.where(small, near + 0.6931471805599453, beyond)
    return nll, slope - tl.where(small, rise, tl.where(logit > 0.0, steep, -steep)), second, third


@triton.jit
def continuous_bernoulli(probability, second, third, target, constant):
    if probability.dtype == tl.float64:
        eps: tl.constexpr = 2.220446049250313e-16
    else:
        eps: tl.constexpr = 1.1920928955078125e-07
    p = tl.minimum(tl.maximum(probability, eps), 1.0 - eps)
    nll, slope, _, _ = continuous_bernoulli_logits(log(p) - log1p(-p), second, third, target, constant)
    nll = tl.where((probability >= 0.0) & (probability <= 1.0), nll, float("nan"))
    return nll, tl.where(p == probability, slope / (p * (1.0 - p)), 0.0), second, third


@triton.jit
def discretized_logistic(mean, log_scale, inverse, target, half):
    """`half` is half of a bin; with a the upper and b the lower end of the target's bin, in scales from the mean,
    P = sigmoid(a) sigmoid(-b) (1 - exp(b - a))."""
    a = (target - mean + half) * inverse
    b = (target - mean - half) * inverse
    width = 2.0 * half * inverse
    highest, lowest = target > 1.0 - half, target < half - 1.0
    above, q_a = softplus_and_sigmoid(-a)
    below, q_b = softplus_and_sigmoid(b)
    above, q_a = tl.where(highest, 0.0, above), tl.where(highest, 0.0, q_a)
    below, q_b = tl.where(lowest, 0.0, below), tl.where(lowest, 0.0, q_b)
    e, expm1 = exp_and_expm1(-width)
    at_end = highest | lowest
    nll = above + below - tl.where(at_end, 0.0, log(-expm1))
    nll = tl.where(tl.abs(target) > 1.0 + half, float("nan"), nll)
    to_scale = q_a * a - q_b * b - tl.where(at_end, 0.0, width * e / expm1)
    return nll, (q_a - q_b) * inverse, to_scale, inverse


@triton.jit
def negative_binomial(mean, theta, third, target, constant):
    nll, to_mean, to_theta, _, _, _ = counts(mean, theta, target)
    return nll, to_mean, to_theta, third


@triton.jit
def zero_inflated_negative_binomial(mean, theta, logit, target, constant):
    nll, to_mean, to_theta, zeros, zeros_to_mean, zeros_to_theta = counts(mean, theta, target)
    extra, share = softplus_and_sigmoid(logit)
    # log p(0) = log(1 - q), q = sigmoid(-logit) (1 - exp(-zeros)); where q is near 1, as a difference.
    _, expm1 = exp_and_expm1(-zeros)
    q = -(1.0 - share) * expm1
    softplus, rest = softplus_and_sigmoid(-logit)
    softplus_zeros, rest_zeros = softplus_and_sigmoid(-logit - zeros)
    is_zero = (target < 1e-8) & (target >= 0.0)
    nll_zero = tl.where(q < 0.5, -log1p(-tl.where(q < 0.5, q, 0.0)), softplus - softplus_zeros)
    return (
        tl.where(is_zero, nll_zero, extra + nll),
        tl.where(is_zero, rest_zeros * zeros_to_mean, to_mean),
        tl.where(is_zero, rest_zeros * zeros_to_theta, to_theta),
        tl.where(is_zero, rest_zeros - rest, share),
    )


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
    """log(1 + x) for x >= 0."""
    u = 1.0 + x
    return log(u) + (x - (u - 1.0)) / u


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its derivative."""
    e, softplus = exp_and_softplus(-tl.abs(x))
    q = 1.0 / (1.0 + e)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + softplus, tl.where(x >= 0.0, q, e * q)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))  # 0 and NaN as they are
