"""Hugging Face Accelerate trains as a plain loop does, and its accumulated gradients are those of the joint batch."""

import copy

import plain  # first, since it makes the scripts importable
import pytest
import torch
import train_accelerate
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, TensorDataset

import fastelbo
from support import relative


class Recording(Accelerator):
    """Keeps the loss of each batch."""

    def __init__(self, **kwargs) -> None:
        super().__init__(cpu=True, **kwargs)
        self.losses = []

    def backward(self, loss, **kwargs) -> None:
        self.losses.append(loss.detach().clone())
        super().backward(loss, **kwargs)


def reset() -> None:
    """All accelerators of a process share the state of the first, its precision included. No public call ends that."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _alone():
    yield
    reset()


def run(options, mixed_precision="no") -> plain.Run:
    accelerator = Recording(gradient_accumulation_steps=options.accumulate, mixed_precision=mixed_precision)
    objective = train_accelerate.train(options, accelerator)
    assert all(p.dtype == torch.float32 for p in objective.parameters())
    return plain.Run(torch.stack(accelerator.losses), torch.empty(0), plain.flat(objective))


@pytest.fixture
def options():
    return train_accelerate.parse(plain.ARGUMENTS)


@pytest.mark.parametrize("accumulate", (1, 2, 3))
def test_same_as_a_plain_loop(options, accumulate, capsys):
    options.accumulate = accumulate
    found, expected = run(options), plain.train(options, accumulate=accumulate, drop_last=True)
    assert len(found.losses) == 2 * 28
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.parameters, expected.parameters)
    words = capsys.readouterr().out.splitlines()[-1].replace(",", "").split()
    loss, recon, kl = (float(words[words.index(name) + 1]) for name in ("digit", "recon", "kl"))
    assert loss == pytest.approx(expected.mean_of_last_epoch(2), rel=1e-6)
    assert recon + options.beta * kl == pytest.approx(loss, rel=1e-6)


def test_same_as_the_naive_loop(options):
    found, expected = run(options), plain.train(options, plain.naive, accumulate=2, drop_last=True)
    assert ((found.losses - expected.losses) / expected.losses).abs().max() < 1e-5
    assert relative(found.parameters, expected.parameters) < 1e-4


# Accelerate divides each loss by the number of batches: right for means, and for a sum that much too small.
@pytest.mark.parametrize("reduction, share", (("batchmean", 1), ("mean", 1), ("sum", 1 / 2)))
def test_accumulated_gradients_are_those_of_the_joint_batch(reduction, share):
    x, eps, beta = plain.digits()[:64], torch.randn(64, 8), 0.7
    vae = plain.VAE(8)
    exact = copy.deepcopy(vae).double()
    accelerator = Recording(gradient_accumulation_steps=2)
    objective = train_accelerate.Objective(vae, beta=beta, likelihood="bernoulli_logits", reduction=reduction)
    model, batches = accelerator.prepare(objective, DataLoader(TensorDataset(x, eps), 32))
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(*batch).loss)
    assert len(accelerator.losses) == 2

    mu, logvar = exact.encode(x.double())
    prediction = exact.decode(mu + torch.exp(0.5 * logvar) * eps)
    _, recon, kl = fastelbo.reference.elbo_loss(prediction, x.double(), mu, logvar, likelihood="bernoulli_logits")
    of_recon, of_kl = {"batchmean": (64, 64), "mean": (x.numel(), eps.numel()), "sum": (1, 1)}[reduction]
    (share * (recon / of_recon + beta * kl / of_kl)).backward()
    for (name, found), expected in zip(vae.named_parameters(), exact.parameters(), strict=True):
        assert relative(found.grad, expected.grad) < 1e-5, name


def test_bf16(options):
    single = run(options)
    reset()
    found, expected = run(options, "bf16"), plain.train(options, accumulate=2, bf16=True, drop_last=True)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.parameters, expected.parameters)
    difference = ((found.losses - single.losses) / single.losses).abs()
    assert 1e-6 < difference.max() < 1e-3
