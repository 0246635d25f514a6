"""What `samples` measured, as tables and plots."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import report
from .report import _number, _table, drawing


class Curve(NamedTuple):
    """A model with a batch: by K and contender, what the JSON has of it."""

    title: str
    rows: dict[int, dict[str, dict]]

    def of(self, samples: int, contender: str) -> dict:
        """Empty for a contender that did not run."""
        row = self.rows[samples].get(contender, {})
        return {} if "missing" in row else row

    def megabytes(self, samples: int, contender: str) -> float | None:
        row = self.of(samples, contender)
        return row["peak_bytes"] / 1e6 if row else None

    def milliseconds(self, samples: int, contender: str) -> float | None:
        row = self.of(samples, contender)
        return row["seconds"]["median"] * 1e3 if row else None

    def slowness(self, samples: int, contender: str, other: str) -> float | None:
        """How many times as slow as another a contender is: the median of the rounds' ratios."""
        ratios = self.of(samples, contender).get("times_as_slow_as", {}).get(other)
        return ratios and ratios[1]

    def memory_ratio(self, samples: int, contender: str, other: str) -> float | None:
        own, theirs = self.megabytes(samples, contender), self.megabytes(samples, other)
        return own / theirs if own and theirs else None

    @property
    def names(self) -> list[str]:
        """Of all contenders, in the order in which they were measured."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))


class Run(NamedTuple):
    """One JSON file."""

    path: Path
    where: str  # device, versions, commit, date
    command: str
    curves: list[Curve]


def load(path: Path) -> Run:
    data = json.loads(path.read_text())
    curves: dict[str, Curve] = {}
    for row in data["samples"]:
        title = f"{row['model']}, batch {row['batch']}"
        curve = curves.setdefault(title, Curve(title, {}))
        curve.rows.setdefault(row["samples"], {})[row["contender"]] = row
    return Run(path, report.load(path).where, data["command"], list(curves.values()))


LEGEND = (
    "A step is the encoder, the bound of K samples, and backward to all parameters, in float32 and without an optimizer; noise"
    " is given, the same to all. naive: all samples in one batch; checkpointed: one at a time, with `torch.utils.checkpoint`."
    " fastelbo: `elbo(..., bound=IWAE(K, chunk=...))`; a chunk of all K samples is decoded once, and smaller chunks"
    " twice, in the memory of one of them. Peak: memory held at one time beyond inputs, noise, parameters and the parameters'"
    " gradients of the step before, which the new ones are added to. Times: medians of interleaved rounds, ± the interquartile"
    " range over the median. Ratios: how many times as slow fastelbo is (the median of the ratios within a round), and how many"
    " times the memory it holds; ▼ marks where it loses."
)
PAIRS = tuple(
    (own, other)
    for own, others in (
        ("fastelbo chunk=1", ("naive", "naive compiled", "naive checkpointed")),
        ("fastelbo chunk=8", ("naive",)),
        ("fastelbo chunk=K", ("naive", "naive compiled")),
    )
    for other in others
)


def tables(curve: Curve) -> Iterator[tuple[str, list[list[str]]]]:
    """Titles, and lines of cells."""
    names, every = curve.names, sorted(curve.rows)
    yield "Peak memory, MB", [["K", *names], *([str(k), *(_number(curve.megabytes(k, c)) for c in names)] for k in every)]
    yield "Time of a step, ms", [["K", *names], *([str(k), *(_time(curve, k, c) for c in names)] for k in every)]
    pairs = [pair for pair in PAIRS if set(pair) <= set(names)]
    heads = [f"{own.removeprefix('fastelbo ')} / {other}" for own, other in pairs]
    cells = ([str(k), *(_ratios(curve, k, *pair) for pair in pairs)] for k in every)
    yield "fastelbo: times as slow; times the memory", [["K", *heads], *cells]


def _time(curve: Curve, samples: int, contender: str) -> str:
    row = curve.of(samples, contender)
    if not row:
        return "-"
    seconds = row["seconds"]
    return f"{_number(1e3 * seconds['median'])} ±{(seconds['q3'] - seconds['q1']) / seconds['median']:.0%}"


def _ratios(curve: Curve, samples: int, own: str, other: str) -> str:
    return "; ".join(_ratio(of(samples, own, other)) for of in (curve.slowness, curve.memory_ratio))


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" + (" ▼" if value > 1 else "")


def not_run(curve: Curve) -> Iterator[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for k, found in sorted(curve.rows.items()):
        for contender, row in found.items():
            if "missing" in row:
                reasons.setdefault((contender, row["missing"]), []).append(str(k))
    for (contender, reason), ks in reasons.items():
        yield f"Not run: {contender} at K = {', '.join(ks)}: {reason}"


def terminal(run: Run) -> str:
    lines = [run.where]
    for curve in run.curves:
        for title, table in tables(curve):
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += ["", f"{curve.title}: {title}"]
            lines += ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in table]
        lines += not_run(curve)
    return "\n".join([*lines, "", LEGEND])


def markdown(run: Run) -> str:
    lines = [f"# {run.where}", "", f"`{run.command}`", "", LEGEND, ""]
    lines += [f"![peak memory and time of a step over the number of samples]({run.path.stem}.svg)", ""]
    for curve in run.curves:
        for title, (header, *rest) in tables(curve):
            lines += [f"## {curve.title}: {title}", "", *_table(header, rest), ""]
        for line in not_run(curve):
            lines += [line, ""]
    return "\n".join(lines)


def in_words(ratio: float | None) -> str:
    """Of a time: what a legend says of it."""
    if ratio is None:
        return "not compared"
    return f"{ratio:.2f} times as slow" if ratio >= 1 else f"{1 / ratio:.2f} times as fast"


def plot(run: Run, path: Path) -> None:
    """For each model two panels over K: the peak memory and the time of a step."""
    pyplot = drawing()
    figure, panels = pyplot.subplots(
        len(run.curves), 2, figsize=(13, 4.5 * len(run.curves)), layout="constrained", squeeze=False
    )
    for curve, (memory, time) in zip(run.curves, panels, strict=True):
        every = sorted(curve.rows)
        most = every[-1]
        for color, name in enumerate(curve.names):
            style = {"color": f"C{color}", "marker": ".", "linestyle": "--" if name.startswith("naive") else "-"}
            held, slow = (of(most, name, "naive") for of in (curve.memory_ratio, curve.slowness))
            told = "" if name == "naive" or held is None else f": {held:.2g} times the memory at K={most}"
            memory.plot(every, [curve.megabytes(k, name) or math.nan for k in every], label=name + told, **style)
            told = "" if name == "naive" or slow is None else f": {in_words(slow)} at K={most}"
            time.plot(every, [curve.milliseconds(k, name) or math.nan for k in every], label=name + told, **style)
        memory.set(title=f"{curve.title}: peak memory beyond inputs, parameters, gradients", ylabel="MB")
        time.set(title=f"{curve.title}: time of a step", ylabel="ms")
        for axes in (memory, time):
            axes.set(xscale="log", yscale="log", xlabel="samples K")
            axes.set_xticks(every, map(str, every), minor=False)
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.legend(fontsize="x-small", title="beside naive", title_fontsize="x-small")
    figure.suptitle(f"Importance-weighted bound. {run.where}", fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(run: Run) -> None:
    """Tables and plots beside the JSON file."""
    run.path.with_suffix(".md").write_text(markdown(run))
    plot(run, run.path.with_suffix(".svg"))
