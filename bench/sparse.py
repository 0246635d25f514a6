"""`python -m bench.sparse`: counts in CSR next to the same counts dense, and next to the formula that users write.

A minibatch is stored in CSR. The formula and a dense call need it dense, which is timed with and without the time to make it
so. Forward and backward in float32; contenders take turns on the same inputs, and agree in value and gradients first. On a GPU
the formula is under torch.compile, too, and inputs are so many that they have left the cache when they come round again.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastelbo
from fastelbo.likelihoods import Likelihood, Multinomial, NegativeBinomial, PoissonLog, ZeroInflatedNegativeBinomial

from .likelihoods import counts, scvi_log_prob, scvi_zero_inflated, stand
from .measure import in_turn, interleaved, peak_bytes, settle
from .report import in_words

CPU = torch.device("cpu")
KEPT = Path(__file__).parent / "results" / "sparse.md"
SHARES = 0.02, 0.05, 0.3


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
    *((name, 0.05, (128, 20000)) for name in ("negative_binomial", "multinomial")),
)
# Those with kernels for rows first, since time may run out.
ROWS_ON_GPU = tuple(
    (name, 0.05, shape)
    for name in sorted(CASES, key=lambda name: not name.endswith(("logits", "multinomial")))
    for shape in ((128, 4000), (512, 20000))
)


def contenders(
    case: Case, share: float, shape: tuple[int, int], device: torch.device = CPU, compiles: bool = False
) -> tuple[dict[str, Callable[[], list[Tensor]]], Tensor]:
    """Calls by name, each of which returns the loss and its gradients; and the target in CSR."""
    dense = counts(share, *shape).to(device)
    parameters = [p.to(device).requires_grad_() for p in case.parameters(*shape)]
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

    compiled = {}
    if compiles:
        by_compiler = torch.compile(case.nll, dynamic=False)
        compiled["formula, compiled"] = differentiated(lambda x: by_compiler(x, *parameters), lambda: dense)
    return {
        "formula": differentiated(by_formula, lambda: dense),
        **compiled,
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


def several(case: Case, share: float, shape: tuple[int, int], device: torch.device) -> tuple[dict[str, Callable], Tensor]:
    """Contenders that have been checked, with as many inputs as fill the cache of a GPU twice; and a target."""
    count, on_gpu = 1, device.type == "cuda"
    if on_gpu:
        torch.compiler.reset()
        count += math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / (4 * math.prod(shape)))
    sets = [contenders(case, share, shape, device, on_gpu) for _ in range(count)]
    check(sets[0][0])
    return {name: in_turn([calls[name] for calls, _ in sets]) for name in sets[0][0]}, sets[0][1]


def row(name: str, share: float, shape: tuple[int, int], seconds: float, device: torch.device = CPU) -> str:
    torch.manual_seed(0)
    calls, sparse = several(CASES[name], share, shape, device)
    samples = interleaved(calls, device, seconds)
    times = {key: statistics.median(found) for key, found in samples.items()}
    *others, own = samples.values()
    ratios = [statistics.median(a / b for a, b in zip(other, own, strict=True)) for other in others]
    stored = sum(t.nbytes for t in (sparse.crow_indices(), sparse.col_indices(), sparse.values()))
    peaks = (f"{peak_bytes(calls[key], device) / 1e6:.3g}" for key in ("formula", "dense", "CSR"))
    cells = [f"`{name}`, {shape[0]}x{shape[1]}", f"{share:.0%}", f"{times['formula'] * 1e3:.3g}", f"{times['CSR'] * 1e3:.3g}"]
    cells += [f"{ratio:.2f}" + (" ▼" if ratio < 1 else "") for ratio in ratios]
    cells += [f"{4 * sparse.numel() / 1e6:.3g} / {stored / 1e6:.3g}", " / ".join(peaks)]
    return " | ".join(["", *cells, ""]).strip()


HEAD = """# Counts in CSR

How many times as fast the loss of a target in CSR is, forward and backward in float32, as the formula that users write
(scvi-tools' terms), and as fastelbo's of the dense target: of one that is dense, and with the time to make it so. Medians of
ratios of rounds in turns; ▼ marks where CSR loses. MB: of the target, dense and in CSR with 8-byte indices, which is what goes
to a device; and the most that a call holds at one time beyond its inputs, gradients included.
"""


def header(title: str, device: torch.device) -> str:
    compiled = ["over it compiled"] * (device.type == "cuda")
    others = ["over the formula", *compiled, "made dense", "over dense", "made dense"]
    columns = [title, "above zero", "formula, ms", "CSR, ms", *others, "MB, dense / CSR", "peak MB, formula / dense / CSR"]
    return f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of a CPU")
    parser.add_argument("--match", default="", help="only likelihoods with this in their name")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds, after which no row is begun")
    parser.add_argument("--output", type=Path, help="keep the tables there")
    parser.add_argument("--write", action="store_true", help="keep the tables in bench/results/sparse.md")
    args = parser.parse_args()
    if args.match and args.write:
        parser.error("--write keeps all rows, without --match")
    device, start = torch.device(args.device), time.monotonic()
    settle(device)
    page = f"{HEAD}{stand('bench.sparse')}\n"
    runs = {in_words(threads): threads for threads in args.threads}
    if device.type == "cuda":
        runs = {torch.cuda.get_device_name(): torch.get_num_threads()}
    for title, threads in runs.items():
        torch.set_num_threads(threads)
        page += f"\n{header(title, device)}"
        for name, share, shape in ROWS_ON_GPU if device.type == "cuda" else ROWS:
            if args.match in name and time.monotonic() - start < args.limit:
                found = row(name, share, shape, args.seconds, device)
                print(found, flush=True)
                page += f"{found}\n"
    for path in [args.output] * (args.output is not None) + [KEPT] * args.write:
        path.write_text(page)


if __name__ == "__main__":
    main()
