"""Objectives of several samples, in the memory of one: the ELBO's Monte Carlo estimate and the importance-weighted bound.

The samples are decoded a chunk at a time. Forward keeps no chunk's graph. Backward goes through the chunks again, with the
random states and the autocast of the first time, and differentiates each with the upstream gradient, which is known by then.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from .arguments import (
    check_batch,
    check_count,
    check_dense,
    check_device,
    check_generator,
    check_noise,
    check_number,
    check_reals,
    check_weight,
    find_likelihood,
    unwrapped,
)
from .graph import decoder_leaves
from .likelihoods import Gaussian, Likelihood
from .log_ratio import Held, draw_rows, log_ratio
from .posteriors import Posterior, Prior, check_gaussian, check_prior, result_dtype
from .reconstruction import class_dim, count
from .replay import CHANGED, Modules, Replay, autocast_without_cache
from .scalars import check_real
from .terms import ELBOTerms, Term, add_terms, check_reconstruction, check_terms, divergence_of, times
from .tracing import is_differentiated, is_traced, never_compiled

BOUNDS = ("elbo", "iwae")
ESTIMATORS = ("standard", "stl", "dreg")


class Call(NamedTuple):
    """What a call computes, beside its tensors."""

    decoder: Callable
    n_samples: int
    chunk: int
    bound: str
    estimator: str
    posterior: Posterior
    prior: str | None  # what its second tensor is
    likelihood: Likelihood
    target_scale: float

    @property
    def chunks(self) -> list[slice]:
        return [slice(i, min(i + self.chunk, self.n_samples)) for i in range(0, self.n_samples, self.chunk)]


class Given(NamedTuple):
    """The tensors of a call, in the order in which `Samples` takes them."""

    mu: Tensor
    second: Tensor
    prior_mu: Tensor | None
    prior_second: Tensor | None
    x: Tensor
    weight: Tensor | None
    scale: float | Tensor | None
    beta: float | Tensor
    eps: Tensor | None


def check_sampling(n_samples, bound, estimator, chunk) -> tuple[int, int]:
    """`n_samples` and `chunk`, which is no larger."""
    n_samples, chunk = check_count("n_samples", n_samples), check_count("chunk", chunk)
    for name, value, names in (("bound", bound, BOUNDS), ("estimator", estimator, ESTIMATORS)):
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {value!r}")
    if estimator != "standard" and bound != "iwae":
        raise ValueError(
            f"estimator {estimator!r} is for bound='iwae', which with n_samples=1 is the ELBO by a sampled KL; got {bound!r}"
        )
    return n_samples, min(chunk, n_samples)


def many_samples(
    decoder, x, mu, logvar, beta, *, posterior, prior, weighting, reduction, generator, monitor, bound, **options
) -> ELBOTerms:
    """`elbo` of several samples, or by another bound. The arguments come as the user gave them, but for `check_sampling`'s."""
    weighted = bound == "iwae"
    call, given, prior = prepared(
        decoder, x, mu, logvar, beta if weighted else 1.0, posterior=posterior, prior=prior, bound=bound, generator=generator,
        **options,
    )  # fmt: skip
    recon_reduction, kl_reduction = check_terms(mu, logvar, None, posterior, prior, weighting, reduction, monitor)
    if weighted:
        if weighting is not None:
            raise ValueError("weighting is for the KL of bound='elbo': bound='iwae' has each sample's log densities instead")
        if recon_reduction == "mean" or recon_reduction != kl_reduction:
            raise ValueError(f"reduction must be 'sum', 'batchmean' or 'none' for bound='iwae', got {reduction!r}")
    with torch.set_grad_enabled(torch.is_grad_enabled() and not weighted):
        kl, kl_term, statistics = divergence_of(
            given.mu, given.second, 1.0 if weighted else beta, call.posterior, prior, weighting, kl_reduction, monitor
        )
    value, recon, term = _estimate(call, given, generator)
    # Anew, since a chunk is scored without gradient, and a mean divides by the weights' sum.
    term = term._replace(weight=check_weight(given.weight, x, class_dim(call.likelihood, term.parameters, x)))
    if monitor is not None:
        elements = count(term.request._replace(reduction="mean"), term.parameters, x, term.weight)
        monitor.record(x.shape[0], recon.sum(), elements, statistics)
    dtype = result_dtype(value, kl)
    value, recon, kl = value.to(dtype), recon.to(dtype), kl.to(dtype, copy=True)
    if recon_reduction != "none":
        divisor = count(term.request._replace(reduction=recon_reduction), term.parameters, x, term.weight)
        value, recon = value.sum() / divisor, recon.sum() / divisor
    return ELBOTerms(value, recon, kl) if weighted else ELBOTerms(value + kl_term.to(dtype), value, kl)


def prepared(
    decoder, x, mu, logvar, beta, *, likelihood, posterior, prior, weight, eps, generator, scale, target_scale, n_samples,
    bound, estimator, chunk,
) -> tuple[Call, Given, Prior | None]:  # fmt: skip
    """What can be checked before the decoder runs, which may draw noise and move statistics."""
    if not callable(decoder):
        raise TypeError(f"decoder must be callable, got {type(decoder).__name__}")
    mu, second, posterior = check_gaussian(mu, logvar, posterior)
    prior = check_prior(prior, mu)
    likelihood = find_likelihood(likelihood)
    if isinstance(likelihood, Gaussian) and likelihood.scale == "optimal":
        raise ValueError("likelihood must not be a Gaussian of the scale 'optimal' here, which differs from sample to sample")
    beta = check_number("beta", beta, mu)
    target_scale = check_real("target_scale", target_scale)
    check_reals("x", x)
    check_device("x", x, "mu", mu)
    check_batch("x", x, "mu", mu)
    check_generator(generator, mu)
    if eps is not None:
        check_noise(eps, generator, mu, n_samples)
    prior_mu, prior_second, prior_parameter = prior or (None, None, None)
    call = Call(decoder, n_samples, chunk, bound, estimator, posterior, prior_parameter, likelihood, target_scale)
    return call, Given(mu, second, prior_mu, prior_second, x, weight, scale, beta, eps), prior


def _estimate(call: Call, given: Given, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Term]:
    """Of each datum the objective, and the mean of its reconstructions, `[B]`; and the first sample's term, for its shapes."""
    eager = not is_traced(*given)
    if call.estimator == "dreg" and not eager:
        raise RuntimeError("estimator 'dreg' scales gradients in backward: it can be neither compiled nor transformed")
    helds = [None if call.estimator == "standard" else Held() for _ in call.chunks]
    run = leaves = None
    several = eager and len(call.chunks) > 1 and torch.is_grad_enabled()
    if several and not _has_other_inputs(call, given):
        if given.mu.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph cannot go back to earlier random states: capture elbo with chunk=n_samples")
        run = Run(Replay(given.mu, generator), Modules(call.decoder))
    with autocast_without_cache(given.mu.device.type) if eager else contextlib.nullcontext():
        leaves, rows, recon, term = _first_chunk(call, given, generator, helds[0], run)
        if several and leaves is None:
            warnings.warn(GRAPHS_KEPT, stacklevel=4)
        rows, recon = [rows], [recon]
        with torch.set_grad_enabled(torch.is_grad_enabled() and leaves is None):
            for where, held in list(zip(call.chunks, helds, strict=True))[1:]:
                z, log_q, log_p = _sample(call, given, where, generator, held)
                found = _score(call, given, where, call.decoder(z), log_q, log_p)
                rows.append(found[0])
                recon.append(found[1].sum(0))
                del z, log_q, log_p, found
    rows, recon = torch.cat(rows), torch.stack(recon).sum(0) / call.n_samples
    if leaves is not None:
        return Samples.apply(call, run, rows, *given, *leaves), recon, term
    if call.estimator == "dreg":
        scale = _scale_to_encoder(rows, given.beta)
        for where, held in zip(call.chunks, helds, strict=True):
            held.scale = scale[where].flatten()
    return _combined(call, rows), recon, term


GRAPHS_KEPT = (
    "fastelbo.elbo keeps the graphs of all samples, so memory grows with n_samples: decoder, noise or likelihood want gradients"
    " by a tensor that is computed elsewhere or has hooks, or the decoder has an autograd Function written in Python, or is"
    " sharded. chunk=n_samples does the same in one call"
)


def _has_other_inputs(call: Call, given: Given) -> bool:
    """Whether a gradient is wanted by what `Samples` does not differentiate by."""
    others = given.eps, *vars(call.likelihood).values()
    return any(isinstance(value, Tensor) and value.requires_grad for value in others)


class Run(NamedTuple):
    """What it takes to run the decoder again."""

    replay: Replay
    modules: Modules


def _first_chunk(call: Call, given: Given, generator, held: Held | None, run: Run | None):
    """Decode it with its graph, which shows the leaves; they are None where the graph has to be kept. Without `run` it is not
    looked at. Returns `(leaves, rows, sum of the reconstructions, term)`."""
    where = call.chunks[0]
    z, log_q, log_p = _sample(call, given, where, generator, held)
    if run is None:
        rows, recon, term = _score(call, given, where, call.decoder(z), log_q, log_p)
        return None, rows, recon.sum(0), term
    z, edge = _with_edge(z)
    prediction = call.decoder(z)
    leaves = _leaves(prediction, edge)
    if leaves is not None:
        run.modules.first_run(_outputs(prediction), edge.node)
    with torch.set_grad_enabled(leaves is None):
        rows, recon, term = _score(call, given, where, prediction, log_q, log_p)
    return leaves, rows, recon.sum(0), term


def _sample(call: Call, given: Given, where: slice, generator: torch.Generator | None, held: Held | None):
    """`(z, log_q, log_p)` of a chunk, in rows; the log densities are None where they are not needed."""
    samples = where.stop - where.start
    eps = None if given.eps is None else given.eps[where]
    prior = None if call.prior is None else Prior(given.prior_mu, given.prior_second, call.prior)
    noise = draw_rows(given.mu, given.second, samples, eps, generator)
    return log_ratio(given.mu, given.second, call.posterior, prior, noise, samples, held=held, wants_logs=call.bound == "iwae")


def _with_edge(z: Tensor):
    """z, and the edge at which the graph of all that is computed from it ends: now, since the decoder may write to z."""
    if not z.requires_grad:
        z = z.detach().requires_grad_()
    if z.is_leaf or z._is_view():  # a leaf cannot be written to, and a view's history is rewritten by that
        z = z.clone()
    return z, torch.autograd.graph.get_gradient_edge(z)


def _outputs(prediction, leaf: bool = False) -> list[Tensor]:
    """What of a decoder's output has a graph; or what is a leaf of one, as a scale that is learned by itself."""
    values = prediction if isinstance(prediction, tuple | list) else [prediction]
    return [t for t in values if isinstance(t, Tensor) and t.requires_grad and t.is_leaf == leaf]


def _leaves(prediction, edge) -> list[Tensor] | None:
    own = _outputs(prediction, leaf=True)
    found = decoder_leaves(_outputs(prediction), edge, rebuilt=True)
    if found is None or any(leaf._backward_hooks for leaf in own):
        return None
    return list({id(leaf): leaf for leaf in (*found, *own)}.values())


def _score(
    call: Call, given: Given, where: slice, prediction, log_q, log_p, known: Tensor | None = None
) -> tuple[Tensor, Tensor, Term]:
    """What the objective is made of, and the reconstruction, of each sample, `[samples, B]`; and the first sample's term.

    `known`, `[samples, B]`: the upstream factors of the former, if backward is next.
    """
    samples, batch = where.stop - where.start, given.x.shape[0]
    rows = samples * batch
    prediction = unwrapped(prediction)
    several = isinstance(prediction, tuple | list)
    values = list(prediction) if several else [prediction]
    for i, value in enumerate(values):
        check_dense(f"decoder(z)[{i}]" if several else "decoder(z)", value)
    first = values[0] if values else None
    if first is not None and first.shape[:1] != (rows,):
        raise ValueError(f"decoder(z) must have a row for each of the {rows} of z, got {tuple(first.shape)}")

    def term_of(i: int) -> Term:
        taken = [v[i * batch : (i + 1) * batch] if _is_whole(v, first) else v for v in values]
        part = prediction if samples == 1 else taken if several else taken[0]
        return check_reconstruction(
            "decoder(z)", part, given.x, call.likelihood, given.weight, "none", given.scale, call.target_scale
        )

    term = term_of(0)
    kl = torch.zeros(rows, dtype=torch.float32, device=given.x.device) if log_q is None else log_q - log_p
    weighted = times(given.beta, kl)
    if samples == 1 or term.row is not None:
        whole = term if samples == 1 else term._replace(parameters=values)
        found = [add_terms(whole, (kl, weighted, None), None, known if known is None else known.reshape(-1))]
    else:  # their kernels and formulas take as many targets as predictions: the same one again, in a view of a sample each
        parts = (kl.view(samples, batch), weighted.view(samples, batch), [None] * samples if known is None else known)
        found = [add_terms(term_of(i), (k, w, None), None, factor) for i, (k, w, factor) in enumerate(zip(*parts, strict=True))]
    loss, recon = (torch.cat([getattr(terms, name) for terms in found]).view(samples, batch) for name in ("loss", "recon"))
    return loss, recon.detach(), term._replace(parameters=[p.detach().to("meta") for p in term.parameters])


def _is_whole(value: Tensor, first: Tensor) -> bool:
    """Whether a parameter of a likelihood has a row for each of the first one's."""
    return value.dim() == first.dim() and value.shape[0] == first.shape[0]


def _combined(call: Call, rows: Tensor) -> Tensor:
    """The objective of each datum from that of each sample, `[n_samples, B]`."""
    if call.bound == "elbo":
        return rows.mean(0)
    return math.log(call.n_samples) - torch.logsumexp(-rows, 0)


def _scale_to_encoder(rows: Tensor, beta: float | Tensor) -> Tensor:
    """DReG's factor of what arrives at z, beyond each sample's share w of the bound's gradient: w.

    That the score function's expectation is `w (1 - w)` times the path's holds for any weights. With beta it stands beta times
    in the gradient, so the factor is `w - beta (w - w^2)`, over w.
    """
    shares = torch.softmax(-rows.detach(), 0)
    if isinstance(beta, Tensor):
        beta = beta.detach().to(shares.dtype)
    return 1 - beta * (1 - shares)


class Samples(torch.autograd.Function):
    """All samples of an objective that have been decoded already, each of them in `rows`, `[n_samples, B]`."""

    @staticmethod
    @never_compiled
    def forward(ctx, call: Call, run: Run, rows, *tensors):
        ctx.call, ctx.run = call, run
        given, ctx.leaves = Given(*tensors[: len(Given._fields)]), tensors[len(Given._fields) :]
        ctx.versions = [leaf._version for leaf in ctx.leaves]
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in given]
        ctx.save_for_backward(rows, *(value if isinstance(value, Tensor) else None for value in given))
        return _combined(call, rows)

    @staticmethod
    @never_compiled
    def backward(ctx, upstream):
        call, leaves = ctx.call, ctx.leaves
        if is_differentiated((upstream,)):
            raise RuntimeError(
                "fastelbo.elbo with chunk < n_samples cannot be differentiated twice (create_graph=True) or in batches"
                " (is_grads_batched=True): pass chunk=n_samples, which keeps the graph"
            )
        if any(leaf._backward_hooks for leaf in leaves):
            raise RuntimeError(
                "a tensor that the decoder of fastelbo.elbo uses was given a hook after the call, which would run for every"
                " chunk: register it before, or pass chunk=n_samples"
            )
        ctx.run.modules.second_run()
        if any(leaf._version != version for leaf, version in zip(leaves, ctx.versions, strict=True)):
            raise RuntimeError(CHANGED)
        rows, *saved = ctx.saved_tensors
        _, _, _, *needs = ctx.needs_input_grad
        given = Given(*(n if t is None else t for t, n in zip(saved, ctx.numbers, strict=True)))
        aliases = Given(*(_alias(value, need) for value, need in zip(given, needs, strict=False)))
        wrt = [value for value, need in zip((*aliases, *leaves), needs, strict=True) if need]
        if call.bound == "iwae":
            factors = torch.softmax(-rows, 0) * upstream
        else:
            factors = (upstream / call.n_samples).expand_as(rows)
        scale = _scale_to_encoder(rows, given.beta) if call.estimator == "dreg" else None
        totals = [None] * len(wrt)
        replay, modules = ctx.run
        with replay.again(), modules.statistics_held(), torch.enable_grad():
            for where in call.chunks:
                held = None if call.estimator == "standard" else Held(None if scale is None else scale[where].flatten())
                found = _differentiated(call, aliases, where, factors[where], held, replay.generator, leaves, wrt)
                totals = [_sum(*pair) for pair in zip(totals, found, strict=True)]
                del found
        found = iter([t if t is None else t.to(value.dtype) for t, value in zip(totals, wrt, strict=True)])
        return None, None, None, *(next(found) if need else None for need in needs)


def _alias(value, need: bool):
    """The value in a graph of its own."""
    return value.detach().requires_grad_(need) if isinstance(value, Tensor) else value


def _differentiated(call: Call, given: Given, where: slice, factors, held, generator, leaves, wrt) -> Sequence[Tensor | None]:
    """Decode a chunk again. Gradients of its part of the objective by all of `wrt`."""
    z, log_q, log_p = _sample(call, given, where, generator, held)
    z, edge = _with_edge(z)
    prediction = call.decoder(z)
    found = _leaves(prediction, edge)
    if found is None or not {id(leaf) for leaf in found} <= {id(leaf) for leaf in leaves}:
        raise RuntimeError(
            "the decoder of fastelbo.elbo uses a tensor now that its first sample did not use, or one that was computed before"
            " and kept: it must use the same at every call, or chunk=n_samples be passed, which runs it once"
        )
    rows, _, _ = _score(call, given, where, prediction, log_q, log_p, factors)
    if not rows.requires_grad:
        return [None] * len(wrt)
    return torch.autograd.grad(rows, wrt, factors, allow_unused=True)


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """In float32 at least: many gradients of 16 bits add up to fewer."""
    if gradient is None:
        return total
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    return total.add_(gradient)


class LogLikelihood(NamedTuple):
    """An estimate of log p(x) in nats, and its standard error, `[B]` each."""

    log_p: Tensor
    standard_error: Tensor


@torch.no_grad()
def log_likelihood(
    decoder: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    x: Tensor,
    mu: Tensor | Distribution,
    logvar: Tensor | None = None,
    *,
    likelihood: str | Likelihood = "bernoulli",
    posterior: str | Posterior = "logvar",
    prior: tuple[Tensor, Tensor] | Distribution | None = None,
    weight: Tensor | None = None,
    scale: float | Tensor | None = None,
    target_scale: float = 1.0,
    n_samples: int = 5000,
    chunk: int = 10,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LogLikelihood:
    """log p(x) by importance sampling: the logarithm of the mean of `p(x | z) p(z) / q(z | x)` over samples z of q(z | x).

    For evaluation, as Rezende et al. (Stochastic Backpropagation and Approximate Inference in Deep Generative Models, 2014),
    and Burda et al. (Importance Weighted Autoencoders, 2016) with 5,000 samples: it is the latter's bound, whose expectation
    rises to log p(x) with `n_samples`. Nothing is differentiated, and one chunk is in memory at a time. The decoder runs as it
    is: put it in eval mode first.

    Args:
        decoder, x, mu, logvar, likelihood, posterior, prior, weight, scale, target_scale: as in `elbo`.
        n_samples: of each datum.
        chunk: how many are decoded at a time: `chunk * B` rows.
        eps: noise to use, `[n_samples, *mu.shape]`.
        generator: draws the noise, in place of the default generator.
        progress: show a progress bar, by tqdm.

    Returns:
        `LogLikelihood(log_p, standard_error)`, of the dtype of `elbo`'s results. The standard error is the delta
        method's, the deviation of the weights (with n - 1) over sqrt(n) and their mean: too low where the few samples that
        matter were not among them, and NaN for one sample.

    Raises:
        TypeError, ValueError: as `elbo`.
        ImportError: `progress` was asked for, and tqdm is not installed.
    """
    n_samples, chunk = check_sampling(n_samples, "iwae", "standard", chunk)
    if find_likelihood(likelihood).name in ("mse", "l1"):
        raise ValueError(f"likelihood must be a density here, such as 'gaussian' or 'laplace'; got {likelihood!r}")
    call, given, _ = prepared(
        decoder, x, mu, logvar, 1.0, likelihood=likelihood, posterior=posterior, prior=prior, weight=weight, eps=eps,
        generator=generator, scale=scale, target_scale=target_scale, n_samples=n_samples, bound="iwae", estimator="standard",
        chunk=chunk,
    )  # fmt: skip
    chunks = call.chunks
    if progress:
        chunks = _tqdm()(chunks, unit="chunk")
    total = squares = None  # logarithms of the sums of the weights and of their squares
    for where in chunks:
        with contextlib.nullcontext() if is_traced(*given) else autocast_without_cache(given.mu.device.type):
            z, log_q, log_p = _sample(call, given, where, generator, None)
            rows, _, _ = _score(call, given, where, decoder(z), log_q, log_p)
        log_w = -rows.double()
        sums = torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0)
        total, squares = sums if total is None else (torch.logaddexp(total, sums[0]), torch.logaddexp(squares, sums[1]))
    # With R, the sum of squares over the square of the sum, the weights' variance over their squared mean is
    # K (K R - 1) / (K - 1).
    excess = torch.expm1(math.log(n_samples) + squares - 2 * total).clamp_min(0)
    error = torch.sqrt(excess / (n_samples - 1)) if n_samples > 1 else torch.full_like(total, math.nan)
    return LogLikelihood((total - math.log(n_samples)).to(rows.dtype), error.to(rows.dtype))


def _tqdm():
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm
