"""Every kernel, compiled ahead of time for four architectures as its launcher would: it compiles, nothing spills, and memory
is accessed 128 bits at a time."""

import os

import pytest
import torch

from support import LIKELIHOODS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a kernel is either interpreted or compiled", allow_module_level=True)
pytest.importorskip("triton", reason="triton is installed on Linux only")

import compiled
from compiled import TARGETS, accesses, compile_for

F32, F16, BF16, F64, U8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8
PAIRS = ((F32, F32), (BF16, U8), (BF16, BF16), (F16, F32), (F64, F64))

KERNELS = {
    **{f"loss forward {name} {p} {t}": (compiled.loss_forward, name, p, t) for name in LIKELIHOODS for p, t in PAIRS},
    **{f"loss backward {name} {p} {t}": (compiled.loss_backward, name, p, t) for name in LIKELIHOODS for p, t in PAIRS[:2]},
    **{f"sample forward {d}": (compiled.sample_forward, d) for d in (F32, BF16, F64)},
    **{f"sample backward {d}": (compiled.sample_backward, d) for d in (F32, BF16, F64)},
}
VARIANTS = {
    "no gradient": lambda: compiled.loss_forward("bernoulli", F32, F32, gradient=False),
    "given kl": lambda: compiled.loss_forward("bernoulli", F32, F32, kl=True),
    "rows, aligned": lambda: compiled.loss_forward("bernoulli", F32, F32, per_sample=True),
    "rows, ragged": lambda: compiled.loss_forward("bernoulli", F32, F32, per_sample=True, features=785),
    "retained graph": lambda: compiled.loss_backward("bernoulli", F32, F32, retained=True),
    "only the latents' gradients": lambda: compiled.loss_backward("bernoulli", F32, F32, recon=False),
    "only the prediction's gradient": lambda: compiled.loss_backward("bernoulli", F32, F32, latents=False),
    "only a given kl's gradient": lambda: compiled.loss_backward("bernoulli", F32, F32, recon=False, latents=False, kl=True),
    "prediction and given kl": lambda: compiled.loss_backward("bernoulli", F32, F32, latents=False, kl=True),
    "given eps": lambda: compiled.sample_forward(F32, seeded=False),
    "no kl": lambda: compiled.sample_forward(F32, wants_kl=False),
    "sample rows, ragged": lambda: compiled.sample_forward(F32, per_sample=True),
    "backward of given eps": lambda: compiled.sample_backward(F32, seeded=False),
}


# The operands that each kernel's streaming loops load and store, in terms of the dtypes that it is built with.
LOADED = {
    compiled.loss_forward: lambda p, t: (p, t, F32, F32),
    compiled.loss_backward: lambda p, t: (p, t, F32, F32),
    compiled.sample_forward: lambda d: (d, d),
    compiled.sample_backward: lambda d: (d, d, d),
}
STORED = {
    compiled.loss_forward: lambda p, t: (p,),
    compiled.loss_backward: lambda p, t: (p, F32, F32),
    compiled.sample_forward: lambda d: (d,),
    compiled.sample_backward: lambda d: (d, d),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_wide_accesses(name, target):
    build, *arguments = KERNELS[name]
    launch = build(*arguments)
    found = accesses(compile_for(target, launch))
    assert found.spilled == 0
    dtypes = [a for a in arguments if isinstance(a, torch.dtype)]
    threads = launch.options["num_warps"] * TARGETS[target].warp_size
    for kind, operands in (("load", LOADED[build](*dtypes)), ("store", STORED[build](*dtypes))):
        # What a thread moves of a tile of each operand, in pieces of 16 bytes; less than one is for a narrow dtype.
        expected = sum(launch.options["BLOCK"] * d.itemsize // threads // 16 for d in operands)
        assert found.widths[kind][128] >= expected, kind
        assert expected > 0 or kind == "store" or F64 in dtypes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_variants_compile_without_spills(variant, target):
    assert accesses(compile_for(target, VARIANTS[variant]())).spilled == 0


def test_a_spill_and_a_narrow_access_are_seen():
    """What the tests above would say of a bad kernel."""
    ragged = accesses(compile_for("sm_90", VARIANTS["rows, ragged"]()))
    assert ragged.widths["load"][128] == ragged.widths["store"][128] == 0
    launch = compiled.loss_forward("bernoulli_logits", BF16, U8)
    starved = launch._replace(options={**launch.options, "maxnreg": 32})
    assert accesses(compile_for("sm_90", starved)).spilled > 0
