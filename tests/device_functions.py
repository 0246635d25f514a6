"""Kernels that apply single device functions element by element."""

import torch
import triton
import triton.language as tl

from fastelbo.kernels.noise import box_muller
from fastelbo.kernels.numerics import exp_and_expm1, log1p


@triton.jit
def box_muller_kernel(i0, i1, out0, out1, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    a, b = box_muller(tl.load(i0 + o), tl.load(i1 + o))
    tl.store(out0 + o, a)
    tl.store(out1 + o, b)


@triton.jit
def exp_kernel(x, exp, expm1, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b = exp_and_expm1(tl.load(x + o))
    tl.store(exp + o, a)
    tl.store(expm1 + o, b)


@triton.jit
def log1p_kernel(x, out, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + o, log1p(tl.load(x + o)))


SIZE = 1024


def run_box_muller(i0: torch.Tensor, i1: torch.Tensor) -> torch.Tensor:
    out = torch.empty(2, len(i0), device=i0.device)
    box_muller_kernel[(1,)](i0, i1, out[0], out[1], SIZE=len(i0))
    return out


def run_exp_and_expm1(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exp, expm1 = torch.empty_like(x), torch.empty_like(x)
    exp_kernel[(x.numel() // SIZE,)](x, exp, expm1, SIZE=SIZE)
    return exp, expm1


def run_log1p(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    log1p_kernel[(x.numel() // SIZE,)](x, out, SIZE=SIZE)
    return out
