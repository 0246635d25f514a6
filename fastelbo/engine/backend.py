"""Which backend computes: Triton on a CUDA or ROCm GPU where Triton is installed, Torch everywhere else."""

import functools
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch

from ..basics.tracing import constant_when_compiled
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
def _triton_backend() -> ModuleType | None:
    """Imported, with Triton, at the first call that needs it; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_backend

    return triton_backend


class Choice(NamedTuple):
    """A backend, and what decided for it."""

    backend: ModuleType
    reason: str


@functools.cache
def choose(device: torch.device) -> Choice:
    """The backend for tensors on `device`. Nothing that decides changes while a process runs, so each device asks once."""
    forced = _forced()
    if device.type == "meta":
        return Choice(torch_backend, "tensors on meta have no values for a kernel to read")
    if forced == "torch":
        return Choice(torch_backend, f"{VARIABLE}=torch forces it")
    if forced is None and device.type != "cuda":
        return Choice(torch_backend, f"the tensors are on {device}, and Triton is for a CUDA or ROCm GPU")
    triton_backend = _triton_backend()
    if triton_backend is None:
        if forced:
            raise RuntimeError(f"{VARIABLE}=triton, but the package triton is not installed")
        return Choice(torch_backend, f"the tensors are on {device}, but the package triton is not installed")
    if device.type != "cuda" and not triton_backend.INTERPRETED:
        raise RuntimeError(
            f"{VARIABLE}=triton, but the tensors are on {device}:"
            " Triton needs a GPU, or TRITON_INTERPRET=1 set before it is imported"
        )
    reason = f"{VARIABLE}=triton forces it" if forced else f"the tensors are on {device}, and triton is installed"
    return Choice(triton_backend, reason + (", interpreted (TRITON_INTERPRET)" if triton_backend.INTERPRETED else ""))


@constant_when_compiled
def has_kernels(device: torch.device) -> bool:
    """Whether Triton computes for tensors on `device`."""
    return backend_for(device) is not torch_backend


def backend_for(device: torch.device) -> ModuleType:
    """The module whose primitives compute for tensors on `device`."""
    return choose(device).backend
