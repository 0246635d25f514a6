"""`python -m fastelbo`: its numbers hold, a mistake fails it, and what is missing or broken is said instead of raised."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

import fastelbo
from conftest import BACKEND, DEVICE, once
from fastelbo import __main__ as report
from fastelbo.engine import backend, torch_backend

MODULE = f"fastelbo.engine.{BACKEND}_backend"
SUBJECTS = ("loss bernoulli", "loss bernoulli_logits", "loss mse", "loss gaussian", "sample_kl")
RESULTS = {
    **{subject: {"loss", "recon", "kl", "d recon_x", "d mu", "d logvar"} for subject in SUBJECTS[:4]},
    "sample_kl": {"kl", "z", "d mu", "d logvar"},
}


def run(*start: str, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([sys.executable, *start], capture_output=True, text=True, env=env)


def field(text: str, name: str) -> str:
    return re.search(rf"^{re.escape(name)} {{2,}}(.*)$", text, re.MULTILINE)[1]


def errors(text: str) -> dict[str, dict[str, float]]:
    """The table of errors, by subject and result."""
    header = next(line for line in text.splitlines() if line.split()[:2] == ["loss", "recon"])
    names = re.findall(r"d \w+|\w+", header)
    rows = {subject: re.search(rf"^{subject} +([-\d.]+.*) (?:ok|FAILED)$", text, re.MULTILINE) for subject in SUBJECTS}
    return {
        subject: {name: float(cell) for name, cell in zip(names, row[1].split(), strict=True) if cell != "-"}
        for subject, row in rows.items()
    }


def verdicts(text: str) -> dict[str, str]:
    return {subject: re.search(rf"^{subject} .*(ok|FAILED)", text, re.MULTILINE)[1] for subject in SUBJECTS}


@pytest.fixture
def main(capsys, monkeypatch):
    """Runs the report in this process; returns what it printed and its exit code."""

    monkeypatch.setattr(report.host_times, "__kwdefaults__", {"seconds": 0.0})  # enough to see that there are times

    def call() -> tuple[str, int]:
        code = report.main()
        return capsys.readouterr().out, code

    return call


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" and version("triton") < "3.7",
    reason="the interpreter of Triton 3.6 warns of itself, and this must pass without a warning",
)
def test_as_a_command():
    result = run("-W", "error", "-m", "fastelbo")
    text = result.stdout
    assert (result.returncode, result.stderr) == (0, "")
    lines = text.splitlines()
    assert len(lines) < 36 and max(map(len, lines)) <= 128
    assert field(text, "fastelbo") == fastelbo.__version__
    assert field(text, "torch") == torch.__version__
    assert field(text, "Python").startswith(platform.python_version())
    assert field(text, "device").startswith("cuda:" if DEVICE.type == "cuda" else "cpu: ")
    assert field(text, "FASTELBO_BACKEND") == (os.environ.get("FASTELBO_BACKEND") or "not set")
    assert field(text, "TRITON_INTERPRET") == (os.environ.get("TRITON_INTERPRET") or "not set")
    assert field(text, "backend").startswith(MODULE + ": ")
    found = errors(text)
    assert {subject: set(row) for subject, row in found.items()} == RESULTS
    # Rounding, and not nothing: float32 beside float64 cannot agree in every result.
    assert all(error < 1e-5 for row in found.values() for error in row.values())
    assert all(max(row.values()) > 1e-9 for row in found.values())
    assert verdicts(text) == dict.fromkeys(SUBJECTS, "ok")
    assert "self-test ok: each error must be at most 1e-05" in lines
    times = re.findall(r"^(loss|loss and backward|sample_kl) +(\d+\.\d) +(\d+\.\d)$", text, re.MULTILINE)
    assert [name for name, *_ in times] == ["loss", "loss and backward", "sample_kl"]
    assert all(float(t) > 0 for _, *both in times for t in both)  # another process may slow any of them down


def test_host_times(device):
    slow, fast = report.host_times(device, lambda: time.sleep(0.005), lambda: None, seconds=0.05)
    assert 0.005 <= slow < 0.05 and 0 < fast < 0.005


def spoil(monkeypatch, primitive: str, change, *place: int) -> None:
    """The result in one place of what a primitive of the backend in use returns is changed."""
    module = backend.backend_for(DEVICE)
    right = getattr(module, primitive)

    def changed(results, first, *rest):
        results = list(results)
        if results[first] is not None:
            results[first] = changed(results[first], *rest) if rest else change(results[first])
        return results

    monkeypatch.setattr(module, primitive, lambda *args, **kwargs: changed(right(*args, **kwargs), *place))


@pytest.mark.usefixtures("by_functions")
@pytest.mark.parametrize(
    "primitive, place, spoiled, name",
    (
        ("loss_forward", (0,), SUBJECTS[:4], "loss"),
        ("loss_forward", (1,), SUBJECTS[:4], "recon"),
        ("loss_forward", (3, 0), SUBJECTS[:4], "d recon_x"),  # the stored gradient, which backward hands on
        ("loss_backward", (0, 0), SUBJECTS[:4], "d recon_x"),
        ("loss_backward", (0, 2), SUBJECTS[:4], "d mu"),
        ("latents_forward", (1,), SUBJECTS[4:], "kl"),
        ("latents_backward", (1,), SUBJECTS[4:], "d logvar"),
    ),
)
def test_a_wrong_result_fails(monkeypatch, main, primitive, place, spoiled, name):
    spoil(monkeypatch, primitive, lambda tensor: 1.01 * tensor, *place)
    text, code = main()
    assert code == 1 and "self-test FAILED" in text
    assert verdicts(text) == {subject: "FAILED" if subject in spoiled else "ok" for subject in SUBJECTS}
    for subject, row in errors(text).items():
        for column, error in row.items():
            if subject in spoiled and column == name:
                assert error == pytest.approx(0.01, rel=0.02)
            else:
                assert error < 1e-5, (subject, column)


@pytest.mark.usefixtures("by_functions")
def test_a_gradient_that_is_wrong_only_where_it_is_computed_anew_fails(monkeypatch, main):
    module = backend.backend_for(DEVICE)
    right = module.loss_backward

    def wrong(plan, beta, tensors, divisor, upstreams, stored, sums, used, needs):
        guessed = used is not None and upstreams[0].item() == float(used)
        (gradient, *others), seen = right(plan, beta, tensors, divisor, upstreams, stored, sums, used, needs)
        return [gradient if guessed else 1.01 * gradient, *others], seen

    monkeypatch.setattr(module, "loss_backward", wrong)
    text, code = main()
    assert code == 1 and errors(text)["loss mse"]["d recon_x"] == pytest.approx(0.01, rel=0.02)


@pytest.mark.usefixtures("by_functions")
def test_nan_fails(monkeypatch, main):
    spoil(monkeypatch, "loss_backward", lambda tensor: tensor * float("nan"), 0, 3)
    text, code = main()
    assert code == 1 and verdicts(text)["loss mse"] == "FAILED" and verdicts(text)["sample_kl"] == "ok"
    assert re.search(r"^loss mse .* nan  FAILED$", text, re.MULTILINE)


def test_noise_that_is_none_fails(monkeypatch, main):
    spoil(monkeypatch, "latents_forward", torch.zeros_like, 0)
    text, code = main()
    assert code == 1 and "sample_kl                          FAILED: ArithmeticError: the noise has mean 0 and standard" in text


def test_an_exception_in_a_kernel_fails(monkeypatch, main):
    def broken(*args, **kwargs):
        raise RuntimeError("no\n  binary")

    monkeypatch.setattr(backend.backend_for(DEVICE), "loss_forward", broken)
    text, code = main()
    assert code == 1
    assert "loss bernoulli                     FAILED: RuntimeError: no binary\n" in text
    assert "loss gaussian                      FAILED: the same\n" in text
    assert verdicts(text)["sample_kl"] == "ok"


@once
def test_what_cannot_be_found_out(monkeypatch, main):
    """Nor do warnings get lost: Torch says by one why it cannot use a GPU."""

    def broken(*args):
        raise OSError("not here")

    def unavailable():
        warnings.warn("the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(platform, "platform", broken)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", broken)
    if DEVICE.type == "cuda":
        monkeypatch.setattr(backend, "choose", lambda device: backend.Choice(torch_backend, ""))
    text, code = main()
    assert code == 0
    assert field(text, "platform") == "not known: OSError: not here"
    assert field(text, "device") == "not known: OSError: not here; no CUDA or ROCm GPU; the driver is too old"
    assert "self-test ok" in text


def test_a_gpu_that_fails(monkeypatch, main):
    def broken():
        raise RuntimeError("CUDA error: device busy")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert report.find_device() == (torch.device("cpu"), "; not known: RuntimeError: CUDA error: device busy")


def test_a_gpu_by_its_properties(monkeypatch):
    """Numbers by hand, since not every machine that runs this has one."""
    properties = SimpleNamespace(name="GPU", major=9, minor=0, gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**29, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(report.collect_env, "get_nvidia_driver_version", lambda run: "575.57")
    device = torch.device("cuda", 1)
    for cuda, hip, kind, runtime, driver in (
        ("13.0", None, "compute capability 9.0", "CUDA 13.0", "NVIDIA 575.57"),
        (None, "6.4", "gfx942", "ROCm 6.4", "not known: torch can tell NVIDIA's alone"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert report.describe_gpu(device) == f"cuda:1, one of 2: GPU, {kind}, 80.0 GiB of memory, 1.5 free"
        assert (report.find_runtime(), report.find_driver()) == (runtime, driver)


@pytest.mark.parametrize(
    "device, forced, triton, interpreted, expected",
    (
        ("cpu", None, True, False, "torch_backend: the tensors are on cpu, and Triton is for a CUDA or ROCm GPU"),
        ("cuda", None, True, False, "triton_backend: the tensors are on cuda, and triton is installed"),
        (
            "cuda:1",
            None,
            True,
            True,
            "triton_backend: the tensors are on cuda:1, and triton is installed, interpreted (TRITON_INTERPRET)",
        ),
        ("cuda", None, False, False, "torch_backend: the tensors are on cuda, but the package triton is not installed"),
        ("cuda", "torch", True, False, "torch_backend: FASTELBO_BACKEND=torch forces it"),
        ("cuda", "triton", True, False, "triton_backend: FASTELBO_BACKEND=triton forces it"),
        ("cpu", "triton", True, True, "triton_backend: FASTELBO_BACKEND=triton forces it, interpreted (TRITON_INTERPRET)"),
    ),
)
def test_why_a_backend_was_chosen(monkeypatch, device, forced, triton, interpreted, expected):
    """Without the caches, and with a stand-in for the kernels, which cannot all be had in one process."""
    kernels = SimpleNamespace(__name__="fastelbo.engine.triton_backend", INTERPRETED=interpreted)
    monkeypatch.setattr(backend, "_forced", lambda: forced)
    if triton:
        monkeypatch.setattr(backend, "_triton_backend", lambda: kernels)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(backend, "_triton_backend", backend._triton_backend.__wrapped__)
    choice = backend.choose.__wrapped__(torch.device(device))
    assert f"{choice.backend.__name__}: {choice.reason}" == f"fastelbo.engine.{expected}"


@once
def test_a_forced_backend():
    result = run("-m", "fastelbo", FASTELBO_BACKEND="torch")
    assert result.returncode == 0
    assert field(result.stdout, "backend") == "fastelbo.engine.torch_backend: FASTELBO_BACKEND=torch forces it"


@once
def test_without_anything_but_torch():
    blocked = "import runpy, sys; sys.modules.update(triton=None, numpy=None); "
    code = blocked + "runpy.run_module('fastelbo', run_name='__main__', alter_sys=True)"
    result = run("-c", code, FASTELBO_BACKEND=None, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr
    assert field(result.stdout, "triton") == "not installed"
    assert field(result.stdout, "backend").startswith("fastelbo.engine.torch_backend: the tensors are on ")
    assert set(verdicts(result.stdout).values()) == {"ok"}
    forced = run("-c", code, FASTELBO_BACKEND="triton", TRITON_INTERPRET="1")
    assert forced.returncode == 1 and "Traceback" not in forced.stderr
    assert field(forced.stdout, "backend").endswith("FASTELBO_BACKEND=triton, but the package triton is not installed")


BAD = [("nonsense", None, "ValueError: the environment variable FASTELBO_BACKEND is 'nonsense'; expected 'torch' or 'triton'")]
if DEVICE.type == "cpu":
    message = "RuntimeError: FASTELBO_BACKEND=triton, but the tensors are on cpu: Triton needs a GPU, or TRITON_INTERPRET=1"
    BAD.append(("triton", None, message))


@once
@pytest.mark.parametrize("forced, interpreted, message", BAD)
def test_a_backend_that_cannot_be(forced, interpreted, message):
    result = run("-m", "fastelbo", FASTELBO_BACKEND=forced, TRITON_INTERPRET=interpreted)
    assert (result.returncode, result.stderr) == (1, "")
    assert field(result.stdout, "backend").startswith(f"not known: {message}")
    assert set(verdicts(result.stdout).values()) == {"FAILED"}
    assert result.stdout.count(message) == 2
    assert "self-test FAILED" in result.stdout
