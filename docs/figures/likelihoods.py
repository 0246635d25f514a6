"""A plot for each likelihood: its density, and what training sees of it, both by `fastelbo.nll`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from style import Theme, draw
from torch import Tensor

import fastelbo
from fastelbo import likelihoods


class Plot(NamedTuple):
    """`settings` are the parameters of each density. The first of those of `settings[shown]` is what the right side varies."""

    likelihood: likelihoods.Likelihood | Sequence[likelihoods.Likelihood]  # one, or one a setting
    settings: dict[str, tuple[float, ...]]
    x: Tensor  # where the densities are drawn
    is_discrete: bool
    target: float  # x of the right side
    first: Tensor  # what the parameter of the right side runs over
    name: str  # of that parameter
    shown: int = 1


def steps(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64)


def line(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 301, dtype=torch.float64)


SCALED = {"scale 0.5": (0.0, 0.5), "scale 1": (0.0, 1.0), "scale 2": (0.0, 2.0)}
LOGISTIC = likelihoods.DiscretizedLogistic(levels=16)
STUDENTS = tuple(likelihoods.StudentT(df) for df in (1.0, 3.0, 30.0))

PLOTS = {
    "bernoulli": Plot(
        likelihoods.BernoulliLogits(), {"logit -2": (-2.0,), "logit 0": (0.0,), "logit 2": (2.0,)},
        steps(2), True, 1.0, line(-6, 6), "logit",
    ),
    "continuous_bernoulli_logits": Plot(
        likelihoods.ContinuousBernoulliLogits(), {"logit -3": (-3.0,), "logit 0.5": (0.5,), "logit 3": (3.0,)},
        line(0, 1), False, 0.9, line(-20, 40), "logit",
    ),
    "gaussian": Plot(likelihoods.Gaussian(), SCALED, line(-5, 5), False, 0.0, line(-4, 4), "mean"),
    "laplace": Plot(likelihoods.Laplace(), SCALED, line(-5, 5), False, 0.0, line(-4, 4), "mean"),
    "student_t": Plot(
        STUDENTS, {"df 1": (0.0, 1.0), "df 3": (0.0, 1.0), "df 30": (0.0, 1.0)},
        line(-5, 5), False, 0.0, line(-8, 8), "mean",
    ),
    "poisson_log": Plot(
        likelihoods.PoissonLog(), {"rate 1": (0.0,), "rate 4": (1.3862943611,), "rate 10": (2.302585093,)},
        steps(18), True, 4.0, line(-1, 2.7), "logarithm of the rate",
    ),
    "negative_binomial": Plot(
        likelihoods.NegativeBinomial(), {"theta 0.5": (4.0, 0.5), "theta 2": (4.0, 2.0), "theta 50": (4.0, 50.0)},
        steps(16), True, 4.0, line(0.4, 16), "mean",
    ),
    "zero_inflated_negative_binomial": Plot(
        likelihoods.ZeroInflatedNegativeBinomial(),
        {"no extra zeros": (4.0, 5.0, -30.0), "logit -1": (4.0, 5.0, -1.0), "logit 1": (4.0, 5.0, 1.0)},
        steps(14), True, 0.0, line(0.1, 12), "mean",
    ),
    "discretized_logistic": Plot(
        LOGISTIC, {"log scale -3": (0.4, -3.0), "log scale -2": (0.4, -2.0), "log scale -1": (0.4, -1.0)},
        steps(16), True, 11.0, line(-1, 1.6), "mean",
    ),
}  # fmt: skip


def draw_all() -> None:
    for name, plot in PLOTS.items():
        draw(name, lambda figure, theme, plot=plot: drawing(figure, theme, plot), (9, 3.1))
    draw("categorical", categorical, (9, 3.1))


def nll(likelihood: likelihoods.Likelihood, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of each of a row of values."""
    if isinstance(likelihood, likelihoods.DiscretizedLogistic):
        x = x.long()
    given = tuple(p.expand(x.shape)[:, None] for p in parameters)
    return fastelbo.nll(given[0] if len(given) == 1 else given, x[:, None], likelihood=likelihood, reduction="none")


def drawing(figure: Figure, theme: Theme, plot: Plot) -> None:
    left, right = figure.subplots(1, 2)
    several = plot.likelihood if isinstance(plot.likelihood, tuple) else (plot.likelihood,) * len(plot.settings)
    width = 0.8 / len(plot.settings)
    for at, (likelihood, (label, setting)) in enumerate(zip(several, plot.settings.items(), strict=True)):
        parameters = [torch.tensor(value, dtype=torch.float64) for value in setting]
        density = torch.exp(-nll(likelihood, parameters, plot.x))
        if plot.is_discrete:
            left.bar(plot.x + (at - 1) * width, density, width, color=theme.cycle[at], label=label)
        else:
            left.plot(plot.x, density, color=theme.cycle[at], linestyle=("-", "--", "-.")[at], label=label)
    if plot.is_discrete:
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="x", title="probability" if plot.is_discrete else "density", ylim=(0, None))
    left.legend(fontsize="small")
    first = plot.first.clone().requires_grad_()
    rest = [torch.tensor(value, dtype=torch.float64) for value in list(plot.settings.values())[plot.shown][1:]]
    value = nll(several[plot.shown], [first, *rest], torch.full_like(plot.first, plot.target))
    (slope,) = torch.autograd.grad(value.sum(), first)
    training(right, theme, plot.first, value.detach(), slope, plot.name, f"of x = {plot.target:g}")


def training(axes, theme: Theme, first: Tensor, value: Tensor, slope: Tensor, name: str, of: str) -> None:
    axes.axhline(0, color=theme.faint, linewidth=1)
    axes.plot(first, value, color=theme.blue, label="-log p, nats")
    axes.plot(first, slope, "--", color=theme.orange, label="its gradient")
    axes.set(xlabel=name, title=f"what training sees {of}")
    axes.legend(fontsize="small")


def categorical(figure: Figure, theme: Theme) -> None:
    """Three classes, of which the first one's logit varies; the others have 0 and 1."""
    left, right = figure.subplots(1, 2)
    first = line(-6, 6).requires_grad_()
    logits = torch.stack((first, torch.zeros_like(first), torch.ones_like(first)), 1)
    values = [
        fastelbo.nll(logits, torch.full((len(first),), label), likelihood="categorical", reduction="none") for label in range(3)
    ]
    (slope,) = torch.autograd.grad(values[0].sum(), first)
    for label, (value, style) in enumerate(zip(values, ("-", "--", "-."), strict=True)):
        left.plot(first.detach(), torch.exp(-value).detach(), style, color=theme.cycle[label], label=f"class {label}")
    left.set(xlabel="logit of class 0", title="probability", ylim=(0, None))
    left.legend(fontsize="small")
    training(right, theme, first.detach(), values[0].detach(), slope, "logit of class 0", "of class 0")
