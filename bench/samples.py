"""`python -m bench.samples`: what the importance-weighted bound costs in memory and time over the number of its samples.

The bound is that of Burda et al. (2016), on `models` whose decoders are in eval mode: in training, a batch normalization
would have other statistics in each chunk, so that no two contenders computed the same.
"""

import argparse
import copy
import datetime
import gc
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastelbo

from . import models
from .conftest import device_name, machine_info, pytest_benchmark_generate_commit_info
from .measure import _check_agreement, interleaved, peak_bytes, settle
from .report import file_name
from .samples_report import load, terminal, write
from .subjects import Compared

RESULTS = Path(__file__).parent / "results"
BATCH = {"mlp-784": {"cpu": 128, "cuda": 128}, "conv-3x64x64": {"cpu": 2, "cuda": 64}}
SAMPLES = (1, 2, 4, 8, 16, 32, 64)
LOG_2PI = math.log(2 * math.pi)


def log_weights(model: models.VAE, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """log p(x | z) + log p(z) - log q(z | x), `[..., B]`, for noise of `[..., B, latents]`."""
    z = mu + torch.exp(0.5 * logvar) * eps
    logits = model.decoder(z.flatten(0, -2)).view(*eps.shape[:-1], *x.shape[1:])
    nll = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").flatten(eps.dim() - 1).sum(-1)
    log_p = -0.5 * (LOG_2PI + z.pow(2)).sum(-1)
    log_q = -0.5 * (LOG_2PI + logvar + (z - mu).pow(2) / logvar.exp()).sum(-1)
    return log_p - nll - log_q


def naive(model: models.VAE, x: Tensor, eps: Tensor) -> Tensor:
    """The usual code: all samples in one batch."""
    log_w = log_weights(model, x, *model.encode(x), eps)
    return -(torch.logsumexp(log_w, 0) - math.log(len(eps))).sum()


def checkpointed(model: models.VAE, x: Tensor, eps: Tensor) -> Tensor:
    """The simplest way to constant memory without fastelbo: a sample at a time, each decoded again in backward."""
    mu, logvar = model.encode(x)
    log_w = [checkpoint(log_weights, model, x, mu, logvar, e, use_reentrant=False) for e in eps]
    return -(torch.logsumexp(torch.stack(log_w), 0) - math.log(len(eps))).sum()


def fused(chunk: int) -> Callable:
    def bound(model: models.VAE, x: Tensor, eps: Tensor) -> Tensor:
        iwae = fastelbo.IWAE(len(eps), chunk=chunk)
        return fastelbo.elbo(model.decoder, x, *model.encode(x), likelihood="bernoulli_logits", bound=iwae, eps=eps).loss

    return bound


CHUNKS = {"fastelbo chunk=1": 1, "fastelbo chunk=8": 8, "fastelbo chunk=K": sys.maxsize}
NAIVE = {"naive": naive, "naive compiled": naive, "naive checkpointed": checkpointed}
CONTENDERS = (*NAIVE, *CHUNKS)


class Subject:
    """A model, a batch for it and noise for that, and gradients of the parameters, which are there before and after a step."""

    def __init__(self, name: str, batch: int, samples: int, device: torch.device) -> None:
        make, (_, *shape) = models.MODELS[name]
        torch.manual_seed(0)
        self.model = make().to(device).eval()
        if isinstance(self.model.decoder[-1], torch.nn.Sigmoid):
            self.model.decoder = self.model.decoder[:-1]
        self.x = torch.rand(batch, *shape).to(device)
        self.eps = torch.randn(samples, batch, self.model.mu.out_features).to(device)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def double(self) -> "Subject":
        """The same numbers in float64, of the first few data."""
        other = copy.copy(self)
        other.model, other.x, other.eps = copy.deepcopy(self.model).double(), self.x[:4].double(), self.eps[:, :4].double()
        return other

    def step(self, function: Callable) -> Callable[[], Tensor]:
        """Forward and backward of the bound, gradients zeroed first, without an optimizer."""

        def step() -> Tensor:
            self.model.zero_grad(set_to_none=False)
            loss = function(self.model, self.x, self.eps)
            loss.backward()
            return loss.detach()

        return step

    def results(self, step: Callable[[], Tensor]) -> list[Compared]:
        """The loss and all gradients. In float64 each for itself, almost to the last digit. In float32 a weight has the
        absolute rounding of its logarithm, of hundreds of nats or thousands: what nearly cancels is compared within all."""
        loss = step()
        gradients = [p.grad.clone() for p in self.model.parameters()]
        if loss.dtype == torch.float64:
            return [Compared(value, 1e-9) for value in (loss, *gradients)]
        nats = abs(loss.item()) / len(self.x)
        tolerance = 4 * torch.finfo(loss.dtype).eps * max(nats, 1.0)
        return [Compared(loss, 1e-5), Compared(torch.cat([g.flatten() for g in gradients]), tolerance)]


class Found(NamedTuple):
    """What one contender took, or why it did not run."""

    seconds: list[float] | None = None  # a step, one number a round, which correspond across contenders
    peak_bytes: int | None = None
    missing: str | None = None


def measure(
    name: str, batch: int, samples: int, contenders: list[str], device: torch.device, seconds: float
) -> dict[str, Found]:
    """Time the contenders in turns, for about so many seconds, then look at their memory. They must agree first."""
    torch.compiler.reset()
    settle(device)
    subject = Subject(name, batch, samples, device)
    # A chunk of all samples or of more is one and the same call, and measured once for all its names.
    keys = {c: f"fastelbo chunk={min(CHUNKS[c], samples)}" if c in CHUNKS else c for c in contenders}
    steps, missing, expected = {}, {}, {}
    for contender, key in keys.items():
        if key in steps:
            continue
        function = fused(min(CHUNKS[contender], samples)) if contender in CHUNKS else NAIVE[contender]
        compiled = contender == "naive compiled"
        step = subject.step(torch.compile(function, fullgraph=True, dynamic=False) if compiled else function)
        try:
            found = {"float32": subject.results(step)}
            if not compiled:  # which would be Inductor's arithmetic only, and takes as long again to compile
                exact = subject.double()
                found["float64"] = exact.results(exact.step(function))
        except Exception as error:
            if not (compiled or isinstance(error, torch.OutOfMemoryError)):
                raise
            missing[key] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"  # no C++ compiler, for one
            continue
        for precision, results in found.items():
            label = f"{name} with batch {batch} and K={samples} in {precision}: {contender}"
            _check_agreement(label, results, expected.setdefault(precision, results))
        steps[key] = step
    times = interleaved(steps, device, seconds)
    gc.collect()  # or what is freed during a step would be taken from its peak
    taken = {key: Found(times[key], peak_bytes(step, device)) for key, step in steps.items()}
    return {contender: taken.get(key) or Found(missing=missing[key]) for contender, key in keys.items()}


def rows(name: str, batch: int, samples: int, found: dict[str, Found]) -> Iterator[dict]:
    """What the JSON keeps: as the suite's, but ratios are of slowness."""
    for contender, own in found.items():
        row = {"model": name, "batch": batch, "samples": samples, "contender": contender}
        if own.missing:
            yield {**row, "missing": own.missing}
            continue
        ran = {other: theirs for other, theirs in found.items() if other != contender and not theirs.missing}
        q1, median, q3 = (float(f"{value:.5g}") for value in statistics.quantiles(own.seconds, n=4))
        yield {
            **row,
            "peak_bytes": own.peak_bytes,
            "seconds": {"q1": q1, "median": median, "q3": q3, "rounds": len(own.seconds)},
            # Paired: both of a ratio are from the same round.
            "times_as_slow_as": {
                other: [
                    round(value, 4)
                    for value in statistics.quantiles([a / b for a, b in zip(own.seconds, theirs.seconds, strict=True)], n=4)
                ]
                for other, theirs in ran.items()
            },
        }


def run(options: argparse.Namespace, command: str) -> dict:
    """Measure all that is chosen: what the JSON file holds."""
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # 10 bits would not let contenders agree
    found, started = [], time.monotonic()
    for name in options.models:
        batch = options.batch or BATCH[name][device.type]
        for samples in options.samples:
            if found and time.monotonic() - started > options.limit:
                print(f"{name}, batch {batch}, K={samples}: left out, since {options.limit:.0f} seconds had passed", flush=True)
                continue
            results = measure(name, batch, samples, options.contenders, device, options.seconds)
            found += rows(name, batch, samples, results)
            told = (
                f"{c} {f.missing or f'{1e3 * statistics.median(f.seconds):.3g} ms, {f.peak_bytes / 1e6:.3g} MB'}"
                for c, f in results.items()
            )
            print(f"{name}, batch {batch}, K={samples}: {'; '.join(told)}", flush=True)
    return {
        "machine_info": machine_info(options.device, torch.get_num_threads()),
        "commit_info": pytest_benchmark_generate_commit_info(SimpleNamespace(option=options)),
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "command": command,
        "benchmarks": [],  # none of the suite's
        "samples": found,
    }


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    available = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.samples", description=__doc__.partition("\n")[0].partition(": ")[2])
    parser.add_argument("--models", nargs="+", choices=list(BATCH), default=list(BATCH), help=", ".join(BATCH), metavar="MODEL")
    parser.add_argument("--samples", nargs="+", type=int, default=list(SAMPLES), metavar="K", help="1 to 64 by powers of 2")
    parser.add_argument("--batch", type=int, metavar="B", help="of every model; otherwise one for each model and device")
    add = {"nargs": "+", "choices": list(CONTENDERS), "default": list(CONTENDERS), "metavar": "CONTENDER"}
    parser.add_argument("--contenders", help=", ".join(CONTENDERS), **add)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=available, help=f"(here: {available})")
    parser.add_argument("--seconds", type=float, default=2.0, help="that all contenders of a K are timed for, or longer (2)")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="after which no K is begun (none)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (if any, bench/results/samples-<device>.json)")
    parser.add_argument("--write", action="store_true", help="keep JSON, and tables and plot beside it")
    parser.add_argument("--read", type=Path, metavar="FILE", help="such JSON, instead of measuring anew")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.read
        if path is None:
            usual = f"samples-{file_name(device_name(options.device))}"
            path = options.output or (RESULTS if options.write else Path(scratch)) / usual
            found = run(options, shlex.join(["python", "-m", "bench.samples", *arguments]))
            path.write_text(json.dumps(found, indent=1) + "\n")
        found = load(path)
    print(f"\n{terminal(found)}")
    if options.write:
        write(found)
        print(f"\nWritten: {path}, and .md and .svg beside it")
    elif options.output:
        print(f"\nWritten: {path}")


if __name__ == "__main__":
    main()
