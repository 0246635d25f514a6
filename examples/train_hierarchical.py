"""Trains a ladder VAE of any number of layers on real handwritten digits: each layer's prior is learned from the layer above.

    p(x, z_1 ... z_L) = p(x | z_1) p(z_1 | z_2) ... p(z_L),    q(z_1 ... z_L | x) = q(z_L | x) ... q(z_1 | x, z_2)

p(z_L) is N(0, I), and p(z_l | z_{l+1}) a Gaussian whose mean and variance a network computes from z_{l+1}. The posterior is the
Ladder VAE's (Sonderby et al., Ladder Variational Autoencoders, 2016), without its batch normalization: networks go up from x
through d_1 ... d_L, without noise, and from each d_l comes a Gaussian; on the way down, q(z_l | x, z_{l+1}) is its product with
p(z_l | z_{l+1}), which weighs the two means by their precisions. At the top it is taken as it is.

A pixel is one of 17 levels of gray, 0 to 16, and its likelihood a logistic distribution integrated over the level's bin, so
that the nats are those of a code for the digits. The negative ELBO, with samples of q, is

    -log p(x | z_1) + KL(q(z_1 | x, z_2) || p(z_1 | z_2)) + ... + KL(q(z_L | x) || p(z_L))

Before it trains, it shows that the loss of the first batch is what torch.distributions makes of the same noise.

python examples/train_hierarchical.py --latents 16 8 4
"""

import argparse
import math
from itertools import pairwise
from typing import NamedTuple

import torch
from options import make_parser
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution, Uniform, kl_divergence

import fastelbo
from fastelbo.likelihoods import DiscretizedLogistic

PIXELS, LEVELS = 64, 17
LIKELIHOOD = DiscretizedLogistic(levels=LEVELS)
HELD_OUT = 297  # digits that are not trained with


class Pair(nn.Sequential):
    """A multilayer perceptron to the mean and the log-variance of a Gaussian, or the log-scale of a logistic."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 256) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, 2 * outputs))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(inputs).chunk(2, dim=1)


class LadderVAE(nn.Module):
    """Its lists begin with the lowest layer. `latents`: the dimensions of z_1 ... z_L."""

    def __init__(self, latents: list[int], hidden: int = 256) -> None:
        super().__init__()
        self.latents = latents
        sizes = [PIXELS, *[hidden] * len(latents)]
        self.up = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(sizes))
        self.evidence = nn.ModuleList(Pair(hidden, latent) for latent in latents)
        self.prior = nn.ModuleList(Pair(above, latent) for latent, above in pairwise(latents))
        self.decoder = Pair(latents[0], PIXELS)

    def climb(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and log-variance of what each layer knows from below."""
        found, d = [], x
        for up, evidence in zip(self.up, self.evidence, strict=True):
            d = up(d)
            found.append(evidence(d))
        return found

    def noise(self, batch: int) -> list[Tensor]:
        return [torch.randn(batch, latent, device=self.decoder[0].weight.device) for latent in self.latents]


class Terms(NamedTuple):
    """Nats a digit."""

    loss: Tensor
    recon: Tensor
    kl: Tensor  # [L], the lowest layer first


def product(evidence: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the normalized product of two Gaussians: precisions add up, and weigh the means."""
    (mu, logvar), (prior_mu, prior_logvar) = evidence, prior
    share = torch.sigmoid(prior_logvar - logvar)  # of the evidence in the precision
    return torch.lerp(prior_mu, mu, share), logvar + nn.functional.logsigmoid(prior_logvar - logvar)


def negative_elbo(model: LadderVAE, levels: Tensor, noise: list[Tensor], beta: float = 1.0) -> Terms:
    evidence, prior, kls = model.climb(centered(levels)), None, []
    for layer in reversed(range(len(evidence))):
        posterior = evidence[layer] if prior is None else product(evidence[layer], prior)
        z, kl = fastelbo.sample_kl(*posterior, prior=prior, eps=noise[layer], reduction="batchmean")
        kls.insert(0, kl)
        prior = model.prior[layer - 1](z) if layer > 0 else None
    kl = torch.stack(kls)
    loss, recon, _ = fastelbo.loss(
        model.decoder(z), levels, kl=kl.sum(), beta=beta, likelihood=LIKELIHOOD, reduction="batchmean"
    )
    return Terms(loss, recon, kl)


def naive(model: LadderVAE, levels: Tensor, noise: list[Tensor], beta: float = 1.0) -> Terms:
    """The same by torch.distributions."""
    z, kls = None, []
    for layer, evidence in reversed(list(enumerate(model.climb(centered(levels))))):
        q, prior = normal(*evidence), Normal(0.0, 1.0)
        if z is not None:
            prior = normal(*model.prior[layer](z))
            precisions = q.variance.reciprocal(), prior.variance.reciprocal()
            variance = 1 / sum(precisions)
            q = Normal(variance * (q.mean * precisions[0] + prior.mean * precisions[1]), variance.sqrt())
        z = q.mean + q.stddev * noise[layer]
        kls.insert(0, kl_divergence(q, prior).sum() / len(z))
    mean, log_scale = model.decoder(z)
    transforms = [SigmoidTransform().inv, AffineTransform(mean, log_scale.exp())]
    logistic = TransformedDistribution(Uniform(torch.zeros_like(mean), torch.ones_like(mean)), transforms, validate_args=False)
    x, half = centered(levels), 1 / (LEVELS - 1)
    upper = torch.where(levels == LEVELS - 1, 1.0, logistic.cdf(x + half))
    lower = torch.where(levels == 0, 0.0, logistic.cdf(x - half))
    recon = -(upper - lower).log().sum() / len(x)
    return Terms(recon + beta * sum(kls), recon, torch.stack(kls))


def centered(levels: Tensor) -> Tensor:
    """From 0 ... LEVELS - 1 to [-1, 1]."""
    return levels * (2 / (LEVELS - 1)) - 1


def normal(mu: Tensor, logvar: Tensor) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def train(options: argparse.Namespace, digits: Tensor) -> tuple[LadderVAE, list[Tensor]]:
    """The model, and the loss of each step."""
    torch.manual_seed(options.seed)
    model = LadderVAE(options.latents).to(digits.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    beta = fastelbo.schedules.linear(options.warm_up)
    losses = []
    for step in range(options.steps):
        levels = digits[torch.randint(len(digits), (options.batch_size,), device=digits.device)]
        noise = model.noise(len(levels))
        if step == 0:
            for name, terms in (("fastelbo", negative_elbo), ("torch.distributions", naive)):
                loss, recon, kl = terms(model, levels, noise)
                layers = "".join(f", kl{i} {nats:.5f}" for i, nats in enumerate(kl, 1))
                print(f"first batch, {name:>19}: loss {loss:.5f}, recon {recon:.5f}{layers}")
        terms = negative_elbo(model, levels, noise, beta(step))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.detach())
    return model, losses


@torch.no_grad()
def report(model: LadderVAE, digits: Tensor) -> None:
    loss, recon, kl = negative_elbo(model, digits, model.noise(len(digits)))
    layers = "".join(f" + KL {nats:.2f} of z{i}" for i, nats in enumerate(kl, 1))
    print(f"{len(digits)} held-out digits, nats each: {loss:.2f} = {recon:.2f}{layers}")
    print(f"  that is {loss / PIXELS / math.log(2):.3f} bits a pixel, where {LEVELS} levels alone are {math.log2(LEVELS):.3f}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=2000, batch_size=128, learning_rate=1e-3)
    parser.add_argument("--warm-up", type=int, default=1000, help="steps in which beta rises from 0 to 1")
    parser.add_argument("--latents", type=int, nargs="+", default=[16, 8, 4], help="dimensions of z_1, z_2, ...")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    digits = torch.tensor(load_digits().data, dtype=torch.uint8)
    digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))].to(options.device)
    model, _ = train(options, digits[HELD_OUT:])
    report(model, digits[:HELD_OUT])


if __name__ == "__main__":
    main()
