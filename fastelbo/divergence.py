"""The KL of the posterior from the prior, and what of it enters the objective: free bits, capacity, balance, a beta each."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from . import formula, posteriors, torch_backend
from .arguments import REDUCTIONS, check_device, check_number, check_reals, check_reduction, factor_of
from .backend import backend_for
from .layout import dense, in_layout, layout_of
from .operators import ops
from .posteriors import LOGVAR, Posterior, Prior, check_gaussian, check_posterior, check_prior, kl_elements, result_dtype
from .scalars import check_real
from .tracing import is_traced, needs_formula, never_compiled

__all__ = ["Posterior", "Weighting", "check_posterior", "check_prior", "check_weighting", "divergence_terms", "kl_divergence"]

FREE_BITS_PER = ("element", "dimension", "channel", "sample", "batch")
CAPACITY_PER = ("batch", "sample")


class Weighting(NamedTuple):
    """What of the KL enters the objective, in nats. B samples b, with latent dimensions d; all of it is times beta.

    Attributes:
        free_bits: lambda: a KL below it counts as lambda and has no gradient. None: no free bits.
        free_bits_per: `"element"`: the sum over b and d of max(lambda, KL_bd). `"dimension"`: the sum over d of max(lambda,
            mean over b of KL_bd), the objective of Kingma et al. (Improved Variational Inference with Inverse Autoregressive
            Flow, 2016) where each dimension is a group. `"channel"`: likewise, where each channel of `[B, C, ...]` is one, as
            in their code. `"sample"`: the sum over b of max(lambda, KL_b), the free nats of DreamerV3 (Hafner et al., 2023).
            `"batch"`: max(lambda, mean over b of KL_b), those of DreamerV1 and V2 (Hafner et al., 2020, 2021).
        capacity: C: the KL is drawn to it by |KL - C| (Burgess et al., Understanding disentangling in beta-VAE, 2018), whose
            gamma is beta here. A number or a 0-d tensor, which may change from step to step. None: no capacity.
        capacity_per: `"batch"`: |mean over b of KL_b - C|. `"sample"`: the mean over b of |KL_b - C|, as pythae's
            DisentangledBetaVAE.
        balance: (a, b): a KL(q || sg(p)) + b KL(sg(q) || p), sg being what has no gradient: the value is a + b times the KL (or
            what free bits or capacity make of it), and the gradients by posterior q and prior p are a and b times theirs.
            DreamerV2 (Hafner et al., 2021): (0.2, 0.8); DreamerV3's code: (0.1, 1.0), its `rep` and `dyn`. Needs a prior.
    """

    free_bits: float | None = None
    free_bits_per: str = "element"
    capacity: float | Tensor | None = None
    capacity_per: str = "batch"
    balance: tuple[float, float] | None = None


PLAIN = Weighting()


def kl_divergence(
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    *,
    posterior: str | Posterior = "logvar",
    reduction: str = "sum",
) -> Tensor:
    """KL(N(mu, sigma^2) || prior), in nats, differentiable by every tensor.

    Args:
        mu: mean, `[B, ...]`, float16, bfloat16, float32 or float64; or a `torch.distributions.Normal`, or an `Independent` of
            one, which stands for `mu` and `logvar`.
        logvar: logarithm of the variance, of the shape of `mu`, or what `posterior` says that it is.
        prior: None: N(0, I). A pair `(mu, logvar)` of tensors, or a Normal or an Independent of one, of the shape of `mu` or
            one that broadcasts to it. Its deviations have to be positive: an infinite KL or NaN comes of others.
        posterior: what `logvar` is: `"logvar"`, `"log_std"`, `"std"`, `"var"`, or a `Posterior`.
        reduction: `"sum"`, `"batchmean"` (sum / B), `"mean"` (over all elements), `"none"` (one value a sample, `[B]`),
            `"dimension"` (the mean over the batch, `mu.shape[1:]`), or `"element"` (of the shape of `mu`).

    Returns:
        The KL: float64 if an input is, otherwise float32.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or has an unknown name.
    """
    mu, second, posterior = check_gaussian(mu, logvar, posterior)
    prior = check_prior(prior, mu)
    if reduction not in ("dimension", "element"):
        if not isinstance(reduction, str) or reduction not in REDUCTIONS:
            names = (*REDUCTIONS, "dimension", "element")
            raise ValueError(f"reduction must be one of {', '.join(map(repr, names))}; got {reduction!r}")
    batch, kind = mu.shape[0], KINDS.get(reduction, "sum")
    scale = (1 / batch if batch else torch.nan) if reduction == "dimension" else factor_of(reduction, mu)
    return reduced(mu, second, posterior, prior, kind, scale=scale).kl


KINDS = {"none": "row", "dimension": "column", "element": "element"}


class Reduced(NamedTuple):
    """What `reduced` computes. The KLs are reduced alike: `[]`, `[B]`, `mu.shape[1:]` or `mu.shape`."""

    z: Tensor | None
    kl: Tensor | None
    weighted: Tensor | None  # free bits per element and balance are in it; where there are none it is `kl`
    sums: tuple[Tensor, Tensor] | None = None  # over the batch, of mu and mu^2; no gradient


def reduced(
    mu: Tensor,
    second: Tensor,
    posterior: Posterior,
    prior: Prior | None,
    kind: str | None,
    *,
    noise: Tensor | None = None,
    scale: float = 1.0,
    free_bits: float | None = None,
    balance: tuple[float, float] | None = None,
    statistics: bool = False,
) -> Reduced:
    """The KL summed over everything (`kind` "sum"), each sample ("row"), the batch ("column") or nothing ("element").

    `kind` None: no KL. The sums are times `scale`, which is 1 for elements. `noise` makes a sample too, but not with "column".
    `free_bits` is a floor under each element. `balance` are the shares, 1 in all, of the gradient of `weighted` that goes to
    the posterior and to the prior. `statistics` go with "column".
    """
    if kind == "element" and free_bits is not None:  # once more from what is written anyway
        z, kl, weighted, _ = reduced(mu, second, posterior, prior, kind, noise=noise, scale=scale, balance=balance)
        return Reduced(z, kl, torch.where(kl <= free_bits, free_bits, weighted))
    options = posterior, kind, scale, free_bits, balance, statistics
    tensors = mu, second, *(prior or ())[:2]
    if is_traced(*tensors, noise) or backend_for(mu.device) is torch_backend or (noise is not None and noise.requires_grad):
        return _formula(mu, second, prior, noise, *options)
    prior_parameter = None
    if prior is None:
        tensors = *tensors, None, None
    else:
        prior_parameter = prior.parameter
    settings = Settings(*options[:-1], prior_parameter, layout_of(mu), _dtype(mu, second, prior))
    tensors = *dense(*tensors[:2]), *tensors[2:]
    if noise is not None and noise.is_floating_point():
        (noise,) = in_layout(settings.layout, noise)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        z, kl, weighted, *sums = Divergence.apply(settings, statistics, noise, *tensors)
    else:
        z, kl, weighted, *sums = _forward(settings, statistics, noise, *tensors)
    return Reduced(z, kl, kl if weighted is None else weighted, tuple(sums) or None)


class Settings(NamedTuple):
    """What `Divergence` computes, beside its tensors: as `reduced` has it, the name of what parametrizes the prior, the memory
    format of the latents, and the dtype of results and arithmetic."""

    posterior: Posterior
    kind: str | None
    scale: float
    free_bits: float | None
    balance: tuple[float, float] | None
    prior: str | None
    layout: torch.memory_format
    dtype: torch.dtype

    def primitive(self) -> dict:
        """The arguments that the primitives have in common."""
        return {
            "posterior": self.posterior.parameter, "clamp": self.posterior.clamp, "prior": self.prior, "scale": self.scale,
            "dtype": self.dtype,
        }  # fmt: skip


class Divergence(torch.autograd.Function):
    """`reduced` by the kernels. The latents come dense, the prior's tensors expanded, and None where it is N(0, I)."""

    @staticmethod
    @never_compiled
    def forward(ctx, settings: Settings, statistics: bool, noise, mu, second, prior_mu, prior_second):
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.save_for_backward(noise, mu, second, prior_mu, prior_second)
        z, kl, weighted, *sums = _forward(settings, statistics, noise, mu, second, prior_mu, prior_second)
        ctx.mark_non_differentiable(*sums)
        return z, kl, weighted, *sums

    @staticmethod
    @never_compiled
    def backward(ctx, grad_z, grad_kl, grad_weighted, *_):
        settings, needs, upstreams = ctx.settings, ctx.needs_input_grad[3:], (grad_z, grad_kl, grad_weighted)
        noise, *tensors = ctx.saved_tensors
        if needs_formula(upstreams):
            return None, None, None, *_differentiated(settings, noise, tensors, needs, upstreams)
        if all(g is None for g in upstreams):
            return (None,) * 7
        from .kernels.divergence import divergence_backward  # not above: Triton may be missing

        tensors = _laid_out(settings.layout, *tensors)
        if noise is not None and noise.is_floating_point():
            (noise,) = in_layout(settings.layout, noise)
        (grad_z,) = in_layout(settings.layout, grad_z)
        grads = divergence_backward(
            grad_z, _as_latents(settings, grad_kl), _as_latents(settings, grad_weighted), *tensors[:2], noise, *tensors[2:],
            needs[2:], kind=settings.kind, floor=settings.free_bits, shares=settings.balance or (1.0, 1.0),
            **settings.primitive(),
        )  # fmt: skip
        return None, None, None, *grads


@never_compiled
def _forward(settings: Settings, statistics: bool, noise, *tensors):
    """`(z, kl, weighted, and the sums of mu and mu^2 if there are statistics)`, the rest None where it is not computed."""
    from .kernels.divergence import divergence_columns, divergence_forward

    mu, second, prior_mu, prior_second = _laid_out(settings.layout, *tensors)
    if settings.kind == "column":
        z = weighted = None
        kl, sums = divergence_columns(
            mu, second, prior_mu, prior_second, layout=settings.layout, statistics=statistics, **settings.primitive()
        )
    else:
        z, kl, weighted = divergence_forward(
            mu, second, noise, prior_mu, prior_second, kind=settings.kind, floor=settings.free_bits, **settings.primitive()
        )
        sums = None
    if settings.balance is not None and weighted is None:
        weighted = kl.clone()  # the same number, whose gradient is another
    return z, kl, weighted, *(sums or ())


def _laid_out(layout: torch.memory_format, mu, second, prior_mu, prior_second) -> list[Tensor | None]:
    """All in that memory format; what is the same for the whole batch is one sample of it."""
    priors = (p if p is None or p.shape[0] < 2 or p.stride(0) else p[:1] for p in (prior_mu, prior_second))
    return in_layout(layout, mu, second, *priors)


def _as_latents(settings: Settings, upstream: Tensor | None) -> Tensor | None:
    """In memory as the latents are, or one sample of them."""
    if upstream is None or settings.kind not in ("column", "element"):
        return upstream if upstream is None else upstream.contiguous()
    upstream = upstream.unsqueeze(0) if settings.kind == "column" else upstream
    return upstream.contiguous(memory_format=settings.layout)


def _differentiated(settings: Settings, noise, tensors, needs, upstreams) -> list[Tensor | None]:
    """Gradients of the formula by mu, second, and the prior's two tensors."""
    if noise is not None and not noise.is_floating_point():  # a sample with mean 0 and logvar 0 is the noise itself
        zeros = torch.zeros_like(tensors[0], dtype=settings.dtype, memory_format=settings.layout)
        noise = ops.reparameterize(zeros, zeros, noise, settings.dtype)

    def outputs(mu, second, prior_mu, prior_second):
        prior = None if settings.prior is None else Prior(prior_mu, prior_second, settings.prior)
        return _formula(mu, second, prior, noise, *settings[:5], False)[:3]

    return formula.differentiate(outputs, tensors, needs, upstreams)


def _formula(mu, second, prior, noise, posterior, kind, scale, free_bits, balance, statistics) -> Reduced:
    dtype = _dtype(mu, second, prior)
    z = None if noise is None else posteriors.sample(mu, second, noise, posterior, dtype)
    if kind is None:
        return Reduced(z, None, None)
    elements = weighted = kl_elements(mu, second, prior, posterior, dtype)
    if balance is not None:
        fixed = Prior(prior.mu.detach(), prior.second.detach(), prior.parameter)
        to_posterior = kl_elements(mu, second, fixed, posterior, dtype)
        to_prior = kl_elements(mu.detach(), second.detach(), prior, posterior, dtype)
        weighted = balance[0] * to_posterior + balance[1] * to_prior
    if free_bits is not None:
        weighted = torch.where(elements <= free_bits, free_bits, weighted)
    kl = _scaled(_reduced(elements, kind), scale)
    sums = None
    if statistics:
        means = mu.detach().to(dtype)
        sums = means.sum(0), means.square().sum(0)
    return Reduced(z, kl, kl if weighted is elements else _scaled(_reduced(weighted, kind), scale), sums)


def _reduced(elements: Tensor, kind: str) -> Tensor:
    if kind == "row":
        return elements.flatten(1).sum(1) if elements.dim() > 1 else elements
    if kind == "element":
        return elements
    return elements.sum(0) if kind == "column" else elements.sum()


def _scaled(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor


def _dtype(mu: Tensor, second: Tensor, prior: Prior | None) -> torch.dtype:
    return result_dtype(mu, second) if prior is None else result_dtype(mu, second, prior.mu, prior.second)


class Statistics(NamedTuple):
    """What diagnostics are made of, from the pass that computed the KL: each of the shape `mu.shape[1:]`, without gradient."""

    kl: Tensor  # the mean over the batch
    mu_sum: Tensor  # sums over the batch
    mu_square_sum: Tensor


def divergence_terms(
    mu: Tensor,
    second: Tensor,
    *,
    posterior: Posterior = LOGVAR,
    prior: Prior | None = None,
    weighting: Weighting = PLAIN,
    beta: float | Tensor = 1.0,
    reduction: str = "sum",
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Statistics | None]:
    """The KL, and what of it is added to the reconstruction: `(kl, weighted, statistics or None)`.

    The arguments are those that `check_gaussian`, `check_prior`, `check_weighting` and `check_beta` return. `kl` is the true
    KL, reduced. `weighted` is beta times what `weighting` makes of it, which is a mean over samples, scaled likewise: times B
    with the reduction "sum", over D with "mean"; with "none" it is one value a sample.
    """
    batch = mu.shape[0]
    scale = factor_of(reduction, mu)
    each = isinstance(beta, Tensor) and beta.dim() > 0  # a beta for each dimension
    free_bits, capacity, balance = weighting.free_bits, weighting.capacity, weighting.balance
    floor = free_bits if weighting.free_bits_per == "element" else None

    per_sample = reduction == "none" or (free_bits is not None and weighting.free_bits_per == "sample")
    per_sample = per_sample or (capacity is not None and weighting.capacity_per == "sample")
    per_dimension = each or (free_bits is not None and weighting.free_bits_per in ("dimension", "channel"))
    if per_dimension and (per_sample or floor is not None):
        kind = "element"
    elif per_sample or floor is not None:
        kind = "row" if per_sample else "sum"
    else:
        kind = "column" if per_dimension or statistics else "sum"

    total, shares = 1.0, None
    if balance is not None:
        total = balance[0] + balance[1]
        shares = balance[0] / total, balance[1] / total
    _, kl, weighted, sums = reduced(
        mu, second, posterior, prior, kind, free_bits=floor, balance=shares, statistics=statistics and kind == "column"
    )
    found = None
    if statistics:
        if kind != "column":
            with torch.no_grad():
                _, columns, _, sums = reduced(mu, second, posterior, prior, "column", statistics=True)
        else:
            columns = kl.detach()
        found = Statistics(columns * (1 / batch if batch else torch.nan), *sums)

    if isinstance(beta, Tensor):
        beta = beta.to(kl.dtype)
    if free_bits is not None and floor is None:
        if weighting.free_bits_per == "channel" and weighted.dim() > 1:
            weighted = weighted.flatten(1).sum(1)
        elif weighting.free_bits_per == "batch":
            weighted = weighted.sum()
        bound = free_bits if weighting.free_bits_per == "sample" else free_bits * batch  # of sums over the batch
        weighted = torch.where(weighted <= bound, bound, weighted)
    if each:
        weighted = weighted * beta
    elif kind == "column":
        weighted = weighted.sum()
    if each and kind == "column":
        weighted = weighted.sum()
    if kind == "element":
        kl, weighted = (_reduced(t, "row" if reduction == "none" else "sum") for t in (kl, weighted))
    elif kind == "column":
        kl = kl.sum()
    if capacity is not None:
        if isinstance(capacity, Tensor):
            capacity = capacity.to(kl.dtype)
        weighted = (weighted - (capacity if per_sample else capacity * batch)).abs()
    if kind == "row" and reduction != "none":
        kl, weighted = kl.sum(), weighted.sum()
    if not each:
        weighted = weighted * beta
    return _scaled(kl, scale), _scaled(weighted, scale * total), found


def check_beta(beta, mu: Tensor) -> float | Tensor:
    """A number, a 0-d tensor, or a tensor that broadcasts to `mu.shape[1:]`: one for each latent dimension or group of them."""
    if not isinstance(beta, Tensor) or beta.dim() == 0:
        return check_number("beta", beta, mu)
    check_reals("beta", beta)
    check_device("beta", beta, "mu", mu)
    try:
        return beta.expand(mu.shape[1:])
    except RuntimeError:
        raise ValueError(
            "beta must be a number, a 0-d tensor or a tensor that broadcasts to a sample of mu:"
            f" got beta {tuple(beta.shape)} and mu {tuple(mu.shape)}"
        ) from None


def check_weighting(weighting, mu: Tensor, prior=None, beta: float | Tensor = 1.0, reduction: str = "sum") -> Weighting:
    """A `Weighting` that makes sense and goes with the rest of the call; None stands for the plain KL."""
    if weighting is None:
        return PLAIN
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be a Weighting, got {type(weighting).__name__}")
    check_reduction(reduction)
    free_bits, free_bits_per, capacity, capacity_per, balance = weighting
    each = isinstance(beta, Tensor) and beta.dim() > 0
    _check_name("weighting.free_bits_per", free_bits_per, FREE_BITS_PER)
    _check_name("weighting.capacity_per", capacity_per, CAPACITY_PER)
    if free_bits is not None:
        if capacity is not None:
            raise ValueError("weighting.free_bits and weighting.capacity exclude each other: give one of them")
        free_bits = check_real("weighting.free_bits", free_bits, "a number or None")
        if not free_bits >= 0:
            raise ValueError(f"weighting.free_bits must not be negative, got {free_bits}")
        if each and free_bits_per not in ("element", "dimension"):
            raise ValueError(
                f"weighting.free_bits_per={free_bits_per!r} needs a beta that is one number, not one for each dimension"
            )
        if reduction == "none" and free_bits_per not in ("element", "sample"):
            raise ValueError(
                f"weighting.free_bits_per={free_bits_per!r} is about the batch: reduction 'none' has no place for it"
            )
    if capacity is not None:
        capacity = check_number("weighting.capacity", capacity, mu)
        if not isinstance(capacity, Tensor) and not capacity >= 0:
            raise ValueError(f"weighting.capacity must not be negative, got {capacity}")
        if each:
            raise ValueError("weighting.capacity needs a beta that is one number, not one for each dimension")
        if reduction == "none" and capacity_per == "batch":
            raise ValueError("weighting.capacity_per='batch' is about the batch: with reduction 'none', use 'sample'")
    if balance is not None:
        if not isinstance(balance, tuple | list) or len(balance) != 2:
            raise ValueError(f"weighting.balance must be a pair (posterior, prior) of numbers; got {balance!r}")
        balance = tuple(check_real(f"weighting.balance[{i}]", share) for i, share in enumerate(balance))
        if not (min(balance) >= 0 and sum(balance) > 0):
            raise ValueError(f"weighting.balance must be two numbers that are not negative, and not both 0; got {balance}")
        if prior is None:
            raise ValueError("weighting.balance needs a prior: the standard normal one has no gradient to balance")
    return Weighting(free_bits, free_bits_per, capacity, capacity_per, balance)


def _check_name(name: str, value, names: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {value!r}")
