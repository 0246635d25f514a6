"""How plots look: one drawing in two files, for light and for dark pages, in colours that colour-blind people tell apart."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

OUT = Path(__file__).parent / "out"


class Theme(NamedTuple):
    """Colours after Okabe and Ito (Color Universal Design, 2008), lighter on a dark ground. They differ in lightness, too."""

    name: str
    ink: str
    faint: str
    blue: str
    orange: str
    green: str
    pink: str

    @property
    def cycle(self) -> tuple[str, ...]:
        return self.blue, self.orange, self.green, self.pink


THEMES = (
    Theme("light", "#333333", "#b9b9b9", "#0072b2", "#d55e00", "#007a5a", "#a4527f"),
    Theme("dark", "#d4d4d4", "#5a5a5a", "#56b4e9", "#f0a030", "#3ecf9f", "#e29cc4"),
)


def draw(name: str, drawing: Callable[[Figure, Theme], None], size: tuple[float, float], folder: Path = OUT) -> None:
    """Call `drawing` once for each theme, and write `NAME-light.svg` and `NAME-dark.svg`, on a transparent ground."""
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        with matplotlib.rc_context(settings(theme)):
            figure = Figure(figsize=size, layout="constrained")
            drawing(figure, theme)
            figure.savefig(folder / f"{name}-{theme.name}.svg", transparent=True, metadata={"Date": None})


def settings(theme: Theme) -> dict:
    return {
        "svg.hashsalt": "fastelbo",  # the same file each time
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.prop_cycle": matplotlib.cycler(color=theme.cycle),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "grid.color": theme.faint,
        "grid.alpha": 0.4,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.ink),
    }
