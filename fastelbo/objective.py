"""The objective: `loss` from a decoder's output, `elbo` around the decoder."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from .arguments import (
    check_alike,
    check_batch,
    check_device,
    check_floats,
    check_latents,
    check_number,
    check_prediction,
    check_reals,
    check_scale,
    factor_of,
    find_likelihood,
    split_reduction,
    unwrapped,
)
from .autograd import Elbo, Settings
from .diagnostics import Monitor
from .divergence import Weighting
from .graph import decoder_leaves
from .layout import dense, in_layout, layout_of
from .likelihoods import Likelihood
from .monte_carlo import check_sampling, many_samples
from .plain import PLAIN
from .posteriors import Posterior, check_gaussian, check_prior, result_dtype
from .sampling import draw, sample, sample_of
from .scalars import check_real
from .terms import (
    ELBOTerms,
    add_terms,
    check_reconstruction,
    check_terms,
    divergence_of,
    finish,
    given_or_not,
    plain_terms,
    times,
)
from .tracing import is_traced

Reduction = str | tuple[str, str]


def loss(
    recon_x: Tensor | tuple[Tensor, ...],
    x: Tensor,
    mu: Tensor | Distribution | None = None,
    logvar: Tensor | None = None,
    beta: float | Tensor = 1.0,
    *,
    kl: Tensor | None = None,
    likelihood: str | Likelihood = "bernoulli",
    posterior: str | Posterior = "logvar",
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    weighting: Weighting | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "sum",
    scale: float | Tensor | None = None,
    target_scale: float = 1.0,
    monitor: Monitor | None = None,
) -> ELBOTerms:
    """Negative ELBO of a VAE: `recon + beta * kl`, with `recon = -log p(x | z)` and `kl = KL(N(mu, exp(logvar)) || N(0, I))`.

    A drop-in for the usual `elbo_loss(recon_x, x, mu, logvar)`, differentiable by every tensor argument.

    Args:
        recon_x: the decoder's output, `[B, ...]`, float16, bfloat16, float32 or float64; for a likelihood of several parameters
            the tuple of them. A tuple of one is that one.
        x: the target, of the shape of `recon_x` and any real dtype; integers and booleans are converted on the fly.
        mu: mean of the encoder's Gaussian, `[B, ...]`, of any such shape and floating dtype; or a `torch.distributions.Normal`,
            or an `Independent` of one, which stands for `mu` and `logvar`.
        logvar: logarithm of its variance, of the shape of `mu`, or what `posterior` says that it is.
        beta: weight of the KL (Higgins et al., beta-VAE, 2017): a number, a 0-d tensor, or a tensor that broadcasts to a sample
            of `mu`, with a weight for each latent dimension.
        kl: a KL from `sample_kl`, already reduced, in place of `mu` and `logvar`: `[]`, or `[B]` with `reduction="none"`.
        likelihood: what `recon_x` parametrizes: a name or an object of `fastelbo.likelihoods`, which lists them all.
            `"bernoulli"`: probabilities, as `F.binary_cross_entropy`; `"bernoulli_logits"`: logits, as
            `F.binary_cross_entropy_with_logits`; `"mse"`: as `F.mse_loss`; `"gaussian"`: means, as
            `-Normal(recon_x, scale).log_prob(x)`.
        posterior: what `logvar` is: `"logvar"`, `"log_std"`, `"std"`, `"var"`, or a `Posterior`, which can clamp it.
        prior: what the KL is from, as in `kl_divergence`. None: N(0, I).
        weighting: what of the KL enters the loss: free bits, capacity, balance. None: all of it. `kl` is the KL itself always.
        weight: weights of the elements of `x`, such as a mask: of any real dtype and a shape that broadcasts to that of `x`,
            with one element along a dimension of classes, or of a mixture's channels. What has the weight 0 does not count,
            even if it is NaN. A mean divides by the sum of the weights, and is NaN where that is 0.
        reduction: `"sum"`, `"batchmean"` (sum / B), `"mean"` (over all elements of a term), `"none"` (one value a sample), or a
            pair for reconstruction and KL. Where processes average gradients (DDP, FSDP), those of `"batchmean"` and `"mean"`
            are the joint batch's, and those of `"sum"` are 1/world of them.
        scale: scale of `"gaussian"` and `"laplace"`, positive: a number, or a tensor that broadcasts to `recon_x`. Default 1.
        target_scale: `x` is multiplied by it, such as 1/255 for `uint8` images.
        monitor: collects diagnostics of the call.

    Returns:
        `ELBOTerms(loss, recon, kl)`: float64 if a tensor of `recon_x`, `mu`, `logvar`, the prior or `kl` is, or a `scale` or
        `pos_weight` that has dimensions; otherwise float32. The dtypes of `x`, `weight`, `beta` and a 0-d `scale` do not count.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices, names or options do not fit; `scale` is not positive; on a CPU, what has a weight
            lies outside of where its likelihood has it: probabilities and targets of `"bernoulli"`, or integer targets of
            `"bernoulli_logits"`, outside [0, 1], counts, rates or means below 0, scales or dispersions not above it, or labels
            or levels that are none. NaN passes. On a GPU, looking would need a sync, and a tracer sees no values: a target of a
            Bernoulli likelihood outside [0, 1], and counts below 0 of a multinomial, give a loss that means nothing there, the
            others NaN.
    """
    recon_x = unwrapped(recon_x)
    if _is_plain(recon_x, mu, beta, likelihood, posterior, prior, weighting, weight, scale, monitor):
        check_prediction("recon_x", recon_x)
        check_reals("x", x)
        options = _check_options(recon_x, beta, likelihood, scale, target_scale)
        settings, beta = _check_loss("recon_x", recon_x, x, mu, logvar, kl, options, reduction)
        return plain_terms(settings, "recon_x", recon_x, x, mu, logvar, kl, beta)
    recon_reduction, kl_reduction = check_terms(mu, logvar, kl, posterior, prior, weighting, reduction, monitor)
    term = check_reconstruction("recon_x", recon_x, x, likelihood, weight, recon_reduction, scale, target_scale)
    if kl is None:
        divergence = divergence_of(mu, logvar, beta, posterior, prior, weighting, kl_reduction, monitor)
        check_device("mu", divergence[0], "recon_x", x)
        check_batch("mu", mu if isinstance(mu, Tensor) else mu.mean, "x", x)
    else:
        _check_kl(kl, recon_reduction, x)
        kl = kl.to(result_dtype(*term.parameters, kl))
        divergence = kl, times(check_number("beta", beta, x), kl), None
    return add_terms(term, divergence, monitor)


def elbo(
    decoder: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    x: Tensor,
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    beta: float | Tensor = 1.0,
    *,
    likelihood: str | Likelihood = "bernoulli",
    posterior: str | Posterior = "logvar",
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    weighting: Weighting | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "sum",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    scale: float | Tensor | None = None,
    target_scale: float = 1.0,
    monitor: Monitor | None = None,
    n_samples: int = 1,
    bound: str = "elbo",
    estimator: str = "standard",
    chunk: int = 1,
) -> ELBOTerms:
    """Negative ELBO of a VAE around its decoder: sample z, decode it, and return `loss(decoder(z), x, mu, logvar, beta)`.

    Sampling, KL, decoder and reconstruction are one autograd Function: gradients reach `mu`, `logvar`, `x`, `beta`, and every
    parameter and other tensor that the decoder uses.

    With `n_samples`, the reconstruction is the mean over so many samples of z (Kingma and Welling, 2013). With `bound="iwae"`
    the loss is the negative of the tighter bound of Burda et al. (Importance Weighted Autoencoders, 2016),

        -log(1/K sum_k w_k),    log w_k = log p(x | z_k) - beta (log q(z_k | x) - log p(z_k)),

    of K = `n_samples`, and `recon` and `kl` are the ELBO's terms of the same samples, which show how much tighter it is,
    without gradient. Memory does not grow with `n_samples`: `chunk` samples at a time go through the decoder, in forward
    without a graph, and again in backward, as under `torch.utils.checkpoint`, with the same dropout masks. Running statistics
    of batch normalizations move in forward alone; where the decoder's call changes another buffer of a module to which it
    refers, an error says so. Of random numbers, those of Torch's own generators and of `generator` are had again. With
    `chunk=n_samples` the decoder runs once, and its graph is kept.

    The decoder's own graph is released with the backward pass. To use something else from inside it in another loss, or to
    differentiate twice, compose `sample_kl`, the decoder and `loss(..., kl=kl)`; that is also what happens here, with the
    same results, under `torch.compile` and `torch.func`, with a likelihood of several parameters, another posterior or prior, a
    weighting, weights or a monitor, and where the decoder uses a tensor that is neither a leaf nor computed in it, a leaf with
    hooks or one that the encoder uses too, or an autograd Function written in Python, as reentrant checkpoints and FSDP do.
    Where the graph of several samples cannot be built again, all of it is kept: under `torch.compile` and `torch.func`, and,
    with a warning, where `eps` requires grad or the decoder uses such tensors or Functions; weights that it shares with the
    encoder, and compiled modules, are no such ones.

    Args:
        decoder: a module, bound method or function from z, of the shape of `mu`, to `recon_x`: a prediction of the shape of
            `x`, or the parameters of the likelihood.
        x, mu, logvar, beta, likelihood, posterior, prior, weighting, weight, reduction, scale, target_scale, monitor: as in
            `loss`.
        eps, generator: as in `reparameterize`; with several samples or another bound, `eps` is `[n_samples, *mu.shape]`.
        n_samples: samples of z for each datum.
        bound: `"elbo"`, or `"iwae"`, which takes no `weighting` and the reductions `"sum"`, `"batchmean"` and `"none"`.
        estimator: of the gradient of `"iwae"`. `"standard"`: the derivative of the loss. `"stl"`: sticking the landing (Roeder
            et al., 2017): of log q, only what comes by way of z; biased for K > 1. `"dreg"`: doubly reparameterized (Tucker et
            al., 2019): without bias, and its signal does not fade as K grows. Where q is the posterior, the encoder's
            gradients by these two are 0 for all noise. They have no second derivatives, and `"dreg"` cannot be compiled.
        chunk: samples that go through the decoder at a time, as `[chunk * B, ...]`: more is faster, in more memory. It has a
            part in which noise and masks are drawn for a seed, and a batch normalization sees a whole chunk.

    Returns:
        `ELBOTerms(loss, recon, kl)`, as `loss`.

    Raises:
        TypeError, ValueError: as `loss`; also if the decoder returns anything but a tensor of the shape of `x`, or the
            parameters of the likelihood.
        RuntimeError: in backward with `create_graph=True` or `is_grads_batched=True`, or if a leaf that the decoder uses was
            given a hook after this call, or, where the decoder runs again, was written to; or if the decoder changes its state.
    """
    if not callable(decoder):
        raise TypeError(f"decoder must be callable, got {type(decoder).__name__}")
    n_samples, chunk = check_sampling(n_samples, bound, estimator, chunk)
    if n_samples > 1 or bound != "elbo":
        return many_samples(
            decoder, x, mu, logvar, beta, likelihood=likelihood, posterior=posterior, prior=prior, weighting=weighting,
            weight=weight, reduction=reduction, eps=eps, generator=generator, scale=scale, target_scale=target_scale,
            monitor=monitor, n_samples=n_samples, bound=bound, estimator=estimator, chunk=chunk,
        )  # fmt: skip
    if not _is_plain(None, mu, beta, likelihood, posterior, prior, weighting, weight, scale, monitor):
        return _composed(
            decoder, x, mu, logvar, beta, likelihood, posterior, prior, weighting, weight, reduction, eps, generator, scale,
            target_scale, monitor,
        )  # fmt: skip
    # All that can be checked before the decoder runs, which may draw noise and move statistics.
    check_latents(mu, logvar)
    check_reals("x", x)
    check_device("x", x, "mu", mu)
    check_batch("x", x, "mu", mu)
    options = _check_options(mu, beta, likelihood, scale, target_scale)
    recon_reduction, kl_reduction = split_reduction(reduction)
    noise = draw(mu, logvar, eps, generator)
    kl_weight = factor_of(kl_reduction, mu)
    z, kl = sample(mu, logvar, noise, kl_weight, kl_reduction == "none", wants_kl=True)
    # Taken before the decoder runs, which may write to z.
    edge = torch.autograd.graph.get_gradient_edge(z) if z.requires_grad and not is_traced(x, z) else None
    prediction = unwrapped(decoder(z))
    if isinstance(prediction, tuple | list) and len(find_likelihood(likelihood).parameters) > 1:
        divergence = kl, times(options.beta, kl), None
        term = check_reconstruction("decoder(z)", prediction, x, likelihood, None, recon_reduction, scale, target_scale)
        return add_terms(term, divergence, None)
    if isinstance(prediction, tuple | list):
        raise TypeError(
            f"decoder(z) must be a tensor, got {type(prediction).__name__}: pass the decoder alone, not the whole VAE, or"
            " lambda z: decoder(z)[0]"
        )
    check_prediction("decoder(z)", prediction)
    settings, beta = _check_loss("decoder(z)", prediction, x, None, None, kl, options, recon_reduction)
    # A leaf that is itself the prediction, and noise that requires grad, are for the composed path.
    if edge is not None and prediction.grad_fn is not None and not (noise.requires_grad or is_traced(prediction)):
        leaves = decoder_leaves([prediction], edge)
        if leaves is not None:
            settings = settings._replace(weights=(settings.weights[0], kl_weight))
            # Here and not in the Function, whose gradients are by the tensors that it is given.
            (mu, logvar), (x,) = dense(mu, logvar), in_layout(layout_of(prediction), x)
            terms = Elbo.apply(settings, (prediction, edge), noise, x, mu, logvar, kl.detach(), beta, *leaves)
            return finish(settings, "decoder(z)", prediction, x, terms)
    return plain_terms(settings, "decoder(z)", prediction, x, None, None, kl, beta)


def _is_plain(recon_x, mu, beta, likelihood, posterior, prior, weighting, weight, scale, monitor) -> bool:
    """Whether one kernel computes it all: one parameter and a fixed scale, no weights, N(0, I), nothing unusual."""
    return (
        isinstance(likelihood, str)
        and likelihood in PLAIN
        and posterior == "logvar"
        and prior is weighting is weight is monitor is None
        and not isinstance(recon_x, (tuple, list))
        and not isinstance(mu, Distribution)
        and not (isinstance(beta, Tensor) and beta.dim() > 0)
        and not (isinstance(scale, Tensor) and (scale.requires_grad or scale.dim() > 0))
    )


def _composed(
    decoder, x, mu, logvar, beta, likelihood, posterior, prior, weighting, weight, reduction, eps, generator, scale,
    target_scale, monitor,
) -> ELBOTerms:  # fmt: skip
    """`elbo` of anything that is not plain."""
    recon_reduction, kl_reduction = check_terms(mu, logvar, None, posterior, prior, weighting, reduction, monitor)
    mu, second, posterior = check_gaussian(mu, logvar, posterior)
    prior = check_prior(prior, mu)
    find_likelihood(likelihood)
    check_reals("x", x)
    check_device("x", x, "mu", mu)
    check_batch("x", x, "mu", mu)
    if weighting is None and monitor is None and not (isinstance(beta, Tensor) and beta.dim() > 0):
        beta = check_number("beta", beta, mu)
        z, kl, *_ = sample_of(mu, second, posterior, prior, kl_reduction, eps, generator)
        divergence = kl, times(beta, kl), None
    else:
        divergence = divergence_of(mu, second, beta, posterior, prior, weighting, kl_reduction, monitor)
        z = sample_of(mu, second, posterior, None, None, eps, generator).z
    prediction = unwrapped(decoder(z))
    term = check_reconstruction("decoder(z)", prediction, x, likelihood, weight, recon_reduction, scale, target_scale)
    return add_terms(term, divergence, monitor)


class Options(NamedTuple):
    """What of a call can be checked without its prediction."""

    likelihood: str
    beta: float | Tensor
    scale: float | Tensor
    target_scale: float


def _check_options(like: Tensor, beta, likelihood, scale, target_scale) -> Options:
    scale = check_scale(scale, find_likelihood(likelihood), like)
    return Options(likelihood, check_number("beta", beta, like), scale, check_real("target_scale", target_scale))


def _check_loss(name, recon_x, x, mu, logvar, kl, options: Options, reduction) -> tuple[Settings, float | Tensor]:
    """The settings of a call and its beta, once prediction and target, each good by itself, are found to fit the rest."""
    check_alike(name, recon_x, "x", x)
    if kl is None:
        if mu is None or logvar is None:
            raise ValueError("give mu and logvar, or kl: got " + given_or_not(mu=mu, logvar=logvar))
        check_latents(mu, logvar)
        check_device("mu", mu, name, recon_x)
        check_batch("mu", mu, name, recon_x)
        recon_reduction, kl_reduction = split_reduction(reduction)
        dtype, kl_weight = result_dtype(recon_x, mu, logvar), factor_of(kl_reduction, mu)
    else:
        if mu is not None or logvar is not None:
            raise ValueError("give mu and logvar, or kl, not both: got " + given_or_not(mu=mu, logvar=logvar, kl=kl))
        if isinstance(reduction, tuple | list):
            raise ValueError(f"reduction must be one name where kl is given, which is reduced already; got {reduction!r}")
        recon_reduction, _ = split_reduction(reduction)
        _check_kl(kl, recon_reduction, recon_x)
        dtype, kl_weight = result_dtype(recon_x, kl), 1.0
    settings = Settings(
        likelihood=options.likelihood,
        scale=options.scale,
        target_scale=options.target_scale,
        weights=(factor_of(recon_reduction, recon_x), kl_weight),
        per_sample=recon_reduction == "none",
        dtype=dtype,
    )
    return settings, options.beta


def _check_kl(kl, reduction: str, recon_x: Tensor) -> None:
    check_floats("kl", kl)
    expected = recon_x.shape[:1] if reduction == "none" else ()
    if kl.shape != expected:
        raise ValueError(f"kl must have shape {tuple(expected)} for the reduction {reduction!r}, got {tuple(kl.shape)}")
    check_device("kl", kl, "the prediction", recon_x)
