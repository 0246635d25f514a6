"""What the kernels make of their arguments: numbers from host or device, bounds of rows, upstream gradients."""

import triton
import triton.language as tl


@triton.jit
def scalar(pointer, value, DTYPE: tl.constexpr):
    """A number that is given on the device or, where `pointer` is None, by the host."""
    if pointer is None:
        return tl.full([], value, DTYPE)  # in the interpreter, tl.cast would take a Python float through float32
    else:
        return tl.load(pointer).to(DTYPE)


@triton.jit
def row_bounds(row, columns, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Start of a row, and how much of it is streamed in whole tiles; ALIGNED rows leave the last 15 or fewer elements.

    The compiler knows that `columns // 16 * 16` is a multiple of 16, so accesses under a mask on it stay 128 bits wide;
    `columns` itself would make them scalar.
    """
    if WIDE:
        row = row.to(tl.int64)
    else:
        columns = columns.to(tl.int32)
    if ALIGNED:
        end = columns // 16 * 16
        return row * end, end
    else:
        return row * columns, columns


@triton.jit
def upstream_of(pointer, row, DTYPE: tl.constexpr):
    """The gradient that arrives at an output; None stands for zero."""
    if pointer is None:
        return tl.zeros([], dtype=DTYPE)
    else:
        return tl.load(pointer + row).to(DTYPE)


@triton.jit
def factor_of_term(grad_loss, own, row, weight, weight_value, DTYPE: tl.constexpr):
    """The gradient that arrives at a term of the loss: by way of the loss, in which it is times a weight, and on its own."""
    return scalar(weight, weight_value, DTYPE) * upstream_of(grad_loss, row, DTYPE) + upstream_of(own, row, DTYPE)


@triton.jit
def is_wrong(factor, used, seen, row, worker, DTYPE: tl.constexpr):
    """Whether a row's gradient needs computing: not if `factor` is what was `used`. A copy of it goes to `seen`."""
    wrong = True
    if seen is not None:
        number = tl.load(factor + row).to(DTYPE)
        if worker == 0:
            tl.store(seen + row, number)
        if used is not None:
            wrong = number != tl.load(used + row)  # NaN is never what was guessed
    return wrong


@triton.jit
def reciprocal(divisor, value):
    """1 / divisor: of the number on the device or, where the pointer is None, as the host has computed it."""
    one = tl.full([], 1.0, tl.float64)
    if divisor is None:
        return one * value
    else:
        return one / tl.load(divisor).to(tl.float64)
