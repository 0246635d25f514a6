"""As `test_plan`, of `sample_kl`, `reparameterize`, `kl_divergence` and `elbo`: what differs in one field, after and before."""

import random
from dataclasses import replace

import pytest
import torch
from test_plan import AROUND, OPTIONS, TENSORS

import fastelbo
from calls import SHAPE, Call, check, compare, divergence, gaussian, leaf, result_dtype, truth
from conftest import BACKEND, DEVICE

LATENTS = {
    name: changed
    for name, changed in {**OPTIONS, **TENSORS, **AROUND}.items()
    if not name.startswith(("kl", "beta", "weight", "free", "cap", "reduction mean, ", "reduction sum, ", "balance"))
    and not name.endswith((" recon_x", " x"))
}
COEFFICIENTS = 0.5, -3.0


def noise_of(call, seed):
    """What is drawn for a seed: on a CPU what `torch.randn` does, else what `sample_kl` makes of N(0, I)."""
    torch.manual_seed(seed)
    if BACKEND == "torch":
        return torch.randn(call.mu.shape, device=DEVICE)
    zero = torch.zeros(call.mu.shape, device=DEVICE)
    return fastelbo.sample_kl(zero, zero).z


def check_samples(call, eps, seed=None):
    """z and its KL, and z alone, of noise that is given or drawn for a seed."""
    dtypes = call.mu.dtype, call.logvar.dtype
    z_dtype, dtype = torch.promote_types(*dtypes), result_dtype(*dtypes, *(t.dtype for t in call.prior or ()))
    options = {"posterior": call.posterior} if seed is not None else {"posterior": call.posterior, "eps": eps}

    def expected(of):
        mu, sigma = gaussian(call, of)
        return mu + sigma * eps.double(), divergence(call, of)[0]

    for sample in (sample_kl, reparameterize):
        if seed is not None:
            torch.manual_seed(seed)
        with call.around():
            found = sample(call, **options)
        n = len(found)
        compare(call, found, lambda of, n=n: expected(of)[:n], COEFFICIENTS[:n], (z_dtype, dtype)[:n])


def sample_kl(call, **options):
    return fastelbo.sample_kl(call.mu, call.logvar, prior=call.prior, reduction=call.reduction, **options)


def reparameterize(call, **options):
    return [fastelbo.reparameterize(call.mu, call.logvar, **options)]


@pytest.mark.parametrize("name", LATENTS)
def test_samples_of_given_noise(name):
    for changed in (Call, lambda: LATENTS[name](Call())):
        call = changed()
        check_samples(call, torch.randn(call.mu.shape, device=DEVICE))


FACTS_OF_SEEDS = "other gradient mu", "other gradient logvar", "no gradient", "no_grad", "inference_mode"
SURROUNDINGS = "default dtype float64", "default device meta"


@pytest.mark.parametrize("name", [*(name for name in LATENTS if name in OPTIONS), *FACTS_OF_SEEDS, *SURROUNDINGS])
def test_samples_of_a_seed(name):
    """One seed has one noise, whatever the call is, and another seed another."""
    noises = [noise_of(Call(), seed) for seed in (5, 6)]
    assert (noises[0] - noises[1]).std() > 0.3
    for seed, eps in zip((5, 6), noises, strict=True):
        check_samples(Call(), eps, seed)
        check_samples(LATENTS[name](Call()), eps, seed)


def test_generators_in_turns():
    """A generator has a state of its own, and the default one's is left where it was."""
    own = torch.Generator(DEVICE)
    for seed in (1, 2, 1):
        call = Call()
        eps = noise_of(call, seed)
        torch.manual_seed(9)
        z, kl = sample_kl(call, generator=own.manual_seed(seed))
        again, _ = sample_kl(call, generator=own)
        compare(call, (z, kl), lambda of, eps=eps, call=call: (
            gaussian(call, of)[0] + gaussian(call, of)[1] * eps.double(), divergence(call, of)[0]
        ), COEFFICIENTS, (torch.float32,) * 2)  # fmt: skip
        assert not torch.equal(z, again)
        check_samples(call, noise_of(call, 9), 9)
        torch.manual_seed(9)
        sample_kl(call, generator=own)
        assert torch.equal(fastelbo.reparameterize(torch.zeros_like(call.mu), torch.zeros_like(call.mu)), noise_of(call, 9))


@pytest.mark.parametrize("name", LATENTS)
def test_kl_alone(name):
    for changed in (Call, lambda: LATENTS[name](Call())):
        call = changed()
        with call.around():
            kl = fastelbo.kl_divergence(call.mu, call.logvar, call.prior, posterior=call.posterior, reduction=call.reduction)
        dtype = result_dtype(call.mu.dtype, call.logvar.dtype, *(t.dtype for t in call.prior or ()))
        compare(call, [kl], lambda of, call=call: [divergence(call, of)[0]], COEFFICIENTS[1:], [dtype])


@pytest.mark.parametrize("name", ("element", "dimension"))
def test_kl_of_elements_and_dimensions(name):
    for reduction in ("sum", name, "sum", name):
        call = Call()
        kl = fastelbo.kl_divergence(call.mu, call.logvar, reduction=reduction)
        factor = torch.rand_like(kl)
        (kl * factor).sum().backward()
        mu, logvar = call.mu.detach().double(), call.logvar.detach().double()
        elements = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
        expected = {"sum": elements.sum(), "element": elements, "dimension": elements.mean(0)}[reduction]
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
        by_mu = mu * factor.double() / (len(mu) if reduction == "dimension" else 1)
        torch.testing.assert_close(call.mu.grad.double(), by_mu, rtol=1e-5, atol=1e-6)


# --- elbo

FACTS_OF_ELBO = (
    "other gradient mu",
    "other gradient logvar",
    "channels_last mu",
    "transposed logvar",
    "bfloat16 mu",
    "torch.uint8 x",
)
# Where the prior is float64, the decoder gets a float32 sample still, so that the truth is no closer than that.
ELBO = [
    name
    for name in (*OPTIONS, *AROUND, *FACTS_OF_ELBO)
    if not name.startswith(("kl", "free", "cap", "balance", "saved", "autocast", "prior, float64"))
]


def check_elbo(call):
    """With a decoder of new weights, whose gradient is of the call, too."""
    weight = leaf(torch.randn(20, 16, device=DEVICE) / 4)
    eps = torch.randn(call.mu.shape, device=DEVICE)

    def decode(z, weight=weight):
        return (z.flatten(1).to(weight.dtype) @ weight).view(SHAPE)

    with call.around():
        terms = fastelbo.elbo(
            decode, call.x, call.mu, call.logvar, call.beta, likelihood=call.likelihood, posterior=call.posterior,
            prior=call.prior, weighting=call.weighting, weight=call.weight, reduction=call.reduction, eps=eps,
        )  # fmt: skip
    call = replace(call, recon_x=weight)

    def expected(of):
        mu, sigma = gaussian(call, of)
        recon_x = decode(mu + sigma * eps.double(), of(weight))
        return truth(replace(call, recon_x=recon_x), lambda t: t if t is recon_x else of(t))

    floats = call.mu.dtype, call.logvar.dtype, *(t.dtype for t in call.prior or ())
    compare(call, terms, expected, (1.0, 0.5, -0.25), [result_dtype(*floats)] * 3)


@pytest.mark.parametrize("name", ELBO)
def test_elbo(name):
    """And a loss of the same options after it."""
    changed = {**OPTIONS, **AROUND, **TENSORS}[name]
    check_elbo(Call())
    check_elbo(changed(Call()))
    check(changed(Call()))


def test_elbo_in_any_order():
    order = [*ELBO]
    random.Random(0).shuffle(order)
    for i, name in enumerate(order):
        try:
            check_elbo({**OPTIONS, **AROUND, **TENSORS}[name](Call()))
        except AssertionError as error:
            raise AssertionError(f"{name}, after {order[:i][-5:]}") from error
