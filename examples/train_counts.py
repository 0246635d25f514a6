"""Trains VAEs on counts such as those of single-cell RNA sequencing, by a negative binomial with and without extra zeros.

The counts are synthetic, so that what is found can be held against what is there. They are drawn like this:

- every cell is of one of 5 types, all equally likely, and has a depth, log-normal with a standard deviation of 0.3 in the
  logarithm;
- the share of a gene in a cell of a type is the softmax over genes of a normal number with standard deviation 1, which all
  types have in common, plus one with standard deviation 0.3 of the type's own; times the depth, and 5 counts for each gene, it
  is the mean;
- the inverse dispersion of a gene is log-uniform from 0.5 to 20. A count is a Poisson variable whose rate is a Gamma variable
  of this shape and mean: a negative binomial, with variance mean + mean^2 / inverse dispersion;
- a tenth of all counts is then set to 0, whatever it was.

The model is that of scVI without its batches (Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018):
the decoder gives the shares, the depth is the cell's total count, and each gene has one inverse dispersion and one logit of
extra zeros.

python examples/train_counts.py
"""

import argparse
from typing import NamedTuple

import torch
from options import make_parser
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.distributions import Gamma, Poisson

import fastelbo

TYPES, EXTRA_ZEROS, COUNTS_A_GENE = 5, 0.1, 5.0
LIKELIHOODS = ("negative_binomial", "zero_inflated_negative_binomial")


class Cells(NamedTuple):
    """Counts and the truth behind them."""

    counts: Tensor  # [cells, genes], int32
    types: Tensor  # [cells]
    mean: Tensor  # [cells, genes]
    inverse_dispersion: Tensor  # [genes]


def draw(
    cells: int, genes: int, seed: int, device: torch.device | str | None = None, counts_a_gene: float = COUNTS_A_GENE
) -> Cells:
    torch.manual_seed(seed)
    types = torch.randint(TYPES, (cells,))
    shares = (torch.randn(genes) + 0.3 * torch.randn(TYPES, genes)).softmax(1)
    depth = torch.exp(0.3 * torch.randn(cells, 1))
    mean = counts_a_gene * genes * depth * shares[types]
    inverse_dispersion = 0.5 * 40 ** torch.rand(genes)
    counts = Poisson(Gamma(inverse_dispersion, inverse_dispersion / mean).sample()).sample()
    counts[torch.rand(cells, genes) < EXTRA_ZEROS] = 0
    return Cells(*(t.to(device) for t in (counts.int(), types, mean, inverse_dispersion)))


class CountsVAE(nn.Module):
    def __init__(self, genes: int, latent: int, likelihood: str, hidden: int = 128) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.encoder = nn.Sequential(nn.Linear(genes, hidden), nn.SiLU())
        self.to_mu, self.to_logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, genes), nn.Softmax(1))
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(genes))
        if likelihood == "zero_inflated_negative_binomial":
            self.zero_logits = nn.Parameter(torch.full((genes,), -2.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(torch.log1p(x))
        return self.to_mu(hidden), self.to_logvar(hidden)

    def decode(self, z: Tensor, depth: Tensor) -> tuple[Tensor, ...]:
        """The parameters of the likelihood: the mean is `[B, genes]`, the others are `[genes]`."""
        parameters = depth * self.decoder(z), self.log_inverse_dispersion.exp()
        return (*parameters, self.zero_logits) if self.likelihood == "zero_inflated_negative_binomial" else parameters


def negative_elbo(model: CountsVAE, x: Tensor, beta: float = 1.0) -> fastelbo.ELBOTerms:
    """Nats a cell."""
    mu, logvar = model.encode(x)
    depth = x.sum(1, keepdim=True)
    return fastelbo.elbo(
        lambda z: model.decode(z, depth), x, mu, logvar, beta, likelihood=model.likelihood, reduction="batchmean"
    )


def train(options: argparse.Namespace, likelihood: str, counts: Tensor) -> tuple[CountsVAE, list[Tensor]]:
    """The model, and the loss of each step."""
    torch.manual_seed(options.seed)
    model = CountsVAE(counts.shape[1], options.latent, likelihood).to(counts.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    # From the start on, the KL would switch latents off before the decoder has learned to use them.
    beta = fastelbo.schedules.linear(options.warm_up)
    losses = []
    for step in range(options.steps):
        x = counts[torch.randint(len(counts), (options.batch_size,), device=counts.device)]
        terms = negative_elbo(model, x, beta(step))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.detach())
    return model, losses


@torch.no_grad()
def report(model: CountsVAE, cells: Cells) -> None:
    terms = negative_elbo(model, cells.counts)
    found, truth = model.log_inverse_dispersion, cells.inverse_dispersion.log()
    correlation = torch.corrcoef(torch.stack([found, truth]))[0, 1]
    ratio = (found - truth).median().exp()
    mu, _ = model.encode(cells.counts)
    clusters = KMeans(TYPES, n_init=10, random_state=0).fit_predict(mu.cpu().numpy())
    print(f"{model.likelihood}, nats of a held-out cell: {terms.loss:.2f} = {terms.recon:.2f} + KL {terms.kl:.2f}")
    print(f"  inverse dispersion: correlation with the truth {correlation:.3f} in logarithms, median ratio to it {ratio:.2f}")
    if model.likelihood == "zero_inflated_negative_binomial":
        print(f"  share of extra zeros: median over genes {model.zero_logits.sigmoid().median():.3f}, truth {EXTRA_ZEROS:.3f}")
    print(f"  clusters of the latents: adjusted Rand index {adjusted_rand_score(cells.types.cpu(), clusters):.3f}, truth 1")


def true_nats(cells: Cells) -> Tensor:
    """What a held-out cell costs if all that it was drawn from is known: no model that must find it out has less on average."""
    zero_logits = torch.tensor(EXTRA_ZEROS, device=cells.mean.device).logit()
    terms = fastelbo.loss(
        (cells.mean, cells.inverse_dispersion, zero_logits), cells.counts, kl=torch.zeros((), device=cells.mean.device),
        likelihood="zero_inflated_negative_binomial", reduction="batchmean",
    )  # fmt: skip
    return terms.recon


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=1500, batch_size=128, learning_rate=3e-3)
    parser.add_argument("--likelihood", nargs="+", choices=LIKELIHOODS, default=LIKELIHOODS, help="which to train, in turn")
    parser.add_argument("--cells", type=int, default=4000, help="a fifth of which is held out")
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=500, help="steps in which beta rises from 0 to 1")
    parser.add_argument("--latent", type=int, default=8, help="dimensions of z")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    cells = draw(options.cells, options.genes, options.seed, options.device)
    held_out = options.cells // 5
    inverse_dispersion = {"inverse_dispersion": cells.inverse_dispersion}
    test = Cells(**{k: v[:held_out] for k, v in cells._asdict().items()} | inverse_dispersion)
    print(f"{held_out} held-out cells of {options.genes} genes; nats of a cell by the truth: {true_nats(test):.2f}")
    for likelihood in options.likelihood:
        model, _ = train(options, likelihood, cells.counts[held_out:])
        report(model, test)


if __name__ == "__main__":
    main()
