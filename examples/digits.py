"""What the examples share: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which ship with it, and a VAE for them."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

PIXELS = 64


def digits(device: torch.device | str | None = None) -> Tensor:
    """The images, `[1797, 64]`, float32 in [0, 1]."""
    return torch.tensor(load_digits().data / 16, dtype=torch.float32, device=device)


def black_and_white(device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Black and white images to train with, `[1500, 64]`, and 297 to hold out, always the same ones: what is more than half
    black is 1, the rest 0, so that a Bernoulli likelihood is one of the data."""
    images = digits() > 0.5
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))].float().to(device)
    return images[297:], images[:297]


class VAE(nn.Module):
    """A multilayer perceptron each way. `decode` gives what the likelihood is parametrized by: logits, unless `probabilities`.

    Its activation is smooth: the kink of a ReLU would turn one rounding into a different training run.
    """

    def __init__(self, latent: int = 16, probabilities: bool = False, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.SiLU())
        self.to_mu, self.to_logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, PIXELS))
        if probabilities:
            self.decoder.append(nn.Sigmoid())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        return self.to_mu(hidden), self.to_logvar(hidden)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)
