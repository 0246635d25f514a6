"""`python -m bench.host`: what a repeated call costs on the host, in counts, which do not depend on the machine: Python calls,
Torch operators and allocations of a call and its backward, next to the naive code. On a GPU, launches too."""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastelbo
from fastelbo import Posterior, Weighting, reference
from fastelbo.likelihoods import Gaussian

from .measure import count_kernels

SHAPE, LATENT = (128, 784), (128, 20)
LEARNED = Gaussian(parameter="log_scale")


class Counts(NamedTuple):
    """Of the third of three calls alike."""

    python: int  # Python calls within forward
    backward: int  # of backward, that are made in this thread
    operators: int  # of Torch, those within others too
    allocations: int
    launches: int | None = None  # on CUDA


def count(call: Callable[[], object], device: torch.device) -> Counts:
    """Counts of `call`, which returns tensors, and of backward from the first that has a gradient."""
    for _ in range(2):
        _backward(call())
    found: list = []
    python = _python_calls(lambda: found.append(call())) - 2  # the two functions in this line
    backward = _python_calls(lambda: _backward(found[0])) - 2
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        _backward(call())
    events = prof.profiler.kineto_results.events()
    operators = sum(event.name().startswith("aten::") for event in events)
    allocations = sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)
    launches = count_kernels(lambda: _backward(call())) if device.type == "cuda" else None
    return Counts(python, backward, operators, allocations, launches)


def _backward(result) -> None:
    for value in result if isinstance(result, tuple) else (result,):
        if isinstance(value, Tensor) and value.requires_grad and value.dim() == 0:
            value.backward()
            return


def _python_calls(function: Callable) -> int:
    found = 0

    def profiled(frame, event, argument):
        nonlocal found
        found += event == "call"

    sys.setprofile(profiled)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def subjects(device: torch.device) -> dict[str, tuple[Callable, Callable]]:
    """Public calls and the naive code for each: `name -> (fastelbo, naive)`."""
    torch.manual_seed(0)
    x, mask = torch.rand(SHAPE).round().to(device), (torch.rand(SHAPE) > 0.3).to(device)
    recon_x = torch.rand(SHAPE).to(device).requires_grad_()
    log_scale = torch.zeros((), device=device).requires_grad_()
    mu, logvar = (torch.randn(LATENT).to(device).requires_grad_() for _ in range(2))
    prior = torch.zeros(LATENT, device=device), torch.zeros(LATENT, device=device)
    weight = torch.randn(784, 20).to(device).requires_grad_()

    def decoder(z):
        return torch.nn.functional.linear(z, weight)

    def loss(**options):
        return lambda: fastelbo.loss(recon_x, x, mu, logvar, **options)

    def naive(**options):
        return lambda: reference.elbo_loss(recon_x, x, mu, logvar, **options)

    def composed(likelihood):
        z, kl = fastelbo.sample_kl(mu, logvar)
        return fastelbo.loss(decoder(z), x, kl=kl, likelihood=likelihood)

    def naive_step(likelihood):
        return reference.elbo_loss(decoder(reference.reparameterize(mu, logvar)), x, mu, logvar, likelihood=likelihood)

    def naive_kl():
        return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()

    def naive_learned():
        square = ((x - recon_x) * torch.exp(-log_scale)).square()
        return (0.5 * square + log_scale).sum() + naive_kl()

    def naive_masked():
        bce = torch.nn.functional.binary_cross_entropy_with_logits(recon_x, x, reduction="none")
        return (bce * mask).sum() + naive_kl()

    def naive_prior():
        ratio = (logvar - prior[1]).exp() + (mu - prior[0]).pow(2) * torch.exp(-prior[1])
        return torch.nn.functional.mse_loss(recon_x, x, reduction="sum") + 0.5 * (ratio - 1 - logvar + prior[1]).sum()

    def naive_free_bits():
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())
        mse = torch.nn.functional.mse_loss(recon_x, x, reduction="sum")
        return mse + kl.mean(0).clamp(min=0.5).sum() * len(x)

    logits = "bernoulli_logits"
    return {
        "loss, bernoulli": (loss(), naive()),
        "loss, bernoulli_logits": (loss(likelihood=logits), naive(likelihood=logits)),
        "loss, mse": (loss(likelihood="mse"), naive(likelihood="mse")),
        "loss, learned scale": (
            lambda: fastelbo.loss((recon_x, log_scale), x, mu, logvar, likelihood=LEARNED), naive_learned
        ),
        "loss, mask": (loss(likelihood=logits, weight=mask), naive_masked),
        "loss, prior": (loss(likelihood="mse", prior=prior), naive_prior),
        "loss, free bits": (loss(likelihood="mse", weighting=Weighting(0.5, "dimension")), naive_free_bits),
        "kl_divergence": (lambda: fastelbo.kl_divergence(mu, logvar), naive_kl),
        "kl_divergence, log_std": (lambda: fastelbo.kl_divergence(mu, logvar, posterior=Posterior("log_std")), naive_kl),
        "sample_kl + loss": (lambda: composed(logits), lambda: naive_step(logits)),
        "elbo": (lambda: fastelbo.elbo(decoder, x, mu, logvar, likelihood=logits), lambda: naive_step(logits)),
    }  # fmt: skip


def measure(device: torch.device) -> dict[str, tuple[Counts, Counts]]:
    """Of each call: fastelbo's counts, and the naive code's."""
    return {name: (count(ours, device), count(naive, device)) for name, (ours, naive) in subjects(device).items()}


HEADER = ("call, 128x784, 20 latents", "Python", "Python, backward", "operators", "allocations", "launches")


def table(found: dict[str, tuple[Counts, Counts]]) -> str:
    """Markdown: fastelbo / naive."""
    rows = [HEADER, ["---"] * len(HEADER)]
    for name, (ours, naive) in found.items():
        cells = [f"{a} / {b}" if a is not None else "-" for a, b in zip(ours, naive, strict=True)]
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.partition(": ")[2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    print(f"torch {torch.__version__}, {device.type}; fastelbo / naive\n\n{table(measure(device))}")


if __name__ == "__main__":
    main()
