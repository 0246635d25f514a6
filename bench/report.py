"""`python -m bench.report FILE...`: results of the benchmarks as tables, and as plots."""

import argparse
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .cases import LIKELIHOODS, SHAPES, Case, sizes

RESULTS = Path(__file__).parent / "results"
OVERVIEW = "overview.md"  # what the documentation shows of all runs


class Row(NamedTuple):
    """One case, outside or inside a CUDA graph: by contender ("eager", "compiled", ...), what the JSON has of it."""

    case: Case
    graph: bool
    contenders: dict[str, dict]
    threads: int | None = None  # where a run has several numbers of them

    @property
    def plain(self) -> bool:
        """One that the overview shows."""
        return (self.case.dtypes, self.case.mode, self.graph) == ("float32", "backward", False)

    def milliseconds(self, name: str) -> float | None:
        return self.contenders[name]["seconds"]["median"] * 1e3 if name in self.contenders else None

    def spread(self) -> float:
        """Of fastelbo's time: the interquartile range over the median."""
        seconds = self.contenders["fastelbo"]["seconds"]
        return (seconds["q3"] - seconds["q1"]) / seconds["median"]

    def speedup(self, other: str, name: str = "fastelbo") -> float | None:
        """How many times as fast as another contender one is: the median of the rounds' ratios."""
        if other not in self.contenders or name not in self.contenders:
            return None
        return self.contenders[name]["speedup_over"][f"{other}, graph" if self.graph else other][1]

    def speedup_compiled(self) -> float | None:
        """Of fastelbo under torch.compile, over the naive code under it."""
        return self.speedup("compiled", "fastelbo compiled")

    def bytes_per_second(self) -> float | None:
        found = self.contenders["fastelbo"]
        return found["least_bytes"] / found["seconds"]["median"] if "least_bytes" in found else None

    def share_of_floor(self) -> float | None:
        """Time that copying as many bytes would take, over the time taken."""
        rate = self.bytes_per_second()
        return None if rate is None else rate / self.contenders["fastelbo"]["copy_bytes_per_second"]

    def peak_megabytes(self, name: str) -> float | None:
        peak = self.contenders.get(name, {}).get("peak_bytes")
        return None if peak is None else peak / 1e6


class Run(NamedTuple):
    """One JSON file."""

    path: Path
    where: str  # device, versions, commit, date
    rows: list[Row]


def file_name(device: str) -> str:
    """Of the results of a device."""
    return re.sub(r"\W+", "-", device).strip("-").lower() + ".json"


def merge(paths: list[Path]) -> dict:
    """One run from parts of it, which must be of one machine and commit, and have no row twice."""
    parts = [json.loads(path.read_text()) for path in paths]
    first, rows = parts[0], [row for part in parts for row in part["benchmarks"]]
    for path, part in zip(paths, parts, strict=True):
        for key in ("machine_info", "commit_info"):
            if part[key] != first[key]:
                raise ValueError(f"{path} has another {key} than {paths[0]}: {part[key]} and {first[key]}")
    counted = Counter((*_named(row), row["contender"]) for row in rows)
    if twice := [" ".join(name) for name, count in counted.items() if count > 1]:
        raise ValueError(f"in more than one file: {', '.join(twice)}")
    return first | {"datetime": min(part["datetime"] for part in parts), "benchmarks": rows}


def _named(found: dict) -> list[str]:
    """What tells cases of a file apart."""
    return [*(found[field] for field in Case._fields), *([in_words(found["threads"])] if "threads" in found else [])]


def in_words(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def load(path: Path) -> Run:
    data = json.loads(path.read_text())
    machine, commit = data["machine_info"], data["commit_info"]
    counts = sorted({found["threads"] for found in data["benchmarks"] if "threads" in found}) or [machine["threads"]]
    threads = f"{' and '.join(map(str, counts))} threads"
    system = f"driver {machine['driver']}, CUDA {machine['cuda']}" if "driver" in machine else threads
    where = (
        f"{machine['device']}, {system}; torch {machine['torch']}, triton {machine['triton']},"
        f" Python {machine['python']}; commit {commit['id'][:10]}{' with changes' if commit['dirty'] else ''},"
        f" {data['datetime'][:10]}"
    )
    rows: dict[tuple, Row] = {}
    for found in data["benchmarks"]:
        case = Case(*(found[field] for field in Case._fields))
        name, _, graph = found["contender"].partition(", ")
        count = found.get("threads")
        rows.setdefault((case, graph, count), Row(case, bool(graph), {}, count)).contenders[name] = found
    return Run(path, where, [row for row in rows.values() if "fastelbo" in row.contenders])


COLUMNS = (
    "what", "shape", "likelihood", "dtypes", "mode",
    "eager ms", "compiled ms", "fastelbo ms", "spread", "its compiled ms",
    "x eager", "x compiled", "both compiled", "GB/s", "of floor", "kernels", "peak MB", "eager's",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row of the full table. A speedup below 1, where fastelbo loses, is marked."""
    case, own = row.case, row.contenders["fastelbo"]
    mode = f"{case.mode}{', graph' * row.graph}" + (f", {in_words(row.threads)}" if row.threads else "")
    share, rate = row.share_of_floor(), row.bytes_per_second()
    return [
        case.subject, case.shape, case.likelihood, case.dtypes, mode,
        *(_number(row.milliseconds(name)) for name in ("eager", "compiled", "fastelbo")),
        f"{row.spread():.0%}",
        _number(row.milliseconds("fastelbo compiled")),
        _speedup(row.speedup("eager")), _speedup(row.speedup("compiled")), _speedup(row.speedup_compiled()),
        _number(None if rate is None else rate / 1e9), "-" if share is None else f"{share:.0%}",
        str(own["kernels"] or "-"), _number(row.peak_megabytes("fastelbo")), _number(row.peak_megabytes("eager")),
    ]  # fmt: skip


LEGEND = (
    "Medians of interleaved rounds; spread: the interquartile range over fastelbo's median. Speedups are medians of the ratios"
    " within a round, over the naive code, eager and compiled, and of fastelbo compiled over the latter; ▼ marks where fastelbo"
    " loses. GB/s: the bytes that the case has to move, over fastelbo's time. Floor: the time that a copy measured in the same"
    " run takes for as many bytes. Peak: memory held at one time beyond the inputs, and on a CPU beyond the few megabytes of"
    " scratch that a thread keeps between calls."
)


def terminal(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        table = [list(COLUMNS), *map(cells, run.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["", run.where, ""]
        for line in table:
            padded = [text.ljust(w) if i < 5 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
            lines.append("  ".join(padded))
    return "\n".join([*lines, "", LEGEND])


def markdown(run: Run) -> str:
    """The full table of one run."""
    return "\n".join([f"# {run.where}", "", LEGEND, "", *_table(COLUMNS, map(cells, run.rows)), ""])


def overview(runs: list[Run]) -> str:
    """What the documentation says: forward and backward in float32, and where the rest is."""
    lines = [
        "Forward and backward in float32: how many times as fast as the eager naive code / as the naive code under",
        "`torch.compile`, timed in turns in one run. Both compiled: fastelbo under it as well, over the naive code.",
        "▼ marks where fastelbo loses.",
    ]
    for run in runs:
        lines += ["", f"**{run.where}**", ""]
        for threads in dict.fromkeys(row.threads for row in run.rows):
            lines += [f"With {in_words(threads)}:", ""] if threads else []
            lines += [*_tables([row for row in run.rows if row.plain and row.threads == threads]), ""]
        lines += [f"![speedup, share of the floor and peak memory by size]({run.path.stem}.svg)"]
    return "\n".join(lines)


def _tables(rows: list[Row]) -> list[str]:
    losses = {(r.case.shape, r.case.likelihood): _both(r) for r in rows if r.case.subject == "loss"}
    shapes = dict.fromkeys(shape for shape, _ in losses)
    pivot = ([f"`loss` {shape}", *(losses.get((shape, name), "-") for name in LIKELIHOODS)] for shape in shapes)
    others = (
        [f"{TITLES[r.case.subject]} {r.case.shape}", _both(r), _speedup(r.speedup_compiled())]
        for r in rows
        if r.case.subject != "loss"
    )
    by_eager, by_compiled = (
        _number(_geometric_mean(r.speedup(other) for r in rows if r.case.shape in SHAPES)) for other in ("eager", "compiled")
    )
    return [
        *_table(["", *(f"`{name}`" for name in LIKELIHOODS)], pivot), "",
        *_table(["", "eager / compiled", "both compiled"], others), "",
        f"Geometric mean of the rows of `loss` and of `sample_kl` + `loss`: {by_eager} / {by_compiled}.",
    ]  # fmt: skip


TITLES = {"sample": "`sample_kl`, latents", "objective": "`sample_kl` + `loss`, bernoulli_logits,", "step": "training step,"}


GRAY = "#7a7a7a"  # which reads on white and on black


def drawing():
    """Matplotlib's pyplot, for files that are the same each time, without a background, so that they go with dark pages too."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    gray = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GRAY)
    matplotlib.rcParams.update({"svg.hashsalt": "fastelbo", "savefig.transparent": True, "legend.framealpha": 0, **gray})
    return pyplot


def plots(run: Run, path: Path) -> None:
    """Three panels by the size of the prediction, for the loss forward and backward in float32, if that was timed."""
    pyplot = drawing()
    rows = sorted((row for row in run.rows if row.plain and row.case.subject == "loss"), key=_megabytes)
    if not rows:
        return
    rows = [row for row in rows if row.threads == rows[0].threads]  # the fewest, with which most cases are timed
    figure, (faster, floor, memory) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for color, likelihood in enumerate(LIKELIHOODS):
        chosen = [row for row in rows if row.case.likelihood == likelihood]
        size, style = [_megabytes(row) for row in chosen], {"color": f"C{color}", "marker": "."}
        for other, line in (("eager", "-"), ("compiled", "--")):
            faster.plot(size, [r.speedup(other) or math.nan for r in chosen], line, label=f"{likelihood} / {other}", **style)
        floor.plot(size, [100 * row.share_of_floor() for row in chosen], label=likelihood, **style)
        if likelihood == rows[0].case.likelihood:
            for name in ("eager", "compiled", "fastelbo"):
                memory.plot(size, [row.peak_megabytes(name) or math.nan for row in chosen], marker=".", label=name)
    faster.axhline(1, color="gray", linewidth=0.5)
    faster.set(title="Times as fast", yscale="log")
    floor.set(title="Share of the floor: a copy of as many bytes", ylabel="%", ylim=(0, None))
    memory.set(title=f"Peak memory beyond the inputs, {rows[0].case.likelihood}", ylabel="MB", yscale="log")
    for axes in (faster, floor, memory):
        axes.set(xscale="log", xlabel="prediction, MB")
        axes.legend(fontsize="x-small")
    alone = f" With {in_words(rows[0].threads)}." if rows[0].threads else ""
    figure.suptitle(f"Loss, forward and backward, float32.{alone} {run.where}", fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(runs: list[Run], folder: Path = RESULTS) -> None:
    """Tables and plots beside each JSON file, and the overview of them all."""
    for run in runs:
        run.path.with_suffix(".md").write_text(markdown(run))
        plots(run, run.path.with_suffix(".svg"))
    (folder / OVERVIEW).write_text(overview(runs) + "\n")


def _megabytes(row: Row) -> float:
    """Of the prediction, in float32."""
    return 4e-6 * math.prod(sizes(row.case.shape))


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _speedup(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" + (" ▼" if value < 1 else "")


def _both(row: Row) -> str:
    return f"{_speedup(row.speedup('eager'))} / {_speedup(row.speedup('compiled'))}"


def _table(header: Iterable[str], rows: Iterable[list[str]]) -> list[str]:
    header = list(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.partition(": ")[2])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON that python -m bench has written")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="the files are parts of one run: write that there, in one")
    parser.add_argument("--write", action="store_true", help="write Markdown and SVG beside them, and the overview")
    options = parser.parse_args(arguments)
    files = options.files
    if options.merge:
        merged = merge(files)
        files = [options.merge / file_name(merged["machine_info"]["device"])]
        files[0].write_text(json.dumps(merged, indent=4))
        print(f"Written: {files[0]}")
    runs = [run for run in map(load, files) if run.rows]  # those of `bench.samples` have a report of their own
    print(terminal(runs))
    if options.write:
        write(runs)


if __name__ == "__main__":
    main()
