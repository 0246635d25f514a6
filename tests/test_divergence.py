"""The KL in every reduction, and what of it enters the objective: free bits, capacity, balance, a beta for each dimension."""

import math
import os
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from test_posterior import FROM_STD, PRIORS, inputs_of, make_latents, naive, prior_for
from torch.distributions import Normal

import fastelbo
from conftest import BACKEND, INTERPRETED
from fastelbo import Weighting, kl_divergence
from fastelbo.basics.arguments import factor_of
from fastelbo.engine.divergence import divergence_terms
from fastelbo.latents.posterior import check_latents
from fastelbo.latents.weighting import check_beta, check_weighting
from support import gradcheck, gradgradcheck, gradients, relative

REDUCED = {
    "sum": lambda kl: kl.sum(),
    "batchmean": lambda kl: kl.sum() / kl.shape[0],
    "mean": lambda kl: kl.mean(),
    "none": lambda kl: kl.flatten(1).sum(1),
    "dimension": lambda kl: kl.mean(0),
    "element": lambda kl: kl,
}


@pytest.mark.parametrize("shape", ((3, 5), (5, 2, 3, 4)), ids=str)
@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("posterior", FROM_STD)
def test_kl_divergence(posterior, kind, reduction, shape, device):
    latents = make_latents(posterior, shape, torch.float64, device)
    kl = kl_divergence(*latents[:2], prior_for(kind, posterior, *latents[2:]), posterior=posterior, reduction=reduction)
    expected = REDUCED[reduction](naive(posterior, kind, *latents))
    assert kl.shape == expected.shape
    torch.testing.assert_close(kl, expected, rtol=1e-11, atol=1e-12)
    upstream = torch.randn_like(kl)
    got, wanted = (gradients(k, *inputs_of(kind, latents), grad_outputs=upstream) for k in (kl, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", ((1, 1), (1, 20), (4097, 3), (9000, 17), (1100, 1000), (7,)), ids=str)
def test_dimensions_of_any_number(shape, device):
    """Columns in several blocks, and rows in several chunks, in the interpreter's sizes too."""
    mu, logvar, *prior = make_latents("logvar", shape, torch.float32, device, spread=0.5)
    kl = kl_divergence(mu, logvar, prior, reduction="dimension")
    elements = naive("logvar", "pair", *(t.double() for t in (mu, logvar, *prior)))
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), elements.mean(0), rtol=1e-6, atol=1e-7)
    upstream = torch.randn_like(kl)
    got = gradients(kl, mu, logvar, *prior, grad_outputs=upstream)
    expected = gradients(elements.mean(0), mu, logvar, *prior, grad_outputs=upstream.double())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 / shape[0])


def test_two_runs_are_bitwise_equal(device):
    mu, logvar, *prior = make_latents("logvar", (9000, 23), device=device)
    for reduction in ("sum", "dimension"):
        runs = []
        for _ in range(2):
            kl = kl_divergence(mu, logvar, prior, reduction=reduction)
            runs.append((kl, *gradients(kl.sum(), mu, logvar, *prior)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# The prior's mean and logvar: as large as mu; one for all samples; one number; one for each channel; one of either.
BROADCAST = (
    ((5, 3, 2), (5, 3, 2)), ((3, 2), (3, 2)), ((), ()), ((3, 1), (1, 3, 2)), ((5, 1, 1), (2,)), ((3, 2), (5, 3, 2)),
    ((5, 3, 2), ()),
)  # fmt: skip


@pytest.mark.parametrize("reduction", ("sum", "none", "dimension", "element"))
@pytest.mark.parametrize("normal", (False, True), ids=("pair", "normal"))
@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_priors_broadcast(shapes, normal, reduction, device):
    mu, logvar = make_latents("logvar", (5, 3, 2), torch.float64, device)[:2]
    prior_mu, prior_logvar = (torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes)
    prior = Normal(prior_mu, torch.exp(0.5 * prior_logvar)) if normal else (prior_mu, prior_logvar)
    kl = kl_divergence(mu, logvar, prior, reduction=reduction)
    expected = REDUCED[reduction](naive("logvar", "pair", mu, logvar, prior_mu, prior_logvar))
    torch.testing.assert_close(kl, expected)
    upstream = torch.randn_like(kl)
    wrt = mu, logvar, prior_mu, prior_logvar
    torch.testing.assert_close(gradients(kl, *wrt, grad_outputs=upstream), gradients(expected, *wrt, grad_outputs=upstream))


@pytest.mark.parametrize("reduction", ("none", "dimension", "element"))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_dimensions_come_in_logical_order(layout, reduction, device):
    """However the latents, and the gradient that arrives, lie in memory."""
    mu, std = make_latents("std", (2, 3, 4, 5), torch.float64, device)[:2]
    prior = [torch.rand(s, dtype=torch.float64, device=device).add(0.5).requires_grad_() for s in ((3, 1, 1), (2, 3, 4, 5))]
    expected = REDUCED[reduction](naive("std", "pair", mu, std, *prior))
    given = [t.detach().to(memory_format=layout).requires_grad_() for t in (mu, std)]
    kl = kl_divergence(*given, prior, posterior="std", reduction=reduction)
    torch.testing.assert_close(kl, expected)
    upstream = torch.randn_like(expected)
    if upstream.dim() > 1:
        upstream = upstream.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(gradients(kl, *given, *prior, grad_outputs=upstream),
                               gradients(expected, mu, std, *prior, grad_outputs=upstream))  # fmt: skip


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("reduction", ("sum", "none", "dimension", "element"))
def test_finite_differences(check, reduction, device):
    latents = make_latents("var", (2, 2), torch.float64, device, spread=0.3)
    assert check(lambda mu, v, *prior: kl_divergence(mu, v, prior, posterior="var", reduction=reduction), latents)


def test_create_graph_gives_the_gradient_penalty(device):
    penalties = []
    mu, std, *prior = latents = make_latents("std", (4, 3), torch.float64, device)
    for kl in (kl_divergence(mu, std, prior, posterior="std"), naive("std", "pair", *latents).sum()):
        grads = gradients(kl, *latents, create_graph=True)
        penalties.append(gradients(sum(g.square().sum() for g in grads), *latents))
    torch.testing.assert_close(*penalties)


# Each with the mean over samples that it is, of the elements [B, D] and beta, a number or [D].
B, D = 6, 5
WEIGHTINGS = {
    "plain": (Weighting(), lambda kl, beta: (beta * kl).sum(1)),
    "element": (Weighting(free_bits=0.7), lambda kl, beta: (beta * kl.clamp_min(0.7)).sum(1)),
    "dimension": (Weighting(0.7, "dimension"), lambda kl, beta: (beta * kl.mean(0).clamp_min(0.7)).sum().expand(B)),
    "channel": (Weighting(0.7, "channel"), lambda kl, beta: (beta * kl.mean(0).clamp_min(0.7)).sum().expand(B)),
    "batch": (Weighting(4.0, "batch"), lambda kl, beta: (beta * kl.sum(1).mean().clamp_min(4.0)).expand(B)),
    "much of a batch": (Weighting(400.0, "batch"), lambda kl, beta: (beta * kl.sum(1).mean().clamp_min(400.0)).expand(B)),
    "sample": (Weighting(4.0, "sample"), lambda kl, beta: beta * kl.sum(1).clamp_min(4.0)),
    "capacity": (Weighting(capacity=4.0), lambda kl, beta: (beta * (kl.sum(1).mean() - 4.0).abs()).expand(B)),
    "capacity of samples": (Weighting(capacity=4.0, capacity_per="sample"), lambda kl, beta: beta * (kl.sum(1) - 4.0).abs()),
}
WHOLE_BATCH = "dimension", "channel", "batch", "much of a batch", "capacity"
ONE_BETA = "channel", "batch", "much of a batch", "sample", "capacity", "capacity of samples"


def weighted_truth(name, elements, beta, reduction):
    """Elements alone, with no knowledge of what they are made of."""
    per_sample = WEIGHTINGS[name][1](elements, beta)
    return per_sample if reduction == "none" else per_sample.sum() * factor_of(reduction, elements)


def terms(latents, kind, posterior, weighting, beta, reduction, statistics=False):
    """As the objective calls it, and times beta, as there."""
    prior = None if kind is None else prior_for(kind, posterior, *latents[2:])
    latents, tensors = check_latents(*latents[:2], posterior, prior)
    beta = check_beta(beta, tensors[0])
    weighting = check_weighting(weighting, tensors[0], prior is not None, beta, reduction)
    kl, weighted, found = divergence_terms(
        latents, tensors, weighting=weighting, beta=beta, reduction=reduction, statistics=statistics
    )
    each = isinstance(beta, torch.Tensor) and beta.dim() > 0
    return kl, weighted if each else beta * weighted, found


def cases():
    """All; of the interpreter, which takes its time, those that differ in what the kernels compute."""
    for name in WEIGHTINGS:
        for reduction in ("batchmean", "none") if INTERPRETED else ("sum", "batchmean", "mean", "none"):
            for beta in ("tensor", "dimensions") if INTERPRETED else ("number", "tensor", "dimensions"):
                if (reduction == "none" and name in WHOLE_BATCH) or (beta == "dimensions" and name in ONE_BETA):
                    continue
                yield name, reduction, beta


@pytest.mark.parametrize("statistics", (False, True), ids=("", "statistics"))
@pytest.mark.parametrize("kind", (None, "pair"))
@pytest.mark.parametrize(("name", "reduction", "beta"), list(cases()))
def test_weightings(name, reduction, beta, kind, statistics, device):
    latents = make_latents("logvar", (B, D), torch.float64, device)
    beta = 0.3 if beta == "number" else torch.rand(
        (D,) if beta == "dimensions" else (), dtype=torch.float64, device=device).requires_grad_()  # fmt: skip
    elements = naive("logvar", kind, *latents)
    expected_kl = REDUCED[reduction](elements)
    expected = weighted_truth(name, elements, beta, reduction)
    kl, weighted, found = terms(latents, kind, "logvar", WEIGHTINGS[name][0], beta, reduction, statistics)
    torch.testing.assert_close((kl, weighted), (expected_kl, expected))
    wrt = [*inputs_of(kind, latents), *([beta] if isinstance(beta, torch.Tensor) else [])]
    upstream = torch.randn_like(weighted)
    # The KL and what is made of it may both be used, together and each alone.
    for outputs, truths in (((weighted,), (expected,)), ((kl, weighted), (expected_kl, expected)), ((kl,), (expected_kl,))):
        got, wanted = (torch.autograd.grad(o, wrt, [upstream] * len(o), retain_graph=True, allow_unused=True)
                       for o in (outputs, truths))  # fmt: skip
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)
    assert (found is not None) == statistics
    if statistics:
        mu = latents[0].detach()
        torch.testing.assert_close(tuple(found[:3]), (elements.sum(0).detach(), mu.sum(0), mu.square().sum(0)))
        assert found.batch == B and not any(t.requires_grad for t in found[:3])


@pytest.mark.parametrize("kind", ("pair", "normal"))
@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_balance(name, reduction, kind, device):
    """The sum of two terms, each of which stops the gradient of one of the two distributions."""
    if reduction == "none" and name in WHOLE_BATCH:
        return
    a, b = 0.1, 0.5
    latents = mu, second, prior_mu, prior_std = make_latents("std", (B, D), torch.float64, device)
    kl, weighted, _ = terms(latents, kind, "std", replace(WEIGHTINGS[name][0], balance=(a, b)), 0.3, reduction)
    elements = naive("std", "pair", *latents)
    to_posterior = naive("std", "pair", mu, second, prior_mu.detach(), prior_std.detach())
    to_prior = naive("std", "pair", mu.detach(), second.detach(), prior_mu, prior_std)
    expected = a * weighted_truth(name, to_posterior, 0.3, reduction) + b * weighted_truth(name, to_prior, 0.3, reduction)
    torch.testing.assert_close((kl, weighted), (REDUCED[reduction](elements), expected))
    upstream = torch.randn_like(weighted)
    for o, t in (((weighted,), (expected,)), ((kl, weighted), (REDUCED[reduction](elements), expected))):
        got, wanted = (torch.autograd.grad(x, latents, [upstream] * len(x), retain_graph=True) for x in (o, t))
        torch.testing.assert_close(got, wanted)
    got, wanted = (
        torch.autograd.grad(gradients(t.sum(), mu, create_graph=True)[0].square().sum(), latents, materialize_grads=True)
        for t in (weighted, expected)
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_finite_differences_of_weightings(check, name, device):
    if check is gradgradcheck and BACKEND == "triton" and name != "capacity":
        pytest.skip("the second derivative is the formula's")
    latents = make_latents("logvar", (2, 2), torch.float64, device)
    beta = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)

    def function(beta, *latents):
        return terms(latents, "pair", "logvar", WEIGHTINGS[name][0], beta, "batchmean")[:2]

    assert check(function, (beta, *latents))


def test_a_capacity_that_changes(device):
    """A 0-d tensor, as a schedule keeps it: also one that is learned."""
    latents = make_latents("logvar", (B, D), torch.float64, device)
    capacity = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
    elements = naive("logvar", None, *latents)
    for per, expected in (
        ("batch", (elements.sum(1).mean() - capacity).abs()),
        ("sample", (elements.sum(1) - capacity).abs().mean()),
    ):
        _, weighted, _ = terms(latents, None, "logvar", Weighting(capacity=capacity, capacity_per=per), 2.0, "batchmean")
        torch.testing.assert_close(weighted, 2 * expected)
        torch.testing.assert_close(gradients(weighted, capacity), gradients(2 * expected, capacity))


@pytest.mark.parametrize("name", ("sample_kl", "loss", "kl_divergence"))
def test_gradient_penalties_of_a_distance(name, device):
    """The derivative of a sign, which is a symbol for zeros and has no memory."""
    mu, logvar, *_ = latents = make_latents("logvar", (B, D), torch.float64, device)
    kl = {
        "sample_kl": lambda: fastelbo.sample_kl(mu, logvar).kl,
        "loss": lambda: fastelbo.loss(mu, mu.detach(), mu, logvar, likelihood="mse").kl,
        "kl_divergence": lambda: kl_divergence(mu, logvar),
    }[name]()
    penalties = [
        gradients((k - 4.0).abs(), mu, create_graph=True)[0].square().sum() for k in (kl, naive("logvar", None, *latents).sum())
    ]
    torch.testing.assert_close(*(torch.autograd.grad(p, (mu, logvar), materialize_grads=True) for p in penalties))


def test_betas_of_groups(device):
    """One for each channel of latents with a place."""
    latents = make_latents("logvar", (2, 3, 4, 5), torch.float64, device)
    beta = torch.rand(3, 1, 1, dtype=torch.float64, device=device, requires_grad=True)
    expected = (beta * naive("logvar", None, *latents)).sum((1, 2, 3))
    for reduction, truth in (("none", expected), ("batchmean", expected.mean())):
        _, weighted, _ = terms(latents, None, "logvar", None, beta, reduction)
        torch.testing.assert_close(weighted, truth)
        torch.testing.assert_close(gradients(weighted.sum(), beta), gradients(truth.sum(), beta, retain_graph=True))


@pytest.mark.parametrize("statistics", (False, True), ids=("", "statistics"))
def test_free_bits_of_channels(statistics, device):
    """Of latents with a place, whose positions are added up first."""
    latents = make_latents("logvar", (2, 3, 4, 5), torch.float64, device)
    channels = naive("logvar", None, *latents).sum((2, 3)).mean(0)
    floor = channels.detach().median().item() + 1e-3
    _, weighted, _ = terms(latents, None, "logvar", Weighting(floor, "channel"), 0.3, "batchmean", statistics)
    expected = 0.3 * channels.clamp_min(floor).sum()
    torch.testing.assert_close(weighted, expected)
    torch.testing.assert_close(gradients(weighted, *latents[:2]), gradients(expected, *latents[:2]))


@pytest.mark.parametrize("statistics", (False, True), ids=("", "statistics"))
def test_free_bits_of_many_dimensions(statistics, device):
    """Several blocks of columns, and several programs for each."""
    latents = make_latents("logvar", (40, 300), torch.float64, device)
    dimensions = naive("logvar", None, *latents).mean(0)
    floor = dimensions.detach().median().item() + 1e-3
    for _ in range(2):  # and the counters are ready for the next call
        kl, weighted, found = terms(latents, None, "logvar", Weighting(floor, "dimension"), 1.0, "batchmean", statistics)
        expected = dimensions.clamp_min(floor).sum()
        torch.testing.assert_close((kl, weighted), (dimensions.sum(), expected))
        torch.testing.assert_close(gradients(weighted, *latents[:2]), gradients(expected, *latents[:2], retain_graph=True))
    if statistics:
        torch.testing.assert_close(found.kl, 40 * dimensions.detach())


def test_free_bits_at_the_floor(device):
    """What is below has no gradient, not even where a collapsed posterior is exactly its prior; NaN is not below."""
    mu = torch.tensor([[0.0, 2.0], [0.1, math.nan]], device=device, requires_grad=True)
    logvar = torch.zeros_like(mu).requires_grad_()
    _, weighted, _ = terms((mu, logvar), None, "logvar", Weighting(free_bits=0.5), 1.0, "none")
    torch.testing.assert_close(weighted.detach().cpu(), torch.tensor([2.5, math.nan]), equal_nan=True)
    expected = torch.tensor([[0.0, 2.0], [0.0, math.nan]])
    torch.testing.assert_close(gradients(weighted.sum(), mu)[0].cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_empty_batch(name, device):
    latents = make_latents("logvar", (0, 3), device=device)
    for reduction, value in (("sum", 0.0), ("batchmean", math.nan)):
        kl, weighted, found = terms(latents, None, "logvar", WEIGHTINGS[name][0], 1.0, reduction, statistics=True)
        expected = torch.tensor(value)
        torch.testing.assert_close((kl.detach().cpu(), weighted.detach().cpu()), (expected, expected), equal_nan=True)
        assert [t.shape for t in found[:3]] == [(3,)] * 3
        assert gradients(weighted, latents[0])[0].shape == (0, 3)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_dtypes(name, dtype, device):
    latents = make_latents("std", (B, D), dtype, device, spread=0.3)
    weighting = replace(WEIGHTINGS[name][0], balance=(1.0, 2.0))
    kl, weighted, _ = terms(latents, "pair", "std", weighting, 0.5, "batchmean")
    exact = [t.detach().double().requires_grad_() for t in latents]
    elements = naive("std", "pair", *exact)
    assert (kl.dtype, weighted.dtype) == (torch.float32,) * 2
    assert relative(kl, elements.sum() / B) < 1e-6
    assert relative(weighted, 3 * weighted_truth(name, elements, 0.5, "batchmean")) < 1e-6
    got, wanted = gradients(weighted, *latents), gradients(weighted_truth(name, elements, 0.5, "batchmean"), *exact)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.dtype == dtype
        assert relative(a, b * (1.0 if i < 2 else 2.0)) < 2 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_compiled(name, device):
    latents = make_latents("logvar", (B, D), device=device)
    weighting = replace(WEIGHTINGS[name][0], balance=(0.2, 0.8))

    def function(*latents):
        kl, weighted, found = terms(latents, "pair", "logvar", weighting, 0.5, "batchmean", statistics=True)
        return kl + weighted, found.kl

    torch.compiler.reset()
    got, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*latents), function(*latents)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got[0], *latents), gradients(expected[0], *latents))


A = torch.zeros(2, 3)
PRIOR = (A, A)
EACH = torch.ones(3)
MISUSE = (
    ({"weighting": 0.5}, TypeError, "weighting must be a Weighting, got float"),
    ({"weighting": Weighting(1.0, "sample"), "beta": EACH}, ValueError, "needs a beta that is one number"),
    ({"weighting": Weighting(1.0, "dimension"), "reduction": "none"}, ValueError, "Weighting.free_bits_per='dimension'"),
    ({"weighting": Weighting(capacity=1.0), "beta": EACH}, ValueError, "Weighting.capacity needs a beta that is one number"),
    ({"weighting": Weighting(capacity=1.0), "reduction": "none"}, ValueError, "Weighting.capacity_per='batch'"),
    ({"weighting": Weighting(balance=(0.2, 0.8)), "kind": None}, ValueError, "Weighting.balance needs a prior"),
    ({"beta": torch.ones(2)}, ValueError, r"beta must be a number, a 0-d tensor or a tensor that broadcasts to a sample of mu"),
    ({"beta": torch.ones(2, 3)}, ValueError, "beta must be a number, a 0-d tensor"),
    ({"beta": EACH.to("meta")}, ValueError, "beta must be on the device of mu"),
    ({"beta": EACH.cfloat()}, TypeError, "beta must be a tensor of booleans"),
    ({"beta": "a"}, TypeError, "beta must be a number or a 0-d tensor, got str"),
)  # fmt: skip
MISMADE = (
    (lambda: Weighting(-1.0), ValueError, "Weighting.free_bits must not be negative, got -1.0"),
    (lambda: Weighting("a"), TypeError, "Weighting.free_bits must be a number or None, got str"),
    (lambda: Weighting(1.0, "batches"), ValueError, "Weighting.free_bits_per must be one of 'element'"),
    (lambda: Weighting(1.0, capacity=1.0), ValueError, "Weighting.free_bits and Weighting.capacity exclude each other"),
    (lambda: Weighting(capacity=EACH), ValueError, "Weighting.capacity must be a number or a 0-d tensor, got"),
    (lambda: Weighting(capacity=-1.0), ValueError, "Weighting.capacity must not be negative"),
    (lambda: Weighting(capacity=1.0, capacity_per="element"), ValueError, "Weighting.capacity_per must be one of"),
    (lambda: Weighting(balance=0.8), ValueError, r"Weighting.balance must be a pair \(posterior, prior\)"),
    (lambda: Weighting(balance=(0.0, 0.0)), ValueError, "Weighting.balance must be two numbers that are not negative"),
    (lambda: Weighting(balance=(-1.0, 2.0)), ValueError, "Weighting.balance must be two numbers that are not negative"),
    (lambda: Weighting(balance=("a", 1.0)), TypeError, r"Weighting.balance\[0\] must be a number, got str"),
)  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), MISUSE, ids=str)
def test_misuse(arguments, error, message):
    arguments = {"kind": "pair", "posterior": "logvar", "weighting": None, "beta": 1.0, "reduction": "sum"} | arguments
    with pytest.raises(error, match=message):
        terms((A, A, A, A), **arguments)


@pytest.mark.parametrize(("make", "error", "message"), MISMADE)
def test_a_weighting_is_checked_where_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("reduction", ("x", None), ids=str)
def test_unknown_reduction(reduction):
    words = f"reduction must be one of 'sum', 'batchmean', 'mean', 'none', 'dimension', 'element'; got {reduction!r}"
    with pytest.raises(ValueError, match=words):
        kl_divergence(A, A, reduction=reduction)


def test_statistics_are_of_the_pass_that_computes_the_kl(monkeypatch, device):
    """One launch reads mu and logvar, where the plain KL, free bits of dimensions, a capacity or betas are asked for."""
    if BACKEND != "triton":
        pytest.skip("about the kernels")
    from fastelbo.kernels import divergence
    from fastelbo.kernels.direct import Launch

    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), call(self, *args)))
    latents = make_latents("logvar", (B, D), device=device)
    for name in ("plain", "dimension", "capacity"):
        launches.clear()
        terms(latents, "pair", "logvar", WEIGHTINGS[name][0], 1.0, "sum", statistics=True)
        assert launches == [divergence.columns_kernel]
    for name in ("plain", "element", "sample", "capacity", "capacity of samples"):
        launches.clear()
        terms(latents, "pair", "logvar", replace(WEIGHTINGS[name][0], balance=(0.2, 0.8)), 1.0, "sum")
        assert launches == [divergence.divergence_fwd_kernel]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="a kernel is either interpreted or compiled")
@pytest.mark.parametrize("turn, target", list(enumerate(("sm_80", "sm_90", "sm_100", "gfx942"))))
def test_kernels_compile_without_spills(turn, target):
    """Each in two of the architectures, in turns; in all of them by `make budget`."""
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    from bench.assembly import spilled_bytes
    from bench.compiled import compile_for, record
    from fastelbo.kernels import Divergence

    def calls(dtype, posterior, clamp, prior, rows):
        result = torch.float64 if dtype == torch.float64 else torch.float32
        mu, seed, one = torch.zeros(128, 20, dtype=dtype), torch.zeros((), dtype=torch.int64), torch.ones((), dtype=result)
        values = (None, None) if prior is None else (torch.zeros(rows, 20, dtype=dtype),) * 2
        form = {"posterior": posterior, "clamp": clamp, "prior": prior, "kl_scale": 1.0, "dtype": result, "shares": (1.0, 2.0)}
        summed = Divergence(mu, mu, *values, None, kind="sum", floor=0.5, free_bits=None, **form)
        yield lambda: summed.forward(mu, mu, seed, *values, None)
        yield lambda: summed.backward(mu, one, one, mu, mu, seed, *values, None, (prior is not None,) * 2)
        for free_bits in (None, 0.5):
            columns = Divergence(mu, mu, *values, None, kind="column", floor=None, free_bits=free_bits, **form)
            yield lambda columns=columns: columns.columns(mu, mu, *values, None, True)
        yield lambda: columns.backward(None, one, one, mu, mu, None, *values, None, (prior is not None,) * 2, mu[0])

    forms = (
        (torch.float32, "var", (1e-3, 10.0), "var", 128),
        (torch.bfloat16, "std", None, "std", 128),
        (torch.float64, "std", None, "std", 1),
        (torch.float64, "logvar", (-30.0, torch.inf), "logvar", 128),
    )
    # The assembler for Blackwell that Triton 3.6 has keeps one backward to 80 registers, to fit one more program on a
    # multiprocessor, and spills two numbers.
    allowed = 8 if target == "sm_100" and version("triton") < "3.7" else 0
    for i, call in enumerate(call for form in forms for call in calls(*form)):
        if (i + turn) % 2 == 0 or os.environ.get("EVERY_KERNEL") == "1":
            assert spilled_bytes(compile_for(target, record(call))) <= allowed
