"""`nll`, the reconstruction alone: against the likelihoods' formulas in float64, and against the `recon` of `loss`."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastelbo
from conftest import BACKEND
from fastelbo.likelihoods import DiscretizedLogisticMixture, Gaussian
from likelihood_cases import CASES, SHAPE, Case, recon_x, reduce
from support import gradcheck, gradgradcheck, gradients, relative

REDUCTIONS = "sum", "batchmean", "mean", "none"


def _bits():
    return torch.rand(SHAPE, dtype=torch.float64).round()


def _reals(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _units(*shapes):
    return [torch.rand(shape, dtype=torch.float64) * 0.9 + 0.05 for shape in shapes]


def _alone(name, likelihood, parameters, truth, target=lambda: _reals(SHAPE)[0]):
    return Case(name, likelihood, parameters, target, truth, (SHAPE,))


def _log_prob(scale):
    return lambda p, x: -torch.distributions.Normal(p[0], scale).log_prob(x)


# The likelihoods that one kernel computes together with the KL are not in the table.
ALONE = (
    _alone("bernoulli", "bernoulli", _units, lambda p, x: F.binary_cross_entropy(p[0], x, reduction="none"), _bits),
    _alone(
        "bernoulli_logits", "bernoulli_logits", _reals,
        lambda p, x: F.binary_cross_entropy_with_logits(p[0], x, reduction="none"), _bits,
    ),
    _alone("mse", "mse", _reals, lambda p, x: (p[0] - x).square()),
    _alone("gaussian", "gaussian", _reals, _log_prob(1.0)),
    _alone("gaussian, fixed scale", Gaussian(scale=0.3), _reals, _log_prob(0.3)),
)  # fmt: skip
ALL = CASES | {case.name: case for case in ALONE}


def nll(parameters, x, likelihood, reduction="sum", weight=None):
    return fastelbo.nll(recon_x(parameters), x, likelihood=likelihood, reduction=reduction, weight=weight)


def weight_of(x, case):
    """A mask with a zero in it and numbers, one for each term."""
    weight = torch.rand_like(x, dtype=torch.float64)
    weight.view(-1)[::5] = 0.0
    if not case.elementwise() and x.dim() == len(SHAPE):
        dim = {"categorical": 1, "multinomial": 2 if "dim 2" in case.name else -1}[case.name.split(",")[0]]
        return weight.narrow(dim, 0, 1), weight.select(dim, 0)
    return weight, weight


@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ALL)
def test_float64_truth(name, reduction, weighted, device):
    case = ALL[name]
    parameters, x = case.make(device=device)
    weight, of_terms = weight_of(x, case) if weighted else (None, None)
    got = nll(parameters, x, case.likelihood, reduction, weight)
    wide = [p.detach().cpu().requires_grad_() for p in parameters]
    counted = (x != -100).cpu() if "ignored" in name else None
    expected = reduce(case.truth(wide, x.cpu()), reduction, of_terms if of_terms is None else of_terms.cpu(), counted)
    assert got.dtype == torch.float64 and got.shape == expected.shape
    torch.testing.assert_close(got.detach().cpu(), expected.detach(), rtol=1e-9, atol=1e-11)
    upstream = torch.rand_like(expected)
    ours = gradients(got, *parameters, grad_outputs=upstream.to(device))
    for a, b in zip(ours, gradients(expected, *wide, grad_outputs=upstream), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ALL)
def test_it_is_the_recon_of_loss(name, reduction, device):
    """To the last bit, in float32."""
    case = ALL[name]
    parameters, x = case.make(torch.float32, device)
    kl = torch.zeros(x.shape[:1] if reduction == "none" else (), device=device)
    terms = fastelbo.loss(recon_x(parameters), x, kl=kl, likelihood=case.likelihood, reduction=reduction)
    got = nll(parameters, x, case.likelihood, reduction)
    assert got.dtype == torch.float32 and torch.equal(got, terms.recon)
    upstream = torch.rand_like(got)
    for a, b in zip(*(gradients(v, *parameters, grad_outputs=upstream) for v in (got, terms.recon)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_mixture(device):
    """Whose definition is tested elsewhere. A mean is over channels, too."""
    likelihood = DiscretizedLogisticMixture()
    logits = torch.randn(2, 20, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    x = 2 * torch.rand(2, 3, 3, 4, dtype=torch.float64, device=device) - 1
    expected = likelihood.nll([logits], x)
    for reduction in REDUCTIONS:
        got, wanted = nll([logits], x, likelihood, reduction), reduce(expected, reduction)
        wanted = wanted / 3 if reduction == "mean" else wanted
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(gradients(got.sum(), logits), gradients(wanted.sum(), logits, retain_graph=True))


@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_optimal_scale(reduction, weighted, device):
    """A likelihood that is made of the sums of another one."""
    mean = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    x, weight = torch.randn(5, 6, dtype=torch.float64, device=device), None
    if weighted:
        weight = torch.rand(5, 1, dtype=torch.float64, device=device)
    w = torch.ones_like(x) if weight is None else weight.expand(5, 6)
    scale = ((w * (mean - x).square()).sum() / w.sum()).sqrt()
    expected = reduce(-torch.distributions.Normal(mean, scale).log_prob(x), reduction, weight)
    got = nll([mean], x, Gaussian("optimal"), reduction, weight)
    torch.testing.assert_close(got, expected)
    upstream = torch.rand_like(got)
    ours, theirs = (gradients(v, mean, grad_outputs=upstream) for v in (got, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("name", ("bernoulli_logits", "gaussian, soft log scale", "categorical"))
def test_derivatives(name, reduction, check, device):
    parameters, x = ALL[name].make(device=device)
    parameters = [p.detach()[:2].requires_grad_() if p.shape == SHAPE else p for p in parameters]
    assert check(lambda *p: nll(p, x[:2], ALL[name].likelihood, reduction), parameters)


def test_gradients_of_target_and_weight(device):
    parameters, x = ALL["gaussian, logvar"].make(device=device)
    weight = torch.rand(3, 1, 1, 6, dtype=torch.float64, device=device, requires_grad=True)
    inputs = x.requires_grad_(), weight, *parameters
    got = nll(parameters, x, ALL["gaussian, logvar"].likelihood, "mean", weight)
    expected = reduce(ALL["gaussian, logvar"].truth(parameters, x), "mean", weight)
    torch.testing.assert_close(gradients(got, *inputs), gradients(expected, *inputs))


@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_any_sequence_of_factors(reduction, device):
    """The factor that forward guesses, and a retained graph."""
    logits = torch.randn(4, 7, device=device, requires_grad=True)
    x = torch.rand(4, 7, device=device)
    slope = torch.sigmoid(logits.detach().double()) - x.double()
    for factor in (1.0, 3.0, 3.0, -0.5, 1.0):
        value = fastelbo.nll(logits, x, likelihood="bernoulli_logits", reduction=reduction)
        upstream = torch.full_like(value, factor)
        for times in (1.0, 2.0):
            (found,) = gradients(value, logits, grad_outputs=times * upstream, retain_graph=True)
            assert relative(found, times * factor * slope) < 1e-6


def test_masked_nan_does_not_count(device):
    logits = torch.randn(4, 7, device=device)
    logits[1, 2] = torch.nan
    logits.requires_grad_()
    x, mask = torch.rand(4, 7, device=device), torch.ones(4, 7, dtype=torch.bool, device=device)
    x[3, 3] = torch.nan
    mask[1, 2] = mask[3, 3] = False
    value = fastelbo.nll(logits, x, likelihood="bernoulli_logits", weight=mask, reduction="mean")
    exact = F.binary_cross_entropy_with_logits(logits.detach()[mask].double(), x[mask].double())
    torch.testing.assert_close(value.double(), exact)
    (gradient,) = gradients(value, logits)
    assert gradient[~mask].eq(0).all() and gradient[mask].isfinite().all()


def test_short_dtypes_and_bytes(device):
    logits = torch.randn(4, 7, device=device).bfloat16().requires_grad_()
    x = torch.randint(0, 256, (4, 7), dtype=torch.uint8, device=device)
    likelihood = fastelbo.likelihoods.BernoulliLogits(target_scale=1 / 255)
    value = fastelbo.nll(logits, x, likelihood=likelihood, reduction="batchmean")
    wide = logits.detach().double().requires_grad_()
    exact = F.binary_cross_entropy_with_logits(wide, x.double() / 255, reduction="sum") / 4
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)
    assert relative(gradients(value, logits)[0], gradients(exact, wide)[0]) < 2**-8


@pytest.mark.parametrize("shape", ((0, 5), (3, 0)), ids=str)
def test_of_nothing(shape, device):
    prediction = torch.zeros(shape, device=device, requires_grad=True)
    value = fastelbo.nll(prediction, prediction.detach(), likelihood="mse")
    assert value.item() == 0 and gradients(value, prediction)[0].shape == shape
    assert fastelbo.nll(prediction, prediction.detach(), likelihood="mse", reduction="mean").isnan()


def test_no_gradient_is_stored_without_grad_mode(device):
    logits, x = torch.randn(4, 7, device=device, requires_grad=True), torch.rand(4, 7, device=device)
    with torch.no_grad():
        value = fastelbo.nll(logits, x, likelihood="bernoulli_logits")
    assert not value.requires_grad
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(logits, x, reduction="sum").detach())


# --- what surrounds a call


def test_transforms(device):
    """Per-sample gradients, and a Jacobian of rows by forward mode."""
    logits, x = torch.randn(5, 9, device=device), torch.rand(5, 9, device=device)
    slope = torch.sigmoid(logits) - x

    def one(logits, x):
        return fastelbo.nll(logits[None], x[None], likelihood="bernoulli_logits")

    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one))(logits, x), slope)
    rows = torch.func.jacfwd(lambda t: fastelbo.nll(t, x, likelihood="bernoulli_logits", reduction="none"))(logits)
    for i in range(5):
        expected = torch.zeros_like(slope)
        expected[i] = slope[i]
        torch.testing.assert_close(rows[i], expected)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(reentrant, device):
    x = torch.rand(5, 9, device=device)
    for factor in (1.0, 5.0, 1.0):
        logits = torch.randn(5, 9, device=device, requires_grad=True)
        value = checkpoint(lambda t: fastelbo.nll(t, x, likelihood="bernoulli_logits"), logits, use_reentrant=reentrant)
        (value * factor).backward()
        torch.testing.assert_close(logits.grad, factor * (torch.sigmoid(logits.detach()) - x))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype, device):
    layer = torch.nn.Linear(6, 9, device=device)
    h, x = torch.randn(5, 6, device=device), torch.rand(5, 9, device=device)
    with torch.autocast(device.type, dtype):
        value = fastelbo.nll(layer(h), x, likelihood="bernoulli_logits", reduction="batchmean")
    assert value.dtype == torch.float32
    weight = layer.weight.detach().double().requires_grad_()
    logits = F.linear(h.double(), weight, layer.bias.double())
    exact = F.binary_cross_entropy_with_logits(logits, x.double(), reduction="sum") / 5
    assert relative(value, exact) < 0.01
    assert relative(gradients(value, layer.weight)[0], gradients(exact, weight)[0]) < 0.03


@pytest.mark.skipif(BACKEND != "triton", reason="about the kernels")
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("name", ("bernoulli", "gaussian, log scale 0-d", "zero_inflated", "categorical", "multinomial"))
def test_one_launch_forward_and_one_backward(name, reduction, monkeypatch, device):
    from fastelbo.kernels.direct import Launch

    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), call(self, *args)))
    parameters, x = ALL[name].make(torch.float32, device)
    value = nll(parameters, x, ALL[name].likelihood, reduction)
    assert len(launches) == 1
    value.sum().backward()
    assert len(launches) <= 2


# --- errors

LOGITS = torch.zeros(4, 6)
BAD = (
    ({"recon_x": [1.0]}, TypeError, "recon_x must be a tensor, got float"),
    ({"x": torch.zeros(4, 5)}, ValueError, r"recon_x must have the shape of x: got recon_x \(4, 6\) and x \(4, 5\)"),
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"recon_x": (LOGITS, LOGITS)}, ValueError, "recon_x must be a tensor for the likelihood 'mse', got 2 tensors"),
    ({"recon_x": ()}, ValueError, "recon_x must be a tensor for the likelihood 'mse', got 0 tensors"),
    ({"likelihood": "men"}, ValueError, "likelihood must be an object of fastelbo.likelihoods or one of"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight must broadcast to x: got weight \(5,\) and \(4, 6\)$"),
    ({"weight": torch.zeros(4)}, ValueError, r"got weight \(4,\) and \(4, 6\); weight\[\.\.\., None\] does$"),
    ({"weight": 0.5}, TypeError, "weight must be a tensor, with weights of elements of x, got 0.5"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'sum', 'batchmean', 'mean', 'none'; got 'avg'"),
    ({"reduction": ("sum", "sum")}, ValueError, r"reduction must be one of .* got \('sum', 'sum'\)"),
    ({"reduction": None}, ValueError, "reduction must be one of .* got None"),
)


@pytest.mark.parametrize("wrapped", (False, True), ids=("", "compiled"))
@pytest.mark.parametrize("change, error, message", BAD)
def test_errors(change, error, message, wrapped):
    given = {"recon_x": LOGITS, "x": LOGITS, "likelihood": "mse"} | change
    torch.compiler.reset()
    call = torch.compile(fastelbo.nll, backend="eager") if wrapped else fastelbo.nll
    with pytest.raises(error, match=message):
        call(**given)


def test_loss_without_latents_tells_of_it(device):
    logits = torch.rand(4, 6, device=device)
    with pytest.raises(ValueError, match=r"give mu and logvar, or kl: .*the reconstruction alone is fastelbo\.nll"):
        fastelbo.loss(logits, logits)
