"""The calls that docs/conventions.md gives, as they stand there, against each project's loss in float64, written anew."""

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

import fastelbo
from conftest import DEVICE
from fastelbo import likelihoods, schedules
from fastelbo.likelihoods import Likelihood, record
from support import gradients

DOCS = (Path(__file__).parents[1] / "docs/conventions.md").read_text()
BATCH, LATENT = 4, 3


class Project(NamedTuple):
    """`calls`: lines of Python as in the docs, of which the last one's value is the loss. `formula` has the same names, as
    keyword arguments, all of which `names` makes; those that require grad are differentiated by."""

    calls: tuple[str, ...]
    names: object
    formula: object
    but: object = lambda **_: 0.0  # a constant that fastelbo adds


@record
class LogCosh(Likelihood):
    scale: float = 1.0

    def nll(self, parameters, x):
        distance = (x - parameters[0]) / self.scale
        return torch.logaddexp(distance, -distance) + math.log(self.scale * math.pi / 2)


def real(*shape, scale=1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(DEVICE).requires_grad_()


def unit(*shape) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).to(DEVICE)


def latents(mu="mu", second="logvar", shape=(BATCH, LATENT)) -> dict:
    return {mu: real(*shape), second: real(*shape, scale=0.5)}


def standard(mu, logvar) -> Tensor:
    """KL from N(0, 1), of each latent."""
    return -0.5 * (1 + logvar - mu**2 - logvar.exp())


def of_batch(mu, logvar) -> Tensor:
    return standard(mu, logvar).sum(1).mean()


def labels(*shape, classes=5, pad=0) -> Tensor:
    found = torch.randint(1, classes, shape)
    found[1, -2:] = found[2, -1:] = pad
    return found.to(DEVICE)


def mask(*shape) -> Tensor:
    found = torch.ones(shape, dtype=torch.bool)
    found[1, -2:] = found[2, -1:] = False
    return found.to(DEVICE)


def cross_entropy(logits, x, pad) -> Tensor:
    log_p = torch.log_softmax(logits, -1).gather(-1, x.unsqueeze(-1)).squeeze(-1)
    return torch.where(x == pad, 0.0, -log_p)


def images(*shape) -> dict:
    return {"recon_x": real(*shape), "x": unit(*shape)}


def act(a_hat, actions, is_pad, mu, logvar):
    error = torch.where(is_pad[..., None], 0.0, (a_hat - actions).abs())
    return error.mean() + 10 * of_batch(mu, logvar)


class ZINB(Distribution):
    """As scvi-tools has it: zeros of two kinds."""

    def __init__(self, mu, theta, zi_logits):
        self.mu, self.theta, self.zi_logits = mu, theta, zi_logits
        super().__init__(mu.shape[:-1], mu.shape[-1:], validate_args=False)


def scvi_tensors() -> dict:
    def normal(scale):
        return Normal(real(BATCH, scale), (unit(BATCH, scale) + 0.3).requires_grad_())

    mu, theta = ((unit(BATCH, 7) + 0.2).requires_grad_() for _ in range(2))
    return {
        "px": ZINB(mu, theta, real(BATCH, 7)), "x": torch.randint(0, 3, (BATCH, 7)).double().to(DEVICE),
        "qz": normal(LATENT), "pz": normal(LATENT), "ql": normal(1), "pl": normal(1), "kl_weight": 0.3,
    }  # fmt: skip


def scvi(px, x, qz, pz, ql, pl, kl_weight):
    share, zero, eps = torch.sigmoid(px.zi_logits), x == 0, 1e-8
    log_nb = (
        torch.lgamma(x + px.theta) - torch.lgamma(px.theta) - torch.lgamma(x + 1)
        + px.theta * (torch.log(px.theta + eps) - torch.log(px.theta + px.mu + eps))
        + x * (torch.log(px.mu + eps) - torch.log(px.theta + px.mu + eps))
    )  # fmt: skip
    log_p = torch.where(zero, torch.log(share + (1 - share) * log_nb.exp()), torch.log1p(-share) + log_nb)
    terms = -log_p.sum(1) + kl_weight * kl_divergence(qz, pz).sum(1) + kl_divergence(ql, pl).sum(1)
    return terms.mean()


def disentangled() -> dict:
    given = {"recon": (unit(BATCH, 1, 2, 3) * 0.9 + 0.05).requires_grad_(), "data": unit(BATCH, 1, 2, 3)}
    return {**given, **latents(), "beta": 0.7}


def vits(z_p, m_p, logs_p, logs_q, z_mask, y_hat, y):
    kl = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p) ** 2 * torch.exp(-2 * logs_p)
    return 45 * (y_hat - y).abs().mean() + (kl * z_mask).sum() / z_mask.sum()


def vgae(pos, neg, mu, logstd):
    recon = -torch.log(torch.sigmoid(pos) + 1e-15).mean() - torch.log(1 - torch.sigmoid(neg) + 1e-15).mean()
    return recon + of_batch(mu, 2 * logstd.clamp(max=10)) / len(mu)


def open_sora(frames_hat, frames, mean, logvar, s):
    nll = (frames - frames_hat).abs() / s.exp() + s
    logvar = logvar.clamp(-30, 20)
    return nll.sum() / len(frames) + 1e-6 * standard(mean, logvar).flatten(1).sum(1).mean()


def actor(output, x, mask, mu, logvar):
    valid = mask[:, None, None].expand_as(x)
    return (output - x)[valid].square().mean() + 1e-5 * standard(mu, logvar).sum()


def between(mu, log_sigma, mu_p, log_sigma_p):
    """KL between Gaussians, of each latent, by the logarithms of their deviations."""
    return log_sigma_p - log_sigma + ((2 * log_sigma).exp() + (mu - mu_p) ** 2) / (2 * (2 * log_sigma_p).exp()) - 0.5


def vrnn(theta, x, mean, std, prior_mean, prior_std):
    nll = -(x * theta.log() + (1 - x) * (1 - theta).log())
    return nll.sum() + between(mean, std.log(), prior_mean, prior_std.log()).sum()


def svg(x_pred, x, mu, logvar, mu_p, logvar_p):
    return (x_pred - x).square().mean() + 1e-4 * between(mu, logvar / 2, mu_p, logvar_p / 2).sum() / len(mu)


def pyro(decoder, x, z_loc, z_scale, eps):
    z = z_loc + z_scale * eps[0]
    p = decoder(z)
    log_p = (x * p.log() + (1 - x) * (1 - p).log()).sum(1)
    log_ratio = Normal(0.0, 1.0).log_prob(z).sum(1) - Normal(z_loc, z_scale).log_prob(z).sum(1)
    return -(log_p + log_ratio).sum()


def nvae(param, x, kl=None, upper=0.99):
    """A pixel's: components that are independent given R and G, of differences of distribution functions; the upper edge."""
    param, x = param.movedim(1, -1), (2 * x - 1).movedim(1, -1).unsqueeze(-1)
    count = param.shape[-1] // 10
    logits, rest = param[..., :count], param[..., count:].unflatten(-1, (3, 3, count))
    mean, scale, link = rest[..., 0, :], rest[..., 1, :].clamp(min=-7).exp(), rest[..., 2, :].tanh()
    shift = torch.stack((0 * x[..., 0, :] * link[..., 0, :], link[..., 0, :] * x[..., 0, :],
                         link[..., 1, :] * x[..., 0, :] + link[..., 2, :] * x[..., 1, :]), -2)  # fmt: skip
    distance = x - mean - shift
    above = torch.where(x > upper, 1.0, torch.sigmoid((distance + 1 / 255) / scale))
    below = torch.where(x < -0.999, 0.0, torch.sigmoid((distance - 1 / 255) / scale))
    return -torch.logsumexp(torch.log_softmax(logits, -1) + (above - below).log().sum(-2), -1).sum() / len(x)


def pixels(*without: int) -> dict:
    """Images of the levels but for some, and the parameters of a decoder that is none too sure."""
    levels = torch.randint(0, 256, (2, 3, 4, 4))
    levels[0, :, 0, 0], levels[0, :, 0, 1] = 0, 255
    for level in without:
        levels[levels == level] = level - 10
    return {"param": real(2, 20, 4, 4, scale=0.3), "x": (levels.double() / 255).to(DEVICE)}


def some_decoder():
    weights = torch.randn(LATENT, 6, dtype=torch.float64).to(DEVICE)
    return lambda z: torch.sigmoid(z @ weights)


def sequences(**more) -> dict:
    return {"logits": real(BATCH, 6, 5), "target": labels(BATCH, 6), "pad": 0, **latents(), **more}


PROJECTS = {
    "pythae": Project(
        ('fastelbo.loss(recon_x, x, mu, log_var, beta, likelihood="mse", recon_weight=0.5, reduction="batchmean").loss',),
        lambda: {**images(BATCH, 2, 3), **latents(second="log_var"), "beta": 0.7},
        lambda recon_x, x, mu, log_var, beta: (
            0.5 * (recon_x - x).square().flatten(1).sum(1).mean() + beta * of_batch(mu, log_var)
        ),
    ),
    "disentangling-vae": Project(
        ('fastelbo.loss(recon, data, mu, logvar, beta, reduction="batchmean").loss',),
        lambda: disentangled(),
        lambda recon, data, mu, logvar, beta: (
            F.binary_cross_entropy(recon, data, reduction="sum") / len(data) + beta * of_batch(mu, logvar)
        ),
    ),
    "disentangling-vae, Gaussian": Project(
        ('fastelbo.loss(recon, data, mu, logvar, beta, likelihood="mse", recon_weight=255, reduction="batchmean").loss',),
        lambda: disentangled(),
        lambda recon, data, mu, logvar, beta: (
            (recon * 255 - data * 255).square().sum() / 255 / len(data) + beta * of_batch(mu, logvar)
        ),
    ),
    "disentangling-vae, Laplace": Project(
        ('fastelbo.loss(recon, data, mu, logvar, beta, likelihood="l1", recon_weight=3, reduction="batchmean").loss',),
        lambda: disentangled(),
        lambda recon, data, mu, logvar, beta: 3 * (recon - data).abs().sum() / len(data) + beta * of_batch(mu, logvar),
    ),
    "VITS": Project(
        (
            'gaussian = likelihoods.Gaussian(parameter="log_scale")',
            "cross = fastelbo.nll((m_p, logs_p), z_p, likelihood=gaussian, weight=z_mask)",
            "entropy = ((logs_q + 0.5 + 0.5 * math.log(2 * math.pi)) * z_mask).sum()",
            'fastelbo.loss(y_hat, y, kl=(cross - entropy) / z_mask.sum(), likelihood="l1", recon_weight=45,'
            ' reduction="mean").loss',
        ),
        lambda: {
            **{name: real(BATCH, LATENT, 6) for name in ("z_p", "m_p")},
            **{name: real(BATCH, LATENT, 6, scale=0.5) for name in ("logs_p", "logs_q")},
            "z_mask": mask(BATCH, 6)[:, None],
            "y_hat": real(BATCH, 8, 5),
            "y": real(BATCH, 8, 5).detach(),
        },
        vits,
    ),
    "padded sequences": Project(
        (
            "steps = mask.unsqueeze(-1)",
            'options = {"likelihood": likelihoods.Categorical(dim=-1), "weight": mask, "kl_weight": steps}',
            'fastelbo.loss(logits, labels, mu, logvar, beta, reduction="mean", **options).loss',
        ),
        lambda: {
            "logits": real(BATCH, 6, 5),
            "labels": labels(BATCH, 6),
            "mask": mask(BATCH, 6),
            "beta": 0.7,
            **latents(shape=(BATCH, 6, LATENT)),
        },
        lambda logits, labels, mask, mu, logvar, beta: (
            cross_entropy(logits, labels, -1)[mask].mean() + beta * standard(mu, logvar)[mask].mean()
        ),
    ),
    "scVI with a latent library": Project(
        (
            'kl_z = fastelbo.kl_divergence(qz, prior=pz, reduction="batchmean")',
            'kl_l = fastelbo.kl_divergence(ql, prior=pl, reduction="batchmean")',
            'fastelbo.loss(px, x, kl=kl_weight * kl_z + kl_l, reduction="batchmean").loss',
        ),
        lambda: scvi_tensors(),
        scvi,
    ),
    "VDVAE, a level": Project(
        ('fastelbo.sample_kl(qm, qv, prior=(pm, pv), posterior="log_std", reduction="none", eps=eps).kl',),
        lambda: {**latents("qm", "qv"), **latents("pm", "pv"), "eps": unit(BATCH, LATENT)},
        lambda qm, qv, pm, pv, eps: between(qm, qv, pm, pv).sum(1),
    ),
    "log-cosh": Project(
        (
            't = fastelbo.loss(recons, input, mu, log_var, likelihood=LogCosh(1 / alpha), reduction=("mean", "batchmean"))',
            "(t.recon - math.log(math.pi / alpha)) / alpha + beta * kld_weight * t.kl",
        ),
        lambda: {
            "recons": real(BATCH, 2, 3),
            "input": unit(BATCH, 2, 3),
            **latents(second="log_var"),
            "alpha": 10.0,
            "beta": 0.3,
            "kld_weight": 0.00025,
            "LogCosh": LogCosh,
        },
        lambda recons, input, mu, log_var, alpha, beta, kld_weight, **_: (
            torch.cosh(alpha * (recons - input)).log().mean() / alpha + beta * kld_weight * of_batch(mu, log_var)
        ),
    ),
    "world-models": Project(
        ('fastelbo.loss(recon_x, x, mu, logsigma, likelihood="mse", posterior="log_std").loss',),
        lambda: {**images(BATCH, 3, 4, 4), **latents(second="logsigma")},
        lambda recon_x, x, mu, logsigma: (recon_x - x).square().sum() + standard(mu, 2 * logsigma).sum(),
    ),
    "Sentence-VAE": Project(
        (
            "categorical = likelihoods.Categorical(dim=-1, ignore_index=pad)",
            'fastelbo.loss(logp, target, mu, logvar, kl_weight, likelihood=categorical, reduction="batchmean").loss',
        ),
        lambda: {**sequences(kl_weight=0.2), "logp": real(BATCH, 6, 5).log_softmax(-1).detach().requires_grad_()},
        lambda logp, target, pad, mu, logvar, kl_weight, **_: (
            (cross_entropy(logp, target, pad).sum() + kl_weight * standard(mu, logvar).sum()) / len(mu)
        ),
    ),
    "moses": Project(
        (
            "categorical = likelihoods.Categorical(dim=-1, ignore_index=pad)",
            "t = fastelbo.loss(y[:, :-1], x[:, 1:], mu, logvar, kl_weight, likelihood=categorical,"
            ' reduction=("mean", "batchmean"))',
            "t.loss",
        ),
        lambda: {"y": real(BATCH, 7, 5), "x": labels(BATCH, 7), "pad": 0, **latents(), "kl_weight": 0.4},
        lambda y, x, pad, mu, logvar, kl_weight: (
            cross_entropy(y[:, :-1], x[:, 1:], pad).sum() / (x[:, 1:] != pad).sum() + kl_weight * of_batch(mu, logvar)
        ),
    ),
    "ACT": Project(
        (
            't = fastelbo.loss(a_hat, actions, mu, logvar, likelihood="l1", weight=~is_pad[..., None],'
            ' reduction=("sum", "batchmean"))',
            "t.recon / a_hat.numel() + 10 * t.kl",
        ),
        lambda: {"a_hat": real(BATCH, 6, 2), "actions": real(BATCH, 6, 2).detach(), "is_pad": ~mask(BATCH, 6), **latents()},
        act,
    ),
    "RecBole": Project(
        (
            "anneal = schedules.linear(anneal_cap * total_anneal_steps, 0, anneal_cap)(update)",
            'fastelbo.loss(z, rating_matrix, mu, logvar, anneal, likelihood="multinomial", reduction="batchmean").loss',
        ),
        lambda: {
            "z": real(BATCH, 9),
            "rating_matrix": torch.randint(0, 2, (BATCH, 9)).double().to(DEVICE),
            **latents(),
            "anneal_cap": 0.2,
            "total_anneal_steps": 1000,
            "update": 150,
        },
        lambda z, rating_matrix, mu, logvar, anneal_cap, total_anneal_steps, update: (
            -(torch.log_softmax(z, 1) * rating_matrix).sum(1).mean()
            + min(anneal_cap, update / total_anneal_steps) * of_batch(mu, logvar)
        ),
    ),
    "PyG": Project(
        (
            'posterior = fastelbo.Posterior("log_std", clamp=(None, 10))',
            'kl = fastelbo.kl_divergence(mu, logstd, posterior=posterior, reduction="batchmean")',
            "w = torch.cat((pos.new_full(pos.shape, 1 / len(pos)), neg.new_full(neg.shape, 1 / len(neg))))",
            "is_edge = torch.cat((torch.ones_like(pos), torch.zeros_like(neg)))",
            "fastelbo.loss(torch.cat((pos, neg)), is_edge, kl=kl, beta=1 / len(mu),"
            ' likelihood="bernoulli_logits", weight=w).loss',
        ),
        lambda: {"pos": real(11), "neg": real(7), "mu": real(5, 3), "logstd": real(5, 3, scale=6.0)},
        vgae,
    ),
    "Open-Sora": Project(
        (
            'options = {"likelihood": likelihoods.Laplace(parameter="log_scale"),'
            ' "posterior": fastelbo.Posterior(clamp=(-30, 20))}',
            'fastelbo.loss((frames_hat, s), frames, mean, logvar, 1e-6, reduction="batchmean", **options).loss',
        ),
        lambda: {
            "frames_hat": real(10, 3, 2, 2),
            "frames": real(10, 3, 2, 2).detach(),
            "mean": real(2, 4, 5, 1, 1),
            "logvar": real(2, 4, 5, 1, 1, scale=15.0),
            "s": real(scale=0.3),
        },
        open_sora,
        lambda frames, **_: frames[0].numel() * math.log(2),
    ),
    "BCQ": Project(
        (
            'posterior = fastelbo.Posterior("log_std", clamp=(-4, 15))',
            'fastelbo.loss(recon, action, mean, log_std, 0.5, likelihood="mse", posterior=posterior, reduction="mean").loss',
        ),
        lambda: {"recon": real(BATCH, 2), "action": unit(BATCH, 2), **latents("mean", "log_std", (BATCH, 4))},
        lambda recon, action, mean, log_std: (
            (recon - action).square().mean() + 0.5 * standard(mean, 2 * log_std.clamp(-4, 15)).mean()
        ),
    ),
    "ACTOR": Project(
        (
            'fastelbo.loss(output, x, mu, logvar, 1e-5, likelihood="mse", weight=mask[:, None, None],'
            ' reduction=("mean", "sum")).loss',
        ),
        lambda: {"output": real(BATCH, 3, 2, 6), "x": real(BATCH, 3, 2, 6).detach(), "mask": mask(BATCH, 6), **latents()},
        actor,
    ),
    "Probabilistic U-Net": Project(
        (
            'fastelbo.loss(logits, segm, posterior, prior=prior, beta=beta, likelihood="bernoulli_logits",'
            ' reduction=("sum", "batchmean")).loss',
        ),
        lambda: {
            "logits": real(BATCH, 1, 4, 4),
            "segm": unit(BATCH, 1, 4, 4).round(),
            "beta": 10.0,
            "posterior": Independent(Normal(real(BATCH, LATENT), unit(BATCH, LATENT) + 0.1), 1),
            "prior": Independent(Normal(real(BATCH, LATENT), unit(BATCH, LATENT) + 0.1), 1),
        },
        lambda logits, segm, posterior, prior, beta: (
            F.binary_cross_entropy_with_logits(logits, segm, reduction="sum") + beta * kl_divergence(posterior, prior).mean()
        ),
    ),
    "VRNN": Project(
        ('fastelbo.loss(theta, x, mean, std, prior=(prior_mean, prior_std), posterior="std").loss',),
        lambda: {
            "theta": (unit(BATCH, 6) * 0.8 + 0.1).requires_grad_(),
            "x": unit(BATCH, 6),
            "mean": real(BATCH, LATENT),
            "prior_mean": real(BATCH, LATENT),
            **{name: (unit(BATCH, LATENT) + 0.2).requires_grad_() for name in ("std", "prior_std")},
        },
        vrnn,
    ),
    "RAVE": Project(
        ('2 / z.shape[2] * fastelbo.kl_divergence(mean, std, posterior="std", reduction="batchmean")',),
        lambda: {"z": real(2, 2 * LATENT, 5), "mean": real(2, LATENT, 5), "std": (unit(2, LATENT, 5) + 0.1).requires_grad_()},
        lambda z, mean, std: (mean * mean + std**2 - (std**2).log() - 1).sum(1).mean(),
    ),
    "SVG": Project(
        (
            'fastelbo.loss(x_pred, x, mu, logvar, 1e-4, likelihood="mse", prior=(mu_p, logvar_p),'
            ' reduction=("mean", "batchmean")).loss',
        ),
        lambda: {"x_pred": real(BATCH, 1, 4, 4), "x": unit(BATCH, 1, 4, 4), **latents(), **latents("mu_p", "logvar_p")},
        svg,
    ),
    "lightning-bolts": Project(
        ('fastelbo.loss(x_hat, x, mu, log_var, 0.1, likelihood="mse", reduction="mean").loss',),
        lambda: {"x_hat": real(BATCH, 3, 4, 4), "x": unit(BATCH, 3, 4, 4), **latents(second="log_var")},
        lambda x_hat, x, mu, log_var: (x_hat - x).square().mean() + 0.1 * standard(mu, log_var).mean(),
    ),
    "JT-VAE": Project(
        ('fastelbo.kl_divergence(z_mean, -w.abs(), reduction="batchmean")',),
        lambda: {"z_mean": real(BATCH, LATENT), "w": real(BATCH, LATENT)},
        lambda z_mean, w: standard(z_mean, -w.abs()).sum() / len(w),
    ),
    "Pyro": Project(
        ('fastelbo.elbo(decoder, x, z_loc, z_scale, posterior="std", bound=fastelbo.IWAE(1), eps=eps).loss',),
        lambda: {
            "decoder": some_decoder(),
            "x": unit(BATCH, 6).round(),
            "z_loc": real(BATCH, LATENT),
            "z_scale": (unit(BATCH, LATENT) + 0.2).requires_grad_(),
            "eps": real(1, BATCH, LATENT).detach(),
        },
        pyro,
    ),
    "NVAE": Project(
        (
            "mixture = likelihoods.DiscretizedLogisticMixture(interval=(0, 1))",
            'fastelbo.loss(param, x, kl=kl, likelihood=mixture, reduction="batchmean").recon',
        ),
        lambda: pixels(254) | {"kl": torch.zeros((), dtype=torch.float64, device=DEVICE)},
        nvae,
    ),
}


@pytest.mark.parametrize("name", PROJECTS)
def test_what_the_docs_say(name):
    calls, names, formula, but = PROJECTS[name]
    missing = [line for line in calls if f"`{line}`" not in DOCS]
    assert not missing
    given = names()
    scope = {"fastelbo": fastelbo, "likelihoods": likelihoods, "schedules": schedules, "torch": torch, "math": math, **given}
    for line in calls[:-1]:
        exec(line, scope)
    found, expected = eval(calls[-1], scope), formula(**given)
    torch.testing.assert_close(found - but(**given), expected, rtol=1e-9, atol=1e-12)
    tensors = [t for value in given.values() for t in tensors_of(value)]
    by_both = [gradients(v.sum(), *tensors, allow_unused=True) for v in (found, expected)]
    assert sum(g is not None for g in by_both[1]) >= 1
    for ours, theirs in zip(*by_both, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def tensors_of(value) -> list[Tensor]:
    if isinstance(value, Independent):
        value = value.base_dist
    found = (value.loc, value.scale) if isinstance(value, Normal) else (value,)
    found = (value.mu, value.theta, value.zi_logits) if isinstance(value, ZINB) else found
    return [t for t in found if isinstance(t, Tensor) and t.requires_grad]


def test_the_upper_edge_of_nvae():
    """Level 254 counts as the highest there, and so the two part where it occurs."""
    given = pixels(254) | {"kl": torch.zeros((), dtype=torch.float64, device=DEVICE)}
    given["x"][0, 0, 1, 1] = 254 / 255
    found = fastelbo.loss(
        given["param"], given["x"], kl=given["kl"], likelihood=likelihoods.DiscretizedLogisticMixture(interval=(0, 1)),
        reduction="batchmean",
    ).recon  # fmt: skip
    assert (found - nvae(**given)).abs() > 1e-3
    torch.testing.assert_close(found, nvae(**given, upper=0.999))
