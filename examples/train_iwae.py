"""Trains an importance-weighted autoencoder (Burda et al., Importance Weighted Autoencoders, 2016) on real handwritten digits,
after the same model trained with the ELBO for as many steps.

With K samples z_k of q(z | x), the bound on log p(x) that it maximizes is

    E log(1/K sum_k w_k),    w_k = p(x | z_k) p(z_k) / q(z_k | x)

With K = 1 that is the ELBO. With more it is tighter, and p(z | x) may take shapes that q cannot have: log p(x) gains, even if
the ELBO, which is no longer maximized, falls. K costs time but no memory: `--chunk` samples are decoded at once.

The digits are in black and white. Of those held out, it reports the ELBO, the bound, and log p(x) by many more samples with its
standard error: each bound below the next.

python examples/train_iwae.py --samples 50 --estimator dreg
"""

import argparse
import time

import torch
from digits import VAE, black_and_white
from options import make_parser
from torch import Tensor

import fastelbo
from fastelbo import ELBO, IWAE
from fastelbo.diagnostics import Monitor


def negative_bound(model: VAE, x: Tensor, bound: ELBO | IWAE, monitor: Monitor | None = None) -> fastelbo.ELBOTerms:
    """Nats a digit."""
    mu, logvar = model.encode(x)
    return fastelbo.elbo(
        model.decode, x, mu, logvar, likelihood="bernoulli_logits", reduction="batchmean", bound=bound, monitor=monitor
    )


def train(options: argparse.Namespace, bound: ELBO | IWAE, images: Tensor) -> tuple[VAE, list[Tensor]]:
    """The model, and the loss of each step."""
    torch.manual_seed(options.seed)
    model = VAE(options.latent).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    losses = []
    for _ in range(options.steps):
        x = images[torch.randint(len(images), (options.batch_size,), device=images.device)]
        terms = negative_bound(model, x, bound)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.detach())
    return model, losses


@torch.no_grad()
def report(options: argparse.Namespace, name: str, model: VAE, x: Tensor, seconds: float) -> None:
    monitor = Monitor()
    kinds = (kind(options.samples, chunk=options.chunk) for kind in (ELBO, IWAE))
    elbo, bound = (-negative_bound(model, x, kind, monitor).loss for kind in kinds)
    mu, logvar = model.encode(x)
    log_p, error = fastelbo.log_likelihood(
        model.decode, x, mu, logvar, likelihood="bernoulli_logits", n_samples=options.evaluation_samples, progress=True
    )
    # Each digit has noise of its own, so the squares of their errors add up.
    error = error.norm() / len(x)
    print(f"{name:>4} {elbo:9.3f} {bound:9.3f} {log_p.mean():9.3f} +- {error:.3f} {monitor.active_units():12} {seconds:8.1f}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=1500, batch_size=64, learning_rate=1e-3)
    parser.add_argument("--samples", type=int, default=50, help="K")
    parser.add_argument(
        "--estimator", choices=("standard", "stl", "dreg"), default="dreg", help="of the gradients: see fastelbo.elbo"
    )
    parser.add_argument("--chunk", type=int, default=10, help="samples in one call of the decoder")
    parser.add_argument("--evaluation-samples", type=int, default=5000, help="of each held-out digit, for log p(x)")
    parser.add_argument("--latent", type=int, default=16, help="dimensions of z")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    images, held_out = black_and_white(options.device)
    print(f"{len(held_out)} held-out digits, nats each: log p(x), and bounds on it")
    print(f"by   {'ELBO':>9} {f'K = {options.samples}':>9} {'log p(x)':>9} {'active units':>21} {'seconds':>8}")
    iwae = IWAE(options.samples, estimator=options.estimator, chunk=options.chunk)
    for name, bound in (("elbo", ELBO()), ("iwae", iwae)):
        start = time.perf_counter()
        model, _ = train(options, bound, images)
        report(options, name, model, held_out, time.perf_counter() - start)


if __name__ == "__main__":
    main()
