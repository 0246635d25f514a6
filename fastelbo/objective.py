"""The objective: `loss` from a decoder's output, `elbo` around the decoder."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.distributions import Distribution

from .basics.arguments import OF_EACH, check_batch, check_device, check_number
from .basics.sparse import check_data
from .basics.tracing import is_surrounded
from .bounds.records import ELBO, ONE_SAMPLE, check_bound
from .bounds.samples import many_samples
from .diagnostics import Monitor
from .engine.call import TENSORS, Factors, Objective, with_numbers
from .engine.compiled import in_graph, may_be_in_graph
from .engine.divergence import Statistics, divergence_terms, kl_of, times
from .engine.latents import run, sample
from .engine.loss import ELBOTerms, composed_terms, planned_terms, record_reconstruction, traced_terms
from .engine.plan import find_objective, is_little, latents_plan_of
from .engine.sequences import Batch, PerSample, merged_latents
from .given import check_sources, check_target, checked_beta, checked_recon_weight
from .latents.posterior import LOGVAR, CategoricalPosterior, Latents, Posterior, check_latents
from .latents.weighting import ALL, Weighting, check_beta, check_weighting, is_of_each, shares_of
from .likelihoods import Likelihood
from .likelihoods.distributions import of_distribution

Reduction = str | tuple[str, str] | PerSample
Prior = tuple[Tensor, Tensor] | Tensor | Distribution


@may_be_in_graph
def loss(
    recon_x: Tensor | tuple[Tensor | float, ...] | Distribution,
    x: Tensor,
    mu: Tensor | Distribution | None = None,
    logvar: Tensor | None = None,
    beta: float | Tensor = 1.0,
    *,
    kl: Tensor | None = None,
    likelihood: str | Likelihood | None = None,
    posterior: str | Posterior | CategoricalPosterior = "logvar",
    prior: Prior | None = None,
    weighting: Weighting | None = None,
    weight: Tensor | None = None,
    recon_weight: float | Tensor = 1.0,
    kl_weight: Tensor | None = None,
    reduction: Reduction = "sum",
    monitor: Monitor | None = None,
) -> ELBOTerms:
    """Negative ELBO of a VAE: `recon_weight * recon + beta * kl`, where `recon = -log p(x | z)` and
    `kl = KL(N(mu, exp(logvar)) || N(0, I))`.

    A drop-in for the usual `elbo_loss(recon_x, x, mu, logvar)`, differentiable by every tensor argument.

    Args:
        recon_x: the decoder's output, `[B, ...]`, float16, bfloat16, float32 or float64; or the tuple of tensors that
            parametrize the likelihood, of which all but the first may be numbers. A tuple of one is that one. Or a
            distribution, which stands for both: of Torch a `Normal`, `Laplace`, `StudentT`, `Bernoulli`,
            `ContinuousBernoulli`, `Poisson`, `NegativeBinomial`, `Categorical`, `OneHotCategorical` or `Multinomial`,
            scvi-tools' `NegativeBinomial` or `ZeroInflatedNegativeBinomial`, or an `Independent` of one. Then the
            reconstruction is minus the sum of its `log_prob(x)`, with gradients to what it was made of, and no `likelihood` is
            given; only a `Bernoulli` of probabilities clamps logarithms at -100, and not the probabilities.
        x: the target, of the shape of `recon_x` and any real dtype; integers and booleans are converted on the fly. Or a matrix
            `[B, G]` of the layout `torch.sparse_csr`, which is never made dense, for likelihoods with a closed form where x is
            0, as those of counts, bits and items have it: `fastelbo.likelihoods` lists them. Each place has one value at most.
        mu: mean of the encoder's Gaussian, `[B, ...]`, of any such shape and floating dtype; or a `torch.distributions.Normal`,
            or an `Independent` of one, which stands for `mu` and `logvar`. Of categorical latents logits, or a `Categorical` or
            `OneHotCategorical`, as in `kl_divergence`. Its batch may be another one than that of `x`, as of clips and their
            frames, unless the reduction is `"none"`: each term is averaged over its own.
        logvar: logarithm of its variance, of the shape of `mu`, or what `posterior` says that it is.
        beta: weight of the KL (Higgins et al., beta-VAE, 2017): a number, a 0-d tensor, or a tensor that broadcasts to a sample
            of `mu`, with a weight for each latent dimension. One of the shape `[B]`, where B is the number of latents, is that,
            too: weights of samples are `kl_weight`.
        kl: a KL from `sample_kl`, already reduced, in place of `mu` and `logvar`: `[]`, or `[B]` with `reduction="none"`.
        likelihood: what `recon_x` parametrizes: a name, or an object of `fastelbo.likelihoods`, which lists them all. None, or
            `"bernoulli"`: probabilities, as `F.binary_cross_entropy`; `"bernoulli_logits"`: logits, as
            `F.binary_cross_entropy_with_logits`; `"mse"`: as `F.mse_loss`; `"gaussian"`: means, as
            `-Normal(recon_x, 1.0).log_prob(x)`. An object has options: `Gaussian(scale=0.3)`, and for bytes
            `Bernoulli(target_scale=1/255)`.
        posterior: what `logvar` is: `"logvar"`, `"log_std"`, `"std"`, `"var"`, or a `Posterior`, which can clamp it;
            `"categorical"` or a `CategoricalPosterior`: `mu` is logits.
        prior: what the KL is from: a pair of tensors that is parametrized as the posterior is, or a Normal; or logits or a
            Categorical, as in `kl_divergence`. None: N(0, I), or the uniform distribution.
        weighting: what of the KL enters the loss: free bits, capacity, balance. None: all of it. The result `kl` is always the
            KL itself.
        weight: weights of the elements of `x`, such as a mask: of any real dtype and a shape that broadcasts to that of `x`,
            with one element along a dimension of classes, or of a mixture's channels. What has the weight 0 does not count,
            even if it is NaN. A mean divides by the sum of the weights, each for every element that it stands for, and is NaN
            where that is 0.
        recon_weight: weight of the whole reconstruction in the loss, a number or a 0-d tensor: `recon` is without it.
        kl_weight: weights of the elements of `mu`, batch included, such as a mask of padded time steps `[B, T, 1]` or a weight
            for each sample `[B, 1]`: of any real dtype and a shape that broadcasts to that of `mu`. `kl` has them in it. What
            has the weight 0 does not count, even if it is NaN. Means are over the sum of the weights; so are those of free
            bits and capacities, to which each group has one weight a sample.
        reduction: `"sum"`, `"batchmean"` (sum / B), `"mean"` (over all elements of a term), `"none"` (one value a sample), or a
            pair for reconstruction and KL; or `PerSample(batch_dims=2)`, one value for each step of each sequence. Where
            processes average gradients (DDP, FSDP), those of `"batchmean"` and `"mean"` are the joint batch's, and those of
            `"sum"` are 1/world of them.
        monitor: collects diagnostics of the call.

    Returns:
        `ELBOTerms(loss, recon, kl)`, in nats: float64 if a tensor of `recon_x`, `mu`, `logvar`, the prior or `kl` is, otherwise
        float32. The dtypes of `x`, `weight` and `beta` do not count.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or a distribution of another kind.
        ValueError: shapes, devices, names or options do not fit, or a likelihood is given beside a distribution that is
            another one. On a CPU, too, if a value that has a weight lies where its likelihood has none: probabilities and
            targets of `"bernoulli"`, or integer targets of `"bernoulli_logits"`, outside [0, 1]; counts, rates or means below
            0; scales or dispersions that are not positive; unknown labels or levels. NaN passes. On a GPU, looking would need a
            sync, and a tracer sees no values. There a target of a Bernoulli likelihood outside [0, 1], counts of a
            multinomial below 0, and a sparse target with several values for one place, give a loss that means nothing; the
            others give NaN.
    """
    if isinstance(recon_x, Distribution):
        likelihood, recon_x = of_distribution("recon_x", recon_x, likelihood)
    if is_dynamo_compiling() and monitor is None:
        values = {
            "recon_x": recon_x, "x": x, "mu": mu, "logvar": logvar, "beta": beta, "kl": kl, "prior": prior, "weight": weight,
            "recon_weight": recon_weight, "kl_weight": kl_weight,
        }  # fmt: skip
        found = in_graph("loss", values, likelihood=likelihood, posterior=posterior, weighting=weighting, reduction=reduction)
        if found is not None:
            return found
    if isinstance(reduction, PerSample):
        batch = Batch.of("x", x, reduction)
        given: Any = {"mu": mu, "logvar": logvar, "posterior": posterior, "prior": prior, "kl_weight": kl_weight}
        if kl is None and (mu is not None or logvar is not None):
            _, given = merged_latents(**given, reduction=reduction, batch=batch)
        terms = loss(
            batch.merged_prediction("recon_x", recon_x, likelihood), batch.merged("x", x), **given, beta=beta,
            kl=batch.merged("kl", kl), likelihood=likelihood, weighting=weighting,
            weight=batch.merged_smaller(weight, x.dim()), recon_weight=recon_weight, reduction="none", monitor=monitor,
        )  # fmt: skip
        return ELBOTerms(*map(batch.apart, terms))
    surrounded = is_surrounded()
    objective = (Objective.of if surrounded else find_objective)(likelihood, posterior, reduction)
    given = (recon_x,)
    if isinstance(recon_x, (tuple, list)):
        is_usual = len(recon_x) < 2 or TENSORS.issuperset(map(type, recon_x))
        given = recon_x if is_usual else with_numbers("recon_x", recon_x, objective.likelihood)
    if type(beta) is not float:
        beta = checked_beta(beta, x)
    if type(recon_weight) is not float:
        recon_weight = checked_recon_weight(recon_weight, x)
    each = type(beta) is not float and is_of_each(beta)
    is_whole = (weighting is None or weighting is ALL) and kl_weight is None
    if objective.is_direct and is_whole and prior is None and monitor is None and not each:
        latents: tuple[Tensor, ...] = ()
        if kl is None and isinstance(mu, Tensor) and logvar is not None:
            latents = mu, logvar
        elif kl is not None and mu is logvar is None and not isinstance(reduction, (tuple, list)):
            latents = (kl,)
        if latents:
            tensors = (*given, x, *latents) if weight is None else (*given, x, weight, *latents)
            compute = traced_terms if surrounded else planned_terms
            return compute("recon_x", objective, tensors, len(given), weight is not None, len(latents), (beta, recon_weight))
    check_sources(mu, logvar, kl, objective, prior, weighting, kl_weight, reduction, monitor)
    if kl is not None:
        factors = check_number("beta", beta, x), recon_weight
        return _with_kl("recon_x", objective, given, x, weight, kl, factors, None, monitor)
    of_latents: Sequence[Tensor]
    weighted = statistics = None
    in_one_pass = weighting is None or (isinstance(weighting, Weighting) and weighting.capacity is None)
    widens = False  # the KL's digits are those of the results, which may be the prediction's
    if getattr(mu, "dtype", None) is not torch.float64:
        for parameter in given:
            widens = widens or getattr(parameter, "dtype", None) is torch.float64
    if in_one_pass and not widens and monitor is None and not each and not surrounded:
        of_kl = None if weighting is ALL else weighting
        plan, of_latents = latents_plan_of(mu, logvar, posterior, prior, objective.kl_reduction, None, False, of_kl, kl_weight)
        _, kl, weighted, _ = run(plan, of_latents, None)
        if weighting is not None and weighted is not None:
            weighted = times(shares_of(weighting)[0], weighted)
    else:
        kind, of_latents = check_latents(mu, logvar, posterior, prior, kl_weight, samples=False)
        if widens:
            of_latents = tuple(t.double() for t in of_latents)
        kl, beta, weighted, statistics = _divergence(kind, of_latents, objective, beta, weighting, monitor)
    check_data("x", x)
    check_device("mu", of_latents[0], "recon_x", x)
    if objective.reduction == "none":
        check_batch("mu", of_latents[0], "x", x, OF_EACH)
    return _with_kl("recon_x", objective, given, x, weight, kl, (beta, recon_weight), weighted, monitor, statistics)


def elbo(
    decoder: Callable[[Tensor], Tensor | tuple[Tensor | float, ...] | Distribution],
    x: Tensor,
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    beta: float | Tensor = 1.0,
    *,
    likelihood: str | Likelihood | None = None,
    posterior: str | Posterior = "logvar",
    prior: Prior | None = None,
    weighting: Weighting | None = None,
    weight: Tensor | None = None,
    recon_weight: float | Tensor = 1.0,
    kl_weight: Tensor | None = None,
    reduction: Reduction = "sum",
    bound: ELBO | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    monitor: Monitor | None = None,
) -> ELBOTerms:
    """Negative ELBO of a VAE around its decoder: sample z, decode it, and return `loss(decoder(z), x, mu, logvar, beta)`.

    z and the KL are those of `sample_kl`, from one read of the latents where they are many. Gradients reach `mu`, `logvar`,
    `x`, `beta`, and every parameter and other tensor that the decoder uses.

    `bound=ELBO(n)` has the mean reconstruction of n samples of z. `bound=IWAE(n)` has the tighter, importance-weighted bound;
    its `recon` and `kl` are the ELBO's terms of the same samples, without gradient, which show how much tighter it is. Memory
    does not grow with the number of samples: all of them are one autograd Function around the decoder. A chunk of samples at a
    time goes through it: in forward without a graph, and again in backward, with the same dropout masks, as under
    `torch.utils.checkpoint`. Torch's own generators and `generator` give the same random numbers again; others do not. What
    else the decoder uses, such as the condition of this batch, must still be the same: on a CPU other values raise, on a GPU
    nobody looks, for that would take a sync. Running statistics of batch normalizations move in forward alone. Where the
    decoder's call changes another buffer of a module that it refers to, an error says so. With a `chunk` of all samples the
    decoder runs once, and its graph is kept.

    The graphs of several samples are all kept where they cannot be built again: under `torch.compile` and `torch.func`; and,
    with a warning, where `eps` requires grad, or where the decoder uses a tensor that is neither a leaf nor computed in it, a
    leaf with hooks, or an autograd Function written in Python, as reentrant checkpoints and FSDP do. Weights that it shares
    with the encoder, and compiled modules, can be built again.

    Args:
        decoder: a module, bound method or function from z, of the shape of `mu`, to `recon_x`: a prediction of the shape of
            `x`, the tuple of the likelihood's parameters, or a distribution, as in `loss`. With several samples it gets and
            returns `[chunk * B, ...]`, with one batch for `mu` and `x`.
        x, mu, logvar, beta, likelihood, posterior, prior, weighting, weight, recon_weight, kl_weight, reduction, monitor: as in
            `loss`.
        eps: noise to use, of the shape of `mu`; with several samples, or by an `IWAE`, `[n_samples, *mu.shape]`.
        generator: draws the noise, in place of the default generator; on the device of `mu`.
        bound: an `ELBO` or an `IWAE`; None: `ELBO()`, one sample. An `IWAE` takes no `weighting`, one number as `beta`, and the
            reductions `"sum"`, `"batchmean"` and `"none"`.

    Returns:
        `ELBOTerms(loss, recon, kl)`, as `loss`.

    Raises:
        TypeError, ValueError: as `loss`; also if `bound` is no bound, or if the decoder returns anything but a tensor of the
            shape of `x`, the parameters of the likelihood, or a distribution that `loss` takes.
        RuntimeError: with several samples and fewer in a chunk: in backward with `create_graph=True` or
            `is_grads_batched=True`; if a leaf that the decoder uses was given a hook, or was written to, after this call; if
            on a CPU the decoder returns other values in backward; or if it changes its state.
    """
    if not callable(decoder):
        raise TypeError(f"decoder must be callable, got {type(decoder).__name__}")
    if isinstance(reduction, PerSample):
        batch = Batch.of("x", x, reduction)
        _, merged = merged_latents(mu, logvar, posterior, prior, kl_weight, reduction, batch)
        terms = elbo(
            batch.around(decoder, likelihood), batch.merged("x", x), beta=beta, **merged, likelihood=likelihood,
            weighting=weighting, weight=batch.merged_smaller(weight, x.dim()), recon_weight=recon_weight, reduction="none",
            bound=bound, eps=batch.merged("eps", eps, dim=int(check_bound(bound) is not ONE_SAMPLE)), generator=generator,
            monitor=monitor,
        )  # fmt: skip
        return ELBOTerms(*map(batch.apart, terms))
    surrounded = is_surrounded()
    if surrounded and bound is None and weighting is None and monitor is None and generator is None:
        if is_dynamo_compiling() and isinstance(reduction, str) and not is_of_each(beta):
            values: dict[str, Any] = {"x": x, "mu": mu, "logvar": logvar, "prior": prior, "eps": eps, "kl_weight": kl_weight}
            found = in_graph("_before_decoder", values, posterior=posterior, reduction=reduction)
            if found is not None:
                z, kl = found
                prediction = decoder(z)
                if isinstance(prediction, Distribution):
                    likelihood, prediction = of_distribution("decoder(z)", prediction, likelihood)
                values = {"prediction": prediction, "x": x, "beta": beta, "weight": weight, "kl": kl}
                values["recon_weight"] = recon_weight
                found = in_graph("_behind_decoder", values, likelihood=likelihood, reduction=reduction)
                return _behind_decoder(**values, likelihood=likelihood, reduction=reduction) if found is None else found
    objective = (Objective.of if surrounded else find_objective)(likelihood, posterior, reduction)
    if bound is not None and (bound := check_bound(bound)) is not ONE_SAMPLE:
        return many_samples(
            decoder, x, mu, logvar, (beta, recon_weight), objective, bound, prior=prior, weighting=weighting, weight=weight,
            kl_weight=kl_weight, eps=eps, generator=generator, monitor=monitor,
        )  # fmt: skip
    if type(beta) is not float:
        beta = checked_beta(beta, x)
    if type(recon_weight) is not float:
        recon_weight = checked_recon_weight(recon_weight, x)
    each = type(beta) is not float and is_of_each(beta)
    # What can be checked before the decoder runs, which may draw noise and move statistics.
    if (weighting is None or weighting is ALL) and monitor is None and not each and objective.is_sum:
        # Of few latents on a CPU, the Function of the loss has the KL: one for the sample would cost more than it saves.
        is_plain = objective.is_direct and prior is None and kl_weight is None
        inside = is_plain and not surrounded and is_little(mu, logvar)
        reduction_of_kl = None if inside else objective.kl_reduction
        z, kl = sample(mu, logvar, posterior, prior, reduction_of_kl, eps, generator, surrounded, kl_weight)
        check_target(x, z, objective.reduction)
        given = decoder(z)
        if isinstance(given, Distribution):
            objective, given = _of_decoded(given, objective)
        given = _parameters(given, objective.likelihood) if isinstance(given, (tuple, list)) else (given,)
        behind = (mu, logvar) if inside else (kl,)
        tensors = (*given, x, *behind) if weight is None else (*given, x, weight, *behind)
        compute = traced_terms if surrounded else planned_terms
        return compute("decoder(z)", objective, tensors, len(given), weight is not None, len(behind), (beta, recon_weight))
    check_sources(mu, logvar, None, objective, prior, weighting, kl_weight, reduction, monitor)
    latents, tensors = check_latents(mu, logvar, posterior, prior, kl_weight)
    check_target(x, tensors[0], objective.reduction)
    kl, beta, weighted, statistics = _divergence(latents, tensors, objective, beta, weighting, monitor)
    z, _ = sample(tensors[0], tensors[1], latents.posterior, None, None, eps, generator)
    given = decoder(z)
    if isinstance(given, Distribution):
        objective, given = _of_decoded(given, objective)
    given = _parameters(given, objective.likelihood)
    return _with_kl("decoder(z)", objective, given, x, weight, kl, (beta, recon_weight), weighted, monitor, statistics)


@may_be_in_graph
def _before_decoder(
    x: Any, mu: Any, logvar: Any, prior: Any, eps: Any, kl_weight: Any, *, posterior: Any, reduction: str
) -> tuple[Tensor, Tensor]:
    """What `elbo` computes before the decoder runs, and behind it, where torch.compile takes each whole."""
    z, kl = sample(mu, logvar, posterior, prior, reduction, eps, None, None, kl_weight)
    check_target(x, z, reduction)
    return z, kl


@may_be_in_graph
def _behind_decoder(
    prediction: Any, x: Any, beta: Any, weight: Any, kl: Tensor, recon_weight: Any, *, likelihood: Any, reduction: str
) -> ELBOTerms:
    objective = Objective.of(likelihood, LOGVAR, reduction)
    given = _parameters(prediction, objective.likelihood)
    factors = checked_beta(beta, x), checked_recon_weight(recon_weight, x)
    return _with_kl("decoder(z)", objective, given, x, weight, kl, factors, None, None)


def _of_decoded(distribution: Distribution, objective: Objective) -> tuple[Objective, tuple[Tensor, ...]]:
    """The objective with the likelihood of what a decoder returned, and the tensors of that."""
    likelihood, given = of_distribution("decoder(z)", distribution, objective.given)
    return objective._replace(likelihood=likelihood, is_sum=True), given


def _parameters(prediction: Any, likelihood: Likelihood) -> tuple[Tensor, ...]:
    """The tensors of a decoder's output."""
    if not isinstance(prediction, (tuple, list)):
        return (prediction,)
    if len(prediction) > 1 and likelihood.counts == (1,):
        raise TypeError(
            f"decoder(z) must be a tensor, got {type(prediction).__name__}: pass the decoder alone, not the whole VAE, or"
            " lambda z: decoder(z)[0]"
        )
    is_usual = len(prediction) < 2 or TENSORS.issuperset(map(type, prediction))
    return tuple(prediction) if is_usual else with_numbers("decoder(z)", prediction, likelihood)


def _divergence(
    latents: Latents, tensors: Sequence[Tensor], objective: Objective, beta: Any, weighting: Any, monitor: Monitor | None
) -> tuple[Tensor, float | Tensor, Tensor | None, Statistics | None]:
    """The KL, and beta, what of the KL it weighs, None for all of it, and a monitor's statistics."""
    reduction, mu = objective.kl_reduction, latents.terms(tensors)
    beta = check_beta(beta, mu)
    weighting = check_weighting(weighting, mu, latents.prior is not None, beta, reduction)
    if weighting == ALL and monitor is None and not is_of_each(beta):
        return kl_of(latents, tensors, reduction), beta, None, None
    kl, weighted, statistics = divergence_terms(
        latents, tensors, weighting=weighting, beta=beta, reduction=reduction, statistics=monitor is not None
    )
    return kl, 1.0 if is_of_each(beta) else beta, weighted, statistics


def _with_kl(
    name: str, objective: Objective, given: Sequence[Tensor], x: Tensor, weight: Tensor | None, kl: Tensor,
    factors: Factors, weighted: Tensor | None, monitor: Monitor | None, statistics: Statistics | None = None,
) -> ELBOTerms:  # fmt: skip
    """The objective of a KL that is reduced already; `weighted`, if it is not None, is what of it beta weighs."""
    tensors = (*given, x) if weight is None else (*given, x, weight)
    shape = len(given), weight is not None
    terms = composed_terms(name, objective, tensors, *shape, kl if weighted is None else weighted, factors)
    if weighted is not None:
        terms = ELBOTerms(terms.loss, terms.recon, kl.to(terms.loss.dtype))
    if monitor is not None:
        record_reconstruction(monitor, objective, tensors, *shape, terms.recon, statistics)
    return terms
