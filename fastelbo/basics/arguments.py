"""Checks of what users pass: every error names the argument, what came and what was expected."""

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

from .records import check_choice
from .scalars import check_integer, check_real
from .tracing import is_traced

REDUCTIONS = ("sum", "batchmean", "mean", "none")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
REALS = FLOATS + _INTEGERS


def check_prediction(name: str, value) -> None:
    """A floating-point tensor with a batch dimension."""
    check_floats(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must have the batch as its first dimension, got a 0-d tensor")


def check_floats(name: str, value) -> None:
    """A dense floating-point tensor."""
    check_dense(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def check_reals(name: str, value) -> None:
    """A dense tensor of real numbers."""
    check_dense(name, value)
    if value.dtype not in REALS:
        raise TypeError(f"{name} must be a tensor of booleans, integers or floats of 16 to 64 bits, got {value.dtype}")


def check_dense(name: str, value) -> None:
    """A tensor of elements with strides, not a sparse, nested or packed one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:  # of nested ones, only the jagged have a layout of their own
        found = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {found}")


def check_alike(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same shape and device: nothing is broadcast."""
    if value.shape != other.shape:
        advice = f"; of one size, so {other_name}.view_as({name}) may be meant" if value.numel() == other.numel() else ""
        raise ValueError(
            f"{name} must have the shape of {other_name}:"
            f" got {name} {tuple(value.shape)} and {other_name} {tuple(other.shape)}{advice}"
        )
    check_device(name, value, other_name, other)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}: got {value.device} and {other.device}")


def check_generator(generator, mu: Tensor) -> None:
    """None, or one on the device of `mu`."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    device = generator.device
    if device.type != mu.device.type or device.index not in (None, mu.device.index):  # "cuda" stands for the current one
        raise ValueError(f"generator must be on the device of mu: got {generator.device} and {mu.device}")


def check_noise(eps, generator, mu: Tensor, n_samples: int | None = None) -> None:
    """Noise that is given: of the shape of `mu`, or behind a dimension of several samples."""
    if generator is not None:
        raise ValueError("give eps or generator, not both")
    check_prediction("eps", eps)
    if n_samples is None:
        check_alike("eps", eps, "mu", mu)
        return
    if eps.shape != (n_samples, *mu.shape):
        raise ValueError(
            f"eps must have the shape of mu behind a dimension of n_samples: got {tuple(eps.shape)}"
            f" and not {(n_samples, *mu.shape)}"
        )
    check_device("eps", eps, "mu", mu)


def check_count(name: str, value, expected: str = "an integer") -> int:
    value = check_integer(name, value, expected)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_batch(name: str, value: Tensor, other_name: str, other: Tensor, of: str = "several samples") -> None:
    """The same batch, where samples are paired."""
    if value.shape[:1] != other.shape[:1]:
        raise ValueError(
            f"{name} and {other_name} must have the same batch size, their first dimension, for {of}:"
            f" got {name} {tuple(value.shape)} and {other_name} {tuple(other.shape)}"
        )


OF_EACH = "the reduction 'none'"


def check_smaller(name: str, value, other_name: str, other: Tensor) -> None:
    """A floating-point tensor that broadcasts to `other`."""
    check_floats(name, value)
    check_broadcasts(name, value, other_name, other.shape)
    if value.dim() > 0 or value.device.type != "cpu":
        check_device(name, value, other_name, other)


def broadcasts(value: Tensor, shape: torch.Size) -> bool:
    """Whether it does, to a shape. `expand` says so by an error, which torch.compile does not let be caught; and `n in (1, m)`
    is false to it of a size that is dynamic."""
    sizes = zip(reversed(value.shape), reversed(shape), strict=False)
    return value.dim() <= len(shape) and all(n == 1 or n == m for n, m in sizes)


def check_broadcasts(name: str, value: Tensor, other_name: str, shape: torch.Size) -> None:
    if not broadcasts(value, shape):
        missing, hint = len(shape) - value.dim(), ""
        if missing > 0 and broadcasts(value, shape[: value.dim()]):  # a weight for each sample, or for each step
            hint = f"; {name}[{', '.join(['...'] + ['None'] * missing)}] does"
        raise ValueError(f"{name} must broadcast to {other_name}: got {name} {tuple(value.shape)} and {tuple(shape)}{hint}")


def check_weight(weight, x: Tensor, dim: int | None) -> None:
    """Weights that broadcast to `x`, all of whose classes or channels along `dim`, if there is one, share one."""
    if isinstance(weight, int | float):
        raise TypeError(
            f"weight must be a tensor, with weights of elements of x, got {weight!r}: a loss takes a number as recon_weight"
        )
    check_reals("weight", weight)
    check_broadcasts("weight", weight, "x", x.shape)
    check_device("weight", weight, "x", x)
    place = -1 if dim is None else dim - x.dim() + weight.dim()
    if place >= 0 and weight.shape[place] != 1:
        shape = (1,) * (x.dim() - weight.dim()) + tuple(weight.shape)
        raise ValueError(f"weight must have 1 element along dimension {dim} of x, which has one term; got {shape}")


def check_reduction(reduction, names: Sequence[str] = REDUCTIONS) -> str:
    return check_choice("reduction", reduction, names)


def split_reduction(reduction) -> tuple[str, str]:
    """The reductions of reconstruction and KL, from one name or a pair."""
    if not isinstance(reduction, tuple | list):
        return (check_reduction(reduction),) * 2
    if len(reduction) != 2:
        raise ValueError(f"reduction must be a name or a pair (reconstruction, kl); got {reduction!r}")
    recon, kl = map(check_reduction, reduction)
    if "none" in (recon, kl):
        raise ValueError(f"reduction 'none' cannot be paired: give the name alone; got {reduction!r}")
    return recon, kl


def factor_of(reduction: str, value: Tensor) -> float:
    """The factor that makes the sum over `value` the reduction; NaN for a mean over nothing, as in Torch."""
    if reduction == "batchmean":
        count = value.shape[0]
    elif reduction == "mean":
        count = value.numel()
    else:
        return 1.0
    return 1 / count if count else nan


def check_number(name: str, value, like: Tensor) -> float | Tensor:
    """A real number as a float, a real 0-d tensor as it is; as a float, too, if it lies on the CPU and wants no gradient."""
    if isinstance(value, Tensor):
        check_reals(name, value)
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.device.type != "cpu" and value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} or on the CPU, got {value.device}")
        if value.device.type == "cpu" and not value.requires_grad and not is_traced(value):
            return float(value)
        return value.resolve_neg()
    return check_real(name, value, "a number or a 0-d tensor")


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Results and arithmetic are float64 if an input is, otherwise float32: sums overflow float16, and bfloat16 has 8 bits."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
