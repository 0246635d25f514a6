"""Promises 1 and 2: first and second derivatives against finite differences, in float64."""

import pytest
import torch

import fastelbo
from support import LIKELIHOODS, gradcheck, gradgradcheck, gradients, make_inputs, options

REDUCTIONS = ("sum", "batchmean", "mean", "none", ("mean", "sum"))


def inputs_for(likelihood, device):
    recon_x, x, mu, logvar = make_inputs(likelihood, (2, 2), (2, 1), torch.float64, device)
    if likelihood == "bernoulli":  # away from the ends, where finite differences leave the domain
        recon_x, x = recon_x.detach().clamp(0.1, 0.9).requires_grad_(), x.clamp(0.1, 0.9)
    return recon_x, x.requires_grad_(), mu, logvar


# By what there is a gradient: with one by the target or beta the formula computes all, without it a backend.
@pytest.mark.parametrize("everything", (False, True), ids=("usual", "target and beta"))
@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss(check, reduction, likelihood, everything, device):
    recon_x, x, mu, logvar = inputs_for(likelihood, device)
    x.requires_grad_(everything)
    beta = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=everything)

    def function(recon_x, x, mu, logvar, beta):
        return fastelbo.loss(recon_x, x, mu, logvar, beta, reduction=reduction, **options(likelihood, target_scale=0.9))

    # The second backward through a graph computes what forward had stored anew, in another kernel: there a compiler may fuse
    # other products with sums, `x * target_scale - recon_x` for one, so that the last digits differ.
    assert check(function, (recon_x, x, mu, logvar, beta), nondet_tol=1e-12)


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
def test_loss_of_a_given_kl(check, device):
    recon_x, x, _, _ = inputs_for("mse", device)
    x.requires_grad_(False)
    kl = torch.rand(2, dtype=torch.float64, device=device, requires_grad=True)

    def function(recon_x, x, kl):
        return fastelbo.loss(recon_x, x, kl=kl, beta=0.3, likelihood="mse", reduction="none")

    assert check(function, (recon_x, x, kl))


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("given", (True, False), ids=("eps", "generated"))
@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_sample_kl(check, given, reduction, device):
    _, _, mu, logvar = inputs_for("mse", device)
    eps = torch.randn_like(mu).requires_grad_() if given else None

    def function(mu, logvar, *eps):
        torch.manual_seed(3)
        return fastelbo.sample_kl(mu, logvar, reduction=reduction, eps=eps[0] if eps else None)

    assert check(function, (mu, logvar, eps) if given else (mu, logvar))


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
def test_reparameterize(check, device):
    _, _, mu, logvar = inputs_for("mse", device)

    def function(mu, logvar):
        torch.manual_seed(3)
        return fastelbo.reparameterize(mu, logvar)

    assert check(function, (mu, logvar))


@pytest.mark.parametrize("everything", (False, True), ids=("usual", "target"))
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_elbo(likelihood, everything, device):
    _, x, mu, logvar = inputs_for(likelihood, device)
    x.requires_grad_(everything)
    weight = torch.randn(1, 2, dtype=torch.float64, device=device, requires_grad=True)
    eps = torch.randn_like(mu)

    def function(x, mu, logvar, weight):
        decoder = lambda z: torch.sigmoid(z @ weight)  # noqa: E731
        return fastelbo.elbo(decoder, x, mu, logvar, 0.7, eps=eps, reduction="none", **options(likelihood))

    assert gradcheck(function, (x, mu, logvar, weight))


def test_create_graph_gives_the_gradient_penalty_of_the_naive_code(device):
    """What `once_differentiable` would drop in silence: a term of the loss that is itself a gradient."""
    penalties = []
    for function in (fastelbo.loss, fastelbo.reference.elbo_loss):
        torch.manual_seed(1)
        recon_x, x, mu, logvar = make_inputs("mse", (4, 3), (4, 2), torch.float64, device)
        loss = function(recon_x, x, mu, logvar, 0.5, likelihood="mse")[0]
        grads = gradients(loss, recon_x, mu, create_graph=True)
        penalties.append(gradients(sum(g.square().sum() for g in grads), recon_x, mu))
    for got, expected in zip(*penalties, strict=True):
        torch.testing.assert_close(got, expected)


def test_create_graph_where_one_input_is_computed_from_another(device):
    """The prediction depends on mu, as it does in every VAE: each of the two paths counts once."""
    results = []
    for function in (fastelbo.loss, fastelbo.reference.elbo_loss):
        torch.manual_seed(1)
        _, x, mu, logvar = make_inputs("mse", (4, 3), (4, 3), torch.float64, device)
        loss = function(mu.sin(), x, mu, logvar, 0.5, likelihood="mse")[0]
        (gradient,) = gradients(loss, mu, create_graph=True)
        results.append((gradient, *gradients(gradient.square().sum(), mu)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
