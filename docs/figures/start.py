"""The plot of Getting started: what its own code has trained."""

from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure
from style import Theme, draw
from torch import Tensor


def draw_all(scope: dict[str, Any]) -> None:
    draw("digits", lambda figure, theme: digits(figure, theme, scope), (11, 3))


def digits(figure: Figure, theme: Theme, scope: dict[str, Any]) -> None:
    curve, pairs, dreams = figure.subplots(1, 3, width_ratios=(3, 4, 2.2))
    losses = scope["losses"]
    smooth = [sum(losses[i : i + 25]) / 25 for i in range(0, len(losses), 25)]
    curve.plot(losses, color=theme.faint, linewidth=0.7)
    curve.plot(range(12, len(losses), 25), smooth, color=theme.blue)
    curve.set(xlabel="step", ylabel="nats a digit", title="negative ELBO")
    pairs.set_title("digits, each above its reconstruction")
    dreams.set_title("from the prior")
    shown, rebuilt = scope["shown"], scope["rebuilt"]
    tiles(pairs, [*shown[:5], *rebuilt[:5], *shown[5:], *rebuilt[5:]], 5)
    tiles(dreams, list(scope["dreamt"][:16]), 4)


def tiles(axes, images: list[Tensor], columns: int) -> None:
    rows = [F.pad(image.reshape(8, 8), (1, 1, 1, 1), value=0.35) for image in images]
    lines = [sum_columns(rows[i : i + columns]) for i in range(0, len(rows), columns)]
    axes.imshow([pixel for line in lines for pixel in line], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def sum_columns(tiles: list[Tensor]) -> list[list[float]]:
    return [[value for tile in tiles for value in tile[row].tolist()] for row in range(len(tiles[0]))]
