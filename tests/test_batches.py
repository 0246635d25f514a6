"""Data and latents of unlike batches, as ten frames of each of two clips: each term is reduced over its own."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence

import fastelbo
from conftest import BACKEND
from fastelbo import ELBO, IWAE, Weighting
from fastelbo.diagnostics import Monitor
from fastelbo.likelihoods import Gaussian
from support import gradcheck, gradgradcheck, gradients

FEATURES, LATENT = (4, 5), (7,)
# More data than latents, fewer, and several rows of which no kernel's tile has all.
BATCHES = ((20, 2), (3, 5), (6, 300))


def _bce(p, x):
    return F.binary_cross_entropy(p[0], x, reduction="none")


def _logits(p, x):
    return F.binary_cross_entropy_with_logits(p[0], x, reduction="none")


def _log_scale(p, x):
    return -Normal(p[0], p[1].exp()).log_prob(x)


LIKELIHOODS = {
    "bernoulli": ("bernoulli", _bce, None),
    "bernoulli_logits": ("bernoulli_logits", _logits, None),
    "mse": ("mse", lambda p, x: (p[0] - x).square(), None),
    "gaussian": (Gaussian(scale=0.3), lambda p, x: -Normal(p[0], 0.3).log_prob(x), None),
    "two parameters": (Gaussian(parameter="log_scale"), _log_scale, FEATURES[1:]),
    "optimal scale": (
        Gaussian("optimal"), lambda p, x: -Normal(p[0], (p[0] - x).square().mean().sqrt()).log_prob(x), None
    ),
    "categorical": (
        "categorical", lambda p, x: F.cross_entropy(p[0], x, reduction="none"), None
    ),
}  # fmt: skip


def make(name, batches, dtype=torch.float64, device="cpu"):
    """`(parameters, x, mu, logvar)`; all but x require grad."""
    second = LIKELIHOODS[name][2]
    data, latents = batches
    parameters = [torch.rand(data, *FEATURES) * 0.9 + 0.05, *([] if second is None else [torch.randn(second)])]
    x = torch.randint(0, FEATURES[0], (data, *FEATURES[1:])) if name == "categorical" else torch.rand(data, *FEATURES)
    mu, logvar = torch.randn(latents, *LATENT), torch.randn(latents, *LATENT)
    given = [t.to(device, dtype).requires_grad_() for t in (*parameters, mu, logvar)]
    x = x.to(device) if name == "categorical" else x.to(device, dtype)
    return given[:-2], x, *given[-2:]


def own(values, reduction):
    """Of a term's elements, the first dimension being its batch."""
    return {"sum": 1.0, "batchmean": 1 / len(values), "mean": 1 / values.numel()}[reduction] * values.sum()


def kl_of(mu, logvar, prior=(0.0, 0.0)):
    """Of each element, from a prior whose mean and logvar are numbers or 0-d tensors."""
    prior_mu, prior_logvar = (torch.as_tensor(p, dtype=mu.dtype, device=mu.device) for p in prior)
    return kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(prior_mu, torch.exp(prior_logvar / 2)))


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean", ("mean", "batchmean")), ids=str)
@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_loss(name, batches, reduction, device):
    likelihood, truth, _ = LIKELIHOODS[name]
    parameters, x, mu, logvar = make(name, batches, device=device)
    recon_x = parameters[0] if len(parameters) == 1 else tuple(parameters)
    of_recon, of_kl = reduction if isinstance(reduction, tuple) else (reduction, reduction)
    for factor in (1.0, 3.0):  # the second time another one than forward guesses
        got = fastelbo.loss(recon_x, x, mu, logvar, 0.3, likelihood=likelihood, reduction=reduction)
        recon, kl = own(truth(parameters, x), of_recon), own(kl_of(mu, logvar), of_kl)
        expected = recon + 0.3 * kl, recon, kl
        torch.testing.assert_close(tuple(got), expected)
        ours, theirs = (gradients(factor * t[0] + t[2], *parameters, mu, logvar) for t in (got, expected))
        torch.testing.assert_close(ours, theirs)


# Each with what of the KL enters the loss, of its elements `[B, D]`.
OPTIONS = {
    "prior": ({"prior": (torch.tensor(0.3).double(), torch.tensor(0.2).double())}, lambda kl: kl.sum(1).mean()),
    "free bits of dimensions": ({"weighting": Weighting(0.7, "dimension")}, lambda kl: kl.mean(0).clamp_min(0.7).sum()),
    "free bits of samples": ({"weighting": Weighting(3.0, "sample")}, lambda kl: kl.sum(1).clamp_min(3.0).mean()),
    "capacity": ({"weighting": Weighting(capacity=2.0)}, lambda kl: (kl.sum(1).mean() - 2.0).abs()),
    "betas": ({"beta": torch.arange(7).double()}, lambda kl: (kl * torch.arange(7, device=kl.device)).sum(1).mean() / 0.3),
    "mask": ({"weight": (torch.arange(5) > 1)}, lambda kl: kl.sum(1).mean()),
    "logvar of another dtype": ({"posterior": "log_std"}, lambda kl: kl.sum(1).mean()),
}


@pytest.mark.parametrize("batches", BATCHES[:2], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, batches, device):
    options, counted = OPTIONS[name]
    moved = {k: tuple(t.to(device) for t in v) if k == "prior" else v.to(device) if isinstance(v, torch.Tensor) else v
             for k, v in options.items()}  # fmt: skip
    (recon_x,), x, mu, logvar = make("bernoulli_logits", batches, device=device)
    got = fastelbo.loss(
        recon_x, x, mu, logvar, **{"beta": 0.3} | moved, likelihood="bernoulli_logits", reduction="batchmean"
    )  # fmt: skip
    prior = moved.get("prior", (torch.zeros((), device=device).double(), torch.zeros((), device=device).double()))
    elements = kl_of(mu, 2 * logvar if "posterior" in options else logvar, prior)
    terms = _logits([recon_x], x) * moved.get("weight", 1.0)
    recon, kl = own(terms, "batchmean"), elements.sum(1).mean()
    expected = recon + 0.3 * counted(elements), recon, kl
    torch.testing.assert_close(tuple(got), expected)
    torch.testing.assert_close(*(gradients(t[0], recon_x, mu, logvar) for t in (got, expected)))


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean"))
@pytest.mark.parametrize("way", ("plain", "prior", "normal", "bound"))
def test_elbo(way, reduction, device):
    """Of a decoder that makes five frames of each clip's latents."""
    weight = torch.randn(7, 5 * 6, dtype=torch.float64, device=device, requires_grad=True)
    mu, logvar = (torch.randn(2, 7, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    x, eps = torch.rand(10, 6, dtype=torch.float64, device=device), torch.randn(2, 7, dtype=torch.float64, device=device)

    def decoder(z):
        return (z @ weight).view(-1, 6)

    prior = (torch.tensor(0.3, device=device).double(), torch.tensor(0.2, device=device).double())
    options = {"prior": {"prior": prior}, "bound": {"bound": ELBO(1)}}.get(way, {})
    latents = (Independent(Normal(mu, torch.exp(logvar / 2)), 1),) if way == "normal" else (mu, logvar)
    got = fastelbo.elbo(decoder, x, *latents, beta=0.3, likelihood="mse", reduction=reduction, eps=eps, **options)
    recon = own((decoder(mu + torch.exp(logvar / 2) * eps) - x).square(), reduction)
    kl = own(kl_of(mu, logvar, prior if way == "prior" else (0.0, 0.0)), reduction)
    expected = recon + 0.3 * kl, recon, kl
    torch.testing.assert_close(tuple(got), expected)
    torch.testing.assert_close(*(gradients(t[0], weight, mu, logvar) for t in (got, expected)))


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
def test_finite_differences(check, device):
    (recon_x,), x, mu, logvar = make("bernoulli", (3, 2), device=device)

    def loss(recon_x, mu, logvar):
        return fastelbo.loss(recon_x, x, mu, logvar, 0.3, reduction="batchmean")

    assert check(loss, (recon_x, mu, logvar))


@pytest.mark.parametrize("reduction", ("mean", "batchmean"))
def test_surroundings(reduction, device):
    """Compiled in one graph and transformed: two batches, neither of which is the other's."""
    (recon_x,), x, mu, logvar = make("bernoulli_logits", (6, 2), torch.float32, device)
    weight = torch.randn(7, 3 * 20, device=device, requires_grad=True)

    def both(recon_x, mu, logvar, weight):
        options = {"likelihood": "bernoulli_logits", "reduction": reduction}
        loss = fastelbo.loss(recon_x, x, mu, logvar, 0.3, **options).loss
        decoder = lambda z: (z @ weight).view(6, *FEATURES)  # noqa: E731
        return loss + fastelbo.elbo(decoder, x, mu, logvar, 0.3, eps=torch.ones_like(mu), **options).loss

    inputs = recon_x, mu, logvar, weight
    expected = both(*inputs)
    by_all = gradients(expected, *inputs)
    z = mu + torch.exp(logvar / 2)
    terms = [_logits([p], x) for p in (recon_x, (z @ weight).view(6, *FEATURES))]
    truth = sum(own(t, reduction) for t in terms) + 2 * 0.3 * own(kl_of(mu, logvar), reduction)
    torch.testing.assert_close(expected, truth)
    torch.testing.assert_close(by_all, gradients(truth, *inputs))
    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradients(compiled, *inputs), by_all)
    torch.testing.assert_close(torch.func.grad(both, (0, 1, 2, 3))(*inputs), by_all)


@pytest.mark.parametrize("weighting", (None, Weighting(0.5, "sample")), ids=("", "free bits"))
def test_monitor(weighting, device):
    """The mean over clips of their KL, and over frames of their reconstruction."""
    monitor, mus, logvars, recons = Monitor(), [], [], []
    for batches in ((20, 2), (6, 3), (4, 0), (3, 5)):
        (recon_x,), x, mu, logvar = make("bernoulli", batches, device=device)
        fastelbo.loss(recon_x, x, mu, logvar, weighting=weighting, monitor=monitor)
        mus.append(mu), logvars.append(logvar), recons.append(_bce([recon_x], x).flatten(1).sum(1))
    mu, logvar = torch.cat(mus).detach(), torch.cat(logvars).detach()
    torch.testing.assert_close(monitor.kl_per_dimension, kl_of(mu, logvar).mean(0))
    torch.testing.assert_close(monitor.mean_variance, mu.var(0, correction=0))
    torch.testing.assert_close(monitor.recon, torch.cat(recons).mean().detach())


@pytest.mark.skipif(BACKEND != "triton", reason="about the kernels")
@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_one_launch_forward_and_one_backward(batches, monkeypatch, device):
    from fastelbo.kernels import loss as kernels
    from fastelbo.kernels.direct import Launch

    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), call(self, *args)))
    (recon_x,), x, mu, logvar = make("bernoulli", batches, torch.float32, device)
    fastelbo.loss(recon_x, x, mu, logvar).loss.backward()
    assert launches == [kernels.loss_fwd_kernel, kernels.loss_bwd_kernel]


def never(z):
    raise AssertionError("the decoder ran")


def test_paired_samples(device):
    (recon_x,), x, mu, logvar = make("bernoulli", (6, 2), device=device)
    mu, logvar = mu.detach(), logvar.detach()
    words = "must have the same batch size, their first dimension, for the reduction 'none'"
    for call in (fastelbo.loss, torch.compile(fastelbo.loss, backend="eager")):
        for options in ({}, {"prior": (mu, logvar)}, {"weighting": Weighting(1.0)}):
            with pytest.raises(ValueError, match=words):
                call(recon_x, x, mu, logvar, reduction="none", **options)
    for options in ({}, {"weighting": Weighting(1.0)}):
        with pytest.raises(ValueError, match=f"x and mu {words}"):
            fastelbo.elbo(never, x, mu, logvar, reduction="none", **options)
    for bound in (ELBO(2), IWAE(2), IWAE(1)):
        with pytest.raises(ValueError, match="must have the same batch size, their first dimension, for several samples"):
            fastelbo.elbo(never, x, mu, logvar, bound=bound)


def test_a_decoder_that_does_not_fit_is_told_of(device):
    (_,), x, mu, logvar = make("bernoulli", (6, 2), device=device)
    with pytest.raises(ValueError, match=r"decoder\(z\) must have the shape of x"):
        fastelbo.elbo(lambda z: z.new_full((2, *FEATURES), 0.5), x, mu, logvar)
