"""The kernel of several samples and their log densities, against torch.distributions; and a target that all samples share."""

import math

import pytest
import torch
from torch.distributions import Normal

from conftest import BACKEND
from support import LIKELIHOODS, make_inputs, relative

if BACKEND != "triton":
    pytest.skip("the Torch backend has the formula", allow_module_level=True)

from device_functions import SIZE, run_normals
from fastelbo.kernels import Loss, log_ratio
from fastelbo.kernels import loss as loss_kernels
from fastelbo.kernels.launch import THREADS

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
POSTERIORS = ("logvar", "log_std", "std", "var")
PRIORS = (None, *POSTERIORS)
# Batches of one column, of rows that begin at multiples of 16, and not; of more than one block as `blocks` has them.
SHAPES = ((3, 1), (3, 16), (1, 20), (2, 5, 8), (2, 300), (2, 304))


@pytest.fixture
def blocks(monkeypatch):
    """Tiles as small as they can be, and so several."""
    monkeypatch.setattr(log_ratio, "tile_size", lambda *tensors: THREADS)


def sigma(raw, parameter):
    return {"logvar": lambda: (raw / 2).exp(), "log_std": raw.exp, "std": lambda: raw, "var": raw.sqrt}[parameter]()


class Case:
    """Tensors and settings of a call, and what `torch.distributions` makes of them in float64."""

    def __init__(
        self, shape, *, samples=2, posterior="logvar", prior=None, row=False, clamp=None, dtype=F32, device="cpu", seed=None
    ):
        # Either second parameter is positive, as standard deviations must be; and on both sides of the bounds of a clamp.
        self.mu, self.second = torch.randn(shape).to(device, dtype), (torch.rand(shape) + 0.25).to(device, dtype)
        self.prior_mu = self.prior_second = None
        if prior is not None:
            few = (1, *shape[1:])
            self.prior_mu = torch.randn(few if row in (True, "mu") else shape).to(device, dtype)
            self.prior_second = (torch.rand(few if row in (True, "second") else shape) + 0.25).to(device, dtype)
        self.shape, self.samples, self.rows = shape, samples, samples * shape[0]
        self.options = {"samples": samples, "posterior": posterior, "clamp": clamp, "prior": prior}
        self.options["dtype"] = self.result = F64 if dtype == F64 else F32
        if seed is None:
            self.noise = self.eps = torch.randn(self.rows, *shape[1:]).to(device, dtype)
        else:
            self.noise = torch.tensor(seed, device=device)
            self.eps, _, _ = log_ratio.log_ratio_forward(  # N(0, 1): the sample is the noise itself
                *torch.zeros(2, *shape, device=device), self.noise, None, None, wants_logs=False,
                **self.options | {"posterior": "logvar", "prior": None, "clamp": None, "dtype": F32},
            )  # fmt: skip

    @property
    def priors(self):
        return self.prior_mu, self.prior_second

    def forward(self, wants_logs=True):
        return log_ratio.log_ratio_forward(
            self.mu, self.second, self.noise, *self.priors, wants_logs=wants_logs, **self.options
        )  # fmt: skip

    def upstreams(self, missing=""):
        """What arrives at z, log q and log p, less what is `missing`."""
        given = torch.randn(self.rows, *self.shape[1:]), *torch.randn(2, self.rows)
        dtypes = self.mu.dtype, self.result, self.result
        return [
            None if name in missing else g.to(self.mu.device, dtype)
            for name, g, dtype in zip("zqp", given, dtypes, strict=True)
        ]

    def backward(self, upstreams, held=False, path_scale=None, wants_prior=(True, True)):
        return log_ratio.log_ratio_backward(
            *upstreams, self.mu, self.second, self.noise, *self.priors, wants_prior,
            held=held, path_scale=path_scale, **self.options,
        )  # fmt: skip

    def truth(self, upstreams=(None, None, None), held=False, path_scale=None):
        """`(results, gradients)`; those of the prior are of the shape of mu."""
        mu, second, *priors = (
            None if t is None else t.double().expand(self.shape).clone().requires_grad_()
            for t in (self.mu, self.second, *self.priors)
        )

        def every(t):
            return t.repeat(self.samples, *[1] * (t.dim() - 1))

        clamp = self.options["clamp"]
        std = every(sigma(second if clamp is None else second.clamp(*clamp), self.options["posterior"]))
        z = every(mu) + std * self.eps.double()
        # The objective's z, whose gradient then goes on to the encoder.
        reached = z.detach().requires_grad_()
        at = (reached, every(mu).detach(), std.detach()) if held else (z, every(mu), std)
        q = Normal(*at[1:]).log_prob(at[0])
        p = (
            Normal(torch.zeros_like(z), 1.0)
            if priors[0] is None
            else Normal(every(priors[0]), self.prior_std(every(priors[1])))
        )
        p = p.log_prob(at[0])
        results = z.detach(), *(t.flatten(1).sum(1) for t in (q, p))
        objective = sum((r * g.double()).sum() for r, g in zip((at[0], *results[1:]), upstreams, strict=True) if g is not None)
        if not isinstance(objective, torch.Tensor):
            return [t.detach() for t in results], None
        known = [t for t in priors if t is not None]
        if held:
            first, *rest = torch.autograd.grad(objective, (reached, *known), allow_unused=True)
            if path_scale is not None:
                first = first * path_scale.double().view(-1, *[1] * (z.dim() - 1))
            gradients = *torch.autograd.grad(z, (mu, second), first), *rest
        else:
            gradients = torch.autograd.grad(objective, (mu, second, *known), allow_unused=True)
        return [t.detach() for t in results], gradients

    def prior_std(self, raw):
        return sigma(raw, self.options["prior"])

    def check(self, tolerance, missing="", **options):
        upstreams = self.upstreams(missing)
        results, gradients = self.truth(upstreams, **options)
        for got, expected in zip(self.forward(), results, strict=True):
            assert got.shape == expected.shape
            assert relative(got, expected) < tolerance
        found = self.backward(upstreams, **options)
        for got, expected, value in zip(found, gradients + (None,) * 2, (self.mu, self.second, *self.priors), strict=False):
            if value is None or (value is not self.mu and value is not self.second and "p" in missing):
                assert got is None
            elif expected is None:  # not reached
                assert not got.any()
            else:
                assert (got.shape, got.dtype) == (self.mu.shape, value.dtype)
                assert relative(got, expected) < tolerance


@pytest.mark.parametrize("samples", (1, 3))
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_float64(posterior, prior, samples, device):
    Case((2, 20), posterior=posterior, prior=prior, samples=samples, dtype=F64, device=device).check(1e-12)


@pytest.mark.parametrize("seed", (None, -7), ids=("noise", "seed"))
@pytest.mark.parametrize("samples", (1, 3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, samples, seed, blocks, device):
    case = Case(shape, posterior="std", prior="logvar", samples=samples, dtype=F64, device=device, seed=seed)
    case.check(1e-12)
    assert case.eps.shape == (samples * shape[0], *shape[1:])
    assert len(case.eps.unique()) == case.eps.numel()
    without, *logs = case.forward(wants_logs=False)
    assert torch.equal(without, case.forward()[0])
    assert logs == [None, None]


@pytest.mark.parametrize("row", ("mu", "second", True), ids=str)
@pytest.mark.parametrize("prior", ("logvar", "std"))
@pytest.mark.parametrize("shape", ((3, 16), (3, 4, 5)), ids=str)
def test_a_prior_of_one_row(shape, prior, row, device):
    Case(shape, prior=prior, row=row, dtype=F64, device=device).check(1e-12)


@pytest.mark.parametrize("clamp", ((0.5, 1.0), (-30.0, 20.0)), ids=str)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_clamp(posterior, clamp, device):
    case = Case((3, 20), posterior=posterior, clamp=clamp, dtype=F64, device=device)
    case.check(1e-12)
    outside = (case.second < clamp[0]) | (case.second > clamp[1])
    assert outside.any() == (clamp == (0.5, 1.0))
    for held in (False, True):
        assert torch.equal(case.backward(case.upstreams(), held)[1] == 0, outside)


@pytest.mark.parametrize("missing", ("", "z", "q", "p", "zq", "zp", "qp"))
@pytest.mark.parametrize("held", ("no", "held", "scaled"))
@pytest.mark.parametrize("prior", (None, "std"))
def test_upstreams(prior, held, missing, device):
    case = Case((2, 20), prior=prior, dtype=F64, device=device)
    scale = torch.rand(case.rows, dtype=F64, device=device) if held == "scaled" else None
    case.check(1e-12, missing, held=held != "no", path_scale=scale)


@pytest.mark.parametrize("wants", ((True, False), (False, True), (False, False)))
def test_a_part_of_the_prior_is_differentiated(wants, device):
    case = Case((3, 16), prior="logvar", dtype=F64, device=device)
    upstreams = case.upstreams()
    _, gradients = case.truth(upstreams)
    found = case.backward(upstreams, wants_prior=wants)
    for got, expected, wanted in zip(found, gradients, (True, True, *wants), strict=True):
        assert (got is not None) == wanted
        if wanted:
            assert relative(got, expected) < 1e-12


@pytest.mark.parametrize("seed", (None, 5), ids=("noise", "seed"))
@pytest.mark.parametrize("posterior, prior", (("logvar", None), ("log_std", "log_std"), ("std", "std"), ("var", "var")))
@pytest.mark.parametrize("shape", ((2, 1), (2, 16), (2, 20), (1, 40)), ids=str)
def test_float32(shape, posterior, prior, seed, blocks, device):
    case = Case(shape, posterior=posterior, prior=prior, device=device, seed=seed)
    case.check(2e-6)
    # To a few roundings of each sum's terms, which are of either sign.
    (_, log_q, log_p), (results, _) = case.forward(), case.truth()
    log_std = sigma(case.second.double(), posterior).log().abs().repeat(case.samples, 1)
    assert ((log_q - results[1]).abs() < 4e-7 * (case.eps.double().square() / 2 + log_std + 1).sum(1)).all()
    assert ((log_p - results[2]).abs() < 1e-6 * (results[2].abs() + 3 * case.mu[0].numel())).all()


@pytest.mark.parametrize("posterior, prior", (("logvar", None), ("std", "std")))
@pytest.mark.parametrize("seed", (None, 5), ids=("noise", "seed"))
@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=str)
def test_sixteen_bits(dtype, seed, posterior, prior, device):
    """The densities are those of z before it is rounded."""
    case = Case((3, 40), posterior=posterior, prior=prior, dtype=dtype, device=device, seed=seed)
    upstreams = case.upstreams()
    results, gradients = case.truth(upstreams)
    z, *logs = case.forward()
    assert z.dtype == dtype
    assert relative(z, results[0]) < torch.finfo(dtype).eps
    for got, expected in zip(logs, results[1:], strict=True):
        assert got.dtype == F32
        assert relative(got, expected) < 1e-6
    for got, expected in zip(case.backward(upstreams), gradients, strict=False):
        assert got.dtype == dtype
        assert relative(got, expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtypes", ((BF16, F32), (F32, BF16), (F32, F64)), ids=str)
def test_dtypes_that_differ(dtypes, device):
    case = Case((3, 20), device=device)
    case.mu, case.second = case.mu.to(dtypes[0]), case.second.to(dtypes[1])
    case.noise = case.eps = case.eps.to(BF16)
    case.options["dtype"] = case.result = F64 if F64 in dtypes else F32
    upstreams = case.upstreams()
    upstreams[0] = upstreams[0].to(dtypes[1])
    results, gradients = case.truth(upstreams)
    z, *logs = case.forward()
    assert z.dtype == torch.promote_types(*dtypes)
    assert relative(z, results[0]) < 1e-6
    for got, expected in zip(logs, results[1:], strict=True):
        assert got.dtype == case.result
        assert relative(got, expected) < 1e-6
    for got, expected, dtype in zip(case.backward(upstreams), gradients, dtypes, strict=False):
        assert got.dtype == dtype
        assert relative(got, expected) < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("wants_logs", (True, False))
@pytest.mark.parametrize("shape", ((3, 16), (3, 20), (2, 304)), ids=str)
def test_the_stream_is_numbered_by_the_place_in_z(shape, wants_logs, device):
    case = Case(shape, device=device, seed=11)
    case.mu, case.second = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    expected = run_normals(case.noise, 2 * SIZE, SIZE, True)[: case.eps.numel()]
    assert torch.equal(case.forward(wants_logs)[0].flatten(), expected)


@pytest.mark.parametrize("shape", ((0, 5), (3, 0)), ids=str)
def test_empty(shape, device):
    case = Case(shape, prior="logvar", device=device)
    z, *logs = case.forward()
    assert z.shape == (case.rows, shape[1])
    assert [log.tolist() for log in logs] == [[0.0] * case.rows] * 2
    assert [g.shape for g in case.backward(case.upstreams())] == [shape] * 4
    assert case.forward(wants_logs=False)[0].shape == z.shape


@pytest.mark.parametrize(
    "number, posterior, prior, dtype",
    (
        (math.nan, "logvar", None, F32),
        (math.nan, "std", "std", F32),
        (math.inf, "logvar", None, F32),
        (math.nan, "var", "var", F32),
        (math.inf, "std", "std", F32),
    ),
)
def test_no_finite_lies(number, posterior, prior, dtype, device, blocks):
    """What is not finite makes its own datum's results so, in each sample, and no other's."""
    for name in ("mu", "second", "prior_mu", "prior_second")[: 2 if prior is None else 4]:
        case = Case((3, 4), posterior=posterior, prior=prior, dtype=dtype, device=device)
        getattr(case, name)[1, 2] = number
        z, log_q, log_p = case.forward()
        reached = [False, True, False] * 2
        assert (~log_p.isfinite()).tolist() == reached, name
        assert (~log_q.isfinite()).tolist() == (reached if name in ("mu", "second") else [False] * 6), name
        if name in ("mu", "second"):
            assert (~z[:, 2].isfinite()).tolist() == reached, name
        if number != number:
            upstreams = case.upstreams()
            for got in filter(lambda g: g is not None, case.backward(upstreams)):
                assert got[::2].isfinite().all()
            first, second, *_ = case.backward(upstreams)
            assert first[1, 2].isnan()
            assert second[1, 2].isnan()


def test_nan_stays_nan_in_a_clamp_and_below_zero(device):
    case = Case((2, 4), clamp=(-1.0, 1.0), device=device)
    case.second[1, 2] = math.nan
    assert case.forward()[1].isnan().tolist() == [False, True] * 2
    for kind in ("std", "var"):
        case = Case((2, 4), posterior=kind, prior=kind, device=device)
        case.second[1, 2] = case.prior_second[0, 1] = -0.5
        _, log_q, log_p = case.forward()
        assert log_q.isnan().tolist() == [False, True] * 2
        assert log_p.isnan().all()


@pytest.mark.parametrize("bad", (0, 1, 2), ids=("z", "log_q", "log_p"))
def test_upstream_nan(bad, device):
    case = Case((3, 4), device=device)
    upstreams = case.upstreams()
    upstreams[bad][4] = math.nan  # sample 1 of datum 1
    for held in (False, True):
        gradients = [g.isnan() for g in case.backward(upstreams, held)[:2]]
        assert gradients[1].all(1).tolist() == gradients[1].any(1).tolist() == [False, True, False]
        assert gradients[0].all(1).tolist() == [False, bad != 1 or held, False]


@pytest.mark.parametrize("shape", ((3, 16), (3, 20)), ids=str)
def test_wide_offsets(shape, blocks, device, monkeypatch):
    """As tensors of more than 2^31 elements need them."""
    launch, kept = log_ratio.launch, loss_kernels.Launch
    monkeypatch.setattr(log_ratio, "launch", lambda *args, **rest: launch(*args, **rest | {"WIDE": True}))
    monkeypatch.setattr(loss_kernels, "Launch", lambda k, device, constants, o: kept(k, device, constants | {"WIDE": True}, o))
    Case(shape, prior="std", row=True, dtype=F64, device=device, seed=3).check(1e-12)
    check_loss("mse", shape[1], F32, device)


# A target that all samples share.


def check_loss(likelihood, features, target, device, samples=3, guessed=True):
    """As with the target repeated, bit by bit."""
    recon_x, *_ = make_inputs(likelihood, (samples * 2, features), (1, 1), device=device)
    recon_x, x = recon_x.detach(), torch.rand(2, features, device=device)
    if not target.is_floating_point:
        x = (255 * x).to(target)
    rows = samples * 2
    settings = {
        "likelihood": likelihood, "scale": 0.3 if likelihood == "gaussian" else 1.0, "scales": (0.5, 1.0),
        "target_scale": 1.0 if target.is_floating_point else 1 / 255, "per_sample": True, "dtype": F32,
    }  # fmt: skip
    kl, guess, upstream = torch.randn(3, rows, device=device)
    upstream[: rows // 2] = guess[: rows // 2]  # right for some
    found = []
    for shared in (x, x.repeat(samples, 1)):
        tensors = recon_x, shared, kl
        launches = Loss(tensors, **settings)
        *terms, gradient = launches.forward(tensors, 0.7, 1.0, guess if guessed else None)
        stored = (None, None) if gradient is None else (gradient.clone(), guess)
        backward = launches.backward(tensors, 0.7, 1.0, (upstream, None, None), *stored, True, True)
        found.append([t for t in (*terms, gradient, *backward) if t is not None])
    assert len(found[0]) == (7 if guessed else 6)
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)
        assert got.isfinite().all()
    assert len(found[0][1].unique()) == rows


@pytest.mark.parametrize("target", (F32, torch.uint8), ids=str)
@pytest.mark.parametrize("features", (48, 37, 2100))
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_target_for_all_samples(likelihood, features, target, device):
    check_loss(likelihood, features, target, device)


@pytest.mark.parametrize("samples", (1, 2))
def test_a_target_for_few_samples(samples, device):
    check_loss("bernoulli_logits", 20, F32, device, samples, guessed=False)
