"""Importing fastelbo costs little: no triton, no CUDA. And where triton is missing, or cannot run, it works or says why."""

import os
import subprocess
import sys

import pytest

from conftest import once

pytestmark = once  # each is a process of its own

RUN = """
import torch, fastelbo
x = torch.rand(4, 6, requires_grad=True)
mu = torch.randn(4, 3, requires_grad=True)
loss = fastelbo.loss(x, x.detach(), mu, mu).loss
loss.backward()
z, kl = fastelbo.sample_kl(mu, mu)
print(loss.item() > 0, x.grad is not None)
"""


def python(code: str, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("FASTELBO_BACKEND", "TRITON_INTERPRET")}
    warnings = "error", "ignore:Conversion of an array with ndim:DeprecationWarning"  # numpy's, of Triton 3.6's interpreter
    flags = [flag for warning in warnings for flag in ("-W", warning)]
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, env={**env, **environment})


def test_import_brings_no_triton_and_asks_cuda_nothing():
    code = """
import sys, torch
def forbidden(*args, **kwargs): raise AssertionError("CUDA was asked")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = torch.cuda._lazy_init = forbidden
import fastelbo, fastelbo.nn, fastelbo.reference
print("triton" in sys.modules, "fastelbo.kernels" in sys.modules)
"""
    result = python(code)
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_cpu_tensors_bring_no_triton():
    assert python(RUN + "\nimport sys; print('triton' in sys.modules)").stdout.split() == ["True", "True", "False"]


def test_interpreted_kernels_ask_cuda_nothing():
    """A CUDA build of Torch raises, where there is no driver, when it is asked for the current GPU."""
    pytest.importorskip("triton")
    forbid = "import torch\ndef forbidden(): raise AssertionError('CUDA was asked')\ntorch._C._cuda_getDevice = forbidden\n"
    result = python(forbid + RUN, FASTELBO_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_without_triton():
    blocked = "import sys; sys.modules['triton'] = None\n"
    assert python(blocked + RUN).stdout.split() == ["True", "True"]
    finder = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
"""
    result = python(finder + RUN, FASTELBO_BACKEND="triton")
    assert "FASTELBO_BACKEND=triton, but the package triton is not installed" in result.stderr


@pytest.mark.parametrize("backend", ("torch", ""))
def test_forced_backend(backend):
    assert python(RUN, FASTELBO_BACKEND=backend).stdout.split() == ["True", "True"]


def test_triton_forced_on_a_cpu_without_its_interpreter():
    result = python(RUN, FASTELBO_BACKEND="triton")
    assert "the tensors are on cpu: Triton needs a GPU, or TRITON_INTERPRET=1" in result.stderr


def test_unknown_backend():
    result = python(RUN, FASTELBO_BACKEND="cuda")
    assert "FASTELBO_BACKEND is 'cuda'; expected 'torch' or 'triton'" in result.stderr


EVERYTHING = """
torch.set_default_dtype(torch.float32)
torch.manual_seed(0)
p, x = torch.rand(3, 2500, requires_grad=True), torch.rand(3, 2500)
three = [torch.rand(3, 40, requires_grad=True) for _ in range(3)]
counts = torch.randint(0, 3, (3, 40)).float()
mu, logvar = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]
for dtype in (torch.float32, torch.float64, torch.float16):
    torch.set_default_dtype(dtype)
    terms = [fastelbo.nll(p, x, reduction=reduction) for reduction in ("sum", "none")]
    terms.append(fastelbo.nll(tuple(three), counts, likelihood="zero_inflated_negative_binomial"))
    torch.manual_seed(0)
    terms += [fastelbo.reparameterize(mu, logvar), fastelbo.kl_divergence(mu, logvar.exp(), posterior="var")]
    sum(t.sum() for t in terms).backward()
print([t.grad.sum().item() for t in (p, *three, mu, logvar)])
"""


@pytest.mark.parametrize("mode", ("float64", "float16", "bfloat16", "inference"))
def test_what_surrounds_the_import_changes_nothing(mode):
    """What is made at import time has a dtype of its own, and may be saved for backward."""
    around = f"torch.set_default_dtype(torch.{mode})\nimport fastelbo\n"
    if mode == "inference":
        around = "with torch.inference_mode():\n    import fastelbo\n"
    found = [python("import torch\n" + first + EVERYTHING) for first in ("import fastelbo\n", around)]
    for run in found:
        assert not run.returncode, run.stderr
    assert found[0].stdout == found[1].stdout
