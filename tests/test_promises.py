"""What autograd promises, lines 3 to 7: subsets of inputs, retained graphs, separate outputs, untouched inputs, NaN and inf."""

import contextlib
import itertools

import pytest
import torch

import fastelbo
from support import (
    LIKELIHOODS,
    ContiguousWhenUnpacked,
    as_double,
    gradients,
    make_inputs,
    naive,
    options,
    recorded_allocations,
    relative,
)


@pytest.mark.parametrize(
    "needs", [n for n in itertools.product((False, True), repeat=5) if any(n)], ids=lambda n: "".join("01"[b] for b in n)
)
def test_any_subset_of_inputs(needs, device):
    """Promise 3, for recon_x, x, mu, logvar and beta: a gradient for each that requires one, and for no other."""
    likelihood = "bernoulli_logits"
    results = []
    for function in (fastelbo.loss, naive):
        torch.manual_seed(0)
        inputs = [
            t.detach().requires_grad_(n)
            for t, n in zip(make_inputs(likelihood, (5, 9), (5, 3), device=device), needs, strict=False)
        ]
        beta = torch.tensor(0.3, device=device, requires_grad=needs[4])
        function(*inputs, beta, **options(likelihood))[0].backward()
        results.append([t.grad for t in (*inputs, beta)])
    for got, expected, need in zip(*results, needs, strict=True):
        assert (got is not None) == need
        if need:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradient_of_the_target(likelihood, device):
    recon_x, x, mu, logvar = make_inputs(likelihood, (5, 9), (5, 3), device=device)
    x.requires_grad_()
    got = gradients(fastelbo.loss(recon_x, x, mu, logvar, **options(likelihood, target_scale=0.5)).loss, x)[0]
    expected = gradients(naive(recon_x, 0.5 * x, mu, logvar, **options(likelihood))[0], x)[0]
    torch.testing.assert_close(got, expected)


def test_retained_graph_with_another_factor(device):
    """Promise 4: the first gradient is the user's by then and stays as it is."""
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    loss = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse").loss
    true = 2 * (recon_x - x).detach()
    first = gradients(loss, recon_x, grad_outputs=torch.tensor(1.0, device=device), retain_graph=True)[0]
    second = gradients(loss, recon_x, grad_outputs=torch.tensor(5.0, device=device), retain_graph=True)[0]
    first *= 10  # whatever the user does with it
    third = gradients(loss, recon_x, grad_outputs=torch.tensor(1.0, device=device))[0]
    torch.testing.assert_close(first, 10 * true)
    torch.testing.assert_close(second, 5 * true)
    torch.testing.assert_close(third, true)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, recon_x)


@pytest.mark.usefixtures("by_functions")
def test_stored_gradient_becomes_grad_without_a_copy(device, monkeypatch):
    allocated = recorded_allocations(monkeypatch)
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse").loss.backward()
    assert recon_x.grad.data_ptr() in [address for shape, address in allocated if shape == (5, 9)]


def test_adaptive_weight_from_the_last_layer(device):
    """As VQ-GAN does: the gradient of the reconstruction at the last layer, before the backward of it all."""
    results = []
    for function in (fastelbo.loss, naive):
        torch.manual_seed(0)
        _, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
        layer = torch.nn.Linear(3, 9, device=device)
        loss, recon, _ = function(layer(mu), x, mu, logvar, 0.1, likelihood="mse")
        weight = gradients(recon, layer.weight, retain_graph=True)[0].norm()
        (loss * weight.detach()).backward()
        results.append((weight, layer.weight.grad, layer.bias.grad, mu.grad, logvar.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("coefficients", [c for c in itertools.product((None, 2.0), repeat=3) if any(c)], ids=str)
def test_outputs_used_apart_and_together(coefficients, reduction, device):
    """Promise 5, and never a silent None where the naive code has a gradient."""
    results = []
    for function in (fastelbo.loss, naive):
        torch.manual_seed(0)
        inputs = make_inputs("mse", (5, 9), (5, 3), device=device)
        terms = function(*inputs, 0.3, likelihood="mse", **({"reduction": reduction} if function is fastelbo.loss else {}))
        total = sum(c * t.sum() for c, t in zip(coefficients, terms, strict=True) if c is not None)
        results.append(gradients(total, inputs[0], inputs[2], inputs[3], allow_unused=True))
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


def test_outputs_are_not_used_at_all(device):
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse")
    fastelbo.sample_kl(mu, logvar)
    (recon_x.sum() + mu.sum()).backward()
    assert recon_x.grad.eq(1).all()
    assert mu.grad.eq(1).all()
    assert logvar.grad is None


def test_no_input_is_written(device):
    """Promise 6: neither in value nor in version."""
    recon_x, x, mu, logvar = make_inputs("bernoulli", (5, 9), (5, 3), device=device)
    beta = torch.tensor(0.5, device=device, requires_grad=True)
    eps = torch.randn_like(mu)
    inputs = (recon_x, x, mu, logvar, beta, eps)
    before = [(t.detach().clone(), t._version) for t in inputs]
    loss, _, kl = fastelbo.loss(recon_x, x, mu, logvar, beta)
    z, kl2 = fastelbo.sample_kl(mu, logvar, eps=eps)
    (loss * 3 + kl + z.sum() + kl2).backward()
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def test_outputs_may_be_written(device):
    """Users do `kl /= n`: the other outputs and all gradients stay right."""
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    beta = torch.tensor(0.5, device=device, requires_grad=True)
    loss, recon, kl = fastelbo.loss(recon_x, x, mu, logvar, beta, likelihood="mse")
    values = [t.item() for t in (loss, recon, kl)]
    kl /= 5
    recon *= 2
    assert [loss.item(), recon.item(), kl.item()] == pytest.approx([values[0], 2 * values[1], values[2] / 5])
    (loss + kl + recon).backward()
    torch.testing.assert_close(recon_x.grad, 3 * 2 * (recon_x - x).detach())
    torch.testing.assert_close(mu.grad, (0.5 + 0.2) * mu.detach())
    torch.testing.assert_close(beta.grad.item(), values[2])
    z, kl = fastelbo.sample_kl(mu, logvar, eps=torch.ones_like(mu))
    z *= 2
    kl /= 5
    (gradient,) = gradients(z.sum() + kl, mu)
    torch.testing.assert_close(gradient, 2 + mu.detach() / 5)


def test_an_input_changed_before_backward_is_noticed(device):
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    loss = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse").loss
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")), ids=str)
@pytest.mark.parametrize("argument", range(4), ids=("recon_x", "x", "mu", "logvar"))
@pytest.mark.parametrize("likelihood", ("bernoulli_logits", "mse", "gaussian"))
def test_nan_and_inf_are_no_finite_lie(likelihood, argument, bad, device):
    """Promise 7, at the first element, inside, and in the tail."""
    for position in (0, 700, -1):
        inputs = [t.detach() for t in make_inputs(likelihood, (3, 505), (3, 333), device=device)]
        inputs[argument].view(-1)[position] = bad
        got, expected = fastelbo.loss(*inputs, **options(likelihood)), naive(*inputs, **options(likelihood))
        assert not got.loss.isfinite()
        for a, b in zip(got, expected, strict=True):
            assert bool(a.isfinite()) == bool(b.isfinite())
        if argument >= 2:
            assert not fastelbo.sample_kl(*inputs[2:]).kl.isfinite()


def test_nan_probability_is_nan(device):
    recon_x, x, mu, logvar = (t.detach() for t in make_inputs("bernoulli", (3, 505), (3, 3), device=device))
    recon_x[1, 3] = float("nan")
    assert fastelbo.loss(recon_x, x, mu, logvar).loss.isnan()


def test_vanishing_variance_samples_the_mean(device):
    mu = torch.randn(3, 7, device=device)
    logvar = torch.full_like(mu, -float("inf"))
    assert torch.equal(fastelbo.reparameterize(mu, logvar), mu)


def test_no_grad_stores_nothing(device):
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            terms = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse")
            assert all(t.grad_fn is None for t in terms)
            assert relative(terms.loss, naive(*as_double(recon_x, x, mu, logvar), likelihood="mse")[0]) < 1e-6
            assert fastelbo.reparameterize(mu, logvar).grad_fn is None


@pytest.mark.parametrize("halves", (False, True), ids=("whole", "halves"))
def test_saved_tensors_that_come_back_in_another_layout(halves, device):
    h = torch.randn(2, 8, 3, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    other = torch.randn_like(h).requires_grad_()
    recon_x, x = (torch.randn(2, 8, 3, 5, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    recon_x.requires_grad_()
    results = []
    for hooks in (ContiguousWhenUnpacked(), contextlib.nullcontext()):
        with hooks:
            mu, logvar = h.chunk(2, 1) if halves else (h, other)
            torch.manual_seed(5)
            z, kl = fastelbo.sample_kl(mu, logvar)
            loss = fastelbo.loss(recon_x, x, kl=kl, likelihood="mse").loss * 7  # not what was guessed
        results.append(gradients(loss + (z * z.detach()).sum(), recon_x, h))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("halves", (False, True), ids=("whole", "halves"))
def test_create_graph_has_the_noise_of_forward_in_any_layout(halves, device):
    h = torch.randn(2, 4, 3, 3, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    mu, logvar = h.chunk(2, 1) if halves else (h, 0.5 * h)
    z = fastelbo.reparameterize(mu, logvar)
    upstream = torch.randn_like(z)
    plain = gradients(z, h, grad_outputs=upstream, retain_graph=True)
    torch.testing.assert_close(gradients(z, h, grad_outputs=upstream, create_graph=True), plain)


def test_a_default_device_is_not_for_what_is_allocated_inside(device):
    inputs = make_inputs("bernoulli", (3, 2**19), (3, 2**19), device=device)
    expected = fastelbo.loss(*inputs, reduction="none")
    with torch.device("meta"):
        eps = torch.zeros_like(inputs[2], device=device)
        terms = fastelbo.loss(*inputs, reduction="none")
        z, kl = fastelbo.sample_kl(inputs[2], inputs[3], eps=eps)
        grads = gradients(terms.loss.sum() + z.sum() + kl, *inputs[:1], *inputs[2:])
    assert all(torch.equal(a, b) for a, b in zip(terms, expected, strict=True))
    assert all(g.device == expected.loss.device for g in grads)
