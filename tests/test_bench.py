"""The benchmarks measure what they say they do, and the documentation shows what they measured."""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from conftest import BACKEND

if BACKEND != "torch":
    pytest.skip("the same for both backends", allow_module_level=True)

from bench import conftest as suite
from bench import gpu, likelihoods, measure, report, sparse
from bench.cases import Case, select
from bench.conftest import pytest_benchmark_generate_commit_info
from bench.measure import _check_agreement, count_kernels, device_events, interleaved, peak_bytes
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


def test_kernels_are_what_the_device_does(monkeypatch):
    """Not what of the host's code has a name, which the profiler has among the device's events too."""
    events = [
        SimpleNamespace(name=name, device_type=getattr(DeviceType, kind), is_user_annotation=annotation)
        for name, kind, annotation in (
            ("aten::add", "CPU", False),
            ("cudaLaunchKernel", "CPU", False),
            ("add_kernel", "CUDA", False),
            ("Memcpy HtoD (Pageable -> Device)", "CUDA", False),
            ("Memset (Device)", "CUDA", False),
            ("loss_fwd_kernel", "CUDA", False),
            ("Optimizer.step#Adam.step", "CUDA", True),
            ("Optimizer.step#Adam.step", "CPU", True),
            ("Torch-Compiled Region: 0/0", "CUDA", True),
        )
    ]
    monkeypatch.setattr(measure, "profile", lambda **_: contextlib.nullcontext(SimpleNamespace(events=lambda: events)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    assert count_kernels(lambda: calls.append(1)) == 2
    assert device_events(lambda: calls.append(1)) == [events[i].name for i in (2, 3, 4, 5)]
    assert len(calls) == 2
    del events[2:6]
    assert count_kernels(lambda: None) is None


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
    chosen = select({"subjects": ["objective", "sample"], "modes": ["backward"]}, cuda=True, of_usual=True)
    usual = select({}, cuda=True)
    assert chosen == [case for case in usual if case.subject in ("objective", "sample") and case.mode == "backward"]
    assert {case.likelihood for case in chosen} == {"bernoulli_logits", "-"}


def options_of_the_suite(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    suite.add_options(parser.add_argument)
    return parser.parse_args([*arguments, "--device", "cpu"])


def test_numbers_of_threads(monkeypatch):
    """The usual cases with one and with Torch's own, of which some; what is chosen with Torch's own, or with all that are."""
    monkeypatch.setattr(suite, "THREADS", 2)
    found = {}

    def parametrize(name, values, **_):
        found[name] = values

    def cases(*arguments: str) -> dict[int, list[Case]]:
        config = SimpleNamespace(option=options_of_the_suite(*arguments))
        suite.pytest_generate_tests(SimpleNamespace(config=config, parametrize=parametrize))
        return {n: [case for _, case, threads, _ in found["measured"] if threads == n] for n in (1, 2, 3)}

    usual = select({}, cuda=False)
    by_threads = cases()
    assert by_threads[1] == usual and set(by_threads[2]) < set(usual) and not by_threads[3]
    assert {case.subject for case in by_threads[2]} == {"loss", "sample", "objective", "step"}
    assert {(case.dtypes, case.mode) for case in by_threads[2]} == {("float32", "backward")}
    choice = "--subjects", "loss", "--shapes", "1x784"
    assert [len(some) for some in cases(*choice).values()] == [0, 4, 0]
    assert [len(some) for some in cases(*choice, "--threads", "1", "3").values()] == [4, 0, 4]
    number, case, threads, name = found["measured"][-1]
    assert (number, threads, name) == ("8/8", 3, f"{case.id}, 3 threads")


def test_a_case_has_its_number_of_threads(monkeypatch, capsys):
    """Of the usual cases, those with the first are compiled."""
    before, seen = torch.get_num_threads(), []
    measured = SimpleNamespace(timings={"eager": SimpleNamespace(seconds=[2e-3])})
    monkeypatch.setattr(suite, "measure", lambda *given: seen.append((torch.get_num_threads(), given[-1])) or measured)
    plugin = SimpleNamespace(global_and_fixture_disabled=contextlib.nullcontext)
    manager = SimpleNamespace(getplugin=lambda _: plugin)
    config = SimpleNamespace(option=options_of_the_suite("--threads", "1", "2"), pluginmanager=manager)
    case = Case("loss", "1x784", "mse", "float32", "backward")
    try:
        for threads in (1, 2):
            assert suite.measure_with(config, f"{threads}/2", case, threads, f"with {threads}") == (case, measured, threads)
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, True), (2, False)]
    assert capsys.readouterr().out == "[1/2] with 1: eager 2 ms\n[2/2] with 2: eager 2 ms\n"


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


MACHINE = {"device": "a machine (fast)", "threads": 2, "torch": "2.13", "triton": "3.9", "python": "3.12"}
COMMIT = {"id": "0123456789abcdef", "dirty": False}


def keep(path, *rows, machine=MACHINE, commit=COMMIT, when="2026-01-02T03:04:05"):
    path.write_text(json.dumps({"machine_info": machine, "commit_info": commit, "datetime": when, "benchmarks": rows}))
    return path


def test_parts_of_a_run_are_merged(tmp_path, capsys):
    """As if they had been measured in one."""
    eager, fused = row("eager", 4.0), row("fastelbo", 1.0, eager=4.1)
    others = [each | {"subject": "step", "shape": "mlp-784"} for each in (eager, fused)]
    parts = keep(tmp_path / "a.json", eager, fused), keep(tmp_path / "b.json", *others, when="2026-01-02T03:01:05")
    report.main([*map(str, parts), "--merge", str(tmp_path)])
    merged = tmp_path / "a-machine-fast.json"
    whole = keep(tmp_path / "whole.json", eager, fused, *others, when="2026-01-02T03:01:05")
    assert json.loads(merged.read_text()) == json.loads(whole.read_text())
    assert capsys.readouterr().out == f"Written: {merged}\n{report.terminal([report.load(whole)])}\n"


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    first, again = row("eager", 4.0), row("eager", 3.0)
    part, other = keep(tmp_path / "a.json", first), first | {"shape": "1x784"}
    for refused, message in (
        (keep(tmp_path / "b.json", other, again), "in more than one file: loss 128x784 mse float32 backward eager$"),
        (
            keep(tmp_path / "c.json", other, machine=MACHINE | {"torch": "2.11"}),
            "c.json has another machine_info than .*a.js",
        ),
        (keep(tmp_path / "d.json", other, commit=COMMIT | {"dirty": True}), "d.json has another commit_info than .*a.json"),
    ):
        with pytest.raises(ValueError, match=message):
            report.merge([part, refused])


def test_the_commit_of_files_without_their_history(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMMIT", "0123abc")
    assert pytest_benchmark_generate_commit_info(None) == {"id": "0123abc", "dirty": False}
    monkeypatch.setenv("COMMIT", "0123abc-dirty")
    assert pytest_benchmark_generate_commit_info(None) == {"id": "0123abc", "dirty": True}
    monkeypatch.setenv("COMMIT", "")
    found = pytest_benchmark_generate_commit_info(None)
    assert "commit unknown, 2026-01-02" in report.load(keep(tmp_path / "a.json", commit=found)).where


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("eager", 4.0), row("compiled", 0.75), row("fastelbo", 1.0, eager=4.1, compiled=0.74)]
    path = keep(tmp_path / "machine.json", *rows)
    run = report.load(path)
    (found,) = run.rows
    assert found.speedup("eager") == 4.1
    assert found.share_of_floor() == 0.5  # 2 MB at 4 GB/s would take half of the millisecond
    cells = dict(zip(report.COLUMNS, report.cells(found), strict=True))
    assert (cells["x eager"], cells["x compiled"]) == ("4.10", "0.74 ▼")
    assert (cells["GB/s"], cells["of floor"], cells["spread"], cells["peak MB"]) == ("2", "50%", "30%", "3")
    report.write([run], tmp_path)
    text = (tmp_path / report.OVERVIEW).read_text()
    assert "| `loss` 128x784 | - | - | 4.10 / 0.74 ▼ | - |" in text
    assert "a machine (fast), 2 threads; torch 2.13, triton 3.9, Python 3.12; commit 0123456789, 2026-01-02" in text
    assert path.with_suffix(".md").exists()
    assert path.with_suffix(".svg").exists()


def test_report_of_several_numbers_of_threads(tmp_path):
    """Each has its rows and its tables, and no row of one is taken for a row of another."""
    pytest.importorskip("matplotlib")
    alone = [row("eager", 4.0), row("fastelbo", 1.0, eager=4.0)]
    together = [row("eager", 3.0), row("fastelbo", 2.0, eager=1.5)]
    rows = [found | {"threads": n} for n, some in ((1, alone), (2, together)) for found in some]
    run = report.load(keep(tmp_path / "machine.json", *rows))
    assert run.where.startswith("a machine (fast), 1 and 2 threads; torch")
    assert [(found.threads, found.speedup("eager")) for found in run.rows] == [(1, 4.0), (2, 1.5)]
    cells = [dict(zip(report.COLUMNS, report.cells(found), strict=True)) for found in run.rows]
    assert [(c["mode"], c["fastelbo ms"]) for c in cells] == [("backward, 1 thread", "1"), ("backward, 2 threads", "2")]
    first, second = report.overview([run]).split("With 2 threads:")
    assert "With 1 thread:" in first
    assert "| `loss` 128x784 | - | - | 4.00 / - | - |" in first and "| `loss` 128x784 | - | - | 1.50 / - | - |" in second
    assert "`loss` and of `sample_kl` + `loss`: 4 / -" in first and "`loss` and of `sample_kl` + `loss`: 1.5 / -" in second
    report.plots(run, tmp_path / "machine.svg")
    assert "With 1 thread. a machine" in (tmp_path / "machine.svg").read_text().replace("&#160;", " ")
    parts = [keep(tmp_path / f"{n}.json", *(found for found in rows if found["threads"] == n)) for n in (1, 2)]
    assert report.merge(parts)["benchmarks"] == rows
    with pytest.raises(ValueError, match="float32 backward 1 thread eager"):
        report.merge([parts[0], parts[0]])


def test_the_documentation_shows_the_results_that_are_kept():
    """`python -m bench.report --write bench/results/*.json` was run, and nobody wrote numbers by hand."""
    runs = [run for run in map(report.load, sorted(report.RESULTS.glob("*.json"))) if run.rows]
    assert runs
    assert (report.RESULTS / report.OVERVIEW).read_text().strip() == report.overview(runs).strip()
    assert "bench/results/overview.md" in (ROOT / "docs" / "performance.md").read_text()
    for run in runs:
        assert run.path.with_suffix(".md").read_text() == report.markdown(run)


def test_a_run_from_the_command_line(tmp_path):
    """The whole way once: one small case, and one that there is no time for."""
    output = tmp_path / "results.json"
    choice = ["--subjects", "loss", "--shapes", "1x784", "128x784", "--likelihoods", "mse", "--seconds", "0.05", "--limit", "0"]
    command = [sys.executable, "-m", "bench", *choice, "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/2] loss 1x784 mse float32 backward: eager" in done.stdout
    assert "[2/2] loss 128x784 mse float32 backward: left out, since 0 seconds had passed" in done.stdout
    data = json.loads(output.read_text())
    assert data["machine_info"]["torch"] == torch.__version__
    assert {found["shape"] for found in data["benchmarks"]} == {"1x784"}
    rows = {found["contender"]: found for found in data["benchmarks"]}
    assert {"eager", "fastelbo"} <= set(rows)
    assert rows["fastelbo"]["least_bytes"] == 4 * (3 * 784 + 6 * 20)
    # Of so few rounds the medians may be of quite other ones: but of the same rounds the ratios are each other's reciprocals.
    over, under = (rows[a]["speedup_over"][b] for a, b in (("fastelbo", "eager"), ("eager", "fastelbo")))
    assert over[0] <= over[1] <= over[2] and over[1] * under[1] == pytest.approx(1, rel=0.2)


def test_stages_go_on_after_a_failure(monkeypatch, tmp_path, capfd):
    """With a log of all that was printed, and a limit for what hangs."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntry: print('begun'); time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted')")
    stages = {
        "a": [gpu.Command(60, ["-c", "print('one'); raise SystemExit(3)"]), gpu.Command(gpu.GRACE + 1, [slow])],
        "b": [gpu.Command(60, ["-c", "import os; print(os.environ['GIVEN'])"], {"GIVEN": "two"})],
    }
    monkeypatch.setattr(gpu, "STAGES", {name: lambda commands=commands: iter(commands) for name, commands in stages.items()})
    monkeypatch.setattr(gpu, "INSTALL", gpu.Command(60, ["-c", "print('installed')"]))
    monkeypatch.setattr(gpu, "OUT", tmp_path / "logs")
    monkeypatch.setattr(gpu, "sees_a_gpu", lambda: True)
    assert gpu.main(["a", "b"]) == 1
    logs = [(tmp_path / "logs" / f"gpu-{name}.log").read_text() for name in stages]
    printed = capfd.readouterr().out
    assert printed.startswith("".join(logs))
    assert [line for line in printed.splitlines() if line[:1].islower()] == [
        "installed", "one", "begun", "interrupted", "installed", "two",
        "failed: a: python -c print('one'); raise SystemExit(3)", f"logs and results: {tmp_path / 'logs'}",
    ]  # fmt: skip
    assert [line.split(" after")[0] for line in printed.splitlines() if line.startswith("-- ")] == [
        f"-- exit code {code}" for code in (0, 3, 0, 0, 0)
    ]
    assert gpu.main(["b"]) == 0
    capfd.readouterr()
    monkeypatch.setattr(gpu, "sees_a_gpu", lambda: False)
    assert gpu.main(["a", "b"]) == 0
    assert capfd.readouterr().out == f"{sys.executable} sees no CUDA GPU, so nothing was run: a, b\n"


def test_stages_run_what_there_is(tmp_path, monkeypatch):
    """Every command of them parses, and every test file that is left out exists."""
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    for stage in gpu.STAGES.values():
        assert sum(command.limit for command in (gpu.INSTALL, *stage())) < 600
    for command in gpu.tests():
        for name in command.arguments:
            if str(name).startswith("--ignore="):
                assert (ROOT / name.removeprefix("--ignore=")).exists()


@pytest.mark.parametrize("name", ("`l1`, 32x3x64x64", "the same, naive without log x!", "`gaussian`, one log scale, 128x784"))
def test_contenders_of_likelihoods_agree(name):
    """And what does not is no contender."""
    torch.manual_seed(0)
    subject = likelihoods.SUBJECTS[name]()
    likelihoods.check(subject)
    with pytest.raises(AssertionError):
        likelihoods.check(subject._replace(known=subject.known + 1e4))
    with pytest.raises(AssertionError):
        likelihoods.check(subject._replace(naive=lambda: 1.01 * subject.naive()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about Torch on a CPU")
@pytest.mark.parametrize("name", likelihoods.SUBJECTS)
def test_no_more_memory_than_the_naive_code(name):
    """At its peak, beyond what each thread keeps: a block of scratch."""
    torch.manual_seed(0)
    subject = likelihoods.SUBJECTS[name]()

    def peak(call) -> int:
        def step():
            for leaf in subject.leaves:
                leaf.grad = None
            call().backward()

        for _ in range(2):
            step()
        for leaf in subject.leaves:
            leaf.grad = None
        return measure.peak_bytes(step, torch.device("cpu"))

    assert peak(subject.fused) <= 1.01 * peak(subject.naive) + 2**16


@pytest.mark.parametrize("module", (likelihoods, sparse), ids=("likelihoods", "sparse"))
def test_a_part_of_a_table_is_not_kept(module, monkeypatch, capsys):
    """In the place of the whole."""
    monkeypatch.setattr(sys, "argv", ["", "--match", "poisson", "--write"])
    with pytest.raises(SystemExit):
        module.main()
    assert "--write keeps all rows" in capsys.readouterr().err


def test_a_table_says_how_it_was_made(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/likelihoods.py", "--runs", "3", "--write"])
    assert likelihoods.stand("bench.likelihoods").endswith(". `python -m bench.likelihoods --runs 3 --write`")


def test_medians_of_runs():
    runs = [{"a": (1.0, 5.0)}, {"a": (9.0, 1.0)}, {"a": (2.0, 2.0)}]
    assert likelihoods.medians(runs) == {"a": (2.0, 2.0)}


def test_table_of_likelihoods():
    eager = {"1 thread": {"a": (1500.0, 2.0), "b": (20.0, 0.9)}, "2 threads": {"a": (750.0, 0.996), "b": (21.0, 1.25)}}
    rows = likelihoods.table(eager, {}).splitlines()
    assert rows[0] == "|  | 1 thread | 2 threads | naive, ms |"
    assert rows[2:] == ["| a | 2.00 | 1.00 | 1.5 / 0.75 |", "| b | 0.90 ▼ | 1.25 | 0.02 / 0.021 |"]
    rows = likelihoods.table(eager, {"compiled": {"a": (700.0, 0.9), "b": (9.0, 1.1)}}).splitlines()
    assert rows[0] == "|  | 1 thread | 2 threads | compiled | naive, ms |"
    assert rows[2:] == ["| a | 2.00 | 1.00 | 0.90 ▼ | 1.5 / 0.75 |", "| b | 0.90 ▼ | 1.25 | 1.10 | 0.02 / 0.021 |"]


def test_compiled_likelihoods_agree(monkeypatch):
    """Or it is said; what draws numbers is let be."""
    monkeypatch.setattr(torch, "compile", lambda function: lambda: 1.01 * function() if function is naive else function())
    for name, disagrees in (("`mse`, 1x784", True), ("`sample_kl` + `loss`, `bernoulli_logits`, 1x784", False)):
        subject = likelihoods.SUBJECTS[name]()
        naive = subject.naive
        with pytest.raises(AssertionError) if disagrees else contextlib.nullcontext():
            likelihoods.compiled(subject)
