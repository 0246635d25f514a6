"""What surrounds a call changes nothing in it: copies of modules, default dtype, deterministic algorithms, other devices."""

import copy
import io
import pickle

import pytest
import torch

import fastelbo
from likelihood_cases import CASES
from support import LIKELIHOODS, gradients, make_inputs, options, recorded_allocations


def results(device, dtype=torch.float32):
    """Losses, samples and gradients of one seed."""
    torch.manual_seed(3)
    found = []
    for likelihood in LIKELIHOODS:
        recon_x, x, mu, logvar = (
            t.detach().requires_grad_(t.requires_grad) for t in make_inputs(likelihood, (5, 37), (5, 3), dtype, device)
        )
        z, kl = fastelbo.sample_kl(mu, logvar, reduction="none")
        terms = fastelbo.loss(recon_x, x, kl=kl, beta=0.3, reduction="none", **options(likelihood))
        found += [z, *terms, *gradients(terms.loss.sum() + z.square().sum(), recon_x, mu, logvar)]
        net = torch.nn.Linear(3, 37, dtype=dtype).to(device)
        loss = fastelbo.elbo(lambda z, net=net: net(z).sigmoid(), x, mu, logvar, 0.3, **options(likelihood)).loss
        found += [loss, *gradients(loss, mu, logvar, *net.parameters())]
    return found


@pytest.fixture
def restored():
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


def test_default_dtype(restored, device):
    """float32 stays float32, in results and in arithmetic; so do the numbers."""
    expected = results(device)
    inputs = make_inputs("mse", (5, 37), (5, 3), device=device)
    terms = fastelbo.loss(*inputs, 0.3, likelihood="mse")
    torch.set_default_dtype(torch.float64)
    again = fastelbo.loss(*inputs, 0.3, likelihood="mse")
    assert all(torch.equal(a, b) for a, b in zip(again, terms, strict=True))
    z, kl = fastelbo.sample_kl(*inputs[2:])
    assert {z.dtype, kl.dtype, again.loss.dtype} == {torch.float32}
    criterion = fastelbo.nn.ELBOLoss("mse", beta=0.1).to(device)
    assert criterion.beta.item() == 0.1
    assert criterion(*inputs).loss.dtype == torch.float32
    torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(results(device), expected, strict=True))


@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
@pytest.mark.parametrize("name", (*CASES, "bernoulli", "optimal"))
def test_default_dtype_of_everything(name, weighted, restored, device):
    """Whatever the likelihood and the posterior are: none of their constants has the default dtype. They know nothing of each
    other, so one likelihood meets all posteriors."""
    posteriors = ("logvar", "log_std", "std", "var") if name == "bernoulli" else ("std",)
    if name in CASES:
        parameters, x = CASES[name].make(torch.float32, device)
        likelihood = CASES[name].likelihood
    else:
        parameters, x = [torch.rand(3, 4, device=device, requires_grad=True)], torch.rand(3, 4, device=device)
        likelihood = "bernoulli" if name == "bernoulli" else fastelbo.likelihoods.Gaussian("optimal")
    weight = torch.rand(3, *[1] * (x.dim() - 1), device=device) if weighted else None
    mu, second = torch.randn(3, 2, device=device), torch.rand(3, 2, device=device).add(0.2).requires_grad_()
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        for posterior in posteriors:
            terms = fastelbo.loss(
                parameters[0] if len(parameters) == 1 else tuple(parameters), x, mu, second, posterior=posterior,
                likelihood=likelihood, weight=weight,
            )  # fmt: skip
            results.append([t.detach() for t in (*terms, *gradients(terms.loss, *parameters, second))])
    for found, expected in zip(results[len(posteriors) :], results[: len(posteriors)], strict=True):
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found, expected)


def test_deterministic_algorithms(restored, device):
    expected = results(device)
    torch.use_deterministic_algorithms(True)
    assert all(torch.equal(a, b) for a, b in zip(results(device), expected, strict=True))


GAUSSIAN = fastelbo.likelihoods.Gaussian(scale=0.4, target_scale=0.5)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = fastelbo.nn.ELBOLoss(GAUSSIAN, reduction="mean").to(module.beta.device)
    twin.load_state_dict(torch.load(file))
    return twin


@pytest.mark.parametrize("transport", (copy.deepcopy, through_pickle, through_a_file))
def test_copies_of_the_module(transport, device):
    inputs = make_inputs("gaussian", (5, 9), (5, 3), device=device)
    criterion = fastelbo.nn.ELBOLoss(GAUSSIAN, beta=2.5, reduction="mean").to(device)
    twin = transport(criterion)
    assert twin.likelihood == GAUSSIAN
    expected = [t.detach() for t in criterion(*inputs)]
    criterion.beta.fill_(7.0)  # of the original alone
    assert all(torch.equal(a, b) for a, b in zip(twin(*inputs), expected, strict=True))


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "both": lambda m: m.half().to(torch.float32),
    "in a model": lambda m: torch.nn.Sequential(m).half()[0],
}


@pytest.mark.parametrize("transport", (lambda m: m, copy.deepcopy, through_pickle, through_a_file))
@pytest.mark.parametrize("cast", CASTS)
def test_beta_keeps_its_digits(cast, transport, device):
    beta = 1e-8 / 3
    criterion = CASTS[cast](fastelbo.nn.ELBOLoss(GAUSSIAN, beta=beta, reduction="mean").to(device))
    assert criterion.state_dict()["beta"].item() == transport(criterion).beta.item() == beta
    criterion = CASTS[cast](transport(criterion))
    criterion.beta.fill_(0.1)  # the module's own still
    assert criterion.state_dict()["beta"].item() == 0.1


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_digits_of_beta_in_the_loss(reduction, dtype, device):
    """All of them in float64; and in float32 the results and gradients stay what they are with a number."""
    inputs = [t.detach().requires_grad_(t.requires_grad) for t in make_inputs("mse", (5, 9), (5, 3), dtype, device)]
    criterion = fastelbo.nn.ELBOLoss("mse", beta=0.001, reduction=reduction).to(device, dtype)
    wrt = inputs[0], *inputs[2:]
    expected = fastelbo.loss(*inputs, 0.001, likelihood="mse", reduction=reduction)
    expected = *expected, *gradients(expected.loss.sum(), *wrt)
    criterion.beta.requires_grad_()  # on a CPU it would be read as a number else
    got = criterion(*inputs)
    got = *got, *gradients(got.loss.sum(), *wrt)
    torch.testing.assert_close(got, expected, rtol=1e-15 if dtype == torch.float64 else 2e-7, atol=0)
    zero = torch.zeros_like(inputs[0], dtype=torch.float64, requires_grad=True)
    mu = torch.full((1, 1), 1e6, dtype=torch.float64, device=device)
    loss = fastelbo.nn.ELBOLoss("mse", beta=0.001).to(device)(
        zero, zero.detach(), mu.expand(5, 1), torch.zeros_like(mu).expand(5, 1)
    )
    assert loss.loss.item() == pytest.approx(5 * 0.001 * 0.5e12, rel=1e-15)


def test_an_older_state_of_the_module(device):
    """Which was of float32; loaded by a module that is cast, too."""
    for criterion in (fastelbo.nn.ELBOLoss().to(device), fastelbo.nn.ELBOLoss().to(device).half()):
        criterion.load_state_dict({"beta": torch.tensor(0.1)})
        assert criterion.beta.item() == torch.tensor(0.1).item()
        assert criterion.beta.dtype == torch.float64
        assert criterion.beta.device.type == device.type


def test_beta_moves_to_a_device_without_float64(monkeypatch):
    """As MPS, for which `meta` stands here."""

    def move(tensor):
        assert tensor.dtype == torch.float32
        return tensor.to("meta")

    monkeypatch.setattr(fastelbo.nn, "WITHOUT_FLOAT64", ("meta",))
    moved = fastelbo.nn.ELBOLoss(beta=0.1)._apply(move)
    assert (moved.beta.device.type, moved.beta.dtype) == ("meta", torch.float32)
    assert "beta=?" in repr(moved)


def test_results_can_be_pickled(device):
    terms = fastelbo.loss(*(t.detach() for t in make_inputs("mse", (5, 9), (5, 3), device=device)), likelihood="mse")
    twin = pickle.loads(pickle.dumps(terms))
    assert isinstance(twin, fastelbo.ELBOTerms)
    assert all(torch.equal(a, b) for a, b in zip(twin, terms, strict=True))


@pytest.mark.usefixtures("by_functions")
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_no_gradient_is_stored_without_grad_mode(mode, device, monkeypatch):
    """Nothing as large as the prediction is allocated."""
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9900), (5, 3), device=device)
    fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse")  # what is kept for the next call
    allocated = recorded_allocations(monkeypatch)
    with mode():
        fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse")
    assert recon_x.shape not in [shape for shape, _ in allocated]
    fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse")
    assert recon_x.shape in [shape for shape, _ in allocated]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_device_that_is_not_current():
    with torch.cuda.device(0):
        other = results(torch.device("cuda", 1))
    with torch.cuda.device(1):
        expected = results(torch.device("cuda", 1))
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
