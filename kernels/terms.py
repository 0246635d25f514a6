"""The terms of likelihoods with several parameters, under weights: value and derivatives of a tile of elements."""

import triton
import triton.language as tl

from .broadcast import ABSENT, ROW, load_operand
from .links import from_softmax


@triton.jit
def reconstruction_tile(
    first, second, third, target, weight, grad_first, grad_second, grad_third, o, at, mask, row_start, factor,
    top, inverse, library, log_library, slope,
    second_inner, second_groups, third_inner, third_groups, weight_apart, weight_inner, weight_groups,
    soft_min, target_scale, constant,
    LIKELIHOOD: tl.constexpr, AT_ZERO: tl.constexpr, FIRST_LINK: tl.constexpr, SECOND_LINK: tl.constexpr, SPREAD: tl.constexpr,
    SECOND: tl.constexpr, THIRD: tl.constexpr, WEIGHT: tl.constexpr, SECOND_WHOLE: tl.constexpr, THIRD_WHOLE: tl.constexpr,
    SHIFT: tl.constexpr, SUMS_SECOND: tl.constexpr, SUMS_THIRD: tl.constexpr, SUMS_LIBRARY: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Weighted negative log-likelihood of the elements `o`, whose targets lie `at` other offsets, and its derivatives by a
    second and third parameter and a library that the row has one of. With AT_ZERO, the function for a target of 0: what value
    and derivative by the library are more than with that, in float64.

    `top` and the four behind it are of the row, and None unless its mean is of a softmax: see `links.of_softmax`.

    Gradients are stored unless their pointers are None: times `factor` by parameters as large as the target, and as they are by
    smaller ones, to be added up.
    """
    a = tl.load(first + o, mask=mask, other=0.5).to(DTYPE)
    t = tl.zeros_like(a)
    if target is not None:
        t = tl.load(target + at, mask=mask, other=0).to(DTYPE) * target_scale
        if SHIFT != 0.0:
            t += SHIFT
    b = a
    if library is not None:
        a, b, share = from_softmax(a, top, inverse, library, log_library)
    elif FIRST_LINK is not None:
        a, b, first_chain = FIRST_LINK(a, None)
    c, second_chain = a, a
    if SECOND != ABSENT:
        b = load_operand(second, o, mask, row_start, None, second_inner, second_groups, SECOND, WIDE, DTYPE)
        if SECOND_LINK is not None:
            b, c, second_chain = SECOND_LINK(b, soft_min)
        if SPREAD:
            b += tl.zeros(o.shape, dtype=DTYPE)
    if THIRD != ABSENT:
        c = load_operand(third, o, mask, row_start, None, third_inner, third_groups, THIRD, WIDE, DTYPE)
        c += tl.zeros(o.shape, dtype=DTYPE)
    keep, upstream = mask, factor
    if WEIGHT != ABSENT:
        w = load_operand(weight, o, mask, row_start, weight_apart, weight_inner, weight_groups, WEIGHT, WIDE, DTYPE)
        if WEIGHT == ROW:
            w += tl.zeros(o.shape, dtype=DTYPE)
        # A weight of 0 leaves out what may be NaN.
        keep = mask & (w != 0.0)
        upstream = w * factor
    nll, to_first, to_second, to_third = LIKELIHOOD(a, b, c, t, constant, upstream)
    if WEIGHT != ABSENT:
        nll *= w
    to_library = nll
    if SUMS_LIBRARY:
        to_library = to_first * share
    if AT_ZERO is not None:
        zero, zero_to_first, _, _ = AT_ZERO(a, b, c, tl.zeros_like(t), constant, upstream)
        if WEIGHT != ABSENT:  # rounded as where it was added up
            zero *= w
        nll = nll.to(tl.float64) - zero.to(tl.float64)
        if SUMS_LIBRARY:
            to_library = to_library.to(tl.float64) - (zero_to_first * share).to(tl.float64)
    if SECOND_WHOLE:
        to_second *= upstream
    elif WEIGHT != ABSENT:
        to_second *= w
    if THIRD_WHOLE:
        to_third *= upstream
    elif WEIGHT != ABSENT:
        to_third *= w
    if library is not None:
        to_first *= a
    elif FIRST_LINK is not None:
        to_first *= first_chain
    if SECOND_LINK is not None:
        to_second *= second_chain
    if grad_first is not None:
        to_first = tl.where(keep, to_first, 0.0)
        if library is not None:  # by its share, which is NaN in a row of which nothing counts and something is NaN
            to_first -= tl.where(slope == 0.0, 0.0, a * (slope * factor))
        tl.store(grad_first + o, to_first.to(grad_first.dtype.element_ty), mask=mask)
    if grad_second is not None:
        tl.store(grad_second + o, tl.where(keep, to_second, 0.0).to(grad_second.dtype.element_ty), mask=mask)
    if grad_third is not None:
        tl.store(grad_third + o, tl.where(keep, to_third, 0.0).to(grad_third.dtype.element_ty), mask=mask)
    nll = tl.where(keep, nll, 0.0)
    return (
        nll,
        tl.where(keep, to_second, 0.0) if SUMS_SECOND else nll,
        tl.where(keep, to_third, 0.0) if SUMS_THIRD else nll,
        tl.where(keep, to_library, 0.0) if SUMS_LIBRARY else nll,
    )
