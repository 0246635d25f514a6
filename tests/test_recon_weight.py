"""`recon_weight`: the reconstruction's factor in the loss, which `recon` is without, and no launch more."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastelbo
from conftest import BACKEND, DEVICE
from fastelbo import ELBO, IWAE, Weighting
from fastelbo.likelihoods import Gaussian
from support import LIKELIHOODS, gradcheck, gradgradcheck, gradients, make_inputs, options, relative

B, D, L = 5, 9, 3
WEIGHTS = (255.0, 0.5, 1 / 255, 0.0, -1.0)
FORMS = {
    "number": lambda number: number,
    "tensor": lambda number: torch.tensor(number, dtype=torch.float64, device=DEVICE),
    "tensor with gradient": lambda number: torch.tensor(number, dtype=torch.float64, device=DEVICE, requires_grad=True),
}


def inputs(likelihood="mse", dtype=torch.float32):
    return make_inputs(likelihood, (B, D), (B, L), dtype, DEVICE)


def call(likelihood, **kwargs):
    return lambda r, x, mu, logvar, weight: fastelbo.loss(
        r, x, mu, logvar, 0.3, recon_weight=weight, **options(likelihood), **kwargs
    )


def normal(mu):
    return torch.zeros_like(mu), torch.full_like(mu, 0.5)


# Of each way through the code. The decoders of `elbo` add z, so that gradients reach the latents by way of the reconstruction.
CALLS = {
    **{likelihood: call(likelihood) for likelihood in LIKELIHOODS},
    **{f"mse, {name}": call("mse", reduction=name) for name in ("mean", "batchmean", "none", ("mean", "sum"))},
    "weight": call("mse", weight=torch.arange(D, device=DEVICE)),
    "free bits": call("mse", weighting=Weighting(free_bits=0.1)),
    "capacity": call("mse", weighting=Weighting(capacity=2.0)),
    "kl": lambda r, x, mu, logvar, weight: fastelbo.loss(
        r, x, kl=fastelbo.kl_divergence(mu, logvar), beta=0.3, likelihood="mse", recon_weight=weight
    ),
    "learned scale": lambda r, x, mu, logvar, weight: fastelbo.loss(
        (r, r.exp()), x, mu, logvar, 0.3, likelihood="gaussian", recon_weight=weight
    ),
    "one scale": lambda r, x, mu, logvar, weight: fastelbo.loss(
        (r, r.square().mean() + 1), x, mu, logvar, 0.3, likelihood="gaussian", recon_weight=weight
    ),
    "optimal scale": lambda r, x, mu, logvar, weight: fastelbo.loss(
        r, x, mu, logvar, 0.3, likelihood=Gaussian(scale="optimal"), recon_weight=weight
    ),
    "prior": lambda r, x, mu, logvar, weight: fastelbo.loss(
        r, x, mu, logvar, 0.3, prior=normal(mu), likelihood="mse", recon_weight=weight
    ),
    "beta of each": lambda r, x, mu, logvar, weight: fastelbo.loss(
        r, x, mu, logvar, torch.full((L,), 0.3, device=DEVICE), likelihood="mse", recon_weight=weight
    ),
    "elbo": lambda r, x, mu, logvar, weight: fastelbo.elbo(
        lambda z: r + z.mean(-1, keepdim=True), x, mu, logvar, 0.3, eps=x[:, :L], likelihood="mse", recon_weight=weight
    ),
    "two samples": lambda r, x, mu, logvar, weight: fastelbo.elbo(
        lambda z: r.repeat(z.shape[0] // B, 1) + z.mean(-1, keepdim=True), x, mu, logvar, 0.3, bound=ELBO(2, chunk=1),
        eps=torch.stack((x[:, :L], x[:, 3 : 3 + L])), likelihood="mse", recon_weight=weight,
    ),
    "module": lambda r, x, mu, logvar, weight: fastelbo.nn.ELBOLoss("mse", 0.3)(r, x, mu, logvar, recon_weight=weight),
}  # fmt: skip


def likelihood_of(name):
    return name if name in LIKELIHOODS else "mse"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", WEIGHTS)
@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradients(name, number, form):
    """Against the terms of the call without it, in float64, whose own truth is other tests' subject."""
    given, weight = inputs(likelihood_of(name)), FORMS[form](number)
    loss, recon, _ = CALLS[name](*given, weight)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    _, true_recon, _ = CALLS[name](*wide, 1.0)
    plain = CALLS[name](*wide, 1.0).loss
    truth = plain + (number - 1) * true_recon
    assert relative(recon, true_recon) < 1e-6
    scale = abs(number) * true_recon.abs() + (truth - number * true_recon).abs()
    assert ((loss - truth).abs() <= 1e-6 * scale + 1e-9).all()
    wrt = [i for i in (0, 2, 3) if given[i].requires_grad]
    found = torch.autograd.grad(loss.sum(), [given[i] for i in wrt], retain_graph=True)
    expected = torch.autograd.grad(truth.sum(), [wide[i] for i in wrt], retain_graph=True)
    by_recon = torch.autograd.grad(true_recon.sum(), [wide[i] for i in wrt], allow_unused=True)
    for gradient, true, part in zip(found, expected, by_recon, strict=True):
        size = true.abs() + (0 if part is None else (abs(number) + 1e-9) * part.abs())
        assert ((gradient - true).abs() <= 2e-6 * size.max() + 1e-12).all()
    if form == "tensor with gradient":
        (by_weight,) = gradients(loss.sum(), weight)
        assert relative(by_weight, true_recon.sum()) < 1e-6


@pytest.mark.parametrize("chunk", (None, 1), ids=("at once", "in chunks"))
@pytest.mark.parametrize("estimator", ("standard", "stl"))
def test_importance_weights_have_it(estimator, chunk, device):
    """log w = -recon_weight * recon - beta * (log q - log p)."""
    _, x, mu, logvar = inputs(dtype=torch.float64)
    eps = torch.randn(3, B, L, dtype=torch.float64, device=device)
    weight = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    matrix = torch.randn(L, D, dtype=torch.float64, device=device)
    bound = IWAE(3, estimator=estimator, chunk=chunk or 3)
    found = fastelbo.elbo(lambda z: z @ matrix, x, mu, logvar, 0.7, likelihood="mse", bound=bound, eps=eps, recon_weight=weight)
    z = mu + torch.exp(logvar / 2) * eps
    m, lv = (t.detach() if estimator == "stl" else t for t in (mu, logvar))
    log_q = torch.distributions.Normal(m, torch.exp(lv / 2)).log_prob(z).sum(-1)
    log_p = torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
    log_w = -weight * (z @ matrix - x).square().sum(-1) - 0.7 * (log_q - log_p)
    truth = -(torch.logsumexp(log_w, 0) - torch.tensor(3.0, dtype=torch.float64).log()).sum()
    assert relative(found.loss, truth) < 1e-12
    if chunk == 1:
        found.loss.backward()
        by = [t.grad for t in (mu, logvar, weight)]
    else:
        by = gradients(found.loss, mu, logvar, weight)
    for gradient, true in zip(by, gradients(truth, mu, logvar, weight), strict=True):
        assert relative(gradient, true) < 1e-10


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("everything", (False, True), ids=("usual", "weight too"))
@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_gradcheck(reduction, everything, check):
    recon_x, x, mu, logvar = inputs(dtype=torch.float64)
    weight = torch.tensor(0.7, dtype=torch.float64, device=DEVICE, requires_grad=everything)

    def function(recon_x, mu, logvar, weight):
        return fastelbo.loss(recon_x, x, mu, logvar, 0.3, likelihood="mse", reduction=reduction, recon_weight=weight)

    assert check(function, (recon_x, mu, logvar, weight), nondet_tol=1e-12)


def test_one_gradient_of_all_three_results():
    """The factor of the reconstruction is its weight times what arrived at the loss, and what arrived at itself."""
    given = inputs("bernoulli_logits")
    terms = call("bernoulli_logits")(*given, 0.25)
    (found,) = torch.autograd.grad(2 * terms.loss + 3 * terms.recon + 5 * terms.kl, given[0])
    logits, x = given[0].detach().double(), given[1].double()
    assert relative(found, (2 * 0.25 + 3) * (torch.sigmoid(logits) - x)) < 1e-6


@pytest.mark.usefixtures("by_functions")
def test_a_repeated_weight_is_guessed():
    """Backward hands out what forward stored: it would not survive that the prediction is replaced in between."""
    for step in range(2):
        recon_x, x, mu, logvar = inputs()
        loss = call("mse")(recon_x, x, mu, logvar, 0.125).loss
        truth = 0.125 * 2 * (recon_x.detach() - x).double()
        recon_x.data.fill_(7.0)
        (found,) = gradients(loss, recon_x)
        assert step == 0 or relative(found, truth) < 1e-6


@pytest.mark.skipif(BACKEND != "triton", reason="about launches")
@pytest.mark.parametrize("name", [*LIKELIHOODS, "mse, none", "weight", "learned scale", "elbo"])
def test_no_launch_more(name, monkeypatch):
    from fastelbo.kernels.direct import Launch

    launches, launch = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), launch(self, *args)))
    found = []
    for weight in (1.0, 0.5):
        for _ in range(2):  # the second of a kind guesses right
            launches.clear()
            CALLS[name](*inputs(likelihood_of(name)), weight).loss.sum().backward()
        found.append(list(launches))
    assert found[0] == found[1] and found[0]


def test_compiled():
    given = inputs("bernoulli_logits")
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(recon_x, x, mu, logvar, weight):
        return fastelbo.loss(recon_x, x, mu, logvar, 0.3, likelihood="bernoulli_logits", recon_weight=weight)

    for number in (0.5, 0.25, 3.0):
        weight = torch.tensor(number, device=DEVICE)
        found, expected = step(*given, weight), call("bernoulli_logits")(*given, number)
        for a, b in zip(gradients(found.loss, given[0], given[2]), gradients(expected.loss, given[0], given[2]), strict=True):
            assert relative(a, b) < 1e-5
        assert relative(found.recon, expected.recon) < 1e-6
    assert counter.frame_count == 1


def test_compiled_elbo():
    _, x, mu, logvar = inputs()
    matrix = torch.randn(L, D, device=DEVICE, requires_grad=True)

    def step(x, mu, logvar, weight):
        return fastelbo.elbo(lambda z: z @ matrix, x, mu, logvar, likelihood="mse", eps=x[:, :L], recon_weight=weight)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for weight in (0.5, 2.0):
        found, expected = compiled(x, mu, logvar, weight), step(x, mu, logvar, weight)
        assert relative(found.loss, expected.loss) < 1e-6
        for a, b in zip(gradients(found.loss, mu, matrix), gradients(expected.loss, mu, matrix), strict=True):
            assert relative(a, b) < 1e-5


def test_transformed():
    """A gradient for each weight of a batch of them."""
    recon_x, x, mu, logvar = (t.detach() for t in inputs(dtype=torch.float64))
    weights = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64, device=DEVICE)

    def value(recon_x, weight):
        return fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", recon_weight=weight).loss

    found = torch.func.vmap(torch.func.grad(value), (None, 0))(recon_x, weights)
    assert relative(found, weights[:, None, None] * 2 * (recon_x - x)) < 1e-12


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_of_few_bits(dtype):
    """The weight is folded into the gradient before that is rounded: 1e-3 of it alone would be lost in float16."""
    recon_x, x, mu, logvar = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs())
    for _ in range(2):
        loss = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", recon_weight=1e-3).loss * 65536
        (found,) = gradients(loss, recon_x)
    truth = 65.536 * 2 * (recon_x.detach().double() - x.double())
    assert relative(found, truth) < 2 * torch.finfo(dtype).eps


def test_half_of_the_squared_error():
    """As pythae and others have it."""
    recon_x, x, mu, logvar = inputs()
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
    found = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", recon_weight=0.5).loss
    assert relative(found, 0.5 * (recon_x - x).square().sum() + kl) < 1e-6


BAD = (
    ({"recon_weight": "2"}, TypeError, "recon_weight must be a number or a 0-d tensor"),
    (
        {"recon_weight": torch.ones(B, device=DEVICE)},
        ValueError,
        r"recon_weight must be a number or a 0-d tensor, got shape \(5,\)",
    ),
    ({"recon_weight": None}, TypeError, "recon_weight must be a number"),
    ({"weight": 255.0}, TypeError, "weight must be a tensor.*got 255.0: a loss takes a number as recon_weight"),
    ({"weight": torch.tensor(255.0, device=DEVICE), "reduction": "mean"}, ValueError, "weight must not be 0-d.*recon_weight"),
)


@pytest.mark.parametrize(("arguments", "error", "words"), BAD)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        fastelbo.loss(*inputs(), likelihood="mse", **arguments)
    with pytest.raises(error, match=words):
        fastelbo.elbo(lambda z: inputs()[0], *inputs()[1:], likelihood="mse", **arguments)


def test_module_shows_and_checks_it():
    assert "recon_weight=0.5" in repr(fastelbo.nn.ELBOLoss("mse", recon_weight=0.5))
    assert "recon_weight" not in repr(fastelbo.nn.ELBOLoss("mse"))
    with pytest.raises(TypeError, match="recon_weight must be"):
        fastelbo.nn.ELBOLoss("mse", recon_weight="2")
    given = inputs()
    found = fastelbo.nn.ELBOLoss("mse", recon_weight=0.5)(*given)
    assert torch.equal(found.loss, fastelbo.loss(*given, likelihood="mse", recon_weight=0.5).loss)
