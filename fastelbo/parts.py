"""The parts of the objective, each of them useful alone: reconstruction, samples of the posterior, their KL from the prior."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.distributions import Distribution

from .basics.arguments import (
    check_alike,
    check_count,
    check_device,
    check_noise,
    check_prediction,
    check_reduction,
    result_dtype,
)
from .basics.tracing import is_surrounded
from .engine.call import ONE, REDUCTIONS_OF_KL, Objective, check_kl, with_numbers
from .engine.compiled import in_graph, may_be_in_graph
from .engine.divergence import weighted_kl, weighted_sample
from .engine.latents import latents_terms, run, sample
from .engine.log_ratio import draw_rows, log_density, log_ratio
from .engine.loss import composed_terms, planned_terms, traced_terms
from .engine.plan import find_objective, latents_plan_of
from .engine.sequences import Batch, PerSample, merged_latents
from .latents.posterior import LOGVAR, CategoricalPosterior, Posterior, check_latents
from .latents.weighting import ALL, Weighting
from .likelihoods import Likelihood
from .likelihoods.distributions import of_distribution


@may_be_in_graph
def nll(
    recon_x: Tensor | tuple[Tensor | float, ...] | Distribution,
    x: Tensor,
    *,
    likelihood: str | Likelihood | None = None,
    weight: Tensor | None = None,
    reduction: str | PerSample = "sum",
) -> Tensor:
    """The reconstruction alone, `-log p(x | z)`: the `recon` of `loss`, for models that compute the KL elsewhere or have none.

    Differentiable by every tensor argument; on a GPU one launch, which makes the gradient too.

    Args:
        recon_x: the decoder's output, `[B, ...]`, float16, bfloat16, float32 or float64; or the tuple of tensors that
            parametrize the likelihood. A tuple of one is that one. Or a distribution, which stands for both, as in `loss`.
        x: the target, of the shape of `recon_x` and any real dtype; or a sparse one, as in `loss`.
        likelihood: what `recon_x` parametrizes, a name or an object of `fastelbo.likelihoods`, as in `loss`.
        weight: weights of the elements of `x`, such as a mask, as in `loss`: what has the weight 0 does not count.
        reduction: `"sum"`, `"batchmean"` (sum / B), `"mean"` (over all elements, or divided by the sum of the weights) or
            `"none"` (one value a sample); or `PerSample(batch_dims=2)`, one value for each step of each sequence.

    Returns:
        The negative log-likelihood in nats, `[]`, or `[B]` with `reduction="none"`: float64 if a tensor of `recon_x` is,
        otherwise float32.

    Raises:
        TypeError, ValueError: as `loss`.
    """
    if isinstance(recon_x, Distribution):
        likelihood, recon_x = of_distribution("recon_x", recon_x, likelihood)
    if is_dynamo_compiling():
        values = {"recon_x": recon_x, "x": x, "weight": weight}
        found = in_graph("nll", values, likelihood=likelihood, reduction=reduction)
        if found is not None:
            return found
    if isinstance(reduction, PerSample):
        batch = Batch.of("x", x, reduction)
        prediction, weight = batch.merged_prediction("recon_x", recon_x, likelihood), batch.merged_smaller(weight, x.dim())
        return batch.apart(nll(prediction, batch.merged("x", x), likelihood=likelihood, weight=weight, reduction="none"))
    surrounded = is_surrounded()
    if not isinstance(reduction, str):  # a pair has one for the KL
        check_reduction(reduction)
    objective = (Objective.of if surrounded else find_objective)(likelihood, LOGVAR, reduction)
    given = with_numbers("recon_x", recon_x, objective.likelihood) if isinstance(recon_x, (tuple, list)) else (recon_x,)
    tensors = (*given, x) if weight is None else (*given, x, weight)
    if not objective.is_sum:
        return composed_terms("recon_x", objective, tensors, len(given), weight is not None, None).recon
    compute = traced_terms if surrounded else planned_terms
    return compute("recon_x", objective, tensors, len(given), weight is not None, 0, ONE).recon


class SampleKL(NamedTuple):
    """A sample z of the shape of `mu`, and the KL in nats: `[]`, or `[B]` with `reduction="none"`."""

    z: Tensor
    kl: Tensor


@may_be_in_graph
def reparameterize(
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    *,
    posterior: str | Posterior = "logvar",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample `mu + sigma * eps` of N(mu, sigma^2), differentiable by `mu`, `logvar` and `eps`.

    On a CPU the noise is what `torch.randn_like` gives for the same seed. On a GPU it comes from a Philox stream of this
    library's own, whose seed follows `torch.manual_seed`: other values than `torch.randn_like`, made again in backward
    instead of stored.

    Args:
        mu: mean, `[B, ...]`, float16, bfloat16, float32 or float64; or a `torch.distributions.Normal`, or an `Independent` of
            one, which stands for `mu` and `logvar`.
        logvar: logarithm of the variance, of the shape of `mu`, or what `posterior` says that it is.
        posterior: what `logvar` is: `"logvar"`, `"log_std"`, `"std"`, `"var"`, or a `Posterior`.
        eps: noise to use, of the shape of `mu`.
        generator: draws the noise, in place of the default generator; on the device of `mu`.

    Returns:
        z, of the shape of `mu` and the wider of the two dtypes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or both `eps` and `generator` came.
    """
    if is_dynamo_compiling() and generator is None:
        found = in_graph("reparameterize", {"mu": mu, "logvar": logvar, "eps": eps}, posterior=posterior)
        if found is not None:
            return found
    return sample(mu, logvar, posterior, None, None, eps, generator)[0]


@may_be_in_graph
def sample_kl(
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    *,
    posterior: str | Posterior = "logvar",
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    weighting: Weighting | None = None,
    kl_weight: Tensor | None = None,
    reduction: str | PerSample = "sum",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SampleKL:
    """A sample as from `reparameterize`, and its KL from the prior, from one read of all of them.

    Free bits per dimension or channel, and a capacity, take a second one.

    Args:
        mu, logvar, posterior, eps, generator: as in `reparameterize`.
        prior: as in `kl_divergence`: a pair that is parametrized as the posterior is, or a Normal. None: N(0, I).
        weighting: free bits, capacity or balance: then `kl` is what they make of the KL, as in `kl_divergence`.
        kl_weight: weights of the elements of `mu` in the KL, as in `kl_divergence`; z is without them.
        reduction: of the KL: `"sum"`, `"batchmean"`, `"mean"` (over all elements), `"none"` (one value a sample) or
            `PerSample(batch_dims=2)`.

    Returns:
        `SampleKL(z, kl)`. The KL is float64 if `mu`, `logvar` or the prior is, otherwise float32; it goes into
        `loss(..., kl=kl)`.

    Raises:
        TypeError, ValueError: as `reparameterize`; also if `prior` does not fit, if `reduction` is unknown, or if `weighting`
            is no `Weighting`, or has no meaning with the reduction or without a prior.
    """
    if is_dynamo_compiling() and generator is None:
        values = {"mu": mu, "logvar": logvar, "prior": prior, "eps": eps, "kl_weight": kl_weight}
        found = in_graph("sample_kl", values, posterior=posterior, weighting=weighting, reduction=reduction)
        if found is not None:
            return found
    if isinstance(reduction, PerSample):
        batch, arguments = merged_latents(mu, logvar, posterior, prior, kl_weight, reduction)
        eps = batch.merged("eps", eps)
        z, kl = sample_kl(**arguments, weighting=weighting, reduction="none", eps=eps, generator=generator)
        return SampleKL(batch.apart(z), batch.apart(kl))
    if reduction is None:
        check_reduction(reduction)
    if weighting is not None and weighting is not ALL:
        return SampleKL(*weighted_sample(mu, logvar, posterior, prior, weighting, kl_weight, reduction, eps, generator))
    return tuple.__new__(SampleKL, sample(mu, logvar, posterior, prior, reduction, eps, generator, None, kl_weight))


@may_be_in_graph
def kl_divergence(
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    prior: tuple[Tensor, Tensor] | Tensor | Distribution | None = None,
    *,
    posterior: str | Posterior | CategoricalPosterior = "logvar",
    weighting: Weighting | None = None,
    kl_weight: Tensor | None = None,
    reduction: str | PerSample = "sum",
) -> Tensor:
    """KL(N(mu, sigma^2) || prior), in nats, or that of categorical latents; differentiable by every tensor.

    Categorical latents are groups of K classes, by logits `[B, ..., K]`, such as `[B, G, K]`. Each group has a KL, and so is
    what an element is of Gaussian ones. The distributions of `torch.distributions` draw their samples:
    `OneHotCategoricalStraightThrough(logits=logits).rsample()`, or `F.gumbel_softmax(logits, tau)`.

    With a `weighting` it is what that makes of the KL, which a loss of several terms adds up: the levels of a hierarchy, the
    heads of a world model.

    Args:
        mu: mean, `[B, ...]`, float16, bfloat16, float32 or float64; or a `torch.distributions.Normal`, or an `Independent` of
            one, which stands for `mu` and `logvar`. Of categorical latents a `Categorical` or `OneHotCategorical`, or an
            `Independent` of one; or their logits, with such a `posterior`.
        logvar: logarithm of the variance, of the shape of `mu`, or what `posterior` says that it is.
        prior: None: N(0, I). A Normal, or an Independent of one. Where `mu` is a tensor, also a pair of tensors that is
            parametrized as the posterior is: `(prior_mu, prior_logvar)`, or with `posterior="log_std"` `(prior_mu,
            prior_log_std)`. Of the shape of `mu`, or one that broadcasts to it. Deviations that are not positive give an
            infinite KL or NaN. Of categorical latents None: the uniform distribution; a `Categorical` or `OneHotCategorical`;
            or, where `mu` is a tensor, logits, of the shape of `mu` or one that broadcasts to it, with all K classes. A class
            that only the prior has at probability 0 gives an infinite KL; one that both have so adds nothing.
        posterior: what `logvar` is: `"logvar"`, `"log_std"`, `"std"`, `"var"`, or a `Posterior`. `"categorical"` or a
            `CategoricalPosterior`: `mu` is logits; the latter goes with a distribution as well, for its `unimix`.
        weighting: free bits, capacity or balance, and the result is the KL as weighted: `loss` has beta times it. None: the KL
            itself. It has to mean something with the reduction: free bits of the batch, dimensions or channels, and a capacity
            of the batch, have no value for each sample (`"none"`); `"dimension"` takes free bits of dimensions or elements,
            `"element"` those of elements; balance goes with all. In `"sum"` and `"mean"`, what is a mean over samples counts B
            times, or is over the number of dimensions.
        kl_weight: weights of the elements of `mu`, batch included, such as a mask of padded time steps `[B, T, 1]` or a weight
            for each sample `[B, 1]`: of any real dtype and a shape that broadcasts to that of `mu`. What has the weight 0 does
            not count, even if it is NaN. `"mean"` and `"dimension"` divide by the sum of the weights; so do the means in
            `weighting`, where each group has one weight a sample.
        reduction: `"sum"`, `"batchmean"` (sum / B), `"mean"` (over all elements), `"none"` (one value a sample, `[B]`),
            `"dimension"` (the mean over the batch, `mu.shape[1:]`), or `"element"` (of the shape of `mu`). Of categorical
            latents an element is a group: `logits.shape[1:-1]` and `logits.shape[:-1]`. `PerSample(batch_dims=2)`: one value
            for each step of each sequence, `[B, T]`.

    Returns:
        The KL: float64 if an input is, otherwise float32.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or has an unknown name; a pair is the
            prior of a Normal, or logits that of a Categorical; or `weighting` is no `Weighting`, or has no meaning with the
            reduction or without a prior.
    """
    if isinstance(reduction, PerSample):
        batch, arguments = merged_latents(mu, logvar, posterior, prior, kl_weight, reduction)
        return batch.apart(kl_divergence(**arguments, weighting=weighting, reduction="none"))
    if reduction is None:  # which stands for no KL further in
        check_reduction(reduction, REDUCTIONS_OF_KL)
    surrounded = is_surrounded()
    if surrounded and is_dynamo_compiling():
        values = {"mu": mu, "logvar": logvar, "prior": prior, "kl_weight": kl_weight}
        found = in_graph("kl_divergence", values, posterior=posterior, weighting=weighting, reduction=reduction)
        if found is not None:
            return found
    if weighting is not None and weighting is not ALL:
        return weighted_kl(mu, logvar, posterior, prior, weighting, kl_weight, reduction, surrounded)
    if surrounded:
        kl: Tensor = latents_terms(*check_kl(mu, logvar, posterior, prior, reduction, False, None, kl_weight))[1]
    else:
        kl = run(*latents_plan_of(mu, logvar, posterior, prior, reduction, None, False, None, kl_weight), None)[1]
    return kl


class SampleLogRatio(NamedTuple):
    """A sample z, `[B, ...]`, and its log densities in nats, `[B]`; with `n_samples` behind a dimension of so many."""

    z: Tensor
    log_q: Tensor
    log_p: Tensor


def sample_log_ratio(
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    *,
    posterior: str | Posterior = "logvar",
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    flow: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    n_samples: int | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SampleLogRatio:
    """A sample as from `reparameterize` of contiguous latents, with log q(z | x) and log p(z), sums over each sample's latents.

    The mean of `log_q - log_p` over many samples is the KL; that of one sample is an estimate of it, for posteriors and priors
    whose KL has no closed form. It goes into `loss(..., kl=log_q - log_p, reduction="none")`.

    Args:
        mu, logvar, posterior: as in `reparameterize`.
        prior: as in `kl_divergence`: a pair that is parametrized as the posterior is, or a Normal. None: N(0, I).
        flow: a normalizing flow (Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015): a callable from z0,
            `[rows, ...]`, to `(z, log_det)`, of the same shape and `[rows]`, the logarithm of |det dz / dz0|. Then
            `log_q = log q(z0 | x) - log_det`, and `log_p` is that of the transformed z, which is returned.
        n_samples: how many samples of each; None: one, without a dimension for it. A flow sees all as rows.
        eps: noise to use, of the shape of z.
        generator: draws the noise, in place of the default generator.

    Returns:
        `SampleLogRatio(z, log_q, log_p)`, differentiable by all that went in. z has the wider dtype of `mu` and `logvar`; the
        densities are float64 if these, the prior or what the flow returns is, otherwise float32.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or has an unknown name; `n_samples` is
            less than 1; both `eps` and `generator` came; or the flow returned anything else.
    """
    latents, tensors = check_latents(mu, logvar, posterior, prior)
    mu, second, *priors = tensors
    if flow is not None and not callable(flow):
        raise TypeError(f"flow must be callable, got {type(flow).__name__}")
    count = 1 if n_samples is None else check_count("n_samples", n_samples)
    if eps is not None:
        check_noise(eps, generator, mu, n_samples)
    noise = draw_rows(mu, second, count, eps, generator)
    z, log_q, log_p = log_ratio(latents, tensors, noise, count)
    if flow is not None:
        z, log_det = _check_flow(flow(z), z)
        dtype = torch.promote_types(log_q.dtype, result_dtype(z, log_det))
        log_q = log_q.to(dtype) - log_det
        log_p = log_density(z.to(dtype).unflatten(0, (count, mu.shape[0])), latents, priors)
    if n_samples is None:
        return SampleLogRatio(z, log_q, log_p)
    return SampleLogRatio(*(t.unflatten(0, (count, mu.shape[0])) for t in (z, log_q, log_p)))


def _check_flow(found: Any, z0: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"flow(z) must be a pair (z, log_det) of tensors, got {type(found).__name__}")
    z, log_det = found
    check_prediction("flow(z)[0]", z)
    check_alike("flow(z)[0]", z, "z", z0)
    check_prediction("flow(z)[1]", log_det)
    check_device("flow(z)[1]", log_det, "z", z0)
    if log_det.shape != z0.shape[:1]:
        raise ValueError(f"flow(z)[1] must have one log_det a row, {tuple(z0.shape[:1])}: got {tuple(log_det.shape)}")
    return z, log_det
