"""The example of each family of likelihoods, run as a user runs it: every loss that it computes is held against the same
model's loss in float64, written with torch.distributions and torch.nn.functional, and so are the gradients of every step."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, NegativeBinomial, Normal, kl_divergence

import fastelbo
from conftest import DEVICE, INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels take too long")
EXAMPLES = Path(__file__).parents[1] / "examples"


class Checked:
    """Stands for an example's objective, and holds each call of it against `plain`, which has the same positional arguments."""

    def __init__(self, fused, plain) -> None:
        self.fused, self.plain, self.calls = fused, plain, 0
        self.losses: dict[torch.nn.Module, list[float]] = {}  # of the steps of each model

    def __call__(self, model, x, *arguments, **options):
        twin = copy.deepcopy(model).double()
        arguments64 = [doubled(a) for a in arguments]
        truth = self._seeded(self.plain, twin, x, *arguments64)
        terms = self._seeded(self.fused, model, x, *arguments, **options)
        for value, expected in zip(terms, truth, strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=5e-6, atol=1e-6)
        if torch.is_grad_enabled():
            self.losses.setdefault(model, []).append(terms[0].item())
            expected = torch.autograd.grad(truth[0], list(twin.parameters()))
            found = torch.autograd.grad(terms[0], list(model.parameters()))
            for (name, _), value, gradient in zip(model.named_parameters(), found, expected, strict=True):
                error, size = (value - gradient).abs().max(), gradient.abs().max()
                assert error < 5e-5 * size + 1e-6, f"{name}: error {error:.1e} of {size:.1e}"
            terms = self._seeded(self.fused, model, x, *arguments, **options)  # whose graph is still there
        self.calls += 1
        return terms

    def _seeded(self, function, *arguments, **options):
        torch.manual_seed(self.calls)
        return function(*arguments, **options)


def doubled(argument):
    if isinstance(argument, list):
        return [doubled(a) for a in argument]
    return argument.double() if isinstance(argument, torch.Tensor) else argument


def noise_like(mu):
    """What `fastelbo.elbo` draws for float32 latents with the same seed."""
    zeros = torch.zeros_like(mu, dtype=torch.float32)
    return fastelbo.reparameterize(zeros, zeros).double()


def run(monkeypatch, name: str, plain, *options, objective: str = "negative_elbo") -> Checked:
    """A script from its start to its end."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module(name)
    checked = Checked(getattr(example, objective), plain)
    monkeypatch.setattr(example, objective, checked)
    monkeypatch.setattr(sys, "argv", [name, "--device", str(DEVICE), *map(str, options)])
    example.main()
    return checked


def assert_fall(checked: Checked, models: int, share: float) -> None:
    """The losses of each model, from its first three steps to its last three, whether or not they are negative."""
    assert len(checked.losses) == models
    for losses in checked.losses.values():
        first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        assert first - last > share * abs(first), f"{first} to {last}"


def standard_kl(q: Normal):
    return kl_divergence(q, Normal(0.0, 1.0))


def normal(mu, logvar) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def plain_sigma(model, x):
    x, batch = x.double(), len(x)
    q = normal(*model.encode(x))
    mean = model.decoder(q.mean + q.stddev * noise_like(q.mean))
    if hasattr(model, "log_sigma"):
        sigma = torch.exp(-6 + F.softplus(model.log_sigma + 6))
    else:
        sigma = F.mse_loss(mean, x).sqrt() if model.likelihood.scale == "optimal" else 1.0
    recon, kl = -Normal(mean, sigma).log_prob(x).sum() / batch, standard_kl(q).sum() / batch
    return recon + kl, recon, kl


def test_sigma(monkeypatch):
    pytest.importorskip("sklearn")
    checked = run(monkeypatch, "train_sigma", plain_sigma, "--steps", 20, "--learning-rate", 3e-3)
    # That of the fixed sigma can lose no more than the squared errors, next to a constant of 58.8.
    assert_fall(checked, 3, 0.01)
    fixed, learned, optimal = (losses[-1] for losses in checked.losses.values())
    assert optimal < learned - 1 < fixed - 2


def plain_log_cosh(model, x):
    x, batch = x.double(), len(x)
    q = normal(*model.encode(x))
    mean = model.decode(q.mean + q.stddev * noise_like(q.mean))
    if model.likelihood.name == "log_cosh":
        nll = torch.log(torch.pi * 0.1 * torch.cosh((x - mean) / 0.1))
    else:
        nll = -Normal(mean, F.mse_loss(mean, x).sqrt()).log_prob(x)
    recon, kl = nll.sum() / batch, standard_kl(q).sum() / batch
    return recon + kl, recon, kl


def test_log_cosh(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    checked = run(monkeypatch, "log_cosh", plain_log_cosh, "--steps", 40)
    assert_fall(checked, 2, 0.05)
    errors = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert 0.1 < errors["log-cosh"] < errors["Gaussian"] - 0.03


def plain_counts(model, x, beta=1.0):
    x, batch = x.double(), len(x)
    q = normal(*model.encode(x))
    mean, theta, *zeros = model.decode(q.mean + q.stddev * noise_like(q.mean), x.sum(1, keepdim=True))
    log_p = NegativeBinomial(theta, logits=mean.log() - theta.log()).log_prob(x)
    if zeros:
        extra = torch.sigmoid(zeros[0])
        log_p = torch.where(x == 0, torch.log(extra + (1 - extra) * log_p.exp()), torch.log(1 - extra) + log_p)
    recon, kl = -log_p.sum() / batch, standard_kl(q).sum() / batch
    return recon + beta * kl, recon, kl


def test_counts(monkeypatch):
    pytest.importorskip("sklearn")
    options = "--steps", 20, "--warm-up", 15, "--cells", 200, "--genes", 40, "--batch-size", 32
    assert_fall(run(monkeypatch, "train_counts", plain_counts, *options), 2, 0.02)


def test_sparse_counts(monkeypatch):
    """Counts in CSR and the same made dense: one loss, which falls."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("train_sparse")
    arguments = "--steps", 12, "--cells", 200, "--genes", 60, "--batch-size", 50, "--device", DEVICE.type
    options = example.parse([str(a) for a in (*arguments, "--likelihood", "zero_inflated_negative_binomial")])
    counts = importlib.import_module("train_counts").draw(200, 60, 0, counts_a_gene=0.3).counts
    rows = example.CountRows(counts.float().to_sparse_csr())
    assert torch.equal(rows.__getitems__([7, 3, 199]).to_dense(), counts[[7, 3, 199]].float())
    (sparse, _, moved, peak), (dense, _, all_moved, its_peak) = (example.train(options, rows, kind) for kind in (True, False))
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=0)
    assert sparse[-1] < 0.98 * sparse[0] and moved < all_moved and peak < its_peak


def test_counts_are_drawn_as_described(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    cells = importlib.import_module("train_counts").draw(20_000, 50, 0)
    mean, theta, x = cells.mean.double(), cells.inverse_dispersion.double(), cells.counts.double()
    assert 4.5 < mean.mean() < 6 and theta.min() > 0.5 and theta.max() < 20
    assert cells.types.bincount().min() > 0.19 * len(x)
    # Moments of a gene, each over its expectation; zeros take a tenth of both.
    first = (x / mean).mean(0)
    second = (x.square() / (mean + mean.square() * (1 + 1 / theta))).mean(0)
    torch.testing.assert_close(first.mean(), torch.tensor(0.9).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(second.mean(), torch.tensor(0.9).double(), rtol=0.03, atol=0)


def plain_sequences(model, x, beta=1.0, free_bits=None):
    batch, length = x.shape
    q = normal(*model.encode(x))
    logits = model.decode(q.mean + q.stddev * noise_like(q.mean), x)
    nll = F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(batch, length)
    recon = sum(row[: symbols.tolist().index(0) + 1].sum() for row, symbols in zip(nll, x, strict=True)) / batch
    each = standard_kl(q).mean(0)
    counted = each if free_bits is None else each.clamp(min=free_bits)
    return recon + beta * counted.sum(), recon, each.sum()


def test_sequences(monkeypatch, capsys):
    # Free bits that some dimensions have more than, and some less.
    options = "--steps", 16, "--batch-size", 16, "--learning-rate", 1e-2, "--free-bits", 0.02
    checked = run(monkeypatch, "train_sequences", plain_sequences, *options)
    assert_fall(checked, 2, 0.2)
    example = sys.modules["train_sequences"]
    lines = example.sentences()
    assert len(lines) > 1000 and len(set(lines)) == len(lines) and max(map(len, lines)) == example.LENGTH
    # The report of the last model, by its means, so with another reconstruction but the same KL.
    text = example.encoded(lines)
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))][: len(text) // 5].to(DEVICE)
    model = list(checked.losses)[-1]
    with torch.no_grad():
        kl = standard_kl(normal(*model.double().encode(text))).sum() / sum(row.tolist().index(0) + 1 for row in text)
    reported = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("free_bits"))
    assert f"+ KL {kl:.3f}" in reported


def plain_hierarchical(model, levels, noise, beta=1.0):
    x, batch = levels.double() / 8 - 1, len(levels)
    d = [x]
    for up in model.up:
        d.append(up(d[-1]))
    q = normal(*model.evidence[-1](d[-1]))
    z, kl = q.mean + q.stddev * noise[-1], [standard_kl(q).sum() / batch]
    for i in reversed(range(len(noise) - 1)):
        below, prior = normal(*model.evidence[i](d[i + 1])), normal(*model.prior[i](z))
        # The precision-weighted mean and variance of Sonderby et al.
        weights = torch.stack([below.stddev, prior.stddev]) ** -2
        mean = (torch.stack([below.mean, prior.mean]) * weights).sum(0) / weights.sum(0)
        q = Normal(mean, weights.sum(0) ** -0.5)
        z, kl = q.mean + q.stddev * noise[i], [kl_divergence(q, prior).sum() / batch, *kl]
    mean, log_scale = model.decoder(z)
    # Between the levels, i/8 - 1, and far below and above them: infinity has no derivative by the scale.
    ends = torch.tensor([-1e3, *((2 * i - 15) / 16 for i in range(16)), 1e3], dtype=torch.float64, device=x.device)
    below, above = (torch.sigmoid((ends[levels.long() + i] - mean) / log_scale.exp()) for i in (0, 1))
    recon = -torch.log(above - below).sum() / batch
    return recon + beta * sum(kl), recon, torch.stack(kl)


@pytest.mark.parametrize("latents", [(16, 8, 4), (6,), (5, 4, 3, 2)])
def test_hierarchical(monkeypatch, capsys, latents):
    pytest.importorskip("sklearn")
    options = "--steps", 20, "--warm-up", 15, "--latents", *latents
    checked = run(monkeypatch, "train_hierarchical", plain_hierarchical, *options)
    assert_fall(checked, 1, 0.05)
    fused, naive = (
        [float(term.split()[-1]) for term in line.split(": ")[1].split(", ")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("first batch")
    )
    assert len(fused) == 2 + len(latents)
    assert fused == pytest.approx(naive, rel=1e-5)


def standard_log_density(z):
    return Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1)


def plain_iwae(model, x, bound, monitor=None):
    x, batch = x.double(), len(x)
    q = normal(*model.encode(x))
    samples, chunk = bound.n_samples, bound.chunk
    counts = [min(chunk, samples - i) for i in range(0, samples, chunk)]
    z = q.mean + q.stddev * torch.cat([noise_like(q.mean.expand(n, *q.mean.shape)) for n in counts])

    def log_joint(z):
        log_p = Bernoulli(logits=model.decode(z)).log_prob(x).sum(-1)
        return log_p, log_p + standard_log_density(z)

    log_p, log_pz = log_joint(z)
    recon, kl = -log_p.sum() / (samples * batch), standard_kl(q).sum() / batch
    if not isinstance(bound, fastelbo.IWAE):
        return recon + kl, recon, kl
    loss = -(log_pz - q.log_prob(z).sum(-1)).exp().mean(0).log().sum() / batch
    if bound.estimator != "standard" and torch.is_grad_enabled():
        # As the papers have it: what reaches the encoder by way of z, of the weights' logarithms, stands there times the
        # normalized weights (Roeder et al.) or their squares (Tucker et al.). The decoder's gradient is the bound's.
        leaf, fixed = z.detach().requires_grad_(), Normal(q.mean.detach(), q.stddev.detach())
        log_w = log_joint(leaf)[1] - fixed.log_prob(leaf).sum(-1)
        (path,) = torch.autograd.grad(log_w.sum(), leaf, retain_graph=True)
        shares = log_w.detach().softmax(0)
        by_z = (shares ** {"stl": 1, "dreg": 2}[bound.estimator]).unsqueeze(-1) * path
        surrogate = -((by_z * z).sum() + (shares * log_w).sum()) / batch
        loss = loss.detach() + surrogate - surrogate.detach()
    return loss, recon.detach(), kl.detach()


def exact_log_likelihood(model, x):
    """log p(x) of a model with two latents, by the rectangle rule on a grid."""
    line = torch.linspace(-7, 7, 281, dtype=torch.float64, device=x.device)
    z, area = torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2
    logits = model.decode(z)
    log_p = logits @ x.double().T - F.softplus(logits).sum(1, keepdim=True)
    return (log_p + standard_log_density(z).unsqueeze(1) + area.log()).logsumexp(0)


@pytest.mark.parametrize("estimator", ["standard", "stl", "dreg"])
def test_iwae(monkeypatch, capsys, estimator):
    pytest.importorskip("sklearn")
    options = "--samples", 7, "--chunk", 3, "--estimator", estimator, "--steps", 40, "--batch-size", 32, "--latent", 2
    evaluation = "--learning-rate", 5e-3, "--evaluation-samples", 500
    checked = run(monkeypatch, "train_iwae", plain_iwae, *options, *evaluation, objective="negative_bound")
    assert_fall(checked, 2, 0.2)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    x = sys.modules["digits"].black_and_white(DEVICE)[1]
    for (name, *columns), model in zip(rows, checked.losses, strict=True):
        elbo, bound, log_p, _, error, active, _ = (float(c.replace("+-", "0")) for c in columns)
        with torch.no_grad():
            exact = exact_log_likelihood(model.double(), x).mean().item()
            means, _ = model.encode(x.double())
        assert elbo < bound < exact, name
        assert 0 < error < 0.02 and abs(log_p - exact) < 5 * error, f"{name}: {log_p} +- {error}, and not {exact}"
        assert active == (means.var(0) > 0.01).sum()


def plain_flow(model, x):
    x = x.double()
    features = model.encoder(x)
    q = normal(model.to_mu(features), model.to_logvar(features))
    z0 = q.mean + q.stddev * noise_like(q.mean)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, f: model.flow(z[None], f[None])[0][0]))(z0, features)
    log_q = q.log_prob(z0).sum(1) - torch.linalg.slogdet(jacobian).logabsdet
    z, _ = model.flow(z0, features)
    recon, kl = -Bernoulli(logits=model.decode(z)).log_prob(x).sum(1), log_q - standard_log_density(z)
    return (recon + kl).mean(), recon.mean(), kl.mean()


@pytest.mark.parametrize("latent", [2, 5])
def test_flow(monkeypatch, capsys, latent):
    pytest.importorskip("sklearn")
    options = "--steps", 30, "--batch-size", 32, "--learning-rate", 5e-3, "--flow-layers", 0, 3, "--latent", latent
    checked = run(monkeypatch, "train_flow", plain_flow, *options, "--evaluation-samples", 500)
    assert_fall(checked, 2, 0.2)
    rows = [[float(c) for c in line.split()] for line in capsys.readouterr().out.splitlines()[-2:]]
    x = sys.modules["digits"].black_and_white(DEVICE)[1]
    for (layers, elbo, recon, kl, log_p, _), model in zip(rows, checked.losses, strict=True):
        assert layers == len(model.flow.couplings)
        assert elbo == pytest.approx(-recon - kl, abs=0.002)
        assert elbo < log_p
        if latent == 2:
            with torch.no_grad():
                exact = exact_log_likelihood(model.double(), x).mean().item()
            assert log_p == pytest.approx(exact, abs=0.01)
