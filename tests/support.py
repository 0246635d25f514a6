"""Inputs, and truth in float64 to hold results against."""

from functools import partial

import torch
from torch import Tensor

from conftest import BACKEND, COMPILED
from fastelbo import likelihoods, reference
from fastelbo.likelihoods import BY_NAME

# Against finite differences along random directions, in which every element counts: one direction, not one for each element.
gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
gradgradcheck = partial(torch.autograd.gradgradcheck, fast_mode=True)

LIKELIHOODS = ("bernoulli", "bernoulli_logits", "mse", "gaussian")


def options(likelihood: str, target_scale: float = 1.0) -> dict:
    """The likelihood as a keyword argument: a name alone stands for one with its defaults."""
    if likelihood == "gaussian":
        return {"likelihood": likelihoods.Gaussian(scale=0.3, target_scale=target_scale)}
    return {"likelihood": likelihood if target_scale == 1 else type(BY_NAME[likelihood])(target_scale=target_scale)}


def naive(recon_x, x, mu, logvar, beta=1.0, *, likelihood="bernoulli"):
    record = likelihoods.find_likelihood(likelihood)
    x = record.target(recon_x, x, x.dtype)
    return reference.elbo_loss(recon_x, x, mu, logvar, beta, likelihood=record.name, scale=record.fixed or 1.0)


def make_inputs(likelihood, shape, latent, dtype=torch.float32, device="cpu", extremes=False) -> tuple[Tensor, ...]:
    """`recon_x`, `x`, `mu`, `logvar`: all but the target require grad. `extremes`: with the values that break naive code."""
    probabilities = likelihood == "bernoulli"
    recon_x = torch.rand(shape) if probabilities else 3 * torch.randn(shape)
    x = torch.rand(shape) if likelihood.startswith("bernoulli") else torch.randn(shape)
    x.view(-1)[::2] = x.view(-1)[::2].round()
    mu, logvar = torch.randn(latent), torch.randn(latent)
    if extremes:
        edge = (0.0, 1.0) if probabilities else (50.0, -50.0)
        for i, value in enumerate((*edge, *reversed(edge))):
            recon_x.view(-1)[i::7] = value
        for i, value in enumerate((20.0, -20.0, 0.0)):
            logvar.view(-1)[i::5] = value
    tensors = [t.to(device, dtype) for t in (recon_x, x, mu, logvar)]
    return tuple(t.requires_grad_(i != 1) for i, t in enumerate(tensors))


def as_double(*tensors: Tensor) -> list[Tensor]:
    """Independent copies in float64 that require grad like the originals."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def gradients(output: Tensor, *inputs: Tensor, **kwargs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, **kwargs)


def relative(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    value, truth = value.detach().double(), truth.detach().double()
    if truth.numel() == 0:
        return 0.0
    return ((value - truth).abs().max() / truth.abs().max().clamp_min(1e-300)).item()


# What an approximate instruction of a compiled kernel may be off by: `ex2.approx.f32` and `div.full.f32`, 2 ulp (PTX ISA,
# floating-point instructions). Triton's interpreter and Torch's own kernels, the naive code's included, do not use them; exact
# ones would cost kernels that are bound by instructions more than such digits are worth. Float64 has none.
APPROXIMATE = 2 * torch.finfo(torch.float32).eps if COMPILED else 0.0


def assert_no_worse(value: Tensor, by_naive: Tensor, truth: Tensor, terms: Tensor, name: str, approximations: int = 2) -> None:
    """The eighth promise: the error, over the magnitude of the terms, is at most the naive code's own plus one rounding, and
    what a chain of so many approximate instructions may add."""
    terms = terms.double().clamp_min(1e-300)

    def error(result: Tensor) -> float:
        difference = (result.detach().double() - truth).abs() / terms
        difference[result.detach().double() == truth] = 0  # infinities of one sign agree
        worst = difference.max().item()
        return worst if worst == worst else float("inf")

    allowed = error(by_naive) + torch.finfo(value.dtype).eps
    if value.dtype != torch.float64:
        allowed += approximations * APPROXIMATE
    assert error(value) <= allowed, f"{name}: error {error(value):.2e}, allowed {allowed:.2e}"


class ContiguousWhenUnpacked(torch.autograd.graph.saved_tensors_hooks):
    """As `save_on_cpu(pin_memory=True)` does: saved tensors come back with other strides."""

    def __init__(self):
        super().__init__(lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format))


def recorded_allocations(monkeypatch) -> list[tuple[torch.Size, int]]:
    """Shapes and addresses of what the kernels' launches, or the Torch backend, will allocate for results."""
    found = []

    def recorded(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            found.append((tensor.shape, tensor.data_ptr()))
            return tensor

        return call

    if BACKEND == "triton":
        from fastelbo.kernels import direct, prepared

        monkeypatch.setattr(prepared, "allocator", lambda device: recorded(direct.allocator(device)))
    else:
        monkeypatch.setattr(torch, "empty_like", recorded(torch.empty_like))
    return found
