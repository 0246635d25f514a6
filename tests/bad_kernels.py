"""A streaming kernel with one fault or another, to see that the budget's tests find it."""

import torch
import triton
import triton.language as tl

from bench.budget import Kernel
from bench.compiled import record
from bench.traffic import RECONSTRUCTION, Stream

BLOCK = 512


@triton.jit(do_not_specialize=["n"])
def streaming_kernel(prediction, target, gradient, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    end = n // 16 * 16
    for start in tl.range(tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        o = start + tl.arange(0, BLOCK)
        p = tl.load(prediction + o, mask=o < end)
        d = p - tl.load(target + o, mask=o < end)
        if FAULT == "extra load":
            d += tl.load(prediction + o + 16, mask=o < end)
        if FAULT == "float64":
            d = (d.to(tl.float64) * 0.1).to(tl.float32)
        if FAULT == "scalar store":
            tl.store(gradient + o, d, mask=o < n)
        else:
            tl.store(gradient + o, d, mask=o < end)
    tail = end + tl.arange(0, 16)
    if tl.program_id(0) == 0:
        d = tl.load(prediction + tail, mask=tail < n) - tl.load(target + tail, mask=tail < n)
        tl.store(gradient + tail, d, mask=tail < n)


def streaming(fault: str | None) -> Kernel:
    a, b, c = (torch.zeros(4096) for _ in range(3))
    block = 16 * BLOCK if fault == "spill" else BLOCK
    options = {"enable_fp_fusion": True} | ({"maxnreg": 24} if fault == "spill" else {})
    launch = record(lambda: streaming_kernel[(1,)](a, b, c, a.numel(), FAULT=fault, BLOCK=block, **options))
    dtypes = dict.fromkeys((*RECONSTRUCTION, "gradient"), torch.float32)
    return Kernel(f"streaming, {fault}", launch, (Stream(RECONSTRUCTION, ("gradient",)),), dtypes)
