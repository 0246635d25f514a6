"""`weighting=` of `kl_divergence` and `sample_kl`: the KL as weighted, in every reduction that it means something in."""

from dataclasses import replace

import pytest
import torch
from test_divergence import REDUCED, WEIGHTINGS, WHOLE_BATCH, B, D, weighted_truth
from test_posterior import STD, inputs_of, make_latents, naive, prior_for
from torch.utils.checkpoint import checkpoint

import fastelbo
from conftest import BACKEND
from fastelbo import Weighting, kl_divergence, sample_kl
from support import gradcheck, gradgradcheck, gradients

BALANCE = (0.1, 0.5)
OF_DIMENSIONS = {
    "plain": lambda kl: kl,
    "element": lambda kl: kl.clamp_min(0.7),
    "dimension": lambda kl: kl.mean(0).clamp_min(0.7),
}


def truth_of(name, reduction):
    """A function of the KL's elements."""
    if reduction in ("dimension", "element"):
        return lambda kl: REDUCED[reduction](OF_DIMENSIONS[name](kl)) if name != "dimension" else OF_DIMENSIONS[name](kl)
    return lambda kl: weighted_truth(name, kl, 1.0, reduction)


def expected_of(name, reduction, kind, posterior, latents, balanced=False):
    truth = truth_of(name, reduction)
    if not balanced:
        return truth(naive(posterior, kind, *latents))
    mu, second, *prior = latents
    to_posterior = naive(posterior, kind, mu, second, *(p.detach() for p in prior))
    to_prior = naive(posterior, kind, mu.detach(), second.detach(), *prior)
    return BALANCE[0] * truth(to_posterior) + BALANCE[1] * truth(to_prior)


def is_meant(name, reduction):
    if reduction == "none":
        return name not in WHOLE_BATCH
    if reduction == "dimension":
        return name in ("plain", "element", "dimension")
    return reduction != "element" or name in ("plain", "element")


CASES = [(name, reduction) for name in WEIGHTINGS for reduction in REDUCED if is_meant(name, reduction)]


def weighting_of(name, balanced):
    return replace(WEIGHTINGS[name][0], balance=BALANCE) if balanced else WEIGHTINGS[name][0]


@pytest.mark.parametrize("kind", (None, "pair", "balanced"))
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_kl_divergence(name, reduction, kind, device):
    balanced, kind = kind == "balanced", "pair" if kind == "balanced" else kind
    posterior = "std" if balanced else "logvar"
    latents = make_latents(posterior, (B, D), torch.float64, device)
    prior = None if kind is None else prior_for(kind, posterior, *latents[2:])
    weighting = weighting_of(name, balanced)
    for _ in range(2):  # the second time by what is kept of the first
        got = kl_divergence(*latents[:2], prior, posterior=posterior, weighting=weighting, reduction=reduction)
        expected = expected_of(name, reduction, kind, posterior, latents, balanced)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)
        upstream, wrt = torch.randn_like(got), inputs_of(kind, latents)
        ours, theirs = (
            torch.autograd.grad(kl, wrt, upstream, materialize_grads=True, retain_graph=True) for kl in (got, expected)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", (None, "pair", "balanced"))
@pytest.mark.parametrize(("name", "reduction"), [case for case in CASES if case[1] in ("sum", "mean", "none")])
def test_sample_kl(name, reduction, kind, device):
    """With gradients of both results, together and each alone."""
    balanced, kind = kind == "balanced", "pair" if kind == "balanced" else kind
    posterior = "logvar" if kind is None else "log_std"  # the plain one has ways of its own
    latents = mu, second, *_ = make_latents(posterior, (B, D), torch.float64, device)
    prior = None if kind is None else prior_for(kind, posterior, *latents[2:])
    eps, wrt = torch.randn_like(mu), inputs_of(kind, latents)
    found = sample_kl(
        mu, second, posterior=posterior, prior=prior, weighting=weighting_of(name, balanced), reduction=reduction, eps=eps
    )
    expected = mu + STD[posterior](second) * eps, expected_of(name, reduction, kind, posterior, latents, balanced)
    torch.testing.assert_close(tuple(found), expected)
    upstreams = torch.randn_like(mu), torch.randn_like(found.kl)
    for chosen in ((0, 1), (0,), (1,)):
        ours, theirs = (
            torch.autograd.grad(
                [terms[i] for i in chosen], wrt, [upstreams[i] for i in chosen], materialize_grads=True, allow_unused=True,
                retain_graph=True,
            )
            for terms in (found, expected)
        )  # fmt: skip
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_noise_is_that_of_a_call_without(name, device):
    mu, logvar, *_ = make_latents("logvar", (B, D), device=device)
    samples = []
    for weighting in (None, WEIGHTINGS[name][0]):
        torch.manual_seed(5)
        samples.append(sample_kl(mu, logvar, weighting=weighting, reduction="batchmean").z)
    torch.testing.assert_close(*samples, rtol=1e-6, atol=1e-6)
    by_generator = sample_kl(mu, logvar, weighting=WEIGHTINGS[name][0], generator=torch.Generator(device).manual_seed(5)).z
    torch.testing.assert_close(by_generator, samples[0], rtol=1e-6, atol=1e-6)
    again = gradients(samples[1].sum(), logvar)[0]
    torch.testing.assert_close(again, 0.5 * (samples[1] - mu).detach(), rtol=1e-5, atol=1e-6)


def test_no_weighting_is_the_kl(device):
    mu, logvar, *_ = make_latents("logvar", (B, D), device=device)
    for weighting in (None, Weighting()):
        assert torch.equal(kl_divergence(mu, logvar, weighting=weighting), kl_divergence(mu, logvar))
        assert torch.equal(sample_kl(mu, logvar, weighting=weighting, eps=mu).kl, sample_kl(mu, logvar, eps=mu).kl)


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize(
    ("name", "reduction"),
    (("element", "element"), ("element", "dimension"), ("dimension", "dimension"), ("sample", "none"), ("batch", "sum")),
)
def test_finite_differences(name, reduction, check, device):
    weighting = WEIGHTINGS[name][0]
    latents = make_latents("logvar", (2, 2), torch.float64, device)
    eps = torch.randn(2, 2, dtype=torch.float64, device=device)

    def terms(mu, logvar, *prior):
        kl = kl_divergence(mu, logvar, prior, weighting=weighting, reduction=reduction)
        if reduction in ("element", "dimension"):
            return kl
        return kl, *sample_kl(mu, logvar, prior=prior, weighting=weighting, reduction=reduction, eps=eps)

    assert check(terms, latents)


def test_a_capacity_that_changes(device):
    latents = mu, logvar, *_ = make_latents("logvar", (B, D), torch.float64, device)
    samples = naive("logvar", None, *latents).sum(1)
    capacity = torch.zeros((), dtype=torch.float64, device=device)
    weighting = Weighting(capacity=capacity, capacity_per="sample")
    for value in (1.0, 5.0):
        capacity.fill_(value)
        got = kl_divergence(mu, logvar, weighting=weighting, reduction="none")
        torch.testing.assert_close(got, (samples - value).abs())
        torch.testing.assert_close(sample_kl(mu, logvar, weighting=weighting, reduction="none").kl, got)


def test_a_hierarchy(device):
    """Free bits of each level, which go into the loss as one KL."""
    levels = [make_latents("logvar", (B, n), torch.float64, device) for n in (3, 5)]
    recon_x = torch.rand(B, 7, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.rand(B, 7, dtype=torch.float64, device=device)
    weighting = Weighting(2.0, "batch")
    kl = sum(kl_divergence(mu, lv, prior, weighting=weighting, reduction="batchmean") for mu, lv, *prior in levels)
    got = fastelbo.loss(recon_x, x, kl=kl, beta=0.3, likelihood="mse", reduction="batchmean").loss
    expected = (recon_x - x).square().sum() / B
    for level in levels:
        expected = expected + 0.3 * naive("logvar", "pair", *level).sum(1).mean().clamp_min(2.0)
    torch.testing.assert_close(got, expected)
    wrt = [recon_x, *(t for level in levels for t in level)]
    ours, theirs = (torch.autograd.grad(value, wrt, materialize_grads=True) for value in (got, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_short_dtypes(dtype, device):
    latents = mu, logvar, *prior = make_latents("logvar", (B, D), dtype, device, spread=0.3)
    wide = [t.detach().double().requires_grad_() for t in latents]
    for reduction in ("batchmean", "element"):
        kl = kl_divergence(mu, logvar, prior, weighting=weighting_of("element", True), reduction=reduction)
        expected = expected_of("element", reduction, "pair", "logvar", wide, True)
        assert kl.dtype == torch.float32
        torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-5)
        for a, b in zip(gradients(kl.sum(), *latents), gradients(expected.sum(), *wide), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_surroundings(name, device):
    """Compiled in one graph, transformed, and run again by a checkpoint."""
    weighting = weighting_of(name, True)
    latents = [t.detach().requires_grad_() for t in make_latents("logvar", (B, D), device=device)]
    eps = torch.randn(B, D, device=device)

    def function(mu, logvar, *prior):
        z, kl = sample_kl(mu, logvar, prior=prior, weighting=weighting, eps=eps, reduction="batchmean")
        return z.square().sum() + kl + kl_divergence(mu, logvar, prior, weighting=weighting, reduction="batchmean")

    expected = function(*latents)
    by_all = gradients(expected, *latents)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*latents)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradients(compiled, *latents), by_all)
    torch.testing.assert_close(torch.func.grad(function, (0, 1, 2, 3))(*latents), by_all)
    checkpointed = checkpoint(function, *latents, use_reentrant=False)
    torch.testing.assert_close(gradients(checkpointed, *latents), by_all)


def test_per_sample_gradients(device):
    mu, logvar, *_ = make_latents("logvar", (B, D), torch.float64, device)
    weighting = Weighting(4.0, "sample")

    def one(mu, logvar):
        return kl_divergence(mu[None], logvar[None], weighting=weighting)

    got = torch.func.vmap(torch.func.grad(one, (0, 1)))(mu.detach(), logvar.detach())
    torch.testing.assert_close(got, gradients(kl_divergence(mu, logvar, weighting=weighting), mu, logvar))


@pytest.mark.skipif(BACKEND != "triton", reason="about the kernels")
@pytest.mark.parametrize("kind", (None, "pair"))
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_launches(name, kind, monkeypatch, device):
    """One for the KL, and one for a sample with it, unless what is free is known after a pass over all of the batch alone."""
    from fastelbo.kernels.direct import Launch

    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), call(self, *args)))
    latents = mu, logvar, *_ = make_latents("logvar", (B, D), device=device)
    prior = None if kind is None else latents[2:]
    kl = kl_divergence(mu, logvar, prior, weighting=WEIGHTINGS[name][0], reduction="batchmean")
    assert len(launches) == 1
    kl.backward()
    assert len(launches) == 2
    launches.clear()
    apart = name in ("dimension", "channel", "capacity", "capacity of samples")
    z, kl = sample_kl(mu, logvar, prior=prior, weighting=WEIGHTINGS[name][0], reduction="batchmean", eps=torch.randn_like(mu))
    assert len(launches) == (2 if apart else 1)
    (z.sum() + kl).backward()
    assert len(launches) == (4 if apart else 2)


A = torch.zeros(2, 3)
BAD = (
    ({"weighting": 0.5}, TypeError, "weighting must be a Weighting, got float"),
    ({"weighting": Weighting(balance=(0.2, 0.8))}, ValueError, "Weighting.balance needs a prior"),
    ({"weighting": Weighting(1.0, "dimension"), "reduction": "none"}, ValueError, "Weighting.free_bits_per='dimension'"),
    ({"weighting": Weighting(1.0, "batch"), "reduction": "none"}, ValueError, "Weighting.free_bits_per='batch' is about"),
    ({"weighting": Weighting(capacity=1.0), "reduction": "none"}, ValueError, "Weighting.capacity_per='batch' is about"),
    ({"weighting": Weighting(1.0), "reduction": "x"}, ValueError, "reduction must be one of 'sum'"),
    ({"weighting": Weighting(capacity=1.0), "reduction": None}, ValueError, "reduction must be one of 'sum'"),
    ({"weighting": Weighting(1.0), "logvar": None}, TypeError, "logvar must be a tensor, got NoneType"),
)
BAD_OF_DIMENSIONS = (
    (Weighting(capacity=1.0), "dimension", "Weighting.capacity is about whole samples: reduction 'dimension'"),
    (Weighting(capacity=1.0, capacity_per="sample"), "element", "Weighting.capacity is about whole samples"),
    *((Weighting(1.0, per), "dimension", f"Weighting.free_bits_per='{per}' sums") for per in ("channel", "sample", "batch")),
    *(
        (Weighting(1.0, per), "element", f"Weighting.free_bits_per='{per}' sums over more than reduction 'element'")
        for per in ("dimension", "channel", "sample", "batch")
    ),
)


@pytest.mark.parametrize("function", (kl_divergence, sample_kl))
@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=str)
def test_errors(arguments, error, message, function):
    for call in (function, torch.compile(function, backend="eager")):
        with pytest.raises(error, match=message):
            call(**{"mu": A, "logvar": A} | arguments)


@pytest.mark.parametrize(("weighting", "reduction", "message"), BAD_OF_DIMENSIONS, ids=str)
def test_errors_of_dimensions(weighting, reduction, message):
    with pytest.raises(ValueError, match=message):
        kl_divergence(A, A, weighting=weighting, reduction=reduction)
    with pytest.raises(ValueError, match="reduction must be one of 'sum'"):
        sample_kl(A, A, weighting=weighting, reduction=reduction)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_of_nothing(name, device):
    mu = torch.zeros(0, 3, device=device, requires_grad=True)
    z, kl = sample_kl(mu, mu, weighting=WEIGHTINGS[name][0])
    assert z.shape == (0, 3) and kl.item() == 0
    assert kl_divergence(mu, mu, weighting=WEIGHTINGS[name][0], reduction="batchmean").isnan()
    assert gradients(kl + z.sum(), mu)[0].shape == (0, 3)
