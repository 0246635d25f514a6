"""The benchmarks measure what they say they do, and the README shows what they measured."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import BACKEND

if BACKEND != "torch":
    pytest.skip("the same for both backends", allow_module_level=True)

from bench import report
from bench.cases import Case, select
from bench.measure import _check_agreement, interleaved, peak_bytes
from bench.subjects import Compared, Streams
from bench.traffic import least_bytes

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_a_call_that_takes_twice_as_long_is_seen_to():
    contenders = {"short": lambda: time.sleep(0.004), "long": lambda: time.sleep(0.008)}
    samples = interleaved(contenders, CPU, 0.3)
    ratios = [b / a for a, b in zip(samples["short"], samples["long"], strict=True)]
    assert 1.7 < sorted(ratios)[len(ratios) // 2] < 2.3
    assert len(ratios) >= 7


def test_peak_memory():
    def call():
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        return second + 1

    assert peak_bytes(call, CPU) == pytest.approx(8_000_000, abs=100)


def test_the_floor_counts_each_tensor_once():
    tensors = {"prediction": torch.zeros(128, 784, dtype=torch.bfloat16), "target": torch.zeros(128, 784, dtype=torch.uint8)}
    tensors |= {"mu": torch.zeros(128, 20), "logvar": torch.zeros(128, 20)}
    features, latents = 128 * 784, 4 * 128 * 20
    assert least_bytes("loss", False, tensors) == 3 * features + 2 * latents
    assert least_bytes("loss", True, tensors) == 5 * features + 6 * latents
    assert least_bytes("sample", True, tensors) == 8 * latents
    assert least_bytes("objective", True, tensors) == 5 * features + 8 * latents


def test_a_contender_that_computes_something_else_is_refused():
    expected = [Compared(torch.tensor([1.0, 2.0]), 1e-5)]
    _check_agreement("same", [Compared(torch.tensor([1.0, 2.00001]), 1e-5)], expected)
    for wrong in (2.001, float("nan")):
        with pytest.raises(AssertionError, match="computes something else"):
            _check_agreement("other", [Compared(torch.tensor([1.0, wrong]), 1e-5)], expected)


@pytest.mark.parametrize("mode", ("forward", "backward", "scaled", "varying"))
@pytest.mark.parametrize("subject", ("loss", "objective"))
@pytest.mark.parametrize("dtypes", ("float32", "bfloat16", "bfloat16+uint8", "float16"))
def test_contenders_agree(subject, dtypes, mode):
    """So that their times may be compared: the naive code and fastelbo give the same values and gradients."""
    for likelihood in ("bernoulli", "bernoulli_logits", "mse", "gaussian"):
        streams = Streams(Case(subject, "1x784", likelihood, dtypes, mode), CPU, 0)
        naive, fused = (streams.results(streams.bind(f)[0]) for f in (streams.naive, streams.fused))
        assert len(naive) == (3 if mode == "forward" else 6)
        _check_agreement(f"{subject} {likelihood} {dtypes} {mode}", fused, naive)


def test_factors_that_vary_differ_from_call_to_call():
    streams = Streams(Case("loss", "1x784", "mse", "float32", "varying"), CPU, 0)
    (call,) = streams.bind(streams.naive)
    gradients = []
    for _ in range(4):
        call()
        gradients.append(streams.inputs[0].tensors["prediction"].grad)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(gradients))
    assert torch.equal(gradients[0], gradients[3])


def test_selection():
    usual = select({}, cuda=False)
    assert len(usual) == len(set(usual))
    assert {case.subject for case in usual} == {"loss", "sample", "objective", "step"}
    chosen = select({"shapes": ["128x784"], "subjects": ["loss"], "modes": ["scaled"], "dtypes": None}, cuda=False)
    assert {case.likelihood for case in chosen} == {"bernoulli", "bernoulli_logits", "mse", "gaussian"}
    assert all(case[1::2] == ("128x784", "float32") and case.mode == "scaled" for case in chosen)


def row(contender, milliseconds, **ratios):
    seconds = {"q1": 0.9e-3 * milliseconds, "median": 1e-3 * milliseconds, "q3": 1.2e-3 * milliseconds, "rounds": 9}
    return {
        **Case("loss", "128x784", "mse", "float32", "backward")._asdict(),
        "contender": contender,
        "seconds": seconds,
        "speedup_over": {name: [value / 2, value, 2 * value] for name, value in ratios.items()},
        "peak_bytes": 3_000_000,
        "kernels": None,
        "least_bytes": 2_000_000,
        "copy_bytes_per_second": 4e9,
    }


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    machine = {"device": "a machine", "threads": 2, "torch": "2.13", "triton": "3.9", "python": "3.12"}
    commit = {"id": "0123456789abcdef", "dirty": False}
    rows = [row("eager", 4.0), row("compiled", 0.75), row("fastelbo", 1.0, eager=4.1, compiled=0.74)]
    path = tmp_path / "machine.json"
    path.write_text(
        json.dumps({"machine_info": machine, "commit_info": commit, "datetime": "2026-01-02T03:04:05", "benchmarks": rows})
    )
    run = report.load(path)
    (found,) = run.rows
    assert found.speedup("eager") == 4.1
    assert found.share_of_floor() == 0.5  # 2 MB at 4 GB/s would take half of the millisecond
    cells = dict(zip(report.COLUMNS, report.cells(found), strict=True))
    assert (cells["x eager"], cells["x compiled"]) == ("4.10", "0.74 ▼")
    assert (cells["GB/s"], cells["of floor"], cells["spread"], cells["peak MB"]) == ("2", "50%", "30%", "3")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nafter\n")
    report.write([run], readme)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| `loss` 128x784 | - | - | 4.10 / 0.74 ▼ | - |" in text
    assert "a machine, 2 threads; torch 2.13, triton 3.9, Python 3.12; commit 0123456789, 2026-01-02" in text
    assert path.with_suffix(".md").exists()
    assert path.with_suffix(".svg").exists()


def test_the_readme_shows_the_results_that_are_kept():
    """`python -m bench.report --write bench/results/*.json` was run, and nobody wrote numbers by hand."""
    runs = [run for run in map(report.load, sorted((ROOT / "bench" / "results").glob("*.json"))) if run.rows]
    assert runs
    begin, end = report.MARKERS
    section = (ROOT / "README.md").read_text().partition(begin)[2].partition(end)[0]
    assert section.strip() == report.readme_section(runs).strip()
    for run in runs:
        assert run.path.with_suffix(".md").read_text() == report.markdown(run)


def test_a_run_from_the_command_line(tmp_path):
    """The whole way once: one small case."""
    output = tmp_path / "results.json"
    choice = ["--subjects", "loss", "--shapes", "1x784", "--likelihoods", "mse", "--seconds", "0.05", "--device", "cpu"]
    command = [sys.executable, "-m", "bench", *choice, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/1] loss 1x784 mse float32 backward: eager" in done.stdout
    data = json.loads(output.read_text())
    assert data["machine_info"]["torch"] == torch.__version__
    rows = {found["contender"]: found for found in data["benchmarks"]}
    assert {"eager", "fastelbo"} <= set(rows)
    assert rows["fastelbo"]["least_bytes"] == 4 * (3 * 784 + 6 * 20)
    medians = rows["eager"]["seconds"]["median"] / rows["fastelbo"]["seconds"]["median"]
    assert rows["fastelbo"]["speedup_over"]["eager"][1] == pytest.approx(medians, rel=0.5)
