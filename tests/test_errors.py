"""Bad input: a ValueError or TypeError that names the argument, what came and what was expected."""

import pytest
import torch

import fastelbo
from conftest import DEVICE

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
    ({"mu": rand(5, 3), "logvar": rand(5, 3)}, ValueError, r"same batch size.*mu \(5, 3\) and recon_x \(4, 6\)"),
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
    ({"likelihood": None}, ValueError, "likelihood must be an object of fastelbo.likelihoods or one of"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'sum'.*got 'avg'"),
    ({"reduction": ("sum",)}, ValueError, "reduction must be a name or a pair"),
    ({"reduction": ("none", "sum")}, ValueError, "'none' cannot be paired"),
    ({"reduction": ("sum", "avg")}, ValueError, "reduction must be one of"),
    ({"mu": None}, ValueError, "give mu and logvar, or kl: got mu None, logvar given"),
    ({"mu": None, "logvar": None}, ValueError, "give mu and logvar, or kl: got mu None, logvar None"),
    ({"kl": KL}, ValueError, "not both: got mu given, logvar given, kl given"),
    ({"mu": None, "kl": KL}, ValueError, "not both: got mu None, logvar given, kl given"),
    ({"mu": None, "logvar": None, "kl": 0.5}, TypeError, "kl must be a tensor, got float"),
    ({"mu": None, "logvar": None, "kl": KL.long()}, TypeError, "kl must be of a floating dtype"),
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
    ({"beta": torch.tensor(1j)}, TypeError, "beta must be real"),
    ({"beta": None}, TypeError, "beta must be a number"),
    ({"target_scale": rand(())}, TypeError, "target_scale must be a number, got Tensor"),
    ({"target_scale": "x"}, TypeError, "target_scale must be a number"),
    ({"scale": 1.0}, ValueError, "scale is for the likelihoods 'gaussian' and 'laplace'; got it with 'bernoulli'"),
    *(
        ({"likelihood": "gaussian", "scale": scale}, error, message)
        for scale, error, message in (
            (0.0, ValueError, "scale must be positive, got 0.0"),
            (-1, ValueError, "scale must be positive, got -1.0"),
            (float("nan"), ValueError, "scale must be positive, got nan"),
            (torch.tensor(-2.0), ValueError, "scale must be positive, got -2.0"),
            (rand(5), ValueError, r"scale must broadcast to recon_x: got scale \(5,\) and \(4, 6\)"),
            ("1", TypeError, "scale must be a number"),
        )
    ),
]


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

    for bad in ({"beta": "1"}, {"scale": 1.0}, {"target_scale": None}, {"likelihood": "x"}, {"reduction": "x"}):
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            fastelbo.elbo(decoder, GOOD["x"], GOOD["mu"], GOOD["logvar"], **bad)


def test_module():
    with pytest.raises(TypeError, match="beta must be a number, got str"):
        fastelbo.nn.ELBOLoss(beta="1")
    with pytest.raises(ValueError, match="likelihood must be an object of"):
        fastelbo.nn.ELBOLoss(likelihood="normal")
    with pytest.raises(ValueError, match="reduction must be one of"):
        fastelbo.nn.ELBOLoss(reduction="avg")
    with pytest.raises(TypeError, match="scale must be a number, got Parameter"):
        fastelbo.nn.ELBOLoss("gaussian", scale=torch.nn.Parameter(torch.ones(())))
    with pytest.raises(ValueError, match="scale must be positive"):
        fastelbo.nn.ELBOLoss("gaussian", scale=-1)
    with pytest.raises(ValueError, match="scale is for the likelihoods 'gaussian' and 'laplace'"):
        fastelbo.nn.ELBOLoss("mse", scale=1.0)


@pytest.mark.parametrize("name", ("x", "mu", "logvar", "eps"))
def test_devices(name):
    """The `meta` device stands for a second one where there is none."""
    other = GOOD["mu" if name == "eps" else name].to("meta")
    with pytest.raises(ValueError, match="must be on the device of"):
        if name == "eps":
            fastelbo.reparameterize(GOOD["mu"], GOOD["logvar"], eps=other)
        else:
            fastelbo.loss(**{**GOOD, name: other})


@pytest.mark.parametrize("beta_or_scale", ("beta", "scale"))
def test_devices_of_numbers(beta_or_scale):
    with pytest.raises(ValueError, match=f"{beta_or_scale} must be on .* got meta"):
        fastelbo.loss(**GOOD, likelihood="gaussian", **{beta_or_scale: torch.ones((), device="meta")})


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
        fastelbo.loss(**{**GOOD, "x": x}, target_scale=-1 / 255)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        fastelbo.loss(**{**GOOD, "x": x.to(dtype)}, target_scale=1 / 255)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="on a CPU it raises")
def test_a_scale_on_the_gpu_that_is_not_positive_gives_nan():
    for scale in (0.0, -1.0):
        assert fastelbo.loss(**GOOD, likelihood="gaussian", scale=torch.tensor(scale, device=DEVICE)).loss.isnan()
