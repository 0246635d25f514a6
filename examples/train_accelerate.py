"""Trains a VAE on digits with Hugging Face Accelerate, which spreads it over devices and chooses the precision.

python examples/train_accelerate.py
accelerate launch --mixed_precision bf16 examples/train_accelerate.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import VAE, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastelbo


class Objective(nn.Module):
    """The loss as a module: Accelerate autocasts, and synchronizes, what happens in the forward of what it prepared."""

    def __init__(self, vae: VAE, **options) -> None:
        super().__init__()
        self.vae, self.options = vae, options

    def forward(self, x: Tensor, eps: Tensor | None = None) -> fastelbo.ELBOTerms:
        mu, logvar = self.vae.encode(x)
        return fastelbo.elbo(self.vae.decode, x, mu, logvar, eps=eps, **self.options)


def train(options: argparse.Namespace, accelerator: Accelerator) -> Objective:
    # Processes have data of their own, and so need noise of their own. They start from the parameters of the first.
    set_seed(options.seed, device_specific=True)
    # Accelerate divides the loss by the number of accumulated batches, which must be means, and of one size.
    objective = Objective(VAE(options.latent), beta=options.beta, likelihood="bernoulli_logits", reduction="batchmean")
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(TensorDataset(digits()), options.batch_size, shuffle=True, generator=order, drop_last=True)
    optimizer = torch.optim.Adam(objective.parameters(), lr=options.learning_rate)
    model, optimizer, batches = accelerator.prepare(objective, optimizer, batches)
    for epoch in range(options.epochs):
        totals = torch.zeros(3, device=accelerator.device)
        for (x,) in batches:
            with accelerator.accumulate(model):
                terms = model(x)
                accelerator.backward(terms.loss)
                optimizer.step()
                optimizer.zero_grad()
            totals += torch.stack(terms).detach()
        loss, recon, kl = (accelerator.reduce(totals, "mean") / len(batches)).tolist()
        accelerator.print(f"epoch {epoch + 1:3}: loss per digit {loss:.6f}, recon {recon:.6f}, kl {kl:.6f}")
    return objective


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="of each device and accumulated batch")
    parser.add_argument("--accumulate", type=int, default=2, help="batches to a step of the optimizer")
    parser.add_argument("--latent", type=int, default=16, help="dimensions of z")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    train(options, Accelerator(gradient_accumulation_steps=options.accumulate))
