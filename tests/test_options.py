"""Options of a call in what users put around it: a compiler, torch.func, checkpoints and autocast, against float64 formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.utils.checkpoint import checkpoint

import fastelbo
from conftest import DEVICE
from fastelbo.likelihoods import DiscretizedLogistic, StudentT
from likelihood_cases import CASES

ROWS, LATENTS, D, L = 4, 2, 3, 5


def kl_of(mu, logvar):
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


# Each: the call of `p`, x, mu and logvar, and its formula.
OPTIONS = {
    "recon_weight": (
        lambda p, x, mu, logvar: fastelbo.loss(p, x, mu, logvar, 2.0, likelihood="bernoulli_logits", recon_weight=0.3).loss,
        lambda p, x, mu, logvar: (
            0.3 * F.binary_cross_entropy_with_logits(p, x, reduction="sum") + 2 * kl_of(mu, logvar).sum()
        ),
    ),
    "kl_weight": (
        lambda p, x, mu, logvar: fastelbo.loss(p, x, mu, logvar, likelihood="mse", kl_weight=x[:LATENTS, :1]).loss,
        lambda p, x, mu, logvar: (p - x).square().sum() + (x[:LATENTS, :1] * kl_of(mu, logvar)).sum(),
    ),
    "a number as the second parameter": (
        lambda p, x, mu, logvar: fastelbo.nll((p, 0.4), x, likelihood=StudentT(3.0), reduction="batchmean"),
        lambda p, x, mu, logvar: -torch.distributions.StudentT(3.0, p, 0.4).log_prob(x).sum() / ROWS,
    ),
    "unlike batches": (
        lambda p, x, mu, logvar: fastelbo.loss(p, x, mu, logvar, likelihood="l1", reduction="batchmean").loss,
        lambda p, x, mu, logvar: (p - x).abs().sum() / ROWS + kl_of(mu, logvar).sum() / LATENTS,
    ),
    "interval": (
        lambda p, x, mu, logvar: fastelbo.nll((p, p.mean() - 2), x, likelihood=DiscretizedLogistic(interval=(0, 1))),
        lambda p, x, mu, logvar: CASES["discretized_logistic, [0, 1]"].truth((p, p.mean() - 2), x).sum(),
    ),
    "weighting of a part": (
        lambda p, x, mu, logvar: fastelbo.kl_divergence(
            mu, logvar, prior=(p[:LATENTS, :1], logvar), weighting=fastelbo.Weighting(0.2), reduction="mean"
        ),
        lambda p, x, mu, logvar: torch.distributions.kl_divergence(
            Normal(mu, (logvar / 2).exp()), Normal(p[:LATENTS, :1], (logvar / 2).exp())
        ).clamp_min(0.2).mean(),
    ),
}  # fmt: skip


def compiled(call, *tensors):
    return torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors)


def checkpointed(call, *tensors):
    return checkpoint(call, *tensors, use_reentrant=False)


def in_autocast(call, *tensors):
    """Which rounds nothing of a loss."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return call(*tensors)


@pytest.mark.parametrize("around", (compiled, checkpointed, in_autocast))
@pytest.mark.parametrize("name", OPTIONS)
def test_surroundings(name, around):
    call, truth = OPTIONS[name]
    shapes = (ROWS, D), (ROWS, D), (LATENTS, L), (LATENTS, L)
    levels = torch.randint(0, 256, (ROWS, D), device=DEVICE) / 255
    given = [torch.randn(shape, device=DEVICE) if i != 1 else levels for i, shape in enumerate(shapes)]
    given = [t.requires_grad_(i != 1) for i, t in enumerate(given)]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    found, expected = around(call, *given), truth(*wide)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients, true = (
        torch.autograd.grad(value, [t for t in tensors if t.requires_grad], allow_unused=True, materialize_grads=True)
        for value, tensors in ((found, given), (expected, wide))
    )
    for gradient, exact in zip(gradients, true, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_transformed(name):
    call, truth = OPTIONS[name]
    given = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in ((ROWS, D), (LATENTS, L), (LATENTS, L))]
    x = torch.randint(0, 256, (ROWS, D), device=DEVICE).double() / 255

    def jacobian(function):
        return torch.func.jacrev(lambda p, mu, logvar: function(p, x, mu, logvar), (0, 1, 2))(*given)

    torch.testing.assert_close(jacobian(call), jacobian(truth))
