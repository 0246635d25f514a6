"""Every likelihood: values and gradients against the truth in float64, derivatives, errors, edges and weights."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastelbo
from conftest import BACKEND
from fastelbo.likelihoods import (
    BY_NAME,
    BernoulliLogits,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Laplace,
    Multinomial,
    find_likelihood,
)
from likelihood_cases import CASES, SHAPE, recon_x, reduce
from support import assert_no_worse, gradcheck, gradgradcheck, gradients, relative


def recon(parameters, x, likelihood, reduction="sum", **options):
    kl = torch.zeros(x.shape[:1] if reduction == "none" else (), device=x.device)
    return fastelbo.loss(recon_x(parameters), x, kl=kl, likelihood=likelihood, reduction=reduction, **options).recon


def counted(case, x):
    return (x != -100) if "ignored" in case.name else None


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean", "none"))
@pytest.mark.parametrize("name", CASES)
def test_float64_truth(name, reduction, device):
    case = CASES[name]
    parameters, x = case.make(device=device)
    got = recon(parameters, x, case.likelihood, reduction)
    wide = [p.detach().cpu().requires_grad_() for p in parameters]
    expected = reduce(case.truth(wide, x.cpu()), reduction, counted=counted(case, x.cpu()))
    upstream = torch.rand_like(expected)
    torch.testing.assert_close(got.detach().cpu(), expected.detach(), rtol=1e-9, atol=1e-11)
    ours = gradients(got, *parameters, grad_outputs=upstream.to(device))
    for a, b in zip(ours, gradients(expected, *wide, grad_outputs=upstream), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_is_no_larger_than_the_formulas(name, dtype, device):
    """Of torch.distributions in the same dtype, or in float32 for what it has no float16 of."""
    case = CASES[name]
    parameters, x = case.make(dtype, device)
    if x.is_floating_point():
        x = x.float()  # targets keep their digits
    wide = [p.detach().double().requires_grad_() for p in parameters]
    narrow = [p.detach().float().requires_grad_() for p in parameters]
    truth = case.truth(wide, x.double() if x.is_floating_point() else x)
    naive = case.truth(narrow, x)
    got = recon(parameters, x, case.likelihood)
    assert got.dtype == torch.float32
    assert_no_worse(got, naive.sum(), truth.detach().sum(), truth.detach().abs().sum() + truth.numel(), name)
    found = zip(
        gradients(got, *parameters), gradients(naive.sum(), *narrow), gradients(truth.sum(), *wide), parameters, strict=True
    )
    for ours, theirs, exact, parameter in found:
        magnitude = exact.abs() + 4 * (1 + x.abs().max())  # of the terms that make up a gradient
        if ours.numel() < x.numel():
            magnitude = magnitude * (x.numel() / max(ours.numel(), 1))
        assert_no_worse(ours, theirs.to(parameter.dtype), exact, magnitude, f"{name}: gradient")


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, reduction, check, device):
    case = CASES[name]
    parameters, x = case.make(device=device)
    # A few elements of each: the dimensions stay, the last of a feature's too.
    classes = {"categorical": 1, "multinomial": 2 if "dim 2" in name else 3}.get(name.split(",")[0])
    keep = tuple(slice(None) if d == classes else slice(size) for d, size in enumerate((2, 2, 1, 2)))
    first = [p.detach()[keep[4 - p.dim() :]] if p.dim() else p.detach() for p in parameters]
    x = x[(keep[0], *keep[2:])] if x.dim() == 3 else x[keep]
    inputs = [p.clone().requires_grad_() for p in first]
    if name == "l1" or name.startswith("laplace"):
        x = x + 0.01  # not at the kink
    if (
        check is gradgradcheck
        and BACKEND == "triton"
        and (reduction == "none" or name not in ("gaussian, logvar", "multinomial"))
    ):
        pytest.skip("the second derivative is the formula's")
    assert check(lambda *p: recon(p, x, case.likelihood, reduction), inputs)


@pytest.mark.parametrize("name", ("gaussian, logvar", "zero_inflated", "categorical, soft", "pos_weight"))
def test_gradients_of_target_and_weight(name, device):
    case = CASES[name]
    parameters, x = case.make(device=device)
    x = x.detach().requires_grad_()
    weight = torch.rand(3, 1, 1, 6, dtype=torch.float64, device=device, requires_grad=True) + 0.1
    inputs = (x, weight, *parameters)
    # Counts are no continuous target.
    inputs = inputs if name != "zero_inflated" else inputs[1:]
    got = recon(parameters, x, case.likelihood, "mean", weight=weight)
    expected = reduce(case.truth(parameters, x), "mean", weight if case.elementwise() else weight.squeeze(1))
    torch.testing.assert_close(gradients(got, *inputs), gradients(expected, *inputs), rtol=1e-6, atol=1e-8)


WEIGHTS = {
    "element": lambda: torch.rand(SHAPE),
    "mask": lambda: torch.rand(SHAPE) > 0.4,
    "sample": lambda: torch.rand(3, 1, 1, 1),
    "pixels": lambda: torch.rand(5, 6),
    "pixels of samples": lambda: torch.rand(3, 1, 5, 6) > 0.4,
    "channels": lambda: torch.rand(4, 1, 1),
    "rows of samples": lambda: torch.rand(3, 1, 5, 1),
    "rows of channels": lambda: torch.rand(4, 5, 1),
    "every second": lambda: torch.rand(1, 4, 1, 6),
    "bytes": lambda: torch.randint(0, 3, SHAPE, dtype=torch.uint8),
    "number": lambda: torch.tensor(0.3),
}


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("layout", ("contiguous", "channels last"))
def test_weights(layout, kind, reduction, device):
    if kind == "number" and reduction == "mean":
        pytest.skip("an error, since a mean divides by it")
    for name in ("l1", "gaussian, soft log scale", "zero_inflated"):
        case = CASES[name]
        parameters, x = case.make(device=device)
        weight = WEIGHTS[kind]().to(device)
        if layout == "channels last":
            parameters[0] = parameters[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        got = recon(parameters, x, case.likelihood, reduction, weight=weight)
        expected = reduce(case.truth(parameters, x), reduction, weight)
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
        upstream = torch.rand_like(expected)
        ours, theirs = (gradients(value, *parameters, grad_outputs=upstream) for value in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


POSITIONS = {
    "labels": ("categorical", lambda: torch.randint(0, 4, (3, 5, 6)), lambda shape: shape),
    "soft labels": ("categorical", lambda: torch.rand(SHAPE), lambda shape: (*shape[:-2], 1, *shape[-2:])),
    "counts": (Multinomial(1), lambda: torch.rand(SHAPE), lambda shape: (*shape[:-2], 1, *shape[-2:])),
    # Of one component and two channels that do not depend on each other: logits, means and log scales.
    "mixture": (
        DiscretizedLogisticMixture(), lambda: 2 * torch.rand(3, 2, 5, 6) - 1, lambda shape: (*shape[:-2], 1, *shape[-2:])
    ),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
@pytest.mark.parametrize("shape", ((3, 5, 6), (3, 1, 1), (5, 6), (1, 6)), ids=str)
@pytest.mark.parametrize("name", POSITIONS)
def test_weights_of_positions(name, shape, reduction, device):
    """One for all classes or channels of a position; a mean over a mixture's is over its channels too."""
    likelihood, target, with_classes = POSITIONS[name]
    x = target().to(device)
    prediction = torch.randn(3, 5 if name == "mixture" else 4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.rand(shape, device=device) * (torch.rand(shape, device=device) > 0.3)
    given = weight.reshape(with_classes(shape))
    got = recon([prediction], x, likelihood, reduction, weight=given)
    if name == "labels":
        terms = F.cross_entropy(prediction, x, reduction="none")
    elif name == "mixture":
        terms = DiscretizedLogistic().nll((prediction[:, [1, 3]], prediction[:, [2, 4]]), x.double())
        weight = given
    else:
        terms = -(F.log_softmax(prediction, 1) * x).sum(1)
    expected = reduce(terms, reduction, weight)
    torch.testing.assert_close(got, expected)
    upstream = torch.rand_like(expected)
    torch.testing.assert_close(*(gradients(v, prediction, grad_outputs=upstream) for v in (got, expected)))


@pytest.mark.parametrize(
    "shape", ((), (6,), (4, 1, 1), (1, 4, 1, 1), (3, 1, 1, 1), (5, 1), (3, 1, 5, 1), (1, 4, 1, 6), SHAPE), ids=str
)
@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("layout", ("contiguous", "channels last"))
def test_scales_of_every_shape(layout, reduction, shape, device):
    mean, x = (torch.randn(SHAPE, dtype=torch.float64, device=device) for _ in range(2))
    if layout == "channels last":
        mean = mean.contiguous(memory_format=torch.channels_last)
    mean.requires_grad_()
    logvar = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    got = recon((mean, logvar), x, Gaussian(parameter="logvar"), reduction)
    expected = reduce(-torch.distributions.Normal(mean, torch.exp(logvar / 2)).log_prob(x), reduction)
    upstream = torch.rand_like(expected)
    torch.testing.assert_close(got, expected)
    ours, theirs = (gradients(value, mean, logvar, grad_outputs=upstream) for value in (got, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_scales_of_long_rows(reduction, device):
    """A scale a channel of images so large that the kernel adds its gradient up itself."""
    mean, x = (torch.randn(2, 3, 32, 33, dtype=torch.float64, device=device) for _ in range(2))
    mean.requires_grad_()
    log_scale = torch.randn(3, 1, 1, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.rand(2, 1, 32, 33, device=device) > 0.3
    got = recon((mean, log_scale), x, Gaussian(parameter="log_scale"), reduction, weight=weight)
    expected = reduce(-torch.distributions.Normal(mean, log_scale.exp()).log_prob(x), reduction, weight)
    upstream = torch.rand_like(expected)
    torch.testing.assert_close(got, expected)
    ours, theirs = (gradients(value, mean, log_scale, grad_outputs=upstream) for value in (got, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_what_is_masked_may_be_anything(reduction, device):
    """Value and gradients as without it, where target, parameters and even nothing at all of a batch are left."""
    x = torch.randn(3, 4, device=device)
    mean, log_scale = (torch.randn(3, 4, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(3, 4, dtype=torch.bool, device=device)
    weight[1:, 2:] = False
    bad = torch.where(weight, x, torch.nan)
    with torch.no_grad():
        mean[2, 2], log_scale[2, 3] = torch.inf, torch.nan
    got = recon((mean, log_scale), bad, Gaussian(parameter="log_scale"), reduction, weight=weight)
    ours = gradients(got.sum(), mean, log_scale)
    clean = [torch.where(weight, p, 0.0) for p in (mean, log_scale)]
    expected = recon(clean, x, Gaussian(parameter="log_scale"), reduction, weight=weight)
    torch.testing.assert_close(got, expected)
    for a, b in zip(ours, gradients(expected.sum(), mean, log_scale), strict=True):
        torch.testing.assert_close(a, torch.where(weight, b, 0.0))


def test_an_all_masked_batch(device):
    """Nothing adds up to 0; the mean of nothing is NaN, as Torch's."""
    x = torch.full((3, 4), torch.nan, device=device)
    mean = torch.randn(3, 4, device=device, requires_grad=True)
    weight = torch.zeros(3, 1, device=device)
    for reduction in ("sum", "batchmean", "none"):
        got = recon([mean], x, "l1", reduction, weight=weight)
        assert (got == 0).all()
        assert (gradients(got.sum(), mean)[0] == 0).all()
    assert recon([mean], x, "l1", "mean", weight=weight).isnan()


EDGES = {
    "counts": ("negative_binomial", [0.0, 1.0, 1e6], ([1e-6, 1.0, 1e6], [1e-6, 1.0, 20.0, 1e6])),
    "nearly Poisson counts": ("negative_binomial", [0.0, 7.0], ([2.0], [1e8, 1e13, 1e14, 1e20])),
    "zeros": ("zero_inflated_negative_binomial", [0.0, 1e6], ([1e-6, 1.0, 1e6], [1e-6, 1e6], [-50.0, 0.0, 50.0])),
    "rates": ("poisson", [0.0, 1.0, 1e6], ([1e-6, 1.0, 1e6],)),
    "log rates": ("poisson_log", [0.0, 1e6], ([-50.0, 0.0, 14.0],)),
    "scales": (Gaussian(), [-1.0, 0.0, 1.0], ([0.0, 1.0], [1e-6, 1.0, 1e6])),
    "absolute": (Laplace(parameter="log_scale"), [-1.0, 0.5], ([0.0, 1.0], [math.log(1e-6), math.log(1e6)])),
    "soft scales": (Gaussian(parameter="log_scale", soft_min=-6.0), [-1.0, 0.5], ([0.0, 1.0], [-50.0, 50.0])),
    "bins": (DiscretizedLogistic("scale"), [-1.0, 1 / 255, 1.0], ([-1.0, 0.1, 1.0], [1e-6, 0.01, 1e6, 1e38])),
    "bins of wide scales": (DiscretizedLogistic(), [-1.0, 0.1, 1.0], ([-1.0, 0.0, 1.0], [60.0, 84.0, 88.0, 104.0, 200.0])),
    "logits": ("continuous_bernoulli_logits", [0.0, 0.3, 1.0], ([-50.0, -1e-3, 0.0, 1e-3, 0.49, 0.51, 50.0],)),
    "weighted logits": (BernoulliLogits(5.0), [0.0, 0.3, 1.0], ([-50.0, 0.0, 50.0],)),
}


def exact(likelihood, x, parameters):
    """By mpmath with 100 digits: the value and the derivatives by the parameters."""
    mp = pytest.importorskip("mpmath")
    mp.mp.dps = 100

    def softplus(v):
        return mp.log1p(mp.exp(v))

    def negative_binomial(m, t):
        e = mp.mpf("1e-8")
        log_p = t * mp.log((t + e) / (t + m + e)) + x * mp.log((m + e) / (t + m + e))
        return -(log_p + mp.loggamma(x + t) - mp.loggamma(t) - mp.loggamma(x + 1))

    def scale(given):
        kind, soft_min = likelihood.parameter, likelihood.soft_min
        log_scale = {"scale": mp.log(given) if kind == "scale" else given, "log_scale": given, "logvar": given / 2}[kind]
        return log_scale if soft_min is None else soft_min + softplus(log_scale - soft_min)

    def function(first, *rest):
        if likelihood == "negative_binomial":
            return negative_binomial(first, rest[0])
        if likelihood == "zero_inflated_negative_binomial":
            p = 1 / (1 + mp.exp(-rest[1]))
            return -mp.log(p * (x == 0) + (1 - p) * mp.exp(-negative_binomial(first, rest[0])))
        if likelihood == "poisson":
            return first - x * mp.log(first) + mp.loggamma(x + 1)
        if likelihood == "poisson_log":
            return mp.exp(first) - x * first + mp.loggamma(x + 1)
        if likelihood == "continuous_bernoulli_logits":
            normalizer = mp.log(2) if first == 0 else mp.log(first / mp.tanh(first / 2))
            return softplus(first) - x * first - normalizer
        if isinstance(likelihood, BernoulliLogits):
            return likelihood.pos_weight * x * softplus(-first) + (1 - x) * softplus(first)
        log_scale = scale(rest[0])
        if isinstance(likelihood, Gaussian):
            return ((x - first) / mp.exp(log_scale)) ** 2 / 2 + log_scale + mp.log(2 * mp.pi) / 2
        if isinstance(likelihood, Laplace):
            return abs(x - first) / mp.exp(log_scale) + log_scale + mp.log(2)
        half, inverse = mp.mpf(1) / (likelihood.levels - 1), mp.exp(-log_scale)
        a, b = (x - first + half) * inverse, (x - first - half) * inverse
        if x > 1 - half:
            return softplus(b)
        if x < half - 1:
            return softplus(-a)
        return softplus(-a) + softplus(b) - mp.log(-mp.expm1(b - a))

    point = [mp.mpf(p) for p in parameters]
    x = mp.mpf(x)
    slopes = []
    for i, p in enumerate(point):
        # A difference in 100 digits has 45 that count; fewer where a large dispersion cancels 20.
        step = mp.mpf(10) ** -48 * max(abs(p), mp.mpf("1e-3"))
        up, down = ([*point[:i], p + s, *point[i + 1 :]] for s in (step, -step))
        slopes.append((function(*up) - function(*down)) / (2 * step))
    return float(function(*point)), [float(s) for s in slopes]


@pytest.mark.parametrize("compiled", (False, True), ids=("", "compiled"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_edges(name, dtype, compiled, device):
    """At the ends of what occurs nothing overflows, and digits are lost only where the formula's own terms cancel."""
    likelihood, targets, grids = EDGES[name]
    points = torch.cartesian_prod(torch.tensor(targets).double(), *(torch.tensor(g).double() for g in grids))
    points = points.to(dtype)
    x, *parameters = (column.contiguous().view(-1, 1).to(device) for column in points.T)
    parameters = [p.requires_grad_() for p in parameters]
    torch.compiler.reset()
    call = torch.compile(recon, fullgraph=True, backend="aot_eager") if compiled else recon
    values = call(parameters, x, likelihood, "none")
    ours = gradients(values.sum(), *parameters)
    eps = 8 * torch.finfo(dtype).eps
    for i, (target, *point) in enumerate(points.double().tolist()):
        value, slopes = exact(likelihood, target, point)
        # Of the terms: what a count adds, and what a parameter's logarithm can.
        counts = name in ("counts", "nearly Poisson counts", "zeros", "rates", "log rates")
        size = abs(value) + (40 * (1 + target) if counts else 20)
        assert abs(values[i].item() - value) <= eps * size, (name, target, point, values[i].item(), value)
        for j, slope in enumerate(slopes):
            if isinstance(likelihood, Laplace) and j == 0 and target == point[0]:
                continue
            near = abs(slope) + (20 if name not in ("counts", "zeros") or j == 2 else 0)
            if name in ("counts", "zeros") and j == 0:
                near += point[1] / (point[0] + point[1]) * (1 + target / point[0])
            if name in ("counts", "zeros") and j == 1:
                # The terms that cancel; in Torch in float64, two digamma as well.
                near += target / (point[0] + point[1]) + 1 / point[1] + (20 if dtype == torch.float64 else 0)
            assert abs(ours[j][i].item() - slope) <= eps * near, (name, target, point, j, ours[j][i].item(), slope)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_a_zero_without_a_sign_or_with_one(dtype, device):
    """ReLU, clamp and hardtanh make -0.0, of which a kernel could see the sign bit alone."""
    probability = torch.tensor([[0.0, -0.0, 1.0, -0.0]], dtype=dtype, device=device)
    x = torch.tensor([[1.0, 1.0, 0.0, 0.0]], device=device)
    for weight in (None, torch.ones_like(x)):
        for reduction, expected in (("sum", 300.0), ("mean", 75.0), ("none", 300.0)):
            assert recon([probability], x, "bernoulli", reduction, weight=weight).item() == expected
    rates = recon([-torch.zeros(1, 2, device=device)], torch.tensor([[0.0, 3.0]], device=device), "poisson", "none")
    assert rates.item() == math.inf


@pytest.mark.parametrize(
    "likelihood",
    ("gaussian", "laplace", Gaussian(parameter="log_scale"), Gaussian(parameter="logvar"), Laplace(parameter="logvar")),
    ids=str,
)
def test_an_infinite_scale_is_an_infinite_loss(likelihood, device):
    mean, x = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    assert recon((mean, torch.tensor([[1.0, math.inf]], device=device)), x, likelihood).item() == math.inf


@pytest.mark.parametrize("compiled", (False, True) if BACKEND == "torch" else (False,))
@pytest.mark.parametrize("kind", (Gaussian, Laplace))
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(s, torch.float64) for s in (1e-200, 1e-17, 1e17, 1e200, 1.5e308)]
    + [(s, torch.float32) for s in (1e-25, 1e-17, 1e17, 1e30)],
)
def test_fixed_scales_of_any_size(scale, dtype, kind, compiled, device):
    """Their squares may be no numbers."""
    distances = torch.tensor([[-0.5, 0.0, 0.25], [0.25, -0.125, 0.5]], dtype=torch.float64)
    mean = (scale * distances).to(device, dtype).requires_grad_()
    call = lambda m: fastelbo.nll(m, torch.zeros_like(m), likelihood=kind(scale=scale), reduction="none")  # noqa: E731
    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    got = call(mean)
    if kind is Gaussian:
        values, slopes = 0.5 * distances.square() + 0.5 * math.log(2 * math.pi), distances
    else:
        values, slopes = distances.abs() + math.log(2), distances.sign()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert relative(got.cpu(), (values + math.log(scale)).sum(1)) < tolerance
    (gradient,) = gradients(got.sum(), mean)
    assert relative(gradient.cpu().double() * scale, slopes) < tolerance


def test_a_tiny_rate_takes_the_upstream_factor_first(device):
    """5 / 1e-39 overflows float32. What arrives, 0 or 1/1000 of it, does not."""
    for value, x, reduction, upstream, expected in (
        (1e-39, 5.0, "sum", 0.0, 0.0),
        (1e-37, 200.0, "mean", 1.0, -2e36),
        (1e-37, 200.0, "none", 1e-3, -2e36),
    ):
        rate = torch.full((1, 1000), value, device=device, requires_grad=True)
        got = recon([rate], torch.full_like(rate, x).detach(), "poisson", reduction)
        for weight in (None, torch.ones(1, 1000, device=device)):
            got = recon([rate], torch.full_like(rate, x).detach(), "poisson", reduction, weight=weight)
            for _ in range(2):  # computed in backward, and stored in forward
                slope = gradients(got, rate, grad_outputs=torch.full_like(got, upstream), retain_graph=True)[0]
                torch.testing.assert_close(slope, torch.full_like(slope, expected), rtol=1e-5, atol=0)


def test_a_rate_of_nan_has_a_gradient_of_nan(device):
    """Where nothing was counted, too."""
    rate = torch.tensor([[torch.nan, 1.0, 0.0]], device=device, requires_grad=True)
    got = recon([rate], torch.zeros(1, 3, device=device), "poisson")
    assert got.isnan()
    torch.testing.assert_close(gradients(got, rate)[0].cpu(), torch.tensor([[torch.nan, 1.0, 1.0]]), equal_nan=True)


@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
def test_what_is_no_probability_has_a_gradient_of_nan(weighted, device):
    probability = torch.tensor([[0.5, torch.nan, 0.0, 1.0, 0.2]], device=device, requires_grad=True)
    x = torch.tensor([[0.5, 0.5, 0.5, 0.5, 1.0]], device=device)
    weight = torch.ones_like(x) if weighted else None
    got = recon([probability], x, "continuous_bernoulli", "none", weight=weight)
    assert got.isnan().all()
    (slope,) = gradients(got, probability, grad_outputs=torch.ones_like(got))
    assert slope.isnan().tolist() == [[False, True, False, False, False]]
    assert slope[0, 2] == slope[0, 3] == 0  # clamped, as torch.distributions does
    for value in (1.5, -0.1):
        outside = torch.tensor([[value]], requires_grad=True)
        nll = BY_NAME["continuous_bernoulli"].nll([outside], torch.ones(1, 1))
        assert nll.isnan()
        assert gradients(nll, outside)[0].isnan()


@pytest.mark.parametrize("dim", (1, -1))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf), ids=str)
def test_ignored_labels_have_no_gradient(bad, dim, device):
    """Whatever their logits are."""
    logits, labels = torch.randn(2, 3, 4), torch.randint(0, 3, (2, 4))
    labels[:, 1] = -100
    expected = logits.clone().requires_grad_()
    F.cross_entropy(expected, labels).backward()
    logits[:, :, 1] = bad
    logits = logits.movedim(1, dim).to(device).requires_grad_()
    got = recon([logits], labels.to(device), Categorical(dim=dim), "mean")
    slope = gradients(got, logits)[0].movedim(dim, 1).cpu()
    torch.testing.assert_close(slope, expected.grad)


def test_targets_of_nearly_uniform_logits(device):
    """Where the largest of 5000 has hardly more than its share, its gradient is no small difference of large terms."""
    logits = 0.1 * torch.randn(1, 5000)
    x = torch.zeros(1, 5000)
    x[0, ::7] = 1.0
    largest = logits.argmax()
    x[0, largest] = 0.0
    wide = logits.double().requires_grad_()
    exact = gradients((-F.log_softmax(wide, 1) * x).sum(), wide)[0]
    logits = logits.to(device).requires_grad_()
    slope = gradients(recon([logits], x.to(device), Multinomial()), logits)[0].cpu()
    assert abs(slope[0, largest] / exact[0, largest] - 1) < 1e-6
    torch.testing.assert_close(slope.double(), exact, rtol=2e-6, atol=0)


def test_nan_stays_visible(device):
    for name, case in CASES.items():
        parameters, x = case.make(torch.float32, device)
        if "ignored" in name:
            x[0] = 0
        for i in range(len(parameters)):
            bad = [p.detach().clone() for p in parameters]
            bad[i].view(-1)[0] = torch.nan
            assert recon(bad, x, case.likelihood).isnan(), (name, i)
        if x.is_floating_point():
            x = x.clone()
            x.view(-1)[0] = torch.nan
            assert recon(parameters, x, case.likelihood).isnan(), name


def test_optimal_scale(device):
    """The Gaussian whose scale is the root of the mean squared error: nothing else has a smaller loss."""
    mean = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.randn(5, 6, dtype=torch.float64, device=device)
    error = F.mse_loss(mean, x)
    for reduction, factor in (("sum", 30), ("batchmean", 6), ("mean", 1)):
        got = recon([mean], x, Gaussian("optimal"), reduction)
        expected = factor * 0.5 * (torch.log(2 * torch.pi * error) + 1)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, mean), gradients(expected, mean, retain_graph=True))
    rows = recon([mean], x, Gaussian("optimal"), "none")
    torch.testing.assert_close(rows, -torch.distributions.Normal(mean, error.sqrt()).log_prob(x).sum(1))
    weight = torch.rand(5, 1, device=device) + 0.5
    error = (weight * (mean - x).square()).sum() / (6 * weight.sum())
    for reduction in ("sum", "mean", "none"):
        got = recon([mean], x, Gaussian("optimal", soft_min=-1.0), reduction, weight=weight)
        scale = torch.exp(-1 + torch.nn.functional.softplus(0.5 * error.log() + 1))
        expected = reduce(-torch.distributions.Normal(mean, scale).log_prob(x), reduction, weight)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
        ours, theirs = (gradients(v.sum(), mean, retain_graph=True) for v in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_levels(device):
    """Integers are levels, and all of them have the probability 1 together."""
    levels = torch.arange(16, dtype=torch.uint8, device=device).view(-1, 1)
    likelihood = DiscretizedLogistic(levels=16)
    for mean, log_scale in ((-1.2, -4.0), (0.3, -2.0), (1.0, 0.5)):
        mean, log_scale = torch.full((16, 1), mean, dtype=torch.float64, device=device), torch.tensor(log_scale, device=device)
        nll = recon((mean, log_scale), levels, likelihood, "none")
        torch.testing.assert_close(torch.exp(-nll).sum().item(), 1.0, rtol=1e-12, atol=0)
        torch.testing.assert_close(nll, recon((mean, log_scale), 2 * levels.double() / 15 - 1, likelihood, "none"))
        # Neither an interval nor a scale of numbers is theirs.
        other = replace(likelihood, interval=(0, 1), target_scale=0.5)
        assert torch.equal(nll, recon((mean, log_scale), levels, other, "none"))
        torch.testing.assert_close(nll, recon((mean, log_scale), 2 * levels.double() / 15, other, "none"))


INTERVALS = ((0.0, 1.0), (0.0, 255.0), (-1e-3, -9e-4))
KINDS_IN_STEPS = {
    "logistic": DiscretizedLogistic(),
    "mixture": DiscretizedLogisticMixture(),
    "last": DiscretizedLogisticMixture(dim=-1),
}


@pytest.mark.parametrize(("kind", "channels"), (("logistic", 2), ("mixture", 1), ("mixture", 2), ("mixture", 3), ("last", 3)))
@pytest.mark.parametrize("interval", INTERVALS, ids=str)
def test_intervals(interval, kind, channels, device):
    """The loss and gradients, that by the target too, of the same values in [-1, 1]; whichever dtype the target has, with a
    mask."""
    plain, (low, high) = KINDS_IN_STEPS[kind], interval
    likelihood = replace(plain, interval=interval)
    levels = torch.randint(0, 256, (2, channels, 3), device=device)
    levels[:, 0, :2] = torch.tensor([0, 255])
    mask = torch.rand(2, 1, 3, device=device) > 0.3
    if kind == "logistic":
        parameters = [0.5 * torch.randn(2, channels, 3), 0.5 * torch.randn(channels, 1) - 2]
    else:
        parameters = [torch.randn(2, 20 if channels == 3 else 2 * (1 + 2 * channels), 3)]
    if kind == "last":
        levels, mask, *parameters = (t.movedim(1, -1).contiguous() for t in (levels, mask, *parameters))
    parameters = [p.to(device, torch.float64).requires_grad_() for p in parameters]
    x = low + levels.double() * (high - low) / 255
    terms = plain.nll(parameters, 2 * levels.double() / 255 - 1)
    of_terms = mask if kind == "logistic" else mask.squeeze(plain.dim)
    expected = reduce(terms, "none", of_terms)
    by_truth = gradients(expected.sum(), *parameters)
    by_target = replace(likelihood, target_scale=0.25)
    for values, record in (
        (x, likelihood),
        (4 * x, by_target),
        (x.clone().requires_grad_(), likelihood),
    ):  # the last by autograd
        value = recon(parameters, values, record, "none", weight=mask)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients(value.sum(), *parameters), by_truth, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(recon(parameters, x, likelihood), terms.sum(), rtol=1e-9, atol=0)
    if interval == (0.0, 255.0):
        narrow = [p.detach().float().requires_grad_() for p in parameters]
        for dtype in (torch.float32, torch.bfloat16):
            torch.testing.assert_close(recon(narrow, levels.to(dtype), likelihood).double(), terms.sum(), rtol=1e-5, atol=0)
    by_x = lambda v: recon([p.detach() for p in parameters], v, likelihood)  # noqa: E731
    middle = (low + (levels.double().clamp(3, 250) + 0.3) * (high - low) / 255).requires_grad_()
    assert torch.autograd.gradcheck(by_x, middle, eps=1e-7 * (high - low), atol=1e-4 / (high - low), rtol=1e-4)


@pytest.mark.skipif(BACKEND != "triton", reason="Torch's converts a block at a time")
@pytest.mark.parametrize("kind", ("logistic", "mixture"))
def test_kernels_read_the_data_itself(kind, device, monkeypatch):
    """Of any interval and scale: nothing is copied for them."""
    from fastelbo import kernels

    likelihood = replace(KINDS_IN_STEPS[kind], interval=(0, 1), target_scale=2.0)
    x = torch.rand(2, 1, 6, device=device) / 2
    shapes = [(2, 1, 6), (2, 1, 6)] if kind == "logistic" else [(2, 3, 6)]
    launches, read = kernels.Reconstruction if kind == "logistic" else kernels.Mixture, []
    forward = launches.forward
    monkeypatch.setattr(launches, "forward", lambda self, p, x, *rest: read.append(x) or forward(self, p, x, *rest))
    assert recon([torch.randn(shape, device=device) for shape in shapes], x, likelihood).isfinite()
    assert [t.data_ptr() for t in read] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint8), ids=str)
def test_labels_and_one_hot_targets_agree_with_cross_entropy(dtype, device):
    logits = torch.randn(4, 7, 5, device=device, requires_grad=True)
    labels = torch.randint(0, 7, (4, 5), device=device)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    one_hot = F.one_hot(labels, 7).movedim(-1, 1)
    last = logits.movedim(1, -1)
    for got in (
        recon([logits], labels.to(dtype), "categorical"),
        recon([logits], one_hot.to(dtype), "categorical"),
        recon([last], labels.to(dtype), Categorical(dim=-1)),
        recon([last], one_hot.movedim(1, -1).to(dtype), Multinomial()),
    ):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, logits), gradients(expected, logits, retain_graph=True))


def test_masked_classes(device):
    """A logit of -infinity takes a class out, as long as no target has it."""
    logits = torch.randn(4, 7, device=device)
    logits[:, 3] = -torch.inf
    logits.requires_grad_()
    counts = torch.randint(0, 5, (4, 7), device=device).float()
    counts[:, 3] = 0
    rest = [0, 1, 2, 4, 5, 6]
    got = recon([logits], counts, "multinomial")
    expected = -(F.log_softmax(logits[:, rest], -1) * counts[:, rest]).sum()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, logits), gradients(expected, logits))


def bad_calls(device):
    p, x = torch.rand(3, 4, device=device), torch.rand(3, 4, device=device)
    labels = torch.zeros(3, dtype=torch.long, device=device)
    return {
        "unknown likelihood": ((p, x, "gamma"), {}, "likelihood must be an object of fastelbo.likelihoods or one of"),
        "too few parameters": ((p, x, "negative_binomial"), {}, r"the tuple \(mean, inverse_dispersion\)"),
        "too many parameters": (((p, p), x, "l1"), {}, "recon_x must be a tensor"),
        "scale twice": (
            ((p, p), x, Gaussian(2.0)),
            {},
            r"give Gaussian.scale or the tuple \(mean, scale\), not both: got scale=2.0",
        ),
        "Laplace's scale twice": (((p, p), x, Laplace(0.5)), {}, r"give Laplace.scale or the tuple \(mean, scale\), not both"),
        "optimal and a scale": (
            ((p, p), x, Gaussian("optimal")),
            {},
            "give Gaussian.scale or the tuple .* not both: got scale='optimal'",
        ),
        "pos_weight twice": (
            ((p, p), x, BernoulliLogits(2.0)),
            {},
            r"give BernoulliLogits.pos_weight or the tuple \(logits, pos_weight\), not both: got pos_weight=2.0",
        ),
        "shape of a parameter": (((p, p[:, :3]), x, "gaussian"), {}, r"recon_x\[1\] must broadcast to recon_x\[0\]"),
        "dtype of a parameter": (((p, labels), x, "gaussian"), {}, r"recon_x\[1\] must be float16"),
        "shape of weight": ((p, x, "l1"), {"weight": p[:2]}, "weight must broadcast to x"),
        "type of weight": ((p, x, "l1"), {"weight": 0.5}, "weight must be a tensor"),
        "weight of classes": ((p, x, "multinomial"), {"weight": p}, "weight must have 1 element along dimension 1"),
        "labels of a float dtype": ((p, labels.float(), "categorical"), {}, "x must be of an integer dtype for labels"),
        "shape of labels": ((p, labels[:2], "categorical"), {}, "x must have the shape of recon_x without its dimension 1"),
        "dimension": ((p, x, Multinomial(3)), {}, "Multinomial.dim must be a dimension of recon_x"),
        "labels beyond": ((p, labels + 4, "categorical"), {}, "x must have labels from 0 to 3"),
        "classes last": (
            (torch.rand(3, 4, 5, device=device), torch.zeros(3, 4, dtype=torch.long, device=device), "categorical"),
            {},
            r"use likelihoods.Categorical\(dim=-1\)",
        ),
        "channels last": (
            (torch.rand(2, 4, 5, 100, device=device), torch.rand(2, 4, 5, 3, device=device), DiscretizedLogisticMixture()),
            {},
            r"use likelihoods.DiscretizedLogisticMixture\(dim=-1\)",
        ),
        "levels beyond": (
            ((p, p), torch.full((3, 4), 16, device=device), DiscretizedLogistic(levels=16)),
            {},
            "levels from 0 to 15",
        ),
        "values beyond": (((p, p), x + 2, "discretized_logistic"), {}, r"x must lie in \[-1, 1\]"),
        "negative counts": ((p, x - 3, "poisson"), {}, "x must not be negative for the likelihood"),
        "negative counts of two": (((p, p), x - 3, "negative_binomial"), {}, "x must not be negative for the likelihood"),
        "negative rates": ((-p, x, "poisson"), {}, "recon_x must not be negative for the likelihood"),
        "negative dispersion": (((p, -p), x, "negative_binomial"), {}, r"recon_x\[1\] must be positive for the likelihood"),
    }


@pytest.mark.parametrize("name", bad_calls("cpu"))
def test_errors(name, device):
    (p, x, likelihood), options, message = bad_calls(device)[name]
    if ("beyond" in name or "negative" in name) and device.type != "cpu":
        pytest.skip("nobody looks on a GPU")
    parameters = list(p) if isinstance(p, tuple) else [p]
    with pytest.raises((TypeError, ValueError), match=message):
        recon(parameters, x, likelihood, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Gaussian("sigma"), "Gaussian.scale must be a number or 'optimal', got str"),
        (lambda: Gaussian("log_scale"), "Gaussian.scale must be a number: .*parameter='log_scale'"),
        (lambda: Laplace("logvar"), "Laplace.scale must be a number: .*parameter='logvar'"),
        (lambda: Laplace("optimal"), "Laplace.scale must be a number, got str"),
        (lambda: Gaussian(torch.ones(())), r"Gaussian.scale must be a number: pass a tensor as the second .*\(mean, scale\)"),
        (
            lambda: Laplace(torch.nn.Parameter(torch.ones(4))),
            r"Laplace.scale must be a number: pass a tensor .*\(mean, scale\)",
        ),
        (lambda: Gaussian(np.ones(2)), "Gaussian.scale must be a number or 'optimal', got ndarray"),
        (lambda: Laplace(np.ones(2)), "Laplace.scale must be a number, got ndarray"),
        (lambda: Gaussian(0), "Gaussian.scale must be positive and finite, got 0.0"),
        (lambda: Laplace(-0.5), "Laplace.scale must be positive and finite, got -0.5"),
        (lambda: Gaussian(math.nan), "Gaussian.scale must be positive and finite, got nan"),
        (lambda: Laplace(math.inf), "Laplace.scale must be positive and finite, got inf"),
        (lambda: Gaussian(parameter="log_scale", soft_min=-math.inf), "Gaussian.soft_min must be finite, got -inf"),
        (lambda: Gaussian(target_scale=math.nan), "Gaussian.target_scale must be finite, got nan"),
        (lambda: BernoulliLogits(pos_weight=math.inf), "BernoulliLogits.pos_weight must be finite, got inf"),
        (
            lambda: BernoulliLogits(torch.ones(4)),
            r"BernoulliLogits.pos_weight must be a number: pass a tensor as the second .*\(logits, pos_weight\)",
        ),
        (lambda: Gaussian(parameter="sigma"), "Gaussian.parameter must be one of 'scale', 'log_scale', 'logvar'.*got 'sigma'"),
        (lambda: DiscretizedLogistic("optimal"), "DiscretizedLogistic.parameter must be one of"),
        (lambda: Gaussian(soft_min="low"), "Gaussian.soft_min must be a number"),
        (lambda: Categorical(dim=0), "Categorical.dim must not be 0"),
        (lambda: Categorical(ignore_index=1.5), "Categorical.ignore_index must be an integer"),
        (lambda: DiscretizedLogistic(levels=1), "DiscretizedLogistic.levels must be at least 2"),
        *(
            (
                lambda bad=bad, kind=kind: kind(interval=bad),
                rf"{kind.__name__}.interval must be a pair \(low, high\) of finite .*low < high; got",
            )
            for kind in (DiscretizedLogistic, DiscretizedLogisticMixture)
            for bad in (
                (1.0, 0.0),
                (0.0, 0.0),
                (0.0, math.nan),
                (-math.inf, 1.0),
                (0.0, math.inf),
                (0.0,),
                (0, 1, 2),
                1.0,
                None,
                "01",
                ("0", "1"),
                (None, 1.0),
                (False, True),
                (0.0, 5e-324),
                (torch.zeros(()), torch.ones(())),
            )
        ),
    ),
)
def test_options_are_checked(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("dtype", "classes", "ignore_index"),
    (
        (torch.uint8, 200, -100),
        (torch.uint8, 256, -100),
        (torch.int8, 200, -100),
        (torch.uint8, 256, -1),
        (torch.uint16, 300, 7),
    ),
    ids=str,
)
@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_labels_of_short_dtypes(dtype, classes, ignore_index, reduction, device):
    """Whatever the number of classes or the label to ignore is in such a dtype: nothing wraps around."""
    logits = torch.randn(6, classes, device=device)
    labels = torch.tensor([0, 1, 7, 100, min(classes, 156) - 1, 127], device=device)
    weight = torch.tensor([1, 2, 1, 1, 3, 1], dtype=torch.uint8, device=device)
    likelihood = Categorical(ignore_index=ignore_index)
    if dtype == torch.int8:
        labels = labels.clamp(max=127)
    got = recon([logits], labels.to(dtype), likelihood, reduction)
    torch.testing.assert_close(got, F.cross_entropy(logits, labels, reduction=reduction, ignore_index=ignore_index))
    terms = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    expected = reduce(terms, reduction, weight, labels != ignore_index)
    torch.testing.assert_close(recon([logits], labels.to(dtype), likelihood, reduction, weight=weight), expected)


def test_target_scale_of_every_likelihood(device):
    """It is the target that is scaled, in the kernel as in the formula."""
    for name, case in CASES.items():
        parameters, x = case.make(device=device)
        if x.is_floating_point():
            torch.testing.assert_close(
                recon(parameters, 4 * x, replace(find_likelihood(case.likelihood), target_scale=0.25)),
                recon(parameters, x, case.likelihood),
                msg=name,
            )
    parameters, x = [torch.randn(2, 9, 5, device=device)], 2 * torch.rand(2, 1, 5, device=device) - 1
    scaled = DiscretizedLogisticMixture(target_scale=0.25)
    torch.testing.assert_close(recon(parameters, 4 * x, scaled), recon(parameters, x, DiscretizedLogisticMixture()))


INVALID = {
    "counts": ("zero_inflated_negative_binomial", (1.0, 1.0, 0.0), -1.0),
    "mean": ("zero_inflated_negative_binomial", (-0.5, 1.0, 0.0), 0.0),
    "dispersion": ("zero_inflated_negative_binomial", (1.0, -3.0, 0.0), 0.0),
    "dispersion of counts": ("negative_binomial", (1.0, -3.0), 1.0),
    "value": ("discretized_logistic", (0.0, 0.0), 1.5),
}


@pytest.fixture
def unseen(monkeypatch):
    """As on a GPU, or traced: nobody looks at values."""
    monkeypatch.setattr("fastelbo.engine.loss.check_values", lambda *_: None)


@pytest.mark.parametrize("name", INVALID)
def test_invalid_numbers_give_nan(name, device, unseen):
    likelihood, parameters, x = INVALID[name]
    parameters = [torch.full((2, 3), p, device=device) for p in parameters]
    x = torch.full((2, 3), x, device=device)
    assert recon(parameters, x, likelihood, weight=torch.ones(2, 3, device=device)).isnan()


def test_targets_beyond_a_mixture_give_nan(device, unseen):
    parameters, weight = [torch.randn(2, 9, 5, device=device)], torch.ones(2, 1, 5, device=device)
    for x, levels in ((torch.full((2, 1, 5), 1.5, device=device), 256), (torch.full((2, 1, 5), 32, device=device), 32)):
        assert recon(parameters, x, DiscretizedLogisticMixture(levels=levels), weight=weight).isnan()


def test_targets_outside_the_unit_interval_raise_with_options_too(device):
    if device.type != "cpu":
        pytest.skip("nobody looks on a GPU")
    p, bytes_, ones = torch.rand(2, 3), torch.full((2, 3), 200, dtype=torch.uint8), torch.ones(2, 3)
    for likelihood, options in (
        ("bernoulli", {"weight": ones}),
        ("bernoulli_logits", {"weight": ones}),
        (BernoulliLogits(2.0), {}),
        ("continuous_bernoulli", {"weight": ones}),
    ):
        with pytest.raises(ValueError, match=r"x must lie in .*target_scale=1/255"):
            recon([p], bytes_, likelihood, **options)
    with pytest.raises(ValueError, match="recon_x must lie in"):
        recon([p + 2], ones, "continuous_bernoulli", weight=ones)
    recon([p], bytes_, "bernoulli", weight=torch.zeros(2, 3))


def test_confident_logits_keep_their_loss_and_gradient_under_pos_weight(device):
    logits = torch.tensor([[-30.0, -20.0, 30.0, 20.0]], device=device, requires_grad=True)
    x = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    got = recon([logits], x, BernoulliLogits(2.0))
    exact = torch.exp(-logits.detach().double().abs()) * torch.tensor([1, 1, 2, 2], device=device)
    torch.testing.assert_close(got.double(), exact.sum(), rtol=1e-6, atol=0)
    sign = torch.tensor([1, 1, -1, -1], device=device)
    torch.testing.assert_close(gradients(got, logits)[0].double(), sign * exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", ((), (4,), (3, 1), (3, 4)), ids=str)
def test_gradient_of_pos_weight(shape, device):
    """Of each that wants one, the target too."""
    logits, x = torch.randn(3, 4, device=device, requires_grad=True), torch.rand(3, 4, device=device, requires_grad=True)
    pos_weight = torch.rand(shape, device=device, requires_grad=True)
    got = recon((logits, pos_weight), x, "bernoulli_logits")
    expected = (pos_weight * x * F.softplus(-logits) + (1 - x) * F.softplus(logits)).sum()
    torch.testing.assert_close(*(gradients(v, logits, x, pos_weight) for v in (got, expected)))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_name_is_the_object_with_its_defaults(name, device):
    """In the value and in the gradients, to the last bit; and records are compared by value."""
    kind = type(BY_NAME[name])
    likelihood = kind()
    assert likelihood is find_likelihood(name)
    assert likelihood != kind(target_scale=0.5) == kind(target_scale=Fraction(1, 2))
    if name in ("bernoulli", "bernoulli_logits", "mse", "gaussian"):
        parameters, x = [torch.rand(3, 7, device=device, requires_grad=True)], torch.rand(3, 7, device=device)
    elif name == "discretized_logistic_mixture":
        parameters, x = [torch.randn(2, 9, 5, device=device, requires_grad=True)], torch.rand(2, 1, 5, device=device) - 0.5
    else:
        parameters, x = next(c for c in CASES.values() if c.likelihood == name).make(torch.float32, device)
    for weight in (None, torch.rand(len(x), *[1] * (x.dim() - 1), device=device)):
        named, made = (recon(parameters, x, likelihood, "mean", weight=weight) for likelihood in (name, likelihood))
        assert torch.equal(named, made)
        assert all(torch.equal(a, b) for a, b in zip(*(gradients(v, *parameters) for v in (named, made)), strict=True))


@pytest.mark.parametrize("shape", ((), (1,), (1, 1)), ids=str)
def test_one_dispersion_for_all(shape, device):
    mean, theta = torch.rand(3, 5, device=device) + 0.1, torch.full(shape, 1.5, device=device, requires_grad=True)
    x = torch.arange(15.0, device=device).view(3, 5)
    got = recon((mean, theta), x, "negative_binomial")
    expected = recon((mean, theta.expand(3, 5).contiguous()), x, "negative_binomial")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, theta), gradients(expected, theta))


@pytest.mark.parametrize("weight", (None, 0.0), ids=("no data", "no weight"))
def test_the_optimal_scale_of_nothing(weight, device):
    """The sum of nothing is 0, as everywhere; its mean is NaN, as Torch's."""
    shape = (0, 4) if weight is None else (3, 4)
    mean, x = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
    for w in (None,) if weight is None else (torch.zeros(shape, device=device), torch.zeros(3, 1, device=device)):
        for reduction in ("sum", "none"):
            got = recon([mean], x, Gaussian("optimal"), reduction, weight=w)
            assert got.shape == (x.shape[:1] if reduction == "none" else ())
            assert (got == 0).all()
            assert (gradients(got.sum(), mean)[0] == 0).all()
        assert recon([mean], x, Gaussian("optimal"), "mean", weight=w).isnan()
    assert recon([mean], x, Gaussian("optimal"), "none", weight=torch.ones(shape, device=device)).shape == shape[:1]


def test_a_perfect_reconstruction_with_an_optimal_scale(device):
    """The bound is for it: finite, and without a gradient."""
    mean = torch.rand(4, device=device, requires_grad=True)
    x = mean.detach().clone()
    for reduction in ("sum", "none"):
        got = recon([mean], x, Gaussian("optimal", soft_min=-6.0), reduction, weight=torch.ones(4, device=device))
        torch.testing.assert_close(got.sum().item(), 4 * (-6 + 0.5 * math.log(2 * math.pi)), rtol=1e-6, atol=0)
        assert (gradients(got.sum(), mean)[0] == 0).all()
