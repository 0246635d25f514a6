"""The monitor: what it says of calls is what the definitions say of all their data together."""

import math
import warnings

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import fastelbo
from fastelbo import ELBO, Weighting
from fastelbo.diagnostics import CollapseWarning, Monitor
from support import gradients


def batches(device, count=3):
    for i in range(count):
        mu = torch.randn(4 + i, 3, 2, device=device) * torch.tensor([1.0, 0.01], device=device) + 5
        yield torch.rand(4 + i, 6, device=device), torch.rand(4 + i, 6, device=device), mu, torch.randn_like(mu)


def truth(seen):
    recon_x, x, mu, logvar = (torch.cat(t).double() for t in zip(*seen, strict=True))
    kl = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(0.0, 1.0)).mean(0)
    recon = torch.nn.functional.binary_cross_entropy(recon_x, x, reduction="none")
    return kl, mu.var(0, correction=0), recon


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean", "none"))
@pytest.mark.parametrize("function", ("loss", "elbo"))
def test_an_epoch(function, reduction, device):
    monitor, seen = Monitor(), list(batches(device))
    for recon_x, x, mu, logvar in seen:
        if function == "loss":
            fastelbo.loss(recon_x, x, mu, logvar, monitor=monitor, reduction=reduction)
        else:
            fastelbo.elbo(lambda z, p=recon_x: p + 0 * z.sum(), x, mu, logvar, monitor=monitor, reduction=reduction)
    kl, variance, recon = truth(seen)
    torch.testing.assert_close(monitor.kl_per_dimension, kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(monitor.kl, kl.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(monitor.mean_variance, variance, rtol=1e-3, atol=1e-5)
    assert monitor.active_units() == (variance > 0.01).sum() == 3
    assert monitor.active_units(1e9) == 0
    torch.testing.assert_close(monitor.recon, recon.sum(1).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(monitor.bits_per_dimension, recon.mean() / math.log(2), rtol=1e-5, atol=0)


def test_the_loss_is_the_same_with_a_monitor(device):
    for recon_x, x, mu, logvar in batches(device):
        mu.requires_grad_(), logvar.requires_grad_(), recon_x.requires_grad_()
        plain = fastelbo.loss(recon_x, x, mu, logvar, 0.3)
        watched = fastelbo.loss(recon_x, x, mu, logvar, 0.3, monitor=Monitor())
        torch.testing.assert_close(plain, watched)
        torch.testing.assert_close(*(gradients(t.loss, recon_x, mu, logvar) for t in (plain, watched)))


OPTIONS = ({}, {"weighting": Weighting(0.1)}, {"weighting": Weighting(0.1, "dimension")}, {"reduction": "none"})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("function", ("loss", "elbo", "several samples"))
def test_padded_time_steps(function, options, device):
    """Each step's means are over the sequences that have it, and what lies in the padding does not count."""
    monitor, seen = Monitor(), []
    for recon_x, x, mu, logvar in batches(device):
        weight = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]], device=device)[torch.arange(len(mu)) % 2].unsqueeze(-1)
        mu, logvar = (t.masked_fill(weight == 0, math.nan) for t in (mu, logvar))
        given = {"kl_weight": weight, "monitor": monitor, **options}
        if function == "loss":
            fastelbo.loss(recon_x, x, mu, logvar, **given)
        else:
            bound = ELBO(2) if function == "several samples" else None
            fastelbo.elbo(
                lambda z, p=recon_x: p.repeat(z.shape[0] // len(p), 1), x, mu, logvar, bound=bound,
                eps=None if bound is None else torch.zeros(2, *mu.shape, device=device), **given,
            )  # fmt: skip
        seen.append((mu, logvar, weight.expand(mu.shape)))
    mu, logvar, weight = (torch.cat(t).double() for t in zip(*seen, strict=True))
    mu, logvar = (t.nan_to_num(0.0) for t in (mu, logvar))
    kl = weight * kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(0.0, 1.0))
    mean = (weight * mu).sum(0) / weight.sum(0)
    variance = (weight * (mu - mean).square()).sum(0) / weight.sum(0)
    torch.testing.assert_close(monitor.kl_per_dimension, kl.sum(0) / weight.sum(0), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(monitor.kl, kl.sum() / len(mu), rtol=1e-5, atol=0)
    torch.testing.assert_close(monitor.mean_variance, variance, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert monitor.active_units() == 2  # the first dimension of two steps
    assert not monitor.is_collapsed(share=0.4) and monitor.is_collapsed(share=0.6)  # of the four that have counted


def test_bits_of_what_is_not_masked(device):
    monitor = Monitor()
    recon_x, x, mu, logvar = next(batches(device))
    weight = torch.tensor([1, 1, 0, 0, 1, 0], device=device)
    fastelbo.loss(recon_x, x, mu, logvar, weight=weight, reduction="mean", monitor=monitor)
    expected = torch.nn.functional.binary_cross_entropy(recon_x[:, weight == 1].double(), x[:, weight == 1].double())
    torch.testing.assert_close(monitor.bits_per_dimension, expected / math.log(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean", "none"))
@pytest.mark.parametrize("name", ("weights", "labels", "width", "several samples", "optimal"))
def test_a_batch_of_nothing(name, reduction, device):
    """It adds samples, and neither nats nor elements, though a mean over it is NaN."""
    monitor, latents = Monitor(), torch.randn(4, 2, device=device)
    x, options = torch.rand(4, 6, device=device), {"likelihood": "mse", "weight": torch.ones(4, 1, device=device)}
    prediction, nothing = torch.rand_like(x), {"weight": torch.zeros(4, 1, device=device)}
    if name == "labels":
        x, prediction = torch.tensor([0, 1, 2, 0], device=device), torch.randn(4, 3, device=device)
        options, nothing = {"likelihood": "categorical"}, {"x": torch.full_like(x, -100)}
    elif name == "width":
        nothing = {"x": x[:, :0], "prediction": prediction[:, :0]}
    elif name == "optimal":
        options["likelihood"] = fastelbo.likelihoods.Gaussian("optimal")
    found = []
    for changed in ({}, nothing, {}):
        given = {"x": x, "prediction": prediction} | options | changed
        target, p = given.pop("x"), given.pop("prediction")
        if name == "several samples":
            decode = lambda z, p=p: p.repeat(z.shape[0] // len(p), 1)  # noqa: E731
            fastelbo.elbo(decode, target, latents, latents, bound=ELBO(2), **given, reduction=reduction, monitor=monitor)
        else:
            fastelbo.loss(p, target, latents, latents, **given, reduction=reduction, monitor=monitor)
        found.append((monitor.recon, monitor.bits_per_dimension))
    torch.testing.assert_close(found[1], (found[0][0] / 2, found[0][1]))
    torch.testing.assert_close(found[2], (found[0][0] * 2 / 3, found[0][1]))


def test_reset(device):
    monitor, seen = Monitor(), list(batches(device))
    for recon_x, x, mu, logvar in seen:
        monitor.reset()
        fastelbo.loss(recon_x, x, mu, logvar, monitor=monitor)
    torch.testing.assert_close(monitor.kl_per_dimension, truth(seen[-1:])[0], rtol=1e-5, atol=1e-6)


def test_warning_of_collapse(device):
    monitor = Monitor()
    x = torch.rand(8, 6, device=device)
    mu = torch.randn(8, 20, device=device) * 1e-3
    fastelbo.loss(x, x, mu, torch.zeros_like(mu), monitor=monitor)
    assert monitor.is_collapsed()
    with pytest.warns(CollapseWarning, match="only 0 of 20 latent dimensions vary by more than 0.01 over 8 samples"):
        monitor.warn_if_collapsed()
    with warnings.catch_warnings():
        monitor.warn_if_collapsed(threshold=0.0)


def test_errors(device):
    monitor = Monitor()
    with pytest.raises(RuntimeError, match="monitor has seen no call"):
        monitor.recon  # noqa: B018
    x = torch.rand(4, 3, device=device)
    fastelbo.loss(x, x, kl=torch.zeros((), device=device), monitor=monitor)
    assert monitor.recon.item() > 0
    with pytest.raises(RuntimeError, match="monitor has seen no posterior"):
        monitor.kl  # noqa: B018
    fastelbo.loss(x, x, x, x, monitor=monitor)
    seen = monitor.recon.item(), monitor.bits_per_dimension.item(), monitor.kl.item()
    with pytest.raises(ValueError, match=r"latents of one shape.*\(2,\) after \(3,\)"):
        fastelbo.loss(x / 2, x, x[:, :2], x[:, :2], monitor=monitor)
    assert (monitor.recon.item(), monitor.bits_per_dimension.item(), monitor.kl.item()) == seen  # nothing of that call
    with pytest.raises(TypeError, match="monitor must be a Monitor, got dict"):
        fastelbo.loss(x, x, x, x, monitor={})
