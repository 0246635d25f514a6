"""Promise 8: values and gradients are those of the naive code, and nearer to the truth or as near."""

import math

import pytest
import torch

import fastelbo
from conftest import BACKEND
from fastelbo.engine import torch_backend
from fastelbo.likelihoods import find_likelihood
from support import LIKELIHOODS, as_double, assert_no_worse, gradients, make_inputs, naive, options, relative

# One element; a lone tail of the last 15 or fewer; a tile and a tail; MNIST; more than a block and odd.
SIZES = (((1, 1), (1, 1)), ((1, 7), (1, 3)), ((8, 125), (8, 2)), ((128, 784), (128, 20)), ((1, 2**20 + 37), (1, 50_001)))
BETA = 0.7


def run(function, inputs, likelihood):
    terms = function(*inputs, BETA, **options(likelihood))
    return terms, gradients(terms[0], inputs[0], inputs[2], inputs[3])


@pytest.mark.parametrize("shapes", SIZES, ids=lambda s: str(s[0]))
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_float64_equals_the_naive_code(likelihood, shapes, device):
    inputs = make_inputs(likelihood, *shapes, torch.float64, device, extremes=True)
    got, expected = run(fastelbo.loss, inputs, likelihood), run(naive, inputs, likelihood)
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert a.dtype == torch.float64
        assert relative(a, b) <= 1e-12


def magnitudes(likelihood, inputs):
    """Sums of the absolute values of what is added up: for the three results, and element by element for the gradients."""
    recon_x, x, mu, logvar = as_double(*inputs)
    scale = find_likelihood(options(likelihood)["likelihood"]).fixed or 1.0
    elementwise = {
        "bernoulli": lambda: torch.nn.functional.binary_cross_entropy(recon_x, x, reduction="none"),
        "bernoulli_logits": lambda: torch.nn.functional.binary_cross_entropy_with_logits(recon_x, x, reduction="none"),
        "mse": lambda: (recon_x - x).square(),
        "gaussian": lambda: 0.5 * ((recon_x - x) / scale).square() + abs(math.log(scale * math.sqrt(2 * math.pi))),
    }[likelihood]()
    recon = elementwise.abs().sum()
    kl = 0.5 * (1 + logvar.abs() + mu.square() + logvar.exp()).sum()
    grad_recon = gradients(elementwise.sum(), recon_x)[0].abs()
    if likelihood == "bernoulli_logits":
        grad_recon = torch.sigmoid(recon_x) + x
    grad_mu, grad_logvar = BETA * mu.abs(), BETA * 0.5 * (1 + logvar.exp())
    return (recon + BETA * kl, recon, kl), (grad_recon, grad_mu, grad_logvar)


@pytest.mark.parametrize("extremes", (False, True), ids=("usual", "extremes"))
@pytest.mark.parametrize("shapes", SIZES, ids=lambda s: str(s[0]))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_error_is_no_larger_than_the_naive_codes(likelihood, dtype, shapes, extremes, device):
    inputs = make_inputs(likelihood, *shapes, dtype, device, extremes)
    truth = run(naive, as_double(*inputs), likelihood)
    by_naive = run(naive, inputs, likelihood)
    got = run(fastelbo.loss, inputs, likelihood)
    names = (("loss", "recon", "kl"), ("d/d recon_x", "d/d mu", "d/d logvar"))
    for parts in zip(got, by_naive, truth, magnitudes(likelihood, inputs), names, strict=True):
        for value, other, exact, terms, name in zip(*parts, strict=True):
            exact = exact.detach()
            if value.dtype == torch.float16:  # what overflows is infinite in both
                exact = torch.where(exact.abs() > 65519, exact.sign() * torch.inf, exact)
            assert_no_worse(value, other, exact, terms.detach(), name)
    assert all(t.dtype == torch.float32 for t in got[0])


def test_confident_logits_keep_their_loss(device):
    """Where exp(-|logit|) is far below a rounding of 1, and where Torch's own code returns 0."""
    logit = torch.tensor([[-30.0, 30.0, -17.0, 25.0]], device=device, requires_grad=True)
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0]], device=device)
    mu = torch.zeros(1, 1, device=device)
    for i in range(4):
        recon = fastelbo.loss(logit[:, i : i + 1], x[:, i : i + 1], mu, mu, likelihood="bernoulli_logits").recon
        exact = torch.log1p(torch.exp(-logit.detach()[0, i].double().abs()))
        assert relative(recon, exact) < 1e-6


def test_collapsed_posterior_keeps_its_kl(device):
    """1 + logvar - exp(logvar) cancels near 0, where the naive float32 sum is noise."""
    logvar = torch.linspace(-1e-3, 1e-3, 1000, device=device).reshape(10, 100).requires_grad_()
    mu = torch.zeros_like(logvar)
    kl = fastelbo.sample_kl(mu, logvar).kl
    lv = logvar.detach().double()
    assert relative(kl, (0.5 * (torch.expm1(lv) - lv)).sum()) < 1e-3
    assert relative(gradients(kl, logvar)[0], 0.5 * torch.expm1(lv)) < 1e-6


# Of many latents, whose KL is made of the deviations beside a sample where its digits allow that: `(mu, logvar, do they)`.
MANY = {
    "usual": (lambda n: torch.randn(n), lambda n: 0.5 * torch.randn(n), True),
    "alike": (lambda n: torch.ones(n), lambda n: torch.full((n,), 0.55), True),
    "narrow": (lambda n: 0.3 * torch.randn(n), lambda n: torch.randn(n) - 6, True),
    "wide": (lambda n: torch.randn(n), lambda n: torch.full((n,), 1.7), False),
    "one far out": (lambda n: torch.randn(n), lambda n: torch.eye(1, n)[0] * 20, False),
    "near the prior": (lambda n: 1e-3 * torch.randn(n), lambda n: 1e-3 * torch.randn(n), False),
    "at its mean": (lambda n: torch.zeros(n), lambda n: torch.randn(n), False),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("case", MANY)
def test_many_latents(case, reduction, dtype, device, monkeypatch):
    rows, columns = 3, 2**13 + 5
    make_mu, make_logvar, shared = MANY[case]
    mu, logvar = (torch.stack([f(columns).to(dtype) for _ in range(rows)]).to(device) for f in (make_mu, make_logvar))
    exact = []
    if BACKEND == "torch":
        of = torch_backend._kl_sum
        monkeypatch.setattr(torch_backend, "_kl_sum", lambda *block: exact.append(None) or of(*block))
    wide = as_double(mu, logvar)
    terms = 0.5 * (1 + wide[1].abs() + wide[0].square() + wide[1].exp())
    dim = None if reduction == "sum" else 1

    def by_hand(mu, logvar):
        return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(dim)

    truth = 0.5 * (wide[0].square() + torch.expm1(wide[1]) - wide[1]).sum(dim)
    kl = fastelbo.sample_kl(mu, logvar, reduction=reduction).kl
    if dtype == torch.float64:
        assert relative(kl, truth) < 1e-12
    else:
        assert_no_worse(kl, by_hand(mu.float(), logvar.float()), truth, terms.sum(dim), "kl")
    if case == "near the prior":
        assert relative(kl, truth) < 1e-5
    if BACKEND == "torch" and device.type == "cpu":
        assert bool(exact) != shared


@pytest.mark.parametrize("columns", (2**13 + 5, 2**18 + 5), ids=("kept", "computed again"))
@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("case", ("usual", "wide", "near the prior"))
def test_gradients_of_many_latents(case, reduction, columns, device):
    """Of a sample with its KL, of the KL alone and of a loss that has it; twice, the graph retained."""
    make_mu, make_logvar, _ = MANY[case]
    mu, logvar = (torch.stack([f(columns) for _ in range(3)]).to(device).requires_grad_() for f in (make_mu, make_logvar))
    upstream, arrived = torch.rand(() if reduction == "sum" else (3,), device=device), torch.randn(3, columns, device=device)
    recon_x = torch.randn(3, 7, device=device, requires_grad=True)
    z, kl = fastelbo.sample_kl(mu, logvar, reduction=reduction)
    alone = fastelbo.kl_divergence(mu, logvar, reduction=reduction)
    terms = fastelbo.loss(recon_x, torch.zeros_like(recon_x), mu, logvar, BETA, reduction=reduction, likelihood="mse")
    m, lv = mu.detach().double(), logvar.detach().double()
    factor = upstream.double().reshape(-1, 1)
    of_kl, terms_of_kl = (factor * m, 0.5 * factor * torch.expm1(lv)), (factor * m.abs(), 0.5 * factor * (1 + lv.exp()))
    shift = z.detach().double() - m
    of_both = of_kl[0] + arrived, of_kl[1] + 0.5 * arrived * shift
    eps = torch.finfo(torch.float32).eps
    for _ in range(2):
        for found, expected in (
            (gradients(alone, mu, logvar, grad_outputs=upstream, retain_graph=True), of_kl),
            (gradients(terms.loss, mu, logvar, grad_outputs=upstream, retain_graph=True), [BETA * g for g in of_kl]),
        ):
            for got, exact, size in zip(found, expected, terms_of_kl, strict=True):
                assert ((got.double() - exact).abs() <= 2 * eps * size).all()
        found = torch.autograd.grad((z, kl), (mu, logvar), (arrived, upstream), retain_graph=True)
        for got, exact in zip(found, of_both, strict=True):
            assert relative(got, exact) < 4 * eps
