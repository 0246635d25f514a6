"""`python -m bench.sparse`: counts in CSR next to the same counts dense, on a CPU, and next to the formula that users write.

A minibatch is stored in CSR. The formula and a dense call need it dense, which is timed with and without the time to make it
so. Forward and backward in float32; contenders take turns on the same inputs, and agree in value and gradients first.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastelbo
from fastelbo.likelihoods import Likelihood, Multinomial, NegativeBinomial, PoissonLog, ZeroInflatedNegativeBinomial

from .likelihoods import counts, scvi_log_prob, scvi_zero_inflated, stand
from .measure import interleaved, peak_bytes, settle

KEPT = Path(__file__).parent / "results" / "sparse.md"
SHARES = 0.02, 0.05, 0.1, 0.3


class Case(NamedTuple):
    """A likelihood; its parameters for a shape, and their negative log-likelihood as users write it."""

    name: str
    likelihood: Likelihood
    parameters: Callable[..., list[Tensor]]
    nll: Callable[..., Tensor]


def by_logits(x: Tensor, logits: Tensor, log_theta: Tensor, library: Tensor) -> Tensor:
    """As scVI's decoder ends."""
    return -scvi_log_prob(x, library * logits.softmax(-1), log_theta.exp()).sum()


CASES = {
    case.name: case
    for case in (
        Case(
            "negative_binomial", NegativeBinomial(), lambda *shape: [torch.randn(shape).exp(), torch.randn(shape[1:]).exp()],
            lambda x, *p: -scvi_log_prob(x, *p).sum(),
        ),
        Case(
            "negative_binomial of logits", NegativeBinomial(mean="softmax", inverse_dispersion="log"),
            lambda *shape: [torch.randn(shape), torch.randn(shape[1:]), shape[1] * torch.rand(shape[0], 1)], by_logits,
        ),
        Case(
            "zero_inflated_negative_binomial", ZeroInflatedNegativeBinomial(),
            lambda *shape: [torch.randn(shape).exp(), torch.randn(shape[1:]).exp(), torch.randn(shape)],
            lambda x, *p: -scvi_zero_inflated(x, *p).sum(),
        ),
        Case(
            "poisson_log", PoissonLog(), lambda *shape: [torch.randn(shape)],
            lambda x, y: -torch.distributions.Poisson(y.exp(), validate_args=False).log_prob(x).sum(),
        ),
        Case("multinomial", Multinomial(), lambda *shape: [torch.randn(shape)], lambda x, y: -(F.log_softmax(y, -1) * x).sum()),
    )
}  # fmt: skip
ROWS = (
    *((name, share, (128, 4000)) for name in CASES for share in SHARES),
    *(("negative_binomial", share, (512, 20000)) for share in SHARES),
    *((name, 0.05, (512, 20000)) for name in list(CASES)[1:]),
)


def contenders(case: Case, share: float, shape: tuple[int, int]) -> tuple[dict[str, Callable[[], list[Tensor]]], Tensor]:
    """Calls by name, each of which returns the loss and its gradients; and the target in CSR."""
    dense, parameters = counts(share, *shape), [p.requires_grad_() for p in case.parameters(*shape)]
    sparse = dense.to_sparse_csr()
    given = tuple(parameters) if len(parameters) > 1 else parameters[0]

    def by_formula(x: Tensor) -> Tensor:
        return case.nll(x, *parameters)

    def by_fastelbo(x: Tensor) -> Tensor:
        return fastelbo.nll(given, x, likelihood=case.likelihood)

    def differentiated(function: Callable[[Tensor], Tensor], target: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            loss = function(target())
            return [loss.detach(), *torch.autograd.grad(loss, parameters)]

        return call

    return {
        "formula": differentiated(by_formula, lambda: dense),
        "formula, made dense": differentiated(by_formula, sparse.to_dense),
        "dense": differentiated(by_fastelbo, lambda: dense),
        "dense, made dense": differentiated(by_fastelbo, sparse.to_dense),
        "CSR": differentiated(by_fastelbo, lambda: sparse),
    }, sparse


def check(calls: dict[str, Callable[[], list[Tensor]]]) -> None:
    """Raise unless all agree."""
    expected = calls["formula"]()
    for call in calls.values():
        torch.testing.assert_close(call(), expected, rtol=2e-3, atol=2e-2)


def row(name: str, share: float, shape: tuple[int, int], seconds: float) -> str:
    torch.manual_seed(0)
    calls, sparse = contenders(CASES[name], share, shape)
    check(calls)
    samples = interleaved(calls, torch.device("cpu"), seconds)
    times = {key: statistics.median(found) for key, found in samples.items()}
    *others, own = samples.values()
    ratios = [statistics.median(a / b for a, b in zip(other, own, strict=True)) for other in others]
    stored = sum(t.nbytes for t in (sparse.crow_indices(), sparse.col_indices(), sparse.values()))
    peaks = (f"{peak_bytes(calls[key], torch.device('cpu')) / 1e6:.3g}" for key in ("formula", "dense", "CSR"))
    cells = [f"`{name}`, {shape[0]}x{shape[1]}", f"{share:.0%}", f"{times['formula'] * 1e3:.3g}", f"{times['CSR'] * 1e3:.3g}"]
    cells += [f"{ratio:.2f}" + (" ▼" if ratio < 1 else "") for ratio in ratios]
    cells += [f"{4 * sparse.numel() / 1e6:.3g} / {stored / 1e6:.3g}", " / ".join(peaks)]
    return " | ".join(["", *cells, ""]).strip()


HEAD = """# Counts in CSR

How many times as fast the loss of a target in CSR is, forward and backward in float32 on a CPU, as the formula that users
write (scvi-tools' terms), and as fastelbo's of the dense target: of one that is dense, and with the time to make it so. Medians
of ratios of rounds in turns; ▼ marks where CSR loses. MB: of the target, dense and in CSR with 8-byte indices, which is what
goes to a device; and the most that a call holds at one time beyond its inputs, gradients included.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--match", default="", help="only likelihoods with this in their name")
    parser.add_argument("--write", action="store_true", help="keep the tables in bench/results/sparse.md")
    args = parser.parse_args()
    settle(torch.device("cpu"))
    page = f"{HEAD}{stand('bench.sparse')}\n"
    for threads in args.threads:
        torch.set_num_threads(threads)
        page += f"\n| {threads} thread{'s' * (threads > 1)} | above zero | formula, ms | CSR, ms | over the formula"
        page += (
            " | made dense | over dense | made dense | MB, dense / CSR | peak MB, formula / dense / CSR |\n"
            + "| --- " * 10
            + "|\n"
        )
        for name, share, shape in ROWS:
            if args.match in name:
                found = row(name, share, shape, args.seconds)
                print(found, flush=True)
                page += f"{found}\n"
    if args.write:
        KEPT.write_text(page)


if __name__ == "__main__":
    main()
