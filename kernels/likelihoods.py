"""One device function per likelihood: `(prediction, target, scale) -> (negative log-likelihood, gradient)`.

They are found by name (see `fastelbo.likelihoods`), take and return tiles of the accumulation dtype, and know nothing
of memory. `scale` is a scalar that only some of them read. Their plain Torch twins are in `fastelbo/likelihoods.py`.
"""

import triton
import triton.language as tl

from .numerics import exp_and_softplus, log, log1p


@triton.jit
def bernoulli(probability, target, scale):
    log_p = tl.maximum(log(probability), -100.0)
    log_q = tl.maximum(log1p(-probability), -100.0)
    nll = -(target * log_p + (1.0 - target) * log_q)
    nll = tl.where((probability >= 0.0) & (probability <= 1.0), nll, float("nan"))  # for NaN too
    # 1e-12 in float32, which Torch clamps by in every dtype.
    return nll, (probability - target) / tl.maximum((1.0 - probability) * probability, 9.999999960041972e-13)


@triton.jit
def bernoulli_logits(logit, target, scale):
    e, softplus = exp_and_softplus(-tl.abs(logit))
    q = e / (1.0 + e)  # sigmoid(-|logit|)
    positive = logit >= 0.0
    rest = 1.0 - target
    nll = tl.where(positive, rest, -target) * logit + softplus
    return nll, tl.where(positive, rest - q, q - target)


@triton.jit
def mse(prediction, target, scale):
    d = prediction - target
    return d * d, 2.0 * d


@triton.jit
def gaussian(mean, target, scale):
    d = mean - target
    gradient = d * (1.0 / (scale * scale))
    return 0.5 * (gradient * d) + (tl.log(scale) + 0.9189385332046727), gradient  # log(2 pi) / 2
