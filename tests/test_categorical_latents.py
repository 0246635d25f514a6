"""Categorical latents: the KL of groups of classes, and what of it enters the loss, against a formula in float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from test_divergence import ONE_BETA, REDUCED, WEIGHTINGS, WHOLE_BATCH, weighted_truth
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastelbo
from conftest import BACKEND, INTERPRETED, once
from fastelbo import CategoricalPosterior, Weighting, kl_divergence
from support import (
    ContiguousWhenUnpacked,
    as_double,
    assert_no_worse,
    gradcheck,
    gradgradcheck,
    gradients,
    relative,
)

B, G, K = 6, 5, 4
F64 = torch.float64


def kl_of(q, p=None, unimix=0.0):
    """The KL of each group by its definition; None: from the uniform distribution."""
    s, t = (
        (1 - unimix) * torch.softmax(logits, -1) + unimix / q.shape[-1]
        for logits in (q, torch.zeros_like(q) if p is None else p.expand(q.shape))
    )
    return (s * (torch.log(s) - torch.log(t))).sum(-1)


def make(shape, dtype=F64, device="cpu", prior=None, spread=2.0):
    """Logits, and a prior's of the shape `prior`, if there is one."""
    shapes = (shape,) if prior is None else (shape, prior)
    return [(spread * torch.randn(s, device=device)).to(dtype).requires_grad_() for s in shapes]


def kl(q, p=None, unimix=0.0, reduction="sum"):
    return kl_divergence(q, prior=p, posterior=CategoricalPosterior(unimix), reduction=reduction)


def terms(q, p=None, *, unimix=0.0, **options):
    """Of `loss` without a reconstruction: what enters the loss, and the KL."""
    nothing = torch.zeros(len(q), 1, dtype=q.dtype, device=q.device)
    found = fastelbo.loss(nothing, nothing, q, prior=p, posterior=CategoricalPosterior(unimix), likelihood="mse", **options)
    return found.loss, found.kl


# Of the logits, and of a prior's: none, as large, one for all samples, for a group of every sample, for all groups.
SHAPES = (
    ((B, G, K), None), ((B, G, K), (B, G, K)), ((B, G, K), (G, K)), ((B, G, K), (K,)), ((B, G, K), (B, 1, K)),
    ((2, 3, G, K), None), ((2, 3, G, K), (2, 3, G, K)), ((2, 3, G, K), (3, 1, K)), ((B, K), (K,)),
)  # fmt: skip


@pytest.mark.parametrize("unimix", (0.0, 0.01), ids=("", "unimix"))
@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_value_and_gradients(shapes, reduction, unimix, device):
    logits = make(shapes[0], prior=shapes[1], device=device)
    elements = kl_of(*logits, unimix=unimix)
    expected = elements if reduction == "none" and elements.dim() == 1 else REDUCED[reduction](elements)
    got = kl(*(logits if len(logits) > 1 else (*logits, None)), unimix, reduction)
    assert got.shape == expected.shape and got.dtype == F64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(got)
    got, wanted = (gradients(k, *logits, grad_outputs=upstream) for k in (got, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("needs", ((True, False), (False, True)), ids=("posterior", "prior"))
@pytest.mark.parametrize("unimix", (0.0, 0.01), ids=("", "unimix"))
def test_either_side_alone_wants_a_gradient(unimix, needs, device):
    logits = [t.requires_grad_(need) for t, need in zip(make((B, G, K), F64, device, (G, K)), needs, strict=True)]
    wrt = [t for t in logits if t.requires_grad]
    got, expected = (gradients(k.sum(), *wrt) for k in (kl(*logits, unimix), kl_of(*logits, unimix=unimix)))
    torch.testing.assert_close(got, expected)
    assert not kl(*(t.detach() for t in logits), unimix).requires_grad


@pytest.mark.parametrize("small_tiles", (False, True), ids=("", "small tiles"))
@pytest.mark.parametrize("prior", (True, False), ids=("prior", "uniform"))
@pytest.mark.parametrize("unimix", (0.0, 0.01), ids=("", "unimix"))
@pytest.mark.parametrize("shape", ((7, 1), (9, 2), (5, 7, 3), (40, 33, 32), (3, 5, 1000), (2, 3, 5001)), ids=str)
def test_any_number_of_classes(shape, unimix, prior, small_tiles, device, monkeypatch):
    """Groups in several blocks, and classes in several tiles."""
    if small_tiles:
        if BACKEND != "triton":
            pytest.skip("of the kernels")
        from fastelbo.kernels import categorical_divergence

        monkeypatch.setattr(categorical_divergence, "tile_shape", lambda classes, most, dtype: (2, 16))
        shape = (min(shape[0], 7), *shape[1:-1], min(shape[-1], 70))
    logits = make(shape, torch.float32, device, shape if prior else None)
    found = kl(*(logits if prior else (*logits, None)), unimix, "none")
    wide = as_double(*logits)
    elements = kl_of(*wide, unimix=unimix)
    expected = elements.flatten(1).sum(1) if elements.dim() > 1 else elements
    assert found.dtype == torch.float32
    upstream = torch.rand_like(found)
    # One class has a KL of 0.
    assert relative(found, expected) < 1e-6 if shape[-1] > 1 else not found.any()
    for got, wanted in zip(gradients(found, *logits, grad_outputs=upstream),
                           gradients(expected, *wide, grad_outputs=upstream.double()), strict=True):  # fmt: skip
        assert relative(got, wanted) < 2e-6 if shape[-1] > 1 else not got.any()


def naive(q, p, reduction="sum"):
    return REDUCED[reduction](D.kl_divergence(D.Categorical(logits=q), D.Categorical(logits=p)))


@pytest.mark.parametrize("spread", (0.1, 3.0, 30.0))
@pytest.mark.parametrize("shape", ((16, 32, 32), (4, 3, 1000)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_error_is_no_larger_than_torchs(dtype, shape, spread, device):
    q, p = make(shape, dtype, device, shape, spread)
    wide = as_double(q, p)
    exact = kl_of(*wide)
    truth = [exact.detach(), *gradients(exact.sum(), *wide)]
    results = []
    for function in (lambda: kl(q, p, reduction="element"), lambda: naive(q, p, "element")):
        value = function()
        results.append([value.detach(), *gradients(value.sum(), q, p)])
    # What is added up: the logarithms of both probabilities, times one of them.
    s, t = (w.detach().softmax(-1) for w in wide)
    logs = sum(w.detach().log_softmax(-1).abs() for w in wide)
    of_kl = (s * logs).sum(-1)
    magnitudes = of_kl, s * (logs + of_kl.unsqueeze(-1)) + 1e-6, s + t + 1e-6  # in exp(-14) are no digits of float16
    assert results[0][0].dtype == torch.float32
    for name, got, by_torch, exact, terms in zip(("kl", "d/d q", "d/d p"), *results, truth, magnitudes, strict=True):
        assert_no_worse(got, by_torch, exact, terms, name, approximations=6)


@pytest.mark.parametrize("collapsed", (8, 6, 1), ids=("all", "most", "few"))
def test_collapsed_posteriors_keep_their_kl(collapsed, device):
    """Where the logarithms of the probabilities differ by less than a rounding of them would show."""
    (p,) = make((8, 32, 32), torch.float32, device)
    for unimix, size in itertools.product((0.0, 0.01), (1e-3, 1e-4)):
        near = p + size * torch.randn_like(p)
        near[collapsed:] += 2 * torch.randn_like(near[collapsed:])
        near = near.detach().requires_grad_()
        wide = as_double(near, p)
        log_q, log_p = (torch.log_softmax(t, -1) for t in wide)
        s, t = log_q.exp(), log_p.exp()
        x = (1 - unimix) * t * torch.expm1(log_q - log_p) / ((1 - unimix) * t + unimix / 32)
        rho = (1 - unimix) * t + unimix / 32
        exact = (rho * ((1 + x) * torch.log1p(x) - x)).sum(-1)[:collapsed]
        found = kl(near, p, unimix, "element")[:collapsed]
        # A rounding of a logit, times 8 for the series that the kernels have, over what they differ by.
        torch.testing.assert_close(found.double(), exact, rtol=2e-5 / size, atol=0)
        assert relative(found.sum(), exact.sum()) < 2e-6 / size
        to_q, to_p = (g[:collapsed] for g in gradients(found.sum(), near, p))
        delta, s, t, x = (t[:collapsed] for t in (torch.log1p(x), s, t, x))
        assert relative(to_q, (1 - unimix) * s * (delta - (s * delta).sum(-1, keepdim=True))) < 2e-6 / size
        assert relative(to_p, -(1 - unimix) * (t * x - t * (t * x).sum(-1, keepdim=True))) < 2e-6 / size


@pytest.mark.parametrize("gap", (3.0, 30.0, 90.0))
def test_a_rare_class_that_the_posterior_has_not(gap, device):
    """A little KL of logarithms that are far apart, whose exponentials would be too inexact."""
    p = torch.tensor([[0.0, 0.3, -4.0]], device=device).repeat(5, 1).requires_grad_()
    q = (p.detach() - torch.tensor([0.0, 0.0, gap], device=device)).requires_grad_()
    wide = as_double(q, p)
    log_s, log_t = (torch.log_softmax(t, -1) for t in wide)
    exact = (log_s.exp() * (log_s - log_t)).sum(-1)
    found = kl(q, p, reduction="element")
    assert found.max() < 0.02
    assert relative(found, exact) < 1e-6
    for got, expected in zip(gradients(found.sum(), q, p), gradients(exact.sum(), *wide), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unimix", (0.0, 0.01), ids=("", "unimix"))
def test_confident_logits(unimix, device):
    """Of probabilities that are 0 in float32 on one side or on both."""
    q = torch.tensor([[[200.0, 0.0, -3.0], [0.0, 150.0, 90.0], [-1e4, 1e4, 0.0]]], device=device).requires_grad_()
    p = torch.tensor([[[199.0, 0.0, 180.0], [90.0, 0.0, 30.0], [0.0, 1e4, 0.0]]], device=device).requires_grad_()
    wide = as_double(q, p)
    log_s, log_t = (torch.log_softmax(t, -1) for t in wide)
    elements = (log_s.exp() * (log_s - log_t)).sum(-1) if unimix == 0 else kl_of(*wide, unimix=unimix)
    found = kl(q, p, unimix, "element")
    assert relative(found, elements) < 1e-6
    for got, expected in zip(gradients(found.sum(), q, p), gradients(elements.sum(), *wide), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_impossible_classes(device):
    """By a logit of -infinity: on both sides it counts 0; under the posterior, its probability is 0; under the prior alone, the
    KL is infinite, but not where a uniform share is mixed in."""
    inf = math.inf
    q = torch.tensor([[[0.3, -inf, 1.0], [0.3, -inf, 1.0], [0.3, 0.1, 1.0]]], dtype=F64, device=device).requires_grad_()
    p = torch.tensor([[[0.9, -inf, 0.5], [0.9, 0.2, 0.5], [0.9, -inf, 0.5]]], dtype=F64, device=device).requires_grad_()
    found = kl(q, p, reduction="element")
    few = kl_of(q[0, 0, ::2], p[0, 0, ::2])
    log_t = torch.log_softmax(p[0, 1], -1)[::2]
    s = torch.softmax(q[0, 1, ::2], -1)
    torch.testing.assert_close(found[0, 0], few)
    torch.testing.assert_close(found[0, 1], (s * (s.log() - log_t)).sum())
    assert found[0, 2] == inf
    got = gradients(found[0, :2].sum(), q, p, retain_graph=True)
    few_q, few_p = gradients(few + (s * (s.log() - log_t)).sum(), q, p)
    for g, e in zip(got, (few_q, few_p), strict=True):
        torch.testing.assert_close(g[0, :2], e[0, :2])
    uniform = kl(q, None, reduction="element")
    torch.testing.assert_close(uniform[0, 0], math.log(3) + (s * s.log()).sum())
    mixed = kl(q, p, 0.01, "element")
    torch.testing.assert_close(mixed, kl_of(q, p, 0.01))
    torch.testing.assert_close(gradients(mixed.sum(), q, p), gradients(kl_of(q, p, 0.01).sum(), q, p))


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("side", (0, 1), ids=("posterior", "prior"))
@pytest.mark.parametrize("unimix", (0.0, 0.01), ids=("", "unimix"))
def test_nan_is_no_finite_lie(unimix, side, value, device):
    logits = [t.detach() for t in make((3, 2, K), torch.float32, device, (3, 2, K))]
    logits[side][1, 1, 2] = value
    q, p = (t.requires_grad_() for t in logits)
    found = kl(q, p, unimix, "element")
    assert found[1, 1].isnan() and found.isnan().sum() == 1
    for g in gradients(found.sum(), q, p):
        assert g[1, 1].isnan().all() and g.isnan().sum() == K


def test_two_runs_are_bitwise_equal(device):
    q, p = make((300, 23, 32), torch.float32, device, (300, 23, 32))
    for reduction in ("sum", "dimension", "none"):
        runs = []
        for _ in range(2):
            found = kl(q, p, 0.01, reduction)
            runs.append((found, *gradients(found.sum(), q, p)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


MADE = {
    "categorical": lambda t: D.Categorical(logits=t),
    "one-hot": lambda t: D.OneHotCategorical(logits=t),
    "straight-through": lambda t: D.OneHotCategoricalStraightThrough(logits=t),
    "of probabilities": lambda t: D.Categorical(probs=t.softmax(-1)),
    "one-hot, of probabilities": lambda t: D.OneHotCategorical(probs=t.softmax(-1)),
    "independent": lambda t: D.Independent(D.OneHotCategoricalStraightThrough(logits=t), 1),
    "expanded": lambda t: D.Categorical(logits=t[:1]).expand(t.shape[:-1]),
}


@pytest.mark.parametrize("name", MADE)
def test_distributions(name, device):
    q, p = make((B, G, K), F64, device, (B, G, K))
    dq, dp = (MADE[name](t) for t in (q, p))
    truth = D.kl_divergence(dq, dp)
    truth = truth if truth.dim() == 2 else truth.unsqueeze(1) / 1
    got = kl_divergence(dq, prior=dp, reduction="none")
    torch.testing.assert_close(got, truth.sum(1))
    upstream = torch.randn_like(got)
    wanted = gradients(truth.sum(1), q, p, grad_outputs=upstream, retain_graph=True)
    torch.testing.assert_close(gradients(got, q, p, grad_outputs=upstream, retain_graph=True), wanted)
    torch.testing.assert_close(kl_divergence(dq, reduction="none"), kl_of(dq_logits(dq)).sum(1))
    # With a record for what the distribution does not have; and logits, from a distribution.
    mixed = kl_divergence(dq, prior=dp, posterior=CategoricalPosterior(unimix=0.1))
    torch.testing.assert_close(mixed, kl_of(dq_logits(dq), dq_logits(dp), 0.1).sum())
    torch.testing.assert_close(kl(q, dp), kl_of(q, dq_logits(dp)).sum())


def dq_logits(distribution):
    return getattr(distribution, "base_dist", distribution).logits


def test_probabilities_of_zero(device):
    """Which Torch's own logits of them clamp: the KL is what their definition gives, the infinite one too."""
    q = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], dtype=F64, device=device).requires_grad_()
    p = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.7, 0.3]], dtype=F64, device=device)
    found = kl_divergence(D.Categorical(probs=q), prior=D.Categorical(probs=p), reduction="none")
    torch.testing.assert_close(found[0], 0.5 * (torch.log(0.5 / p[0, 0]) + torch.log(0.5 / p[0, 1])))
    assert found[1] == math.inf
    assert gradients(found[0], q)[0][0].isfinite().all()


# --- what of the KL enters the loss


def cases():
    for name in WEIGHTINGS:
        for reduction in ("batchmean", "none") if INTERPRETED else ("sum", "batchmean", "mean", "none"):
            for beta in ("number", "tensor", "dimensions"):
                if (reduction == "none" and name in WHOLE_BATCH) or (beta == "dimensions" and name in ONE_BETA):
                    continue
                yield name, reduction, beta


@pytest.mark.parametrize("balance", (None, (0.1, 1.0)), ids=("", "balance"))
@pytest.mark.parametrize(("name", "reduction", "beta"), list(cases()))
def test_weightings(name, reduction, beta, balance, device):
    q, p = make((B, G, K), F64, device, (B, G, K))
    beta = 0.3 if beta == "number" else torch.rand(
        (G,) if beta == "dimensions" else (), dtype=F64, device=device).requires_grad_()  # fmt: skip
    elements = kl_of(q, p, 0.01)
    expected = weighted_truth(name, elements, beta, reduction)
    if balance:
        expected = balance[0] * weighted_truth(name, kl_of(q, p.detach(), 0.01), beta, reduction)
        expected = expected + balance[1] * weighted_truth(name, kl_of(q.detach(), p, 0.01), beta, reduction)
    weighting = replace(WEIGHTINGS[name][0], balance=balance)
    found = terms(q, p, unimix=0.01, beta=beta, weighting=weighting, reduction=reduction)
    torch.testing.assert_close(found, (expected, REDUCED[reduction](elements)))
    wrt = [q, p, *([beta] if isinstance(beta, torch.Tensor) else [])]
    # The KL and what is made of it, together and the latter alone.
    for outputs, truths in ((found[:1], (expected,)), (found, (expected, REDUCED[reduction](elements)))):
        upstreams = [torch.randn_like(o) for o in outputs]
        got, wanted = (torch.autograd.grad(o, wrt, upstreams, retain_graph=True) for o in (outputs, truths))
        torch.testing.assert_close(got, wanted)


def test_a_pair_of_reductions_and_channels(device):
    q, p = make((2, 3, G, K), F64, device, (2, 3, G, K))
    recon_x, x = torch.rand(2, 7, dtype=F64, device=device), torch.rand(2, 7, dtype=F64, device=device)
    posterior, prior, weighting = D.Categorical(logits=q), D.Categorical(logits=p), Weighting(2.0, "channel")
    options = {"likelihood": "mse", "weighting": weighting, "reduction": ("mean", "batchmean")}
    found = fastelbo.loss(recon_x, x, posterior, beta=0.5, prior=prior, **options)
    of_channels = kl_of(q, p).mean(0).sum(-1)
    torch.testing.assert_close(found.recon, F.mse_loss(recon_x, x))
    torch.testing.assert_close(found.loss, F.mse_loss(recon_x, x) + 0.5 * of_channels.clamp_min(2.0).sum())
    torch.testing.assert_close(found.kl, kl_of(q, p).sum() / 2)


def test_dreamer_v2(device):
    """Hafner et al., Mastering Atari with Discrete World Models (2021), algorithm 2: KL balancing."""
    post, prior = make((2, 5, 32, 32), F64, device, (2, 5, 32, 32))
    alpha, free = 0.8, 0.3

    def of_step(q, p):
        return kl_of(q, p).sum(-1).mean().clamp_min(free)

    expected = alpha * of_step(post.detach(), prior) + (1 - alpha) * of_step(post, prior.detach())
    loss = terms(
        post.flatten(0, 1), prior.flatten(0, 1), reduction="batchmean",
        weighting=Weighting(free_bits=free, free_bits_per="batch", balance=(1 - alpha, alpha)),
    )[0]  # fmt: skip
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, post, prior), gradients(expected, post, prior))


def test_dreamer_v3(device):
    """Hafner et al., Mastering Diverse Domains through World Models (2023), equations 4 and 5: at each step the free bits of
    the dynamics and of the representation loss, of probabilities with 1 % of the uniform ones."""
    post, prior = make((2, 5, 32, 16), F64, device, (2, 5, 32, 16), spread=0.7)
    dynamics = kl_of(post.detach(), prior, 0.01).sum(-1)
    representation = kl_of(post, prior.detach(), 0.01).sum(-1)
    free = dynamics.median().item() + 1e-3  # or one would be neither above nor below
    expected = (1.0 * dynamics.clamp_min(free) + 0.1 * representation.clamp_min(free)).mean()
    loss, true_kl = terms(
        post.flatten(0, 1), prior.flatten(0, 1), unimix=0.01, reduction="batchmean",
        weighting=Weighting(free_bits=free, free_bits_per="sample", balance=(0.1, 1.0)),
    )  # fmt: skip
    torch.testing.assert_close((loss, true_kl), (expected, dynamics.mean()))
    torch.testing.assert_close(gradients(loss, post, prior), gradients(expected, post, prior))


def test_a_discrete_vae_by_gumbel_softmax(device):
    """Jang et al., Categorical Reparameterization with Gumbel-Softmax (2017), with the weights of AntixK's `cat_vae.py`."""
    (q,) = make((B, G, K), F64, device)
    x, weights = torch.randn(B, 7, dtype=F64, device=device), torch.randn(G * K, 7, dtype=F64, device=device)
    recon_x = F.gumbel_softmax(q, tau=0.5).flatten(1) @ weights
    options = {"likelihood": "mse", "posterior": "categorical", "reduction": ("mean", "batchmean")}
    loss = 30 * fastelbo.loss(recon_x, x, q, beta=0.01 / 30, **options).loss
    pi = q.softmax(-1)
    expected = 30 * F.mse_loss(recon_x, x) + 0.01 * (pi * (pi.log() + math.log(K))).sum((1, 2)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(gradients(t, q, retain_graph=True) for t in (loss, expected)))


@pytest.mark.parametrize("capacities", (None, (2.0, 0.3)), ids=("", "capacities"))
def test_a_joint_vae(capacities, device):
    """Dupont, Learning Disentangled Joint Continuous and Discrete Representations (2018), with the weights of AntixK's
    `joint_vae.py`: a Gaussian and a class from the uniform prior, each with a capacity, or plain."""
    x, mu, logvar = (torch.randn(B, n, dtype=F64, device=device, requires_grad=n < 7) for n in (7, 3, 3))
    (q,) = make((B, K), F64, device)
    weights = torch.randn(3 + K, 7, dtype=F64, device=device)
    z, kl_z = fastelbo.sample_kl(mu, logvar, reduction="batchmean")
    kl_c = kl_divergence(q, posterior="categorical", reduction="batchmean")
    recon_x = torch.cat([z, F.gumbel_softmax(q, tau=0.5)], 1) @ weights
    of_z = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
    pi = q.softmax(-1)
    of_c = (pi * (pi.log() + math.log(K))).sum(1).mean()
    sums = []
    for z_term, c_term in ((kl_z, kl_c), (of_z, of_c)):
        if capacities is None:
            sums.append(z_term + c_term)
        else:
            sums.append(30 * (c_term - capacities[1]).abs() + 20 * (z_term - capacities[0]).abs())
    loss = 30 * fastelbo.loss(recon_x, x, kl=sums[0], beta=0.01 / 30, likelihood="mse", reduction="mean").loss
    expected = 30 * F.mse_loss(recon_x, x) + 0.01 * sums[1]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(gradients(t, mu, logvar, q, retain_graph=True) for t in (loss, expected)))


def test_straight_through_samples(device):
    """A one-hot sample whose gradient is that of its probability, decoded, and a prior that is learned."""
    q, p = make((B, G, K), F64, device, (G, K))
    x, weights = torch.rand(B, 7, dtype=F64, device=device), torch.randn(G * K, 7, dtype=F64, device=device)
    posterior = D.Independent(D.OneHotCategoricalStraightThrough(logits=q), 1)
    recon_x = posterior.rsample().flatten(1) @ weights
    terms = fastelbo.loss(recon_x, x, posterior, prior=D.OneHotCategorical(logits=p.expand(B, G, K)), likelihood="gaussian")
    expected = -D.Normal(recon_x, 1.0).log_prob(x).sum() + kl_of(q, p).sum()
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(*(gradients(t, q, p, retain_graph=True) for t in (terms.loss, expected)))


def test_module(device):
    q, p = make((B, G, K), F64, device, (B, G, K))
    criterion = fastelbo.nn.ELBOLoss("mse", beta=0.5, reduction="mean", posterior=CategoricalPosterior(unimix=0.1))
    x = torch.zeros(B, 2, dtype=F64, device=device)
    torch.testing.assert_close(criterion(x, x, q, prior=p).loss, 0.5 * kl_of(q, p, 0.1).mean())
    assert "CategoricalPosterior(unimix=0.1)" in repr(criterion)


def test_a_monitor_sees_the_reconstruction(device):
    """And no means, of which there are none."""
    (q,) = make((B, G, K), F64, device)
    monitor, x = fastelbo.diagnostics.Monitor(), torch.rand(B, 2, dtype=F64, device=device)
    found = fastelbo.loss(x, 0 * x, D.Categorical(logits=q), likelihood="mse", monitor=monitor)
    torch.testing.assert_close(monitor.recon, x.square().sum() / B)
    torch.testing.assert_close(found.kl, kl_of(q).sum())
    with pytest.raises(RuntimeError, match="no posterior"):
        monitor.active_units()


# --- what autograd promises


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("unimix", (0.0, 0.1), ids=("", "unimix"))
@pytest.mark.parametrize("reduction", ("sum", "none", "dimension", "element"))
@pytest.mark.parametrize("prior", (True, False), ids=("prior", "uniform"))
def test_finite_differences(check, unimix, reduction, prior, device):
    logits = make((2, 2, 3), F64, device, (2, 3) if prior else None, spread=1.0)
    assert check(lambda q, p=None: kl(q, p, unimix, reduction), logits)


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_finite_differences_of_weightings(check, name, device):
    q, p = make((2, 2, 3), F64, device, (2, 2, 3), spread=1.0)
    weighting = WEIGHTINGS[name][0]
    beta = torch.tensor(0.3, dtype=F64, device=device, requires_grad=True)

    def function(q, p, beta):
        return terms(q, p, unimix=0.1, beta=beta, weighting=weighting, reduction="batchmean")

    assert check(function, (q, p, beta))


def test_second_derivatives_of_the_balance(device):
    q, p = make((B, G, K), F64, device, (B, G, K))
    loss = terms(q, p, unimix=0.01, weighting=Weighting(balance=(0.1, 1.0)))[0]
    expected = 0.1 * kl_of(q, p.detach(), 0.01).sum() + kl_of(q.detach(), p, 0.01).sum()
    penalties = [sum(g.square().sum() for g in gradients(t, q, p, create_graph=True)) for t in (loss, expected)]
    torch.testing.assert_close(*(gradients(t, q, p) for t in penalties))


def test_second_derivatives_of_near_and_impossible_classes(device):
    """Where the formula takes its other branches: collapsed, far apart, -infinity on both sides."""
    (p,) = make((3, 2, K), F64, device)
    q = (p + torch.tensor([1e-3, 3.0, 0.3], dtype=F64, device=device)[:, None, None] * torch.randn_like(p)).detach()
    masked = torch.zeros_like(p, dtype=torch.bool)
    masked[:, 1, 2] = True
    for unimix in (0.0, 0.01):
        results = []
        for function, few in ((kl, False), (lambda q, p, u: kl_of(q, p, u).sum(), True)):
            a, b = (t.detach().clone().requires_grad_() for t in (q, p))
            if few and not unimix:  # without the class that is impossible on both sides
                value = function(a[:, :1], b[:, :1], 0.0) + function(*(t[:, 1:][..., [0, 1, 3]] for t in (a, b)), 0.0)
            else:
                value = function(*(t.masked_fill(masked, -math.inf) for t in (a, b)), unimix)
            grads = gradients(value, a, b, create_graph=True)
            results.append((value, *grads, *gradients(sum(g.square().sum() for g in grads), a, b)))
        torch.testing.assert_close(*results)


def test_backward_twice_and_saved_tensor_hooks(device):
    base, p = make((G, B, K), F64, device, (B, G, K))
    q = base.transpose(0, 1)  # not contiguous
    wanted = gradients(kl_of(q, p).sum(), base, p)
    found = kl(q, p)
    for factor in (1.0, 3.0):
        got = gradients(found, base, p, grad_outputs=torch.tensor(factor, dtype=F64, device=device), retain_graph=True)
        torch.testing.assert_close(got, tuple(factor * g for g in wanted))
    with ContiguousWhenUnpacked():
        torch.testing.assert_close(gradients(kl(q, p), base, p), wanted)


@pytest.mark.parametrize("layout", ("transposed", "strided", "expanded"))
def test_logits_that_do_not_lie_together(layout, device):
    make_view = {
        "transposed": lambda: torch.randn(B, K, G, dtype=F64, device=device).transpose(1, 2),
        "strided": lambda: torch.randn(B, G, 2 * K, dtype=F64, device=device)[..., ::2],
        "expanded": lambda: torch.randn(1, G, K, dtype=F64, device=device).expand(B, G, K),
    }[layout]
    q, p = (make_view().requires_grad_() for _ in range(2))
    found, expected = kl(q, p, 0.01), kl_of(q, p, 0.01).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, q, p), gradients(expected, q, p))


@pytest.mark.parametrize("shape", ((0, G, K), (0, K), (B, 0, K)), ids=str)
def test_empty(shape, device):
    q, p = make(shape, torch.float32, device, shape)
    for reduction in ("sum", "none", "element", "mean", "dimension"):
        found = kl(q, p, 0.01, reduction)
        expected = kl_of(q, p)
        expected = expected if reduction == "none" and expected.dim() == 1 else REDUCED[reduction](expected)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert all(g.shape == q.shape for g in gradients(found.sum(), q, p))


def test_checkpoint(device):
    q, p = make((B, G, K), F64, device, (G, K))
    plain, again = kl(q, p, 0.01), checkpoint(kl, q, p, 0.01, use_reentrant=False)
    assert torch.equal(plain, again)
    torch.testing.assert_close(*(gradients(t, q, p) for t in (plain, again)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype, device):
    """Logits come from a layer in half precision; the KL and its arithmetic are float32, its gradients as the logits."""
    layer = nn.Linear(8, G * K).to(device)
    x = torch.randn(B, 8, device=device)
    with torch.autocast(device.type, dtype):
        q = layer(x).unflatten(1, (G, K))
        found = kl(q, None, 0.01)
    assert q.dtype == dtype and found.dtype == torch.float32
    (wide,) = as_double(q.detach().requires_grad_())
    expected = kl_of(wide, unimix=0.01).sum()
    assert relative(found, expected) < 1e-6
    assert relative(gradients(found, q)[0], gradients(expected, wide)[0]) < torch.finfo(dtype).eps


@pytest.mark.parametrize("unimix", (0.0, 0.01), ids=("", "unimix"))
def test_transforms(unimix, device):
    q, p = (t.detach() for t in make((B, G, K), F64, device, (G, K)))

    def one(q, p):
        return kl(q[None], p, unimix)

    def truth(q, p):
        return kl_of(q, p, unimix).sum()

    results = []
    for f in (one, truth):
        per_sample = torch.func.vmap(torch.func.grad_and_value(f, argnums=(0, 1)), (0, None))(q, p)
        reverse, forward = torch.func.jacrev(f, argnums=1)(q[0], p), torch.func.jacfwd(f)(q[0], p)
        results.append((per_sample, reverse, forward, torch.func.hessian(f)(q[0], p)))
    torch.testing.assert_close(*results)
    batched = torch.randn(3, B, dtype=F64, device=device)
    q.requires_grad_()
    found, expected = kl(q, p, unimix, "none"), kl_of(q, p, unimix).sum(1)
    torch.testing.assert_close(*(torch.autograd.grad(t, q, batched, is_grads_batched=True) for t in (found, expected)))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@once
def test_compiled(backend, device):
    """As tensors, with a record, in one graph; and as distributions."""
    torch.compiler.reset()
    q, p = make((B, G, K), F64, device, (G, K))
    x = torch.rand(B, 3, dtype=F64, device=device)
    weighting = Weighting(free_bits=0.7, free_bits_per="sample", balance=(0.1, 1.0))

    def of_tensors(q, p):
        options = {"posterior": CategoricalPosterior(0.01), "likelihood": "mse", "weighting": weighting}
        found = fastelbo.loss(x, x, q, prior=p, **options)
        return kl(q, p, 0.01, "dimension"), found.loss, found.kl

    def of_distributions(q, p):
        return (kl_divergence(D.Categorical(logits=q), prior=D.Categorical(logits=p.expand(q.shape))),)

    for function in (of_tensors, of_distributions):
        results = []
        for call in (function, torch.compile(function, fullgraph=function is of_tensors, backend=backend)):
            outputs = call(q, p)
            results.append([*outputs, *torch.autograd.grad(outputs, (q, p), [torch.ones_like(o) for o in outputs])])
        torch.testing.assert_close(*results)


@pytest.mark.skipif(BACKEND != "triton", reason="launches of kernels")
@pytest.mark.parametrize("weighting", (None, Weighting(free_bits=0.7, balance=(0.1, 1.0))), ids=("", "weighting"))
def test_one_launch_forward_and_one_backward(weighting, device, monkeypatch):
    from fastelbo.kernels import categorical_divergence as kernels
    from fastelbo.kernels.direct import Launch

    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), call(self, *args)))
    q, p = make((B, G, K), torch.float32, device, (B, G, K))
    of_kl = [kernels.categorical_divergence_fwd_kernel, kernels.categorical_divergence_bwd_kernel]
    for reduction in ("sum", "none", "mean", *(("dimension", "element") if weighting is None else ())):
        if weighting is None:
            found = kl(q, p, 0.01, reduction)
        else:
            found = terms(q, p, unimix=0.01, weighting=weighting, reduction=reduction)[0]
        assert [k for k in launches if k in of_kl] == of_kl[:1]
        launches.clear()
        gradients(found.sum(), q, p)
        assert [k for k in launches if k in of_kl] == of_kl[1:]
        assert weighting is not None or len(launches) == 1
        launches.clear()


@pytest.mark.skipif(BACKEND != "triton", reason="tiles of kernels")
def test_free_bits_of_groups_in_several_tiles(device, monkeypatch):
    from fastelbo.kernels import categorical_divergence as kernels

    monkeypatch.setattr(kernels, "tile_shape", lambda classes, most, dtype: (2, 16))
    q, p = make((B, G, 70), F64, device, (B, G, 70))
    elements = kl_of(q, p, 0.01)
    free = elements.median().item() + 1e-3
    loss = terms(q, p, unimix=0.01, weighting=Weighting(free))[0]
    expected = elements.clamp_min(free).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(gradients(t, q, p) for t in (loss, expected)))


@pytest.mark.skipif(BACKEND != "triton", reason="operands of kernels")
def test_a_prior_for_all_samples_is_not_copied(device):
    from fastelbo.engine.triton_backend import _both_logits

    q, p = (t.detach() for t in make((2, 3, G, K), F64, device, (G, K)))
    found = _both_logits((q, p.expand(q.shape)))[1]
    assert found.shape == p.shape and found.data_ptr() == p.data_ptr()


@pytest.mark.skipif(BACKEND != "triton", reason="offsets of kernels")
@pytest.mark.parametrize("kind", ("none", "dimension", "element"))
def test_wide_offsets(kind, device, monkeypatch):
    """As tensors of more than 2^31 elements need them."""
    from fastelbo.kernels import categorical_divergence as kernels

    launch = kernels.Launch
    monkeypatch.setattr(kernels, "Launch", lambda k, device, constants, o: launch(k, device, constants | {"WIDE": True}, o))
    q, p = make((B, G, 7), F64, device, (G, 7))
    found, expected = kl(q, p, 0.02, kind), REDUCED[kind](kl_of(q, p, 0.02))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(gradients(t.sum(), q, p) for t in (found, expected)))


# --- what users may get wrong

Q, P = torch.zeros(B, G, K), torch.zeros(G, K)
OF_Q = D.Categorical(logits=Q)
BAD = {
    "unimix of 1": (lambda: CategoricalPosterior(unimix=1.0), ValueError, "CategoricalPosterior.unimix must be a share from 0"),
    "unimix below 0": (lambda: CategoricalPosterior(unimix=-0.1), ValueError, "CategoricalPosterior.unimix must be a share"),
    "unimix as text": (lambda: CategoricalPosterior(unimix="1%"), TypeError, "CategoricalPosterior.unimix must be"),
    "logvar": (lambda: kl_divergence(Q, Q, posterior="categorical"), ValueError, "logvar must be None where the latents are"),
    "logvar of a distribution": (lambda: kl_divergence(OF_Q, Q), ValueError, "logvar must be None"),
    "a beta in its place": (lambda: fastelbo.loss(Q, Q, OF_Q, 0.5), ValueError, "beta goes by name"),
    "a Gaussian's record": (lambda: kl_divergence(OF_Q, posterior="std"), ValueError, "posterior must be a Categorical"),
    "a Gaussian": (lambda: kl_divergence(D.Normal(Q, 1.0), posterior="categorical"), TypeError, "mu must be a Categorical"),
    "labels": (lambda: kl_divergence(Q.long(), posterior="categorical"), TypeError, "mu must be float16"),
    "no batch": (lambda: kl_divergence(Q[0, 0], posterior="categorical"), ValueError, "mu must have logits"),
    "a distribution without batch": (lambda: kl_divergence(D.Categorical(logits=Q[0, 0])), ValueError, "mu must have logits"),
    "no classes": (lambda: kl_divergence(Q[..., :0], posterior="categorical"), ValueError, "mu must have logits"),
    "no mu": (lambda: kl_divergence(None, posterior="categorical"), TypeError, "mu must be a tensor, got NoneType"),
    "a pair as prior": (lambda: kl_divergence(Q, prior=(P, P), posterior="categorical"), TypeError, "prior must be None, a "),
    "a Gaussian prior": (lambda: kl_divergence(OF_Q, prior=D.Normal(P, 1.0)), TypeError, "prior must be a Categorical"),
    "a categorical prior": (lambda: kl_divergence(Q, Q, prior=OF_Q), TypeError, "prior must be a Normal"),
    "logits for a distribution": (lambda: kl_divergence(OF_Q, prior=P), TypeError, "prior must be None, a Categorical"),
    "labels as prior": (lambda: kl(Q, P.long()), TypeError, "prior must be float16"),
    "other classes": (lambda: kl(Q, torch.zeros(G, 3)), ValueError, "prior must have 4 classes in its last dimension"),
    "one class": (lambda: kl(Q, torch.zeros(G, 1)), ValueError, "prior must have 4 classes"),
    "other groups": (lambda: kl(Q, torch.zeros(3, K)), ValueError, "prior must have the shape of mu or one that broadcasts"),
    "no record": (lambda: kl_divergence(Q, posterior=0.01), TypeError, "posterior must be a name"),
    "a name": (lambda: kl_divergence(Q, posterior="classes"), ValueError, "'var', 'categorical'; got 'classes'"),
    "a reduction": (lambda: kl(Q, None, reduction="group"), ValueError, "reduction must be one of"),
    "balance": (lambda: terms(Q, weighting=Weighting(balance=(0.1, 1))), ValueError, "Weighting.balance needs a prior"),
    "a beta for each class": (lambda: terms(Q, beta=torch.ones(G, K)), ValueError, "beta must be a number"),
    "another batch": (
        lambda: fastelbo.loss(Q[:3], Q[:3], Q, posterior="categorical", reduction="none"), ValueError, "same batch size"),
    "given twice": (lambda: terms(Q, kl=torch.zeros(())), ValueError, "give mu and logvar, or kl, not both"),
    "elbo": (lambda: fastelbo.elbo(nn.Identity(), Q, OF_Q), ValueError, r"OneHotCategoricalStraightThrough.*kl="),
    "elbo, free bits": (
        lambda: fastelbo.elbo(nn.Identity(), Q, OF_Q, weighting=Weighting(0.5)), ValueError, "F.gumbel_softmax"),
    "elbo of tensors": (lambda: fastelbo.elbo(nn.Identity(), Q, Q, posterior="categorical"), ValueError, "F.gumbel_softmax"),
    "elbo of samples": (lambda: fastelbo.elbo(nn.Identity(), Q, OF_Q, bound=fastelbo.IWAE(3)), ValueError, "F.gumbel_softmax"),
    "sample_kl": (lambda: fastelbo.sample_kl(OF_Q), ValueError, r"gumbel_softmax.*kl=kl_divergence"),
    "reparameterize": (lambda: fastelbo.reparameterize(Q, posterior="categorical"), ValueError, "gumbel_softmax"),
    "sample_log_ratio": (lambda: fastelbo.sample_log_ratio(OF_Q), ValueError, "gumbel_softmax"),
    "log_likelihood": (lambda: fastelbo.log_likelihood(nn.Identity(), Q, OF_Q), ValueError, "gumbel_softmax"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@once
def test_bad_values(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@once
def test_one_path_for_all_spellings():
    """The name is the record with its defaults, and equal records are one."""
    assert CategoricalPosterior() is CategoricalPosterior(unimix=0) and CategoricalPosterior(0.01) is CategoricalPosterior(0.01)
    q = torch.randn(B, G, K)
    ways = (kl_divergence(q, posterior="categorical"), kl(q), kl_divergence(D.Categorical(logits=q)))
    assert torch.equal(ways[0], ways[1])
    torch.testing.assert_close(ways[2], ways[1])  # whose logits have been normalized


@once
def test_a_kept_plan_does_not_hide_a_mistake():
    """The same tensors in other places are another call."""
    a, b = torch.randn(B, G, K), torch.randn(B, G, K)
    for _ in range(2):
        torch.testing.assert_close(kl_divergence(a, prior=b, posterior="categorical"), kl_of(a, b).sum())
        with pytest.raises(ValueError, match="logvar must be None"):
            kl_divergence(a, b, posterior="categorical")
        kl_divergence(a, b)
        with pytest.raises(TypeError, match="logvar must be a tensor, got NoneType"):
            kl_divergence(a, prior=b)
