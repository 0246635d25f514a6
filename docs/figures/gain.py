"""The README's plot: what is measured on a CPU, and what is counted for a GPU, since none was timed.

It is kept in docs/_static, where the README finds it: `python docs/figures --readme` draws it anew.
"""

from matplotlib.figure import Figure
from style import Theme, draw
from traffic import counts

from bench import report

SHAPE = "64x3x64x64"
KEPT = report.RESULTS.parents[1] / "docs" / "_static"


def speedups() -> tuple[str, dict[str, tuple[float, float]]]:
    """Where it was measured, and by likelihood: times as fast as the eager naive loss, and as the compiled one."""
    run = report.load(report.RESULTS / "amd-epyc.json")
    rows = [row for row in run.rows if row.plain and (row.case.subject, row.case.shape) == ("loss", SHAPE)]
    threads = rows[0].threads  # the fewest
    found = {row.case.likelihood: (row.speedup("eager"), row.speedup("compiled")) for row in rows if row.threads == threads}
    return f"{run.where.partition(',')[0]}, {report.in_words(threads)}", found


def labels() -> list[str]:
    """All numbers that the plot shows."""
    faster = [f"{times:.2f}x" for pair in speedups()[1].values() for times in pair]
    return faster + [str(passes) for pair in counts().values() for passes in pair]


def draw_all() -> None:
    draw("gain", gain, (11, 3.6), KEPT)


def gain(figure: Figure, theme: Theme) -> None:
    left, right = figure.subplots(1, 2)
    where, found = speedups()
    for at, (label, color) in enumerate((("the eager naive loss", theme.orange), ("that, compiled", theme.green))):
        pairs(left, at, [pair[at] for pair in found.values()], "{:.2f}x", color, label)
    left.axvline(1, color=theme.faint, linewidth=1, linestyle="--", zorder=0)
    left.set(yticks=[row + 0.2 for row in range(len(found))], yticklabels=list(found), xlabel="fastelbo: times as fast as")
    left.set(title=f"Measured on a CPU: {where}, {SHAPE}", xlim=(0, 10.5))
    passes = counts()
    for at, (label, color) in enumerate((("eager Torch", theme.orange), ("fastelbo", theme.blue))):
        pairs(right, at, [pair[at] for pair in passes.values()], "{}", color, label)
    right.set(yticks=[row + 0.2 for row in range(len(passes))], yticklabels=list(passes), xlabel="passes over memory")
    right.set(title="Counted for a GPU; none was timed yet", xlim=(0, 60))
    for axes, place in ((left, "center right"), (right, "upper right")):
        axes.invert_yaxis()
        axes.legend(loc=place)


def pairs(axes, at: int, values: list[float], pattern: str, color: str, label: str) -> None:
    bars = axes.barh([row + 0.4 * at for row in range(len(values))], values, 0.38, color=color, label=label)
    axes.bar_label(bars, fmt=pattern, padding=4)
