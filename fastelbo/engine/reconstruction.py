"""The reconstruction in Torch: value and gradients in one pass, a block at a time, for parameters and weights of any shape."""

import math

import torch
from torch import Tensor

from ..basics.scalars import as_tensor
from ..basics.sparse import Nonzeros
from ..likelihoods.classes import whole_chunks
from ..likelihoods.links import link_block
from . import formula
from .blocks import added_up, block_size, converted, cut_alike, scratch, spare


def reconstruct(plan, tensors, divisor, factor, wants, wants_sum, out=None):
    """`(sum, gradients)`: the reduced sum if it is wanted, and the gradients that are, times `factor`, unless that is None; in
    the tensors of `out`, if it is there and the plan is whole."""
    n, by = plan.count, None
    x, divides = tensors[n], isinstance(divisor, Tensor) or divisor != 1
    if tensors[0].shape[0] != x.shape[0]:
        return _of_samples(plan, tensors, divisor, factor, wants, wants_sum)
    if factor is not None:
        by = factor.unsqueeze(1) if plan.per_sample else factor
        by = by / divisor if divides else by
    if plan.is_whole:
        weight = tensors[n + 1] if plan.weight_shape is not None else None
        gradients = out or [
            torch.empty_like(p) if want and by is not None else None for p, want in zip(tensors[:n], wants, strict=True)
        ]
        total, _ = _block(plan, tensors[:n], x, weight, by, gradients, wants_sum, plan.per_sample)
    else:
        compute = _in_blocks if plan.is_elementwise else _over_classes if plan.is_of_classes else _in_rows
        total, gradients = compute(plan, tensors, by, wants, wants_sum)
    return total / divisor if wants_sum and divides else total, gradients


def _of_samples(plan, tensors, divisor, factor, wants, wants_sum):
    """Likewise, of several samples of all of x, one after the other."""
    n, batch, sums, stores = plan.count, tensors[plan.count].shape[0], [], factor is not None
    gradients = [torch.empty_like(p) if stores and want else None for p, want in zip(tensors[:n], wants, strict=True)]
    for i in range(0, tensors[0].shape[0], batch):
        own = slice(i, i + batch)
        out = [g if g is None else g[own] for g in gradients]
        of_sample = *(p[own] for p in tensors[:n]), *tensors[n:]
        total, found = reconstruct(plan, of_sample, divisor, factor[own] if stores else None, wants, wants_sum, out)
        sums.append(total)
        for place, gradient in zip(out, found, strict=True):
            if place is not gradient:
                place.copy_(gradient)
    return torch.cat(sums) if wants_sum else None, gradients if stores else None


def multiplied(gradients, factor, dtype):
    """Whether gradients of the factor 1 became those of another one, in place, as `reconstruct`, too, multiplies last.

    Not if they were rounded to fewer bits than `dtype` has, nor if something is not finite, as a derivative may overflow whose
    product does not. With a divisor it is one rounding more, which shows in what is below the least normal number."""
    found = [g for g in gradients if g is not None]
    if any(g.dtype is not dtype for g in found):
        return False
    return all(math.isfinite(g.mul_(factor).sum().item()) for g in found)


def _block(plan, parameters, x, weight, by, out, wants_sum, per_sample):
    """`(sum, gradients)` of a block: the weighted sum, if it is wanted, and the gradients times `by`, in the tensors of `out`
    that are not None. All come in one dtype, and the target as the likelihood's formula takes it; it may be sparse.

    A weight broadcasts to the terms, and parameters to the first. The gradient by one that is smaller is given for each
    element, as large as the tensor of `out`, or summed.
    """
    likelihood, found, given, own, block = plan.likelihood, None, parameters, out, None
    one_pass, rows = likelihood.one_pass, ()
    if isinstance(x, Nonzeros):
        in_sum = likelihood.sparse_sum_in_one_pass if weight is None and not per_sample else None
        one_pass = in_sum or likelihood.sparse_one_pass
    elif weight is None and likelihood.sums_in_one_pass is not None:
        one_pass, rows = likelihood.sums_in_one_pass, (x.shape[0] if per_sample else 1,)
    # Something weighted by 0 may be NaN, which only the sum tells, and that only where looking costs no sync.
    if one_pass is not None and (weight is None or (wants_sum and x.device.type == "cpu")):
        if likelihood.links is not None:
            block = link_block(likelihood.links, given, own, lambda name, like: scratch(name, like, plan.dtype))
            parameters, out = block.parameters, block.out
        found = one_pass(parameters, x, wants_sum, out, spare(parameters[0], plan.dtype), *rows)
    total = None
    if found is not None and wants_sum:
        values, scale, constant, _ = found
        total = _sum(values if weight is None else values.mul_(weight), per_sample)
        if scale != 1:
            total.mul_(as_tensor(scale))
        if constant:
            counted = values.numel() / max(total.numel(), 1) if weight is None else _sum(weight.expand_as(values), per_sample)
            total.add_(constant * counted)
        if weight is not None and not math.isfinite(total.sum().item()):
            found = None
    if found is None:
        return _by_formula(plan, given, x, weight, by, own, wants_sum, per_sample)
    for gradient, slope in zip(out, found.slopes, strict=True):
        if gradient is None:
            continue
        if weight is not None:
            gradient.mul_(weight if weight.dim() == gradient.dim() else weight.unsqueeze(likelihood.dim))
        factor = by if slope == 1 else by * slope
        if isinstance(factor, Tensor):
            gradient.mul_(factor)
        elif factor == -1:
            gradient.neg_()
        elif factor != 1:
            gradient.mul_(as_tensor(factor))
        # A derivative may have overflown where a weight is 0.
        if weight is not None and not math.isfinite(gradient.sum().item()):
            return _by_formula(plan, given, x, weight, by, own, wants_sum, per_sample)
    if block is not None:
        block.pull_back()
    return total, own


def _by_formula(plan, parameters, x, weight, by, out, wants_sum, per_sample):
    """Likewise, by the derivative of the formula."""
    wants = [gradient is not None for gradient in out]
    with torch.set_grad_enabled(any(wants)):
        leaves = [p.detach().requires_grad_(want) for p, want in zip(parameters, wants, strict=True)]
        values = formula.weighted_nll(plan.likelihood, leaves, x, weight)
    gradients = list(out)
    if any(wants):
        # Not afterwards: a derivative may overflow, as that by a rate of 1e-39.
        found = iter(_derivatives(values, [leaf for leaf in leaves if leaf.requires_grad], by))
        for i, gradient in enumerate(out):
            if gradient is not None:
                value = next(found)
                gradients[i] = gradient.copy_(value) if value.shape == gradient.shape else value
    return _sum(values.detach(), per_sample) if wants_sum else None, gradients


def _derivatives(values, leaves, by):
    """Those of the values by the leaves, times `by`, a float or a tensor that is one for all or for each row."""
    if isinstance(by, Tensor):
        by = by.reshape(-1, *[1] * (values.dim() - 1)) if by.dim() else by
        upstream = by.to(values.dtype).expand_as(values)
    else:
        upstream = torch.full_like(values, by)
    return torch.autograd.grad(values, leaves, upstream, materialize_grads=True)


def _sum(values, per_sample):
    """Of everything, or of each row."""
    if not per_sample:
        return values.sum()
    return values.sum(-1) if values.dim() == 2 else formula.reduced(values, "none")


def _in_blocks(plan, tensors, by, wants, wants_sum):
    """`(sum, gradients)` of terms of one element each, a block at a time; the gradients times `by`."""
    dtype, per_sample, n = plan.dtype, plan.per_sample, plan.count
    parameters, x, weight = tensors[:n], tensors[n], None
    if plan.weight_shape is not None:
        weight = tensors[n + 1].expand_as(x).contiguous(memory_format=plan.layout)
    out = [torch.empty_like(p) if want and by is not None else None for p, want in zip(parameters, wants, strict=True)]
    (scale, shift), parts = plan.scaling, []
    for rows, t, w, *blocks in cut_alike(per_sample, x, weight, *parameters, *out):
        t = converted("target", t, dtype)
        if scale != 1:
            t = torch.mul(t, scale, out=scratch("target", t, dtype))
        if shift != 0:
            t = torch.add(t, shift, out=scratch("target", t, dtype))
        w = w if w is None else converted("weight", w, dtype)
        given, slopes = _as_computed(blocks, n, dtype)
        f = by[rows] if isinstance(by, Tensor) and by.dim() else by
        parts.append((rows, _block(plan, given, t, w, f, slopes, wants_sum, per_sample)[0]))
        _put_back(slopes, blocks[n:])
    return added_up(parts, x, 1.0, per_sample, dtype) if wants_sum else None, out


def _over_classes(plan, tensors, by, wants, wants_sum):
    """Likewise, of terms that are made of many elements, some rows at a time; of four blocks, since there are few passes."""
    dtype, per_sample, likelihood = plan.dtype, plan.per_sample, plan.likelihood
    (logits,), x, weight, _ = plan.call.split(tensors)
    if weight is not None:
        weight = weight.expand(likelihood.terms(logits, x))
    out, parts = torch.empty_like(logits) if wants[0] and by is not None else None, []
    height = whole_chunks(4 * block_size() // max(1, logits[0].numel()))
    for i in range(0, logits.shape[0], height):
        rows = slice(i, i + height)
        block = [logits[rows], None if out is None else out[rows]]
        given, slopes = _as_computed(block, 1, dtype)
        target = likelihood.target(given[0], x[rows], dtype)
        w = None if weight is None else weight[rows].to(dtype)
        f = by[rows].reshape(-1, *[1] * (logits.dim() - 1)) if isinstance(by, Tensor) and by.dim() else by
        parts.append((rows, _block(plan, given, target, w, f, slopes, wants_sum, per_sample)[0]))
        _put_back(slopes, block[1:])
    return added_up(parts, logits, 1.0, per_sample, dtype) if wants_sum else None, [out]


def _as_computed(blocks, n, dtype):
    """Of `n` parameters and as many gradients, which may be None, those in the dtype of the arithmetic, or memory for them."""
    given = [converted(f"parameter {i}", p, dtype) for i, p in enumerate(blocks[:n])]
    slopes = [g if g is None or g.dtype == dtype else scratch(f"gradient {i}", g, dtype) for i, g in enumerate(blocks[n:])]
    return given, slopes


def _put_back(slopes, gradients):
    for slope, gradient in zip(slopes, gradients, strict=True):
        if slope is not gradient:
            gradient.copy_(slope)


def _in_rows(plan, tensors, by, wants, wants_sum):
    """Likewise, of parameters smaller than the target, some rows at a time; all at once where a likelihood has no form of its
    own, since autograd then keeps small what is small."""
    dtype, per_sample, likelihood = plan.dtype, plan.per_sample, plan.likelihood
    parameters, x, weight, _ = plan.call.split(tensors)
    shape, batch, parts = parameters[0].shape, x.shape[0], []
    aligned = [p.reshape([1] * (len(shape) - p.dim()) + list(p.shape)) for p in parameters]
    totals = [
        None if not want or by is None else (torch.empty_like if p.shape == shape else torch.zeros_like)(p, dtype=dtype)
        for p, want in zip(aligned, wants, strict=True)
    ]

    def of_rows(value, rows):
        return value[rows] if value is not None and value.shape[0] == batch else value

    in_blocks = likelihood.one_pass is not None and likelihood.dim is None
    summed = likelihood.summed if weight is None and not per_sample else ()
    height = max(1, block_size() // max(1, x[0].numel())) if in_blocks else batch
    for i in range(0, batch, height):
        rows = slice(i, i + height)
        given = [of_rows(p, rows).to(dtype) for p in aligned]
        target = likelihood.target(given[0], x[rows], dtype)
        w = None if weight is None else of_rows(weight, rows).to(dtype)
        f = by[rows].reshape(-1, *[1] * (len(shape) - 1)) if isinstance(by, Tensor) and by.dim() else by
        places = [of_rows(t, rows) for t in totals]
        # Not by the shape of a place, which a block of one row may have in common with a parameter that all rows share.
        own = [total is None or total.shape == shape for total in totals]
        out = list(places)
        for k, is_own in enumerate(own):
            if not is_own and k in summed:
                out[k] = given[k].new_empty(given[k].shape)
            elif not is_own:
                out[k] = scratch(f"slope {k}", given[0], dtype) if in_blocks else torch.empty_like(given[0])
        total, gradients = _block(plan, given, target, w, f, out, wants_sum, per_sample)
        parts.append((rows, total))
        for place, gradient in zip(places, gradients, strict=True):
            if place is not gradient:
                place.add_(gradient.sum_to_size(place.shape))
    found = [t if t is None else t.view(p.shape).to(p.dtype) for t, p in zip(totals, parameters, strict=True)]
    return added_up(parts, x, 1.0, per_sample, dtype) if wants_sum else None, found
