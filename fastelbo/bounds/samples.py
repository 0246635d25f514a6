"""Objectives of several samples, in the memory of one: the ELBO's Monte Carlo estimate and the importance-weighted bound.

The samples are decoded a chunk at a time. Forward keeps no chunk's graph, only its noise. Backward goes through the chunks
again, with the autocast of the first time and the random states of a decoder that draws numbers, and differentiates each with
the upstream gradient, which is known by then.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..basics.arguments import (
    check_batch,
    check_dense,
    check_device,
    check_generator,
    check_noise,
    check_number,
    result_dtype,
)
from ..basics.sparse import check_data, is_sparse
from ..basics.tracing import is_differentiated, is_traced, never_compiled
from ..basics.warnings import stacklevel_of_user
from ..engine.call import Factors, LossCall, Objective, with_numbers
from ..engine.divergence import divergence_terms, times
from ..engine.formula import weighted_by
from ..engine.log_ratio import Held, draw_rows, log_ratio
from ..engine.loss import ELBOTerms, composed_terms
from ..latents.posterior import Latents, check_latents
from ..latents.weighting import ALL, check_beta, check_weighting, is_of_each
from ..likelihoods import Likelihood
from ..likelihoods.distributions import of_distribution
from .graph import decoder_leaves
from .records import ELBO, IWAE
from .replay import CHANGED, Modules, Replay, autocast_without_cache, check_alike_again


class Call(NamedTuple):
    """What a call computes, beside its tensors."""

    decoder: Callable
    bound: ELBO
    latents: Latents
    objective: Objective

    @property
    def is_weighted(self) -> bool:
        """Whether samples have importance weights."""
        return isinstance(self.bound, IWAE)


class Given(NamedTuple):
    """The tensors of a call, in the order in which `Samples` takes them."""

    mu: Tensor
    second: Tensor
    prior_mu: Tensor | None
    prior_second: Tensor | None
    x: Tensor
    weight: Tensor | None
    beta: float | Tensor
    recon_weight: float | Tensor
    eps: Tensor | None

    @property
    def latents(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]


def many_samples(
    decoder, x, mu, logvar, factors: Factors, objective: Objective, bound: ELBO, *, prior, weighting, weight, kl_weight,
    eps, generator, monitor,
) -> ELBOTerms:  # fmt: skip
    """`elbo` of several samples, or by another bound. The tensors come as the user gave them."""
    call, given = prepared(decoder, x, mu, logvar, objective, bound, prior=prior, weight=weight, eps=eps, generator=generator)
    beta, recon_weight = factors[0], check_number("recon_weight", factors[1], given.mu)
    recon_reduction, kl_reduction = objective.reduction, objective.kl_reduction
    if call.is_weighted:
        given = given._replace(beta=check_number("beta", beta, given.mu), recon_weight=recon_weight)
        if weighting not in (None, ALL):
            raise ValueError("weighting is for the KL of an ELBO: an IWAE has each sample's log densities instead")
        if kl_weight is not None:
            raise ValueError("kl_weight is for the KL of an ELBO: an IWAE has each sample's log densities instead")
        if recon_reduction == "mean" or recon_reduction != kl_reduction:
            found = recon_reduction if recon_reduction == kl_reduction else (recon_reduction, kl_reduction)
            raise ValueError(f"reduction must be 'sum', 'batchmean' or 'none' for an IWAE, got {found!r}")
    kl_beta = 1.0 if call.is_weighted else check_beta(beta, given.mu)
    of_kl, tensors = check_latents(mu, logvar, objective.posterior, prior, kl_weight)
    weighting = check_weighting(weighting, given.mu, call.latents.prior is not None, kl_beta, kl_reduction)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not call.is_weighted):
        kl, kl_term, statistics = divergence_terms(
            of_kl, tensors, weighting=weighting, beta=kl_beta, reduction=kl_reduction,
            statistics=monitor is not None,
        )  # fmt: skip
    value, recon, (likelihood, first) = _estimate(call, given, generator)
    dtype = result_dtype(value, kl)
    # Anew, since a chunk is scored without gradient, and a mean divides by the weights' sum.
    of_mean = LossCall(likelihood, "mean", "mean", dtype, 1, weight is not None, 0)
    shaped = of_mean.shaped(weight, first, x)
    if monitor is not None:
        monitor.record(x.shape[0], recon.sum(), of_mean.divisor(first, x, shaped), statistics)
    value, recon, kl = value.to(dtype), recon.to(dtype), kl.to(dtype, copy=True)
    if recon_reduction != "none":
        divisor = of_mean._replace(reduction=recon_reduction).divisor(first, x, shaped)
        value, recon = value.sum() / divisor, recon.sum() / divisor
    if call.is_weighted:
        return ELBOTerms(value, recon, kl)
    each = is_of_each(kl_beta)
    return ELBOTerms(weighted_by(recon_weight, value) + times(1.0 if each else kl_beta, kl_term.to(dtype)), value, kl)


def prepared(decoder, x, mu, logvar, objective: Objective, bound: ELBO, *, prior, weight, eps, generator) -> tuple[Call, Given]:
    """What can be checked before the decoder runs, which may draw noise and move statistics."""
    latents, tensors = check_latents(mu, logvar, objective.posterior, prior)
    if objective.likelihood.inner is not None:
        raise ValueError(
            f"likelihood must not be {objective.likelihood!r} with several samples: its scale differs from sample to sample"
        )
    mu = tensors[0]
    check_data("x", x)
    check_device("x", x, "mu", mu)
    check_batch("x", x, "mu", mu)
    check_generator(generator, mu)
    if eps is not None:
        check_noise(eps, generator, mu, bound.n_samples)
    # Each sample of each datum has a value of its own.
    objective = objective._replace(reduction="none", kl_reduction="none")
    return Call(decoder, bound, latents, objective), Given(*(*tensors, None, None)[:4], x, weight, 1.0, 1.0, eps)


def _estimate(call: Call, given: Given, generator: torch.Generator | None) -> tuple[Tensor, Tensor, tuple[Likelihood, Tensor]]:
    """Of each datum the objective, and the mean of its reconstructions, `[B]`; the likelihood, with a first parameter of one
    sample's shape."""
    eager = not is_traced(*given)
    if call.bound.estimator == "dreg" and not eager:
        raise RuntimeError("estimator 'dreg' scales gradients in backward: it can be neither compiled nor transformed")
    helds = [None if call.bound.estimator == "standard" else Held() for _ in call.bound.chunks]
    run = leaves = None
    several = eager and len(call.bound.chunks) > 1 and torch.is_grad_enabled()
    # `Samples` does not differentiate by the noise.
    if several and not (given.eps is not None and given.eps.requires_grad):
        if given.mu.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph cannot go back to earlier random states: capture elbo with chunk=n_samples")
        run = Run(Replay(given.mu, generator), Modules(call.decoder), [])
    with autocast_without_cache(given.mu.device.type) if eager else contextlib.nullcontext():
        leaves, rows, recon, first = _first_chunk(call, given, generator, helds[0], run)
        if several and leaves is None:
            warnings.warn(GRAPHS_KEPT, stacklevel=stacklevel_of_user())
        rows, recon = [rows], [recon]
        with torch.set_grad_enabled(torch.is_grad_enabled() and leaves is None):
            for where, held in list(zip(call.bound.chunks, helds, strict=True))[1:]:
                noise = drawn(given, where, generator)
                z, log_q, log_p = sample(call, given, where, noise, held)
                with run.first(noise) if run is not None else contextlib.nullcontext():
                    prediction = decoded(call, z)
                found = score(call, given, where, prediction, log_q, log_p)
                rows.append(found[0])
                recon.append(found[1].sum(0))
                del z, log_q, log_p, prediction, found
    rows, recon = torch.cat(rows), torch.stack(recon).sum(0) / call.bound.n_samples
    if leaves is not None:
        return Samples.apply(call, run, rows, *given, *leaves), recon, first
    if call.bound.estimator == "dreg":
        scale = _scale_to_encoder(rows, given.beta)
        for where, held in zip(call.bound.chunks, helds, strict=True):
            held.scale = scale[where].flatten()
    return _combined(call, rows), recon, first


GRAPHS_KEPT = (
    "fastelbo.elbo keeps the graphs of all samples, so memory grows with n_samples: decoder, noise or likelihood want gradients"
    " by a tensor that is computed elsewhere or has hooks, or the decoder has an autograd Function written in Python, or is"
    " sharded. chunk=n_samples does the same in one call"
)


class Run(NamedTuple):
    """What it takes to run the decoder again."""

    replay: Replay
    modules: Modules
    noise: list[Tensor]  # of each chunk; a seed, where noise comes from a kernel

    def first(self, noise: Tensor):
        """A first run, the next one, of latents with this noise."""
        self.noise.append(noise)
        return self.replay.first()


def _first_chunk(call: Call, given: Given, generator, held: Held | None, run: Run | None):
    """Decode it with its graph, which shows the leaves; they are None where the graph has to be kept. Without `run` it is not
    looked at. Returns `(leaves, rows, sum of the reconstructions, likelihood and first parameter)`."""
    where = call.bound.chunks[0]
    noise = drawn(given, where, generator)
    z, log_q, log_p = sample(call, given, where, noise, held)
    if run is None:
        rows, recon, first = score(call, given, where, decoded(call, z), log_q, log_p)
        return None, rows, recon.sum(0), first
    z, edge = _with_edge(z)
    with run.first(noise):
        prediction = decoded(call, z)
    leaves = _leaves(prediction.values, edge)
    if leaves is not None:
        run.modules.first_run(_outputs(prediction.values), edge.node)
    with torch.set_grad_enabled(leaves is None):
        rows, recon, first = score(call, given, where, prediction, log_q, log_p)
    return leaves, rows, recon.sum(0), first


def drawn(given: Given, where: slice, generator: torch.Generator | None) -> Tensor:
    """The noise of a chunk, in whatever form `log_ratio` takes it."""
    eps = None if given.eps is None else given.eps[where]
    return draw_rows(given.mu, given.second, where.stop - where.start, eps, generator)


def sample(call: Call, given: Given, where: slice, noise: Tensor, held: Held | None):
    """`(z, log_q, log_p)` of a chunk, in rows; the log densities are None where they are not needed."""
    samples = where.stop - where.start
    return log_ratio(call.latents, given.latents, noise, samples, held=held, wants_logs=call.is_weighted)


def _with_edge(z: Tensor):
    """z, and the edge at which the graph of all that is computed from it ends: now, since the decoder may write to z."""
    if not z.requires_grad:
        z = z.detach().requires_grad_()
    if z.is_leaf or z._is_view():  # a leaf cannot be written to, and a view's history is rewritten by that
        z = z.clone()
    return z, torch.autograd.graph.get_gradient_edge(z)


class Decoded(NamedTuple):
    """A decoder's output."""

    values: list  # which are checked to be tensors later
    likelihood: Likelihood  # that of the call, or that which a distribution stands for


def decoded(call: Call, z: Tensor) -> Decoded:
    """What the decoder makes of z."""
    prediction, likelihood = call.decoder(z), call.objective.likelihood
    if isinstance(prediction, Distribution):
        likelihood, prediction = of_distribution("decoder(z)", prediction, call.objective.given)
    return Decoded(list(prediction) if isinstance(prediction, tuple | list) else [prediction], likelihood)


def _outputs(values: list, leaf: bool = False) -> list[Tensor]:
    """What of a decoder's output has a graph; or what is a leaf of one, as a scale that is learned by itself."""
    return [t for t in values if isinstance(t, Tensor) and t.requires_grad and t.is_leaf == leaf]


def _leaves(values: list, edge) -> list[Tensor] | None:
    own = _outputs(values, leaf=True)
    found = decoder_leaves(_outputs(values), edge)
    if found is None or any(leaf._backward_hooks for leaf in own):
        return None
    return list({id(leaf): leaf for leaf in (*found, *own)}.values())


def score(
    call: Call, given: Given, where: slice, prediction: Decoded, log_q, log_p, known: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Likelihood, Tensor]]:
    """What the objective is made of, and the reconstruction, of each sample, `[samples, B]`; and the likelihood, with a first
    parameter.

    `known`, `[samples, B]`: the upstream factors of the former, if backward is next.
    """
    x, samples, batch = given.x, where.stop - where.start, given.x.shape[0]
    values, likelihood = prediction
    if len(values) > 1:
        values = with_numbers("decoder(z)", values, likelihood)
    for i, value in enumerate(values):
        check_dense(f"decoder(z)[{i}]" if len(values) > 1 else "decoder(z)", value)
    if values and values[0].shape[:1] != (samples * batch,):
        raise ValueError(f"decoder(z) must have a row for each of the {samples * batch} of z, got {tuple(values[0].shape)}")
    kl = torch.zeros(samples * batch, dtype=torch.float32, device=x.device) if log_q is None else log_q - log_p

    def terms_of(parameters: Sequence[Tensor], kl: Tensor, known: Tensor | None, samples: int = 1) -> ELBOTerms:
        tensors = (*parameters, x) if given.weight is None else (*parameters, x, given.weight)
        shape, factors = (len(parameters), given.weight is not None), (given.beta, given.recon_weight)
        objective = call.objective._replace(likelihood=likelihood, samples=samples)
        return composed_terms("decoder(z)", objective, tensors, *shape, kl, factors, known)

    def sample_of(i: int) -> list[Tensor]:
        """Its parameters: a row of each that has one for each of the first one's."""
        rows = slice(i * batch, (i + 1) * batch)
        return [v[rows] if v.dim() == values[0].dim() and v.shape[0] == samples * batch else v for v in values]

    if samples == 1 or (likelihood.takes_samples(len(values), given.weight is not None) and not is_sparse(x)):
        found = [terms_of(values, kl, known if known is None else known.reshape(-1), samples)]
    else:  # their kernels and formulas take as many targets as predictions: the same one again, in a view of a sample each
        parts = zip(kl.view(samples, batch), [None] * samples if known is None else known, strict=True)
        found = [terms_of(sample_of(i), k, factor) for i, (k, factor) in enumerate(parts)]
    loss, recon = (torch.cat([getattr(terms, name) for terms in found]).view(samples, batch) for name in ("loss", "recon"))
    return loss, recon.detach(), (likelihood, sample_of(0)[0].detach().to("meta"))


def _combined(call: Call, rows: Tensor) -> Tensor:
    """The objective of each datum from that of each sample, `[n_samples, B]`."""
    if not call.is_weighted:
        return rows.mean(0)
    return math.log(call.bound.n_samples) - torch.logsumexp(-rows, 0)


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
        if call.is_weighted:
            factors = torch.softmax(-rows, 0) * upstream
        else:
            factors = (upstream / call.bound.n_samples).expand_as(rows)
        scale = _scale_to_encoder(rows, given.beta) if call.bound.estimator == "dreg" else None
        totals = [None] * len(wrt)
        replay, modules, noise = ctx.run
        with modules.statistics_held(), torch.enable_grad():
            for run, where in enumerate(call.bound.chunks):
                held = None if call.bound.estimator == "standard" else Held(None if scale is None else scale[where].flatten())
                with replay.again(run):
                    again, dtype, found = _differentiated(call, aliases, where, factors[where], held, noise[run], leaves, wrt)
                check_alike_again(rows[where], again, dtype)
                totals = [_sum(*pair) for pair in zip(totals, found, strict=True)]
                del found
        found = iter([t if t is None else t.to(value.dtype) for t, value in zip(totals, wrt, strict=True)])
        return None, None, None, *(next(found) if need else None for need in needs)


def _alias(value, need: bool):
    """The value in a graph of its own."""
    return value.detach().requires_grad_(need) if isinstance(value, Tensor) else value


def _differentiated(
    call: Call, given: Given, where: slice, factors, held, noise, leaves, wrt
) -> tuple[Tensor, torch.dtype, Sequence[Tensor | None]]:
    """Decode a chunk again. Its rows, the prediction's dtype, and gradients of its part of the objective by all of `wrt`."""
    z, log_q, log_p = sample(call, given, where, noise, held)
    z, edge = _with_edge(z)
    prediction = decoded(call, z)
    found = _leaves(prediction.values, edge)
    if found is None or not {id(leaf) for leaf in found} <= {id(leaf) for leaf in leaves}:
        raise RuntimeError(
            "the decoder of fastelbo.elbo uses a tensor now that its first sample did not use, or one that was computed before"
            " and kept: it must use the same at every call, or chunk=n_samples be passed, which runs it once"
        )
    rows, _, (_, first) = score(call, given, where, prediction, log_q, log_p, factors)
    wants = rows.requires_grad
    found = torch.autograd.grad(rows, wrt, factors, allow_unused=True) if wants else [None] * len(wrt)
    return rows.detach(), first.dtype, found


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """In float32 at least: many gradients of 16 bits add up to fewer."""
    if gradient is None:
        return total
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    return total.add_(gradient)
