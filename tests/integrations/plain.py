"""The plain PyTorch loop that the frameworks are held against, fused and naive."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastelbo

# The scripts import each other by name, as they do when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from digits import VAE, digits

# 16 latents, since Torch's noise in bfloat16 is that in float32, rounded, where the number of elements is a multiple of 16.
ARGUMENTS = ["--epochs", "2", "--latent", "16", "--beta", "0.7", "--seed", "3"]


def fused(vae: VAE, x: Tensor, beta: float) -> Tensor:
    mu, logvar = vae.encode(x)
    return fastelbo.elbo(vae.decode, x, mu, logvar, beta, likelihood="bernoulli_logits", reduction="batchmean").loss


def naive(vae: VAE, x: Tensor, beta: float) -> Tensor:
    mu, logvar = vae.encode(x)
    zeros = torch.zeros_like(mu)
    eps = fastelbo.reparameterize(zeros, zeros)  # the noise that `fused` would draw, on any backend
    z = mu + torch.exp(0.5 * logvar) * eps
    return fastelbo.reference.elbo_loss(vae.decode(z), x, mu, logvar, beta, likelihood="bernoulli_logits")[0] / len(x)


class Run(NamedTuple):
    losses: Tensor  # of each batch
    sizes: Tensor  # of each batch
    parameters: Tensor  # all of them, flat, after the last step

    def mean_of_last_epoch(self, epochs: int) -> float:
        losses, sizes = self.losses.chunk(epochs)[-1], self.sizes.chunk(epochs)[-1]
        return ((losses * sizes).sum() / sizes.sum()).item()


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def train(options: argparse.Namespace, loss_of=fused, *, accumulate=1, bf16=False, drop_last=False, reseed=False) -> Run:
    """`reseed`: the noise begins with the seed, instead of where the initial parameters left the generator."""
    torch.manual_seed(options.seed)
    vae = VAE(options.latent)
    if reseed:
        torch.manual_seed(options.seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=options.learning_rate)
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(TensorDataset(digits()), options.batch_size, shuffle=True, generator=order, drop_last=drop_last)
    losses, sizes = [], []
    for _ in range(options.epochs):
        for i, (x,) in enumerate(batches, 1):
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = loss_of(vae, x, options.beta)
            (loss / accumulate).backward()
            if i % accumulate == 0 or i == len(batches):
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            sizes.append(float(len(x)))
    return Run(torch.stack(losses), torch.tensor(sizes), flat(vae))
