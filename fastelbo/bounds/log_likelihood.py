"""The log-likelihood of data, estimated by importance sampling."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..basics.arguments import check_count
from ..basics.tracing import is_traced
from ..engine.call import Objective
from ..latents.posterior import Posterior
from ..likelihoods import Likelihood
from .records import IWAE
from .replay import autocast_without_cache
from .samples import decoded, drawn, prepared, sample, score


class LogLikelihood(NamedTuple):
    """An estimate of log p(x) in nats, and its standard error, `[B]` each."""

    log_p: Tensor
    standard_error: Tensor


@torch.no_grad()
def log_likelihood(
    decoder: Callable[[Tensor], Tensor | tuple[Tensor | float, ...] | Distribution],
    x: Tensor,
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    *,
    likelihood: str | Likelihood | None = None,
    posterior: str | Posterior = "logvar",
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    weight: Tensor | None = None,
    n_samples: int = 5000,
    chunk: int = 10,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LogLikelihood:
    """log p(x) by importance sampling: the logarithm of the mean of `p(x | z) p(z) / q(z | x)` over samples z of q(z | x).

    It is for evaluation, as in Rezende et al. (Stochastic Backpropagation and Approximate Inference in Deep Generative Models,
    2014), and in Burda et al. (Importance Weighted Autoencoders, 2016), with 5,000 samples. The estimate is the latter's bound,
    whose expectation rises to log p(x) with `n_samples`. Nothing is differentiated, and one chunk is in memory at a time. The
    decoder runs as it is: put it in eval mode first. The likelihood is a density: not MSE or L1, and not a Gaussian of the
    optimal scale. There is no `kl_weight`: where steps are padding, give `mu` and `logvar` the prior's values.

    Args:
        decoder, x, mu, logvar, likelihood, posterior, prior, weight: as in `elbo`.
        n_samples: the samples of z for each datum, at least 1.
        chunk: how many of them are decoded at a time, as `[chunk * B, ...]`.
        eps: noise to use, `[n_samples, *mu.shape]`.
        generator: draws the noise, in place of the default generator.
        progress: show a progress bar, by tqdm.

    Returns:
        `LogLikelihood(log_p, standard_error)`, in nats, of the dtype of `elbo`'s results. The standard error is the delta
        method's: the deviation of the weights (with n - 1) over sqrt(n) and their mean. It is too low where the few samples
        that matter were not drawn, and NaN for one sample.

    Raises:
        TypeError, ValueError: as `elbo`.
        ImportError: `progress` was asked for, and tqdm is not installed.
    """
    n_samples, chunk = check_count("n_samples", n_samples), check_count("chunk", chunk)
    objective = Objective.of(likelihood, posterior, "none")
    if not objective.likelihood.is_density:
        raise ValueError(f"likelihood must be a density here, such as 'gaussian' or 'laplace'; got {likelihood!r}")
    if not callable(decoder):
        raise TypeError(f"decoder must be callable, got {type(decoder).__name__}")
    bound = IWAE(n_samples, chunk=chunk)
    call, given = prepared(decoder, x, mu, logvar, objective, bound, prior=prior, weight=weight, eps=eps, generator=generator)
    chunks = bound.chunks
    if progress:
        chunks = _tqdm()(chunks, unit="chunk")
    total: Any = None
    squares: Any = None  # logarithms of the sums of the weights and of their squares
    for where in chunks:
        with contextlib.nullcontext() if is_traced(*given) else autocast_without_cache(given.mu.device.type):
            z, log_q, log_p = sample(call, given, where, drawn(given, where, generator), None)
            rows, _, _ = score(call, given, where, decoded(call, z), log_q, log_p)
        log_w = -rows.double()
        sums = torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0)
        total, squares = sums if total is None else (torch.logaddexp(total, sums[0]), torch.logaddexp(squares, sums[1]))
    # With R, the sum of squares over the square of the sum, the weights' variance over their squared mean is
    # K (K R - 1) / (K - 1).
    excess = torch.expm1(math.log(n_samples) + squares - 2 * total).clamp_min(0)
    error = torch.sqrt(excess / (n_samples - 1)) if n_samples > 1 else torch.full_like(total, math.nan)
    return LogLikelihood((total - math.log(n_samples)).to(rows.dtype), error.to(rows.dtype))


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm
