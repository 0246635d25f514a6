"""Trains VAEs on real handwritten digits whose posterior is a Gaussian, and a Gaussian that a normalizing flow bends.

The flow (Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015) takes a sample z0 of the encoder's Gaussian
through affine couplings (Dinh et al., Density Estimation Using Real NVP, 2017) to z: each shifts and scales one half of the
latents by what a network makes of the other half and of the encoder's features, and begins as the identity. The KL of z from
N(0, I) has no closed form, so the loss has each sample's estimate of it,

    log q(z | x) - log p(z),    log q(z | x) = log q(z0 | x) - log |det dz / dz0|

Of the digits, in black and white, some are held out. Of these it reports the ELBO and an estimate of log p(x) by importance
weights, p(x | z) p(z) / q(z | x).

python examples/train_flow.py --flow-layers 0 4
"""

import argparse
import math
import time
from functools import partial

import torch
from digits import VAE, black_and_white
from options import make_parser
from torch import Tensor, nn

import fastelbo


class Coupling(nn.Module):
    """Keeps the first latents, and moves the rest by them and the features; the moved ones then come first."""

    def __init__(self, kept: int, moved: int, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.kept = kept
        self.network = nn.Sequential(nn.Linear(kept + features, hidden), nn.SiLU(), nn.Linear(hidden, 2 * moved))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = z[:, : self.kept], z[:, self.kept :]
        shift, log_scale = self.network(torch.cat([kept, features], dim=1)).chunk(2, dim=1)
        log_scale = torch.tanh(log_scale)  # no factor beyond e, which keeps training calm
        return torch.cat([moved * torch.exp(log_scale) + shift, kept], dim=1), log_scale.sum(1)


class Flow(nn.Module):
    def __init__(self, latent: int, features: int, layers: int) -> None:
        super().__init__()
        halves = latent // 2, latent - latent // 2
        self.couplings = nn.ModuleList(Coupling(halves[i % 2], halves[1 - i % 2], features) for i in range(layers))

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed z, and log |det| of its Jacobian, `[B]`."""
        total = z.new_zeros(len(z))
        for coupling in self.couplings:
            z, log_det = coupling(z, features)
            total = total + log_det
        return z, total


class FlowVAE(VAE):
    def __init__(self, latent: int, layers: int, hidden: int = 256) -> None:
        super().__init__(latent, hidden=hidden)
        self.flow = Flow(latent, hidden, layers)


def sampled_terms(model: FlowVAE, x: Tensor) -> fastelbo.ELBOTerms:
    """Of one sample for each digit, `[B]`: the loss is -log of its importance weight."""
    features = model.encoder(x)
    z, log_q, log_p = fastelbo.sample_log_ratio(
        model.to_mu(features), model.to_logvar(features), flow=partial(model.flow, features=features)
    )
    return fastelbo.loss(model.decode(z), x, kl=log_q - log_p, likelihood="bernoulli_logits", reduction="none")


def negative_elbo(model: FlowVAE, x: Tensor) -> fastelbo.ELBOTerms:
    """Nats a digit."""
    return fastelbo.ELBOTerms(*(term.mean() for term in sampled_terms(model, x)))


def train(options: argparse.Namespace, layers: int, images: Tensor) -> tuple[FlowVAE, list[Tensor]]:
    """The model, and the loss of each step."""
    torch.manual_seed(options.seed)
    model = FlowVAE(options.latent, layers).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
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
def report(options: argparse.Namespace, layers: int, model: FlowVAE, x: Tensor, seconds: float) -> None:
    samples = [sampled_terms(model, x) for _ in range(options.evaluation_samples)]
    loss, recon, kl = (torch.stack(term).mean() for term in zip(*samples, strict=True))
    log_weights = -torch.stack([terms.loss for terms in samples]).double()
    log_p = (log_weights.logsumexp(0) - math.log(len(samples))).mean()
    print(f"{layers:11} {-loss:9.3f} {recon:9.3f} {kl:9.3f} {log_p:9.3f} {seconds:8.1f}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=2000, batch_size=64, learning_rate=1e-3)
    parser.add_argument("--flow-layers", type=int, nargs="+", default=[0, 4], help="couplings of each model, trained in turn")
    parser.add_argument("--evaluation-samples", type=int, default=500, help="of each held-out digit")
    parser.add_argument("--latent", type=int, default=16, help="dimensions of z, at least 2")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    images, held_out = black_and_white(options.device)
    print(f"{len(held_out)} held-out digits, nats each")
    print(f"{'flow layers':>11} {'ELBO':>9} {'recon':>9} {'KL':>9} {'log p(x)':>9} {'seconds':>8}")
    for layers in options.flow_layers:
        start = time.perf_counter()
        model, _ = train(options, layers, images)
        report(options, layers, model, held_out, time.perf_counter() - start)


if __name__ == "__main__":
    main()
