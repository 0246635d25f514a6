"""Trains a VAE on real handwritten digits twice: with the naive loss that everybody writes, and with fastelbo.

Both start from the same weights and get the same batches and the same noise, so that their losses must agree step by step.
The data are scikit-learn's 1,797 digits of 8 x 8 pixels, which ship with the package.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import VAE, digits
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo
from fastelbo.likelihoods import Gaussian

SCALE = 0.5  # standard deviation of the Gaussian likelihood


def naive_loss(model: VAE, x: Tensor, eps: Tensor, beta: float, likelihood: str) -> Tensor:
    mu, logvar = model.encode(x)
    z = mu + torch.exp(0.5 * logvar) * eps
    loss, _, _ = fastelbo.reference.elbo_loss(model.decode(z), x, mu, logvar, beta, likelihood=likelihood, scale=SCALE)
    return loss


def fused_loss(model: VAE, x: Tensor, eps: Tensor, beta: float, likelihood: str) -> Tensor:
    mu, logvar = model.encode(x)
    z = mu + torch.exp(0.5 * logvar) * eps
    fused = Gaussian(scale=SCALE) if likelihood == "gaussian" else likelihood
    loss, _, _ = fastelbo.loss(model.decode(z), x, mu, logvar, beta, likelihood=fused)
    return loss


class Trainer:
    """A model, its optimizer, and what its steps gave."""

    def __init__(self, name: str, loss, model: VAE, learning_rate: float) -> None:
        self.name, self.loss, self.model = name, loss, model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self.losses: list[Tensor] = []

    def step(self, x: Tensor, *arguments) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, x, *arguments)
        (loss / len(x)).backward()
        self.optimizer.step()
        self.losses.append(loss.detach() / len(x))


def train(options: argparse.Namespace, images: Tensor) -> list[Trainer]:
    torch.manual_seed(options.seed)
    model = VAE(options.latent, options.likelihood == "bernoulli").to(options.device)
    trainers = [
        Trainer("naive", naive_loss, copy.deepcopy(model), options.learning_rate),
        Trainer("fastelbo", fused_loss, copy.deepcopy(model), options.learning_rate),
    ]
    for epoch in tqdm(range(options.epochs), unit="epoch", disable=None):
        for batch in torch.randperm(len(images)).split(options.batch_size):
            x = images[batch.to(images.device)]
            eps = torch.randn(len(x), options.latent).to(images.device)
            for trainer in trainers:
                trainer.step(x, eps, options.beta, options.likelihood)
        steps = len(trainers[0].losses) // (epoch + 1)
        means = [torch.stack(t.losses[-steps:]).mean().item() for t in trainers]
        tqdm.write(f"epoch {epoch + 1:3}: loss per digit, naive {means[0]:.6f}, fastelbo {means[1]:.6f}")
    return trainers


def times(options: argparse.Namespace, images: Tensor, trainers: list[Trainer]) -> Iterator[str]:
    """What a step takes, and the loss with its gradients alone: medians of blocks of calls that take turns, after a warm-up."""
    x, beta, likelihood = images[: options.batch_size], options.beta, options.likelihood
    eps = torch.randn(len(x), options.latent).to(options.device)
    twins = [Trainer(t.name, t.loss, copy.deepcopy(t.model), options.learning_rate) for t in trainers]
    with torch.no_grad():
        mu, logvar = twins[0].model.encode(x)
        decoded = twins[0].model.decode(mu)
    leaves = [t.requires_grad_() for t in (decoded, mu, logvar)]
    fused = Gaussian(scale=SCALE) if likelihood == "gaussian" else likelihood

    def naive_alone() -> None:
        loss, _, _ = fastelbo.reference.elbo_loss(decoded, x, mu, logvar, beta, likelihood=likelihood, scale=SCALE)
        torch.autograd.grad(loss, leaves)

    def fused_alone() -> None:
        torch.autograd.grad(fastelbo.loss(decoded, x, mu, logvar, beta, likelihood=fused).loss, leaves)

    subjects = {
        "a step": [lambda twin=twin: twin.step(x, eps, beta, likelihood) for twin in twins],
        "the loss with its gradients alone": [naive_alone, fused_alone],
    }
    for name, calls in subjects.items():
        found: list[list[float]] = [[], []]
        for turn in range(41):
            for which in (0, 1) if turn % 2 else (1, 0):
                seconds = block(calls[which], options.device)
                if turn:  # the first is the warm-up
                    found[which].append(seconds)
        naive, ours = (1e3 * statistics.median(seconds) for seconds in found)
        yield f"{name} on {options.device}: naive {naive:.3f} ms, fastelbo {ours:.3f} ms"


def block(call: Callable[[], None], device: torch.device, repeats: int = 10) -> float:
    """Seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def picture(options: argparse.Namespace, images: Tensor, trainers: list[Trainer], path: Path) -> None:
    """Both loss curves; digits above their reconstructions; samples from the prior."""
    model = trainers[1].model
    activate = torch.sigmoid if options.likelihood == "bernoulli_logits" else nn.Identity()
    shown = images[:12]
    reconstructed = activate(model.decode(model.encode(shown)[0]))
    sampled = activate(model.decode(torch.randn(36, options.latent).to(images.device)))

    def tiles(values: Tensor, columns: int) -> Tensor:
        rows = F.pad(values.cpu().reshape(-1, columns, 8, 8), (1, 1, 1, 1), value=0.3)
        return rows.permute(0, 2, 1, 3).reshape(-1, columns * 10)

    figure = Figure(figsize=(14, 4), layout="constrained")
    curves, pairs, prior = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for trainer, style in zip(trainers, ({"linewidth": 4, "alpha": 0.4}, {"linewidth": 1}), strict=True):
        curves.plot(torch.stack(trainer.losses).cpu(), label=trainer.name, **style)
    curves.set(xlabel="step", ylabel="negative ELBO of a digit, nats", title=f"{options.likelihood}, beta {options.beta:g}")
    curves.legend()
    gray = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    pairs.imshow(tiles(torch.cat([shown[:6], reconstructed[:6], shown[6:], reconstructed[6:]]), 6), **gray)
    pairs.set_title("digits, each above its reconstruction")
    prior.imshow(tiles(sampled, 6), **gray)
    prior.set_title("samples from the prior")
    for axes in (pairs, prior):
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--latent", type=int, default=16, help="dimensions of z")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL")
    parser.add_argument("--likelihood", choices=("bernoulli", "bernoulli_logits", "mse", "gaussian"), default="bernoulli")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="where the picture goes")
    options = parser.parse_args()
    for name in ("epochs", "batch_size", "latent"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU here")
    if options.out.suffix not in (".png", ".pdf", ".svg", ".jpg"):
        parser.error(f"--out must end in .png, .pdf, .svg or .jpg, got {options.out}")
    return options


def main() -> None:
    options = parse()
    images = digits(options.device)
    trainers = train(options, images)
    naive, fused = (torch.stack(t.losses).double().cpu() for t in trainers)
    print(f"largest relative difference of the two losses over {len(naive)} steps: {((fused - naive) / naive).abs().max():.1e}")
    picture(options, images, trainers, options.out)
    print(f"saved {options.out}")
    for line in times(options, images, trainers):
        print(line)


if __name__ == "__main__":
    main()
