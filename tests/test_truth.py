"""Bounds, estimators and importance sampling against models whose log p(x) and posterior are known in closed form."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as torch_kl

import fastelbo
from conftest import INTERPRETED
from fastelbo import ELBO, IWAE
from fastelbo.likelihoods import Gaussian
from ppca import PPCA, make_ppca, maximization, maximum_likelihood, relative_variance, sigma_points
from support import gradients

# The interpreter runs a program for each sample of each datum, in 10 ms or so.
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="takes too many samples to interpret")

B, LATENT, FEATURES = 3, 2, 5
FAR = 5.0  # standard errors; one mean in a million is farther off


def assert_equal(value, truth, atol=1e-10):
    torch.testing.assert_close(value, truth, rtol=0, atol=atol)


def normal(*shape, device="cpu"):
    return torch.randn(shape, dtype=torch.float64, device=device)


def make_model(device, orthogonal=False) -> tuple[PPCA, torch.Tensor]:
    """A model, and data from it."""
    model = make_ppca(FEATURES, LATENT, 0.7, device)
    model = model.orthogonal() if orthogonal else model
    return model, model.decode(normal(B, LATENT, device=device)) + model.scale * normal(B, FEATURES, device=device)


def wide_posterior(model, x, device) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and logvar of a q that is off the posterior, and wider, so that the importance weights have a finite variance."""
    mu, logvar = model.diagonal_posterior(x)
    signs = normal(*mu.shape, device=device).sign()
    return mu + signs * torch.exp(0.5 * logvar), logvar + math.log(2)


def evaluate(model, x, mu, logvar, bound, **kwargs) -> fastelbo.ELBOTerms:
    kwargs |= {"likelihood": Gaussian(scale=model.scale), "reduction": "none"}
    return fastelbo.elbo(model.decode, x, mu, logvar, bound=bound, **kwargs)


def exact_elbo(model, x, mu, logvar) -> torch.Tensor:
    """The ELBO by fastelbo, `[B]`. The integrand is quadratic in z, so a mean over sigma points is the expectation."""
    eps = sigma_points(mu)
    return -evaluate(model, x, mu, logvar, ELBO(len(eps), chunk=len(eps)), eps=eps).loss


def diagonal(mu, logvar) -> MultivariateNormal:
    return MultivariateNormal(mu, scale_tril=torch.diag_embed(torch.exp(0.5 * logvar)))


# What bounds and log p(x) are to each other.


@pytest.mark.parametrize("chunk", (1, 3, 2 * LATENT))
def test_log_p_is_the_elbo_and_the_kl_from_the_posterior(chunk, device):
    model, x = make_model(device)
    mu, logvar = normal(B, LATENT, device=device), normal(B, LATENT, device=device)
    eps = sigma_points(mu)
    loss, recon, kl = evaluate(model, x, mu, logvar, ELBO(len(eps), chunk=chunk), eps=eps)
    q = diagonal(mu, logvar)
    assert_equal(-loss + torch_kl(q, model.posterior(x)), model.log_p(x))
    assert_equal(recon, model.reconstruction(x, mu, logvar))
    assert_equal(kl, torch_kl(q, diagonal(torch.zeros_like(mu), torch.zeros_like(mu))))


def test_no_q_is_above_log_p(device):
    model, x = make_model(device)
    copies = 4 if INTERPRETED else 16
    mean, covariance = model.posterior(x).mean, model.posterior(x).covariance_matrix
    log_p = model.log_p(x).repeat(copies)
    # The best diagonal q has the posterior's mean, and variances from the diagonal of its precision.
    best = -torch.linalg.inv(covariance).diagonal(dim1=-2, dim2=-1).log()
    best = mean, best.expand_as(mean).contiguous()
    near = [t.repeat(copies, 1) + 0.1 * normal(copies * B, LATENT, device=device) for t in best]
    values = exact_elbo(model, x.repeat(copies, 1), *near)
    assert (values < exact_elbo(model, x, *best).repeat(copies)).all()
    assert (values < log_p).all()


@pytest.mark.parametrize("bound", (IWAE(1), IWAE(5, chunk=2), IWAE(5, chunk=5)), ids=str)
def test_the_posterior_leaves_no_gap(bound, device):
    model, x = make_model(device, orthogonal=True)
    mu, logvar = model.diagonal_posterior(x)
    assert_equal(exact_elbo(model, x, mu, logvar), model.log_p(x))
    # p(x, z) / q(z) is p(x) for every z, so every draw is exact.
    assert_equal(-evaluate(model, x, mu, logvar, bound).loss, model.log_p(x))


def test_one_dimension(device):
    """p(z) = N(0, 1), p(x | z) = N(z, 1/2), q = N(x / 1.5, 0.33) and x = 1, with variances as second arguments."""
    mean, variance = 1 / 1.5, 0.33
    reconstruction = -0.5 * math.log(2 * math.pi * 0.5) - ((1 - mean) ** 2 + variance) / (2 * 0.5)
    kl = 0.5 * (variance + mean**2 - 1 - math.log(variance))
    log_p = -0.5 * math.log(2 * math.pi * 1.5) - 1 / (2 * 1.5)
    ratio = variance / (1 / 3)  # the posterior is N(x / 1.5, 1/3)
    gap = 0.5 * (ratio - 1 - math.log(ratio))
    assert math.isclose(reconstruction - kl + gap, log_p, rel_tol=1e-14)
    assert 0 < gap < 1e-4
    x, mu, logvar = (torch.full((1, 1), value, dtype=torch.float64, device=device) for value in (1, mean, math.log(variance)))
    model = PPCA(torch.ones_like(x), torch.zeros_like(x[0]), math.sqrt(0.5))
    value = exact_elbo(model, x, mu, logvar).item()
    assert math.isclose(value, reconstruction - kl, rel_tol=1e-14)
    assert math.isclose(value + gap, log_p, rel_tol=1e-14)


def test_more_of_the_same_samples_tighten_the_bound(device):
    """The bound of all samples is above the mean of those of equal groups of them (Burda et al., 2016, theorem 1)."""
    model, x = make_model(device)
    mu, logvar = normal(B, LATENT, device=device), normal(B, LATENT, device=device)
    eps = normal(8, B, LATENT, device=device)
    values = []
    for k in (1, 2, 8):
        groups = len(eps) // k
        inputs = [t.repeat(groups, 1) for t in (x, mu, logvar)]
        terms = evaluate(model, *inputs, IWAE(k, chunk=4), eps=eps.view(k, groups * B, LATENT))
        values.append(-terms.loss.view(groups, B).mean(0))
    assert (values[0] < values[1]).all()
    assert (values[1] < values[2]).all()
    # With one sample it is the log ratio itself.
    z = mu + torch.exp(0.5 * logvar) * eps
    log_w = model.log_joint(x, z) - diagonal(mu, logvar).log_prob(z)
    assert_equal(values[0], log_w.mean(0))


@not_interpreted
def test_iwae_rises_to_log_p(device):
    model, x = make_model(device, orthogonal=True)
    mu, logvar = wide_posterior(model, x, device)
    copies, counts = 3000, (1, 4, 16, 64)
    inputs = [t[:1].repeat(copies, 1) for t in (x, mu, logvar)]
    log_p, variance = model.log_p(x)[0], relative_variance(model.posterior(x), mu, logvar)[0].item()

    def moments(values):
        return values.mean().item(), values.std().item() / math.sqrt(copies)

    means, errors = [], []
    for k in counts:
        values = -evaluate(model, *inputs, IWAE(k, chunk=16)).loss
        mean, error = moments(values)
        means.append(mean)
        errors.append(error)
        # What it is the logarithm of is an unbiased estimate of p(x), and by that the gap's own estimate has a smaller error.
        ratio = torch.exp(values - log_p)
        mean, error = moments(ratio)
        assert abs(mean - 1) < FAR * error
        # The gap is Var(w) / (2 K) and terms of 1 / K^2 (Domke and Sheldon, 2018, theorem 3).
        leading = variance / (2 * k)
        mean, error = moments(ratio - 1 - (values - log_p))
        assert abs(mean - leading) < FAR * error + 2 * leading**2
    assert_equal(means[0], exact_elbo(model, x, mu, logvar)[0].item(), atol=FAR * errors[0])  # with one sample it is the ELBO
    for i in range(1, len(counts)):
        assert means[i] - means[i - 1] > 3 * math.hypot(errors[i], errors[i - 1])


@pytest.mark.parametrize("chunk", (3, 8))
def test_log_likelihood_is_its_formula(chunk, device):
    model, x = make_model(device)
    mu, logvar = normal(B, LATENT, device=device), normal(B, LATENT, device=device)
    eps = normal(8, B, LATENT, device=device)
    log_p, error = fastelbo.log_likelihood(
        model.decode, x, mu, logvar, n_samples=8, eps=eps, chunk=chunk, likelihood=Gaussian(scale=model.scale)
    )
    z = mu + torch.exp(0.5 * logvar) * eps
    ratios = torch.exp(model.log_joint(x, z) - diagonal(mu, logvar).log_prob(z))
    assert_equal(log_p, ratios.mean(0).log())
    assert_equal(error, ratios.std(0) / math.sqrt(8) / ratios.mean(0))


def test_log_likelihood_is_within_its_error(device):
    model, x = make_model(device, orthogonal=True)
    log_p, error = fastelbo.log_likelihood(
        model.decode, x, *wide_posterior(model, x, device), n_samples=16 if INTERPRETED else 5000,
        chunk=8 if INTERPRETED else 50, likelihood=Gaussian(scale=model.scale),
    )  # fmt: skip
    assert ((log_p - model.log_p(x)).abs() < 4 * error).all()
    assert error.max() < (0.8 if INTERPRETED else 0.05)


@not_interpreted
def test_the_error_of_log_likelihood_is_the_spread(device):
    model, x = make_model(device, orthogonal=True)
    mu, logvar = wide_posterior(model, x, device)
    copies, n_samples = 100, 5000
    log_p, error = fastelbo.log_likelihood(
        model.decode, *(t.repeat(copies, 1) for t in (x, mu, logvar)), n_samples=n_samples, chunk=500,
        likelihood=Gaussian(scale=model.scale),
    )  # fmt: skip
    exact = (relative_variance(model.posterior(x), mu, logvar) / n_samples).sqrt()
    off = (log_p - model.log_p(x).repeat(copies)).view(copies, B)
    assert (off.mean(0).abs() < FAR * exact / math.sqrt(copies)).all()
    spread = off.square().mean(0).sqrt()
    assert ((spread / exact).log().abs() < FAR / math.sqrt(2 * copies)).all()
    torch.testing.assert_close(error, exact.repeat(copies), rtol=0.2, atol=0)
    torch.testing.assert_close(error.view(copies, B).mean(0), exact, rtol=0.02, atol=0)


# Learning.


def make_data(eigenvalues, device, n=20) -> torch.Tensor:
    """Data whose sample covariance has these eigenvalues: the larger the noise, the faster is EM."""
    features = len(eigenvalues)
    noise = normal(n, features, device=device)
    white = math.sqrt(n) * torch.linalg.svd(noise - noise.mean(0), full_matrices=False).U
    turn = torch.linalg.qr(normal(features, features, device=device)).Q
    return (white * torch.tensor(eigenvalues).to(white).sqrt()) @ turn + normal(features, device=device)


def test_em_climbs_to_the_maximum(device):
    if INTERPRETED:
        x, latent, iterations = make_data((2.5, 1.0, 0.8), device, n=4), 1, 15
    else:
        x, latent, iterations = make_data((4.0, 3.0, 1.0, 0.8, 0.7), device), 2, 30
    optimum, scale = maximum_likelihood(x, latent)
    model = make_ppca(x.shape[1], latent, 1.0, device).orthogonal()
    bounds = []
    for _ in range(iterations):
        mu, logvar = model.diagonal_posterior(x)
        bounds.append(exact_elbo(model, x, mu, logvar).mean())
        assert_equal(bounds[-1], model.log_p(x).mean())
        model = maximization(x, mu, logvar)
        bounds.append(exact_elbo(model, x, mu, logvar).mean())
        # Posteriors of orthogonal columns are diagonal, and N(0, I) is the same for a z that was turned.
        model = model.orthogonal()
    steps = torch.stack(bounds).diff()
    assert steps.min() > -1e-9
    assert steps[:4].min() > 1e-3
    assert_equal(bounds[-1].item(), optimum, atol=1e-5)
    assert_equal(model.scale, scale, atol=1e-4)


@not_interpreted
def test_amortized_training_reaches_the_maximum(device):
    """The ELBO of a linear VAE has the maximum-likelihood model as its maximum (Lucas et al., Don't blame the ELBO!, 2019)."""
    x = make_data((4.0, 3.0, 1.0, 0.8, 0.7), device)
    optimum, scale = maximum_likelihood(x, 2)
    encoder, decoder = torch.nn.Linear(5, 2).to(x), torch.nn.Linear(2, 5).to(x)
    logvar, log_scale = (torch.zeros(shape).to(x).requires_grad_() for shape in ((2,), ()))
    eps = sigma_points(encoder(x).detach())
    learned = [*encoder.parameters(), *decoder.parameters(), logvar, log_scale]
    optimizer = torch.optim.LBFGS(learned, max_iter=200, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        mu = encoder(x)
        return fastelbo.elbo(
            lambda z: (decoder(z), log_scale.exp()), x, mu, logvar.expand_as(mu), likelihood="gaussian",
            bound=ELBO(len(eps)), eps=eps, reduction="batchmean",
        ).loss  # fmt: skip

    def step():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(step)
    reached = -objective().item()
    assert reached < optimum + 1e-12
    assert reached > optimum - 1e-8
    found = PPCA(decoder.weight.detach(), decoder.bias.detach(), log_scale.exp().item())
    assert_equal(found.log_p(x).mean().item(), optimum, atol=1e-8)
    assert_equal(found.scale, scale, atol=1e-4)
    assert_equal(found.bias, x.mean(0), atol=1e-3)


# Gradients.

BOUNDS = {"elbo": ELBO, **{name: partial(IWAE, estimator=name) for name in ("standard", "stl", "dreg")}}
VARIANTS = ("plain", "beta", "prior", "log_std", "learned beta", "learned scale")
SAMPLES = 4


class Problem:
    """A small VAE with a nonlinear decoder; of the variants, all that can have a gradient has one."""

    def __init__(self, variant, device):
        def leaf(*shape):
            return normal(*shape, device=device).requires_grad_()

        self.mu, self.second, self.x = leaf(3, 2), leaf(3, 2), leaf(3, 5)
        self.weight, self.bias, self.output = leaf(4, 2), leaf(4), leaf(5, 4)
        self.eps, self.factor = normal(SAMPLES, 3, 2, device=device), normal(3, device=device)
        self.leaves = [self.mu, self.second, self.x, self.weight, self.bias, self.output]
        self.beta, self.scale, self.prior = 1.0, 0.6, None
        self.posterior = "log_std" if variant == "log_std" else "logvar"
        if variant == "beta":
            self.beta = 0.7
        elif variant == "learned beta":
            self.beta = torch.tensor(0.7).to(self.x).requires_grad_()
            self.leaves.append(self.beta)
        elif variant == "learned scale":
            self.scale = torch.tensor(0.6).to(self.x).requires_grad_()
            self.leaves.append(self.scale)
        elif variant == "prior":
            self.prior = leaf(2), leaf(2)
            self.leaves += self.prior

    def decode(self, z):
        return torch.tanh(z @ self.weight.T + self.bias) @ self.output.T

    def by_fastelbo(self, kind, chunk, **kwargs):
        decoder, likelihood = self.decode, "gaussian"
        if isinstance(self.scale, float):
            likelihood = Gaussian(scale=self.scale)
        else:
            decoder = lambda z: (self.decode(z), self.scale)  # noqa: E731
        return fastelbo.elbo(
            decoder, self.x, self.mu, self.second, self.beta, likelihood=likelihood, posterior=self.posterior, prior=self.prior,
            bound=BOUNDS[kind](SAMPLES, chunk=chunk), eps=self.eps, **kwargs,
        )  # fmt: skip

    def naive(self, kind):
        """Loss, reconstruction and KL, `[3]` each, of all samples at once."""
        std = torch.exp(self.second if self.posterior == "log_std" else 0.5 * self.second)
        q = Normal(self.mu, std)
        p = Normal(0 * self.mu, 0 * std + 1)
        if self.prior is not None:
            p = Normal(self.prior[0].expand_as(std), torch.exp(0.5 * self.prior[1]).expand_as(std))
        z = self.mu + std * self.eps
        likelihood = Normal(self.decode(z), self.scale).log_prob(self.x).sum(2)
        recon, kl = -likelihood.mean(0), torch_kl(q, p).sum(1)
        if kind == "elbo":
            return recon + self.beta * kl, recon, kl
        if kind != "standard":
            q = Normal(self.mu.detach(), std.detach())
        log_w = likelihood - self.beta * (q.log_prob(z) - p.log_prob(z)).sum(2)
        if kind == "dreg":
            factor = ((1 - self.beta) + self.beta * log_w.softmax(0)[..., None]).detach()
            z.register_hook(lambda g: g * factor)
        return math.log(SAMPLES) - log_w.logsumexp(0), recon.detach(), kl.detach()


# Interpreted, a third of them, in which each two of the options meet.
CASES = [
    (kind, variant, chunk)
    for i, kind in enumerate(BOUNDS)
    for j, variant in enumerate(VARIANTS)
    for k, chunk in enumerate((1, 2, SAMPLES))
    if not INTERPRETED or (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("kind", "variant", "chunk"), CASES)
def test_gradients_are_those_of_the_naive_formula(kind, variant, chunk, device):
    problem = Problem(variant, device)
    terms = problem.by_fastelbo(kind, chunk, reduction="none")
    truth = problem.naive(kind)
    assert_equal([t.detach() for t in terms], [t.detach() for t in truth])
    assert [t.requires_grad for t in terms] == [t.requires_grad for t in truth]
    assert_equal(
        gradients((problem.factor * terms.loss).sum(), *problem.leaves),
        gradients((problem.factor * truth[0]).sum(), *problem.leaves),
    )


@pytest.mark.parametrize(
    ("kind", "reduction"), (("elbo", "batchmean"), ("standard", "sum"), ("stl", "batchmean"), ("dreg", "batchmean"))
)
def test_reduced_gradients_are_those_of_the_naive_formula(kind, reduction, device):
    problem = Problem("beta", device)
    terms = problem.by_fastelbo(kind, 2, reduction=reduction)
    truth = [t.sum() / (3 if reduction == "batchmean" else 1) for t in problem.naive(kind)]
    assert_equal([t.detach() for t in terms], [t.detach() for t in truth])
    assert_equal(gradients(terms.loss, *problem.leaves), gradients(truth[0], *problem.leaves))


@pytest.mark.parametrize("chunk", (1, 4))
def test_no_variance_at_the_optimum(chunk, device):
    """Where q is the posterior, held log q makes log w constant in z, for all noise."""
    model, x = make_model(device, orthogonal=True)
    latents = [t.requires_grad_() for t in model.diagonal_posterior(x)]
    found = {}
    for kind in ("standard", "stl", "dreg"):
        loss = evaluate(model, x, *latents, BOUNDS[kind](4, chunk=chunk)).loss.sum()
        found[kind] = torch.stack(gradients(loss, *latents))
    assert_equal(found["stl"], torch.zeros_like(found["stl"]))
    assert_equal(found["dreg"], torch.zeros_like(found["dreg"]))
    assert found["standard"].abs().mean() > 0.1


@not_interpreted
@pytest.mark.parametrize("beta", (1.0, 0.5))
def test_dreg_is_unbiased(beta, device):
    """It has the mean of the standard gradient (Tucker et al., 2019), and at beta = 1 less variance."""
    model, x = make_model(device, orthogonal=True)
    copies = 20_000
    inputs = [t[:1].repeat(copies, 1) for t in (x, *wide_posterior(model, x, device))]
    found = {}
    for kind in ("standard", "dreg"):
        latents = [t.detach().requires_grad_() for t in inputs[1:]]
        loss = evaluate(model, inputs[0], *latents, BOUNDS[kind](4, chunk=4), beta=beta).loss.sum()
        found[kind] = torch.cat(gradients(loss, *latents), 1)
    means, variances = ([g.mean(0) for g in found.values()], [g.var(0) for g in found.values()])
    error = torch.sqrt((variances[0] + variances[1]) / copies)
    assert ((means[0] - means[1]).abs() < FAR * error).all()
    assert (means[0].abs() > 2 * FAR * error).any()
    if beta == 1.0:
        assert (variances[1] < 0.5 * variances[0]).all()


# log q(z | x) and log p(z) of samples.


def make_latents(device, shape=(B, LATENT)) -> tuple[torch.Tensor, ...]:
    """mu, the second parameter, and those of a prior, whose mean is one for all data; all require grad."""
    return tuple((0.5 * normal(*s, device=device)).requires_grad_() for s in (shape, shape, shape[1:], shape))


def deviation(second, posterior) -> torch.Tensor:
    return torch.exp(second if posterior == "log_std" else 0.5 * second)


def prior_for(prior, mu, posterior="logvar") -> Normal:
    if prior is None:
        return Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return Normal(prior[0].expand_as(mu), deviation(prior[1], posterior).expand_as(mu))


def assert_same_gradients(outputs, truths, leaves) -> None:
    """Values, and gradients of all outputs together, each element with a factor of its own."""
    assert_equal([t.detach() for t in outputs], [t.detach() for t in truths])
    factors = [torch.randn_like(t) for t in truths]
    assert_equal(
        torch.autograd.grad(outputs, leaves, factors),
        torch.autograd.grad(truths, leaves, factors),
    )


@pytest.mark.parametrize("n_samples", (None, 3))
@pytest.mark.parametrize("learned_prior", (False, True), ids=("", "prior"))
@pytest.mark.parametrize("posterior", ("logvar", "log_std"))
def test_log_densities_of_samples(posterior, learned_prior, n_samples, device):
    mu, second, *prior = make_latents(device)
    leaves = [mu, second, *prior] if learned_prior else [mu, second]
    prior = tuple(prior) if learned_prior else None
    eps = normal(*(() if n_samples is None else (n_samples,)), B, LATENT, device=device)
    result = fastelbo.sample_log_ratio(mu, second, posterior=posterior, prior=prior, n_samples=n_samples, eps=eps)
    q = Normal(mu, deviation(second, posterior))
    z = q.loc + q.scale * eps
    truth = z, q.log_prob(z).sum(-1), prior_for(prior, mu, posterior).log_prob(z).sum(-1)
    assert_same_gradients(result, truth, leaves)
    # Its own noise: the densities belong to the sample that comes with them.
    z, log_q, log_p = fastelbo.sample_log_ratio(mu, second, posterior=posterior, prior=prior, n_samples=n_samples)
    assert_equal(log_q, q.log_prob(z).sum(-1))
    assert_equal(log_p, prior_for(prior, mu, posterior).log_prob(z).sum(-1))


@pytest.mark.parametrize("learned_prior", (False, True), ids=("", "prior"))
def test_their_mean_is_the_kl(learned_prior, device):
    # Of many dimensions the error of the mean is small after few samples.
    mu, second, *prior = (t.detach() for t in make_latents(device, (2, 100)))
    prior = tuple(prior) if learned_prior else None
    samples = fastelbo.sample_log_ratio(mu, second, prior=prior, n_samples=40 if INTERPRETED else 10_000)
    ratio = samples.log_q - samples.log_p
    error = ratio.std(0) / math.sqrt(len(ratio))
    truth = torch_kl(Normal(mu, torch.exp(0.5 * second)), prior_for(prior, mu)).sum(1)
    assert_equal(fastelbo.kl_divergence(mu, second, prior, reduction="none"), truth)
    assert ((ratio.mean(0) - truth).abs() < FAR * error).all()
    assert (error < 0.1 * truth).all()


class Affine:
    """The flow z = A z0 + c of a triangular A, with one negative element on its diagonal."""

    def __init__(self, device):
        diagonal = torch.tensor([0.7, -1.5]).to(device, torch.float64).diag()
        self.raw = (normal(LATENT, LATENT, device=device).tril(-1) + diagonal).requires_grad_()
        self.c = normal(LATENT, device=device).requires_grad_()

    @property
    def a(self):
        return self.raw.tril()

    def __call__(self, z):
        return z @ self.a.T + self.c, self.a.diagonal().abs().log().sum().expand(len(z))

    def pushed(self, mu, std) -> MultivariateNormal:
        """The exact distribution of what it makes of N(mu, std^2)."""
        a = self.a * std[:, None, :]
        return MultivariateNormal(mu @ self.a.T + self.c, a @ a.mT)


@pytest.mark.parametrize("n_samples", (None, 3))
def test_flow(n_samples, device):
    mu, logvar, *prior = make_latents(device)
    flow = Affine(device)
    eps = normal(*(() if n_samples is None else (n_samples,)), B, LATENT, device=device)
    result = fastelbo.sample_log_ratio(mu, logvar, prior=tuple(prior), flow=flow, n_samples=n_samples, eps=eps)
    std = deviation(logvar, "logvar")
    z = (mu + std * eps) @ flow.a.T + flow.c
    truth = z, flow.pushed(mu, std).log_prob(z), prior_for(prior, mu).log_prob(z).sum(-1)
    assert_same_gradients(result, truth, [mu, logvar, *prior, flow.raw, flow.c])


@not_interpreted
def test_kl_of_a_flow(device):
    mu, logvar, *_ = (t.detach() for t in make_latents(device))
    flow = Affine(device)
    with torch.no_grad():
        samples = fastelbo.sample_log_ratio(mu, logvar, flow=flow, n_samples=50_000)
        ratio = samples.log_q - samples.log_p
        zeros = torch.zeros_like(mu)
        truth = torch_kl(flow.pushed(mu, deviation(logvar, "logvar")), diagonal(zeros, zeros))
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert ((ratio.mean(0) - truth).abs() < FAR * error).all()
    assert (error < 0.1 * truth).all()
