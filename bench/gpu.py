"""`python -m bench.gpu STAGE...`: the tests and benchmarks that need a CUDA GPU, in stages of less than ten minutes each.

Without a GPU it says so and runs nothing. What fails or takes too long keeps nothing else from being run, and makes the whole
fail in the end. Logs and results go to the folder that the environment variable OUT names; without it logs go to out/gpu, and
results to bench/results.
"""

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).parents[1]
GIVEN = os.environ.get("OUT")
OUT = Path(GIVEN).absolute() if GIVEN else ROOT / "out" / "gpu"
RESULTS = OUT if GIVEN else ROOT / "bench" / "results"
GRACE = 15  # seconds, between an interrupt and the end


class Command(NamedTuple):
    """`python` with `arguments`, for at most so many seconds."""

    limit: int
    arguments: list[str | Path]
    environment: dict[str, str] | None = None


def first() -> Iterator[Command]:
    """Whether anything works at all."""
    yield Command(60, ["-m", "fastelbo"])
    yield Command(240, ["-m", "pytest", "-p", "no:benchmark", "--durations=10", "tests/test_gpu.py"])
    rows = ["--subjects", "loss", "step", "--shapes", "128x784", "4096x4000", "mlp-784", "--likelihoods", "bernoulli"]
    yield bench(60, 120, *rows, "--seconds", "0.3", "--output", OUT / "gpu-first.json")


def tests() -> Iterator[Command]:
    """All that can run on a GPU but those of `first`, with both backends."""
    left_out = ("gpu", "budget", "distributed", "bench", "bench_samples")  # for CPUs, or compiling ahead of time
    arguments = ["-m", "pytest", "-p", "no:benchmark", "--tb=short", "--maxfail=300", "--durations=20"]
    arguments += ["-k", "not without_spills", *(f"--ignore=tests/test_{name}.py" for name in left_out)]
    if importlib.util.find_spec("xdist"):
        # By stretches of neighbours, which need the same kernels.
        arguments += ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "worksteal"]
    alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    yield Command(340, arguments, alone | {"FASTELBO_BACKEND": ""})  # the kernels, as users have them
    yield Command(170, arguments, alone | {"FASTELBO_BACKEND": "torch"})


def benchmarks() -> Iterator[Command]:
    """What the overview shows."""
    parts = {"step sample": (170, 200), "loss objective": (280, 310)}
    paths = [OUT / f"gpu-bench-{subjects.replace(' ', '-')}.json" for subjects in parts]
    for path, (subjects, limits) in zip(paths, parts.items(), strict=True):
        path.unlink(missing_ok=True)
        shown = ["--usual", "--dtypes", "float32", "--modes", "backward", "--subjects", *subjects.split()]
        yield bench(*limits, *shown, "--output", path)
    yield Command(20, ["-m", "bench.report", *(path for path in reversed(paths) if path.exists()), "--merge", RESULTS])


def samples() -> Iterator[Command]:
    """What many samples cost, and counts in CSR."""
    where = ["--output", OUT / "gpu-samples.json"] if GIVEN else ["--write"]
    yield Command(430, ["-m", "bench.samples", "--device", "cuda", "--limit", "310", *where])
    yield Command(120, ["-m", "bench.sparse", "--device", "cuda", "--limit", "80", "--output", OUT / "gpu-sparse.md"])


def bench(begin: int, limit: int, *arguments: str | Path) -> Command:
    """No case is begun after `begin` seconds, so that what was measured is written before the end."""
    return Command(limit, ["-m", "bench", "--device", "cuda", "--limit", str(begin), *arguments])


STAGES = {"first": first, "tests": tests, "bench": benchmarks, "samples": samples}
INSTALL = Command(30, ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."])


def run(command: Command, log: TextIO) -> bool:
    """Whether it succeeded; what it prints is shown and logged."""

    def tell(text: str) -> None:
        print(text, end="", flush=True)
        log.write(text)
        log.flush()

    tell(f"\n== python {' '.join(map(str, command.arguments))}\n")
    start, environment = time.monotonic(), os.environ | {"PYTHONUNBUFFERED": "1"} | (command.environment or {})
    with subprocess.Popen(
        [sys.executable, *map(str, command.arguments)], cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:  # fmt: skip
        # An interrupted pytest says what has failed so far.
        timers = [
            threading.Timer(command.limit - GRACE, process.send_signal, [signal.SIGINT]),
            threading.Timer(command.limit, os.killpg, [process.pid, signal.SIGKILL]),
        ]
        for timer in timers:
            timer.start()
        try:
            for line in process.stdout:
                tell(line)
            code = process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - start
    late = f", {command.limit} allowed" if seconds > command.limit - GRACE else ""
    tell(f"-- exit code {code} after {seconds:.0f} s{late}\n")
    return code == 0


def sees_a_gpu() -> bool:
    code = "import importlib.util as i, sys; sys.exit(not (i.find_spec('torch') and __import__('torch').cuda.is_available()))"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def main(names: list[str]) -> int:
    if unknown := set(names) - set(STAGES):
        print(f"no stage {', '.join(sorted(unknown))}: there are {', '.join(STAGES)}")
        return 2
    if not sees_a_gpu():
        print(f"{sys.executable} sees no CUDA GPU, so nothing was run: {', '.join(names)}")
        return 0
    # In the background of a shell interrupts are ignored, and would be by all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    OUT.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        with open(OUT / f"gpu-{name}.log", "w") as log:
            for command in itertools.chain([INSTALL], STAGES[name]()):
                if not run(command, log):
                    failed.append(f"{name}: python {' '.join(map(str, command.arguments))}")
    print("\n" + "\n".join([f"failed: {command}" for command in failed] or ["all succeeded"]) + f"\nlogs and results: {OUT}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
