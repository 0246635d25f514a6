"""The plots of the page on the ELBO, of what its own code computes."""

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from style import Theme, draw


def draw_all(scope: dict[str, Any]) -> None:
    """From the namespace that the page's code leaves."""
    draw("exercise", lambda figure, theme: exercise(figure, theme, scope), (11, 3.6))
    draw("em", lambda figure, theme: em(figure, theme, scope), (11, 3.8))
    draw("balance", lambda figure, theme: balance(figure, theme, scope), (8, 3.8))
    draw("collapse", lambda figure, theme: collapse(figure, theme, scope), (8, 3.8))
    draw("iwae", lambda figure, theme: iwae(figure, theme, scope), (8, 3.8))


def density(z: torch.Tensor, mean: float, variance: float) -> torch.Tensor:
    return torch.exp(-((z - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def exercise(figure: Figure, theme: Theme, scope: dict[str, Any]) -> None:
    log_p = -0.5 * math.log(2 * math.pi * 1.5) - 1 / 3
    densities, over_means, over_variances = figure.subplots(1, 3)
    z = torch.linspace(-3, 3, 300)
    densities.plot(z, density(z, 0, 1), color=theme.faint, label="prior")
    densities.plot(z, density(z, 2 / 3, 1 / 3), color=theme.blue, linewidth=6, alpha=0.35, label="posterior")
    densities.plot(z, density(z, 2 / 3, 0.33), color=theme.orange, label="q")
    densities.set(xlabel="z", title="densities, given x = 1", ylim=(0, None), yticks=[])
    densities.legend(loc="upper left")
    panels = (
        (over_means, scope["means"], scope["over_means"], 2 / 3, "mean of q", "ELBO over the mean of q"),
        (over_variances, scope["variances"], scope["over_variances"], 0.33, "variance of q", "ELBO over the variance of q"),
    )
    for axes, values, bound, here, label, title in panels:
        axes.axhline(log_p, color=theme.ink, linewidth=1, linestyle="--")
        axes.plot(values, bound, color=theme.blue)
        axes.plot([here], [-scope["exercise"].loss.item()], "o", color=theme.orange, markersize=8)
        axes.set(xlabel=label, title=title, ylim=(log_p - 1.6, log_p + 0.25))
        axes.text(0.98, log_p + 0.04, "log p(x)", ha="right", va="bottom", transform=axes.get_yaxis_transform())
    over_variances.set(xscale="log")


def em(figure: Figure, theme: Theme, scope: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    low, best = min(scope["em"]), scope["best"]
    halves = torch.arange(len(scope["em"])) / 2
    left.plot(halves, scope["em_log_p"], color=theme.blue, drawstyle="steps-post", label="log p(x)")
    left.plot(halves, scope["em"], ".-", color=theme.orange, linewidth=1.2, label="the bound F, each half step")
    left.set(title="EM", xlabel="iteration", ylabel="nats a datum", xlim=(-0.3, 15), ylim=(low - 0.1, best + 0.25))
    right.plot(scope["noisy"], color=theme.faint, linewidth=0.8, label="what one step sees")
    right.plot(scope["vae_log_p"], color=theme.blue, label="log p(x)")
    right.plot(scope["vae"], color=theme.orange, linewidth=1.2, label="the exact bound")
    right.set(title="a VAE, by Adam", xlabel="step")
    for axes in (left, right):
        axes.axhline(best, color=theme.ink, linewidth=1, linestyle="--", label="the most that is possible")
        axes.legend(loc="lower right")


def balance(figure: Figure, theme: Theme, scope: dict[str, Any]) -> None:
    """Rate and distortion: each beta is the slope at which its tangent touches."""
    axes = figure.subplots()
    betas = torch.logspace(-1.5, 1.7, 200)
    v = 1 / (1 + 2 / betas)
    mean = 2 * v / betas
    kl = 0.5 * (v + mean**2 - 1 - v.log())
    recon = 0.5 * math.log(math.pi) + (1 - mean) ** 2 + v
    axes.plot(kl, recon, color=theme.blue)
    for beta, _, _, found_recon, found_kl in scope["balance"]:
        axes.plot([found_kl], [found_recon], "o", color=theme.orange, markersize=8)
        axes.annotate(f"beta {beta:g}", (found_kl, found_recon), (8, 4), textcoords="offset points")
    axes.set(xlabel="kl: what z says of x, nats", ylabel="recon, nats", title="what a nat of KL buys", xlim=(-0.05, 2.1))


def collapse(figure: Figure, theme: Theme, scope: dict[str, Any]) -> None:
    axes = figure.subplots()
    betas = torch.logspace(math.log10(0.4), math.log10(15), 400)
    found, eigenvalues = scope["collapse"], scope["eigenvalues"]
    for dimension, marker in enumerate("osD^"):
        color, eigenvalue = theme.cycle[dimension], eigenvalues[dimension].item()
        kl = (0.5 * torch.log(eigenvalue / betas)).clamp(min=0)
        axes.plot(betas, kl, color=color, label=f"eigenvalue {eigenvalue:g}")
        axes.plot(list(found), [kl[dimension].item() for kl in found.values()], marker, color=color, markersize=7)
    axes.set(xscale="log", xlabel="beta", ylabel="KL of the dimension, nats", ylim=(-0.05, 1.6))
    axes.set(title="lines: the optimum; marks: trained", xticks=[0.5, 1, 2, 4, 8], xticklabels=["0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.legend()


def iwae(figure: Figure, theme: Theme, scope: dict[str, Any]) -> None:
    axes = figure.subplots()
    counts, gaps, errors, leading = zip(*scope["iwae"], strict=True)
    axes.plot(counts, leading, "--", color=theme.ink, linewidth=1.2, label="Var(w) / 2K")
    axes.errorbar(
        counts, gaps, [2 * e for e in errors], fmt="o-", color=theme.blue, capsize=4, label="measured, with two errors"
    )
    axes.set(xscale="log", yscale="log", xlabel="K", ylabel="log p(x) - bound, nats", title="the gap closes with K")
    axes.set(xticks=counts, xticklabels=[str(k) for k in counts])
    axes.minorticks_off()
    axes.legend()
