"""Links: how a parameter becomes what a likelihood's device function takes, so that what it becomes is never in memory.

`(given, soft_min) -> (value, beside, derivative)`: what the function takes in the parameter's place; what it takes in the place
of the next one, where there is no tensor for that; and the derivative of the value by what was given. Tiles of the accumulation
dtype, or scalars.
"""

import triton
import triton.language as tl

from .likelihoods import softplus_and_sigmoid
from .numerics import exp_and_expm1, exp_below, log, log_of_positive


@triton.jit
def from_log(given, soft_min):
    value, _ = exp_and_expm1(given)
    return value, given, value


@triton.jit
def from_softplus(given, soft_min):
    value, derivative = softplus_and_sigmoid(given)
    return value, value, derivative


@triton.jit
def from_scale(scale, soft_min):
    """Logarithm and reciprocal of a scale; the logarithm may have a soft lower bound."""
    scale = tl.where(scale > 0.0, scale, float("nan"))
    # `log`, less what it does for numbers that are not positive.
    log_scale = tl.where(scale < float("inf"), log_of_positive(scale), scale)
    if soft_min is None:
        return log_scale, 1.0 / scale, 1.0 / scale
    else:
        log_scale, inverse, slope = from_log_scale(log_scale, soft_min)
        return log_scale, inverse, slope / scale


@triton.jit
def from_log_scale(log_scale, soft_min):
    if soft_min is None:
        inverse, _ = exp_and_expm1(-log_scale)
        return log_scale, inverse, tl.full([], 1.0, log_scale.dtype)
    else:
        softplus, sigmoid = softplus_and_sigmoid(log_scale - soft_min)
        bounded = softplus + soft_min
        inverse, _ = exp_and_expm1(-bounded)
        return bounded, inverse, sigmoid


@triton.jit
def from_logvar(logvar, soft_min):
    log_scale, inverse, slope = from_log_scale(0.5 * logvar, soft_min)
    return log_scale, inverse, 0.5 * slope


@triton.jit
def of_softmax(of_rows, row, programs, HAS_SLOPE: tl.constexpr, DTYPE: tl.constexpr):
    """What `from_softmax` takes of a row, of the numbers that `softmax.py` describes; and the derivative of the sum by its
    library, if it is known."""
    rows = tl.num_programs(0) // programs
    inverse, library = tl.load(of_rows + rows + row), tl.load(of_rows + 2 * rows + row)
    slope = library
    if HAS_SLOPE:
        slope = tl.load(of_rows + 3 * rows + row)
    log_library = log((library * inverse).to(DTYPE))
    return tl.load(of_rows + row).to(DTYPE), inverse.to(DTYPE), library.to(DTYPE), log_library, slope.to(DTYPE)


@triton.jit
def from_softmax(logit, top, inverse, library, log_library):
    """The mean, its logarithm, and its share of the library.

    A share that would underflow, by which a Poisson's count is divided, is kept from it: its mean is nothing beside the others,
    and its logarithm is right.
    """
    if logit.dtype == tl.float64:
        least: tl.constexpr = 1e-290
    else:
        least: tl.constexpr = 1e-25
    below = logit - top
    share = tl.maximum(exp_below(below) * inverse, least, propagate_nan=tl.PropagateNan.ALL)
    return library * share, below + log_library, share


# What a parameter is, or None where it is what the function takes. A softmax needs its row: `from_softmax`.
LINKS = {
    None: None, "log": from_log, "softplus": from_softplus, "softmax": None, "scale": from_scale, "log_scale": from_log_scale,
    "logvar": from_logvar,
}  # fmt: skip
