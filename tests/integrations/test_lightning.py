"""A run of PyTorch Lightning is the run of a plain loop on the same batches: losses, parameters and what is logged."""

import lightning
import plain  # first, since it makes the scripts importable
import pytest
import torch
import train_lightning

from support import relative

pytestmark = [
    # The digits are in memory, where workers would only add to the time of a batch.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning 2.6 with torch 2.13, which flattens the model's logged results.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # In the model's size that Lightning prints, which nothing here uses.
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
]


class Losses(lightning.Callback):
    def __init__(self) -> None:
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.found.append(outputs["loss"].detach().clone())


def run(options, **trainer_options) -> plain.Run:
    losses = Losses()
    model = train_lightning.train(
        options, accelerator="cpu", devices=1, callbacks=[losses], enable_progress_bar=False, **trainer_options
    )
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return plain.Run(torch.stack(losses.found), torch.empty(0), plain.flat(model))


@pytest.fixture
def options():
    return train_lightning.parse(plain.ARGUMENTS)


def test_same_as_a_plain_loop(options, capsys):
    found, expected = run(options), plain.train(options, reseed=True)
    assert len(found.losses) == 2 * 15
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.parameters, expected.parameters)
    printed = dict(part.split()[:2] for part in capsys.readouterr().out.splitlines()[-1].split(", "))
    assert float(printed["loss"]) == pytest.approx(expected.mean_of_last_epoch(2), rel=1e-6)
    assert float(printed["recon"]) + options.beta * float(printed["kl"]) == pytest.approx(float(printed["loss"]), rel=1e-6)


def test_same_as_the_naive_loop(options):
    found, expected = run(options), plain.train(options, plain.naive, reseed=True)
    assert ((found.losses - expected.losses) / expected.losses).abs().max() < 1e-5
    assert relative(found.parameters, expected.parameters) < 1e-4


def test_accumulated_batches(options):
    found, expected = run(options, accumulate_grad_batches=2), plain.train(options, accumulate=2, reseed=True)
    assert torch.equal(2 * found.losses, expected.losses)  # Lightning has divided what it hands out
    assert torch.equal(found.parameters, expected.parameters)


def test_bf16(options):
    found, expected, single = run(options, precision="bf16-mixed"), plain.train(options, bf16=True, reseed=True), run(options)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.parameters, expected.parameters)
    difference = ((found.losses - single.losses) / single.losses).abs()
    assert 1e-6 < difference.max() < 1e-3
