"""Trains a VAE with two levels of latents on real handwritten digits, the lower one with a prior that is learned.

    p(x, z1, z2) = p(z2) p(z1 | z2) p(x | z1),    q(z1, z2 | x) = q(z2 | x) q(z1 | x, z2)

p(z2) is N(0, I); p(z1 | z2) is a Gaussian whose mean and variance a network computes from z2. A pixel is one of 17 levels of
gray, 0 to 16, and its likelihood a logistic distribution integrated over the level's bin, so that the nats are those of a code
for the digits. The negative ELBO, with samples of q, is

    -log p(x | z1) + KL(q(z1 | x, z2) || p(z1 | z2)) + KL(q(z2 | x) || p(z2))

Before it trains, it shows that the loss of the first batch is what torch.distributions makes of the same noise.

python examples/train_hierarchical.py
"""

import argparse
import math
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution, Uniform, kl_divergence

import fastelbo
from fastelbo.likelihoods import DiscretizedLogistic

PIXELS, LEVELS = 64, 17
LIKELIHOOD = DiscretizedLogistic(levels=LEVELS)
HELD_OUT = 297  # digits that are not trained with


class Gaussian(nn.Sequential):
    """A multilayer perceptron to the mean and the log-variance of a Gaussian."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 256) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, 2 * outputs))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(torch.cat(inputs, dim=1)).chunk(2, dim=1)


class HierarchicalVAE(nn.Module):
    def __init__(self, latent1: int, latent2: int) -> None:
        super().__init__()
        self.posterior2 = Gaussian(PIXELS, latent2)
        self.posterior1 = Gaussian(PIXELS + latent2, latent1)
        self.prior1 = Gaussian(latent2, latent1)
        self.decoder = Gaussian(latent1, PIXELS)  # but for that it is a logistic: mean and logarithm of the scale

    def noise(self, batch: int) -> tuple[Tensor, Tensor]:
        latents = (level[-1].out_features // 2 for level in (self.posterior1, self.posterior2))
        return tuple(torch.randn(batch, latent, device=self.decoder[0].weight.device) for latent in latents)


class Terms(NamedTuple):
    """Nats a digit."""

    loss: Tensor
    recon: Tensor
    kl1: Tensor
    kl2: Tensor


def negative_elbo(model: HierarchicalVAE, levels: Tensor, eps1: Tensor, eps2: Tensor, beta: float = 1.0) -> Terms:
    x = centered(levels)
    z2, kl2 = fastelbo.sample_kl(*model.posterior2(x), eps=eps2, reduction="batchmean")
    z1, kl1 = fastelbo.sample_kl(*model.posterior1(x, z2), prior=model.prior1(z2), eps=eps1, reduction="batchmean")
    loss, recon, _ = fastelbo.loss(
        model.decoder(z1), levels, kl=kl1 + kl2, beta=beta, likelihood=LIKELIHOOD, reduction="batchmean"
    )
    return Terms(loss, recon, kl1, kl2)


def naive(model: HierarchicalVAE, levels: Tensor, eps1: Tensor, eps2: Tensor, beta: float = 1.0) -> Terms:
    """The same by torch.distributions."""
    x = centered(levels)
    q2 = normal(*model.posterior2(x))
    z2 = q2.mean + q2.stddev * eps2
    q1, p1 = normal(*model.posterior1(x, z2)), normal(*model.prior1(z2))
    z1 = q1.mean + q1.stddev * eps1
    mean, log_scale = model.decoder(z1)
    transforms = [SigmoidTransform().inv, AffineTransform(mean, log_scale.exp())]
    logistic = TransformedDistribution(Uniform(torch.zeros_like(mean), torch.ones_like(mean)), transforms, validate_args=False)
    half = 1 / (LEVELS - 1)
    upper = torch.where(levels == LEVELS - 1, 1.0, logistic.cdf(x + half))
    lower = torch.where(levels == 0, 0.0, logistic.cdf(x - half))
    recon = -(upper - lower).log().sum() / len(x)
    kl1 = kl_divergence(q1, p1).sum() / len(x)
    kl2 = kl_divergence(q2, Normal(0.0, 1.0)).sum() / len(x)
    return Terms(recon + beta * (kl1 + kl2), recon, kl1, kl2)


def centered(levels: Tensor) -> Tensor:
    """From 0 ... LEVELS - 1 to [-1, 1]."""
    return levels * (2 / (LEVELS - 1)) - 1


def normal(mu: Tensor, logvar: Tensor) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def train(options: argparse.Namespace, digits: Tensor) -> tuple[HierarchicalVAE, list[Tensor]]:
    """The model, and the loss of each step."""
    torch.manual_seed(options.seed)
    model = HierarchicalVAE(options.latent1, options.latent2).to(digits.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    beta = fastelbo.schedules.linear(options.warm_up)
    losses = []
    for step in range(options.steps):
        levels = digits[torch.randint(len(digits), (options.batch_size,), device=digits.device)]
        noise = model.noise(len(levels))
        if step == 0:
            for name, terms in (("fastelbo", negative_elbo), ("torch.distributions", naive)):
                values = terms(model, levels, *noise)
                print(f"first batch, {name:>19}: " + ", ".join(f"{k} {v:.5f}" for k, v in values._asdict().items()))
        terms = negative_elbo(model, levels, *noise, beta(step))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.detach())
    return model, losses


@torch.no_grad()
def report(model: HierarchicalVAE, digits: Tensor) -> None:
    loss, recon, kl1, kl2 = negative_elbo(model, digits, *model.noise(len(digits)))
    print(f"{len(digits)} held-out digits, nats each: {loss:.2f} = {recon:.2f} + KL {kl1:.2f} of z1 + KL {kl2:.2f} of z2")
    print(f"  that is {loss / PIXELS / math.log(2):.3f} bits a pixel, where {LEVELS} levels alone are {math.log2(LEVELS):.3f}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=1000, help="steps in which beta rises from 0 to 1")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--latent1", type=int, default=16, help="dimensions of z1")
    parser.add_argument("--latent2", type=int, default=8, help="dimensions of z2")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    digits = torch.tensor(load_digits().data, dtype=torch.uint8)
    digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))].to(options.device)
    model, _ = train(options, digits[HELD_OUT:])
    report(model, digits[:HELD_OUT])


if __name__ == "__main__":
    main()
