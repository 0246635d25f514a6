"""One rule for values: on a CPU, what lies outside of where its likelihood has it raises, however it is called; what does not
count may be anything; NaN becomes NaN. On a GPU nobody looks, and it becomes NaN too, or a loss that means nothing."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

import fastelbo
from conftest import BACKEND, DEVICE, INTERPRETED
from fastelbo.engine import loss as engine_loss
from fastelbo.likelihoods import (
    Bernoulli,
    BernoulliLogits,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Laplace,
    Multinomial,
    values,
)

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="nobody looks on a GPU")


class Case(NamedTuple):
    """A good call, the numbers that each of its arguments must not hold, and the words of the error: by the argument, which is
    `x` or the index of a parameter."""

    likelihood: object
    parameters: tuple[float, ...]
    x: float | int
    bad: dict[str | int, tuple[float, ...]]
    words: dict[str | int, str]


UNIT = r"lie in \[0, 1\]"
CASES = {
    "bernoulli": Case("bernoulli", (0.3,), 0.5, {0: (-0.1, 1.5), "x": (-1.0, 1.5, 255.0)}, {0: UNIT, "x": UNIT}),
    "bernoulli_logits": Case("bernoulli_logits", (0.3,), 1, {"x": (-1, 2)}, {"x": UNIT}),
    "pos_weight": Case(BernoulliLogits(2.0), (0.3,), 1, {"x": (-1, 2)}, {"x": UNIT}),
    "continuous_bernoulli": Case(
        "continuous_bernoulli", (0.3,), 0.5, {0: (-0.1, 1.5, math.inf), "x": (-1.0, 1.5)}, {0: UNIT, "x": UNIT}
    ),
    "continuous_bernoulli_logits": Case("continuous_bernoulli_logits", (0.3,), 1, {"x": (-1, 2)}, {"x": UNIT}),
    "poisson": Case("poisson", (0.3,), 2.0, {0: (-0.1,), "x": (-1.0,)}, {0: "not be negative", "x": "not be negative"}),
    "poisson, none": Case("poisson", (0.3,), 0, {0: (-0.1,), "x": (-1,)}, {0: "not be negative", "x": "not be negative"}),
    "poisson_log": Case("poisson_log", (0.3,), 2, {"x": (-1,)}, {"x": "not be negative"}),
    "multinomial": Case("multinomial", (0.3,), 2, {"x": (-1,)}, {"x": "not be negative"}),
    "multinomial, floats": Case(Multinomial(1), (0.3,), 2.0, {"x": (-0.5,)}, {"x": "not be negative"}),
    "categorical, soft": Case("categorical", (0.3,), 0.25, {"x": (-0.25,)}, {"x": "not be negative"}),
    "discretized_logistic": Case("discretized_logistic", (0.3, -1.0), 0.5, {"x": (-1.5, 255.0)}, {"x": r"lie in \[-1, 1\]"}),
    "interval": Case(
        DiscretizedLogistic(interval=(0, 2)), (0.3, -1.0), 1.5, {"x": (-0.01, 2.01, 255.0)}, {"x": r"lie in \[0, 2\]"}
    ),
    "mixture's interval": Case(
        DiscretizedLogisticMixture(interval=(0, 255)), (0.3,), 200.0, {"x": (-1.0, 256.0)}, {"x": r"lie in \[0, 255\]"}
    ),
    "levels": Case(
        DiscretizedLogistic(levels=9, interval=(0, 1)), (0.3, -1.0), 4, {"x": (-1, 9)}, {"x": "have levels from 0 to 8"}
    ),
    "mixture": Case(DiscretizedLogisticMixture(8), (0.3,), 4, {"x": (-1, 8)}, {"x": "have levels from 0 to 7"}),
    **{
        f"{name}, x={x}": Case(likelihood, (0.3, 0.5), x, {1: (0.0, -0.5, -math.inf)}, {1: "be positive"})
        for name, likelihood in (
            ("gaussian", "gaussian"),
            ("gaussian, soft", Gaussian(soft_min=-1.0)),
            ("laplace", "laplace"),
            ("laplace, soft", Laplace(soft_min=-1.0)),
            ("discretized_logistic", DiscretizedLogistic("scale")),
            ("discretized_logistic, soft", DiscretizedLogistic("scale", soft_min=-1.0)),
        )
        for x in ((-1.0, 0.5, 1.0) if name == "discretized_logistic" else (0.5,))  # a bin at an end has no width
    },
    **{
        f"{name}, x={x}": Case(
            name, parameters, x, {0: (-0.5,), 1: (0.0, -0.5), "x": (-1.0,)},
            {0: "not be negative", 1: "be positive", "x": "not be negative"},
        )
        for name, parameters in (
            ("negative_binomial", (1.5, 0.5)),
            ("zero_inflated_negative_binomial", (1.5, 0.5, 0.1)),
        )
        for x in (0.0, 3.0)
    },
}  # fmt: skip
SHAPE, PLACE = (3, 4), (1, 2)


def tensors(case: Case, changed=None, number=None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The parameters and the target, with one number changed."""
    shape = (3, 18) if isinstance(case.likelihood, DiscretizedLogisticMixture) else SHAPE
    parameters = [torch.full(shape, p) for p in case.parameters]
    x = torch.full(SHAPE, case.x)
    if changed is not None:
        (x if changed == "x" else parameters[changed])[PLACE] = number
    return [p.requires_grad_() for p in parameters], x


def loss(parameters, x, likelihood, **options):
    prediction = parameters[0] if len(parameters) == 1 else tuple(parameters)
    latents = torch.zeros(2, len(x), 2)
    return fastelbo.loss(prediction, x, *latents, likelihood=likelihood, **options)


def elbo(parameters, x, likelihood, function=fastelbo.elbo, **options):
    def decoder(z):
        found = tuple(p.repeat(len(z) // 3, 1) + 0 * z[:, :1] if p.shape[:1] == (3,) else p for p in parameters)
        return found[0] if len(found) == 1 else found

    mu = torch.zeros(3, 2, requires_grad=True)
    return function(decoder, x, mu, torch.zeros(3, 2), likelihood=likelihood, **options)


def weights(likelihood, out: bool) -> torch.Tensor:
    """Of ones, but for that of the place, if it is to be left `out`; one for all classes or channels."""
    w = torch.ones(SHAPE)
    if out:
        w[PLACE] = 0.0
    if likelihood in ("multinomial", "categorical") or hasattr(likelihood, "dim"):
        w = w.amin(1, keepdim=True)
    return w


CALLS = {
    "plain": loss,
    "none": lambda *a, **k: loss(*a, reduction="none", **k),
    "mean": lambda *a, **k: loss(*a, reduction="mean", **k),
    "weights": lambda *a, **k: loss(*a, weight=weights(a[2], False), **k),
    "betas": lambda *a, **k: loss(*a, beta=torch.ones(2), **k),
    "elbo": elbo,
    "samples": lambda *a, **k: elbo(*a, bound=fastelbo.ELBO(2), **k),
    "samples and weights": lambda *a, **k: elbo(*a, bound=fastelbo.ELBO(2), weight=weights(a[2], False), **k),
    "log_likelihood": lambda *a, **k: elbo(*a, function=fastelbo.log_likelihood, n_samples=2, **k),
}
if INTERPRETED:  # which takes its time; the others differ in what is around the kernels
    CALLS = {name: CALLS[name] for name in ("plain", "weights", "samples")}


def label(case: Case, argument, call: str) -> str:
    if argument == "x":
        return "x"
    name = "recon_x" if call in ("plain", "none", "mean", "weights", "betas") else r"decoder\(z\)"
    return name if len(case.parameters) == 1 else rf"{name}\[{argument}\]"


@pytest.mark.parametrize("call", ("plain",) if INTERPRETED else CALLS)  # who looks is no kernel
@pytest.mark.parametrize("name", CASES)
def test_what_lies_outside_raises(name, call):
    case = CASES[name]
    assert all(t.isfinite().all() for t in CALLS[call](*tensors(case), case.likelihood)[:1])
    for argument, numbers in case.bad.items():
        for number in numbers:
            with pytest.raises(ValueError, match=f"^{label(case, argument, call)} must {case.words[argument]}"):
                CALLS[call](*tensors(case, argument, number), case.likelihood)


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_count_may_be_anything(name):
    case = CASES[name]
    parameters, x = tensors(case)
    expected = loss(parameters, x, case.likelihood, weight=weights(case.likelihood, True)).loss
    slopes = torch.autograd.grad(expected, parameters)
    for argument, numbers in case.bad.items():
        for number in numbers + ((math.nan,) if argument != "x" or isinstance(case.x, float) else ()):
            parameters, x = tensors(case, argument, number)
            got = loss(parameters, x, case.likelihood, weight=weights(case.likelihood, True)).loss
            found = torch.autograd.grad(got, parameters)
            # The formula may be taken in place of the form in one pass, which rounds elsewhere.
            atol = 5e-7 if "mixture" in name else 1e-7
            torch.testing.assert_close((got, found), (expected, slopes), rtol=1e-5, atol=atol)
            if "mixture" not in name:
                assert all(torch.equal(a == 0, b == 0) for a, b in zip(found, slopes, strict=True))
            out = weights(case.likelihood, True) == 0
            large = [a for a in found if a.dim() == out.dim() and a.shape[0] == out.shape[0]]
            assert large and all((a[out.expand_as(a)] == 0).all() for a in large)


@pytest.mark.parametrize("likelihood", ("bernoulli", "multinomial"))
def test_what_does_not_count_hides_nothing(likelihood):
    x, weight = torch.tensor([[math.nan, 0.5], [0.5, -1.0]]), torch.tensor([[0.0], [1.0]])
    with pytest.raises(ValueError, match="x must"):
        loss([torch.full((2, 2), 0.5)], x, likelihood, weight=weight)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", CASES)
def test_nan_passes_and_becomes_nan(name, call):
    case = CASES[name]
    for argument in (*range(len(case.parameters)), *(("x",) if isinstance(case.x, float) else ())):
        result = CALLS[call](*tensors(case, argument, math.nan), case.likelihood)
        assert result[0].isnan().any(), argument


@pytest.mark.parametrize("labels", ([0, 4, -100], [0, -1, 2]), ids=str)
def test_labels(labels):
    logits, x = torch.zeros(3, 4, requires_grad=True), torch.tensor(labels)
    for options in ({}, {"weight": torch.ones(3)}, {"reduction": "mean"}, {"reduction": "none"}):
        with pytest.raises(ValueError, match=r"x must have labels from 0 to 3, or ignore_index=-100,.* got values from"):
            loss([logits], x, "categorical", **options)
    got = loss([logits], x, "categorical", weight=torch.tensor([1.0, 0.0, 0.0])).recon
    torch.testing.assert_close(got.item(), math.log(4), rtol=1e-6, atol=0)
    got = loss([logits], x, Categorical(ignore_index=labels[1]), weight=torch.tensor([1.0, 1.0, 0.0])).recon
    torch.testing.assert_close(got.item(), math.log(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", (0.0, -0.5))
@pytest.mark.parametrize(
    "likelihood", ("gaussian", "laplace", Gaussian(soft_min=-1.0), DiscretizedLogistic("scale")), ids=lambda v: str(v)
)
def test_scales(likelihood, number):
    """Of any shape, and learned."""
    mean, x = torch.zeros(3, 4), torch.ones(3, 4)
    for shape in ((), (4,), (3, 1), (3, 4)):
        for wants_grad in (False, True):
            scale = torch.full(shape, 0.5)
            scale.view(-1)[-1] = number
            scale.requires_grad_(wants_grad)
            for call, name in (("plain", "recon_x"), ("weights", "recon_x"), ("samples", r"decoder\(z\)")):
                with pytest.raises(ValueError, match=rf"^{name}\[1\] must be positive"):
                    CALLS[call]([mean, scale], x, likelihood)


def test_as_torch_does():
    """Logits go with any floating target, and any `pos_weight` with them."""
    logits, x, pos_weight = torch.randn(3, 4), 3 * torch.randn(3, 4), -torch.rand(4)
    for parameters, options in (([logits], {}), ([logits, pos_weight], {"pos_weight": pos_weight})):
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum", **options)
        torch.testing.assert_close(loss(parameters, x, "bernoulli_logits").recon, expected)


@pytest.mark.parametrize("where", (0, 1))
def test_nan_goes_through_double_backward(where):
    """With a gradient of NaN where it is, and the right ones elsewhere; Torch's own function raises there."""
    given = [torch.full((2, 3), 0.4), torch.full((2, 3), 0.25)]
    given[where][0, 1] = math.nan
    p, x = (t.requires_grad_() for t in given)
    slopes = torch.autograd.grad(loss([p], x, "bernoulli").loss, (p, x), create_graph=True)
    (curvature,) = torch.autograd.grad(slopes[0].nansum(), p)
    right = ~given[where].isnan()
    assert all(torch.equal(~slope.isnan(), right) for slope in slopes)
    expected = (p - x) / (p * (1 - p)), torch.log1p(-p) - torch.log(p), x / p**2 + (1 - x) / (1 - p) ** 2
    for got, truth in zip((*slopes, curvature), expected, strict=True):
        torch.testing.assert_close(got[right], truth[right])


@pytest.mark.parametrize("where", (0, 1))
def test_nan_goes_through_transformed_calls(where):
    given = [torch.full((2, 3), 0.4), torch.full((2, 3), 0.25)]
    given[where][0, 1] = math.nan
    slopes = torch.func.grad(lambda p, x: loss([p], x, "bernoulli").loss, (0, 1))(*given)
    for slope in slopes:
        assert torch.equal(slope.isnan(), given[where].isnan())


@pytest.mark.parametrize("name", ("gaussian", "laplace"))
def test_a_scale_that_nobody_sees_gives_nan(name, monkeypatch):
    """Traced, or by Torch on a GPU: in the value and in all gradients."""
    mean, x, scale = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor(-2.0)
    slopes = torch.func.grad(lambda m, s: loss([m, s], x, name).loss, (0, 1))(mean, scale)
    assert all(slope.isnan().all() for slope in slopes)
    monkeypatch.setattr("fastelbo.likelihoods.location.is_seen", lambda *_: False)
    monkeypatch.setattr("fastelbo.engine.loss.check_values", lambda *_: None)
    for given in (scale, scale.expand(2, 3)):
        parameters = [t.clone().requires_grad_() for t in (mean, given)]
        terms = loss(parameters, x, name)
        assert terms.recon.isnan() and terms.loss.isnan()
        assert all(slope.isnan().all() for slope in torch.autograd.grad(terms.loss, parameters))


@pytest.mark.parametrize(
    ("x", "message"),
    (
        (
            torch.tensor([[0, 200]], dtype=torch.uint8),
            r"got values from 0 to 200; for 8-bit images give the likelihood target_scale=1/255",
        ),
        (torch.tensor([[0.0, 255.0]]), r"for 8-bit images give the likelihood target_scale=1/255"),
        (torch.tensor([[-1.0, 0.5]]), r"got values from -1 to 0.5; for targets in \[-1, 1\] pass \(x \+ 1\) / 2"),
        (torch.tensor([[-2.1, 2.3]]), "for others take a likelihood of real numbers, such as 'gaussian'"),
        (torch.tensor([[0.0, 1.01]]), "for others take a likelihood of real numbers, such as 'gaussian'"),
    ),
)
def test_the_advice_fits(x, message):
    for options in ({}, {"weight": torch.ones(1, 2)}):
        with pytest.raises(ValueError, match=message):
            loss([torch.full((1, 2), 0.5)], x, "bernoulli", **options)


def test_the_advice_knows_target_scale():
    x = torch.full((1, 2), 255, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"x must lie in \[0, 1\] .* got values from 2.55 to 2.55 once multiplied by target_scale=0.01$"
    ):
        loss([torch.full((1, 2), 0.5)], x, Bernoulli(target_scale=0.01))


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(values, "_warned", False)


IMAGES = (
    (DiscretizedLogistic(), lambda x: [torch.zeros(x.shape), torch.zeros(())]),
    (DiscretizedLogisticMixture(), lambda x: [torch.zeros(len(x), 10, *x.shape[2:])]),
)


@pytest.mark.parametrize(("likelihood", "parameters"), IMAGES, ids=("logistic", "mixture"))
def test_images_in_the_unit_interval_are_told_of_once(likelihood, parameters, fresh):
    x = torch.rand(2, 3, 8, 8)
    for good in (2 * x - 1, x.mul(255).byte(), x[:1, :, :4, :4], torch.cat((x, -x)), torch.full_like(x, math.nan)):
        loss(parameters(good), good, likelihood)  # a warning would be an error
    torch.func.vmap(lambda x: loss(parameters(x), x, likelihood).loss)(x[None])  # traced: nobody looks
    for interval in ((0, 1), (-1, 2), (-0.5, 1)):
        loss(parameters(x), x, replace(likelihood, interval=interval))
    with pytest.warns(UserWarning, match=r"all of x lies in \[0, 1\].*give it interval=\(0, 1\), or pass integers"):
        loss(parameters(x), 255 * x, replace(likelihood, target_scale=1 / 255))
    loss(parameters(x), x, likelihood)


def test_bytes_as_floats_are_told_what_to_do():
    x = 255 * torch.rand(2, 3, 8, 8)
    for likelihood, parameters in IMAGES:
        with pytest.raises(
            ValueError, match=r"x must lie in \[-1, 1\].*pass integers, or give the likelihood interval=\(0, 255\)$"
        ):
            loss(parameters(x), x, likelihood)
        with pytest.raises(
            ValueError, match=r"x must lie in \[0, 1\] for the likelihood '\w+', got values from 0.\d+ to 25\d.\d+$"
        ):
            loss(parameters(x), x, replace(likelihood, interval=(0, 1)))


def test_nobody_looks_twice_where_all_is_well(monkeypatch, by_functions):
    """What costs time comes after a loss that is not finite, and a pass over the target only where that would not tell."""
    is_well, looked = values.is_well, []
    monkeypatch.setattr(values, "_span", lambda *_: pytest.fail("all was well"))
    monkeypatch.setattr(engine_loss, "is_well", lambda silent, *given: looked.append(silent) or is_well(silent, *given))
    silent = ("bernoulli", "bernoulli_logits", "pos_weight", "continuous_bernoulli", "continuous_bernoulli_logits")
    for name, case in CASES.items():
        for call in ("plain", "weights"):
            looked.clear()
            CALLS[call](*tensors(case), case.likelihood)
            known = [found for found in looked if found is not None and found[0] <= found[1]]
            assert len(looked) <= 1
            assert len(known) == (name in (*silent, "multinomial", "multinomial, floats", "categorical, soft")), name


@pytest.mark.skipif(BACKEND != "torch", reason="about functions of Torch")
def test_nobody_looks_at_what_torch_has_looked_at(monkeypatch):
    """Its function for probabilities raises for a target outside, and for a NaN, which then is looked for."""
    looked, is_well = [], values.is_well
    monkeypatch.setattr(engine_loss, "is_well", lambda *given: looked.append(given) or is_well(*given))
    fastelbo.nll(torch.rand(3, 4), torch.rand(3, 4), likelihood="bernoulli")
    assert not looked
    assert fastelbo.nll(torch.rand(3, 4), torch.full((3, 4), torch.nan), likelihood="bernoulli").isnan()
    with pytest.raises(ValueError, match="x must lie in"):
        fastelbo.nll(torch.rand(3, 4), torch.full((3, 4), 1.5), likelihood="bernoulli")
    assert len(looked) == 2
