"""The curves over the number of samples: contenders compute the bound, memory is what it should be, tables have it all."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

from conftest import DEVICE, INTERPRETED

if INTERPRETED:
    pytest.skip("nobody measures the interpreter", allow_module_level=True)

pytest.importorskip("pytest_benchmark")

from bench import models, samples, samples_report
from bench.measure import peak_bytes

RESULTS = Path(samples.__file__).parent / "results"
EAGER = [name for name in samples.CONTENDERS if name != "naive compiled"]
FEATURES, HIDDEN, BATCH = 256, 32, 512


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model whose decoder's activations, 600 kB a sample, are much larger than its 35 kB of parameters."""

    def make():
        decoder = nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, FEATURES), nn.Sigmoid())
        return models.VAE(nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU()), HIDDEN, 4, decoder)

    monkeypatch.setitem(models.MODELS, "tiny", (make, (BATCH, FEATURES)))
    monkeypatch.setitem(samples.BATCH, "tiny", {"cpu": BATCH, "cuda": BATCH})


def test_the_naive_code_computes_the_bound():
    """log (1/K sum_k p(x, z_k) / q(z_k | x)), written with torch.distributions, and its gradients."""
    subject = samples.Subject("tiny", 8, 5, torch.device("cpu")).double()
    loss, *gradients = (found.value for found in subject.results(subject.step(samples.naive)))
    model, x = subject.model, subject.x
    mu, logvar = model.encode(x)
    q = Normal(mu, (logvar / 2).exp())
    z = q.mean + q.stddev * subject.eps
    log_p = Bernoulli(logits=torch.stack([model.decoder(one) for one in z]), validate_args=False).log_prob(x).sum(-1)
    ratio = (log_p + (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)).exp().mean(0)
    expected = -ratio.log().sum()
    assert z.shape == (5, 4, 4)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, right in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def peak(function, k: int) -> float:
    subject = samples.Subject("tiny", BATCH, k, DEVICE)
    step = subject.step(function)
    step()
    return peak_bytes(step, DEVICE)


def test_memory_grows_with_the_samples_or_not():
    logits = 4 * BATCH * FEATURES
    naive = [peak(samples.naive, k) for k in (1, 16)]
    # All that K samples add, they add K times: at least the logits and their gradient, which backward needs at one time.
    assert naive[1] - naive[0] >= 15 * 2 * logits
    assert naive[1] >= 8 * naive[0]
    for function in (samples.fused(1), samples.checkpointed):
        held = [peak(function, k) for k in (1, 16)]
        assert held[1] <= 1.2 * held[0]  # a second set of gradients, to add them up, and a few numbers a datum
    one, eight, more = (peak(samples.fused(chunk), 16) for chunk in (1, 8, 16))
    assert 4 * one < eight < 0.7 * more


def test_gradients_are_held_from_step_to_step():
    """And so are no part of the peak, which is what is held beyond that."""
    subject = samples.Subject("tiny", 1, 1, DEVICE)
    kept = [p.grad for p in subject.model.parameters()]
    step = subject.step(samples.naive)
    step()
    assert all(p.grad is grad and grad.any() for p, grad in zip(subject.model.parameters(), kept, strict=True))
    first = [grad.clone() for grad in kept]
    step()
    torch.testing.assert_close(first, kept)  # zeroed in between


def held_mean(model, x, eps):
    """The bound, but half of what reaches the encoder by way of the mean is lost."""
    encode = model.encode

    def half(x):
        mu, logvar = encode(x)
        return (mu + mu.detach()) / 2, logvar

    return samples.naive(SimpleNamespace(encode=half, decoder=model.decoder), x, eps)


def fifth_digit(model, x, eps):
    """Gradients are off by less than float32 could tell."""
    loss = samples.naive(model, x, eps)
    return loss + 1e-5 * (loss - loss.detach())


BROKEN = {
    "no log K": lambda model, x, eps: samples.naive(model, x, eps) - math.log(len(eps)) * len(x),
    "half a gradient": held_mean,
    "the fifth digit of the gradients": fifth_digit,
    "NaN": lambda model, x, eps: samples.naive(model, x, eps) * math.nan,
    "a sample left out": lambda model, x, eps: samples.naive(model, x, eps[1:]),
    "another datum's noise": lambda model, x, eps: samples.naive(model, x, eps.roll(1, 1)),
}


@pytest.mark.parametrize("contender", ("naive checkpointed", "fastelbo chunk=1"))
@pytest.mark.parametrize("broken", BROKEN)
def test_a_contender_that_computes_something_else_is_refused(monkeypatch, contender, broken):
    monkeypatch.setitem(samples.NAIVE, "naive checkpointed", BROKEN[broken])
    monkeypatch.setattr(samples, "fused", lambda chunk: BROKEN[broken])
    with pytest.raises(AssertionError, match=f"tiny with batch 8 and K=3 in float(32|64): {contender} computes something else"):
        samples.measure("tiny", 8, 3, ["naive", contender], DEVICE, 0.01)


def test_ratios_are_of_one_round():
    found = {
        "naive": samples.Found([1.0, 2.0, 3.0, 4.0], 1000),
        "fastelbo chunk=1": samples.Found([2.0, 4.0, 6.0, 16.0], 100),
        "naive compiled": samples.Found(missing="no compiler"),
    }
    naive, fused, compiled = samples.rows("tiny", 8, 3, found)
    assert fused["times_as_slow_as"] == {"naive": [2.0, 2.0, 3.5]}
    assert naive["times_as_slow_as"]["fastelbo chunk=1"][1] == 0.5
    assert (fused["seconds"]["median"], fused["peak_bytes"]) == (5.0, 100)
    assert compiled == {"model": "tiny", "batch": 8, "samples": 3, "contender": "naive compiled", "missing": "no compiler"}
    curve = samples_report.Curve("", {3: {row["contender"]: row for row in (naive, fused, compiled)}})
    table = dict(list(samples_report.tables(curve)))["fastelbo: times as slow; times the memory"]
    assert table == [["K", "chunk=1 / naive", "chunk=1 / naive compiled"], ["3", "2.00 ▼; 0.10", "-; -"]]


def test_slowness_in_words():
    assert samples_report.in_words(1.5) == "1.50 times as slow"
    assert samples_report.in_words(0.5) == "2.00 times as fast"


def test_a_contender_that_cannot_run_is_left_out_and_said(monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("too much\nof it")

    def no_compiler(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(samples.NAIVE, "naive", out_of_memory)
    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    found = samples.measure("tiny", 8, 3, list(samples.CONTENDERS), DEVICE, 0.01)
    missing = {contender: own.missing for contender, own in found.items() if own.missing}
    assert missing == {"naive": "OutOfMemoryError: too much", "naive compiled": "RuntimeError: no compiler"}
    rows = {row["contender"]: row for row in samples.rows("tiny", 8, 3, found)}
    curve = samples_report.Curve("tiny", {3: rows, 9: rows})
    assert "Not run: naive at K = 3, 9: OutOfMemoryError: too much" in list(samples_report.not_run(curve))
    assert set(rows["fastelbo chunk=1"]["times_as_slow_as"]) == {"naive checkpointed", "fastelbo chunk=8", "fastelbo chunk=K"}
    monkeypatch.setitem(samples.NAIVE, "naive", no_compiler)  # which is no reason to go on without the usual code
    with pytest.raises(RuntimeError, match="no compiler"):
        samples.measure("tiny", 8, 3, ["naive"], DEVICE, 0.01)


def test_a_run_from_the_command_line(monkeypatch, tmp_path, capsys):
    """The whole way once: what was measured stands in the tables, which can be made again from the JSON."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(samples, "RESULTS", tmp_path)
    choice = ["--models", "tiny", "--samples", "1", "16", "--batch", "16", "--seconds", "0.05", "--device", DEVICE.type]
    samples.main([*choice, "--contenders", *EAGER, "--write"])
    printed = capsys.readouterr().out
    assert "tiny, batch 16, K=16: naive " in printed
    (path,) = tmp_path.glob("samples-*.json")
    data = json.loads(path.read_text())
    assert data["machine_info"]["torch"] == torch.__version__
    assert [(row["samples"], row["contender"]) for row in data["samples"]] == [(k, c) for k in (1, 16) for c in EAGER]
    rows = {row["contender"]: row for row in data["samples"] if row["samples"] == 16}
    assert rows["fastelbo chunk=1"]["peak_bytes"] < rows["naive"]["peak_bytes"] / 2
    one_call = [row for row in data["samples"] if row["samples"] == 1 and row["contender"].startswith("fastelbo")]
    assert len(one_call) == 3 and len({json.dumps(row["seconds"]) for row in one_call}) == 1
    text = path.with_suffix(".md").read_text()
    memory, time, ratios = (line for line in text.splitlines() if line.startswith("| 16 "))
    megabytes = [f"{rows[contender]['peak_bytes'] / 1e6:.3g}" for contender in EAGER]
    assert memory == f"| 16 | {' | '.join(megabytes)} |"
    assert time.startswith(f"| 16 | {samples_report._number(1e3 * rows['naive']['seconds']['median'])} ±")
    assert ratios.startswith(f"| 16 | {rows['fastelbo chunk=1']['times_as_slow_as']['naive'][1]:.2f}")
    assert f"`python -m bench.samples {' '.join(choice)}" in text
    drawn = path.with_suffix(".svg").read_text()
    path.with_suffix(".md").unlink()
    samples.main(["--read", str(path), "--write"])
    assert path.with_suffix(".md").read_text() == text and path.with_suffix(".svg").read_text() == drawn


def test_no_number_of_samples_is_begun_after_the_limit(tmp_path, capsys):
    output = tmp_path / "kept.json"
    choice = ["--models", "tiny", "--samples", "1", "3", "--batch", "8", "--contenders", "naive", "--seconds", "0.01"]
    samples.main([*choice, "--limit", "0", "--device", DEVICE.type, "--output", str(output)])
    printed = capsys.readouterr().out
    assert "tiny, batch 8, K=3: left out, since 0 seconds had passed" in printed
    assert printed.endswith(f"Written: {output}\n")
    assert [row["samples"] for row in json.loads(output.read_text())["samples"]] == [1]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("samples-*.json")), ids=lambda path: path.stem)
def test_the_tables_show_the_results_that_are_kept(path):
    """`python -m bench.samples --read FILE --write` was run, and nobody wrote numbers by hand."""
    assert path.with_suffix(".md").read_text() == samples_report.markdown(samples_report.load(path))
    assert path.with_suffix(".svg").exists()
