"""Posteriors and priors on the device, found by name; their plain Torch twins are in `fastelbo/latents/gaussian.py`.

A posterior, from the encoder's second output: `(sigma, d sigma, logvar, excess, d)`. `excess` is sigma^2 - 1, without
cancellation. `d sigma` is the derivative of sigma by that output, and `d` half that of logvar: the KL's from N(0, 1) is
`d * excess`, and from any other prior `d * (variance ratio - 1)`.
"""

import triton
import triton.language as tl

from .numerics import exp_and_expm1, log


@triton.jit
def positive_inverse(x):
    """1 / x, inf for 0 and NaN for what is below or is NaN."""
    return tl.where(x > 0.0, 1.0 / tl.where(x > 0.0, x, 1.0), tl.where(x == 0.0, float("inf"), float("nan")))


@triton.jit
def logvar(raw):
    std, q = exp_and_expm1(0.5 * raw)
    return std, 0.5 * std, raw, q * (q + 2.0), 0.5


@triton.jit
def log_std(raw):
    std, q = exp_and_expm1(raw)
    return std, std, 2.0 * raw, q * (q + 2.0), 1.0


@triton.jit
def std(raw):
    raw = tl.where(raw < 0.0, float("nan"), raw)
    return raw, 1.0, 2.0 * log(raw), (raw - 1.0) * (raw + 1.0), positive_inverse(raw)


@triton.jit
def var(raw):
    std = tl.sqrt(tl.where(raw < 0.0, float("nan"), raw))
    return std, 0.5 * positive_inverse(std), log(raw), raw - 1.0, 0.5 * positive_inverse(raw)


@triton.jit
def log_ratio(ratio, beyond):
    """The logarithm of a ratio; `beyond`, formed from a difference, is what the ratio is more than 1.

    Where the two numbers are nearly alike, `beyond` has digits that the rounded ratio has lost, and what its own rounding does
    to the two terms of the KL cancels.
    """
    near = tl.abs(beyond) < 0.5
    u = tl.where(near, 1.0 + beyond, ratio)
    return log(u) + tl.where(near, beyond - (u - 1.0), 0.0)


# A prior, from its second parameter, the posterior's sigma and logvar, and the output that these are of, `given`:
# `(1 / sigma, d, delta, excess)`: `delta` is the logarithm of the ratio of the variances, `excess` that ratio - 1, and `d` half
# the derivative of the prior's logvar.


@triton.jit
def logvar_prior(raw, std, logvar, given):
    inverse, _ = exp_and_expm1(-0.5 * raw)
    delta = logvar - raw
    _, excess = exp_and_expm1(delta)
    return inverse, 0.5, delta, excess


@triton.jit
def log_std_prior(raw, std, logvar, given):
    inverse, _ = exp_and_expm1(-raw)
    delta = logvar - 2.0 * raw
    _, excess = exp_and_expm1(delta)
    return inverse, 1.0, delta, excess


@triton.jit
def std_prior(raw, std, logvar, given):
    inverse = positive_inverse(raw)
    delta = logvar - 2.0 * log(raw)
    _, excess = exp_and_expm1(delta)
    return inverse, inverse, delta, excess


@triton.jit
def std_of_std_prior(raw, std, logvar, given):
    inverse = positive_inverse(raw)
    beyond = (std - raw) * inverse
    return inverse, inverse, 2.0 * log_ratio(std * inverse, beyond), beyond * (beyond + 2.0)


@triton.jit
def var_prior(raw, std, logvar, given):
    d = positive_inverse(raw)
    delta = logvar - log(raw)
    _, excess = exp_and_expm1(delta)
    return tl.sqrt(d), 0.5 * d, delta, excess


@triton.jit
def var_of_var_prior(raw, std, logvar, given):
    """Of the variances, since roots would each have a rounding of their own."""
    d = positive_inverse(raw)
    variance = tl.where(given < 0.0, float("nan"), given)
    beyond = (variance - raw) * d
    return tl.sqrt(d), 0.5 * d, log_ratio(variance * d, beyond), beyond
