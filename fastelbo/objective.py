"""The objective: `loss` from a decoder's output, `elbo` around the decoder."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import traced
from .arguments import (
    check_alike,
    check_batch,
    check_device,
    check_latents,
    check_number,
    check_prediction,
    check_real,
    check_scale,
    check_target,
    check_unit_interval,
    find_likelihood,
    split_reduction,
    weight,
)
from .autograd import Elbo, Loss, Settings, decoder_leaves, loss_forward
from .layout import dense
from .likelihoods import LIKELIHOODS
from .sampling import draw, result_dtype, sample
from .tracing import is_traced

Reduction = str | tuple[str, str]


class ELBOTerms(NamedTuple):
    """The negative ELBO and its two terms, in nats: three separate tensors, `[]`, or `[B]` with `reduction="none"`."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


def loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    beta: float | Tensor = 1.0,
    *,
    kl: Tensor | None = None,
    likelihood: str = "bernoulli",
    reduction: Reduction = "sum",
    scale: float | Tensor | None = None,
    target_scale: float = 1.0,
) -> ELBOTerms:
    """Negative ELBO of a VAE: `recon + beta * kl`, with `recon = -log p(x | z)` and `kl = KL(N(mu, exp(logvar)) || N(0, I))`.

    A drop-in for the usual `elbo_loss(recon_x, x, mu, logvar)`, differentiable by every tensor argument.

    Args:
        recon_x: the decoder's output, `[B, ...]`, float16, bfloat16, float32 or float64.
        x: the target, of the shape of `recon_x` and any real dtype; integers and booleans are converted on the fly.
        mu: mean of the encoder's Gaussian, `[B, ...]`, of any such shape and floating dtype.
        logvar: logarithm of its variance, of the shape of `mu`.
        beta: weight of the KL (Higgins et al., beta-VAE, 2017): a number or a 0-d tensor.
        kl: a KL from `sample_kl`, already reduced, in place of `mu` and `logvar`: `[]`, or `[B]` with `reduction="none"`.
        likelihood: what `recon_x` parametrizes. `"bernoulli"`: probabilities, as `F.binary_cross_entropy`;
            `"bernoulli_logits"`: logits, as `F.binary_cross_entropy_with_logits`; `"mse"`: as `F.mse_loss`;
            `"gaussian"`: means, as `-Normal(recon_x, scale).log_prob(x)`.
        reduction: `"sum"`, `"batchmean"` (sum / B), `"mean"` (over all elements of a term), `"none"` (one value a sample), or a
            pair for reconstruction and KL. Where processes average gradients (DDP, FSDP), those of `"batchmean"` and `"mean"`
            are the joint batch's, and those of `"sum"` are 1/world of them.
        scale: standard deviation of `"gaussian"`, positive: a number or a 0-d tensor without grad. Default 1.
        target_scale: `x` is multiplied by it, such as 1/255 for `uint8` images.

    Returns:
        `ELBOTerms(loss, recon, kl)`: float64 if an input is, otherwise float32.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or names do not fit; `scale` is not positive; on a CPU, probabilities or the targets of
            `"bernoulli"`, or integer targets of `"bernoulli_logits"`, are outside [0, 1]. On a GPU, looking would need a sync,
            and a tracer sees no values: such probabilities and scales give NaN there, such targets a loss that means nothing.
    """
    check_prediction("recon_x", recon_x)
    check_target("x", x)
    options = _check_options(recon_x, beta, likelihood, scale, target_scale)
    settings, beta = _check_loss("recon_x", recon_x, x, mu, logvar, kl, options, reduction)
    return _loss(settings, "recon_x", recon_x, x, mu, logvar, kl, beta)


def elbo(
    decoder: Callable[[Tensor], Tensor],
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    beta: float | Tensor = 1.0,
    *,
    likelihood: str = "bernoulli",
    reduction: Reduction = "sum",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    scale: float | Tensor | None = None,
    target_scale: float = 1.0,
) -> ELBOTerms:
    """Negative ELBO of a VAE around its decoder: sample z, decode it, and return `loss(decoder(z), x, mu, logvar, beta)`.

    Sampling, KL, decoder and reconstruction are one autograd Function: gradients reach `mu`, `logvar`, `x`, `beta`, and every
    parameter and other tensor that the decoder uses.

    The decoder's own graph is released with the backward pass. To use something else from inside it in another loss, or to
    differentiate twice, compose `sample_kl`, the decoder and `loss(..., kl=kl)`; that is also what happens here, with the
    same results, under `torch.compile` and `torch.func`, and where the decoder uses a tensor that is neither a leaf nor
    computed in it, a leaf with hooks or one that the encoder uses too, or an autograd Function written in Python, as reentrant
    checkpoints and FSDP do.

    Args:
        decoder: a module, bound method or function from z, of the shape of `mu`, to a prediction of the shape of `x`.
        x, mu, logvar, beta, likelihood, reduction, scale, target_scale: as in `loss`.
        eps, generator: as in `reparameterize`.

    Returns:
        `ELBOTerms(loss, recon, kl)`, as `loss`.

    Raises:
        TypeError, ValueError: as `loss`; also if the decoder returns anything but a tensor of the shape of `x`.
        RuntimeError: in backward with `create_graph=True` or `is_grads_batched=True`, or if a leaf that the decoder uses was
            given a hook after this call.
    """
    if not callable(decoder):
        raise TypeError(f"decoder must be callable, got {type(decoder).__name__}")
    # All that can be checked before the decoder runs, which may draw noise and move statistics.
    check_latents(mu, logvar)
    check_target("x", x)
    check_device("x", x, "mu", mu)
    check_batch("x", x, "mu", mu)
    options = _check_options(mu, beta, likelihood, scale, target_scale)
    recon_reduction, kl_reduction = split_reduction(reduction)
    noise = draw(mu, logvar, eps, generator)
    kl_weight = weight(kl_reduction, mu)
    z, kl = sample(mu, logvar, noise, kl_weight, kl_reduction == "none", wants_kl=True)
    # Taken before the decoder runs, which may write to z.
    edge = torch.autograd.graph.get_gradient_edge(z) if z.requires_grad and not is_traced(x, z) else None
    prediction = decoder(z)
    if isinstance(prediction, tuple | list):
        raise TypeError(
            f"decoder(z) must be a tensor, got {type(prediction).__name__}: pass the decoder alone, not the whole VAE, or"
            " lambda z: decoder(z)[0]"
        )
    check_prediction("decoder(z)", prediction)
    settings, beta = _check_loss("decoder(z)", prediction, x, None, None, kl, options, recon_reduction)
    # A leaf that is itself the prediction, and noise that requires grad, are for the composed path.
    if edge is not None and prediction.grad_fn is not None and not (noise.requires_grad or is_traced(prediction)):
        leaves = decoder_leaves(prediction, edge)
        if leaves is not None:
            settings = settings._replace(weights=(settings.weights[0], kl_weight))
            (mu, logvar), kl = dense(mu, logvar), kl.detach()
            terms = Elbo.apply(settings, (prediction, edge), noise, x, mu, logvar, kl, beta, *leaves)
            return _finish(settings, "decoder(z)", prediction, x, terms)
    return _loss(settings, "decoder(z)", prediction, x, None, None, kl, beta)


class Options(NamedTuple):
    """What of a call can be checked without its prediction."""

    likelihood: str
    beta: float | Tensor
    scale: float | Tensor
    target_scale: float


def _check_options(like: Tensor, beta, likelihood, scale, target_scale) -> Options:
    row = find_likelihood(likelihood)
    return Options(
        row.name, check_number("beta", beta, like), check_scale(scale, row, like), check_real("target_scale", target_scale)
    )


def _check_loss(name, recon_x, x, mu, logvar, kl, options: Options, reduction) -> tuple[Settings, float | Tensor]:
    """The settings of a call and its beta, once prediction and target, each good by itself, are found to fit the rest."""
    check_alike(name, recon_x, "x", x)
    if kl is None:
        if mu is None or logvar is None:
            raise ValueError("give mu and logvar, or kl: got " + _given(mu=mu, logvar=logvar))
        check_latents(mu, logvar)
        check_device("mu", mu, name, recon_x)
        check_batch("mu", mu, name, recon_x)
        recon_reduction, kl_reduction = split_reduction(reduction)
        dtype, kl_weight = result_dtype(recon_x, mu, logvar), weight(kl_reduction, mu)
    else:
        if mu is not None or logvar is not None:
            raise ValueError("give mu and logvar, or kl, not both: got " + _given(mu=mu, logvar=logvar, kl=kl))
        if isinstance(reduction, tuple | list):
            raise ValueError(f"reduction must be one name where kl is given, which is reduced already; got {reduction!r}")
        recon_reduction, _ = split_reduction(reduction)
        _check_kl(kl, recon_reduction, recon_x)
        dtype, kl_weight = result_dtype(recon_x, kl), 1.0
    settings = Settings(
        likelihood=options.likelihood,
        scale=options.scale,
        target_scale=options.target_scale,
        weights=(weight(recon_reduction, recon_x), kl_weight),
        per_sample=recon_reduction == "none",
        dtype=dtype,
    )
    return settings, options.beta


def _check_kl(kl, reduction: str, recon_x: Tensor) -> None:
    if not isinstance(kl, Tensor):
        raise TypeError(f"kl must be a tensor, got {type(kl).__name__}")
    if not kl.is_floating_point():
        raise TypeError(f"kl must be of a floating dtype, got {kl.dtype}")
    expected = recon_x.shape[:1] if reduction == "none" else ()
    if kl.shape != expected:
        raise ValueError(f"kl must have shape {tuple(expected)} for the reduction {reduction!r}, got {tuple(kl.shape)}")
    check_device("kl", kl, "the prediction", recon_x)


def _given(**arguments) -> str:
    return ", ".join(f"{name} {'None' if value is None else 'given'}" for name, value in arguments.items())


def _loss(settings: Settings, name: str, recon_x, x, mu, logvar, kl, beta) -> ELBOTerms:
    if is_traced(recon_x, x, mu, logvar, kl, beta):
        return ELBOTerms(*traced.objective(recon_x, x, mu, logvar, kl, beta, **settings._asdict()))
    (recon_x, x), (mu, logvar) = dense(recon_x, x), dense(mu, logvar)
    tensors = (recon_x, x, mu, logvar, kl, beta)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        terms = Loss.apply(settings, *tensors)
    else:
        terms = loss_forward(settings, *tensors)[:3]
    return _finish(settings, name, recon_x, x, terms)


def _finish(settings: Settings, name: str, recon_x: Tensor, x: Tensor, terms) -> ELBOTerms:
    """Raise for what lies outside [0, 1], on a CPU, where looking costs no sync."""
    row, recon = LIKELIHOODS[settings.likelihood], terms[1]
    if recon.device.type == "cpu":
        if row.probabilities and recon.isnan().any():  # a logarithm of something negative
            check_unit_interval(name, recon_x, row, "for logits use likelihood='bernoulli_logits'")
        # As Torch does, logits go with any floating target; bytes above 1 are images that were not scaled.
        if row.binary and (row.probabilities or not x.is_floating_point()):
            check_unit_interval("x", x, row, "for 8-bit images pass target_scale=1/255", settings.target_scale)
    return ELBOTerms(*terms)
