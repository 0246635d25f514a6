"""Three models whose training steps are timed: from a batch to `(mu, logvar)`, from z to the likelihood's parameter."""

import torch
import torch.nn as nn
from torch import Tensor


class VAE(nn.Module):
    def __init__(self, trunk: nn.Module, width: int, latents: int, decoder: nn.Module) -> None:
        super().__init__()
        self.trunk, self.decoder = trunk, decoder
        self.mu, self.logvar = nn.Linear(width, latents), nn.Linear(width, latents)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.mu(h), self.logvar(h)


def mlp_vae() -> VAE:
    """784-400-20, ReLU and sigmoid: the VAE of the PyTorch examples."""
    trunk = nn.Sequential(nn.Linear(784, 400), nn.ReLU())
    return VAE(trunk, 400, 20, nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid()))


def convolutional_vae() -> VAE:
    """Four strided convolutions to 128 latents and four transposed ones back, for images of 3 x 64 x 64; logits."""
    trunk, decoder = [], [nn.Linear(128, 256 * 4 * 4), nn.Unflatten(1, (256, 4, 4))]
    for i, o in ((3, 32), (32, 64), (64, 128), (128, 256)):
        trunk += [nn.Conv2d(i, o, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU()]
    for i, o in ((256, 128), (128, 64), (64, 32)):
        decoder += [nn.ConvTranspose2d(i, o, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU()]
    decoder += [nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1)]
    return VAE(nn.Sequential(*trunk, nn.Flatten()), 256 * 4 * 4, 128, nn.Sequential(*decoder))


def gene_vae() -> VAE:
    """20,000 genes, one hidden layer of 128, 10 latents, as in models of single cells; means of log counts."""
    trunk = nn.Sequential(nn.Linear(20_000, 128), nn.BatchNorm1d(128), nn.ReLU())
    decoder = nn.Sequential(nn.Linear(10, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 20_000))
    return VAE(trunk, 128, 10, decoder)


# The model, and the shape of a batch.
MODELS = {
    "mlp-784": (mlp_vae, (128, 784)),
    "conv-3x64x64": (convolutional_vae, (64, 3, 64, 64)),
    "genes-20000": (gene_vae, (128, 20_000)),
}


def build(name: str, device: torch.device) -> tuple[VAE, Tensor]:
    """A model, the same at each call, and a batch for it."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return make().to(device), torch.rand(shape).to(device)
