"""Sums by functions of Torch's own, of few elements on a CPU, where a Function written in Python would cost more."""

import dataclasses

import pytest
import torch

import fastelbo
from conftest import BACKEND
from fastelbo.likelihoods import BernoulliLogits, find_likelihood
from support import gradients

pytestmark = pytest.mark.skipif(BACKEND != "torch" or torch.cuda.is_available(), reason="about Torch on a CPU")

KINDS = {
    "bernoulli": "bernoulli",
    "logits": "bernoulli_logits",
    "positives": BernoulliLogits(pos_weight=3.0),
    "mse": "mse",
    "l1": "l1",
}
LARGEST = {"bernoulli": 2**12, "logits": 2**16, "positives": 3 * 2**18, "mse": 2**18, "l1": 2**18}


def inputs(kind, *shape):
    torch.manual_seed(0)
    y, mu, logvar = torch.randn(shape), torch.randn(shape[0], 3), torch.randn(shape[0], 3)
    y = y.sigmoid() if kind == "bernoulli" else y
    return y.requires_grad_(), torch.rand(shape), mu.requires_grad_(), logvar.requires_grad_()


def is_by_torch(recon) -> bool:
    """Whether none of its graph's nodes is a Function written in Python."""
    node = recon.grad_fn
    return not hasattr(node, "_forward_cls") and all(not hasattr(f, "_forward_cls") for f, _ in node.next_functions)


@pytest.mark.parametrize("latents", ("posterior", "kl", "none"))
@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean"))
@pytest.mark.parametrize("kind", KINDS)
def test_terms(kind, reduction, latents):
    """Value and gradients of each term, against float64 formulas."""
    y, x, mu, logvar = inputs(kind, 5, 7)
    leaves = y, mu, logvar
    wide = [t.detach().double().requires_grad_() for t in leaves]
    likelihood = find_likelihood(KINDS[kind])
    recon = likelihood.nll(wide[:1], x.double()).sum()
    kl = 0.5 * (wide[1] ** 2 + wide[2].exp() - 1 - wide[2]).sum()
    sizes = {"sum": (1, 1), "batchmean": (5, 5), "mean": (35, 15)}[reduction]
    expected = [recon / sizes[0], kl / sizes[1]]
    options = {"likelihood": likelihood, "reduction": reduction}
    if latents == "none":
        found, expected, leaves, wide = [fastelbo.nll(y, x, **options)], expected[:1], leaves[:1], wide[:1]
        assert is_by_torch(found[0])
    else:
        expected.insert(0, 2.0 * expected[0] + 0.3 * expected[1])
        options |= {"beta": 0.3, "recon_weight": 2.0}
        if latents == "kl":
            given = fastelbo.kl_divergence(mu, logvar, reduction=reduction)
            found = fastelbo.loss(y, x, kl=given, **options)
            assert found.kl.data_ptr() != given.data_ptr()  # users may write to it
        else:
            found = fastelbo.loss(y, x, mu, logvar, **options)
        assert is_by_torch(found.recon)
    kept = {"retain_graph": True, "allow_unused": True}
    for got, true in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=0)
        for a, b in zip(gradients(got, *leaves, **kept), gradients(true, *wide, **kept), strict=True):
            assert (a is None or not a.any()) if b is None else torch.allclose(a.double(), b, rtol=1e-5, atol=1e-7)


WEIGHTED = ("bernoulli", "logits", "positives")  # those that Torch has with weights


@pytest.mark.parametrize("shape", ((5, 7), (5, 1), (7,), ()), ids=str)
@pytest.mark.parametrize("reduction", ("sum", "batchmean"))
@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights(kind, reduction, shape):
    y, x, *_ = inputs(kind, 5, 7)
    weight = torch.rand(shape) + 0.5
    if weight.numel() > 1:
        weight.view(-1)[1] = 0
    likelihood, wide = find_likelihood(KINDS[kind]), y.detach().double().requires_grad_()
    expected = (likelihood.nll((wide,), x.double()) * weight.double()).sum() / (5 if reduction == "batchmean" else 1)
    found = fastelbo.nll(y, x, likelihood=likelihood, weight=weight, reduction=reduction)
    assert is_by_torch(found)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (gradient,), (true,) = gradients(found, y), gradients(expected, wide)
    torch.testing.assert_close(gradient.double(), true, rtol=1e-5, atol=1e-7)
    assert not gradient[(weight == 0).expand(5, 7)].any()


@pytest.mark.parametrize("hidden", (float("nan"), float("inf"), 3.0))
@pytest.mark.parametrize("of_target", (False, True))
@pytest.mark.parametrize("kind", WEIGHTED)
def test_what_a_weight_of_0_hides(kind, of_target, hidden):
    y, x, *_ = inputs(kind, 5, 7)
    weight = torch.ones(5, 7)
    weight[1, 2] = 0
    expected = fastelbo.nll(y, x, likelihood=KINDS[kind], weight=weight)
    (true,) = gradients(expected, y)
    broken = x.clone() if of_target else y.detach().clone()
    broken[1, 2] = hidden
    y, x = (y, broken) if of_target else (broken.requires_grad_(), x)
    found = fastelbo.nll(y, x, likelihood=KINDS[kind], weight=weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, y)[0], true)


@pytest.mark.parametrize("kind", ("mse", "l1"))
def test_weights_that_torch_has_not(kind):
    y, x, *_ = inputs(kind, 5, 7)
    assert not is_by_torch(fastelbo.nll(y, x, likelihood=kind, weight=torch.rand(5, 7)))


def check_largest(kind, largest):
    for rows, expected in ((largest // 64, True), (largest // 64 + 1, False)):
        y, x, _, _ = inputs(kind, rows, 64)
        assert is_by_torch(fastelbo.nll(y, x, likelihood=KINDS[kind])) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_which_size_on_one_thread(kind):
    check_largest(kind, LARGEST[kind])


def test_up_to_which_size_on_several_threads():
    """Of which each operator waits for the last; and on one again, which has another limit for the same shape."""
    torch.set_num_threads(2)
    try:
        check_largest("logits", 2**17)
    finally:
        torch.set_num_threads(1)
    y, x, _, _ = inputs("logits", 2**11, 64)
    assert not is_by_torch(fastelbo.nll(y, x, likelihood="bernoulli_logits"))


def test_up_to_which_size_without_gradients(monkeypatch):
    called, form = [], BernoulliLogits.sum_by_torch
    monkeypatch.setattr(BernoulliLogits, "sum_by_torch", lambda *args: called.append(args) or form(*args))
    with torch.no_grad():
        for rows in (2**11, 2**11 + 1):  # as on several threads
            fastelbo.nll(torch.randn(rows, 64), torch.rand(rows, 64), likelihood="bernoulli_logits")
    assert len(called) == 1


@pytest.mark.parametrize("shape", ((4, 9), (4, 16), (4, 4099)), ids=str)
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("kind", ("logits", "positives"))
def test_small_sums_keep_their_digits(kind, weighted, shape):
    """Beside a logit of -20, Torch's function loses log(1 + exp(-20)), though not its derivative."""
    y, x = torch.full(shape, -20.0, requires_grad=True), torch.zeros(shape)
    weight = torch.full(shape, 0.5) if weighted else None
    assert torch.nn.functional.binary_cross_entropy_with_logits(y, x, reduction="sum").item() == 0
    recon = fastelbo.nll(y, x, likelihood=KINDS[kind], weight=weight)
    each, factor = torch.tensor(-20.0, dtype=torch.float64), 0.5 if weighted else 1.0
    true = y.numel() * factor * torch.log1p(each.exp())
    torch.testing.assert_close(recon.double(), true, rtol=1e-6, atol=0)
    assert is_by_torch(recon) == (kind == "logits")
    (slope,) = gradients(3.0 * recon, y)
    expected = (3.0 * factor * each.sigmoid()).expand(shape)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("hidden", (float("nan"), float("inf")))
def test_what_a_weight_of_0_hides_costs_a_small_sum_no_digits(hidden):
    y, x, weight = torch.full((4, 9), -20.0), torch.zeros(4, 9), torch.ones(4, 9)
    true = torch.log1p(torch.tensor(-20.0, dtype=torch.float64).exp())
    y[1, 2], weight[1, 2] = hidden, 0
    recon = fastelbo.nll(y, x, likelihood="bernoulli_logits", weight=weight)
    torch.testing.assert_close(recon.double(), 35 * true, rtol=1e-6, atol=0)


def test_a_target_that_requires_grad_costs_a_small_sum_no_digits():
    """It is computed by the formula."""
    x, true = torch.zeros(4, 9, requires_grad=True), torch.log1p(torch.tensor(-20.0, dtype=torch.float64).exp())
    recon = fastelbo.nll(torch.full((4, 9), -20.0), x, likelihood="bernoulli_logits")
    torch.testing.assert_close(recon.detach().double(), 36 * true, rtol=1e-6, atol=0)
    assert torch.equal(gradients(recon, x)[0], torch.full((4, 9), 20.0))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_elements_of_16_bits(kind, dtype):
    """The arithmetic is in float32, and a target in bytes is scaled there."""
    y, _, mu, logvar = inputs(kind, 5, 7)
    y, mu, logvar = (t.detach().to(dtype).requires_grad_() for t in (y, mu, logvar))
    x = torch.randint(0, 256, (5, 7), dtype=torch.uint8)
    likelihood = dataclasses.replace(find_likelihood(KINDS[kind]), target_scale=1 / 255)
    found = fastelbo.loss(y, x, mu, logvar, 0.3, likelihood=likelihood)
    assert is_by_torch(found.recon)
    wide = [t.detach().double().requires_grad_() for t in (y, mu, logvar)]
    recon = likelihood.nll(wide[:1], x.double() / 255).sum()
    kl = 0.5 * (wide[1] ** 2 + wide[2].exp() - 1 - wide[2]).sum()
    for got, true in zip(found, (recon + 0.3 * kl, recon, kl), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), true.detach(), rtol=1e-6, atol=0)
    for a, b in zip(gradients(found.loss, y, mu, logvar), gradients(recon + 0.3 * kl, *wide), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_under_a_default_device(kind):
    """What is made beside the inputs lies where they do."""
    y, x, *_ = inputs(kind, 2, 3)
    expected = fastelbo.nll(y, x, likelihood=KINDS[kind])
    with torch.device("meta"):
        found = fastelbo.nll(y, x, likelihood=KINDS[kind])
    assert torch.equal(found, expected)
