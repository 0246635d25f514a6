"""The options of the suite, the rows that they select, and what the JSON says of the machine and of each row."""

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable

import cpuinfo
import pytest
import torch
from pytest_benchmark.utils import get_commit_info

from .cases import CHOICES, Case, again, select
from .measure import CONTENDERS, measure
from .report import in_words

STARTED = time.monotonic()
THREADS = torch.get_num_threads()  # before a case changes it


def add_options(add: Callable) -> None:
    """To pytest's parser, or to argparse's."""
    for name, choices in CHOICES.items():
        described = [f"{k} ({v})" for k, v in choices.items()] if name in ("subjects", "modes") else choices
        add(f"--{name}", nargs="+", choices=list(choices), metavar=name[:-1].upper(), help=", ".join(described))
    available = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=available, help=f"(here: {available})")
    add("--threads", nargs="+", type=int, metavar="N", help="on a CPU, in turns of the whole (1, and what Torch takes)")
    add("--seconds", type=float, default=0.8, help="that each case is timed for (0.8)")
    add("--usual", action="store_true", help="of the usual cases, only those that have what was chosen")
    add("--limit", type=float, default=math.inf, metavar="SECONDS", help="after which no other case is begun (none)")


def is_chosen(option) -> bool:
    return any(getattr(option, name) for name in CHOICES)


def thread_counts(option) -> list[int]:
    """The numbers of threads that a CPU computes with: as chosen, or Torch's own, for the usual cases one as well."""
    return option.threads or ([THREADS] if is_chosen(option) or option.device == "cuda" else sorted({1, THREADS}))


def is_full(option) -> bool:
    """Whether each case runs with each number of threads, and compiled: of the usual ones, it takes too long."""
    return is_chosen(option) and not option.usual


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpuinfo.get_cpu_info()["brand_raw"]


def pytest_addoption(parser):
    add_options(parser.addoption)


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    cuda = option.device == "cuda"
    cases = select({name: getattr(option, name) for name in CHOICES}, cuda, option.usual)
    if not cases:
        raise pytest.UsageError("no case has all that was chosen: see the shapes of each subject in bench/cases.py")
    contenders = [*CONTENDERS, *(f"{name}, graph" for name in CONTENDERS if cuda)]
    counts = thread_counts(option)
    todo = [(case, n) for n in counts for case in cases if n == counts[0] or is_full(option) or again(case)]
    ids = [f"{case.id}, {in_words(n)}" if len(counts) > 1 else case.id for case, n in todo]
    numbered = [(f"{i}/{len(todo)}", *pair, name) for i, (pair, name) in enumerate(zip(todo, ids, strict=True), 1)]
    metafunc.parametrize("measured", numbered, ids=ids, indirect=True, scope="module")
    metafunc.parametrize("contender", contenders)


@pytest.fixture(scope="module")
def measured(request):
    """A case and what was measured of it, all contenders in turns, and the number of threads if there are several."""
    return measure_with(request.config, *request.param)


def measure_with(config, number: str, case: Case, threads: int, name: str):
    """Likewise; the number is `"1/67"`."""

    def tell(text: str) -> None:
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"[{number}] {name}: {text}", flush=True)

    if time.monotonic() - STARTED > config.option.limit and not number.startswith("1/"):
        tell(f"left out, since {config.option.limit:.0f} seconds had passed")
        pytest.skip("no time was left")
    torch.set_num_threads(threads)
    compiles = threads == thread_counts(config.option)[0] or is_full(config.option)
    found = measure(case, torch.device(config.option.device), config.option.seconds, compiles)
    medians = [f"{contender} {1e3 * statistics.median(timing.seconds):.3g}" for contender, timing in found.timings.items()]
    tell(f"{', '.join(medians)} ms")
    return case, found, threads if len(thread_counts(config.option)) > 1 else None


def pytest_report_teststatus(report):
    """No letter a test: the fixture has said more."""
    return (report.outcome, "", "") if report.when == "call" and not report.failed else None


def pytest_benchmark_generate_commit_info(config):
    """Git's; where it knows none, what the environment variable COMMIT says, such as 0123abc-dirty."""
    found = get_commit_info()
    if found["id"] in ("unversioned", "unknown"):
        identity, dirty, _ = os.environ.get("COMMIT", "").partition("-dirty")
        found = {"id": identity or "unknown", "dirty": bool(dirty)}
    return found


def pytest_benchmark_generate_machine_info(config):
    return machine_info(config.option.device, max(thread_counts(config.option)))


def machine_info(device: str, threads: int) -> dict:
    info = {
        "device": device_name(device),
        "threads": threads,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        found = shutil.which(query[0]) and subprocess.run(query, capture_output=True, text=True).stdout.strip()
        info |= {"driver": found or "unknown", "cuda": torch.version.cuda}
    return info


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep what is told: the case, and the quartiles. Without the samples, the file can be committed."""
    output_json["benchmarks"] = [
        {**row["extra_info"], "seconds": {name: _rounded(row["stats"][name]) for name in ("q1", "median", "q3", "rounds")}}
        for row in output_json["benchmarks"]
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
