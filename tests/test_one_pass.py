"""Value and gradients of a likelihood in one pass, in Torch on a CPU: the formula's numbers, whatever is rare and however the
blocks are cut."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fastelbo
from conftest import BACKEND
from fastelbo.basics.gamma import log_factorial, log_gamma_ratio, log_gamma_ratio_in_parts, ratio_and_derivatives
from fastelbo.engine import blocks, formula, reconstruction
from fastelbo.likelihoods import (
    BernoulliLogits,
    DiscretizedLogisticMixture,
    Gaussian,
    Laplace,
    StudentT,
    bernoulli,
    classes,
    counts,
    find_likelihood,
)
from likelihood_cases import CASES, recon_x
from support import gradients

pytestmark = [
    pytest.mark.skipif(BACKEND != "torch" or torch.cuda.is_available(), reason="about Torch on a CPU"),
    pytest.mark.usefixtures("by_functions"),
]

SUMMED = [name for name, case in CASES.items() if find_likelihood(case.likelihood).inner is None]
HAVE_A_FORM = [name for name, case in CASES.items() if find_likelihood(case.likelihood).one_pass is not None]


def loss(parameters, x, likelihood, reduction, weight):
    kl = torch.zeros(x.shape[:1] if reduction == "none" else ())
    return fastelbo.loss(recon_x(parameters), x, kl=kl, likelihood=likelihood, reduction=reduction, weight=weight).recon


def truth(parameters, x, likelihood, reduction, weight):
    """By the formula, in float64."""
    wide = [p.detach().double().requires_grad_() for p in parameters]
    likelihood = find_likelihood(likelihood)
    target = likelihood.target(wide[0], x, torch.float64)
    if weight is not None:
        weight = weight.double()
        if (dim := likelihood.term_dim(wide[0], x)) is not None:
            weight = weight.squeeze(dim)
    values = formula.weighted_nll(likelihood, wide, target, weight)
    return formula.reduced(values, reduction), wide


def same(got, expected, parameters, wide, magnitude) -> None:
    upstream = torch.rand_like(got)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=2e-6 * magnitude, equal_nan=True)
    found = gradients(got, *parameters, grad_outputs=upstream)
    for a, b in zip(found, gradients(expected, *wide, grad_outputs=upstream.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-5 * max(1.0, b.abs().max().item()), equal_nan=True)


@pytest.mark.parametrize("weights", ("", "weights", "of samples"))
@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("size", (1, 37, 2**20))
@pytest.mark.parametrize("name", SUMMED)
def test_blocks(name, size, reduction, weights, monkeypatch):
    """Of a row, or of less, and of everything."""
    monkeypatch.setattr(blocks, "BLOCK", size)
    monkeypatch.setattr(blocks, "THREAD", 1)
    case = CASES[name]
    parameters, x = case.make(torch.float32, torch.device("cpu"))
    weight, likelihood = None, find_likelihood(case.likelihood)
    if weights:
        shape = list(x.shape)
        if (dim := likelihood.term_dim(parameters[0], x)) is not None:
            shape[dim] = 1
        shape = shape if weights == "weights" else [shape[0], *[1] * (len(shape) - 1)]
        weight = torch.randint(0, 3, shape).float() / 2
    expected, wide = truth(parameters, x, case.likelihood, reduction, weight)
    same(loss(parameters, x, case.likelihood, reduction, weight), expected, parameters, wide, 100)


@pytest.mark.parametrize("size", (1, 12, 24))
@pytest.mark.parametrize("shape", ((6,), (1, 6), (5, 1), (1, 1), (), (5, 6)), ids=str)
@pytest.mark.parametrize("likelihood", (Gaussian(), Laplace(), "negative_binomial"), ids=str)
def test_a_parameter_that_rows_share(likelihood, shape, size, monkeypatch):
    """Its gradient is the sum over all blocks, also over one of a single row, which has the shape of such a parameter."""
    monkeypatch.setattr(blocks, "BLOCK", size)
    monkeypatch.setattr(blocks, "THREAD", 1)
    x = torch.poisson(2 * torch.rand(5, 6))
    parameters = [(0.5 + torch.rand(s)).requires_grad_() for s in ((5, 6), shape)]
    expected, wide = truth(parameters, x, likelihood, "sum", None)
    same(loss(parameters, x, likelihood, "sum", None), expected, parameters, wide, 1)


def mostly_zero(share, *shape):
    return (1.0 + torch.poisson(3 * torch.rand(shape))) * (torch.rand(shape) < share)


@pytest.mark.parametrize("name", ("negative_binomial", "zero_inflated_negative_binomial"))
@pytest.mark.parametrize("layout", ("expanded", "transposed", "column", "channels_last"))
def test_a_dispersion_that_is_not_contiguous(name, layout):
    """Its gradient has memory of its own."""
    make = lambda *shape: torch.rand(shape).add(0.5).requires_grad_()  # noqa: E731
    leaf, view = {
        "expanded": (make(1), lambda t: t.expand(7)),
        "transposed": (make(7, 12), lambda t: t.t()),
        "column": (make(7, 5), lambda t: t[:, 3]),
        "channels_last": (make(1, 30, 12, 7), lambda t: t.contiguous(memory_format=torch.channels_last)),
    }[layout]
    shape = (5, 30, 12, 7) if layout == "channels_last" else (30, 12, 7)
    for share in (0.1, 1.0):
        x, mean = mostly_zero(share, *shape), torch.rand(shape).add(0.1).requires_grad_()
        more = [torch.randn(shape, requires_grad=True)] if name.startswith("zero") else []
        wide = [t.detach().double().requires_grad_() for t in (mean, leaf, *more)]
        expected = find_likelihood(name).nll((wide[0], view(wide[1]), *wide[2:]), x.double()).sum()
        same(loss([mean, view(leaf), *more], x, name, "sum", None), expected, (mean, leaf, *more), wide, 1)


@pytest.mark.parametrize("name", ("negative_binomial", "zero_inflated_negative_binomial"))
@pytest.mark.parametrize("share", (5, 1))
def test_a_dispersion_that_very_many_counts_share(name, share):
    """All alike, so that roundings would add up if a place took one after the other."""
    shape, x = (32, 3, 64, 64), torch.zeros(32, 3, 64, 64)
    x.view(-1)[::share] = 1
    parameters = [torch.full(shape, 0.3, requires_grad=True), torch.full((3, 1, 1), 0.37, requires_grad=True)]
    if name.startswith("zero"):
        parameters.append(torch.full(shape, -0.7, requires_grad=True))
    expected, wide = truth(parameters, x, name, "sum", None)
    got = loss(parameters, x, name, "sum", None)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=2e-6, atol=0)
    for a, b in zip(gradients(got, *parameters), gradients(expected, *wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=0)


@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("share", (0.0, 0.05, 0.4, 1.0))
@pytest.mark.parametrize("shape", ((12, 7), (1, 7), (7,), (12, 1), (1,), (), (30, 12, 7), (30, 1, 1), (30, 1, 7)), ids=str)
@pytest.mark.parametrize("name", ("negative_binomial", "zero_inflated_negative_binomial"))
def test_a_dispersion_that_counts_share(name, shape, share, reduction, monkeypatch):
    """By indices of those above zero, and of all; by several blocks, of which the last has fewer rows."""
    monkeypatch.setattr(blocks, "BLOCK", 12 * 7 * 8)
    monkeypatch.setattr(blocks, "THREAD", 1)
    x, full = mostly_zero(share, 30, 12, 7), (30, 12, 7)
    parameters = [torch.randn(full).exp().requires_grad_(), torch.randn(shape).exp().requires_grad_()]
    if name.startswith("zero"):
        parameters.append((3 * torch.randn(full)).requires_grad_())
    expected, wide = truth(parameters, x, name, reduction, None)
    same(loss(parameters, x, name, reduction, None), expected, parameters, wide, x.numel())


@pytest.mark.parametrize("name", ("negative_binomial", "zero_inflated_negative_binomial"))
@pytest.mark.parametrize("share", (0.1, 0.9))
def test_zeros_of_a_small_dispersion(name, share):
    """scvi-tools' 1e-8 beside it counts in each derivative, whatever the other counts are."""
    x, shape = mostly_zero(share, 64, 8), (64, 8)
    x[:, :2] = 0
    parameters = [torch.rand(shape).add(0.1).requires_grad_(), torch.full((8,), 1e-5, requires_grad=True)]
    if name.startswith("zero"):
        parameters.append(torch.full(shape, -20.0, requires_grad=True))
    expected, wide = truth(parameters, x, name, "sum", None)
    found, right = (
        gradients(total, *leaves)[1]
        for total, leaves in ((loss(parameters, x, name, "sum", None), parameters), (expected, wide))
    )
    torch.testing.assert_close(found[:2].double(), right[:2], rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ("negative_binomial", "zero_inflated_negative_binomial"))
@pytest.mark.parametrize("kind", ("zeros where one looks", "zeros where none looks", "one zero", "nothing"))
def test_counts_that_are_not_spread(name, kind, monkeypatch):
    """A share that is guessed from few of them decides how, not what, nor how much memory that takes."""
    taken, compute = [], counts.log_gamma_ratio_in_parts
    monkeypatch.setattr(counts, "log_gamma_ratio_in_parts", lambda a, n: taken.append(n.numel()) or compute(a, n))
    monkeypatch.setattr(counts, "CHUNK", 64 * 128 // 8)
    monkeypatch.setattr(reconstruction, "_by_formula", None)
    x = torch.ones(64, 128)
    looked_at = torch.zeros(64 * 128, dtype=torch.bool)
    looked_at.unfold(0, 32, 2048).fill_(True)
    if kind == "one zero":
        x[40, 40] = 0
    else:
        zero = {"zeros where one looks": looked_at, "zeros where none looks": ~looked_at}.get(kind, torch.tensor(True))
        x = x.masked_fill(zero.expand(64 * 128).view_as(x), 0.0)
    parameters = [torch.rand(64, 128).add(0.1).requires_grad_(), torch.rand(128).add(0.1).requires_grad_()]
    if name.startswith("zero"):
        parameters.append(torch.randn(64, 128).requires_grad_())
    expected, wide = truth(parameters, x, name, "sum", None)
    same(loss(parameters, x, name, "sum", None), expected, parameters, wide, 1)
    assert max(taken) <= x.numel() // 4


def test_spare_buffers_end():
    """Of a large tensor, too, for which each is made when it is asked for."""
    for numel in (1, blocks.SMALL + 1):
        buffers = list(blocks.spare(torch.empty(numel), torch.float32))
        assert len(buffers) == blocks.SPARES and (numel == 1 or all(b.shape == (numel,) for b in buffers))


def test_zeros_that_are_almost_impossible():
    """Whose probabilities have a product that underflows."""
    x, mean = mostly_zero(0.05, 16, 256), torch.full((16, 256), 25.0, requires_grad=True)
    parameters = [mean, torch.full((256,), 1e3, requires_grad=True), torch.full((16, 256), -18.0, requires_grad=True)]
    expected, wide = truth(parameters, x, "zero_inflated_negative_binomial", "sum", None)
    same(loss(parameters, x, "zero_inflated_negative_binomial", "sum", None), expected, parameters, wide, 1)


@pytest.mark.parametrize("place", ((), (3,), (2, 3)), ids=str)
@pytest.mark.parametrize("dim", (1, -1))
@pytest.mark.parametrize(("channels", "each"), ((1, 3), (2, 5), (3, 10)))
def test_mixtures(channels, each, dim, place, monkeypatch):
    """Of any channels, along either dimension; the form is taken."""
    monkeypatch.setattr(blocks, "BLOCK", 40)
    monkeypatch.setattr(blocks, "THREAD", 1)
    shape = lambda n: (4, n, *place) if dim == 1 else (4, *place, n)  # noqa: E731
    likelihood = DiscretizedLogisticMixture(levels=8, dim=dim)
    parameters = [torch.randn(shape(2 * each)).requires_grad_()]
    x = torch.randint(0, 8, shape(channels))
    for reduction in ("sum", "none"):
        expected, wide = truth(parameters, x, likelihood, reduction, None)
        same(loss(parameters, x, likelihood, reduction, None), expected, parameters, wide, 1)
    monkeypatch.setattr(formula, "weighted_nll", None)
    loss(parameters, x, likelihood, "sum", None)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("shape", ((4, 8, 32, 48), (5, 5, 33, 47)), ids=str)
@pytest.mark.parametrize("scale", (0.0, 0.1, 1.0, 4.0, 30.0))
@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_one_logarithm_for_many_logits(reduction, scale, shape, layout, monkeypatch):
    """The sum keeps its digits, that of confident ones too, and a NaN in any of them."""
    logits = (scale * torch.randn(shape)).to(memory_format=layout)
    x = (logits > 0).float()  # so that nothing beside logarithms is added up
    logits.requires_grad_()
    expected, wide = truth([logits], x, "bernoulli_logits", reduction, None)
    with monkeypatch.context() as patch:
        patch.setattr(BernoulliLogits, "one_pass", None)
        got = loss([logits], x, "bernoulli_logits", reduction, None)
    rtol = 3e-7 if logits.numel() % 64 == 0 else 5e-7  # a logarithm each
    torch.testing.assert_close(got.double(), expected.detach(), rtol=rtol, atol=0)
    (slope,), (by_formula,) = gradients(got.sum(), logits), gradients(expected.sum(), *wide)
    torch.testing.assert_close(slope.double(), by_formula, rtol=0, atol=1.5e-7)
    for place in range(0, logits.numel(), logits.numel() // 4):
        spoilt = logits.detach().clone()
        spoilt.as_strided((spoilt.numel(),), (1,))[place] = torch.nan
        assert loss([spoilt], x, "bernoulli_logits", reduction, None).isnan().sum() == 1


@pytest.mark.parametrize("x", (0.0, 1.0))
@pytest.mark.parametrize("logit", (0.0, 0.4, 1.7, 2.7, 2.8, 3.4, 9.0, 16.0, 30.0, 88.0, 200.0))
def test_logits_that_are_all_alike(logit, x):
    """Roundings of probabilities add up then. Where the loss is below 1/16 each, nothing is lost; above, as little as Torch's
    own sum loses of zeros."""
    likely = logit if x else -logit
    for given, rtol in ((likely, 6e-7 if logit > 2.7 else 3e-6), (-likely, 6e-7)):
        logits = torch.full((1, 2**15 + 64), given)
        got = fastelbo.nll(logits, torch.full_like(logits, x), likelihood="bernoulli_logits")
        truth = F.softplus(torch.tensor(-given if x else given, dtype=torch.float64)) * logits.numel()
        torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=1e-38)


def test_rows_some_of_which_are_sure():
    """Their digits are computed anew, those of the others stay."""
    logits = torch.tensor([[0.1], [30.0], [1.0], [40.0]]) * torch.randn(4, 2**14)
    logits[1::2] += 12 * logits[1::2].sign()  # or what is rounded in each would not show in the sum
    x = (logits > 0).float()
    got = fastelbo.nll(logits.requires_grad_(), x, likelihood="bernoulli_logits", reduction="none")
    expected = F.softplus(-logits.detach().double().abs()).sum(1)
    torch.testing.assert_close(got.double(), expected, rtol=3e-7, atol=0)
    (slope,) = gradients(got.sum(), logits)
    torch.testing.assert_close(slope, logits.sigmoid() - x)


@pytest.mark.parametrize("name", CASES)
def test_one_row_by_itself(name):
    """It has one sum, `[1]`, and a gradient."""
    case = CASES[name]
    parameters, x = case.make(torch.float32, torch.device("cpu"))
    first = parameters[0]
    parameters = [(p[:1] if p.shape[:1] == first.shape[:1] else p).detach().requires_grad_() for p in parameters]
    recon = fastelbo.nll(recon_x(parameters), x[:1], likelihood=case.likelihood, reduction="none")
    whole = fastelbo.nll(recon_x(parameters), x[:1], likelihood=case.likelihood)
    assert recon.shape == (1,)
    torch.testing.assert_close(recon[0], whole)
    same = gradients(recon, *parameters, grad_outputs=torch.ones(1)), gradients(whole, *parameters)
    for a, b in zip(*same, strict=True):
        torch.testing.assert_close(a, b)


def test_infinite_logits():
    """Never a finite loss, nor is it by the naive code."""
    logits, x = torch.zeros(2**15 + 64), torch.zeros(2**15 + 64)
    for place, logit in enumerate((torch.inf, -torch.inf)):
        for target in (0.0, 1.0, 0.5):
            given, wanted = logits.clone(), x.clone()
            given[place], wanted[place] = logit, target
            got = fastelbo.nll(given[None], wanted[None], likelihood="bernoulli_logits")
            expected = F.binary_cross_entropy_with_logits(given, wanted, reduction="sum")
            assert not got.isfinite() and not expected.isfinite()


@pytest.mark.parametrize("likelihood", ("bernoulli_logits", counts.NegativeBinomialLogits()), ids=str)
def test_infinite_logits_beside_zeros_that_are_not_stored(likelihood):
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.inf
    more = [torch.full((3, 4), 2.0)] if likelihood != "bernoulli_logits" else []
    assert fastelbo.nll(recon_x([logits, *more]), torch.zeros(3, 4).to_sparse_csr(), likelihood=likelihood) == torch.inf


@pytest.mark.parametrize("value", (0.0, 0.001, -0.01))
@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_logits_that_are_all_near_0(value, reduction, monkeypatch):
    """As of a decoder that has learnt nothing. Their linear part is small, not their loss: nothing is computed anew."""
    monkeypatch.setattr(bernoulli, "_sums_of_logs", None)
    logits = torch.full((64, 2048), value, requires_grad=True)
    x = (torch.rand(64, 2048) < 0.5).float()
    expected, wide = truth([logits], x, "bernoulli_logits", reduction, None)
    got = loss([logits], x, "bernoulli_logits", reduction, None)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=3e-7, atol=0)
    same(got, expected, [logits], wide, 1)


def long_rows(*batch):
    """Logits of more elements than are few, and counts of some of the items."""
    logits, x = 3 * torch.randn(*batch, 4500), torch.poisson(torch.rand(*batch, 4500)) * (torch.rand(*batch, 4500) < 0.1)
    return logits, x


@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
@pytest.mark.parametrize("reduction", ("sum", "none", "batchmean"))
@pytest.mark.parametrize("size", (1, 10_000, 2**30))
@pytest.mark.parametrize("batch", ((5,), (3, 2)), ids=str)
def test_long_rows_of_counts(batch, size, reduction, weighted, monkeypatch):
    """Some rows at a time; confident ones, without counts, and far from 0."""
    monkeypatch.setattr(classes, "PART", size)
    taken, form = [], classes.Classes.one_pass
    monkeypatch.setattr(classes.Classes, "one_pass", lambda *args: taken.append(form(*args)) or taken[-1])
    logits, x = long_rows(*batch)
    x[0, ..., 3:], logits[0, ..., 0], x[1] = 0, 60.0, 0
    logits[2] += 1e4
    x[0, ..., 0] = 7
    logits.requires_grad_()
    weight = torch.rand(*batch, 1) if weighted else None
    expected, wide = truth([logits], x, "multinomial", "sum" if reduction == "batchmean" else reduction, weight)
    expected = expected / batch[0] if reduction == "batchmean" else expected
    got = loss([logits], x, "multinomial", reduction, weight)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    upstream = torch.rand_like(got)
    (slope,) = gradients(got, logits, grad_outputs=upstream)
    torch.testing.assert_close(
        slope.double(), gradients(expected, *wide, grad_outputs=upstream.double())[0], rtol=2e-5, atol=2e-6
    )
    assert taken and all(found is not None for found in taken)


@pytest.mark.parametrize(
    ("logit", "count", "value"),
    (
        (-math.inf, 0.0, None), (-math.inf, 2.0, math.inf), (math.nan, 0.0, math.nan), (math.inf, 0.0, math.nan),
        (0.0, math.nan, math.nan), (-300.0, 2.0, None),
    ),
)  # fmt: skip
def test_a_rare_item_of_a_long_row(logit, count, value):
    """Masked, impossible, or no number: in its row alone."""
    logits, x = long_rows(5)
    logits[1, 7], x[1, 7] = logit, count
    logits.requires_grad_()
    expected, wide = truth([logits], x, "multinomial", "none", None)
    got = loss([logits], x, "multinomial", "none", None)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-6, atol=1e-5, equal_nan=True)
    if value is None:
        assert got.isfinite().all()
        slope, exact = gradients(got.sum(), logits)[0], gradients(expected.sum(), *wide)[0]
        torch.testing.assert_close(slope.double(), exact, rtol=2e-5, atol=2e-6)
    else:
        assert str(got[1].item()) == str(value) and got[[0, 2, 3, 4]].isfinite().all()


OVERFLOWN = {
    "log scale": (Gaussian(parameter="log_scale"), ([1e-3, 1.0], [-50.0, 0.0]), [0.0, 0.0]),
    "scale": (Gaussian(), ([1e-7, 1.0], [1e-25, 1.0]), [0.0, 0.0]),
    "rate": ("poisson", ([2e-30, 1.0],), [1e9, 1.0]),
}


@pytest.mark.parametrize("name", OVERFLOWN)
def test_a_derivative_that_overflows_where_the_weight_is_0(name):
    """Is 0 there, in the first backward as in another."""
    likelihood, values, x = OVERFLOWN[name]
    weight = torch.tensor([[0.0, 1.0]])
    usual = [torch.ones(1, 2, requires_grad=True) for _ in values]
    loss(usual, torch.tensor([x]), likelihood, "sum", weight).backward()  # after which the factor that arrives is known
    parameters = [torch.tensor([v], requires_grad=True) for v in values]
    value = loss(parameters, torch.tensor([x]), likelihood, "sum", weight)
    first = gradients(value, *parameters, retain_graph=True)
    second = gradients(value, *parameters)
    for a, b in zip(first, second, strict=True):
        assert a[0, 0] == b[0, 0] == 0 and a[0, 1].isfinite()
        torch.testing.assert_close(a, b)


def test_counts_too_small_to_be_any():
    """Are zeros to the zero-inflated likelihood, beside many that are not."""
    x, mean = torch.tensor([[5e-9, 1.0, 2.0, 0.0]]), torch.tensor([[1e-9, 1.0, 1.0, 1.0]])
    parameters = [p.requires_grad_() for p in (mean, torch.ones(1, 4), torch.zeros(1, 4))]
    expected, wide = truth(parameters, x, "zero_inflated_negative_binomial", "sum", None)
    same(loss(parameters, x, "zero_inflated_negative_binomial", "sum", None), expected, parameters, wide, 1)


@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
@pytest.mark.parametrize("name", HAVE_A_FORM)
def test_the_form_is_taken(name, weighted, monkeypatch):
    """Where nothing is rare, the formula is not asked."""
    parameters, x = CASES[name].make(torch.float32, torch.device("cpu"))
    case, weight = CASES[name], None
    if weighted:
        shape = list(x.shape)
        if (dim := find_likelihood(case.likelihood).term_dim(parameters[0], x)) is not None:
            shape[dim] = 1
        weight = torch.ones(shape)
    loss(parameters, x, case.likelihood, "sum", weight).backward()  # after which the factor that arrives is known
    monkeypatch.setattr(formula, "weighted_nll", None)
    loss(parameters, x, case.likelihood, "sum", weight).backward()


@pytest.mark.parametrize("name", [name for name in HAVE_A_FORM if len(CASES[name].make()[0]) > 1])
def test_each_parameter_alone(name):
    """Wants a gradient, and gets what it gets among the others; also where algorithms have to be deterministic."""
    parameters, x = CASES[name].make(torch.float32, torch.device("cpu"))
    likelihood = CASES[name].likelihood
    together = gradients(loss(parameters, x, likelihood, "sum", None), *parameters)
    for i, expected in enumerate(together):
        alone = [p.detach().requires_grad_(i == j) for j, p in enumerate(parameters)]
        torch.use_deterministic_algorithms(True)
        try:
            (found,) = gradients(loss(alone, x, likelihood, "sum", None), alone[i])
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(found, expected)


RARE = {
    "poisson": ("poisson", (torch.tensor([0.0, 0.0, 1e-32, 3.0, 1e30]),), [0.0, 2.0, 1.0, 5000.0, 1.0]),
    "poisson, fractions": ("poisson", (torch.tensor([0.5, 2.0]),), [0.5, 1e-3]),
    "poisson_log": ("poisson_log", (torch.tensor([-100.0, 80.0, 0.0]),), [0.0, 1.0, 2000.0]),
    "no mean": ("negative_binomial", (torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5])), [0.0, 3.0, 0.0]),
    "small theta": ("negative_binomial", (torch.tensor([0.5, 3.0]), torch.tensor([1e-12, 1e-3])), [0.0, 4.0]),
    "smallest theta": ("negative_binomial", (torch.tensor([0.5, 3.0]), torch.tensor([1e-37, 1e-3])), [7.0, 4.0]),
    "large theta": ("negative_binomial", (torch.tensor([0.5, 3.0]), torch.tensor([1e12, 1e5])), [1.0, 4.0]),
    "large counts": ("negative_binomial", (torch.tensor([2e4, 3e6]), torch.tensor([1.0, 10.0])), [1e4, 2e6]),
    "fractions": ("negative_binomial", (torch.tensor([2.0, 3.0]), torch.tensor([1.0, 10.0])), [0.25, 1.5]),
    "one theta": ("negative_binomial", (torch.tensor([2.0, 3.0, 0.1]), torch.tensor(2.0)), [0.0, 1.0, 0.0]),
    "zero-inflated": (
        "zero_inflated_negative_binomial",
        (torch.tensor([2.0, 1e3, 3.0, 0.0]), torch.tensor([1.0, 50.0, 4.0, 1.0]), torch.tensor([-60.0, -120.0, 40.0, 0.0])),
        [0.0, 0.0, 2.0, 0.0],
    ),
    "never zero": (
        "zero_inflated_negative_binomial",
        (torch.tensor([2.0, 1e3]), torch.tensor(3.0), torch.tensor([-6.0, 8.0])), [5.0, 900.0],
    ),
    "scale": (Gaussian(), (torch.tensor([1.0, 1e20]), torch.tensor([1e-3, 1e20])), [1.0, 2.0]),
    "log scale": (Gaussian(parameter="log_scale"), (torch.tensor([1.0, 2.0]), torch.tensor([-30.0, 30.0])), [1.0, 2.0]),
    "logvar of all": (Laplace(parameter="logvar"), (torch.tensor([1.0, 2.0]), torch.tensor(-3.0)), [1.0, 2.5]),
    "confident": ("categorical", (torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]]),), [2, 0]),
    "masked items": ("multinomial", (torch.tensor([[0.0, 1.0, -math.inf], [3.0, 2.0, 90.0]]),), [[2.0, 1, 0], [1, 0, 0]]),
    "shifted items": ("multinomial", (torch.tensor([[1e4, 1e4 + 1, 1e4 - 2]]),), [[2.0, 1.0, 7.0]]),
    "l1": ("l1", (torch.tensor([1.0, 2.0, -1e30]),), [1.0, -2.0, 1e30]),
    "confident positives": (
        BernoulliLogits(pos_weight=3.0), (torch.tensor([30.0, -30.0, 200.0, -200.0, 0.0, 20.0]),),
        [1.0, 0.0, 1.0, 0.0, 1.0, 0.3],
    ),
    "weights of positives": (
        "bernoulli_logits", (torch.tensor([30.0, -30.0, 2.0]), torch.tensor([3.0, 0.5, 0.0])), [1.0, 0.0, 0.3],
    ),
    "soft bound": (
        Gaussian(parameter="log_scale", soft_min=-6.0), (torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-50.0, 30.0, -6.0])),
        [1.0, 2.5, 0.0],
    ),
    "soft bound of a variance": (
        Laplace(parameter="logvar", soft_min=-2.0), (torch.tensor([1.0, 2.0]), torch.tensor([-50.0, 30.0])), [1.0, 2.5],
    ),
    "far outlier": (StudentT(df=3.0), (torch.tensor([1e10, 0.0]), torch.tensor([1e-3, 2.0])), [0.0, 1e-20]),
    "continuous": (
        "continuous_bernoulli_logits", (torch.tensor([0.0, 1e-20, 0.49, -0.51, 90.0, -200.0]),),
        [0.5, 0.0, 1.0, 0.2, 1.0, 0.0],
    ),
    "continuous, ends": ("continuous_bernoulli", (torch.tensor([1e-6, 0.5, 1 - 1e-6, 0.49999]),), [0.0, 0.5, 1.0, 0.2]),
    "bins": (
        "discretized_logistic",
        (torch.tensor([-1.0, 1.0, 0.0, 3.0, -3.0, 0.2, 0.0]), torch.tensor([-4.0, -4.0, -20.0, -3.0, 1.0, 10.0, -6.0])),
        [-1.0, 1.0, 0.0, 1.0, -1.0, 0.2, 1.0],
    ),
    "bins without a width": ("discretized_logistic", (torch.tensor([0.0]), torch.tensor([80.0])), [0.0]),
    "mixture": (
        "discretized_logistic_mixture",
        (torch.linspace(-9, 3, 40).reshape(1, 20, 1, 2),), torch.tensor([-1.0, 0.3, 1.0, 0.0, -0.2, 1.0]).reshape(1, 3, 1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RARE)
def test_rare_inputs(name):
    likelihood, parameters, x = RARE[name]
    rows = lambda t: t if t.dim() != 1 else t.reshape(1, -1)  # noqa: E731
    x = x if isinstance(x, torch.Tensor) else torch.tensor(x)
    parameters = [(p if likelihood == "categorical" else rows(p)).clone().requires_grad_() for p in parameters]
    x = x if likelihood == "categorical" else rows(x)
    expected, wide = truth(parameters, x, likelihood, "sum", None)
    got = loss(parameters, x, likelihood, "sum", None)
    terms = 1 + torch.lgamma(x.double() + 1).sum().item()  # of counts, which cancel
    torch.testing.assert_close(got.double(), expected.detach(), rtol=2e-6, atol=2e-7 * terms)
    for a, b in zip(gradients(got, *parameters), gradients(expected, *wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-6)


FAR = torch.linspace(15, 45, 61, dtype=torch.float64).reshape(1, -1)  # up to where softplus(x) is x in float64, too
CENTRE = torch.zeros_like(FAR)


@pytest.mark.parametrize(
    ("likelihood", "parameters"),
    (
        (Gaussian(parameter="log_scale", soft_min=-20.0), (CENTRE, FAR - 20)),
        (Laplace(soft_min=-20.0), (CENTRE, (FAR - 20).exp())),
        ("discretized_logistic", (1.0 - FAR, CENTRE)),
        (DiscretizedLogisticMixture(), (torch.stack([0 * FAR, 1.0 - FAR, CENTRE], 1),)),
        ("bernoulli_logits", (-FAR,)),
        (BernoulliLogits(pos_weight=3.0), (-FAR,)),
    ),
    ids=str,
)
def test_digits_of_float64(likelihood, parameters):
    x = torch.ones_like(FAR)
    x = x.unsqueeze(1) if len(parameters) == 1 and parameters[0].dim() == 3 else x
    for column in range(FAR.numel()):  # each by itself, or the others hide it
        given = [p[..., column : column + 1].clone().requires_grad_() for p in parameters]
        got = loss(given, x[..., :1], likelihood, "sum", None)
        expected, wide = truth(given, x[..., :1], likelihood, "sum", None)
        torch.testing.assert_close(got, expected.detach(), rtol=1e-14, atol=1e-15)
        for a, b in zip(gradients(got, *given), gradients(expected, *wide), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_logarithms_of_factorials():
    """From the table, where it goes, and beyond."""
    n = torch.cat([torch.arange(1030.0), torch.tensor([1e4, 0.5])])
    expected = torch.lgamma(n.double() + 1)
    for values in (n[:1025], n[:1026], n, n[-1:]):
        torch.testing.assert_close(log_factorial(values).double(), torch.lgamma(values.double() + 1), rtol=3e-7, atol=1e-7)
    assert log_factorial(torch.tensor([-1.0, 3.0])).isnan().tolist() == [True, False]
    torch.testing.assert_close(log_factorial(n.double()), expected, rtol=0, atol=0)


def test_ratio_of_gamma_functions_and_derivative():
    """Against float64, over all that it is for; no digits are lost where they are far apart or close."""
    a = torch.logspace(-6, 7, 400)[:, None]
    n = torch.tensor([1.0, 2.0, 0.5, 7.0, 300.0, 1e5, 9e7])
    top, rest, derivative = log_gamma_ratio_in_parts(a, n)
    ratio = rest.addcmul(n, top.log() - 1)
    wide = a.double().expand(400, 7).clone().requires_grad_()
    expected = log_gamma_ratio(wide, n.double())
    slopes = torch.digamma(wide + n.double()) - torch.digamma(wide)
    torch.testing.assert_close(ratio.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(derivative.double(), slopes.detach(), rtol=2e-6, atol=2e-6)


def test_ratio_of_gamma_functions_for_the_compiler():
    """Against 50 digits, over all of float32: roundings of the result, or of the logarithms that it is made of."""
    mp = pytest.importorskip("mpmath")
    a = torch.cat([torch.logspace(-37, 20, 115), torch.tensor([0.5, 1.0, 2.0])])[:, None]
    n = torch.tensor([0.0, 1e-3, 0.5, 1.0, 2.0, 7.0, 300.0, 1e5, 1e8, 1e12])
    found = torch.stack(ratio_and_derivatives(a, n), -1).double()
    with mp.workdps(50):
        for i, j in itertools.product(range(len(a)), range(len(n))):
            low, count = mp.mpf(a[i].item()), mp.mpf(n[j].item())
            high, fall = low + count, mp.log((low + count) / low)
            expected = mp.loggamma(high) - mp.loggamma(low), mp.digamma(high) - mp.digamma(low), mp.digamma(high)
            scales = abs(expected[0]) + fall, expected[1] + 1e-37, abs(expected[2]) + 1
            for got, exact, scale in zip(found[i, j].tolist(), expected, scales, strict=True):
                assert abs(got - exact) <= 2e-7 * scale
