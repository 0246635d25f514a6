"""Kernels that apply single device functions element by element, compiled as the library's own are."""

import torch
import triton
import triton.language as tl

from fastelbo.kernels.launch import launch
from fastelbo.kernels.noise import box_muller, normals
from fastelbo.kernels.numerics import log, log1p, log_of_positive


@triton.jit
def box_muller_kernel(i0, i1, out0, out1, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b = box_muller(tl.load(i0 + o), tl.load(i1 + o))
    tl.store(out0 + o, a)
    tl.store(out1 + o, b)


@triton.jit
def pair_kernel(x, out0, out1, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b = FUNCTION(tl.load(x + o))
    tl.store(out0 + o, a)
    tl.store(out1 + o, b)


@triton.jit
def normals_kernel(seed, out, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    start = tl.program_id(0) * SIZE
    tl.store(out + start + tl.arange(0, SIZE), normals(tl.load(seed), start, SIZE, ALIGNED))


SIZE = 1024


def run_box_muller(i0: torch.Tensor, i1: torch.Tensor) -> torch.Tensor:
    """Of as many elements as a multiple of SIZE: in one program of all, a compiler would unroll hundreds for each thread."""
    out = torch.empty(2, len(i0), device=i0.device)
    launch(box_muller_kernel, len(i0) // SIZE, i0.device, i0, i1, out[0], out[1], SIZE=SIZE)
    return out


def run_normals(seed: torch.Tensor, count: int, size: int, aligned: bool) -> torch.Tensor:
    """The first `count` normals, made in tiles of `size`."""
    out = torch.empty(count, device=seed.device)
    launch(normals_kernel, count // size, seed.device, seed, out, SIZE=size, ALIGNED=aligned)
    return out


def run_pair(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two results of `function`, a device function, of as many elements as a multiple of SIZE."""
    out = torch.empty_like(x), torch.empty_like(x)
    launch(pair_kernel, x.numel() // SIZE, x.device, x, *out, FUNCTION=function, SIZE=SIZE)
    return out


@triton.jit
def logarithms(x, unused):
    return log(x), log_of_positive(x), log1p(x)


def run_logarithms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log, log_of_positive and log1p of as many elements as a multiple of SIZE."""
    return run_triple(logarithms, x, x)


@triton.jit
def triple_kernel(x, y, out0, out1, out2, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b, c = FUNCTION(tl.load(x + o), tl.load(y + o))
    tl.store(out0 + o, a)
    tl.store(out1 + o, b)
    tl.store(out2 + o, c)


def run_triple(function, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three results of `function`, a device function of two arguments, of as many elements as a multiple of SIZE."""
    out = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    launch(triple_kernel, x.numel() // SIZE, x.device, x, y, *out, FUNCTION=function, SIZE=SIZE)
    return out
