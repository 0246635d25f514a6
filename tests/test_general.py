"""Likelihoods of several parameters, weights, posteriors, priors and weightings keep what the four-argument call promises."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

import fastelbo
from conftest import BACKEND
from fastelbo import ELBO, IWAE
from fastelbo.diagnostics import Monitor
from fastelbo.likelihoods import Gaussian, Multinomial, StudentT
from likelihood_cases import CASES, recon_x, reduce
from support import gradients, relative
from test_compile import Counted, assert_same

NAMES = ("gaussian, soft log scale", "gaussian, logvar", "zero_inflated", "pos_weight", "categorical, ignored", "multinomial")


def make(name, device, dtype=torch.float32):
    case = CASES[name]
    parameters, x = case.make(dtype, device)
    mu, logvar = (torch.randn(3, 2, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    return case.likelihood, parameters, x, mu, logvar


@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("name", NAMES)
def test_any_sequence_of_factors(name, reduction, device):
    """Stored gradients are right for the factor that was guessed, corrected for another, made anew for a retained graph."""
    likelihood, parameters, x, mu, logvar = make(name, device, torch.float64)
    wide = [p.detach().clone().requires_grad_() for p in parameters]
    expected = reduce(CASES[name].truth(wide, x), reduction, counted=(x != -100) if "ignored" in name else None)
    for factor in (1.0, 1.0, 3.0, 3.0, 0.5, 2.0**40):
        recon = fastelbo.loss(recon_x(parameters), x, mu, logvar, likelihood=likelihood, reduction=reduction).recon
        upstream = factor * torch.arange(1.0, 1 + recon.numel(), device=device, dtype=torch.float64).view_as(recon)
        truth = gradients(expected, *wide, grad_outputs=upstream, retain_graph=True)
        first = gradients(recon, *parameters, grad_outputs=upstream, retain_graph=True)
        kept = [g.clone() for g in first]
        again = gradients(recon, *parameters, grad_outputs=7 * upstream)
        for a, b, c, d in zip(first, kept, again, truth, strict=True):
            assert torch.equal(a, b)  # the second pass left the first one's gradients alone
            assert relative(a, d) < 1e-7
            assert relative(c, 7 * d) < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_any_subset_of_inputs(name, device):
    likelihood, parameters, x, mu, logvar = make(name, device)
    options = {"likelihood": likelihood, "reduction": "batchmean"}
    full = gradients(fastelbo.loss(recon_x(parameters), x, mu, logvar, 0.3, **options).loss, *parameters, mu, logvar)
    for i, tensor in enumerate((*parameters, mu, logvar)):
        fixed = [t.detach() if t is not tensor else t for t in (*parameters, mu, logvar)]
        terms = fastelbo.loss(recon_x(fixed[:-2]), x, *fixed[-2:], 0.3, **options)
        torch.testing.assert_close(gradients(terms.loss, tensor)[0], full[i])
    with torch.no_grad():
        terms = fastelbo.loss(recon_x(parameters), x, mu, logvar, 0.3, **options)
    assert not terms.loss.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_no_input_is_written(name, device):
    likelihood, parameters, x, mu, logvar = make(name, device)
    tensors = (*parameters, x, mu, logvar)
    before = [t.detach().clone() for t in tensors]
    fastelbo.loss(recon_x(parameters), x, mu, logvar, likelihood=likelihood, reduction="mean").loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_a_loss_scaler(dtype, device):
    """Gradients in float16 times 2^16, stored as such once the factor is known."""
    likelihood, parameters, x, mu, logvar = make("gaussian, soft log scale", device, dtype)
    wide = [p.detach().double().requires_grad_() for p in parameters]
    expected = gradients(fastelbo.loss(recon_x(wide), x, mu, logvar, likelihood=likelihood, reduction="mean").loss, *wide)
    for _ in range(3):
        loss = fastelbo.loss(recon_x(parameters), x, mu, logvar, likelihood=likelihood, reduction="mean").loss
        for a, b in zip(gradients(loss * 65536, *parameters), expected, strict=True):
            assert a.dtype == dtype
            assert relative(a.double() / 65536, b) < 2 * torch.finfo(dtype).eps


def general(parameters, x, mu, second, beta, likelihood, weight=None):
    prior = (0.1 * mu.detach(), 0.2 * second.detach())
    posterior = fastelbo.Posterior("log_std", (-1.0, 1.0))
    weighting = fastelbo.Weighting(free_bits=0.4, free_bits_per="sample")
    return fastelbo.loss(
        recon_x(parameters), x, mu, second, beta, likelihood=likelihood, posterior=posterior, prior=prior, weighting=weighting,
        weight=weight, reduction="mean",
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_compiled(name, device):
    """In one graph, without a break, with the results of eager mode."""
    if BACKEND == "triton" and name not in ("gaussian, logvar", "categorical"):
        pytest.skip("it is the formula that is compiled")
    torch.compiler.reset()
    likelihood, parameters, x, mu, second = make(name, device)
    weight = torch.rand(3, *[1] * (x.dim() - 1), device=device)

    def call(x, mu, second, weight, *parameters):
        return general(parameters, x, mu, second, 0.3, likelihood, weight)

    compiled = Counted(call)
    assert_same(call, compiled, (*parameters, mu, second), x, mu, second, weight, *parameters, rtol=1e-5, atol=1e-6)
    assert compiled.compilations == 1


def test_changing_numbers_do_not_compile_anew(device):
    torch.compiler.reset()
    likelihood, parameters, x, mu, second = make("gaussian, logvar", device)

    def call(beta, *parameters):
        return general(parameters, x, mu, second, beta, likelihood)

    compiled = Counted(call)
    for step in range(5):
        beta = fastelbo.schedules.linear(4)(torch.tensor(step, device=device))
        torch.testing.assert_close(compiled(beta, *parameters), call(beta, *parameters), rtol=1e-5, atol=1e-6)
    assert compiled.compilations == 1


def test_per_sample_gradients(device):
    """torch.func over single samples."""
    likelihood, (mean, log_scale), x, mu, second = make("gaussian, soft log scale", device, torch.float64)

    def loss(mean, x, mu, second):
        one = [t.unsqueeze(0) for t in (mean, x, mu, second)]
        return general((one[0], log_scale), *one[1:], 0.3, likelihood).loss

    got = torch.func.vmap(torch.func.grad(loss, (0, 2, 3)))(mean, x, mu, second)
    for i in range(3):
        sample = [t[i].detach().requires_grad_() for t in (mean, x, mu, second)]
        expected = gradients(loss(*sample), sample[0], *sample[2:])
        torch.testing.assert_close([g[i] for g in got], list(expected))


@pytest.mark.parametrize("independent", (False, True))
def test_distributions_in_place_of_parameters(independent, device):
    """As encoders that return a Normal have them."""
    x = torch.rand(4, 6, device=device)
    mu, prior_mu = (torch.randn(4, 3, device=device, requires_grad=True) for _ in range(2))
    std, prior_std = (torch.rand(4, 3, device=device).add(0.5).requires_grad_() for _ in range(2))
    posterior, prior = Normal(mu, std), Normal(prior_mu, prior_std)
    expected = torch.distributions.kl_divergence(posterior, prior).sum()
    if independent:
        posterior, prior = Independent(posterior, 1), Independent(prior, 1)
    decoder = torch.nn.Linear(3, 6).to(device)
    eps = torch.randn_like(mu)
    results = []
    for terms in (
        fastelbo.loss(decoder(mu + std * eps), x, posterior, beta=0.3, prior=prior, likelihood="mse"),
        fastelbo.elbo(decoder, x, posterior, beta=0.3, prior=prior, likelihood="mse", eps=eps),
    ):
        torch.testing.assert_close(terms.kl, expected)
        results.append((*terms, *gradients(terms.loss, mu, std, prior_mu, prior_std, *decoder.parameters(), retain_graph=True)))
    naive = torch.nn.functional.mse_loss(decoder(mu + std * eps), x, reduction="sum") + 0.3 * expected
    results.append((naive, *results[0][1:3], *gradients(naive, mu, std, prior_mu, prior_std, *decoder.parameters())))
    for got in results[:2]:
        torch.testing.assert_close(got, results[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_elbo_is_loss_around_the_decoder(reduction, device):
    """Of a decoder that returns several parameters, with every other option."""
    _, x = CASES["zero_inflated"].make(torch.float64, device)
    x = x.flatten(1)[:, :7]
    mu, second = (torch.randn(3, 2, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(7, device=device)
    net = torch.nn.Linear(2, 14, dtype=torch.float64, device=device)
    theta = torch.rand(7, dtype=torch.float64, device=device, requires_grad=True)
    eps = torch.randn_like(mu)

    def decoder(z):
        mean, logits = net(z).chunk(2, 1)
        return mean.exp(), theta, logits

    options = {
        "likelihood": "zero_inflated_negative_binomial", "posterior": "log_std", "prior": (mu.detach() / 2, second.detach()),
        "reduction": reduction, "weight": weight,
    }  # fmt: skip
    z = fastelbo.reparameterize(mu, second, posterior="log_std", eps=eps)
    weighting = fastelbo.Weighting(free_bits=0.5, free_bits_per="element")
    for extra in ({}, {"weighting": weighting}, {"beta": torch.tensor([0.1, 0.7], device=device)}):
        got = fastelbo.elbo(decoder, x, mu, second, eps=eps, **{"beta": 0.3} | options | extra)
        expected = fastelbo.loss(decoder(z), x, mu, second, **{"beta": 0.3} | options | extra)
        torch.testing.assert_close(got, expected)
        wrt = (mu, second, theta, *net.parameters())
        ours, theirs = (gradients(t.loss.sum(), *wrt, retain_graph=True) for t in (got, expected))
        torch.testing.assert_close(ours, theirs)


POSTERIORS = {"left out": {}, "a name": {"posterior": "logvar"}, "a record": {"posterior": fastelbo.Posterior()}}
POSTERIORS["without bounds"] = {"posterior": fastelbo.Posterior("logvar", (None, math.inf))}
NO_WEIGHTING = {"None": {"weighting": None}, "a record of nothing": {"weighting": fastelbo.Weighting()}}


@pytest.mark.parametrize("call", ("loss", "kl", "sample_kl", "reparameterize", "elbo", "samples", "iwae", "module"))
@pytest.mark.parametrize("spelling", (*POSTERIORS, *NO_WEIGHTING))
def test_a_spelling_makes_no_difference(spelling, call, device):
    """To the last bit, and in what is allowed."""
    recon, x = torch.rand(4, 5, device=device, requires_grad=True), torch.rand(4, 5, device=device)
    mu, logvar = (torch.randn(4, 3, device=device, requires_grad=True) for _ in range(2))
    net, eps = torch.nn.Linear(3, 5, device=device), torch.randn(2, 4, 3, device=device)
    given = (POSTERIORS | NO_WEIGHTING)[spelling]
    posterior = {k: v for k, v in given.items() if k == "posterior"}
    several = {"likelihood": "mse", "eps": eps}
    calls = {
        "loss": lambda given, _: fastelbo.loss(recon, x, mu, logvar, 0.3, **given),
        "kl": lambda given, _: fastelbo.loss(recon, x, kl=mu.sum(), **given),
        "sample_kl": lambda _, posterior: fastelbo.sample_kl(mu, logvar, eps=eps[0], **posterior),
        "reparameterize": lambda _, posterior: [fastelbo.reparameterize(mu, logvar, eps=eps[0], **posterior)],
        "elbo": lambda given, _: fastelbo.elbo(net, x, mu, logvar, 0.3, likelihood="mse", eps=eps[0], **given),
        "samples": lambda given, _: fastelbo.elbo(net, x, mu, logvar, 0.3, bound=fastelbo.ELBO(2), **several, **given),
        "iwae": lambda given, _: fastelbo.elbo(net, x, mu, logvar, bound=fastelbo.IWAE(2), **several, **given),
        "module": lambda given, _: fastelbo.nn.ELBOLoss(**given).to(device)(recon, x, mu, logvar),
    }
    wrt = (recon, mu, logvar, net.weight)
    got, expected = calls[call](given, posterior), calls[call]({}, {})
    found = (
        [*values, *torch.autograd.grad(values[0].sum(), wrt, allow_unused=True, materialize_grads=True)]
        for values in (got, expected)
    )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_module_with_options(device):
    likelihood, parameters, x, mu, second = make("gaussian, logvar", device)
    weighting = fastelbo.Weighting(capacity=3.0)
    criterion = fastelbo.nn.ELBOLoss(likelihood, 2.0, "batchmean", posterior="std", weighting=weighting).to(device)
    weight = torch.rand_like(x)
    monitor = fastelbo.diagnostics.Monitor()
    std = second.exp()
    prior = (torch.ones(2, device=device), torch.full((2,), 0.5, device=device))
    got = criterion(recon_x(parameters), x, mu, std, prior=prior, weight=weight, monitor=monitor)
    expected = fastelbo.loss(
        recon_x(parameters), x, mu, std, 2.0, likelihood=likelihood, reduction="batchmean", posterior="std", prior=prior,
        weighting=weighting, weight=weight,
    )  # fmt: skip
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(monitor.kl.float(), expected.kl)
    assert "posterior='std'" in repr(criterion) and "capacity=3.0" in repr(criterion)


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "none"))
@pytest.mark.parametrize("shape", ((0, 3), (4, 0)), ids=str)
def test_empty(shape, reduction, device):
    mean, scale = (torch.rand(shape, device=device, requires_grad=True) for _ in range(2))
    x = torch.rand(shape, device=device)
    kl = torch.zeros(shape[:1] if reduction == "none" else (), device=device)
    recon = fastelbo.loss((mean, scale), x, kl=kl, likelihood="gaussian", reduction=reduction).recon
    expected = torch.zeros_like(kl) / (0 if reduction == "batchmean" and shape[0] == 0 else 1)
    torch.testing.assert_close(recon.detach(), expected, equal_nan=True)
    recon.sum().backward()
    assert mean.grad.shape == scale.grad.shape == shape


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "offset": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view_as(t),
}


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_layouts(first, second, device):
    mean, logvar, x, weight = (torch.randn(2, 4, 5, 6, device=device) for _ in range(4))
    mean, x = LAYOUTS[first](mean).requires_grad_(), LAYOUTS[second](x.abs())
    logvar, weight = LAYOUTS[second](logvar).requires_grad_(), LAYOUTS[first](weight > 0)
    for likelihood, parameters in ((Gaussian(parameter="logvar"), (mean, logvar)), (Multinomial(2), (mean,))):
        mask = weight if len(parameters) == 2 else weight[:, :, :1]
        got = fastelbo.loss(recon_x(parameters), x, kl=torch.zeros((), device=device), likelihood=likelihood, weight=mask).recon
        terms = -Normal(mean, torch.exp(logvar / 2)).log_prob(x) if len(parameters) == 2 else -(mean.log_softmax(2) * x).sum(2)
        expected = reduce(terms, "sum", mask if len(parameters) == 2 else mask.squeeze(2))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, *parameters), gradients(expected, *parameters))


class Strided(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors come back with other strides than any layout has."""

    def __init__(self):
        super().__init__(lambda t: t, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t.clone())


@pytest.mark.parametrize("name", ("gaussian, logvar", "zero_inflated", "categorical, soft", "multinomial", "pos_weight"))
def test_saved_tensors_with_other_strides(name, device):
    likelihood, parameters, x, mu, logvar = make(name, device, torch.float64)
    weight = torch.rand(3, 1, 5, 1, device=device)
    options = {"likelihood": likelihood, "weight": weight if name != "categorical, soft" else weight[:, :1]}
    results = []
    for hooks in (False, True):
        with Strided() if hooks else torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            recon = fastelbo.loss(recon_x(parameters), x, mu, logvar, **options).recon
        # Another factor than was guessed, and a graph that is kept: all is computed again, twice.
        first = gradients(13 * recon, *parameters, retain_graph=True)
        results.append((*first, *gradients(7 * recon, *parameters)))
    torch.testing.assert_close(*results)


def test_results_may_be_written_to(device):
    """`kl /= n` and the like: they share memory with nothing, not with a KL that was given either."""
    mean, x, mu, logvar = (torch.rand(3, 2, device=device) for _ in range(4))
    log_scale, given = torch.zeros(3, 2, device=device, requires_grad=True), torch.tensor(2.0, device=device)
    beta = torch.tensor(0.5, device=device, requires_grad=True)
    for likelihood, parameters in (
        ("mse", mean), (Gaussian(parameter="log_scale"), (mean, log_scale)), ("multinomial", log_scale),
        (Gaussian("optimal"), log_scale),
    ):  # fmt: skip
        for latents in ({"kl": given}, {"mu": mu, "logvar": logvar, "posterior": "std"}):
            terms = fastelbo.loss(parameters, x, beta=beta, likelihood=likelihood, **latents)
            expected = gradients(terms.loss, beta, retain_graph=True)
            for value in terms:
                value /= 4.0
            torch.testing.assert_close(gradients(4 * terms.loss, beta)[0], expected[0])
    assert given == 2.0


def test_a_short_kl_is_multiplied_in_float32(device):
    mean, x = torch.rand(2, 3, device=device), torch.rand(2, 3, device=device)
    kl = torch.tensor(1000.0, dtype=torch.float16, device=device)
    beta = torch.tensor(100.0, dtype=torch.float64, device=device, requires_grad=True)
    terms = fastelbo.loss((mean, mean + 1), x, kl=kl, beta=beta, likelihood="gaussian")
    torch.testing.assert_close(terms.loss, terms.recon + 1e5)
    assert {t.dtype for t in terms} == {torch.float32}


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_elbo_of_a_name_takes_a_tuple_too(reduction, device):
    mu, logvar, x, eps = (torch.rand(3, 2, device=device) for _ in range(4))
    z = fastelbo.reparameterize(mu, logvar, eps=eps)
    got = fastelbo.elbo(lambda z: (z, z.exp()), x, mu, logvar, 0.3, likelihood="gaussian", eps=eps, reduction=reduction)
    expected = fastelbo.loss((z, z.exp()), x, mu, logvar, 0.3, likelihood="gaussian", reduction=reduction)
    torch.testing.assert_close(got, expected)


# Numbers in the place of tensors behind the first.
NUMBERS = {
    "gaussian, scale": (0.5,), "gaussian, logvar": (-1,), "gaussian, soft log scale": (-0.5,), "student_t": (0.3,),
    "laplace, scale": (np.float32(2),), "student_t, log scale": (Fraction(1, 4),), "negative_binomial": (2,),
    "zero_inflated": (1.5, -0.25), "discretized_logistic": (-2.0,), "pos_weight of features": (3.0,),
}  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16), ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_parameters(name, dtype, device):
    """In value and gradients as 0-d tensors of all their digits; with a mask over NaN, of each reduction."""
    likelihood, (first, *_), x, mu, logvar = make(name, device, dtype)
    wide, numbers = first.detach().double().requires_grad_(), [float(n) for n in NUMBERS[name]]
    terms = CASES[name].truth([wide, *(torch.tensor(n, dtype=torch.float64, device=device) for n in numbers)], x.double())
    weight = torch.rand(x.shape[1:], device=device) > 0.3
    bad = torch.where(weight, x, torch.nan)
    close = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 1e-4}
    for reduction in ("sum", "batchmean", "mean", "none"):
        given = (first, *NUMBERS[name])
        got = fastelbo.loss(given, bad, mu, logvar, likelihood=likelihood, weight=weight, reduction=reduction).recon
        expected = reduce(terms, reduction, weight)
        torch.testing.assert_close(
            got.double(), expected, **(close if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5})
        )
        factors = torch.rand_like(expected)
        slope = gradients(got, first, grad_outputs=factors.to(got.dtype))[0]
        torch.testing.assert_close(
            slope.double(), gradients(expected, wide, grad_outputs=factors, retain_graph=True)[0], **close
        )


def test_numbers_where_a_decoder_returns_them(device):
    """With every bound, by the module, and for the log-likelihood: as the scale of the record, or as a tensor."""
    x, eps = torch.randn(4, 6, device=device), torch.randn(4, 4, 2, device=device)
    mu, logvar = (torch.randn(4, 2, device=device, requires_grad=True) for _ in range(2))
    weights = torch.randn(2, 6, device=device, requires_grad=True)

    def value(decoder, likelihood, bound):
        one = bound is None or (bound.n_samples == 1 and not isinstance(bound, IWAE))
        return fastelbo.elbo(
            decoder, x, mu, logvar, likelihood=likelihood, bound=bound, eps=eps[0] if one else eps[: bound.n_samples]
        ).loss

    for bound in (None, ELBO(), ELBO(4, chunk=2), ELBO(4), IWAE(1), IWAE(4, chunk=2), IWAE(4, estimator="dreg")):
        got = value(lambda z: (z @ weights, 0.3), "gaussian", bound)
        expected = value(lambda z: z @ weights, Gaussian(scale=0.3), bound)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        ours, theirs = (gradients(v, mu, logvar, weights) for v in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-4)
    monitored = fastelbo.elbo(lambda z: (z @ weights, 0.3), x, mu, logvar, likelihood="gaussian", eps=eps[0], monitor=Monitor())
    torch.testing.assert_close(monitored.loss, value(lambda z: z @ weights, Gaussian(scale=0.3), None), rtol=1e-5, atol=0)
    options = {"n_samples": 4, "chunk": 2, "eps": eps}
    torch.testing.assert_close(
        fastelbo.log_likelihood(lambda z: (z @ weights, 0.3), x, mu, logvar, likelihood="gaussian", **options),
        fastelbo.log_likelihood(lambda z: z @ weights, x, mu, logvar, likelihood=Gaussian(scale=0.3), **options),
    )
    mean = mu @ weights
    criterion = fastelbo.nn.ELBOLoss(Gaussian(parameter="log_scale"))
    expected = fastelbo.loss(
        (mean, torch.tensor(-1.0, device=device)), x, mu, logvar, likelihood=Gaussian(parameter="log_scale")
    )
    torch.testing.assert_close(criterion([mean, -1], x, mu, logvar), expected)
    by_vmap = torch.func.vmap(
        lambda m, x: fastelbo.loss((m[None], 0.3), x[None], kl=m.new_zeros(()), likelihood="gaussian").recon
    )
    torch.testing.assert_close(by_vmap(mean, x).sum(), fastelbo.loss((mean, 0.3), x, mu, logvar, likelihood="gaussian").recon)


def test_numbers_that_change_compile_twice_at_most(device):
    torch.compiler.reset()
    likelihood, (mean, _), x, mu, logvar = make("gaussian, scale", device)

    def of_loss(scale, mean, mu, logvar):
        return fastelbo.loss((mean, scale), x, mu, logvar, likelihood=likelihood)

    def of_elbo(scale, mean, mu, logvar):
        return fastelbo.elbo(lambda z: (mean * z.sum(), scale), x, mu, logvar, likelihood=likelihood, eps=torch.ones_like(mu))

    for call in (of_loss, of_elbo):
        compiled = Counted(call)
        for scale in (0.5, 0.25, 3.0, 1.0):
            assert_same(call, compiled, (mean, mu, logvar), scale, mean, mu, logvar, rtol=1e-5, atol=1e-4)
        assert compiled.compilations <= 2


BAD_NUMBERS = (
    ("gaussian", (True,), TypeError, r"\[1\] must be a tensor or a number, got bool"),
    ("gaussian", ("0.5",), TypeError, r"\[1\] must be a tensor or a number, got str"),
    ("laplace", (None,), TypeError, r"\[1\] must be a tensor or a number, got NoneType"),
    ("laplace", (math.nan,), ValueError, r"\[1\] must be a tensor or a number, got nan"),
    ("gaussian", (0,), ValueError, r"\[1\] must be positive for the likelihood 'gaussian', got 0"),
    (StudentT(3.0), (-0.5,), ValueError, r"\[1\] must be positive for the likelihood 'student_t', got -0.5"),
    ("negative_binomial", (-2,), ValueError, r"\[1\] must be positive for the likelihood 'negative_binomial', got -2"),
    ("zero_inflated_negative_binomial", (2.0, math.nan), ValueError, r"\[2\] must be a tensor or a number, got nan"),
    ("zero_inflated_negative_binomial", (0.0, 1.0), ValueError, r"\[1\] must be positive for .*, got 0"),
    (Gaussian(scale=0.3), (0.5,), ValueError, r"give Gaussian.scale or the tuple \(mean, scale\), not both"),
    ("bernoulli", (0.5,), (TypeError, ValueError), " must be a tensor"),
    ("gaussian", (10**400,), ValueError, r"\[1\] must be a tensor or a number, and fit into a float"),
)


@pytest.mark.parametrize(("likelihood", "numbers", "error", "message"), BAD_NUMBERS)
def test_bad_numbers_are_named(likelihood, numbers, error, message, device):
    mean, x = torch.rand(3, 4, device=device), torch.ones(3, 4, device=device)
    latents = torch.zeros(3, 2, device=device), torch.zeros(3, 2, device=device)
    with pytest.raises(error, match="^recon_x" + message if "give" not in message else message):
        fastelbo.loss((mean, *numbers), x, *latents, likelihood=likelihood)
    for bound, times in ((None, 1), (ELBO(2), 1), (IWAE(2, chunk=2), 2)):  # samples of a chunk
        with pytest.raises(error, match=r"^decoder\(z\)" + message if "give" not in message else message):
            fastelbo.elbo(
                lambda z, times=times: (mean.repeat(times, 1), *numbers), x, *latents, likelihood=likelihood, bound=bound
            )


def test_the_first_is_a_tensor(device):
    mean, x = torch.rand(3, 4, device=device), torch.ones(3, 4, device=device)
    with pytest.raises(TypeError, match=r"recon_x\[0\] must be a tensor, got float"):
        fastelbo.loss((0.5, mean), x, mean, mean, likelihood="gaussian")
