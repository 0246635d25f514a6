"""The primitives by the Triton kernels: the same as in `torch_backend`, where their arguments are described.

This is the only door to `fastelbo.kernels`. The plan decides here which kernels compute a call: one launch does all of most
calls; the others have one for the reconstruction and one for the KL.
"""

import torch
from torch import Tensor

from .. import kernels
from . import formula
from .torch_backend import added, total

INTERPRETED = kernels.INTERPRETED
draw_noise = kernels.draw_noise


def loss_forward(plan, factors, tensors, divisor, known, wants, stateless=False):
    """See `torch_backend.loss_forward`. `sums`, in the place of the gradients by parameters smaller than the first, are the
    derivatives of the sum by them, times no factor and not over the divisor.
    """
    used = None
    if plan.path.is_plain:
        if wants[0]:
            used = plan.guess.factor() if known is None else known
        launches = plan.loss_launches or _loss(plan, tensors)
        loss, recon, kl, gradient = launches.forward(tensors, *factors, used, stateless)
        return loss, recon, kl, [gradient], None, used
    call = plan.call
    parameters, x, weight, latents = call.split(tensors)
    if call.likelihood.by_rows:
        launches = plan.loss_launches or _reconstruction(plan, parameters, x)
        recon, sums = launches.forward(parameters, x, weight, divisor, wants, stateless)
        stored = [None] * plan.count
    else:
        large = plan.large_of(wants)
        if True in large:
            used = plan.guess.factor() if known is None else known
        recon, gradients = _reconstruct(plan, parameters, x, weight, divisor, used, wants, stateless)
        stored, sums = (gradients, None) if large == wants else _apart(gradients, large)
    if not latents:
        return None, recon, None, stored, sums, used
    if call.latents == 2:
        launches = plan.latents_launches or _sample(plan, *latents)
        kl, loss = launches.total(*latents, recon, *factors, stateless)
        return loss, recon, kl, stored, sums, used
    kl = latents[0].to(call.dtype, copy=True)
    return total(factors, recon, kl), recon, kl, stored, sums, used


def loss_backward(plan, factors, tensors, divisor, upstreams, stored, sums, used, needs):
    """See `torch_backend.loss_backward`. What was stored with another factor is corrected where it lies."""
    n = plan.count
    grad_loss, grad_recon, grad_kl = upstreams
    wants_recon = True in needs[:n] and not (grad_loss is None and grad_recon is None)
    wants_kl = True in needs[n:] and not (grad_loss is None and grad_kl is None)
    if plan.path.is_plain and (wants_recon or wants_kl):
        launches, gradient = plan.loss_launches or _loss(plan, tensors), None if stored is None else stored[0]
        *grads, seen = launches.backward(tensors, *factors, upstreams, gradient, used, wants_recon, wants_kl)
        return grads, seen
    call, grads, seen = plan.call, [None] * len(tensors), None
    parameters, x, weight, latents = call.split(tensors)
    if wants_recon:
        wants = needs[:n]
        upstream, large = added(grad_loss, grad_recon, factors[1]), plan.large_of(wants)
        if call.likelihood.by_rows:
            launches = plan.loss_launches or _reconstruction(plan, parameters, x)
            grads[:n], sums = launches.backward(parameters, x, weight, divisor, upstream, sums, wants)
        elif sums is None and large != wants:  # those that forward did not keep, as an operator's: all in one launch
            seen = upstream.reshape(-1).to(call.dtype)
            found = _reconstruct(plan, parameters, x, weight, divisor, seen, wants, True)[1]
            grads[:n], sums = _apart(found, large)
        elif True in large:
            grads[:n], seen = _correct(plan, parameters, x, weight, divisor, upstream, stored, used, large)
        for i, total in enumerate(sums or ()):
            if total is not None:
                grads[i] = _times_upstream(total, upstream, divisor, parameters[i])
    if wants_kl and call.latents == 1:
        grads[-1] = added(grad_loss, grad_kl, factors[0]).to(latents[0].dtype, copy=True)
    elif wants_kl:
        launches = plan.latents_launches or _sample(plan, *latents)
        grads[-2:] = launches.backward(None, *latents, None, factors[0], (grad_loss, grad_kl))
    return grads, seen


def latents_forward(plan, tensors, noise, stateless=False):
    """See `torch_backend.latents_forward`; the noise may be a seed. `weighted` is the KL with a floor under each element, or
    with free bits, and `sums` are those over the batch of mu and mu^2, after those of the KL where there are free bits."""
    call = plan.call
    if plan.is_plain:
        mu, second = tensors
        launches = plan.latents_launches or _sample(plan, mu, second)
        z, kl = launches.forward(mu, second, noise, call.kind is not None, stateless)
        if call.groups is None:
            return z, kl, None, None, None
        return z, *formula.with_free_bits(call, mu, kl, None, None)
    if plan.is_categorical:
        return _categorical_forward(plan, tensors, stateless)
    (mu, second), priors, weight = call.latents.split(tensors)
    priors = _priors(plan, priors)
    launches = plan.latents_launches or _divergence(plan, mu, second, priors, weight)
    if call.kind == "column":
        kl, weighted, *of_columns = launches.columns(mu, second, *priors, weight, call.statistics, stateless)
        if kl is not None:
            return None, kl, weighted, of_columns if call.statistics else None, of_columns[0]
        return None, *formula.with_free_bits(call, mu, of_columns[0], None, of_columns[1:] or None, weight)
    z, kl, weighted = launches.forward(mu, second, noise, *priors, weight, stateless)
    return z, *formula.with_free_bits(call, mu, kl, weighted, None, weight)


def latents_backward(plan, tensors, noise, needs, grad_z, grad_kl, grad_weighted=None, kept=None):
    """See `torch_backend.latents_backward`. Gradients by the prior's two tensors as well, of the shape of mu, where needed;
    `grad_weighted` arrived at the KL with a floor."""
    call = plan.call
    if grad_z is not None:
        grad_z = grad_z.contiguous(memory_format=plan.layout)
    if plan.is_plain:
        mu, second = tensors
        launches = plan.latents_launches or _sample(plan, mu, second)
        if kept is not None:
            grad_kl, _ = formula.without_free_bits(call, mu, kept, grad_kl, grad_weighted)
        return launches.backward(grad_z, mu, second, noise, 1.0, (None, grad_kl))
    if plan.is_categorical:
        return _categorical_backward(plan, tensors, needs, grad_kl, grad_weighted, kept)
    (mu, second), priors, weight = call.latents.split(tensors)
    wants_prior, priors = needs[2:4] if priors else (False, False), _priors(plan, priors)
    launches = plan.latents_launches or _divergence(plan, mu, second, priors, weight)
    if call.groups == "dimension" and weight is None:
        of_columns = kept
    else:
        of_columns = None
        if kept is not None:
            grad_kl, grad_weighted = formula.without_free_bits(call, mu, kept, grad_kl, grad_weighted)
        grad_kl, grad_weighted = _as_latents(plan, grad_kl), _as_latents(plan, grad_weighted)
    grads = launches.backward(
        grad_z, grad_kl, grad_weighted, mu, second, noise, *priors, weight, wants_prior, of_columns
    )  # fmt: skip
    grads = grads if call.latents.prior is not None else grads[:2]
    return grads if weight is None else (*grads, None)


def sparse_forward(plan, parameters, x, weight, divisor, known):
    """See `sparse_reconstruction.forward`. In the place of the gradients by smaller parameters stand the derivatives of the sum
    by them, times no factor and not over the divisor."""
    used = None
    if plan.likelihood.by_rows:
        return *_sparse(plan, x).forward(parameters, x[:3], weight, divisor, plan.stores), used
    if True in plan.large_of(plan.stores, parameters):
        used = plan.guess.factor() if known is None else known
    recon, stored = _of_sparse(plan, parameters, x, weight, divisor, used, plan.stores)
    return recon, stored, used


def sparse_backward(plan, parameters, x, weight, divisor, upstream, stored, used, needs):
    """See `sparse_reconstruction.backward`. What was stored with another factor is corrected where it lies."""
    if plan.likelihood.by_rows:
        return _sparse_backward_of_rows(plan, parameters, x, weight, divisor, upstream, stored, needs), None
    if plan.likelihood.dim is not None:
        return _correct(plan, parameters, x[:3], weight, divisor, upstream, stored, used, needs)
    large, seen = plan.large_of(needs, parameters), None
    if stored is None and large != needs:  # once more, all of it
        seen = upstream.reshape(-1).to(plan.dtype, copy=True)
        _, stored = _of_sparse(plan, parameters, x, weight, divisor, seen, needs)
        found = list(stored)
    else:
        found = list(stored or [None] * plan.count)
        if True in large:
            operands, missing = _operands(plan, parameters)
            held = [g if at else None for g, at in zip(found, large, strict=True)]
            corrected, seen = _sparse(plan, x).backward(
                operands, x[:3], weight, divisor, upstream, [*held, *missing], used, (*large, *(False for _ in missing))
            )  # fmt: skip
            found = [c if at else g for g, c, at in zip(found, corrected, large, strict=False)]
    for i, (parameter, at) in enumerate(zip(parameters, large, strict=True)):
        if needs[i] and not at:
            found[i] = _times_upstream(found[i], upstream, divisor, parameter)
    return found, seen


def _sparse_backward_of_rows(plan, parameters, x, weight, divisor, upstream, stored, needs):
    found, sums = _sparse(plan, x).backward(parameters, x[:3], weight, divisor, upstream, stored, needs)
    return [
        g if total is None else _times_upstream(total, upstream, divisor, p)
        for g, total, p in zip(found, sums, parameters, strict=True)
    ]


def _of_sparse(plan, parameters, x, weight, divisor, factor, wants):
    """See `_reconstruct`."""
    if plan.likelihood.dim is not None:
        return _reconstruct(plan, parameters, x[:3], weight, divisor, factor, wants, False)
    operands, missing = _operands(plan, parameters)
    wants = (*wants, *(False for _ in missing))
    recon, gradients = _sparse(plan, x, len(operands)).forward(operands, x[:3], weight, divisor, factor, wants)
    return recon, gradients[: plan.count]


def _sparse(plan, x, operands=0):
    """The launches of the kernels for sparse targets of terms, which the plan keeps."""
    if plan.loss_launches is None:
        likelihood = plan.likelihood
        family = kernels.Family(likelihood.function(operands), likelihood.kernel_at_zero, **plan.options)
        kind = kernels.RowReconstruction if likelihood.by_rows else kernels.SparseReconstruction
        plan.loss_launches = kind(family=family, per_sample=plan.per_sample, dtype=plan.dtype, device=x.values.device)
    return plan.loss_launches


def _categorical_forward(plan, tensors, stateless):
    """`latents_forward` of classes."""
    call, like = plan.call, plan.call.latents.terms(tensors)
    logits, prior = _both_logits(tensors)
    launches = plan.latents_launches or _categorical(plan, logits, prior)
    kl, weighted = launches.forward(logits, prior, stateless)
    if call.kind == "column":
        kl = formula.scaled(kl.sum(0), plan.kl_scale)
    return None, *formula.with_free_bits(call, like, kl, weighted, None)


def _categorical_backward(plan, tensors, needs, grad_kl, grad_weighted, kept):
    call, like = plan.call, plan.call.latents.terms(tensors)
    logits, prior = _both_logits(tensors)
    launches = plan.latents_launches or _categorical(plan, logits, prior)
    if kept is not None:
        grad_kl, grad_weighted = formula.without_free_bits(call, like, kept, grad_kl, grad_weighted)
    upstreams = (g if g is None else g.contiguous() for g in (grad_kl, grad_weighted))
    return launches.backward(logits, prior, *upstreams, (*needs, False)[:2])[: len(tensors)]


def _both_logits(tensors):
    """Those of the posterior and of the prior as the kernels take them: of what is the same along the first dimensions, one."""
    logits, *prior = tensors
    if not prior:
        return logits, None
    found = prior[0]
    while found.dim() > 1 and (found.shape[0] == 1 or not found.stride(0)):
        found = found[0]
    return logits, found.contiguous()


def _categorical(plan, logits, prior):
    """The launches of the kernels for classes, which the plan keeps."""
    call = plan.call
    plan.latents_launches = kernels.CategoricalDivergence(
        logits, prior, unimix=call.latents.posterior.unimix, kind=call.kind, floor=call.floor,
        shares=call.shares or (1.0, 1.0), kl_scale=plan.kl_scale, dtype=plan.dtype,
    )  # fmt: skip
    return plan.latents_launches


def log_ratio_forward(call, tensors, noise):
    """Samples of latents with their log densities: see `kernels.log_ratio_forward`."""
    mu, second, prior_mu, prior_second = (*tensors, None, None)[:4]
    return kernels.log_ratio_forward(mu, second, noise, prior_mu, prior_second, wants_logs=call.wants_logs, **_ratio(call))


def log_ratio_backward(call, tensors, noise, needs, upstreams, held, path_scale):
    """Gradients by the latents' tensors: see `kernels.log_ratio_backward`."""
    mu, second, prior_mu, prior_second = (*tensors, None, None)[:4]
    grads = kernels.log_ratio_backward(
        *upstreams, mu, second, noise, prior_mu, prior_second, needs[2:] or (False, False), held=held, path_scale=path_scale,
        **_ratio(call),
    )  # fmt: skip
    return grads[: len(tensors)]


def _ratio(call) -> dict:
    return _gaussian(call.latents) | {"samples": call.samples, "dtype": call.dtype}


def _apart(gradients, large):
    """The gradients of large parameters, and the sums of the others."""
    stored = [g if at else None for g, at in zip(gradients, large, strict=True)]
    return stored, [None if at else g for g, at in zip(gradients, large, strict=True)]


def _loss(plan, tensors):
    """The launches of the kernel that does it all, which the plan keeps."""
    likelihood = plan.likelihood
    plan.loss_launches = kernels.Loss(
        tensors, likelihood=likelihood.function(1), scale=likelihood.fixed or 1.0, target_scale=plan.scaling[0],
        scales=(1 / plan.divisor, plan.kl_scale), per_sample=plan.per_sample, dtype=plan.dtype,
    )  # fmt: skip
    return plan.loss_launches


def _reconstruction(plan, operands, x):
    """Those of the kernel for several parameters and weights, or of those for means by the softmax of a row, likewise."""
    family = kernels.Family(plan.likelihood.function(len(operands)), **plan.options)
    kind = kernels.RowReconstruction if plan.likelihood.by_rows else kernels.Reconstruction
    plan.loss_launches = kind(family=family, per_sample=plan.per_sample, dtype=plan.dtype, device=x.device)
    return plan.loss_launches


def _sample(plan, mu, logvar):
    """Those of the kernels for plain latents, likewise."""
    plan.latents_launches = kernels.Sample(
        mu, logvar, kl_scale=plan.kl_scale, per_sample=plan.per_sample, dtype=plan.dtype
    )  # fmt: skip
    return plan.latents_launches


def _divergence(plan, mu, second, priors, weight):
    """Those of the kernels for any posterior and prior, likewise."""
    call = plan.call
    plan.latents_launches = kernels.Divergence(
        mu, second, *priors, weight, kind=call.kind, floor=call.floor,
        free_bits=call.floor_of_groups(mu) if call.groups == "dimension" and weight is None else None,
        shares=call.shares or (1.0, 1.0), kl_scale=plan.kl_scale, dtype=plan.dtype, **_gaussian(call.latents),
    )  # fmt: skip
    return plan.latents_launches


def _gaussian(latents) -> dict:
    posterior, prior, _ = latents
    return {"posterior": posterior.parameter, "clamp": posterior.clamp, "prior": prior}


def _priors(plan, priors) -> list:
    """The prior's two tensors as the kernels take them: what is the same for the whole batch is one sample of it."""
    one = [p if p.shape[0] < 2 or p.stride(0) else p[:1] for p in priors]
    return [p.contiguous(memory_format=plan.layout) for p in one] or [None, None]


def _as_latents(plan, upstream):
    """What arrived at a KL, in memory as the latents are, or one sample of them."""
    if upstream is None or plan.call.kind not in ("column", "element"):
        return upstream if upstream is None else upstream.contiguous()
    upstream = upstream.unsqueeze(0) if plan.call.kind == "column" else upstream
    return upstream.contiguous(memory_format=plan.layout)


def _reconstruct(plan, parameters, x, weight, divisor, factor, wants, stateless):
    """The reconstruction, and the gradients that are wanted: see `kernels.Reconstruction.forward`."""
    if plan.call.likelihood.dim is not None:
        launches, tensors = _over_classes(plan, parameters, x, weight)
        recon, gradient = launches.forward(*tensors, divisor, factor, stateless)
        return recon, [gradient]
    operands, missing = _operands(plan, parameters)
    launches = plan.loss_launches or _reconstruction(plan, operands, x)
    wants = (*wants, False) if missing else wants
    recon, gradients = launches.forward(operands, x, weight, divisor, factor, wants, stateless)
    return recon, gradients[: len(parameters)]


def _correct(plan, parameters, x, weight, divisor, upstream, stored, used, large):
    """The gradients of large parameters with the factor `upstream`, and that factor: see `kernels.Reconstruction.backward`."""
    if plan.call.likelihood.dim is not None:
        launches, tensors = _over_classes(plan, parameters, x, weight)
        gradient, seen = launches.backward(*tensors, divisor, upstream, stored and stored[0], used)
        return [gradient], seen
    operands, missing = _operands(plan, parameters)
    wants = (*large, False) if missing else large
    launches = plan.loss_launches or _reconstruction(plan, operands, x)
    stored = stored and [*stored, *missing]
    gradients, seen = launches.backward(operands, x, weight, divisor, upstream, stored, used, wants)
    return gradients[: len(parameters)], seen


def _over_classes(plan, parameters, x, weight):
    """The launches of a likelihood over classes or channels, which the plan keeps; prediction, target, which may be the
    three tensors of CSR, weight of positions."""
    likelihood, (prediction,), is_sparse = plan.likelihood, parameters, isinstance(x, tuple)
    if weight is not None:
        weight = weight.expand(likelihood.terms(prediction, prediction if is_sparse else x)).contiguous()
    if plan.loss_launches is None:
        kind = OF_POSITIONS[likelihood.kernel_at_zero if is_sparse else likelihood.kernel]
        plan.loss_launches = kind(per_sample=plan.per_sample, dtype=plan.dtype, device=prediction.device, **plan.options)
    return plan.loss_launches, (prediction, x, weight)


OF_POSITIONS = {"categorical": kernels.Categorical, "mixture": kernels.Mixture, "sparse_multinomial": kernels.SparseMultinomial}


def _operands(plan, parameters):
    """The parameters with the number that stands for a second one; and a None for that."""
    call = plan.call
    if len(parameters) == call.operands:
        return parameters, ()
    first = parameters[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    return (*parameters, torch.full((), call.likelihood.fixed, dtype=dtype, device=first.device)), (None,)


def _times_upstream(total: Tensor, upstream: Tensor, divisor: float | Tensor, parameter: Tensor) -> Tensor:
    """The gradient by a smaller parameter, from the sum's derivative by it: each sample's where each has an upstream."""
    factor = formula.divided(upstream, divisor)
    if total.shape == parameter.shape and not factor.dim():
        return (total * factor).to(parameter.dtype)
    if factor.dim():
        factor = factor.view(-1, *[1] * (total.dim() - 1))
    summed = (total * factor).sum_to_size([1] * (total.dim() - parameter.dim()) + list(parameter.shape))
    return summed.view_as(parameter).to(parameter.dtype)
