"""Passes over memory: those of eager Torch's operators, counted as they are dispatched, and those of fastelbo's budget."""

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from style import Theme, draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.traffic import BUDGET
from fastelbo import reference

SHAPE = (64, 100)


class Passes(TorchDispatchMode):
    """Reads and writes of whole tensors of `SHAPE`, by operators that are no views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(some) if isinstance(t, Tensor)] for some in ((args, kwargs), found))
        storages = {t.untyped_storage().data_ptr() for t in read}
        is_view = any(t.untyped_storage().data_ptr() in storages for t in written) and not function._schema.is_mutable
        if not is_view and "empty" not in function.__name__:
            self.count += sum(t.shape == SHAPE and 0 not in t.stride() for t in (*read, *written))
        return found


def eager(call: Callable[..., Tensor], *tensors: Tensor) -> int:
    with Passes() as passes:
        call(*tensors).backward()
    return passes.count


def of_budget(*names: str) -> int:
    return sum(len(stream.reads) + len(stream.writes) for name in names for stream in BUDGET[name])


def counts() -> dict[str, tuple[int, int]]:
    """For each call, forward and backward: eager Torch's passes and fastelbo's."""
    torch.manual_seed(0)
    x = torch.rand(SHAPE)
    mu, logvar = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    nothing = torch.zeros(())
    found = {}
    for likelihood, title in (("mse", "squared error"), ("bernoulli", "Bernoulli"), ("bernoulli_logits", "Bernoulli, logits")):
        recon_x = torch.rand(SHAPE).requires_grad_()
        naive = eager(lambda p: reference.elbo_loss(p, x, nothing, nothing, likelihood=likelihood)[0], recon_x)  # noqa: B023
        found[title] = naive, of_budget("loss forward, kl given")

    def latents(mu, logvar):
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (reference.reparameterize(mu, logvar) * x).sum() + kl

    # The product with x and its sum, which stand for a decoder, are none of the latents'.
    rest = eager(lambda z: (z * x).sum(), torch.randn(SHAPE, requires_grad=True))
    found["sample and KL"] = eager(latents, mu, logvar) - rest, of_budget("sample forward", "sample backward")
    return found


def draw_all() -> None:
    draw("traffic", traffic, (9, 3.2))


def traffic(figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    found = counts()
    rows = range(len(found))
    for at, (label, color) in enumerate(
        (("eager Torch, counted", theme.orange), ("fastelbo's kernels, by their budget", theme.blue))
    ):
        passes = [pair[at] for pair in found.values()]
        bars = axes.barh([row + 0.4 * at for row in rows], passes, 0.38, color=color, label=label)
        axes.bar_label(bars, padding=4)
    axes.set(
        yticks=[row + 0.2 for row in rows], yticklabels=list(found), xlabel="tensors read or written, forward and backward"
    )
    axes.invert_yaxis()
    axes.set_title("passes over memory (counted; no GPU was timed)")
    axes.legend(loc="upper right")
