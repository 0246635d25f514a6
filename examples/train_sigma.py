"""Trains VAEs on real handwritten digits whose Gaussian likelihood has a fixed, a learned and an optimal scale sigma.

With sigma = 1 and pixels in [0, 1], no squared error is worth the KL that would lessen it: no latent is used, and every digit
becomes the mean digit. A sigma-VAE (Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, 2021) gets out
of that without a beta to tune:

- fixed: sigma is 1, which is the mean squared error in disguise;
- learned: log sigma is one parameter of the decoder, softly bounded below;
- optimal: sigma is the root of the mean squared error of the batch, which minimizes the loss.

python examples/train_sigma.py
"""

import argparse

import torch
from digits import VAE, digits
from options import make_parser
from torch import Tensor, nn

import fastelbo
from fastelbo.likelihoods import Gaussian

SOFT_MIN = -6.0  # of log sigma
LIKELIHOODS = {
    "fixed": Gaussian(),
    "learned": Gaussian(parameter="log_scale", soft_min=SOFT_MIN),
    "optimal": Gaussian(scale="optimal"),
}
HELD_OUT = 297  # digits that are not trained with


class SigmaVAE(VAE):
    """The means of the pixels, and a logarithm of sigma which all pixels share."""

    def __init__(self, latent: int, kind: str) -> None:
        super().__init__(latent, probabilities=True)  # means in [0, 1], by a sigmoid
        self.kind, self.likelihood = kind, LIKELIHOODS[kind]
        if kind == "learned":
            self.log_sigma = nn.Parameter(torch.zeros(()))

    def decode(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mean = super().decode(z)
        return (mean, self.log_sigma) if self.kind == "learned" else mean

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x)[0])


def negative_elbo(model: SigmaVAE, x: Tensor) -> fastelbo.ELBOTerms:
    """Nats a digit."""
    mu, logvar = model.encode(x)
    return fastelbo.elbo(model.decode, x, mu, logvar, likelihood=model.likelihood, reduction="batchmean")


def train(options: argparse.Namespace, kind: str, images: Tensor) -> tuple[SigmaVAE, list[Tensor]]:
    """The model, and the loss of each step."""
    torch.manual_seed(options.seed)
    model = SigmaVAE(options.latent, kind).to(images.device)
    # Adam moves a parameter by no more than about its learning rate a step, and log sigma has far to go.
    groups = {name: {"params": p, "lr": options.learning_rate} for name, p in model.named_parameters()}
    if kind == "learned":
        groups["log_sigma"]["lr"] *= 10
    optimizer = torch.optim.Adam(groups.values())
    losses = []
    for _ in range(options.steps):
        x = images[torch.randint(len(images), (options.batch_size,), device=images.device)]
        terms = negative_elbo(model, x)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.detach())
    return model, losses


@torch.no_grad()
def sigma_of(model: SigmaVAE, images: Tensor) -> Tensor:
    """The sigma to use from now on; of an optimal one, that of the sampled reconstructions of all training images."""
    if model.kind == "learned":
        return torch.exp(SOFT_MIN + nn.functional.softplus(model.log_sigma - SOFT_MIN))
    if model.kind == "optimal":
        z = fastelbo.reparameterize(*model.encode(images))
        return (images - model.decoder(z)).square().mean().sqrt()
    return torch.ones(())


@torch.no_grad()
def report(kind: str, model: SigmaVAE, images: Tensor, held_out: Tensor) -> None:
    sigma = sigma_of(model, images).item()
    mu, logvar = model.encode(held_out)
    nats = fastelbo.elbo(model.decoder, held_out, mu, logvar, likelihood=Gaussian(sigma), reduction="batchmean")
    error = (held_out - model.reconstruct(held_out)).square().mean().sqrt()
    print(f"{kind:>8} {sigma:8.4f} {error:8.4f} {nats.recon:9.2f} {nats.kl:8.2f} {nats.loss:9.2f}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=1500, batch_size=128, learning_rate=1e-3)
    parser.add_argument("--sigma", nargs="+", choices=LIKELIHOODS, default=list(LIKELIHOODS), help="which to train, in turn")
    parser.add_argument("--latent", type=int, default=16, help="dimensions of z")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    images = digits(options.device)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)]
    print(f"{HELD_OUT} held-out digits: root mean squared error of a pixel, and nats a digit")
    print(f"{'':>8} {'sigma':>8} {'error':>8} {'recon':>9} {'KL':>8} {'loss':>9}")
    for kind in options.sigma:
        model, _ = train(options, kind, images[HELD_OUT:])
        report(kind, model, images[HELD_OUT:], images[:HELD_OUT])


if __name__ == "__main__":
    main()
