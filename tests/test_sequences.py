"""`PerSample`: values for several batch dimensions, such as the steps of sequences, in all calls."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal
from torch.utils.checkpoint import checkpoint

import fastelbo
from conftest import DEVICE
from fastelbo import CategoricalPosterior, PerSample, Weighting, kl_divergence, nll, sample_kl
from fastelbo.diagnostics import Monitor
from fastelbo.likelihoods import Categorical, Gaussian
from support import gradcheck, gradgradcheck

B, T, D, F = 3, 4, 5, 6
STEPS = PerSample(batch_dims=2)


def real(*shape, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64, device=DEVICE)).requires_grad_()


def unit(*shape):
    return torch.rand(shape, dtype=torch.float64, device=DEVICE)


def latents():
    return real(B, T, D), real(B, T, D, scale=0.5)


def standard(mu, logvar):
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def check(got, expected, *wrt):
    assert got.shape == expected.shape == (B, T)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, wrt, upstream, retain_graph=True),
        torch.autograd.grad(expected, wrt, upstream, retain_graph=True),
    )


NLL = {
    "bernoulli": lambda p, x: -(x * p.log() + (1 - x) * (1 - p).log()),
    "bernoulli_logits": lambda p, x: torch.nn.functional.softplus(p) - x * p,
    "mse": lambda p, x: (p - x).square(),
    "gaussian": lambda p, x: -Normal(p, 0.5).log_prob(x),
}


def likelihood_of(name):
    return Gaussian(0.5) if name == "gaussian" else name


@pytest.mark.parametrize("likelihood", NLL)
def test_loss(likelihood):
    recon_x, x, (mu, logvar) = (unit(B, T, F) * 0.9 + 0.05).requires_grad_(), unit(B, T, F), latents()
    terms = fastelbo.loss(recon_x, x, mu, logvar, 0.5, reduction=STEPS, recon_weight=2.0, likelihood=likelihood_of(likelihood))
    recon, kl = NLL[likelihood](recon_x, x).sum(-1), standard(mu, logvar).sum(-1)
    check(terms.recon, recon, recon_x)
    check(terms.kl, kl, mu, logvar)
    check(terms.loss, 2 * recon + 0.5 * kl, recon_x, mu, logvar)


@pytest.mark.parametrize("shape", ((B, T, F), (T, 1), (B, 1, 1), (F,), (B, T, 1)), ids=str)
def test_weights_and_smaller_parameters_broadcast_from_the_last_dimension(shape):
    mean, x, weight = real(B, T, F), unit(B, T, F), unit(*shape)
    weight.view(-1)[0] = 0
    scale = (unit(*shape) + 0.5).requires_grad_()
    got = nll((mean, scale), x, likelihood="gaussian", weight=weight, reduction=STEPS)
    check(got, (-Normal(mean, scale).log_prob(x) * weight).sum(-1), mean, scale)
    mu, logvar = latents()
    weight = unit(*(D if n == F else n for n in shape))
    check(kl_divergence(mu, logvar, kl_weight=weight, reduction=STEPS), (standard(mu, logvar) * weight).sum(-1), mu, logvar)


def test_labels_images_and_numbers():
    """Of images the dimension of classes or channels is that behind the batch."""
    logits, labels = real(B, T, F), torch.randint(0, F, (B, T), device=DEVICE)
    check(
        nll(logits, labels, likelihood=Categorical(dim=-1), reduction=STEPS),
        -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0], logits,
    )  # fmt: skip
    logits, labels = real(B, T, F, 2, 2), torch.randint(0, F, (B, T, 2, 2), device=DEVICE)
    expected = -logits.log_softmax(2).gather(2, labels[:, :, None]).sum((2, 3, 4))
    check(nll(logits, labels, likelihood="categorical", reduction=STEPS), expected, logits)
    mean, x = real(B, T, F), unit(B, T, F)
    check(nll((mean, 0.5), x, likelihood=Gaussian(), reduction=STEPS), -Normal(mean, 0.5).log_prob(x).sum(-1), mean)
    check(nll(Independent(Bernoulli(logits=mean), 1), x, reduction=STEPS), NLL["bernoulli_logits"](mean, x).sum(-1), mean)


@pytest.mark.parametrize("prior", ("pair", "row", "Normal", "Normal of two"))
def test_priors_and_weightings(prior):
    mu, logvar = latents()
    p_mu, p_logvar = (real(*((1, T, D) if prior == "row" else (B, T, D))) for _ in range(2))
    given = {
        "pair": (p_mu, p_logvar), "row": (p_mu, p_logvar), "Normal": Normal(p_mu, (p_logvar / 2).exp()),
        "Normal of two": Independent(Normal(p_mu, (p_logvar / 2).exp()), 2),
    }[prior]  # fmt: skip
    kl = torch.distributions.kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(p_mu, (p_logvar / 2).exp())).sum(-1)
    check(kl_divergence(mu, logvar, given, reduction=STEPS), kl, mu, logvar, p_mu, p_logvar)
    weighted = kl_divergence(mu, logvar, given, weighting=Weighting(2.0, "sample"), reduction=STEPS)
    check(weighted, kl.clamp_min(2.0), mu, logvar)


def test_a_posterior_that_is_a_distribution():
    (mu, logvar), x, logits = latents(), unit(B, T, F), real(B, T, F)
    got = fastelbo.loss(logits, x, Normal(mu, (logvar / 2).exp()), likelihood="bernoulli_logits", reduction=STEPS)
    check(got.loss, NLL["bernoulli_logits"](logits, x).sum(-1) + standard(mu, logvar).sum(-1), logits, mu, logvar)


def test_sample_kl_and_a_given_kl():
    (mu, logvar), x = latents(), unit(B, T, D)
    torch.manual_seed(3)
    whole = sample_kl(mu, logvar)
    torch.manual_seed(3)
    z, kl = sample_kl(mu, logvar, reduction=STEPS)
    assert torch.equal(z, whole.z)
    check(kl, standard(mu, logvar).sum(-1), mu, logvar)
    eps = torch.randn_like(mu)
    z, kl = sample_kl(mu, logvar, reduction=STEPS, eps=eps)
    torch.testing.assert_close(z, mu + (logvar / 2).exp() * eps)
    terms = fastelbo.loss(z, x, kl=kl, beta=0.3, likelihood="mse", reduction=STEPS)
    check(terms.loss, (z - x).square().sum(-1) + 0.3 * standard(mu, logvar).sum(-1), mu, logvar)


def test_elbo_and_module():
    """The decoder gets z as it is."""
    (mu, logvar), x, matrix, eps = latents(), unit(B, T, F), real(D, F), unit(B, T, D)
    kl = standard(mu, logvar).sum(-1)
    recon = ((mu + (logvar / 2).exp() * eps) @ matrix - x).square().sum(-1)
    got = fastelbo.elbo(lambda z: z @ matrix, x, mu, logvar, 0.5, likelihood="mse", reduction=STEPS, eps=eps)
    check(got.loss, recon + 0.5 * kl, mu, logvar, matrix)
    criterion = fastelbo.nn.ELBOLoss("mse", 0.5, STEPS)
    check(criterion(x + 0 * matrix.sum(), x, mu, logvar).loss, 0.5 * kl, mu, logvar)


def test_one_dimension_is_none():
    (mu, logvar), x = latents(), unit(B, T, D)
    for one in (PerSample(), PerSample(1)):
        found = fastelbo.loss(mu, x, mu, logvar, likelihood="mse", reduction=one)
        torch.testing.assert_close(tuple(found), tuple(fastelbo.loss(mu, x, mu, logvar, likelihood="mse", reduction="none")))
    three = fastelbo.loss(mu, x, mu, logvar, likelihood="mse", reduction=PerSample(3)).loss
    torch.testing.assert_close(three, (mu - x).square() + standard(mu, logvar))


def test_a_monitor_counts_steps():
    (mu, logvar), x, monitor = latents(), unit(B, T, D), Monitor()
    fastelbo.loss(mu, x, mu, logvar, likelihood="mse", reduction=STEPS, monitor=monitor)
    torch.testing.assert_close(monitor.kl_per_dimension, standard(mu, logvar).mean((0, 1)).detach())


def test_dreamer():
    """DreamerV3's losses of a Gaussian and of classes, `[B, T]`, in four lines."""
    (mu, logvar), (p_mu, p_logvar) = latents(), latents()
    q, p = real(B, T, D, 7), real(B, T, D, 7)
    # The four lines.
    free = Weighting(free_bits=1.0, free_bits_per="sample", balance=(0.1, 1.0))
    gaussian = kl_divergence(mu, logvar, (p_mu, p_logvar), weighting=free, reduction=STEPS)
    unimix = CategoricalPosterior(unimix=0.01)
    classes = kl_divergence(q, prior=p, posterior=unimix, weighting=free, reduction=STEPS)

    def parts(kl, posterior, prior):
        fixed = [[t.detach() for t in side] for side in (posterior, prior)]
        return 0.1 * kl(*posterior, *fixed[1]).clamp_min(1.0) + 1.0 * kl(*fixed[0], *prior).clamp_min(1.0)

    def of_normals(mu, logvar, p_mu, p_logvar):
        pair = Normal(mu, (logvar / 2).exp()), Normal(p_mu, (p_logvar / 2).exp())
        return torch.distributions.kl_divergence(*pair).sum(-1)

    def of_classes(q, p):
        q, p = (0.99 * t.softmax(-1) + 0.01 / 7 for t in (q, p))
        return (q * (q.log() - p.log())).sum((-1, -2))

    check(gaussian, parts(of_normals, (mu, logvar), (p_mu, p_logvar)), mu, logvar, p_mu, p_logvar)
    check(classes, parts(of_classes, (q,), (p,)), q, p)


def test_surrounded():
    (mu, logvar), x, logits = latents(), unit(B, T, F), real(B, T, F)

    def call(logits, x, mu, logvar):
        terms = fastelbo.loss(logits, x, mu, logvar, likelihood="bernoulli_logits", reduction=STEPS)
        return terms.loss + kl_divergence(mu, logvar, reduction=STEPS) + nll(logits, x, likelihood="mse", reduction=STEPS)

    expected = call(logits, x, mu, logvar)
    check(torch.compile(call, backend="aot_eager", fullgraph=True)(logits, x, mu, logvar), expected, logits, mu, logvar)
    grads = torch.func.grad(lambda *args: call(*args).sum(), (0, 2, 3))(logits.detach(), x, mu.detach(), logvar.detach())
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (logits, mu, logvar)))
    assert gradcheck(lambda m, lv: kl_divergence(m, lv, reduction=STEPS), (mu, logvar))


def test_of_nothing():
    mu = torch.zeros(0, T, D, device=DEVICE)
    assert kl_divergence(mu, mu, reduction=STEPS).shape == (0, T)


MU, LOGVAR, X = (torch.rand(B, T, D, device=DEVICE) for _ in range(3))
BAD = (
    (lambda: PerSample(0), ValueError, "PerSample.batch_dims must be at least 1, got 0"),
    (lambda: PerSample("2"), TypeError, "PerSample.batch_dims must be an integer"),
    (lambda: nll(X[0, 0], X[0, 0], reduction=STEPS), ValueError, r"x must have 2 batch dimensions.*PerSample\(batch_dims=2\)"),
    (lambda: nll(X.view(T, B, D), X, reduction=STEPS), ValueError, r"recon_x must begin with the batch dimensions \(3, 4\)"),
    (lambda: fastelbo.loss(X, X, MU[:, :2], LOGVAR[:, :2], reduction=STEPS), ValueError, "mu must begin with the batch"),
    (lambda: fastelbo.loss(X, X, kl=MU[:, 0, 0], reduction=STEPS), ValueError, "kl must begin with the batch dimensions"),
    (lambda: fastelbo.loss(X, X, reduction=STEPS), ValueError, "the reconstruction alone is fastelbo.nll"),
    (lambda: fastelbo.loss(X, 3.0, MU, LOGVAR, reduction=STEPS), TypeError, "x must be a tensor"),
    (lambda: nll(X, X, weight=X[:2], reduction=STEPS), ValueError, "weight must broadcast to x"),
    (lambda: sample_kl(MU, LOGVAR, eps=MU[0], reduction=STEPS), ValueError, "eps must begin with the batch dimensions"),
    (lambda: fastelbo.elbo(abs, X, MU, LOGVAR, bound=1, reduction=STEPS), TypeError, "bound must be"),
    (
        lambda: fastelbo.elbo(abs, X, MU, LOGVAR, bound=fastelbo.IWAE(2), eps=X, reduction=STEPS), ValueError,
        "eps must have behind n_samples the batch dimensions",
    ),
    (lambda: fastelbo.elbo(lambda z: z[:, 0], X, MU, LOGVAR, reduction=STEPS), ValueError, r"decoder\(z\) must begin with"),
    (lambda: fastelbo.elbo(abs, X[..., 0], MU, LOGVAR, reduction=STEPS), ValueError, r"decoder\(z\) must have the shape of x"),
    (lambda: kl_divergence(MU, LOGVAR, weighting=Weighting(1.0, "batch"), reduction=STEPS), ValueError, "about the batch"),
)  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


BAD_BEFORE = (
    ({"recon_weight": "a"}, TypeError, "recon_weight must be"),
    ({"beta": "a"}, TypeError, "beta must be"),
    ({"beta": torch.ones(7)}, ValueError, "beta must be"),
    ({"weighting": "a"}, TypeError, "weighting must be"),
    ({"weighting": Weighting(1.0, "batch")}, ValueError, "about the batch"),
    ({"monitor": "a"}, TypeError, "monitor must be"),
    ({"likelihood": "a"}, ValueError, "likelihood must be"),
    ({"mu": MU[:2], "logvar": LOGVAR[:2]}, ValueError, "mu must begin with the batch dimensions"),
)


@pytest.mark.parametrize(("changes", "error", "words"), BAD_BEFORE)
def test_errors_come_before_the_decoder_runs(changes, error, words):
    def decoder(z):
        raise AssertionError("it ran")

    with pytest.raises(error, match=words):
        fastelbo.elbo(decoder, X, **{"mu": MU, "logvar": LOGVAR, "reduction": STEPS} | changes)
    with pytest.raises(TypeError, match="pass the decoder alone, not the whole VAE"):
        fastelbo.elbo(lambda z: (X, MU, LOGVAR), X, MU, LOGVAR, reduction=STEPS)


# --- bounds of several samples


def terms_of_samples(mu, logvar, eps, matrix, x):
    """Of each sample and step: the reconstruction, and log q - log p."""
    z = mu + (logvar / 2).exp() * eps
    log_ratio = Normal(mu, (logvar / 2).exp()).log_prob(z).sum(-1) - Normal(0.0, 1.0).log_prob(z).sum(-1)
    return (z @ matrix - x).square().sum(-1), log_ratio


@pytest.mark.parametrize("chunk", (1, 2, 3))
def test_bounds_of_each_step(chunk):
    """The decoder gets all batch dimensions, and as many sequences as there are samples of them in a chunk."""
    (mu, logvar), x, matrix, eps = latents(), unit(B, T, F), real(D, F), torch.randn(3, B, T, D, device=DEVICE).double()
    rows = []

    def decoder(z):
        rows.append(tuple(z.shape))
        return z @ matrix

    recon, log_ratio = terms_of_samples(mu, logvar, eps, matrix, x)
    options = {"likelihood": "mse", "reduction": STEPS, "eps": eps}
    got = fastelbo.elbo(decoder, x, mu, logvar, 0.5, bound=fastelbo.IWAE(3, chunk=chunk), **options)
    check_in_chunks(got.loss, math.log(3) - torch.logsumexp(-recon - 0.5 * log_ratio, 0), mu, logvar, matrix)
    assert set(rows) == {(samples * B, T, D) for samples in {chunk, 3 % chunk} - {0}}
    got = fastelbo.elbo(decoder, x, mu, logvar, 0.5, bound=fastelbo.ELBO(3, chunk=chunk), **options)
    check_in_chunks(got.loss, recon.mean(0) + 0.5 * standard(mu, logvar).sum(-1), mu, logvar, matrix)


def check_in_chunks(got, expected, *wrt):
    """Whose backward runs the decoder again."""
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    true = torch.autograd.grad(expected, wrt, upstream, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got, wrt, upstream), true)


def test_a_decoder_may_return_a_distribution_or_numbers():
    (mu, logvar), x, matrix, eps = latents(), unit(B, T, F), real(D, F), unit(B, T, D)
    z = mu + (logvar / 2).exp() * eps
    expected = -Normal(z @ matrix, 0.5).log_prob(x).sum(-1)
    for make in (lambda mean: Independent(Normal(mean, 0.5), 1), lambda mean: (mean, 0.5)):
        given = {} if make(x).__class__ is Independent else {"likelihood": Gaussian()}
        got = fastelbo.elbo(lambda z, make=make: make(z @ matrix), x, mu, logvar, eps=eps, reduction=STEPS, **given)
        check(got.recon, expected, mu, logvar, matrix)


# --- in a user's surroundings


@pytest.mark.parametrize("name", ("nll", "loss", "kl_divergence", "sample_kl", "elbo"))
def test_second_derivatives_and_checkpoints(name):
    (mu, logvar), x, p, eps, weight = latents(), unit(B, T, D), real(B, T, D), unit(B, T, D), unit(B, T, 1)
    options = {"reduction": STEPS, "likelihood": "bernoulli_logits"}
    call = {
        "nll": lambda p, mu, logvar: nll(p, x, weight=weight, **options),
        "loss": lambda p, mu, logvar: fastelbo.loss(p, x, mu, logvar, 0.5, kl_weight=weight, recon_weight=2.0, **options).loss,
        "kl_divergence": lambda p, mu, logvar: kl_divergence(mu, logvar, prior=(p, mu), kl_weight=weight, reduction=STEPS),
        "sample_kl": lambda p, mu, logvar: sample_kl(mu, logvar, eps=eps, reduction=STEPS),
        "elbo": lambda p, mu, logvar: fastelbo.elbo(lambda z: z.exp() * p, x, mu, logvar, eps=eps, **options).loss,
    }[name]

    def scalar(value):
        parts = value if isinstance(value, tuple) else (value,)
        return sum((part.sin() * (1 + torch.arange(T, device=DEVICE).view(T, *[1] * (part.dim() - 2)))).sum() for part in parts)

    def gradient(value):
        return torch.autograd.grad(scalar(value), (p, mu, logvar), allow_unused=True, materialize_grads=True)

    again = checkpoint(call, p, mu, logvar, use_reentrant=False)
    torch.testing.assert_close(gradient(again), gradient(call(p, mu, logvar)), rtol=1e-12, atol=1e-12)
    assert gradgradcheck(call, (p, mu, logvar))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype):
    """What a decoder makes under autocast is of few bits; the values are of float32, and gradients reach the parameters."""
    (mu, logvar), x, layer = latents(), unit(B, T, F), torch.nn.Linear(D, F).to(DEVICE)
    mu, logvar, x = (t.detach().float().requires_grad_(t.requires_grad) for t in (mu, logvar, x))
    with torch.autocast(DEVICE.type, dtype):
        logits = layer(mu)
        found = fastelbo.loss(logits, x, mu, logvar, likelihood="bernoulli_logits", reduction=STEPS, recon_weight=0.5)
    assert logits.dtype == dtype and found.loss.dtype == torch.float32
    wide = logits.detach().double().requires_grad_()
    expected = NLL["bernoulli_logits"](wide, x.double()).sum(-1)
    torch.testing.assert_close(found.recon.double(), expected, rtol=1e-5, atol=0)
    (by_logits,) = torch.autograd.grad(found.loss.sum(), logits, retain_graph=True)
    (true,) = torch.autograd.grad(0.5 * expected.sum(), wide)
    assert by_logits.dtype == dtype
    torch.testing.assert_close(by_logits.double(), true, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    (by_bias,) = torch.autograd.grad(found.loss.sum(), layer.bias)
    torch.testing.assert_close(by_bias.double(), true.sum((0, 1)), rtol=0.05, atol=0.05)
