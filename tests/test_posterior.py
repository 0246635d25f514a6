"""Every posterior and prior: sample and KL against `torch.distributions` in float64, with errors no larger than its own."""

import itertools
import math

import pytest
import torch
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as torch_kl

import fastelbo
from conftest import BACKEND
from fastelbo import Posterior, kl_divergence
from support import APPROXIMATE, as_double, assert_no_worse, gradcheck, gradgradcheck, gradients, relative

triton_only = pytest.mark.skipif(BACKEND != "triton", reason="about the kernels")

# What an encoder's second output would have to be, for the standard deviation s.
FROM_STD = {
    "logvar": lambda s: 2 * torch.log(s),
    "log_std": torch.log,
    "std": lambda s: s,
    "var": torch.square,
}
STD = {
    "logvar": lambda raw: torch.exp(0.5 * raw),
    "log_std": torch.exp,
    "std": lambda raw: raw,
    "var": torch.sqrt,
}
PRIORS = (None, "pair", "normal")
REDUCTIONS = ("sum", "batchmean", "mean", "none")

# Two rows; a tail after whole blocks of 16; more than a tile of the interpreter, so that programs share rows.
SHAPES = ((2, 3), (5, 37), (3, 2, 4, 5), (2, 40_000))


def make_latents(posterior, shape, dtype=torch.float32, device="cpu", spread=1.0):
    """`mu` and second parameter of the posterior, and of a prior that is parametrized alike; all require grad."""
    mu, prior_mu = torch.randn(shape), torch.randn(shape)
    second, prior_second = (FROM_STD[posterior](torch.exp(spread * torch.randn(shape).double())) for _ in range(2))
    return [t.to(device, dtype).requires_grad_() for t in (mu, second, prior_mu, prior_second)]


def prior_for(kind, posterior, prior_mu, prior_second):
    """What a user passes, for a kind of prior."""
    if kind == "pair":
        return prior_mu, prior_second
    return None if kind is None else Normal(prior_mu, STD[posterior](prior_second), validate_args=False)


def naive(posterior, kind, mu, second, prior_mu, prior_second):
    """The element-wise KL as `torch.distributions` computes it."""
    prior = prior_for("normal", posterior, prior_mu, prior_second)
    if kind is None:
        prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return torch_kl(Normal(mu, STD[posterior](second), validate_args=False), prior)


def reduced(elements, reduction):
    if reduction == "none":
        return elements.flatten(1).sum(1)
    count = {"sum": 1, "batchmean": elements.shape[0], "mean": elements.numel()}[reduction]
    return elements.sum() / count


def inputs_of(kind, latents):
    return latents[: 2 if kind is None else 4]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("posterior", FROM_STD)
def test_sample_kl(posterior, kind, reduction, shape, device):
    if shape[-1] > 1000 and reduction in ("batchmean", "mean"):
        pytest.skip("the same kernels as for the sum")
    latents = make_latents(posterior, shape, torch.float64, device)
    eps = torch.randn_like(latents[0])
    z, kl = fastelbo.sample_kl(
        *latents[:2], posterior=posterior, prior=prior_for(kind, posterior, *latents[2:]), reduction=reduction, eps=eps
    )
    expected_z = latents[0] + STD[posterior](latents[1]) * eps
    expected_kl = reduced(naive(posterior, kind, *latents), reduction)
    assert kl.shape == expected_kl.shape
    torch.testing.assert_close(z, expected_z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-11, atol=1e-12)
    upstreams = torch.randn_like(z), torch.randn_like(kl)
    wrt = inputs_of(kind, latents)
    got = torch.autograd.grad((z, kl), wrt, upstreams)
    expected = torch.autograd.grad((expected_z, expected_kl), wrt, upstreams)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("call", ("loss", "elbo", "samples", "clamped"))
@pytest.mark.parametrize("posterior", FROM_STD)
def test_a_pair_is_parametrized_as_the_posterior_is(posterior, call, device):
    """Wherever a prior may be given: the KL, and its gradients by all four tensors."""
    mu, second, *prior = latents = make_latents(posterior, (5, 7), torch.float64, device)
    x = torch.zeros_like(mu)
    given = Posterior(posterior, (-50.0, 1e6)) if call == "clamped" else posterior
    options = {"posterior": given, "prior": prior, "likelihood": "mse", "reduction": "none"}
    kl = {
        "loss": lambda: fastelbo.loss(x, x, mu, second, **options).kl,
        "elbo": lambda: fastelbo.elbo(lambda z: z, x, mu, second, **options).kl,
        "samples": lambda: fastelbo.elbo(lambda z: z, x, mu, second, bound=fastelbo.ELBO(2), **options).kl,
        "clamped": lambda: fastelbo.elbo(lambda z: z, x, mu, second, **options).kl,
    }[call]()
    expected = torch_kl(Normal(mu, STD[posterior](second)), Normal(prior[0], STD[posterior](prior[1]))).sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-11, atol=1e-12)
    got, wanted = (gradients(value.sum(), *latents) for value in (kl, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("call", ("sample_log_ratio", "flow", "iwae", "log_likelihood"))
@pytest.mark.parametrize("posterior", FROM_STD)
def test_log_densities_of_a_pair(posterior, call, device):
    """log q - log p of one sample, by each way to it."""
    mu, second, *prior = latents = make_latents(posterior, (5, 7), torch.float64, device)
    x, eps, options = torch.zeros_like(mu), torch.randn_like(mu), {"posterior": posterior, "prior": prior}

    def decoder(z):
        return 0 * z

    def difference(flow=None):
        _, log_q, log_p = fastelbo.sample_log_ratio(mu, second, eps=eps, flow=flow, **options)
        return log_q - log_p

    q, p = Normal(mu, STD[posterior](second)), Normal(prior[0], STD[posterior](prior[1]))
    z = q.loc + q.scale * eps
    expected = (q.log_prob(z) - p.log_prob(z)).sum(1)
    if call == "log_likelihood":  # of x = 0 and a prediction of 0
        got = fastelbo.log_likelihood(decoder, x, mu, second, likelihood="gaussian", n_samples=1, eps=eps[None], **options)
        torch.testing.assert_close(got.log_p, -expected.detach() - 3.5 * math.log(2 * math.pi), rtol=1e-11, atol=1e-11)
        return
    bound = fastelbo.IWAE(1)
    got = {
        "sample_log_ratio": difference,
        "flow": lambda: difference(lambda z: (z, 0 * z.sum(1))),
        "iwae": lambda: (
            fastelbo.elbo(
                decoder, x, mu, second, likelihood="mse", reduction="none", bound=bound, eps=eps[None], **options
            ).loss
        ),
    }[call]()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradients(got.sum(), *latents), gradients(expected.sum(), *latents), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("posterior", FROM_STD)
def test_reparameterize(posterior, device):
    mu, second, *_ = make_latents(posterior, (5, 37), torch.float64, device)
    eps = torch.randn_like(mu).requires_grad_()
    z = fastelbo.reparameterize(mu, second, posterior=posterior, eps=eps)
    expected = mu + STD[posterior](second) * eps
    upstream = torch.randn_like(z)
    torch.testing.assert_close(z, expected, rtol=1e-13, atol=1e-13)
    for wrt in ((mu, second, eps), (mu, second), (second,)):
        torch.testing.assert_close(gradients(z, *wrt, grad_outputs=upstream, retain_graph=True),
                                   gradients(expected, *wrt, grad_outputs=upstream, retain_graph=True))  # fmt: skip
    eps = eps.detach()  # which the kernels take
    z = fastelbo.reparameterize(mu, second, posterior=posterior, eps=eps)
    expected = mu + STD[posterior](second) * eps
    torch.testing.assert_close(gradients(z, mu, second, grad_outputs=upstream),
                               gradients(expected, mu, second, grad_outputs=upstream))  # fmt: skip


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("posterior", FROM_STD)
def test_finite_differences(check, kind, posterior, device):
    if check is gradgradcheck and BACKEND == "triton" and posterior != "std":
        pytest.skip("the second derivative is the formula's")
    latents = make_latents(posterior, (2, 1), torch.float64, device, spread=0.3)

    def function(mu, second, *prior):
        torch.manual_seed(3)
        prior = prior_for(kind, posterior, *prior) if prior else None
        return fastelbo.sample_kl(mu, second, posterior=Posterior(posterior, (-50, 50)), prior=prior, reduction="none")

    assert check(function, inputs_of(kind, latents))


def with_extremes(latents, posterior):
    """Deviations from 1e-6 to 1e6, and a collapsed posterior."""
    mu, second, prior_mu, prior_second = latents
    stds = torch.tensor([1e-6, 1e-3, 1.0, 1.0 + 1e-6, 1e3, 1e6], dtype=torch.float64)
    with torch.no_grad():
        for i, (s, p) in enumerate(itertools.product(stds, stds)):
            second.view(-1)[i::41] = FROM_STD[posterior](s).to(second)
            prior_second.view(-1)[i::41] = FROM_STD[posterior](p).to(prior_second)
            mu.view(-1)[i::3] = prior_mu.view(-1)[i::3]


@pytest.mark.parametrize("extremes", (False, True), ids=("usual", "extremes"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("posterior", FROM_STD)
def test_error_is_no_larger_than_the_naive_codes(posterior, kind, dtype, extremes, device):
    latents = make_latents(posterior, (7, 123), torch.float32, device, spread=0.5)
    if extremes:
        if dtype == torch.float16 and posterior in ("std", "var"):
            pytest.skip("beyond float16")
        with_extremes(latents, posterior)
    latents = [t.detach().to(dtype).requires_grad_() for t in latents]
    mu, second, prior_mu, prior_second = latents
    prior_parameter = posterior
    if kind == "normal":  # whose parameter is the deviation itself
        prior_second = STD[posterior](prior_second.double()).to(torch.float32 if extremes else dtype).detach().requires_grad_()
        prior_parameter = "std"

    def run(function, mu, second, prior_mu, prior_second):
        kl = function(mu, second, prior_mu, prior_second)
        wrt = (mu, second) if kind is None else (mu, second, prior_mu, prior_second)
        return kl, *gradients(kl.sum(), *wrt)

    def ours(mu, second, prior_mu, prior_second):
        prior = prior_for(kind, prior_parameter, prior_mu, prior_second)
        return kl_divergence(mu, second, prior, posterior=posterior, reduction="element")

    def theirs(mu, second, prior_mu, prior_second):
        if kind is None:
            prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
        else:
            prior = Normal(prior_mu, STD[prior_parameter](prior_second))
        return torch_kl(Normal(mu, STD[posterior](second), validate_args=False), prior)

    given = mu, second, prior_mu, prior_second
    truth, by_naive, got = (run(f, *t) for f, t in ((theirs, as_double(*given)), (theirs, given), (ours, given)))

    m, s, p, ps = (t.detach().double() for t in given)
    std = STD[posterior](s)
    prior_std = torch.ones_like(std) if kind is None else STD[prior_parameter](ps)
    p = torch.zeros_like(p) if kind is None else p
    # What the two deviations' logarithms, which are subtracted, are large by, as roundings of them count.
    logs = 1 + 2 * std.log().abs() + 2 * prior_std.log().abs()
    ratio, distance = (std / prior_std).square(), (m.abs() + p.abs()).square() / prior_std.square()
    by_logvar = (ratio + 1) * logs
    k, prior_k = (
        {"logvar": 0.5, "log_std": 1.0, "std": 1 / deviation, "var": 0.5 / deviation.square()}[parameter]
        for parameter, deviation in ((posterior, std), (prior_parameter, prior_std))
    )
    terms = (
        0.5 * ((ratio + 1) * logs + distance), (m.abs() + p.abs()) / prior_std.square(), k * by_logvar,
        (m.abs() + p.abs()) / prior_std.square(), prior_k * (by_logvar + distance),
    )  # fmt: skip
    for name, *parts in zip(("kl", "mu", "second", "prior mu", "prior second"), got, by_naive, truth, terms):  # noqa: B905
        assert_no_worse(*parts, name)


@pytest.mark.parametrize("posterior", FROM_STD)
def test_a_posterior_near_its_prior(posterior, device):
    """KLs of 1e-6, which a difference of two float32 numbers near 1 has no digit of."""

    def error(scale, prior):
        """The largest, where the prior is N(0, scale^2)."""
        second = FROM_STD[posterior](scale.double() * (1 + 1e-3 * torch.randn(200, device=device))).float()
        mu = scale * 1e-3 * torch.randn(200, device=device)
        exact = torch_kl(Normal(mu.double(), STD[posterior](second.double())), Normal(0.0, scale.double()))
        assert exact.max() > 3e-6
        return (kl_divergence(mu, second, prior, posterior=posterior, reduction="element") - exact).abs().max()

    zero, one = torch.zeros(200, device=device), torch.ones(200, device=device)
    scale = torch.rand(200, device=device) + 0.5
    prior_second = FROM_STD[posterior](torch.exp(0.5 * torch.randn(200, device=device)))
    bound = 1.5e-9 + 7e-3 * APPROXIMATE  # the derivative by a quotient of deviations, one of which is 0.35 % larger
    assert error(one, None) < 5e-10  # a difference of ones would be off by 6e-8
    assert error(STD[posterior](prior_second.double()), (zero, prior_second)) < bound
    assert error(scale, Normal(zero, scale)) < bound
    if posterior in ("std", "var"):  # far from 1, where logarithms are large
        scale = 1e-3 * scale
        assert error(scale, Normal(zero, scale)) < bound


@pytest.mark.parametrize("mode", ("backward", "create_graph", "forward", "vmap"))
@pytest.mark.parametrize("options", ({}, {"prior": True}, {"clamp": (-30.0, 20.0)}), ids=("", "prior", "clamp"))
@pytest.mark.parametrize("posterior", FROM_STD)
def test_a_collapsed_posterior_keeps_its_gradient(posterior, options, mode, device):
    """At a variance of 1 + 1e-6 the derivatives of the KL's terms are 1 and -1."""
    change = torch.tensor([[1e-6, -3e-6, 2e-5, 1e-3, 0.1, -0.1]], dtype=torch.float64)
    second = {"logvar": change, "log_std": 0.5 * change, "std": torch.exp(0.5 * change), "var": torch.exp(change)}[posterior]
    second = second.float()
    wide = second.double().requires_grad_()
    logvar = {"logvar": wide, "log_std": 2 * wide, "std": 2 * torch.log(wide), "var": torch.log(wide)}[posterior]
    slope = gradients(logvar.sum(), wide)[0] * 0.5 * torch.expm1(logvar.detach())

    def kl(second):
        mu = torch.zeros_like(second)
        prior = (mu, FROM_STD[posterior](torch.ones_like(mu))) if "prior" in options else None
        return kl_divergence(mu, second, prior, posterior=Posterior(posterior, options.get("clamp")), reduction="element")

    second = second.to(device)
    if mode == "forward":
        got = torch.func.jvp(kl, (second,), (torch.ones_like(second),))[1]
    elif mode == "vmap":
        got = torch.func.vmap(torch.func.grad(lambda s: kl(s.view(1, 1)).sum()))(second.view(6)).view(1, 6)
    else:
        second.requires_grad_()
        got = gradients(kl(second).sum(), second, create_graph=mode == "create_graph")[0]
    torch.testing.assert_close(got.detach().cpu().double(), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("posterior", FROM_STD)
def test_clamp(posterior, device):
    low, high = (-1.0, 0.5) if posterior in ("logvar", "log_std") else (0.5, 1.5)
    mu, second, *pair = make_latents(posterior, (9, 31), torch.float64, device)
    assert (pair[1] < low).any() and (pair[1] > high).any()  # a prior is not clamped
    with torch.no_grad():
        second[0, :2] = torch.tensor([low, high])  # inside, as in torch.clamp
    eps = torch.randn_like(mu)
    for prior in (None, pair):
        z, kl = fastelbo.sample_kl(mu, second, posterior=Posterior(posterior, (low, high)), prior=prior, eps=eps)
        clamped = second.clamp(low, high)
        expected_z = mu + STD[posterior](clamped) * eps
        expected_kl = naive(posterior, prior and "pair", mu, clamped, *pair).sum()
        torch.testing.assert_close((z, kl), (expected_z, expected_kl))
        got = torch.autograd.grad(z.sum() + kl, (mu, second))
        torch.testing.assert_close(got, torch.autograd.grad(expected_z.sum() + expected_kl, (mu, second)))
        outside = (second < low) | (second > high)
        assert outside.any() and not outside.all()
        assert torch.equal(got[1] == 0, outside)


@pytest.mark.parametrize("posterior", FROM_STD)
@pytest.mark.parametrize("bounds", ((None, 0.7), (0.7, None), (None, None)), ids=str)
def test_no_bound(bounds, posterior, device):
    """None is no bound, though what it would bound be infinite; in value and gradient as torch.clamp."""
    mu, second, *prior = make_latents(posterior, (9, 31), torch.float64, device)
    eps = torch.randn_like(mu)
    results = []
    for options, given in (
        ({"posterior": Posterior(posterior, bounds)}, second),
        ({"posterior": posterior}, second if bounds == (None, None) else second.clamp(*bounds)),
    ):
        z, kl = fastelbo.sample_kl(mu, given, prior=prior, eps=eps, **options)
        log_q = fastelbo.sample_log_ratio(mu, given, prior=prior, eps=eps, **options).log_q
        each = kl_divergence(mu, given, reduction="dimension", **options)
        total = z.sum() + kl + log_q.sum() + each.sum()
        results.append((z, kl, log_q, each, *gradients(total, mu, second, *prior)))
    torch.testing.assert_close(*results)
    outside = torch.zeros_like(second, dtype=torch.bool)
    for bound, beyond in zip(bounds, (torch.lt, torch.gt), strict=True):
        if bound is not None:
            outside = beyond(second, bound)
            assert outside.any() and not outside.all()
    assert torch.equal(results[0][5] == 0, outside)
    infinite = torch.full((1, 1), torch.inf if bounds[1] is None else -torch.inf, dtype=torch.float64, device=device)
    assert not kl_divergence(torch.zeros_like(infinite), infinite, posterior=Posterior("logvar", bounds)).isfinite()


def test_latent_diffusions_clamp(device):
    """Its encoder's logvar may be anything: nothing overflows, and the KL is that of its DiagonalGaussianDistribution."""
    mu, logvar = torch.randn(4, 4, 8, 8, device=device), 100 * torch.randn(4, 4, 8, 8, device=device)
    kl = kl_divergence(mu, logvar, posterior=Posterior(clamp=(-30.0, 20.0)), reduction="none")
    lv = logvar.double().clamp(-30, 20)
    expected = 0.5 * (mu.double().square() + lv.exp() - 1.0 - lv).sum(dim=(1, 2, 3))
    assert relative(kl, expected) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("posterior", FROM_STD)
def test_dtypes(posterior, dtype, device):
    mu, second, prior_mu, prior_second = make_latents(posterior, (33, 129), dtype, device, spread=0.3)
    eps = torch.randn_like(mu)
    z, kl = fastelbo.sample_kl(mu, second, posterior=posterior, prior=(prior_mu, prior_second), eps=eps)
    m, s, pm, ps = as_double(mu, second, prior_mu, prior_second)
    exact_z, exact_kl = m + STD[posterior](s) * eps.double(), naive(posterior, "pair", m, s, pm, ps).sum()
    tolerance = 2 * torch.finfo(dtype).eps + 3 * APPROXIMATE  # of a deviation: one reciprocal squared, and another
    assert (z.dtype, kl.dtype) == (dtype, torch.float32)
    assert relative(z, exact_z) <= tolerance
    assert relative(kl, exact_kl) <= 3e-7
    got = gradients(z.sum() + 0.3 * kl, mu, second, prior_mu, prior_second)
    expected = gradients(exact_z.sum() + 0.3 * exact_kl, m, s, pm, ps)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) <= tolerance


def test_a_wider_prior_widens_the_kl(device):
    mu, logvar = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    prior = torch.zeros((), device=device, dtype=torch.float64), torch.zeros(4, device=device, dtype=torch.float64)
    z, kl = fastelbo.sample_kl(mu, logvar, prior=prior)
    assert (z.dtype, kl.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(kl, kl_divergence(mu.double(), logvar.double()))


@pytest.mark.parametrize("wrap", (lambda d: d, lambda d: Independent(d, 1)), ids=("Normal", "Independent"))
def test_a_normal_in_place_of_two_tensors(wrap, device):
    mu, std, prior_mu, _ = make_latents("std", (5, 7), torch.float64, device)
    eps = torch.randn_like(mu)
    posterior, prior = wrap(Normal(mu, std)), wrap(Normal(prior_mu, 2.0))
    expected = torch_kl(Normal(mu, std), Normal(prior_mu, 2.0))
    z, kl = fastelbo.sample_kl(posterior, prior=prior, reduction="none", eps=eps)
    torch.testing.assert_close((z, kl), (mu + std * eps, expected.sum(1)))
    torch.testing.assert_close(fastelbo.reparameterize(posterior, eps=eps), mu + std * eps)
    torch.testing.assert_close(kl_divergence(posterior, prior=prior, reduction="element"), expected)
    got, wanted = gradients(kl.sum(), mu, std, prior_mu), gradients(expected.sum(), mu, std, prior_mu)
    torch.testing.assert_close(got, wanted)
    # An expanded deviation, as Normal makes of a number, gets one gradient.
    one = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    got = gradients(fastelbo.sample_kl(Normal(mu, one), eps=eps).kl, one)
    torch.testing.assert_close(got, gradients(torch_kl(Normal(mu, one), Normal(0.0, 1.0)).sum(), one))


@pytest.mark.parametrize("posterior", FROM_STD)
def test_one_seed_gives_one_z(posterior, device):
    """Of the posterior, not of what it is parametrized by; also with a prior, and again in backward."""
    mu, std, prior_mu, prior_std = make_latents("std", (7, 37), torch.float64, device)
    second = FROM_STD[posterior](std.detach()).requires_grad_()
    torch.manual_seed(5)
    expected = fastelbo.reparameterize(mu, FROM_STD["logvar"](std))
    for prior in (None, (prior_mu, FROM_STD[posterior](prior_std))):
        torch.manual_seed(5)
        z, kl = fastelbo.sample_kl(mu, second, posterior=posterior, prior=prior)
        torch.testing.assert_close(z, expected)
        (gradient,) = gradients(z.sum() + 0 * kl, second)
        noise = ((z - mu) / std).detach()
        (by_std,) = gradients((STD[posterior](second) * noise).sum(), second)
        torch.testing.assert_close(gradient, by_std)
    draws = [fastelbo.reparameterize(mu, std, posterior="std", generator=torch.Generator(device).manual_seed(1)) for _ in "ab"]
    assert torch.equal(*draws)


@pytest.mark.parametrize("posterior", ("std", "var"))
@pytest.mark.parametrize("kind", PRIORS)
def test_what_is_no_deviation_is_no_number(posterior, kind, device):
    mu, second, *prior = make_latents(posterior, (2, 3), device=device)
    with torch.no_grad():
        second[0, 1], second[1, 2] = -0.5, 0.0
    eps = torch.randn_like(mu)
    z, _ = fastelbo.sample_kl(mu, second, posterior=posterior, prior=prior_for(kind, posterior, *prior), eps=eps)
    kl = kl_divergence(mu, second, prior_for(kind, posterior, *prior), posterior=posterior, reduction="element")
    bad = torch.zeros(2, 3, dtype=torch.bool, device=device)
    bad[0, 1] = True
    assert torch.equal(z.isnan(), bad)
    assert torch.equal(kl.isnan(), bad)
    assert kl[1, 2] == math.inf
    assert gradients(z.sum() + kl.sum(), second)[0][0, 1].isnan()


def test_a_prior_that_is_no_deviation(device):
    mu, logvar = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)
    scale = torch.tensor([1.0, -1.0, 0.0], device=device)
    zeros = torch.zeros(3, device=device)
    normal = Normal(zeros, scale, validate_args=False)
    for posterior, prior in (("logvar", normal), ("std", normal), ("std", (zeros, scale)), ("var", (zeros, scale))):
        second = logvar if posterior == "logvar" else logvar.exp()
        kl = kl_divergence(mu, second, prior, posterior=posterior, reduction="dimension")
        assert kl[0].isfinite() and kl[1].isnan() and not kl[2].isfinite()


@pytest.mark.parametrize("posterior", FROM_STD)
@pytest.mark.parametrize("place", ("mu", "second", "prior mu", "prior second"))
def test_nan_stays(place, posterior, device):
    latents = make_latents(posterior, (3, 5), device=device)
    index = ("mu", "second", "prior mu", "prior second").index(place)
    with torch.no_grad():
        latents[index][1, 2] = math.nan
    mu, second, *prior = latents
    kl = fastelbo.sample_kl(mu, second, posterior=Posterior(posterior, (-20.0, 20.0)), prior=prior, reduction="none").kl
    assert kl.isnan().tolist() == [False, True, False]
    for gradient in gradients(kl.sum(), *latents):
        assert gradient[0].isfinite().all() and gradient[2].isfinite().all()
    kl = kl_divergence(mu, second, prior, posterior=Posterior(posterior, (-20.0, 20.0)))
    assert gradients(kl, latents[index])[0][1, 2].isnan()


@pytest.mark.parametrize("shape", ((0, 3), (3, 0)), ids=str)
@pytest.mark.parametrize("kind", PRIORS)
def test_empty(kind, shape, device):
    latents = make_latents("std", shape, device=device)
    for reduction, value in (("sum", 0.0), ("mean", math.nan)):
        z, kl = fastelbo.sample_kl(
            *latents[:2], posterior="std", prior=prior_for(kind, "std", *latents[2:]), reduction=reduction
        )
        torch.testing.assert_close(kl.detach().cpu(), torch.tensor(value), equal_nan=True)
        assert z.shape == shape
        assert [g.shape for g in gradients(kl + z.sum(), *inputs_of(kind, latents))] == [shape] * len(inputs_of(kind, latents))
    kl = fastelbo.sample_kl(*latents[:2], posterior="std", reduction="none").kl
    assert torch.equal(kl.detach().cpu(), torch.zeros(shape[0]))


def test_memory_layouts(device):
    """Noise is numbered in the layout of mu; the others follow."""
    latents = make_latents("std", (3, 4, 5, 6), torch.float64, device)
    mu = latents[0]
    expected = None
    eps = torch.randn_like(mu)
    for layouts in itertools.product((torch.contiguous_format, torch.channels_last), repeat=4):
        given = [t.detach().to(memory_format=f).requires_grad_() for t, f in
                 zip(latents, layouts, strict=True)]  # fmt: skip
        z, kl = fastelbo.sample_kl(*given[:2], posterior="std", prior=given[2:], reduction="none", eps=eps)
        got = z, kl, *gradients(z.square().sum() + (kl * torch.arange(3, device=device)).sum(), *given)
        expected = got if expected is None else expected
        torch.testing.assert_close(got, expected)


@triton_only
def test_one_launch_forward_and_one_backward(monkeypatch, device):
    from fastelbo.kernels import divergence
    from fastelbo.kernels.direct import Launch

    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), call(self, *args)))
    for posterior, kind in itertools.product(FROM_STD, PRIORS):
        latents = make_latents(posterior, (5, 37), device=device)
        prior = prior_for(kind, posterior, *latents[2:])
        launches.clear()
        z, kl = fastelbo.sample_kl(*latents[:2], posterior=Posterior(posterior, (-9.0, 9.0)), prior=prior)
        assert launches == [divergence.divergence_fwd_kernel]
        gradients(z.sum() + kl, *inputs_of(kind, latents))
        assert launches == [divergence.divergence_fwd_kernel, divergence.divergence_bwd_kernel]


def test_the_plain_call_takes_the_plain_path(device):
    """However logvar is said to be what it is by default."""
    from fastelbo.engine.plan import latents_plan_of

    mu, logvar = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    for posterior in ("logvar", Posterior(), Posterior("logvar", (-math.inf, math.inf))):
        plan, _ = latents_plan_of(mu, logvar, posterior, None, "sum", None, True)
        assert plan.call.is_plain
        torch.testing.assert_close(fastelbo.sample_kl(mu, logvar, posterior=posterior).kl, kl_divergence(mu, logvar))


@pytest.mark.parametrize("posterior", FROM_STD)
def test_compiled(posterior, device):
    latents = make_latents(posterior, (5, 7), device=device)
    eps = torch.randn_like(latents[0])

    def function(mu, second, *prior):
        z, kl = fastelbo.sample_kl(mu, second, posterior=Posterior(posterior, (-8.0, 8.0)), prior=prior, eps=eps)
        return z.sum() + kl

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*latents), function(*latents)
    torch.testing.assert_close((got, gradients(got, *latents)), (expected, gradients(expected, *latents)))


def test_per_sample_gradients(device):
    latents = [t.detach() for t in make_latents("std", (5, 7), device=device)]

    def one(mu, std, prior_mu, prior_std):
        z, kl = fastelbo.sample_kl(mu[None], std[None], posterior="std", prior=(prior_mu[None], prior_std[None]), eps=eps)
        return kl + z.sum()

    eps = torch.ones(1, 7, device=device)
    got = torch.func.vmap(torch.func.grad(one, argnums=(0, 1, 2, 3)))(*latents)
    for t in latents:
        t.requires_grad_()
    mu, std, *prior = latents
    z, kl = fastelbo.sample_kl(mu, std, posterior="std", prior=prior, eps=eps.expand_as(mu))
    torch.testing.assert_close(got, gradients(kl + z.sum(), *latents))


A = torch.zeros(2, 3)
BESIDE_A_NORMAL = "prior must be a Normal where mu is one: a pair is parametrized as the posterior's tensors are"
MISUSE = (
    (
        {"posterior": "sigma"},
        ValueError,
        "posterior must be one of 'logvar', 'log_std', 'std', 'var', 'categorical'; got 'sigma'",
    ),
    ({"posterior": lambda: Posterior("sigma")}, ValueError, "must be one of 'logvar'.*; got 'sigma'"),
    ({"posterior": lambda: Posterior(None)}, ValueError, "must be one of 'logvar'.*; got None"),
    ({"posterior": 3}, TypeError, "posterior must be a name, a Posterior or a CategoricalPosterior, got int"),
    ({"posterior": lambda: Posterior("std", (1,))}, ValueError, r"Posterior.clamp must be a pair \(low, high\)"),
    ({"posterior": lambda: Posterior("std", (2.0, 1.0))}, ValueError, "low <= high"),
    ({"posterior": lambda: Posterior("std", ("a", 1.0))}, TypeError, r"Posterior.clamp\[0\] must be a number or None, got str"),
    ({"prior": 3.0}, TypeError, "prior must be None, a pair .* or a Normal, got float"),
    ({"prior": (A,)}, ValueError, "prior must be a pair .* or a Normal; got 1 values"),
    ({"mu": Normal(A, 1.0), "logvar": None, "prior": (A, A)}, ValueError, BESIDE_A_NORMAL),
    ({"mu": Independent(Normal(A, 1.0), 1), "logvar": None, "prior": (A, A)}, ValueError, BESIDE_A_NORMAL),
    ({"prior": (A, 1.0)}, TypeError, r"prior\[1\] must be a tensor, got float"),
    ({"prior": (A.int(), A)}, TypeError, r"prior\[0\] must be float16"),
    ({"prior": (A, torch.zeros(2))}, ValueError, r"prior\[1\] must have the shape of mu or one that broadcasts to it"),
    ({"prior": (A, torch.zeros(4, 2, 3))}, ValueError, r"prior\[1\] must have the shape of mu"),
    ({"prior": (A, A.to("meta"))}, ValueError, r"prior\[1\] must be on the device of mu"),
    ({"prior": Normal(torch.zeros(2), 1.0)}, ValueError, "prior.loc must have the shape of mu"),
    ({"prior": torch.distributions.Laplace(A, 1.0)}, TypeError, "prior must be a Normal"),
    ({"mu": torch.distributions.Laplace(A, 1.0), "logvar": None}, TypeError, "mu must be a Normal"),
    ({"mu": Normal(A, 1.0)}, ValueError, "give mu and logvar, or a Normal, not both"),
    ({"mu": Normal(A, 1.0), "logvar": None, "posterior": "var"}, ValueError, "posterior is for tensors"),
    ({"mu": Normal(0.0, 1.0), "logvar": None}, ValueError, "mu must have the batch as its first dimension"),
    ({"logvar": None}, TypeError, "logvar must be a tensor, got NoneType"),
    ({"logvar": torch.zeros(2, 4), "posterior": "std"}, ValueError, "logvar must have the shape of mu"),
)


@pytest.mark.parametrize(("arguments", "error", "message"), MISUSE, ids=[f"{'-'.join(m[0])}: {m[2]}" for m in MISUSE])
@pytest.mark.parametrize("function", (fastelbo.sample_kl, kl_divergence))
def test_misuse(function, arguments, error, message):
    with pytest.raises(error, match=message):  # records are checked where they are made
        made = {k: v() if callable(v) else v for k, v in arguments.items()}
        function(**({"mu": A, "logvar": A} | made))


@pytest.mark.parametrize("call", ("loss", "elbo", "samples", "log_likelihood", "sample_log_ratio"))
def test_a_pair_beside_a_normal(call):
    normal, decoder = Normal(A, 1.0), lambda z: z
    calls = {
        "loss": lambda: fastelbo.loss(A, A, normal, prior=(A, A)),
        "elbo": lambda: fastelbo.elbo(decoder, A, normal, prior=(A, A)),
        "samples": lambda: fastelbo.elbo(decoder, A, normal, prior=(A, A), bound=fastelbo.ELBO(2)),
        "log_likelihood": lambda: fastelbo.log_likelihood(decoder, A, normal, prior=(A, A)),
        "sample_log_ratio": lambda: fastelbo.sample_log_ratio(normal, prior=(A, A)),
    }
    with pytest.raises(ValueError, match=BESIDE_A_NORMAL):
        calls[call]()
