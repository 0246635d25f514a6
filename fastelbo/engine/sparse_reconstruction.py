"""The reconstruction of a sparse target in Torch: value and gradients in one pass, some rows at a time.

Where the target is 0, closed forms are computed without it; the others are computed from the parameters at their places, and
put over these. No memory of the size of the target is needed, beside that of the gradients.
"""

import torch
from torch import Tensor

from ..basics.sparse import Rows
from .blocks import added_up, block_size, converted, scratch
from .reconstruction import _block, multiplied


def forward(plan, parameters, x: Rows, weight, divisor, known):
    """`(reconstruction, stored, used)`: the reduced sum, the gradients that the plan stores, times the factor `used`, which is
    `known` or guessed."""
    used = None
    # Elsewhere than on a CPU nothing could look at the guess in backward without a sync.
    if True in plan.stores and x.values.device.type == "cpu":
        used = known if known is not None else plan.guess.known[1] if plan.per_sample else plan.guess.number
    recon, stored = _reconstruct(plan, parameters, x, weight, divisor, used, plan.stores, True)
    return recon, stored, used


def backward(plan, parameters, x: Rows, weight, divisor, upstream, stored, used, needs):
    """The gradients that are needed, and the upstream factor, for the next forward to guess."""
    is_number = not plan.per_sample and upstream.device.type == "cpu"
    seen = upstream.item() if is_number else upstream
    if used is not None and (seen == used if is_number else torch.equal(seen, used)):  # a NaN equals nothing
        seen = used  # not what was passed in, to which its owner may write
    else:
        if not is_number:
            seen = seen.to(plan.dtype, copy=True)
        if not (is_number and used == 1 and multiplied(stored, seen, plan.dtype)):
            _, stored = _reconstruct(plan, parameters, x, weight, divisor, seen, needs, False)
    return stored, seen


def _reconstruct(plan, parameters, x: Rows, weight, divisor, factor, wants, wants_sum):
    """`(sum, gradients)`: the reduced sum if it is wanted, and the gradients that are, times `factor`, unless that is None."""
    dtype, per_sample, likelihood, (batch, width) = plan.dtype, plan.per_sample, plan.likelihood, x.shape
    by, divides = factor, isinstance(divisor, Tensor) or divisor != 1
    if isinstance(by, Tensor) and by.dim():
        by = by.unsqueeze(1)
    if by is not None and divides:
        by = by / divisor
    whole = [p.shape == x.shape for p in parameters]
    aligned = [
        p if is_whole else p.reshape([1] * (2 - p.dim()) + list(p.shape)) for p, is_whole in zip(parameters, whole, strict=True)
    ]
    totals = [
        None if not want or by is None else torch.empty_like(p) if is_whole else torch.zeros_like(p, dtype=dtype)
        for p, is_whole, want in zip(aligned, whole, wants, strict=True)
    ]
    parts = []
    for rows, target in x.pieces(block_size() if x.values.device.type == "cpu" else batch * width):

        def of_rows(value, rows=rows):
            return value[rows] if value is not None and value.shape[0] == batch else value

        given = [converted(f"parameter {k}", of_rows(p), dtype) for k, p in enumerate(aligned)]
        target = target._replace(values=likelihood.target(given[0], target.values, dtype))
        w = None if weight is None else of_rows(weight).to(dtype)
        f = by[rows] if isinstance(by, Tensor) and by.dim() else by
        places = [of_rows(t) for t in totals]
        slopes = [
            place if place is None or (is_whole and place.dtype == dtype) else scratch(f"gradient {k}", given[0], dtype)
            for k, (place, is_whole) in enumerate(zip(places, whole, strict=True))
        ]
        total, found = _block(plan, given, target, w, f, slopes, wants_sum, per_sample)
        parts.append((rows, total))
        for place, slope, is_whole in zip(places, found, whole, strict=True):
            if place is None or place is slope:
                continue
            place.copy_(slope) if is_whole else place.add_(slope.sum_to_size(place.shape))
    found = [t if t is None else t.view(p.shape).to(p.dtype) for t, p in zip(totals, parameters, strict=True)]
    total = added_up(parts, aligned[0], 1.0, per_sample, dtype) if wants_sum else None
    return total / divisor if wants_sum and divides else total, found
