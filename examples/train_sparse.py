"""Trains the VAE of `train_counts.py` on counts as they are stored, in CSR, and beside it on the same batches made dense.

The counts are drawn as in `train_counts.py`, with 0.08 in place of 5 for each gene, so that some 6 % are above zero. Nothing in
the sparse loop is [cells, genes] but the decoder's output: a data loader takes rows of the matrix, the encoder's first layer is
a product with a sparse matrix, and the loss takes the target as it is. Both loops see the same batches and the same noise, so
their losses are equal but for rounding.

python examples/train_sparse.py
"""

import argparse
import time

import torch
from options import make_parser
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from train_counts import CountsVAE, draw, negative_elbo

import fastelbo


class CountRows(Dataset):
    """The rows of a matrix in CSR. A batch of them is one, too."""

    def __init__(self, counts: Tensor) -> None:
        self.starts, self.columns, self.values = counts.crow_indices(), counts.col_indices(), counts.values()
        self.genes = counts.shape[1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitems__(self, cells: list[int]) -> Tensor:
        """What a data loader asks for a batch."""
        index = torch.tensor(cells)
        begin, sizes = self.starts[index], self.starts[index + 1] - self.starts[index]
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        place = torch.repeat_interleave(begin - starts[:-1], sizes) + torch.arange(int(starts[-1]))
        return torch.sparse_csr_tensor(starts, self.columns[place], self.values[place], (len(cells), self.genes))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.starts, self.columns, self.values))


class SparseCountsVAE(CountsVAE):
    """The same of counts in CSR."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, activation = self.encoder
        logarithms = torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), torch.log1p(x.values()), x.shape)
        hidden = activation(torch.sparse.mm(logarithms, first.weight.T) + first.bias)
        return self.to_mu(hidden), self.to_logvar(hidden)


def sparse_negative_elbo(model: SparseCountsVAE, x: Tensor) -> fastelbo.ELBOTerms:
    """Nats a cell."""
    mu, logvar = model.encode(x)
    depth = torch.sparse.mm(x, torch.ones(x.shape[1], 1, device=x.device))
    return fastelbo.elbo(lambda z: model.decode(z, depth), x, mu, logvar, likelihood=model.likelihood, reduction="batchmean")


def train(options: argparse.Namespace, rows: CountRows, is_sparse: bool) -> tuple[Tensor, float, int]:
    """The loss of each step, seconds, and the bytes of data that a step moves to the device."""
    torch.manual_seed(options.seed)
    kind = SparseCountsVAE if is_sparse else CountsVAE
    model = kind(rows.genes, options.latent, options.likelihood).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    order = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(rows, options.batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: batch, generator=order)
    torch.manual_seed(options.seed)
    losses, moved, start = [], 0, time.perf_counter()
    while len(losses) < options.steps:
        for batch in loader:
            x = (batch if is_sparse else batch.to_dense()).to(options.device)
            moved = CountRows(x).nbytes if is_sparse else x.nbytes
            terms = sparse_negative_elbo(model, x) if is_sparse else negative_elbo(model, x)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
            losses.append(terms.loss.detach())
            if len(losses) == options.steps:
                break
    return torch.stack(losses).cpu(), time.perf_counter() - start, moved


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=200, batch_size=128, learning_rate=3e-3)
    parser.add_argument(
        "--likelihood", choices=("negative_binomial", "zero_inflated_negative_binomial"), default="negative_binomial"
    )
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--genes", type=int, default=4000)
    parser.add_argument("--latent", type=int, default=8, help="dimensions of z")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    cells = draw(options.cells, options.genes, options.seed, counts_a_gene=0.08)
    rows = CountRows(cells.counts.float().to_sparse_csr())
    share = rows.values.numel() / cells.counts.numel()
    print(f"{options.cells} cells of {options.genes} genes, {share:.1%} of the counts above zero")
    print(f"the data: {rows.nbytes / 2**20:.1f} MiB in CSR, {cells.counts.nbytes / 2**20:.1f} MiB dense")
    for name, is_sparse in (("sparse", True), ("dense", False)):
        losses, seconds, moved = train(options, rows, is_sparse)
        print(
            f"{name:6}: nats of a cell {losses[0]:.2f} -> {losses[-1]:.2f}, {1000 * seconds / options.steps:.1f} ms a step,"
            f" {moved / 2**20:.2f} MiB of data a step"
        )


if __name__ == "__main__":
    main()
