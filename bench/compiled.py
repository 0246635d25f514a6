"""Compiles kernels ahead of time, in exactly the specialization that their launchers ask for. Needs no GPU.

The launchers run on CPU tensors with Triton's `JITFunction.run` replaced by a recorder; what they would have launched is
then compiled for each target with Triton's own argument binder.
"""

import collections
import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastelbo import kernels
from fastelbo.kernels.launch import THREADS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple
    options: dict


def record(call) -> Launch:
    """The one launch that `call()` asks for."""
    launches, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: launches.append(Launch(self, args, options))
    try:
        call()
    finally:
        JITFunction.run = run
    (launch,) = launches
    return launch


def compile_for(target: str, launch: Launch):
    kernel, args, options = launch
    options = options | {"num_warps": THREADS // TARGETS[target].warp_size}
    backend = make_backend(TARGETS[target])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=parsed.__dict__)


class Accesses(NamedTuple):
    """What the assembly of a kernel does with global memory, and whether it spills."""

    widths: dict[str, collections.Counter]  # "load" and "store": bits -> instructions
    spilled: int  # bytes of local memory or stack


def accesses(compiled) -> Accesses:
    return _nvidia(compiled) if "ptx" in compiled.asm else _amd(compiled)


def _nvidia(compiled) -> Accesses:
    widths = {"load": collections.Counter(), "store": collections.Counter()}
    for kind, modifiers in re.findall(r"\b(ld|st)\.global((?:\.\w+)+)", compiled.asm["ptx"]):
        count = re.search(r"\.v(\d)", modifiers)
        bits = int(re.search(r"\.[bfsu](\d+)$", modifiers).group(1)) * (int(count.group(1)) if count else 1)
        widths["load" if kind == "ld" else "store"][bits] += 1
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return Accesses(widths, sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", report)))


def _amd(compiled) -> Accesses:
    text = compiled.asm["amdgcn"]
    widths = {"load": collections.Counter(), "store": collections.Counter()}
    sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}
    for kind, size in re.findall(r"(?:global|buffer|flat)_(load|store)_(\w+?)(?:_d16\w*)?\s", text):
        widths[kind][sizes[size]] += 1
    # Scalar registers spill into lanes of vector registers, not into memory.
    spilled = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    assert spilled
    return Accesses(widths, sum(map(int, spilled)))


def loss_forward(
    likelihood, prediction, target, latent=torch.float32, *, features=784, per_sample=False, gradient=True, kl=False
):
    recon_x, x, mu, logvar = _tensors(prediction, target, latent, features)
    rows = len(recon_x) if per_sample else 1
    dtype = torch.float64 if prediction == torch.float64 else torch.float32
    given = torch.zeros((rows,) if per_sample else ()) if kl else None
    guess = torch.ones(rows, dtype=dtype) if gradient else None
    latents = (None, None) if kl else (mu, logvar)
    return record(
        lambda: kernels.loss_forward(recon_x, x, *latents, given, 1.0, guess, **_settings(likelihood, per_sample, dtype))
    )


def loss_backward(likelihood, prediction, target, latent=torch.float32, *, retained=False, recon=True, latents=True, kl=False):
    recon_x, x, mu, logvar = _tensors(prediction, target, latent)
    dtype = torch.float64 if prediction == torch.float64 else torch.float32
    upstream = torch.ones((), dtype=dtype)
    stored = (None, None) if retained or not recon else (torch.empty_like(recon_x), upstream.reshape(1))
    wants = {"wants_recon": recon, "wants_latents": latents, "wants_kl": kl}
    settings = _settings(likelihood, False, dtype)
    return record(
        lambda: kernels.loss_backward(recon_x, x, mu, logvar, 1.0, (upstream, None, None), *stored, **settings, **wants)
    )


def sample_forward(latent, *, seeded=True, per_sample=False, features=20, wants_kl=True):
    mu, noise, dtype = _latents(latent, seeded, features)
    options = {"kl_weight": 1.0, "per_sample": per_sample, "dtype": dtype, "wants_kl": wants_kl}
    return record(lambda: kernels.sample_forward(mu, mu.clone(), noise, **options))


def sample_backward(latent, *, seeded=True):
    mu, noise, dtype = _latents(latent, seeded)
    upstreams = None, torch.ones((), dtype=dtype)
    options = {"kl_weight": 1.0, "per_sample": False, "dtype": dtype}
    return record(lambda: kernels.sample_backward(mu.clone(), mu, mu.clone(), noise, 1.0, upstreams, **options))


def _tensors(prediction, target, latent, features=784):
    recon_x, x = torch.zeros(128, features, dtype=prediction), torch.zeros(128, features, dtype=target)
    return recon_x, x, *(torch.zeros(128, 20, dtype=latent) for _ in range(2))


def _latents(latent, seeded, features=20):
    mu = torch.zeros(128, features, dtype=latent)
    noise = torch.zeros((), dtype=torch.int64) if seeded else torch.zeros_like(mu)
    return mu, noise, torch.float64 if latent == torch.float64 else torch.float32


def _settings(likelihood, per_sample, dtype):
    return {
        "likelihood": likelihood, "scale": 1.0, "target_scale": 1.0, "weights": (1.0, 1.0), "per_sample": per_sample,
        "dtype": dtype,
    }  # fmt: skip
