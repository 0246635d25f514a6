"""The same losses and gradients as code that people train VAEs with: pythae, scvi-tools, diffusers and the PyTorch examples."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pythae.models import VAE, BetaVAE, BetaVAEConfig, DisentangledBetaVAE, DisentangledBetaVAEConfig, VAEConfig
from scvi.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial
from scvi.module import VAE as SCVI
from scvi.train._trainingplans import _compute_kl_weight

import fastelbo
from fastelbo import schedules
from support import gradients, relative

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_same(found, expected, *inputs, tolerance=0.0) -> None:
    """All the results, and the gradients of their sum with a weight each; `tolerance` is for constants that one side adds."""
    tolerance = max(tolerance, 1e-5 if expected[0].dtype == torch.float32 else 1e-12)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative(one, other) < tolerance
    total, wanted = (sum((t * (1 + 0.5 * i)).sum() for i, t in enumerate(results)) for results in (found, expected))
    by_both = (gradients(t, *inputs, retain_graph=True) for t in (total, wanted))
    for one, other in zip(*by_both, strict=True):
        assert other.abs().max() > 0
        assert relative(one, other) < tolerance


def images(dtype=torch.float32, batch=5, shape=(1, 4, 4), latent=3):
    """Probabilities, images, mean and logarithm of the variance."""
    recon_x, x = torch.rand(batch, *shape, dtype=dtype), torch.rand(batch, *shape, dtype=dtype).round(decimals=1)
    mu, logvar = (torch.randn(batch, latent, dtype=dtype) for _ in range(2))
    return recon_x.requires_grad_(), x, mu.requires_grad_(), logvar.requires_grad_()


# PyTorch examples


@DTYPES
def test_pytorch_examples(dtype):
    """vae/main.py: the cross-entropy and -0.5 (1 + logvar - mu^2 - exp(logvar)), each summed over everything."""
    recon_x, x, mu, logvar = images(dtype)
    cross_entropy = F.binary_cross_entropy(recon_x, x, reduction="sum")
    divergence = -0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar))
    expected = cross_entropy + divergence, cross_entropy, divergence
    assert_same(fastelbo.loss(recon_x, x, mu, logvar), expected, recon_x, mu, logvar)


# pythae: a mean over the batch of sums; its "mse" has the 1/2 of a Gaussian, without the constant.

PYTHAE = {"input_dim": (1, 4, 4), "latent_dim": 3}
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi) * 16  # of an image


def pythae_terms(model, x, recon_x, mu, logvar, *more):
    """Those of the model, and what it calls them."""
    return model.loss_function(recon_x, x, mu, logvar, None, *more)


def gaussian(terms):
    """The Gaussian of unit variance without its constant."""
    return terms.loss - HALF_LOG_2PI, terms.recon - HALF_LOG_2PI, terms.kl


@DTYPES
@pytest.mark.parametrize("beta", (None, 4.0), ids=("vae", "beta_vae"))
def test_pythae_bce(beta, dtype):
    options = {**PYTHAE, "reconstruction_loss": "bce"}
    model = VAE(VAEConfig(**options)) if beta is None else BetaVAE(BetaVAEConfig(**options, beta=beta))
    recon_x, x, mu, logvar = images(dtype)
    expected = pythae_terms(model, x, recon_x, mu, logvar)
    found = fastelbo.loss(recon_x, x, mu, logvar, beta or 1.0, reduction="batchmean")
    assert_same(found, expected, recon_x, mu, logvar)


@DTYPES
@pytest.mark.parametrize("beta", (None, 4.0), ids=("vae", "beta_vae"))
def test_pythae_mse(beta, dtype):
    """In two ways: as a Gaussian, and as half of a loss with twice the beta."""
    options = {**PYTHAE, "reconstruction_loss": "mse"}
    model = VAE(VAEConfig(**options)) if beta is None else BetaVAE(BetaVAEConfig(**options, beta=beta))
    beta = beta or 1.0
    recon_x, x, mu, logvar = images(dtype)
    expected = pythae_terms(model, x, recon_x, mu, logvar)
    found = fastelbo.loss(recon_x, x, mu, logvar, beta, likelihood="gaussian", reduction="batchmean")
    assert_same(gaussian(found), expected, recon_x, mu, logvar)
    found = fastelbo.loss(recon_x, x, mu, logvar, 2 * beta, likelihood="mse", reduction="batchmean")
    assert_same((0.5 * found.loss, 0.5 * found.recon, found.kl), expected, recon_x, mu, logvar)


@DTYPES
@pytest.mark.parametrize("epoch", (0, 3, 100))
@pytest.mark.parametrize("loss", ("bce", "mse"))
def test_pythae_disentangled(loss, epoch, dtype):
    """A capacity that rises with the epochs, held against each sample's KL."""
    config = DisentangledBetaVAEConfig(**PYTHAE, reconstruction_loss=loss, beta=7.0, C=4.0, warmup_epoch=5)
    recon_x, x, mu, logvar = images(dtype)
    expected = pythae_terms(DisentangledBetaVAE(config), x, recon_x, mu, logvar, epoch)
    capacity = schedules.linear(config.warmup_epoch + 1, 0.0, config.C)(epoch)
    found = fastelbo.loss(
        recon_x, x, mu, logvar, config.beta,
        weighting=fastelbo.Weighting(capacity=capacity, capacity_per="sample"),
        likelihood="bernoulli" if loss == "bce" else "gaussian", reduction="batchmean",
    )  # fmt: skip
    assert_same(found if loss == "bce" else gaussian(found), expected, recon_x, mu, logvar)


@pytest.mark.parametrize("loss", ("bce", "mse"))
def test_pythae_training_step(loss):
    """Of a whole model, from the same noise: the gradients of all its parameters."""
    model = BetaVAE(BetaVAEConfig(**PYTHAE, reconstruction_loss=loss, beta=2.5))
    _, x, _, _ = images()
    parameters = tuple(model.parameters())

    torch.manual_seed(7)
    output = model({"data": x})
    expected = output.loss, output.recon_loss, output.reg_loss

    torch.manual_seed(7)
    latent = model.encoder(x)
    found = fastelbo.elbo(
        lambda z: model.decoder(z).reconstruction, x, latent.embedding, latent.log_covariance, 2.5,
        likelihood="bernoulli" if loss == "bce" else "gaussian", reduction="batchmean",
    )  # fmt: skip
    assert_same(found if loss == "bce" else gaussian(found), expected, *parameters)


# diffusers: the posterior of latent diffusion's autoencoder, whose loss has sums over an image, meaned over the batch.


@DTYPES
@pytest.mark.parametrize("spread", (1, 20), ids=("ordinary", "clamped"))
def test_diffusers_posterior(spread, dtype):
    """The logarithm of the variance is clamped to [-30, 20]."""
    mean, second = torch.randn(3, 4, 4, 4, dtype=dtype), spread * torch.randn(3, 4, 4, 4, dtype=dtype)
    assert bool(((second < -30).any() and (second > 20).any()).item()) == (spread > 1)
    parameters = torch.cat((mean, second), 1).requires_grad_()
    posterior = DiagonalGaussianDistribution(parameters)
    options = {"posterior": fastelbo.Posterior(clamp=(-30, 20))}
    recon_x, x = (torch.randn(3, 3, 8, 8, dtype=dtype, requires_grad=wants) for wants in (True, False))
    nll, divergence = (recon_x - x).square().sum() / len(x), posterior.kl().sum() / len(x)
    mu, logvar = parameters.chunk(2, 1)
    found = fastelbo.loss(recon_x, x, mu, logvar, 1e-6, likelihood="mse", reduction="batchmean", **options)
    assert_same(found, (nll + 1e-6 * divergence, nll, divergence), recon_x, parameters)
    outside = [gradients(kl, parameters, retain_graph=True)[0][:, 4:] == 0 for kl in (found.kl, divergence)]
    assert torch.equal(*outside)

    torch.manual_seed(7)
    expected = posterior.sample()
    torch.manual_seed(7)
    assert_same((fastelbo.reparameterize(mu, logvar, **options),), (expected,), parameters)


# scvi-tools: counts of genes; its distributions add 1e-8 inside of logarithms, which shows in float64.


def counts(dtype, cells=6, genes=40):
    """Mean, inverse dispersion, logits of the extra zeros, and counts of which a third are zero."""
    mean, inverse_dispersion = (torch.empty(cells, genes, dtype=dtype).uniform_(-2, 4).exp() for _ in range(2))
    x = torch.poisson(torch.distributions.Gamma(inverse_dispersion, inverse_dispersion / mean).sample())
    x[torch.rand(cells, genes) < 0.33] = 0
    return mean.requires_grad_(), inverse_dispersion.requires_grad_(), torch.randn_like(mean).requires_grad_(), x


@DTYPES
@pytest.mark.parametrize("reduction", ("none", "batchmean", "mean"))
@pytest.mark.parametrize("likelihood", ("negative_binomial", "zero_inflated_negative_binomial"))
def test_scvi_distributions(likelihood, reduction, dtype):
    mean, inverse_dispersion, logits, x = counts(dtype)
    if likelihood == "negative_binomial":
        parameters = mean, inverse_dispersion
        distribution = NegativeBinomial(mu=mean, theta=inverse_dispersion)
    else:
        parameters = mean, inverse_dispersion, logits
        distribution = ZeroInflatedNegativeBinomial(mu=mean, theta=inverse_dispersion, zi_logits=logits)
    nll = -distribution.log_prob(x)
    reduced = {"none": nll.sum(1), "batchmean": nll.sum(1).mean(), "mean": nll.mean()}[reduction]
    kl = torch.zeros_like(reduced)
    found = fastelbo.loss(parameters, x, kl=kl, likelihood=likelihood, reduction=reduction)
    assert_same(found[:2], (reduced, reduced), *parameters, tolerance=1e-6)


@pytest.mark.parametrize("dispersion", ("gene", "gene-cell"))
@pytest.mark.parametrize("likelihood", ("nb", "zinb"))
def test_scvi_module(likelihood, dispersion):
    """The loss of a whole model, with one dispersion a gene or one an element, and the gradients of its parameters."""
    kinds = {"nb": "negative_binomial", "zinb": "zero_inflated_negative_binomial"}
    model = SCVI(n_input=12, n_hidden=8, n_latent=3, gene_likelihood=likelihood, dispersion=dispersion)
    x = torch.poisson(torch.full((7, 12), 3.0))
    tensors = {"X": x, "batch": torch.zeros(7, 1), "labels": torch.zeros(7, 1)}
    inferred, generated, expected = model(tensors, loss_kwargs={"kl_weight": 0.3})
    posterior, decoded = inferred["qz"], generated["px"]
    # As the model has it, [12] where it is a gene's.
    theta = torch.exp(model.px_r) if dispersion == "gene" else decoded.theta
    parameters = (decoded.mu, theta) if likelihood == "nb" else (decoded.mu, theta, decoded.zi_logits)
    found = fastelbo.loss(
        parameters, x, posterior.loc, posterior.scale, 0.3,
        likelihood=kinds[likelihood], posterior="std", reduction="batchmean",
    )  # fmt: skip
    assert relative(found.loss, expected.loss) < 1e-5
    assert relative(found.recon, expected.reconstruction_loss["reconstruction_loss"].mean()) < 1e-5
    assert relative(found.kl, expected.kl_local["kl_divergence_z"].mean()) < 1e-5
    trained = list(model.parameters())
    for one, other in zip(
        *(gradients(t, *trained, allow_unused=True, retain_graph=True) for t in (found.loss, expected.loss)), strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None:
            # Near zero where a bias is followed by a normalization, so not by its own size.
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("least, most", ((0.0, 1.0), (0.25, 0.75)))
def test_scvi_warm_up(least, most):
    schedule = schedules.linear(40, least, most)
    for step in (0, 1, 13, 39, 40, 1000):
        assert schedule(step) == pytest.approx(_compute_kl_weight(0, step, None, 40, most, least), rel=1e-15)
