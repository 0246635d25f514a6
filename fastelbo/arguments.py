"""Checks of what users pass: every error names the argument, what came and what was expected."""

from math import nan
from numbers import Real

import torch
from torch import Tensor

from .likelihoods import LIKELIHOODS, Likelihood
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


def check_prediction(name: str, value) -> None:
    """A floating-point tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.dim() == 0:
        raise ValueError(f"{name} must have the batch as its first dimension, got a 0-d tensor")


def check_target(name: str, value) -> None:
    """A tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS + _INTEGERS:
        raise TypeError(f"{name} must be a tensor of booleans, integers or floats of 16 to 64 bits, got {value.dtype}")


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


def check_latents(mu, logvar) -> None:
    check_prediction("mu", mu)
    check_prediction("logvar", logvar)
    check_alike("logvar", logvar, "mu", mu)


def check_batch(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape[:1] != other.shape[:1]:
        raise ValueError(
            f"{name} and {other_name} must have the same batch size, their first dimension:"
            f" got {name} {tuple(value.shape)} and {other_name} {tuple(other.shape)}"
        )


def find_likelihood(name) -> Likelihood:
    row = LIKELIHOODS.get(name) if isinstance(name, str) else None
    if row is None:
        raise ValueError(f"likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}; got {name!r}")
    return row


def check_reduction(reduction) -> str:
    """One name of `REDUCTIONS`."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}; got {reduction!r}")
    return reduction


def split_reduction(reduction) -> tuple[str, str]:
    """The reductions of reconstruction and KL, from one name or a pair."""
    if not isinstance(reduction, tuple | list):
        return (check_reduction(reduction),) * 2
    if len(reduction) != 2:
        raise ValueError(f"reduction must be a name or a pair (reconstruction, kl); got {reduction!r}")
    recon, kl = map(check_reduction, reduction)
    if (recon == "none") != (kl == "none"):
        raise ValueError(f"reduction 'none' cannot be paired with another; got {reduction!r}")
    return recon, kl


def weight(reduction: str, value: Tensor) -> float:
    """The factor that makes the sum over `value` the reduction; NaN for a mean over nothing, as in Torch."""
    if reduction == "batchmean":
        count = value.shape[0]
    elif reduction == "mean":
        count = value.numel()
    else:
        return 1.0
    return 1 / count if count else nan


def check_real(name: str, value, expected: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return float(value)


def check_number(name: str, value, like: Tensor) -> float | Tensor:
    """A real number as a float, a real 0-d tensor as it is; as a float, too, if it lies on the CPU and wants no gradient."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}")
        if value.device.type != "cpu" and value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} or on the CPU, got {value.device}")
        if value.device.type == "cpu" and not value.requires_grad and not is_traced(value):
            return float(value)
        return value
    return check_real(name, value, "a number or a 0-d tensor")


def check_scale(scale, row: Likelihood, like: Tensor | None = None) -> float | Tensor:
    """The standard deviation of the Gaussian likelihood, 1 if not given. A tensor must be near `like`."""
    if scale is None:
        return 1.0
    if not row.has_scale:
        raise ValueError(f"scale is for the likelihood 'gaussian'; got it with {row.name!r}")
    scale = check_number("scale", scale, like)
    if isinstance(scale, Tensor):
        if scale.requires_grad:
            raise ValueError("scale must not require grad: a learned scale is not supported yet; pass scale.detach()")
    elif not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale


def check_unit_interval(name: str, value: Tensor, row: Likelihood, advice: str, factor: float = 1.0) -> None:
    """Numbers in [0, 1] once multiplied by `factor`; NaN passes, to become a loss of NaN."""
    if value.dtype == torch.bool or value.numel() == 0:
        return
    if value.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which have no minimum in Torch
        value = value.double()
    low, high = sorted(float(v) * factor for v in torch.aminmax(value.detach()))
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must lie in [0, 1] for the likelihood {row.name!r}, got values from {low:g} to {high:g}; {advice}"
        )
