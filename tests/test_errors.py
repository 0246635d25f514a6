"""Bad input: a ValueError or TypeError that names the argument, what came and what was expected."""

import pickle
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastelbo
from conftest import DEVICE
from fastelbo import likelihoods as lk

GOOD = {
    "recon_x": torch.rand(4, 6, device=DEVICE),
    "x": torch.rand(4, 6, device=DEVICE),
    "mu": torch.rand(4, 3, device=DEVICE),
    "logvar": torch.rand(4, 3, device=DEVICE),
}
KL = torch.zeros((), device=DEVICE)


def rand(*shape, **kwargs):
    return torch.rand(*shape, device=DEVICE, **kwargs)


BAD = [
    ({"x": rand(4, 7)}, ValueError, r"recon_x must have the shape of x: got recon_x \(4, 6\) and x \(4, 7\)"),
    ({"x": rand(1, 6)}, ValueError, r"recon_x must have the shape of x"),
    ({"x": rand(4, 6, 1)}, ValueError, r"recon_x must have the shape of x: .* x.view_as\(recon_x\)"),
    ({"logvar": rand(4, 1)}, ValueError, r"logvar must have the shape of mu: got logvar \(4, 1\) and mu \(4, 3\)"),
    (
        {"mu": rand(5, 3), "logvar": rand(5, 3), "reduction": "none"},
        ValueError,
        r"same batch size.*for the reduction 'none': got mu \(5, 3\) and recon_x \(4, 6\)",
    ),
    (
        {"mu": rand(5, 3), "logvar": rand(5, 3), "reduction": "none", "prior": (KL, KL)},
        ValueError,
        r"same batch size.*for the reduction 'none': got mu \(5, 3\) and x \(4, 6\)",
    ),
    ({"recon_x": rand(()), "x": rand(())}, ValueError, "recon_x must have the batch"),
    ({"mu": rand(()), "logvar": rand(())}, ValueError, "mu must have the batch"),
    ({"recon_x": torch.ones(4, 6, dtype=torch.int64, device=DEVICE)}, TypeError, "recon_x must be float16.*int64"),
    ({"recon_x": rand(4, 6).to(torch.complex64)}, TypeError, "recon_x must be float16.*complex64"),
    ({"mu": torch.ones(4, 3, dtype=torch.int32, device=DEVICE)}, TypeError, "mu must be float16.*int32"),
    ({"logvar": rand(4, 3).to(torch.complex64)}, TypeError, "logvar must be float16.*complex64"),
    ({"x": rand(4, 6).to(torch.complex64)}, TypeError, "x must be a tensor of booleans.*complex64"),
    ({"recon_x": [1.0]}, TypeError, "recon_x must be a tensor, got float"),
    ({"x": 3.0}, TypeError, "x must be a tensor, got float"),
    ({"likelihood": "bernouli"}, ValueError, "likelihood must be an object of .* or one of 'bernoulli'.*got 'bernouli'"),
    ({"likelihood": 0.5}, ValueError, "likelihood must be an object of fastelbo.likelihoods or one of"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'sum'.*got 'avg'"),
    ({"reduction": ("sum",)}, ValueError, "reduction must be a name or a pair"),
    ({"reduction": ("none", "sum")}, ValueError, "'none' cannot be paired"),
    ({"reduction": ("none", "none")}, ValueError, r"'none' cannot be paired.*got \('none', 'none'\)"),
    ({"reduction": ("sum", "avg")}, ValueError, "reduction must be one of"),
    ({"mu": None}, ValueError, "give mu and logvar, or kl: got mu None, logvar given"),
    ({"mu": None, "logvar": None}, ValueError, "give mu and logvar, or kl: got mu None, logvar None"),
    ({"kl": KL}, ValueError, "not both: got mu given, logvar given, kl given"),
    ({"mu": None, "kl": KL}, ValueError, "not both: got mu None, logvar given, kl given"),
    ({"mu": None, "logvar": None, "kl": 0.5}, TypeError, "kl must be a tensor, got float"),
    ({"mu": None, "logvar": None, "kl": KL.long()}, TypeError, "kl must be float16"),
    ({"mu": None, "logvar": None, "kl": rand(4)}, ValueError, r"kl must have shape \(\) for the reduction 'sum', got \(4,\)"),
    ({"mu": None, "logvar": None, "kl": KL, "reduction": "none"}, ValueError, r"kl must have shape \(4,\)"),
    (
        {"mu": None, "logvar": None, "kl": KL, "reduction": ("sum", "sum")},
        ValueError,
        "reduction must be one name where kl is given",
    ),
    ({"beta": rand(4)}, ValueError, r"beta must be a number, a 0-d tensor or .* sample of mu: got beta \(4,\) and mu \(4, 3\)"),
    ({"kl": KL, "mu": None, "logvar": None, "beta": rand(3)}, ValueError, "beta must be a number or a 0-d tensor"),
    (
        {"kl": KL, "mu": None, "logvar": None, "prior": (KL, KL)},
        ValueError,
        "must not be given with kl, which is reduced already",
    ),
    ({"beta": "1"}, TypeError, "beta must be a number or a 0-d tensor, got str"),
    ({"beta": torch.tensor(1j)}, TypeError, "beta must be a tensor of booleans"),
    ({"beta": None}, TypeError, "beta must be a number"),
    *(
        (
            {"recon_x": (GOOD["recon_x"], rand(5)), "likelihood": likelihood},
            ValueError,
            r"recon_x\[1\] must broadcast to recon_x\[0\]: got recon_x\[1\] \(5,\) and \(4, 6\)",
        )
        for likelihood in ("gaussian", "bernoulli_logits")
    ),
]


@pytest.mark.parametrize(
    "make, error, message",
    (
        *(
            (lambda kind=kind, scale=scale: kind(scale=scale), error, f"{kind.__name__}.scale must be {message}")
            for kind in (lk.Gaussian, lk.Laplace)
            for scale, error, message in (
                (0.0, ValueError, "positive and finite, got 0.0"),
                (-1, ValueError, "positive and finite, got -1.0"),
                (float("nan"), ValueError, "positive and finite, got nan"),
                (None, TypeError, "a number"),
            )
        ),
        *(
            (
                lambda kind=kind, value=value: kind(target_scale=value),
                TypeError,
                f"{kind.__name__}.target_scale must be {text}",
            )
            for kind in (lk.Bernoulli, lk.Gaussian, lk.Categorical, lk.DiscretizedLogisticMixture)
            for value, text in ((rand(()), "a number, got Tensor"), ("x", "a number, got str"), (None, "a number, got None"))
        ),
        (lambda: lk.Bernoulli(0.5), TypeError, "positional"),
    ),
)
def test_fields_of_likelihoods(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("change, error, message", BAD)
def test_loss(change, error, message):
    with pytest.raises(error, match=message):
        fastelbo.loss(**{**GOOD, **change})


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        ({"logvar": rand(4, 1)}, ValueError, "logvar must have the shape of mu"),
        ({"mu": [1.0]}, TypeError, "mu must be a tensor"),
        ({"eps": rand(4, 2)}, ValueError, "eps must have the shape of mu"),
        ({"eps": torch.ones(4, 3, dtype=torch.int64, device=DEVICE)}, TypeError, "eps must be float16"),
        ({"eps": rand(4, 3), "generator": torch.Generator(DEVICE)}, ValueError, "give eps or generator, not both"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    ),
)
@pytest.mark.parametrize("function", (fastelbo.reparameterize, fastelbo.sample_kl))
def test_sampling(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"mu": GOOD["mu"], "logvar": GOOD["logvar"], **arguments})


def test_reduction_of_sample_kl():
    for bad in ("avg", ("sum", "sum"), None):
        with pytest.raises(ValueError, match="reduction must be one of"):
            fastelbo.sample_kl(GOOD["mu"], GOOD["logvar"], reduction=bad)


def test_elbo_checks_before_the_decoder_runs():
    def decoder(z):
        raise AssertionError("the decoder ran")

    for bad in (
        {"beta": "1"},
        {"likelihood": "x"},
        {"reduction": "x"},
        {"posterior": "x"},
        {"weighting": "x"},
        {"bound": "iwae"},
    ):
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            fastelbo.elbo(decoder, GOOD["x"], GOOD["mu"], GOOD["logvar"], **bad)


def test_module():
    with pytest.raises(TypeError, match="beta must be a number, got str"):
        fastelbo.nn.ELBOLoss(beta="1")
    with pytest.raises(ValueError, match="likelihood must be an object of"):
        fastelbo.nn.ELBOLoss(likelihood="normal")
    with pytest.raises(ValueError, match="reduction must be one of"):
        fastelbo.nn.ELBOLoss(reduction="avg")
    with pytest.raises(ValueError, match="posterior must be one of"):
        fastelbo.nn.ELBOLoss(posterior="sigma")
    with pytest.raises(TypeError, match="weighting must be a Weighting, got float"):
        fastelbo.nn.ELBOLoss(weighting=0.5)


@pytest.mark.parametrize("name", ("x", "mu", "logvar", "eps"))
def test_devices(name):
    """The `meta` device stands for a second one where there is none."""
    other = GOOD["mu" if name == "eps" else name].to("meta")
    with pytest.raises(ValueError, match="must be on the device of"):
        if name == "eps":
            fastelbo.reparameterize(GOOD["mu"], GOOD["logvar"], eps=other)
        else:
            fastelbo.loss(**{**GOOD, name: other})


@pytest.mark.parametrize("name", ("beta", "recon_x[1]"))
def test_devices_of_numbers(name):
    number = torch.ones((), device="meta")
    change = {"beta": number} if name == "beta" else {"recon_x": (GOOD["recon_x"], number)}
    with pytest.raises(ValueError, match=rf"{re.escape(name)} must be on .* got meta"):
        fastelbo.loss(**{**GOOD, **change}, likelihood="gaussian")


@pytest.mark.parametrize("bad", (-0.1, 1.1))
def test_probabilities_outside_0_and_1(bad):
    recon_x = GOOD["recon_x"].clone()
    recon_x[2, 5] = bad
    arguments = {**GOOD, "recon_x": recon_x}
    if DEVICE.type == "cpu":
        for function in (lambda: fastelbo.loss(**arguments), lambda: fastelbo.loss(**arguments, reduction="none")):
            with pytest.raises(
                ValueError, match=r"recon_x must lie in \[0, 1\] for the likelihood 'bernoulli', got values from"
            ):
                function()
        with pytest.raises(ValueError, match=r"decoder\(z\) must lie in \[0, 1\]"):
            fastelbo.elbo(lambda z: recon_x, GOOD["x"], GOOD["mu"], GOOD["logvar"])
    else:
        assert fastelbo.loss(**arguments).loss.isnan()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="looking at the target would need a sync")
def test_bytes_without_target_scale():
    x = torch.full((4, 6), 255, dtype=torch.uint8)
    for likelihood in ("bernoulli", "bernoulli_logits"):
        with pytest.raises(ValueError, match=r"x must lie in \[0, 1\] .*, got values from 255 to 255; .*target_scale=1/255"):
            fastelbo.loss(**{**GOOD, "x": x}, likelihood=likelihood)
    fastelbo.loss(**{**GOOD, "x": 3 * GOOD["x"]}, likelihood="bernoulli_logits")  # as F.binary_cross_entropy_with_logits
    with pytest.raises(ValueError, match="x must lie in"):
        fastelbo.loss(**{**GOOD, "x": x}, likelihood=lk.Bernoulli(target_scale=-1 / 255))
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        fastelbo.loss(**{**GOOD, "x": x.to(dtype)}, likelihood=lk.Bernoulli(target_scale=1 / 255))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="on a CPU it raises")
def test_a_scale_on_the_gpu_that_is_not_positive_gives_nan():
    for scale in (0.0, -1.0):
        recon_x = GOOD["recon_x"], torch.tensor(scale, device=DEVICE)
        assert fastelbo.loss(**{**GOOD, "recon_x": recon_x}, likelihood="gaussian").loss.isnan()


LATENTS, NOISE = [GOOD["x"], GOOD["mu"], GOOD["logvar"]], rand(2, 4, 3)


def twice(z):
    """A decoder of two samples."""
    return GOOD["recon_x"].repeat(2, 1)


# Whatever takes a number, called with one.
NUMBERS = {
    "beta": lambda n: fastelbo.loss(**GOOD, beta=n).loss,
    "elbo beta": lambda n: (
        fastelbo.elbo(lambda z: GOOD["recon_x"], GOOD["x"], GOOD["mu"], GOOD["mu"], n, bound=fastelbo.ELBO(2)).loss
    ),
    "Gaussian.scale": lambda n: fastelbo.loss(**GOOD, likelihood=lk.Gaussian(scale=n)).loss,
    "Laplace.scale": lambda n: fastelbo.nn.ELBOLoss(lk.Laplace(scale=n)).to(DEVICE)(**GOOD).loss,
    "target_scale": lambda n: fastelbo.loss(**GOOD, likelihood=lk.MSE(target_scale=n)).loss,
    "capacity": lambda n: fastelbo.loss(**GOOD, weighting=fastelbo.Weighting(capacity=n)).loss,
    "free_bits": lambda n: fastelbo.loss(**GOOD, weighting=fastelbo.Weighting(free_bits=n)).loss,
    "balance": lambda n: fastelbo.loss(**GOOD, prior=(KL, KL), weighting=fastelbo.Weighting(balance=(n, 1.0))).loss,
    "clamp": lambda n: fastelbo.kl_divergence(GOOD["mu"], GOOD["mu"], posterior=fastelbo.Posterior("std", (n, 99.0))),
    "soft_min": lambda n: fastelbo.loss(**GOOD, likelihood=lk.Gaussian(parameter="log_scale", soft_min=n)).loss,
    "pos_weight": lambda n: fastelbo.loss(**GOOD, likelihood=lk.BernoulliLogits(n)).loss,
    "step": lambda n: torch.tensor(fastelbo.schedules.linear(100)(n)),
    "steps": lambda n: torch.tensor(fastelbo.schedules.linear(n)(1)),
    "module beta": lambda n: fastelbo.nn.ELBOLoss(beta=n).to(DEVICE)(**GOOD).loss,
}
LOGITS, LABELS = rand(4, 5, 6), torch.ones(4, 6, dtype=torch.int64, device=DEVICE)
INTEGERS = {
    "ELBO.n_samples": lambda n: fastelbo.elbo(twice, *LATENTS, bound=fastelbo.ELBO(n, chunk=9)).recon,
    "IWAE.n_samples": lambda n: fastelbo.elbo(twice, *LATENTS, bound=fastelbo.IWAE(n, chunk=9)).recon,
    "ELBO.chunk": lambda n: fastelbo.elbo(twice, *LATENTS, bound=fastelbo.ELBO(2, chunk=n)).recon,
    "IWAE.chunk": lambda n: fastelbo.elbo(twice, *LATENTS, bound=fastelbo.IWAE(2, chunk=n)).recon,
    "log_likelihood's n_samples": lambda n: fastelbo.log_likelihood(twice, *LATENTS, n_samples=n, chunk=9, eps=NOISE).log_p,
    "log_likelihood's chunk": lambda n: fastelbo.log_likelihood(twice, *LATENTS, n_samples=2, chunk=n, eps=NOISE).log_p,
    "ratio n_samples": lambda n: torch.tensor(fastelbo.sample_log_ratio(*LATENTS[1:], n_samples=n).z.shape),
    "dim": lambda n: fastelbo.loss(LOGITS, LOGITS, kl=KL, likelihood=lk.Categorical(n)).loss,
    "ignore_index": lambda n: fastelbo.loss(LOGITS, LABELS, kl=KL, likelihood=lk.Categorical(ignore_index=n)).loss,
    "levels": lambda n: fastelbo.loss((LOGITS, KL), 2 * LOGITS - 1, kl=KL, likelihood=lk.DiscretizedLogistic(levels=n)).loss,
    "cycles": lambda n: torch.tensor(fastelbo.schedules.cyclical(10, cycles=n)(11)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_every_kind(name):
    torch.manual_seed(0)
    expected = NUMBERS[name](2.0)
    for number in (2, Fraction(2), np.float16(2), np.float32(2), np.float64(2), np.longdouble(2), np.int64(2), np.uint8(2)):
        torch.testing.assert_close(NUMBERS[name](number), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "bad", ("1", True, np.bool_(True), 1j, np.complex64(1), Decimal(1), np.ones(1), float, [1.0]), ids=repr
)
def test_what_is_no_number(bad, name):
    if bad == "1" and name.endswith(".scale"):
        pytest.skip("a string may be the name of a scale: see test_options_are_checked")
    with pytest.raises(TypeError, match=rf"{name.split()[-1]}\S* must be a number.*, got {type(bad).__name__}"):
        NUMBERS[name](bad)


@pytest.mark.parametrize("bad", (10**400, -(10**400), Fraction(10**400, 3)), ids=("large", "negative", "fraction"))
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_float_holds(name, bad):
    with pytest.raises(ValueError, match=rf"{name.split()[-1]}\S* must be a number.*, and fit into a float"):
        NUMBERS[name](bad)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_every_kind(name):
    expected = INTEGERS[name](2)
    for number in (np.int8(2), np.int64(2), np.uint64(2)):
        torch.testing.assert_close(INTEGERS[name](number), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "bad", (2.0, np.float32(2), True, np.bool_(True), torch.tensor(2), torch.tensor(2.0), int, "2"), ids=repr
)
def test_what_is_no_integer(bad, name):
    with pytest.raises(TypeError, match=rf"{name.split()[-1]} must be an integer.*, got {type(bad).__name__}"):
        INTEGERS[name](bad)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_that_are_too_large(name):
    with pytest.raises(ValueError, match=rf"{name.split()[-1]} must be an integer.*fit into 64 bits: got one of 1329"):
        INTEGERS[name](10**400)


def test_records_hold_plain_numbers():
    """So that what is equal is printed, hashed and pickled alike."""
    pairs = (
        (lk.Gaussian(np.float32(2), target_scale=Fraction(1, 4)), lk.Gaussian(2.0, target_scale=0.25)),
        (lk.Gaussian(soft_min=np.float32(-6)), lk.Gaussian(soft_min=-6.0)),
        (lk.Laplace(parameter="logvar", soft_min=Fraction(-1, 2)), lk.Laplace(parameter="logvar", soft_min=-0.5)),
        (lk.BernoulliLogits(np.float32(5)), lk.BernoulliLogits(5.0)),
        (lk.Categorical(np.int64(-1), np.int8(5)), lk.Categorical(-1, 5)),
        (lk.Multinomial(np.int32(2)), lk.Multinomial(2)),
        (lk.DiscretizedLogistic(levels=np.uint16(32)), lk.DiscretizedLogistic(levels=32)),
        (lk.DiscretizedLogistic(interval=[np.int64(-1), Fraction(1)]), lk.DiscretizedLogistic()),
        (lk.DiscretizedLogisticMixture(interval=(0, np.float32(1))), lk.DiscretizedLogisticMixture(interval=[0.0, 1.0])),
        (lk.DiscretizedLogisticMixture(np.int64(32), np.int64(-1)), lk.DiscretizedLogisticMixture(32, -1)),
        (fastelbo.ELBO(np.int64(5), chunk=np.uint8(9)), fastelbo.ELBO(5, chunk=5)),
        (fastelbo.IWAE(np.int64(5), chunk=9), fastelbo.IWAE(5, estimator="standard", chunk=5)),
        (fastelbo.Posterior(clamp=[Fraction(-3, 2), np.float32(2)]), fastelbo.Posterior("logvar", (-1.5, 2.0))),
        (fastelbo.Posterior("std", (None, None)), fastelbo.Posterior("std")),
        (fastelbo.Weighting(np.float32(0.5), balance=[1, np.int64(2)]), fastelbo.Weighting(0.5, balance=(1.0, 2.0))),
        (fastelbo.Weighting(capacity=Fraction(5, 2)), fastelbo.Weighting(capacity=2.5)),
        (fastelbo.schedules.cyclical(np.int64(10), cycles=np.int64(3)), fastelbo.schedules.cyclical(10, cycles=3)),
    )
    for ours, theirs in pairs:
        assert ours == theirs
        assert hash(ours) == hash(theirs)
        assert repr(ours) == repr(theirs)
        assert pickle.loads(pickle.dumps(ours)) == theirs


# Whatever takes a tensor, called with one that `make` has made of a good one.
Z = rand(4, 3)
PLACES = {
    "recon_x": lambda make: fastelbo.loss(**{**GOOD, "recon_x": make(rand(4, 6))}),
    "x": lambda make: fastelbo.loss(**{**GOOD, "x": make(rand(4, 6))}),
    "mu": lambda make: fastelbo.loss(**{**GOOD, "mu": make(Z)}),
    "logvar": lambda make: fastelbo.sample_kl(Z, make(Z)),
    "mu of all": lambda make: fastelbo.kl_divergence(make(Z), make(Z)),
    "recon_x[1]": lambda make: fastelbo.loss(**{**GOOD, "recon_x": (GOOD["x"], make(rand(4, 6)))}, likelihood="gaussian"),
    "recon_x[1] of features": lambda make: fastelbo.loss(
        **{**GOOD, "recon_x": (GOOD["x"], make(rand(6)))}, likelihood="bernoulli_logits"
    ),
    "weight": lambda make: fastelbo.loss(**GOOD, weight=make(rand(4, 6))),
    "beta": lambda make: fastelbo.loss(**GOOD, beta=make(rand(3))),
    "kl": lambda make: fastelbo.loss(GOOD["x"], GOOD["x"], kl=make(rand(4)), reduction="none"),
    "prior[0]": lambda make: fastelbo.kl_divergence(Z, Z, (make(Z), Z)),
    "prior[1]": lambda make: fastelbo.kl_divergence(Z, Z, (Z, make(Z))),
    "eps": lambda make: fastelbo.reparameterize(Z, Z, eps=make(Z)),
    "decoder(z)": lambda make: fastelbo.elbo(lambda z: make(rand(4, 6)), *LATENTS),
    "decoder(z)[0] of two": lambda make: fastelbo.elbo(lambda z: (make(rand(4, 6)), Z), *LATENTS, likelihood="gaussian"),
    "decoder(z) of samples": lambda make: fastelbo.elbo(lambda z: make(rand(8, 6)), *LATENTS, bound=fastelbo.ELBO(2, chunk=2)),
    "decoder(z)[1] of samples": lambda make: fastelbo.log_likelihood(
        lambda z: (rand(8, 6), make(rand(8, 6))), *LATENTS, n_samples=2, chunk=2, likelihood="gaussian"
    ),
    "x of samples": lambda make: fastelbo.elbo(lambda z: rand(8, 6), make(GOOD["x"]), Z, Z, bound=fastelbo.ELBO(2, chunk=2)),
    "x of elbo": lambda make: fastelbo.elbo(lambda z: GOOD["x"], make(GOOD["x"]), Z, Z),
    "recon_x of sequences": lambda make: fastelbo.loss(
        **{**GOOD, "recon_x": make(GOOD["recon_x"])}, reduction=fastelbo.PerSample(batch_dims=1)
    ),
    "recon_weight": lambda make: fastelbo.loss(**GOOD, recon_weight=make(torch.ones(2, 2, device=DEVICE))),
    "flow(z)[0]": lambda make: fastelbo.sample_log_ratio(Z, Z, flow=lambda z: (make(z), z.sum(1))),
    "flow(z)[1]": lambda make: fastelbo.sample_log_ratio(Z, Z, flow=lambda z: (z, make(z.sum(1)))),
}
KINDS = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "sparse_csc": lambda t: t.to_sparse_csc(),
    "sparse_bsr": lambda t: t.to_sparse_bsr((1, 1)),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t), layout=torch.strided),
    "nested, jagged": lambda t: torch.nested.nested_tensor(list(t.unsqueeze(1) if t.dim() == 1 else t), layout=torch.jagged),
    "complex64": lambda t: t.to(torch.complex64),
    "quint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_kinds_of_tensors(place, kind):
    def make(t):
        if t.dim() == 1 and kind.startswith("sparse"):
            pytest.skip("a matrix only") if kind != "sparse_coo" else None
        if place.split(" ")[0] == "x" and kind == "sparse_csr":
            pytest.skip("a target may be that")
        if kind == "mkldnn" and t.device.type != "cpu":
            pytest.skip("on a CPU only")
        return KINDS[kind](t)

    expected = rf"{re.escape(place.split(' of ')[0])} must be .*, got .*{kind.split(',')[0]}"
    with pytest.raises(TypeError, match=expected):
        PLACES[place](make)


@pytest.mark.parametrize("name", ("beta", "recon_x", "capacity", "kl", "prior"))
def test_numbers_in_sparse_tensors(name):
    number = torch.tensor(0.5, device=DEVICE).to_sparse()
    calls = {
        "beta": lambda: fastelbo.loss(**GOOD, beta=number),
        "recon_x": lambda: fastelbo.loss(**{**GOOD, "recon_x": (GOOD["x"], number)}, likelihood="gaussian"),
        "capacity": lambda: fastelbo.loss(**GOOD, weighting=fastelbo.Weighting(capacity=number)),
        "kl": lambda: fastelbo.loss(GOOD["x"], GOOD["x"], kl=number),
        "prior": lambda: fastelbo.kl_divergence(Z, Z, (number, Z)),
    }
    with pytest.raises(TypeError, match=rf"{name}\S* must be a dense tensor, got .*sparse_coo"):
        calls[name]()


def test_meta_tensors_pass():
    """They have shapes and dtypes only: Torch computes these, whatever is forced."""
    terms = fastelbo.loss(*(t.to("meta") for t in GOOD.values()), reduction="none")
    assert [(t.device.type, tuple(t.shape), t.dtype) for t in terms] == [("meta", (4,), torch.float32)] * 3


@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_meta_tensors_have_gradients(reduction):
    tensors = [t.to("meta").requires_grad_(name != "x") for name, t in GOOD.items()]
    for _ in range(2):
        fastelbo.loss(*tensors, reduction=reduction).loss.sum().backward()
    assert all(t.grad is None if t is tensors[1] else t.grad.shape == t.shape for t in tensors)


def test_meta_tensors_of_several_samples():
    x, mu, logvar = (torch.empty(4, n, device="meta", requires_grad=n == 3) for n in (6, 3, 3))
    decoder = torch.nn.Linear(3, 6, device="meta")
    for bound in (fastelbo.ELBO(2), fastelbo.IWAE(3)):
        terms = fastelbo.elbo(decoder, x, mu, logvar, likelihood="mse", bound=bound)
        assert [(t.device.type, t.shape) for t in terms] == [("meta", ())] * 3
        grads = torch.autograd.grad(terms.loss, (mu, logvar, decoder.weight))
        assert [g.shape for g in grads] == [(4, 3), (4, 3), (6, 3)]
    assert fastelbo.log_likelihood(decoder, x, mu, logvar, likelihood="gaussian", n_samples=3)[0].shape == (4,)
