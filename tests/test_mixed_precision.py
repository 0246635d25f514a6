"""Autocast and loss scaling: predictions come in half precision, and lose nothing more on the way through the loss. And
predictions in float64, beside latents in float32."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastelbo
from conftest import DEVICE
from fastelbo import Weighting, reference
from fastelbo.likelihoods import Gaussian
from support import LIKELIHOODS, gradients, relative

HALVES = (torch.bfloat16, torch.float16)
BATCH, FEATURES, LATENT = 16, 40, 4


class VAE(nn.Module):
    def __init__(self, probabilities: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 32), nn.Tanh(), nn.Linear(32, FEATURES))
        if probabilities:
            self.decoder.append(nn.Sigmoid())

    def forward(self, x, eps, likelihood, way):
        mu, logvar = self.encoder(x).chunk(2, 1)
        if way == "elbo":
            return fastelbo.elbo(self.decoder, x, mu, logvar, 0.5, likelihood=likelihood, reduction="mean", eps=eps).loss
        z, kl = fastelbo.sample_kl(mu, logvar, eps=eps, reduction="mean")
        return fastelbo.loss(self.decoder(z), x, kl=kl, beta=0.5, likelihood=likelihood, reduction="mean").loss

    def naive(self, x, eps, likelihood):
        mu, logvar = self.encoder(x).chunk(2, 1)
        recon_x = self.decoder(mu + torch.exp(0.5 * logvar) * eps)
        _, recon, kl = reference.elbo_loss(recon_x, x, mu, logvar, likelihood=likelihood)
        return recon / x.numel() + 0.5 * kl / mu.numel()


def batch(device):
    return torch.rand(BATCH, FEATURES, device=device).round(), torch.randn(BATCH, LATENT, device=device)


def call(way, model):
    """The model's loss, composed or by `elbo`; or composed and compiled."""
    if way == "compiled":
        torch.compiler.reset()
        return torch.compile(lambda *args: model(*args, "composed"), fullgraph=True, backend="aot_eager")
    return lambda *args: model(*args, way)


@pytest.mark.parametrize("way", ("elbo", "composed", "compiled"))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_autocast(likelihood, dtype, way, device):
    """Gradients of all parameters are those of float64, to the precision of the linear layers in between."""
    model = VAE(likelihood == "bernoulli").to(device)
    exact = copy.deepcopy(model).double()
    x, eps = batch(device)
    with torch.autocast(device.type, dtype):
        loss = call(way, model)(x, eps, likelihood)
    assert loss.dtype == torch.float32
    found = gradients(loss, *model.parameters())
    expected = gradients(exact.naive(x.double(), eps.double(), likelihood), *exact.parameters())
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < (0.03 if dtype == torch.bfloat16 else 0.01)


def test_backward_inside_autocast(device):
    """Which would refuse `F.binary_cross_entropy` on a GPU."""
    recon_x = torch.rand(5, 9, device=device, dtype=torch.bfloat16).requires_grad_()
    x, kl = torch.rand(5, 9, device=device), torch.zeros((), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = fastelbo.loss(recon_x, x, kl=kl).loss
        (plain,) = gradients(loss, recon_x, retain_graph=True)
        (again,) = gradients(loss, recon_x, create_graph=True)
        by_function = torch.func.grad(lambda p: fastelbo.loss(p, x, kl=kl).loss)(recon_x.detach())
    p = recon_x.detach().double()
    truth = (p - x) / (p * (1 - p)).clamp_min(1e-12)
    for gradient in (plain, again, by_function):
        assert relative(gradient, truth) < 2**-7


@pytest.mark.parametrize("way", ("composed", "compiled"))
def test_element_means_survive_in_float16(way, device):
    """The gradient of a mean over 800,000 elements loses its digits in float16, unless it is computed with the loss scale."""
    torch.compiler.reset()
    recon_x = torch.randn(8, 10**5, device=device).half().requires_grad_()
    x, kl = torch.randn(8, 10**5, device=device), torch.zeros((), device=device)

    def loss_of(recon_x, x, kl):
        return fastelbo.loss(recon_x, x, kl=kl, likelihood="mse", reduction="mean").loss

    if way == "compiled":
        loss_of = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    truth = 2 * (recon_x.detach().double() - x) / x.numel()

    def error(gradient):
        return ((gradient.double() - truth).abs().mean() / truth.abs().mean()).item()

    assert error(truth.half()) > 2**-9
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20)
    for _ in range(3):
        (gradient,) = gradients(scaler.scale(loss_of(recon_x, x, kl)), recon_x)
        assert error(gradient.double() / 2.0**20) < 2**-12


@pytest.mark.parametrize("way", ("elbo", "composed", "compiled"))
def test_the_scaler_sees_an_overflow(way, device):
    """It skips the step, lowers the scale, and goes on once the gradients fit."""
    model = VAE(False).to(device)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**36, backoff_factor=2.0**-24)
    x, eps = batch(device)
    function = call(way, model)
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = function(x, eps, "bernoulli_logits")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
        assert moved == (step == 1)
        assert scaler.get_scale() == 2.0**12
    expected = gradients(before.naive(x, eps, "bernoulli_logits"), *before.parameters())
    for p, q, gradient in zip(model.parameters(), before.parameters(), expected, strict=True):
        assert relative(q - p, 0.1 * gradient) < 0.01


OPTIONS = {
    "plain": {},
    "prior": {"prior": (torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE))},
    "kl_weight": {"kl_weight": torch.ones(4, 1, device=DEVICE)},
    "free bits": {"weighting": Weighting(free_bits=1e-9)},
    "capacity": {"weighting": Weighting(capacity=1.0)},
    "beta of each": {"beta": torch.ones(3, device=DEVICE)},
    "optimal": {"likelihood": Gaussian("optimal")},
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR tensor support is in beta|invariant checks)")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_kl_beside_a_prediction_in_float64(name):
    """It has the digits that its dtype promises, whatever it is made of, and where nothing is fused."""
    prediction, x = torch.rand(4, 5, device=DEVICE, dtype=torch.float64), torch.ones(4, 5, device=DEVICE)
    mu, logvar = (torch.randn(4, 3, device=DEVICE).requires_grad_() for _ in range(2))
    wide_mu, wide = mu.detach().double(), logvar.detach().double()
    expected = 0.5 * (wide_mu.square() + wide.exp() - wide - 1).sum()
    options = {"likelihood": "poisson"} | OPTIONS[name]
    targets = (x,) if name == "optimal" else (x, x.to_sparse_csr())
    for target, around in itertools.product(targets, (contextlib.nullcontext, forward_ad.dual_level)):
        with around():
            kl = fastelbo.loss(prediction, target, mu, logvar, **options).kl
        assert kl.dtype == torch.float64 and relative(kl, expected) < 1e-14
        by_mu, by_logvar = gradients(kl, mu, logvar)
        assert by_mu.dtype == by_logvar.dtype == torch.float32
        assert relative(by_mu, wide_mu) < 1e-7 and relative(by_logvar, 0.5 * wide.expm1()) < 1e-6
