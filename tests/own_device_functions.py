"""Device functions as users write them, in a module of theirs."""

import triton
import triton.language as tl


@triton.jit
def quartic(mean, second, third, target, constant, upstream):
    d = mean - target
    return d * d * d * d, upstream * (4.0 * d * d * d), second, third


@triton.jit
def precise_quartic(mean, precision, third, target, constant, upstream):
    d = mean - target
    power = d * d * d * d
    to_precision = power - 0.25 / precision
    return precision * power - 0.25 * tl.log(precision), upstream * (4.0 * precision * d * d * d), to_precision, third


not_jitted = len
