"""A likelihood of one's own: log-cosh, which is squared near 0 and linear far out, for data with outliers.

`LogCosh` is all that there is to write: it goes wherever fastelbo takes a likelihood. (Chen et al., Log Hyperbolic Cosine Loss
Improves Variational Auto-Encoder, 2019.) Here it meets a Gaussian on digits of which every twentieth pixel is off by 3, where
pixels have values from 0 to 1. What is reported is the error against the clean digits.

python examples/log_cosh.py
"""

import argparse
import math

import torch
from digits import VAE, digits
from options import make_parser
from torch import Tensor

import fastelbo
from fastelbo.likelihoods import Gaussian, Likelihood, record


@record
class LogCosh(Likelihood):
    """The hyperbolic secant distribution of real values, `1 / (pi scale cosh((x - mean) / scale))`."""

    scale: float = 1.0
    name = "log_cosh"
    parameters = ("mean",)
    kernel = "log_cosh_kernel:log_cosh"  # the second step, which may be left out: Torch computes it then

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.scale < math.inf:
            raise ValueError(f"LogCosh.scale must be positive and finite, got {self.scale}")

    def nll(self, parameters: tuple[Tensor], x: Tensor) -> Tensor:
        distance = (x - parameters[0]) / self.scale
        return torch.logaddexp(distance, -distance) + math.log(self.scale * math.pi / 2)

    @property
    def constant(self) -> float:  # what the kernel is told
        return self.scale


LIKELIHOODS = {"Gaussian": Gaussian(scale="optimal"), "log-cosh": LogCosh(scale=0.1)}
HELD_OUT = 297  # digits that are not trained with


class Model(VAE):
    def __init__(self, kind: str) -> None:
        super().__init__(probabilities=True)  # means in [0, 1], by a sigmoid
        self.likelihood = LIKELIHOODS[kind]


def with_outliers(images: Tensor) -> Tensor:
    """Every twentieth pixel is off by 3, up or down."""
    noise = torch.randint(0, 40, images.shape, device=images.device)
    return images + 3.0 * (noise == 0) - 3.0 * (noise == 1)


def negative_elbo(model: Model, x: Tensor) -> fastelbo.ELBOTerms:
    """Nats a digit."""
    mu, logvar = model.encode(x)
    return fastelbo.elbo(model.decode, x, mu, logvar, likelihood=model.likelihood, reduction="batchmean")


def train(options: argparse.Namespace, kind: str, images: Tensor) -> Model:
    torch.manual_seed(options.seed)
    model = Model(kind).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), options.learning_rate)
    for _ in range(options.steps):
        x = with_outliers(images[torch.randint(len(images), (options.batch_size,), device=images.device)])
        terms = negative_elbo(model, x)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def error_of(model: Model, images: Tensor) -> float:
    """The root mean squared error of a clean pixel, of digits with outliers."""
    torch.manual_seed(0)
    mu, _ = model.encode(with_outliers(images))
    return (images - model.decode(mu)).square().mean().sqrt().item()


def main() -> None:
    options = make_parser(__doc__, steps=500, batch_size=128, learning_rate=2e-3).parse_args()
    images = digits(options.device)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)]
    print(f"root mean squared error of a pixel of {HELD_OUT} held-out digits")
    for kind in LIKELIHOODS:
        print(f"{kind:>8} {error_of(train(options, kind, images[HELD_OUT:]), images[:HELD_OUT]):.4f}")


if __name__ == "__main__":
    main()
