"""Which backend computes: Triton on a CUDA or ROCm GPU where Triton is installed, Torch everywhere else."""

import functools
import importlib.util
import os
from types import ModuleType

import torch

from . import torch_backend

VARIABLE = "FASTELBO_BACKEND"


@functools.cache
def _forced() -> str | None:
    """`torch` or `triton` where the environment forces one. Read once: the variable is not for changing at run time."""
    name = os.environ.get(VARIABLE) or None
    if name not in (None, "torch", "triton"):
        raise ValueError(f"the environment variable {VARIABLE} is {name!r}; expected 'torch' or 'triton'")
    return name


@functools.cache
def _kernels() -> ModuleType | None:
    """`fastelbo.kernels`, imported at the first call that needs it; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import kernels

    return kernels


def backend_for(device: torch.device) -> ModuleType:
    """The module whose primitives compute for tensors on `device`."""
    forced = _forced()
    if forced == "torch" or (forced is None and device.type != "cuda"):
        return torch_backend
    kernels = _kernels()
    if kernels is None:
        if forced:
            raise RuntimeError(f"{VARIABLE}=triton, but the package triton is not installed")
        return torch_backend
    if device.type != "cuda" and not kernels.INTERPRETED:
        raise RuntimeError(
            f"{VARIABLE}=triton, but the tensors are on {device}:"
            " Triton needs a GPU, or TRITON_INTERPRET=1 set before it is imported"
        )
    return kernels
