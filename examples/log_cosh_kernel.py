"""The second step of a likelihood of one's own, `LogCosh`: the device function by which fastelbo's kernels compute it."""

import triton
import triton.language as tl

from fastelbo.kernels.numerics import exp_and_expm1, log, log1p


@triton.jit
def log_cosh(mean, second, third, target, scale, upstream):
    """`LogCosh.nll`, and `upstream` times its derivative by the mean; `second` and `third` are not there."""
    distance = (mean - target) / scale
    e, expm1 = exp_and_expm1(-2.0 * tl.abs(distance))
    tanh = tl.where(distance < 0.0, expm1, -expm1) / (1.0 + e)
    nll = (tl.abs(distance) + log1p(e)) + (log(scale) + 0.4515827052894548)  # log(pi / 2)
    return nll, upstream * (tanh / scale), second, third
