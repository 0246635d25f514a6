"""Numbers that users pass, Python's, numpy's or any other real type's, as Python's own."""

import functools
import math
from numbers import Integral, Real

import torch
from torch import Tensor


def check_real(name: str, value, expected: str = "a number") -> float:
    """A real number as a float; one that depends on a shape while `torch.export` traces, as that."""
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return torch.sym_float(value)
    if not is_real(value):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {expected}, and fit into a float: got one beyond 1.8e308") from None


def check_finite(name: str, value) -> float:
    """Likewise, which is neither NaN nor infinite."""
    number = check_real(name, value)
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def is_real(value) -> bool:
    """Whether it is a real number, or a symbol of one."""
    return isinstance(value, Real | torch.SymInt | torch.SymFloat) and not isinstance(value, bool)


def check_integer(name: str, value, expected: str = "an integer") -> int:
    """An integer of at most 64 bits."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    value = int(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be {expected}, and fit into 64 bits: got one of {value.bit_length()} bits")
    return value


@functools.lru_cache(1024)
def as_tensor(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A number as a 0-d tensor, which goes with every floating dtype: Torch makes one of it at every operation."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


# Torch makes a tensor of a number at every operation, which costs as much as the operation on a small input; and it has no
# `rsub` that writes to given memory. Being 0-d, these go with every dtype and device.
ONE, HALF = as_tensor(1.0, torch.float32), as_tensor(0.5, torch.float32)
