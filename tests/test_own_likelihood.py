"""Likelihoods that users write, in Torch alone and with a device function of their own: what is promised of all of them."""

import importlib.util
import math
import pickle
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributions import Gamma as GammaDistribution
from torch.distributions import Normal, kl_divergence

import fastelbo
from conftest import BACKEND
from fastelbo import ELBO, IWAE
from fastelbo.likelihoods import Bernoulli, Gaussian, Likelihood, NegativeBinomial, Range, record
from likelihood_cases import recon_x, reduce
from support import assert_no_worse, gradcheck, gradgradcheck, gradients
from test_compile import Counted, assert_same

sys.path.append(str(Path(__file__).parents[1] / "examples"))
LogCosh = importlib.import_module("log_cosh").LogCosh if importlib.util.find_spec("sklearn") else None
pytestmark = pytest.mark.skipif(LogCosh is None, reason="the example's data are scikit-learn's")
SHAPE = (3, 4, 5)


class Quartic(Likelihood):
    """Without options, and so without `record`; no density."""

    is_density = False

    def nll(self, parameters, x):
        return (parameters[0] - x) ** 4


class QuarticByKernel(Quartic):
    kernel = "own_device_functions:quartic"


class PreciseQuartic(Likelihood):
    name = "precise_quartic"
    parameters = ("mean", "precision")
    ranges = (None, Range("be positive", 0, is_open=True))
    kernel = "own_device_functions:precise_quartic"

    def nll(self, parameters, x):
        mean, precision = parameters
        return precision * (mean - x) ** 4 - 0.25 * torch.log(precision)


@record
class Gamma(Likelihood):
    """Of positive numbers, with a number in the place of the second parameter where it is not given."""

    rate: float = 1.0
    name = "gamma"
    parameters = ("concentration", "rate")
    counts = (1, 2)
    ranges = (Range("be positive", 0, is_open=True),) * 2

    def support(self, first, x):
        return Range("be positive", 0, is_open=True)

    def nll(self, parameters, x):
        concentration, *given = parameters
        rate = given[0] if given else torch.full_like(concentration[:1], self.rate)
        positive = torch.where(concentration > 0, concentration, torch.nan)  # of which lgamma tells nothing
        return torch.lgamma(positive) - concentration * torch.log(rate) - (concentration - 1) * torch.log(x) + rate * x


if LogCosh is not None:

    class ByFormula(LogCosh):
        def nll(self, parameters, x):
            return super().nll(parameters, x)


class Case(NamedTuple):
    likelihood: Likelihood
    shapes: tuple
    truth: object  # of parameters and a target
    is_positive: bool = False  # all that goes in


def log_cosh(scale):
    return lambda p, x: -torch.log(1 / (math.pi * scale * torch.cosh((x - p[0]) / scale)))


def cases():
    if LogCosh is None:
        return {}
    return {
        "log-cosh": Case(LogCosh(0.5), (SHAPE,), log_cosh(0.5)),
        "log-cosh, formula": Case(ByFormula(0.5), (SHAPE,), log_cosh(0.5)),
        "quartic": Case(Quartic(), (SHAPE,), lambda p, x: (x - p[0]).pow(4)),
        "quartic, kernel": Case(QuarticByKernel(), (SHAPE,), lambda p, x: (x - p[0]).pow(4)),
        "precise": Case(
            PreciseQuartic(), (SHAPE, (4, 1)), lambda p, x: p[1] * (x - p[0]).pow(4) - p[1].log() / 4, is_positive=True
        ),
        "precise, each": Case(
            PreciseQuartic(), (SHAPE, SHAPE), lambda p, x: p[1] * (x - p[0]).pow(4) - p[1].log() / 4, is_positive=True
        ),
        "gamma": Case(Gamma(), (SHAPE, (5,)), lambda p, x: -GammaDistribution(p[0], p[1]).log_prob(x), is_positive=True),
        "gamma, fixed": Case(Gamma(2.0), (SHAPE,), lambda p, x: -GammaDistribution(p[0], 2.0).log_prob(x), is_positive=True),
    }


CASES = cases()


def make(case, device, dtype=torch.float64, shape=SHAPE):
    draw = (lambda s: torch.rand(s, dtype=torch.float64) + 0.3) if case.is_positive else lambda s: torch.randn(s).double()
    shapes = [shape if s == SHAPE else s for s in case.shapes]
    return [draw(s).to(device, dtype).requires_grad_() for s in shapes], draw(shape).to(device, dtype)


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean", "none"))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, reduction, device):
    """Without and with weights, under 0 of which all is NaN; for the first upstream and for another."""
    case = CASES[name]
    parameters, x = make(case, device)
    mu, logvar = (torch.randn(3, 2, device=device, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(SHAPE, device=device) * (torch.rand(SHAPE, device=device) > 0.4)
    terms = case.truth(parameters, x)
    for w in (None, weight):
        given = parameters
        if w is not None:
            given = [torch.where(w == 0, torch.nan, p) if p.shape == SHAPE else p for p in parameters]
        target = x if w is None else torch.where(w == 0, torch.nan, x)
        got = fastelbo.loss(recon_x(given), target, mu, logvar, 0.5, likelihood=case.likelihood, weight=w, reduction=reduction)
        expected = reduce(terms, reduction, w)
        torch.testing.assert_close(got.recon, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got.loss, expected + 0.5 * got.kl, rtol=1e-9, atol=1e-11)
        for upstream in (torch.ones_like(expected), torch.rand_like(expected)):
            ours, theirs = (gradients(v, *parameters, grad_outputs=upstream, retain_graph=True) for v in (got.loss, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_is_no_larger_than_the_formulas(name, dtype, device):
    case = CASES[name]
    parameters, x = make(case, device, dtype, shape=(3, 4, 30) if len(case.shapes) == 1 else SHAPE)
    x = x.float()
    wide = [p.detach().double().requires_grad_() for p in parameters]
    narrow = [p.detach().float().requires_grad_() for p in parameters]
    truth, naive = case.truth(wide, x.double()), case.likelihood.nll(narrow, x)
    got = fastelbo.loss(recon_x(parameters), x, kl=x.new_zeros(()), likelihood=case.likelihood).recon
    assert got.dtype == torch.float32
    size = truth.detach().abs()
    assert_no_worse(got, naive.sum(), truth.sum().detach(), size.sum() + truth.numel(), name)
    found = zip(
        gradients(got, *parameters), gradients(naive.sum(), *narrow), gradients(truth.sum(), *wide), parameters, strict=True
    )
    for ours, theirs, exact, parameter in found:
        magnitude = (exact.abs() + size.max() + 1) * (x.numel() / ours.numel())
        assert_no_worse(ours, theirs.to(parameter.dtype), exact, magnitude, f"{name}: gradient")


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, reduction, device):
    case = CASES[name]
    parameters, x = make(case, device, shape=(2, 4, 5))
    keep = [p.detach()[:2, :2, :2] if p.dim() == 3 else p.detach() for p in parameters]
    inputs = [
        p.clone()[..., :2, :1].requires_grad_() if p.shape == (4, 1) else p[..., :2].clone().requires_grad_() for p in keep
    ]
    x, weight = x[:2, :2, :2], torch.rand(2, 2, device=device)

    def call(*parameters):
        kl = torch.zeros(2 if reduction == "none" else (), dtype=torch.float64, device=device)
        return fastelbo.loss(
            recon_x(parameters), x, kl=kl, likelihood=case.likelihood, weight=weight, reduction=reduction
        ).recon

    assert gradcheck(call, inputs)
    if BACKEND == "torch" or name == "log-cosh":  # else the second derivative is the formula's
        assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("bound", (None, ELBO(3), IWAE(3, chunk=2), IWAE(3, chunk=3)), ids=str)
@pytest.mark.parametrize("name", ("log-cosh", "log-cosh, formula", "quartic, kernel", "precise", "gamma"))
def test_bounds(name, bound, device):
    """Against the bound written down, with each sample's log densities."""
    case, several = CASES[name], bound is not None
    x = make(case, device)[1].flatten(1)
    mu, logvar, second = (
        torch.randn(n, dtype=torch.float64, device=device, requires_grad=True) for n in ((3, 2), (3, 2), (20,))
    )
    weights = torch.randn(2, 20, dtype=torch.float64, device=device, requires_grad=True)
    eps = torch.randn(3, 3, 2, dtype=torch.float64, device=device)

    def decoder(z):
        first = torch.nn.functional.softplus(z @ weights) + 0.1 if case.is_positive else z @ weights
        return first if len(case.shapes) == 1 else (first, second.exp())

    got = fastelbo.elbo(decoder, x, mu, logvar, likelihood=case.likelihood, bound=bound, eps=eps if several else eps[0]).loss
    q, losses = Normal(mu, (logvar / 2).exp()), []
    for e in eps if several else eps[:1]:
        z = mu + (logvar / 2).exp() * e
        found = decoder(z)
        terms = case.truth(found if isinstance(found, tuple) else (found,), x).sum(1)
        losses.append(terms + (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1) if isinstance(bound, IWAE) else terms)
    if isinstance(bound, IWAE):
        expected = (math.log(3) - torch.logsumexp(-torch.stack(losses), 0)).sum()
    else:
        expected = torch.stack(losses).mean(0).sum() + kl_divergence(q, Normal(0.0, 1.0)).sum()
    wrt = (mu, logvar, weights, *([second] if len(case.shapes) == 2 else []))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(got, *wrt), gradients(expected, *wrt), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ("log-cosh", "quartic", "precise", "gamma"))
def test_compiled(name, device):
    """In one graph, loss and elbo; the same numbers as eager calls."""
    torch.compiler.reset()
    case = CASES[name]
    parameters, x = make(case, device, torch.float32)
    mu, logvar = (torch.randn(3, 2, device=device, requires_grad=True) for _ in range(2))
    weight = torch.rand(4, 1, device=device)

    def of_loss(x, mu, logvar, *parameters):
        return fastelbo.loss(
            recon_x(parameters), x, mu, logvar, 0.3, likelihood=case.likelihood, weight=weight, reduction="mean"
        )

    def of_elbo(x, mu, logvar, *parameters):
        decoder = lambda z: recon_x((parameters[0] + z.square().sum() * 1e-2, *parameters[1:]))  # noqa: E731
        return fastelbo.elbo(decoder, x, mu, logvar, likelihood=case.likelihood, eps=torch.ones_like(mu))

    for call in (of_loss, of_elbo):
        compiled = Counted(call)
        assert_same(call, compiled, (*parameters, mu, logvar), x, mu, logvar, *parameters, rtol=1e-5, atol=1e-5)
        assert compiled.compilations == 1


def test_other_surroundings(device):
    """vmap over samples, checkpoint, autocast, and forward mode."""
    case = CASES["log-cosh"]
    (mean,), x = make(case, device)
    zero = torch.zeros((), dtype=torch.float64, device=device)

    def recon(mean, x):
        return fastelbo.loss(mean, x, kl=zero, likelihood=case.likelihood).recon

    terms = case.truth((mean,), x)
    by_sample = torch.func.vmap(lambda m, x: recon(m[None], x[None]))(mean, x)
    torch.testing.assert_close(by_sample, terms.flatten(1).sum(1))
    slope = gradients(terms.sum(), mean, retain_graph=True)[0]
    torch.testing.assert_close(torch.func.grad(recon)(mean.detach(), x), slope)
    tangent = torch.randn_like(x)
    torch.testing.assert_close(torch.func.jvp(lambda m: recon(m, x), (mean.detach(),), (tangent,))[1], (slope * tangent).sum())
    again = torch.utils.checkpoint.checkpoint(recon, mean, x, use_reentrant=False)
    torch.testing.assert_close(gradients(again, mean)[0], slope)
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(gradients(recon(mean, x), mean)[0], slope)


def test_log_likelihood(device):
    """Of a density; another one raises."""
    x, mu, eps = torch.randn(3, 6, device=device), torch.randn(3, 2, device=device), torch.randn(4, 3, 2, device=device)
    weights = torch.randn(2, 6, device=device)
    got = fastelbo.log_likelihood(lambda z: z @ weights, x, mu, mu, likelihood=LogCosh(), n_samples=4, eps=eps).log_p
    z, q, p = mu + (mu / 2).exp() * eps, Normal(mu, (mu / 2).exp()), Normal(0.0, 1.0)
    log_w = -log_cosh(1.0)((z @ weights,), x).sum(2) + (p.log_prob(z) - q.log_prob(z)).sum(2)
    torch.testing.assert_close(got, torch.logsumexp(log_w, 0) - math.log(4), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="likelihood must be a density here"):
        fastelbo.log_likelihood(lambda z: z @ weights, x, mu, mu, likelihood=Quartic(), n_samples=4)


def test_log_cosh_is_a_density():
    x = torch.linspace(-60, 60, 2_000_001, dtype=torch.float64)
    for scale in (0.1, 1.0, 2.5):
        p = torch.exp(-LogCosh(scale).nll([torch.tensor(0.7).double()], x))
        assert torch.trapezoid(p, x).item() == pytest.approx(1.0, abs=1e-6)


def test_values_are_checked(device):
    if device.type != "cpu":
        pytest.skip("nobody looks on a GPU")
    good = torch.rand(2, 3) + 0.5
    bad = good.clone()
    bad[0, 1] = -0.5
    for parameters, x, message in (
        ((bad, good), good, r"recon_x\[0\] must be positive for the likelihood 'gamma', got values from -0.5 to "),
        ((good, bad), good, r"recon_x\[1\] must be positive for the likelihood 'gamma'"),
        ((good, good), bad, "x must be positive for the likelihood 'gamma'"),
        ((good, good, good), good, r"recon_x must be a tensor or the tuple \(concentration, rate\) for the likelihood 'gamma'"),
        ((good, -1.0), good, r"recon_x\[1\] must be positive for the likelihood 'gamma', got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            fastelbo.loss(parameters, x, good, good, likelihood=Gamma())
    with pytest.raises(ValueError, match="recon_x must be a tensor for the likelihood 'Quartic', got 2 tensors"):
        fastelbo.loss((good, good), good, good, good, likelihood=Quartic())
    with pytest.raises(ValueError, match=r"LogCosh.scale must be positive and finite, got -1"):
        LogCosh(-1)


def test_records():
    """Frozen, equal ones the same object, shown and pickled with their options."""
    assert Gamma(2.0) is Gamma(rate=2.0) is not Gamma() and Quartic() is Quartic() and Quartic() is not QuarticByKernel()
    assert repr(Gamma(2.0, target_scale=0.5)) == "Gamma(target_scale=0.5, rate=2.0)" and repr(Quartic()) == "Quartic()"
    for likelihood in (Gamma(3.0), Quartic(), LogCosh(0.25, target_scale=2.0)):
        assert pickle.loads(pickle.dumps(likelihood)) is likelihood
    with pytest.raises(AttributeError, match="rate"):
        Gamma().rate = 2.0
    assert (Quartic.name, QuarticByKernel.name, PreciseQuartic.name) == ("Quartic", "Quartic", "precise_quartic")
    assert Gaussian.name == "gaussian"


def test_target_scale(device):
    (mean,), x = make(CASES["log-cosh"], device)
    pixels = torch.randint(0, 256, SHAPE, dtype=torch.uint8, device=device)
    for likelihood in (LogCosh(0.5, target_scale=1 / 255), ByFormula(0.5, target_scale=1 / 255)):
        got = fastelbo.loss(mean, pixels, kl=x.new_zeros(()), likelihood=likelihood).recon
        torch.testing.assert_close(got, log_cosh(0.5)((mean,), pixels.double() / 255).sum())


def test_what_the_docs_show(device):
    """Is the example, in fewer lines."""
    root = Path(__file__).parents[1]
    _, shown, device_function = re.findall(r"```python\n(.*?)```", (root / "docs/own-likelihood.md").read_text(), re.DOTALL)
    recon, x, mu = (torch.randn(3, 4, device=device) for _ in range(3))
    names = {"recon_x": recon, "x": x, "mu": mu, "logvar": mu}
    exec(shown.replace("fastelbo.loss(", "found = fastelbo.loss("), names)
    expected = fastelbo.loss(recon, x, mu, mu, likelihood=LogCosh(0.1))
    torch.testing.assert_close(names["found"], expected, rtol=1e-5, atol=1e-5)
    source = re.sub(r'    """.*?"""\n', "", (root / "examples/log_cosh_kernel.py").read_text(), flags=re.DOTALL)
    assert device_function in source


def test_a_formula_in_place_of_another_has_no_kernel():
    assert LogCosh.kernel and ByFormula.kernel is None and QuarticByKernel.kernel and Quartic.kernel is None

    class Own(Gaussian):
        def nll(self, parameters, x):
            return (parameters[0] - x).abs()

    assert Own.kernel is Own.one_pass is None and Gaussian.kernel


def closed_over(s):
    """One that uses a tensor of which the call knows nothing."""

    class Closed(Likelihood):
        def at_zero(self, parameters):
            return 0.5 * (parameters[0] * torch.exp(-s)) ** 2 + s

        def nll(self, parameters, x):
            return 0.5 * ((x - parameters[0]) * torch.exp(-s)) ** 2 + s

    return Closed()


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("is_sparse", (False, True))
@pytest.mark.parametrize("trains", (False, True))
def test_a_tensor_that_the_call_does_not_know_would_get_no_gradient(trains, is_sparse, device):
    y, x = torch.randn(6, 7, device=device, requires_grad=trains), torch.randn(6, 7, device=device).relu()
    s = torch.tensor(0.5, device=device, requires_grad=True)
    truth = (0.5 * ((x.double() - y.double()) * math.exp(-0.5)) ** 2 + 0.5).sum().detach()
    x = x.to_sparse_csr() if is_sparse else x
    for _ in range(2):  # not once only
        with pytest.raises(ValueError, match=r"Closed.* requires grad and is none of its parameters.* the tuple recon_x"):
            fastelbo.nll(y, x, likelihood=closed_over(s))
    with torch.no_grad():
        torch.testing.assert_close(fastelbo.nll(y, x, likelihood=closed_over(s)).double(), truth)
    torch.testing.assert_close(fastelbo.nll(y, x, likelihood=closed_over(s.detach())).double(), truth)


def test_a_target_of_its_own():
    """Blocks and kernels scale it as they read it, and would know nothing of that."""
    with pytest.raises(TypeError, match=r"LogNormal.target must not be defined: transform x in nll"):

        class LogNormal(Gaussian):
            def target(self, first, x, dtype):
                return super().target(first, x, dtype).log()


@pytest.mark.skipif(BACKEND != "triton", reason="of kernels")
class TestDeviceFunctions:
    @pytest.mark.parametrize(
        ("name", "expected"),
        (
            ("log-cosh", ["reconstruction_kernel"]), ("quartic, kernel", ["loss_fwd_kernel"]), ("quartic", []),
            ("precise", ["reconstruction_kernel"]),
        ),
    )  # fmt: skip
    def test_one_launch(self, name, expected, device, monkeypatch):
        from fastelbo.kernels import direct

        launched, launch = [], direct.Launch.__call__
        monkeypatch.setattr(
            direct.Launch, "__call__", lambda self, *a: launched.append(self.kernel.fn.__name__) or launch(self, *a)
        )
        case = CASES[name]
        parameters, x = make(case, device)
        fastelbo.loss(recon_x(parameters), x, kl=x.new_zeros(()), likelihood=case.likelihood).loss.backward()
        assert launched[:1] == expected

    @pytest.mark.parametrize(
        ("kernel", "error", "message"),
        (
            (
                "log_cash",
                AttributeError,
                r"kernel must be a device function of fastelbo.kernels.likelihoods or 'module:function'",
            ),
            ("no_such_module_of_mine:f", ModuleNotFoundError, "no_such_module_of_mine"),
            (
                "own_device_functions:no_such",
                TypeError,
                "kernel 'own_device_functions:no_such' must be a function with triton.jit",
            ),
            ("own_device_functions:not_jitted", TypeError, "must be a function with triton.jit, got <built-in function len>"),
        ),
    )
    def test_one_that_is_none(self, kernel, error, message, device):
        bad = type("Bad", (Quartic,), {"kernel": kernel})()
        with pytest.raises(error, match=message):
            x = torch.zeros(2, 3, device=device)
            fastelbo.loss(x, x, x, x, likelihood=bad)


class UpperHalf(Bernoulli):
    """One of this package's, for other targets."""

    def support(self, first, x):
        return super().support(first, x)._replace(words="lie in [0.5, 1]", low=0.5)


class Averse(Bernoulli):
    """Or for other predictions."""

    ranges = (Range("be positive", 0, is_open=True),)


@pytest.mark.parametrize("size", (12, 2**13))
def test_values_are_looked_at_where_a_likelihood_allows_fewer(size):
    """By Torch's own functions, too, which allow more."""
    p, x = torch.full((size,), 0.75), torch.full((size,), 0.25)
    with pytest.raises(ValueError, match=r"x must lie in \[0.5, 1\]"):
        fastelbo.nll(p, x, likelihood=UpperHalf())
    p[0] = -0.25
    with pytest.raises(ValueError, match="recon_x must be positive"):
        fastelbo.nll(p, x, likelihood=Averse())


class OneForm(NegativeBinomial):
    """With a form of its own in the place of the two that its parent has."""

    def one_pass(self, parameters, x, wants_value, out, spare):
        return None


def test_a_form_of_ones_own_is_taken_for_sums_too():
    assert OneForm.sums_in_one_pass is None and OneForm.summed == ()
    assert NegativeBinomial.summed and Bernoulli.checked_by_torch and not Averse.checked_by_torch


REDUCED = {
    "sum": (lambda each: each.sum(), ValueError, r"\(1, 4, 5\) for one row, got \(\)"),
    "sum of each row": (lambda each: each.flatten(1).sum(1), ValueError, r"\(1, 4, 5\) for one row, got \(1,\)"),
    "sum that keeps its dimension": (lambda each: each.sum(2, keepdim=True), ValueError, r"got \(1, 4, 1\)"),
    "number": (lambda each: each.sum().item(), TypeError, "must return a tensor, got float"),
}


@pytest.mark.parametrize("grad_mode", (True, False))
@pytest.mark.parametrize("kind", REDUCED)
def test_a_formula_that_reduces(kind, grad_mode):
    """It would broadcast against a mask, and a sum come out that is none."""
    reduce, error, message = REDUCED[kind]

    class Reduced(Likelihood):
        def nll(self, parameters, x):
            return reduce((parameters[0] - x) ** 2)

    recon_x, x = torch.rand(SHAPE, requires_grad=True), torch.rand(SHAPE)
    with torch.set_grad_enabled(grad_mode), pytest.raises(error, match="nll of the likelihood 'Reduced' .*" + message):
        fastelbo.nll(recon_x, x, likelihood=Reduced(), weight=torch.ones(SHAPE))
