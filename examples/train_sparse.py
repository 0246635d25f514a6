"""Trains the VAE of `train_counts.py` on counts as they are stored, in CSR, and beside it on the same batches made dense.

The counts are drawn as in `train_counts.py`, with 0.08 in place of 5 for each gene, so that some 6 % are above zero; or they
are those of 4258 words in 395 articles of Reuters, which the package lda brings (`pip install lda`). Nothing in the sparse loop
is [cells, genes] but the decoder's logits and their gradient: a data loader takes rows of the matrix, the encoder's first layer
is a product with a sparse matrix, and the loss takes the target as it is, and makes the mean of logits itself. Both loops see
the same batches and the same noise, so their losses are equal but for rounding.

python examples/train_sparse.py
python examples/train_sparse.py --data reuters
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from options import make_parser
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from train_counts import CountsVAE, draw, negative_elbo

import fastelbo
from fastelbo.likelihoods import NegativeBinomial, ZeroInflatedNegativeBinomial


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


KINDS = {"negative_binomial": NegativeBinomial, "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial}


class SparseCountsVAE(CountsVAE):
    """The same of counts in CSR, whose likelihood takes the decoder's logits and the logarithms of inverse dispersions."""

    def __init__(self, genes: int, latent: int, likelihood: str) -> None:
        super().__init__(genes, latent, likelihood)
        self.decoder = self.decoder[:-1]  # the softmax
        self.likelihood = KINDS[likelihood](mean="softmax", inverse_dispersion="log")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, activation = self.encoder
        logarithms = torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), torch.log1p(x.values()), x.shape)
        hidden = activation(torch.sparse.mm(logarithms, first.weight.T) + first.bias)
        return self.to_mu(hidden), self.to_logvar(hidden)

    def decode(self, z: Tensor, depth: Tensor) -> tuple[Tensor, ...]:
        """The depth comes last."""
        zero_logits = (self.zero_logits,) if isinstance(self.likelihood, ZeroInflatedNegativeBinomial) else ()
        return (self.decoder(z), self.log_inverse_dispersion, *zero_logits, depth)


def sparse_negative_elbo(model: SparseCountsVAE, x: Tensor) -> fastelbo.ELBOTerms:
    """Nats a cell."""
    mu, logvar = model.encode(x)
    depth = torch.sparse.mm(x, torch.ones(x.shape[1], 1, device=x.device))
    return fastelbo.elbo(lambda z: model.decode(z, depth), x, mu, logvar, likelihood=model.likelihood, reduction="batchmean")


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that a step holds at one time, beyond what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def train(options: argparse.Namespace, rows: CountRows, is_sparse: bool) -> tuple[Tensor, float, int, int]:
    """The loss of each step, seconds, and of a step the bytes of data that go to the device and the peak of its memory."""
    torch.manual_seed(options.seed)
    kind = SparseCountsVAE if is_sparse else CountsVAE
    model = kind(rows.genes, options.latent, options.likelihood).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    order = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(rows, options.batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: batch, generator=order)
    torch.manual_seed(options.seed)

    def to_device(batch: Tensor) -> Tensor:
        return (batch if is_sparse else batch.to_dense()).to(options.device)

    def step(batch: Tensor) -> Tensor:
        x = to_device(batch)
        terms = sparse_negative_elbo(model, x) if is_sparse else negative_elbo(model, x)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        return terms.loss.detach()

    losses, start = [], time.perf_counter()
    while len(losses) < options.steps:
        for batch in itertools.islice(loader, options.steps - len(losses)):
            losses.append(step(batch))
    found = torch.stack(losses).cpu()
    seconds, x = time.perf_counter() - start, to_device(batch)
    return found, seconds, CountRows(x).nbytes if is_sparse else x.nbytes, peak_bytes(lambda: step(batch), options.device)


def read(options: argparse.Namespace) -> Tensor:
    """A matrix of counts, `[cells, genes]`, or `[articles, words]`."""
    if options.data == "drawn":
        return draw(options.cells, options.genes, options.seed, counts_a_gene=0.08).counts.float()
    from lda.datasets import load_reuters

    return torch.from_numpy(load_reuters()).float()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=200, batch_size=128, learning_rate=3e-3)
    parser.add_argument(
        "--likelihood", choices=("negative_binomial", "zero_inflated_negative_binomial"), default="negative_binomial"
    )
    parser.add_argument("--data", choices=("drawn", "reuters"), default="drawn")
    parser.add_argument("--cells", type=int, default=2000, help="to be drawn, with so many --genes")
    parser.add_argument("--genes", type=int, default=4000)
    parser.add_argument("--latent", type=int, default=8, help="dimensions of z")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    counts = read(options)
    rows, (cells, genes) = CountRows(counts.to_sparse_csr()), counts.shape
    share = rows.values.numel() / counts.numel()
    print(f"{cells} rows of {genes} counts, {share:.1%} of them above zero")
    print(f"the data: {rows.nbytes / 2**20:.1f} MiB in CSR, {counts.nbytes / 2**20:.1f} MiB dense")
    for name, is_sparse in (("sparse", True), ("dense", False)):
        losses, seconds, moved, peak = train(options, rows, is_sparse)
        print(
            f"{name:6}: nats of a row {losses[0]:.2f} -> {losses[-1]:.2f}, {1000 * seconds / options.steps:.1f} ms a step,"
            f" {moved / 2**20:.2f} MiB of data a step, {peak / 2**20:.1f} MiB of memory at its peak"
        )


if __name__ == "__main__":
    main()
