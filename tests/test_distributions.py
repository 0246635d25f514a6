"""Distributions in the place of `recon_x`, and from a decoder: minus the sum of their own `log_prob`, in every call."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributions as D
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.utils.checkpoint import checkpoint

import fastelbo
from conftest import BACKEND, DEVICE
from fastelbo import ELBO, IWAE
from fastelbo.likelihoods import Gaussian, StudentT
from fastelbo.likelihoods.distributions import of_distribution
from likelihood_cases import reduce
from support import gradcheck, gradgradcheck, gradients, relative

B, T, K = 4, 3, 5
SHAPE = (B, T, K)


class Counts(Distribution):
    """As scvi-tools' `NegativeBinomial`: its attributes, and the formula of Lopez et al. (2018) with their 1e-8."""

    arg_constraints = {}  # noqa: RUF012
    support = D.constraints.nonnegative_integer

    def __init__(self, mu, theta):
        self.mu, self.theta = D.utils.broadcast_all(mu, theta)
        super().__init__(self.mu.shape)

    def log_prob(self, value):
        mu, theta, eps = self.mu, self.theta, 1e-8
        log_theta_mu = torch.log(theta + mu + eps)
        return (
            theta * (torch.log(theta + eps) - log_theta_mu) + value * (torch.log(mu + eps) - log_theta_mu)
            + torch.lgamma(value + theta) - torch.lgamma(theta) - torch.lgamma(value + 1)
        )  # fmt: skip


class InflatedCounts(Counts):
    """As its `ZeroInflatedNegativeBinomial`."""

    def __init__(self, mu, theta, zi_logits):
        super().__init__(mu, theta)
        self.zi_logits = zi_logits.expand(self.mu.shape)

    def log_prob(self, value):
        extra, counted = torch.sigmoid(self.zi_logits), super().log_prob(value).exp()
        return torch.log(torch.where(value == 0, extra, 0.0) + (1 - extra) * counted)


class Case(NamedTuple):
    """`make(*tensors)` is the distribution, of tensors of these `shapes` that `draw` brings to where they may lie."""

    name: str
    make: Callable[..., Distribution]
    shapes: tuple[tuple[int, ...], ...]
    draw: tuple[Callable[[Tensor], Tensor], ...]  # of standard normals
    target: Callable[[], Tensor]

    def tensors(self, dtype=torch.float64, batch=B) -> list[Tensor]:
        drawn = (f(torch.randn(shape, dtype=torch.float64)) for shape, f in zip(self.shapes, self.draw, strict=True))
        return [t.to(DEVICE, dtype).requires_grad_() for t in drawn]

    def x(self) -> Tensor:
        return self.target().to(DEVICE)


def real(t):
    return t


def positive(t):
    return torch.exp(0.5 * t)


def unit(t):
    return torch.sigmoid(t)


def _reals():
    return torch.randn(SHAPE, dtype=torch.float64)


def _bits():
    return torch.rand(SHAPE, dtype=torch.float64).round()


def _units():
    return torch.rand(SHAPE, dtype=torch.float64)


def _counts():
    return torch.poisson(torch.exp(torch.randn(SHAPE, dtype=torch.float64)))


def _labels():
    return torch.randint(0, K, (B, T))


def _one_hot():
    return torch.nn.functional.one_hot(_labels(), K).double()


TRIALS = 7


def _of_trials():
    return D.Multinomial(TRIALS, logits=torch.randn(SHAPE, dtype=torch.float64)).sample()


# Made of tensors of one shape; of smaller ones, which they expand; and of numbers.
CASES = {
    case.name: case
    for case in (
        Case("normal", Normal, (SHAPE, SHAPE), (real, positive), _reals),
        Case("normal of features", Normal, (SHAPE, (K,)), (real, positive), _reals),
        Case("normal of a mean for all", Normal, ((), SHAPE), (real, positive), _reals),
        Case("normal of a scale", Normal, (SHAPE, ()), (real, positive), _reals),
        Case("normal of a number", lambda mean: Normal(mean, 0.3), (SHAPE,), (real,), _reals),
        Case("laplace", D.Laplace, (SHAPE, (T, 1)), (real, positive), _reals),
        Case("laplace of a number", lambda mean: D.Laplace(mean, 2.0), (SHAPE,), (real,), _reals),
        Case("student_t", lambda mean, scale: D.StudentT(3.0, mean, scale), (SHAPE, (K,)), (real, positive), _reals),
        Case("student_t of numbers", lambda mean: D.StudentT(4.0, mean), (SHAPE,), (real,), _reals),
        Case("student_t, learned", D.StudentT, ((), SHAPE, SHAPE), (positive, real, positive), _reals),
        Case("student_t of features", D.StudentT, ((K,), SHAPE, ()), (positive, real, positive), _reals),
        Case("bernoulli", D.Bernoulli, (SHAPE,), (unit,), _bits),
        Case("bernoulli, logits", lambda t: D.Bernoulli(logits=t), (SHAPE,), (real,), _bits),
        Case("continuous", D.ContinuousBernoulli, (SHAPE,), (unit,), _units),
        Case("continuous, logits", lambda t: D.ContinuousBernoulli(logits=t), (SHAPE,), (real,), _units),
        Case("poisson", D.Poisson, (SHAPE,), (positive,), _counts),
        Case("negative binomial", D.NegativeBinomial, (SHAPE, SHAPE), (positive, unit), _counts),
        Case(
            "negative binomial, logits", lambda n, t: D.NegativeBinomial(n, logits=t), ((K,), SHAPE), (positive, real), _counts
        ),
        Case("negative binomial of a number", lambda t: D.NegativeBinomial(3.0, logits=t), (SHAPE,), (real,), _counts),
        Case("counts", Counts, (SHAPE, (K,)), (positive, positive), _counts),
        Case("counts, each", Counts, (SHAPE, SHAPE), (positive, positive), _counts),
        Case("inflated counts", InflatedCounts, (SHAPE, (K,), SHAPE), (positive, positive, real), _counts),
        Case("categorical", D.Categorical, (SHAPE,), (positive,), _labels),
        Case("categorical, logits", lambda t: D.Categorical(logits=t), (SHAPE,), (real,), _labels),
        Case("one-hot", D.OneHotCategorical, (SHAPE,), (positive,), _one_hot),
        Case("one-hot, logits", lambda t: D.OneHotCategoricalStraightThrough(logits=t), (SHAPE,), (real,), _one_hot),
        Case("multinomial", lambda t: D.Multinomial(TRIALS, t), (SHAPE,), (positive,), _of_trials),
        Case("multinomial, logits", lambda t: D.Multinomial(TRIALS, logits=t), (SHAPE,), (real,), _of_trials),
    )
}  # fmt: skip
OF_CLASSES = "categorical", "one-hot", "multinomial"


def is_of_classes(name):
    return name.split(",")[0] in OF_CLASSES


def check(got, expected, tensors, rtol=1e-7, atol=1e-8):
    """Of values that have been computed apart, and their gradients by all."""
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    upstream = torch.rand_like(expected) + 0.5
    ours, theirs = (torch.autograd.grad(v, tensors, upstream, retain_graph=True) for v in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=max(rtol, 1e-6), atol=max(atol, 1e-7))


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean", "none"))
@pytest.mark.parametrize("name", CASES)
def test_nll(name, reduction):
    case = CASES[name]
    tensors, x = case.tensors(), case.x()
    terms = -case.make(*tensors).log_prob(x)
    for wrapped in (case.make(*tensors), Independent(Independent(case.make(*tensors), 1), 0)):
        check(fastelbo.nll(wrapped, x, reduction=reduction), reduce(terms, reduction), tensors)


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    case = CASES[name]
    tensors, x = case.tensors(torch.float32), case.x()
    x = x.float() if x.is_floating_point() else x
    wide = [t.detach().double().requires_grad_() for t in tensors]
    got, expected = fastelbo.nll(case.make(*tensors), x), -case.make(*wide).log_prob(x).sum()
    assert got.dtype == torch.float32
    assert relative(got, expected) < 2e-6
    for a, b in zip(gradients(got, *tensors), gradients(expected, *wide), strict=True):
        assert relative(a, b) < 2e-5


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
@pytest.mark.parametrize("name", CASES)
def test_weights(name, reduction):
    """Of time steps, some of which do not count."""
    case = CASES[name]
    tensors, x = case.tensors(), case.x()
    mask = torch.rand(B, T, device=DEVICE, dtype=torch.float64) * (torch.arange(T, device=DEVICE) < 2)
    weight = mask if x.dim() == 2 else mask.unsqueeze(-1)
    terms = -case.make(*tensors).log_prob(x)
    expected = reduce(terms, reduction, mask if is_of_classes(name) else weight)
    check(fastelbo.nll(case.make(*tensors), x, weight=weight, reduction=reduction), expected, tensors)


@pytest.mark.parametrize("name", CASES)
def test_loss(name):
    """All three of them: the decoder's, the encoder's and the prior."""
    case = CASES[name]
    tensors, x = case.tensors(), case.x()
    latents = [f(torch.randn(B, 2, dtype=torch.float64, device=DEVICE)).requires_grad_() for f in (real, positive) * 2]
    qz, pz = Independent(Normal(*latents[:2]), 1), Independent(Normal(*latents[2:]), 1)
    got = fastelbo.loss(case.make(*tensors), x, qz, beta=0.3, prior=pz, reduction="batchmean")
    recon, kl = -case.make(*tensors).log_prob(x).sum() / B, D.kl_divergence(qz, pz).mean()
    torch.testing.assert_close(tuple(got), (recon + 0.3 * kl, recon, kl), rtol=1e-7, atol=1e-8)
    check(got.loss, recon + 0.3 * kl, [*tensors, *latents])
    module = fastelbo.nn.ELBOLoss(beta=0.3, reduction="batchmean").to(DEVICE)
    torch.testing.assert_close(module(case.make(*tensors), x, qz, prior=pz), got)


LATENT = 2


class Decoder(torch.nn.Module):
    """From z to a distribution of a case: of the tensor of the data's shape, which it makes, and the others, which it has."""

    def __init__(self, case, dtype=torch.float64):
        super().__init__()
        self.case = case
        self.large = [i for i, shape in enumerate(case.shapes) if shape == SHAPE]
        self.layer = torch.nn.Linear(LATENT, T * K * len(self.large), device=DEVICE, dtype=dtype)
        own = case.tensors(dtype)
        self.own = torch.nn.ParameterList([t.detach() for i, t in enumerate(own) if i not in self.large])

    def forward(self, z):
        made, own = iter(self.layer(z).unflatten(-1, (-1, T, K)).unbind(-3)), iter(self.own)
        tensors = [
            f(next(made)) if i in self.large else next(own) for i, f in enumerate(self.case.draw)
        ]  # fmt: skip
        return Independent(self.case.make(*tensors), 0)


def latents():
    return [torch.randn(B, LATENT, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in range(2)]


def log_densities(decoder, x, mu, logvar, eps):
    """Of samples `[n, B, ...]`: log p(x | z), and log p(z) - log q(z | x), each `[n, B]`; one decoder call a sample."""
    z = mu + torch.exp(0.5 * logvar) * eps
    log_x = torch.stack([decoder(one).log_prob(x).flatten(1).sum(1) for one in z])
    q = Normal(mu, torch.exp(0.5 * logvar))
    return log_x, (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)


@pytest.mark.parametrize("way", ("plain", "prior", "log_std", "free bits"))
@pytest.mark.parametrize("name", CASES)
def test_elbo(name, way):
    case = CASES[name]
    decoder, x, (mu, second) = Decoder(case), case.x(), latents()
    eps = torch.randn_like(mu)
    options = {
        "prior": {"prior": Normal(torch.zeros_like(mu), torch.ones_like(mu))},
        "log_std": {"posterior": "log_std"},
        "free bits": {"weighting": fastelbo.Weighting(0.0)},
    }.get(way, {})
    logvar = 2 * second if way == "log_std" else second
    got = fastelbo.elbo(decoder, x, mu, second, 0.3, eps=eps, reduction="batchmean", **options)
    log_x, _ = log_densities(decoder, x, mu, logvar, eps[None])
    kl = D.kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(got.recon, -log_x.mean(), rtol=1e-7, atol=1e-8)
    check(got.loss, -log_x.mean() + 0.3 * kl, [mu, second, *decoder.parameters()])


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("chunk", (2, 3))
@pytest.mark.parametrize("name", CASES)
def test_several_samples(name, chunk, reduction):
    case = CASES[name]
    decoder, x, (mu, logvar) = Decoder(case), case.x(), latents()
    eps = torch.randn(3, *mu.shape, dtype=mu.dtype, device=DEVICE)
    got = fastelbo.elbo(decoder, x, mu, logvar, bound=ELBO(3, chunk=chunk), eps=eps, reduction=reduction)
    log_x, _ = log_densities(decoder, x, mu, logvar, eps)
    kl = D.kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum(1)
    count = case.make(*case.tensors()).log_prob(x).numel()
    expected = -log_x.mean(0) + kl if reduction == "none" else -log_x.mean(0).sum() / count + kl.sum() / mu.numel()
    check(got.loss, expected, [mu, logvar, *decoder.parameters()])


@pytest.mark.parametrize("chunk", (2, 3))
@pytest.mark.parametrize("name", CASES)
def test_iwae(name, chunk):
    case = CASES[name]
    decoder, x, (mu, logvar) = Decoder(case), case.x(), latents()
    eps = torch.randn(3, *mu.shape, dtype=mu.dtype, device=DEVICE)
    got = fastelbo.elbo(decoder, x, mu, logvar, bound=IWAE(3, chunk=chunk), eps=eps)
    log_w = sum(log_densities(decoder, x, mu, logvar, eps))
    expected = (math.log(3) - torch.logsumexp(log_w, 0)).sum()
    check(got.loss, expected, [mu, logvar, *decoder.parameters()])
    log_p = fastelbo.log_likelihood(decoder, x, mu, logvar, n_samples=3, chunk=chunk, eps=eps).log_p
    torch.testing.assert_close(log_p, torch.logsumexp(log_w, 0).detach() - math.log(3), rtol=1e-7, atol=1e-8)


# --- what surrounds a call


@pytest.mark.parametrize("name", CASES)
def test_compiled(name):
    """Made and scored in one graph."""
    case = CASES[name]
    tensors, x = case.tensors(torch.float32), case.x()
    x = x.float() if x.is_floating_point() else x
    decoder, (mu, logvar) = Decoder(case, torch.float32), [t.detach().float().requires_grad_() for t in latents()]

    def call(mu, logvar, *tensors):
        one = fastelbo.loss(case.make(*tensors), x, mu, logvar, 0.3).loss
        return one + fastelbo.elbo(decoder, x, mu, logvar, 0.3, eps=torch.ones_like(mu)).loss

    torch.compiler.reset()
    inputs = mu, logvar, *tensors
    got, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs)
    wrt = [*inputs, *decoder.parameters()]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(got, *wrt), gradients(expected, *wrt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("normal of features", "student_t", "negative binomial, logits", "multinomial, logits"))
def test_transformed_and_checkpointed(name):
    case = CASES[name]
    tensors, x = case.tensors(), case.x()

    def call(*tensors):
        return fastelbo.nll(case.make(*tensors), x, reduction="batchmean")

    expected = gradients(-case.make(*tensors).log_prob(x).sum() / B, *tensors)
    torch.testing.assert_close(torch.func.grad(call, tuple(range(len(tensors))))(*tensors), expected)
    torch.testing.assert_close(gradients(checkpoint(call, *tensors, use_reentrant=False), *tensors), expected)


def test_autocast():
    layer = torch.nn.Linear(6, K, device=DEVICE)
    h, x = torch.randn(B, 6, device=DEVICE), torch.rand(B, K, device=DEVICE).round()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        px = D.Bernoulli(logits=layer(h))
        got = fastelbo.nll(px, x)
    assert px.logits.dtype == torch.bfloat16 and got.dtype == torch.float32
    exact = -D.Bernoulli(logits=px.logits.double()).log_prob(x.double()).sum()
    assert relative(got, exact) < 1e-6


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize(
    "name", ("student_t, learned", "negative binomial, logits", "negative binomial", "multinomial, logits")
)
def test_derivatives(name, check):
    """Of the formulas that distributions alone have."""
    case = CASES[name]
    tensors, x = case.tensors(), case.x()
    assert check(lambda *t: fastelbo.nll(case.make(*t), x, reduction="none"), tensors)


@pytest.mark.skipif(BACKEND != "triton", reason="about the kernels")
@pytest.mark.parametrize("name", ("normal of a number", "laplace", "student_t", "bernoulli", "bernoulli, logits", "poisson",
                                  "counts", "inflated counts", "categorical, logits", "one-hot", "continuous"))  # fmt: skip
def test_one_launch_forward_and_one_backward(name, monkeypatch):
    from fastelbo.kernels.direct import Launch

    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), call(self, *args)))
    case = CASES[name]
    value = fastelbo.nll(case.make(*case.tensors(torch.float32)), case.x())
    assert len(launches) == 1
    value.backward()
    assert len(launches) <= 2


# --- what is taken for what


@pytest.mark.parametrize("name", CASES)
def test_its_own_name_may_be_given(name):
    case = CASES[name]
    tensors, x = case.tensors(), case.x()
    px = case.make(*tensors)
    found, _ = of_distribution("recon_x", px, None)
    given = "categorical" if name.startswith("one-hot") else found.name
    if given == "student_t":  # which has no name, for it has no default
        given = found
    assert torch.equal(fastelbo.nll(px, x, likelihood=given), fastelbo.nll(px, x))
    other = "gaussian" if given != "gaussian" else "laplace"
    for likelihood in {other, Gaussian(scale=0.5), "bernoulli"} - {given}:
        with pytest.raises(ValueError, match=f"likelihood must not be given beside .*recon_x is a .*{found.name}"):
            fastelbo.nll(px, x, likelihood=likelihood)


@pytest.mark.parametrize("kind", (D.Bernoulli, D.ContinuousBernoulli))
def test_logits_are_taken_where_it_was_made_of_them(kind):
    """Also once it has computed the other ones, and however far they lie."""
    far = torch.tensor([[40.0, -40.0, 200.0]], device=DEVICE, requires_grad=True)
    px = kind(logits=far)
    assert px.probs.shape == far.shape
    likelihood, (taken,) = of_distribution("recon_x", px, None)
    assert likelihood.name.endswith("_logits") and taken is px.logits
    if kind is D.Bernoulli:
        torch.testing.assert_close(fastelbo.nll(px, torch.tensor([[0.0, 1.0, 0.0]], device=DEVICE)).item(), 280.0)
    px = kind(probs=torch.full((1, 3), 0.25, device=DEVICE))
    assert px.logits.shape == (1, 3)
    likelihood, (taken,) = of_distribution("recon_x", px, None)
    assert not likelihood.name.endswith("_logits") and taken is px.probs


def test_what_was_expanded_is_not_copied():
    """All but the first, which has the shape of the data."""
    mean, scale = torch.zeros(SHAPE, device=DEVICE), torch.ones(K, device=DEVICE)
    for px, shapes in (
        (Normal(mean, scale), [SHAPE, (1, 1, K)]),
        (Normal(mean, 0.3), [SHAPE, (1, 1, 1)]),
        (Normal(0.0, mean + 1), [SHAPE, SHAPE]),
        (Independent(InflatedCounts(mean, scale, mean[:, :, :1]), 1), [SHAPE, (1, 1, K), (B, T, 1)]),
    ):
        _, tensors = of_distribution("recon_x", px, None)
        assert [t.shape for t in tensors] == shapes
        assert tensors[1].untyped_storage().nbytes() <= tensors[1].numel() * tensors[1].element_size()


def test_bits_of_any_dtype():
    logits = torch.randn(B, K, device=DEVICE)
    x = torch.rand(B, K, device=DEVICE) > 0.5
    expected = -D.Bernoulli(logits=logits).log_prob(x.float()).sum()
    for dtype in (torch.bool, torch.uint8, torch.float64):
        torch.testing.assert_close(fastelbo.nll(D.Bernoulli(logits=logits), x.to(dtype)), expected)


def test_degrees_of_freedom_that_are_a_number():
    """Are that of the fused likelihood, where they can be read without a sync."""
    mean = torch.randn(B, K, device=DEVICE)
    likelihood, tensors = of_distribution("recon_x", D.StudentT(3.0, mean, 2.0), None)
    if DEVICE.type == "cpu":
        assert likelihood is StudentT(3.0) and len(tensors) == 2
    learned = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    assert len(of_distribution("recon_x", D.StudentT(learned, mean, 2.0), None)[1]) == 3


def test_rare_counts():
    """A mean that float32 does not hold, one below scvi-tools' 1e-8, and no failures at all."""
    logits = torch.tensor([[100.0, -60.0, -60.0, 0.5]], device=DEVICE, requires_grad=True)
    failures = torch.tensor([[2.0, 2.0, 2.0, 0.0]], device=DEVICE, requires_grad=True)
    x = torch.tensor([[5.0, 0.0, 3.0, 0.0]], device=DEVICE)
    got = fastelbo.nll(D.NegativeBinomial(failures, logits=logits), x)
    wide = [t.detach().double().requires_grad_() for t in (failures, logits)]
    # In logarithms: 2 failures among 7 trials have 6 ways, among 5 trials 4; 0 failures leave nothing but 0.
    exact = (wide[0] * torch.nn.functional.softplus(wide[1]) + x * torch.nn.functional.softplus(-wide[1])).sum()
    torch.testing.assert_close(got.double(), exact - math.log(6) - math.log(4), rtol=1e-6, atol=0)
    by_logits = gradients(got, logits, retain_graph=True)[0]
    torch.testing.assert_close(by_logits.double(), gradients(exact, wide[1])[0], rtol=1e-6, atol=1e-6)
    assert gradients(got, failures)[0].isfinite().all()


@pytest.mark.skipif(BACKEND != "torch" or DEVICE.type != "cpu", reason="about the CPU")
@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
@pytest.mark.parametrize("shape", ((), (300,), (40, 1), (40, 300)), ids=str)
@pytest.mark.parametrize("rate", (0.05, 3.0, 200.0))
def test_counts_in_one_pass(rate, shape, weighted):
    """Mostly zeros, few of them, and none; failures that all share, and each its own: with the digits of float32."""
    logits = (2 * torch.randn(40, 300)).requires_grad_()
    failures = torch.exp(2 * torch.randn(shape)).requires_grad_()
    x = torch.poisson(torch.full((40, 300), rate))
    likelihood, tensors = of_distribution("recon_x", D.NegativeBinomial(failures, logits=logits), None)
    out = [torch.empty_like(x) for _ in tensors]
    assert likelihood.one_pass([t.detach() for t in tensors], x, True, out, [None] * 10) is not None
    weight = torch.rand(40, 1) if weighted else None
    wide = [t.detach().double().requires_grad_() for t in (logits, failures)]
    for reduction in ("sum", "none"):
        got = fastelbo.nll(D.NegativeBinomial(failures, logits=logits), x, weight=weight, reduction=reduction)
        terms = -D.NegativeBinomial(wide[1], logits=wide[0]).log_prob(x.double())
        expected = reduce(terms, reduction, weight)
        torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=1e-5)
        found = zip(gradients(got.sum(), logits, failures), gradients(expected.sum(), *wide), strict=True)
        for a, b in found:
            assert relative(a, b) < 1e-5


@pytest.mark.skipif(BACKEND != "torch", reason="kernels do not look at values")
def test_targets_outside_their_support():
    one, minus = torch.ones(B, K), -torch.ones(B, K)
    for px in (D.NegativeBinomial(one, logits=one), Counts(one, one), D.Poisson(one)):
        with pytest.raises(ValueError, match="x must not be negative"):
            fastelbo.nll(px, minus)
    with pytest.raises(ValueError, match="x must have labels from 0 to 4"):
        fastelbo.nll(D.Categorical(logits=one), torch.full((B,), K))
    with pytest.raises(TypeError, match="x must be of an integer dtype for labels"):
        fastelbo.nll(D.Categorical(logits=one), torch.zeros(B))


class Tempered(Normal):
    def log_prob(self, value):
        return 0.5 * super().log_prob(value)


KNOWN = (
    "Normal, Laplace, StudentT, Bernoulli, ContinuousBernoulli, Poisson, NegativeBinomial, Categorical, OneHotCategorical,"
    " Multinomial, scvi-tools' NegativeBinomial or ZeroInflatedNegativeBinomial, or an Independent of one; got "
)


@pytest.mark.parametrize(
    ("make", "name"),
    (
        (lambda t: D.Gamma(t.exp(), 1.0), "Gamma"),
        (lambda t: Independent(D.LogNormal(t, 1.0), 1), "LogNormal"),
        (lambda t: Tempered(t, 1.0), "Tempered"),  # whose formula is another one
    ),
)
def test_unknown_distributions(make, name):
    t, x = torch.zeros(B, K, device=DEVICE), torch.ones(B, K, device=DEVICE)
    latents = torch.zeros(B, 2, device=DEVICE), torch.zeros(B, 2, device=DEVICE)
    for call in (fastelbo.nll, torch.compile(fastelbo.nll, backend="eager")):
        with pytest.raises(TypeError, match=f"recon_x must be a tensor.*distributions {KNOWN}{name}"):
            call(make(t), x)
    with pytest.raises(TypeError, match=f"recon_x must be a tensor.*{name}"):
        fastelbo.loss(make(t), x, *latents)
    for options in ({}, {"bound": IWAE(2)}, {"weighting": fastelbo.Weighting(0.1)}):
        with pytest.raises(TypeError, match=rf"decoder\(z\) must be a tensor.*{name}"):
            fastelbo.elbo(lambda z: make(z.new_zeros(len(z), K)), x, *latents, **options)


def test_errors():
    t, latents = torch.zeros(B, K, device=DEVICE), (torch.zeros(B, 2, device=DEVICE),) * 2
    with pytest.raises(ValueError, match=r"recon_x\[0\] must have the shape of x"):
        fastelbo.nll(Normal(t, 1.0), t[:, :3])
    for options in ({}, {"bound": IWAE(2)}, {"weighting": fastelbo.Weighting(0.1)}):
        for likelihood in ("mse", "bernoulli"):  # which is no default then
            with pytest.raises(ValueError, match=r"likelihood must not be given .*decoder\(z\) is a Normal, 'gaussian'; got"):
                fastelbo.elbo(lambda z: Normal(z.new_zeros(len(z), K), 1.0), t, *latents, likelihood=likelihood, **options)
    criterion = fastelbo.nn.ELBOLoss("bernoulli")
    with pytest.raises(ValueError, match="likelihood must not be given beside a distribution"):
        criterion(Normal(t, 1.0), t, *latents)
    with pytest.raises(ValueError, match="likelihood must not be given beside"):
        fastelbo.log_likelihood(lambda z: Normal(z.new_zeros(len(z), K), 1.0), t, *latents, likelihood="laplace", n_samples=2)
    with pytest.raises(ValueError, match="likelihood must be an object of"):
        fastelbo.nll(Normal(t, 1.0), t, likelihood="gausian")


def test_conventions_of_the_table():
    """Certain and wrong costs 100 nats, as by `F.binary_cross_entropy`; a padded label nothing."""
    certain = D.Bernoulli(probs=torch.tensor([[0.0, 1.0]], device=DEVICE))
    torch.testing.assert_close(fastelbo.nll(certain, torch.tensor([[1.0, 1.0]], device=DEVICE)).item(), 100.0)
    labels = D.Categorical(logits=torch.zeros(2, K, device=DEVICE))
    torch.testing.assert_close(fastelbo.nll(labels, torch.tensor([1, -100], device=DEVICE)).item(), math.log(K))
