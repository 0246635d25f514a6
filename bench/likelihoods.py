"""`python -m bench.likelihoods`: every likelihood next to the formula that its users write, on a CPU: forward, backward, and
the KL of 20 latents in both. Contenders take turns on the same inputs, and agree in value and gradients first."""

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cpuinfo
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastelbo
from fastelbo import Weighting
from fastelbo.likelihoods import BernoulliLogits, Categorical, DiscretizedLogisticMixture, Gaussian, Laplace, StudentT

from .measure import interleaved, settle
from .report import in_words

KEPT = Path(__file__).parent / "results" / "likelihoods.md"
EPS = 1e-8  # by which scvi-tools keeps its logarithms from 0


class Subject(NamedTuple):
    """One call: the tensors to differentiate by, and losses of both; `known` is what the naive one lacks, which data decide."""

    leaves: tuple[Tensor, ...]
    naive: Callable[[], Tensor]
    fused: Callable[[], Tensor]
    known: float = 0.0


def subject(parameters, x, nll, *, known=0.0, naive_kl=None, **options) -> Subject:
    """Of a likelihood whose negative log-likelihood users write as `nll(*parameters)`."""
    parameters = tuple(p.requires_grad_() for p in parameters)
    mu, logvar = (0.5 * torch.randn(len(x), 20) for _ in range(2))
    leaves = *parameters, mu.requires_grad_(), logvar.requires_grad_()
    recon_x = parameters if len(parameters) > 1 else parameters[0]

    def naive() -> Tensor:
        return nll(*parameters) + (naive_kl or gaussian_kl)(mu, logvar)

    return Subject(leaves, naive, lambda: fastelbo.loss(recon_x, x, mu, logvar, **options).loss, known)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def free_bits(mu: Tensor, logvar: Tensor) -> Tensor:
    return (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp())).mean(0).clamp(min=0.5).sum() * len(mu)


def usual(name: str, *shape: int, weighted: bool = False, **options) -> Subject:
    """Squared and absolute errors and both kinds of Bernoulli, as `torch.nn.functional` has them."""
    function = {
        "bernoulli": F.binary_cross_entropy, "bernoulli_logits": F.binary_cross_entropy_with_logits, "mse": F.mse_loss,
        "l1": F.l1_loss,
    }[name]  # fmt: skip
    x, recon_x = torch.rand(shape), torch.randn(shape)
    recon_x = recon_x.sigmoid() if name == "bernoulli" else recon_x
    if not weighted:
        return subject([recon_x], x, lambda y: function(y, x, reduction="sum"), likelihood=name, **options)
    mask = (torch.rand(shape) > 0.3).float()
    return subject([recon_x], x, lambda y: (function(y, x, reduction="none") * mask).sum(), likelihood=name, weight=mask)


def sure_decoder(*shape: int) -> Subject:
    """Of bits that it knows, as of sprites on a ground: 0.002 nats each."""
    x = (torch.rand(shape) > 0.5).float()
    logits = (2 * x - 1) * (4 + 10 * torch.rand(shape))
    return subject(
        [logits], x, lambda y: F.binary_cross_entropy_with_logits(y, x, reduction="sum"), likelihood="bernoulli_logits"
    )


def rows(*shape: int) -> Subject:
    """A loss of each datum, as importance weights need it."""
    x, share = torch.rand(shape), torch.rand(shape[0])
    leaves = tuple(t.requires_grad_() for t in (torch.randn(shape), *(0.5 * torch.randn(shape[0], 20) for _ in range(2))))

    def naive() -> Tensor:
        y, mu, logvar = leaves
        recon = F.binary_cross_entropy_with_logits(y, x, reduction="none").flatten(1).sum(1)
        return ((recon - 0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)) * share).sum()

    def fused() -> Tensor:
        y, mu, logvar = leaves
        return (fastelbo.loss(y, x, mu, logvar, likelihood="bernoulli_logits", reduction="none").loss * share).sum()

    return Subject(leaves, naive, fused)


def learned_scale(make: type, density: type, *scale: int) -> Subject:
    """As `torch.distributions` writes it."""
    x, mean, log_scale = torch.randn(128, 784), torch.randn(128, 784), 0.1 * torch.randn(scale)
    return subject(
        [mean, log_scale], x, lambda m, s: -density(m, s.exp()).log_prob(x).sum(), likelihood=make(parameter="log_scale")
    )


def weighted_positives(*shape: int) -> Subject:
    x, weight = torch.rand(shape), torch.tensor(3.0)
    return subject(
        [torch.randn(shape)], x, lambda y: F.binary_cross_entropy_with_logits(y, x, pos_weight=weight, reduction="sum"),
        likelihood=BernoulliLogits(pos_weight=3.0),
    )  # fmt: skip


def bounded_scale(*shape: int) -> Subject:
    """sigma-VAE's Gaussian, whose log scale has a soft lower bound."""
    x, mean, log_scale = torch.randn(shape), torch.randn(shape), 0.1 * torch.randn(shape)

    def nll(mean: Tensor, log_scale: Tensor) -> Tensor:
        s = -6 + F.softplus(log_scale + 6)
        return (0.5 * ((x - mean) / s.exp()) ** 2 + s + 0.5 * math.log(2 * math.pi)).sum()

    return subject([mean, log_scale], x, nll, likelihood=Gaussian(parameter="log_scale", soft_min=-6.0))


def robust(*shape: int) -> Subject:
    x, mean, log_scale = torch.randn(shape), torch.randn(shape), 0.1 * torch.randn(shape)
    return subject(
        [mean, log_scale], x, lambda m, s: -torch.distributions.StudentT(5.0, m, s.exp()).log_prob(x).sum(),
        likelihood=StudentT(df=5.0, parameter="log_scale"),
    )  # fmt: skip


def continuous(*shape: int) -> Subject:
    x = torch.rand(shape)
    return subject(
        [torch.randn(shape)], x, lambda y: -torch.distributions.ContinuousBernoulli(logits=y).log_prob(x).sum(),
        likelihood="continuous_bernoulli_logits",
    )  # fmt: skip


def levels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape) / 127.5 - 1


def log_bin(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The logarithm of what a logistic distribution holds of a level, with the terms that PixelCNN++ has."""
    centered, inverse = x - mean, torch.exp(-log_scale)
    upper, lower = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255)
    inside, middle = torch.sigmoid(upper) - torch.sigmoid(lower), inverse * centered
    density = middle - log_scale - 2 * F.softplus(middle) - math.log(127.5)
    between = torch.where(inside > 1e-5, torch.log(torch.clamp(inside, min=1e-12)), density)
    return torch.where(x < -0.999, upper - F.softplus(upper), torch.where(x > 0.999, -F.softplus(lower), between))


def logistic(*shape: int) -> Subject:
    x = levels(*shape)
    return subject(
        [0.3 * torch.randn(shape), 0.3 * torch.randn(shape) - 2], x, lambda m, s: -log_bin(x, m, s).sum(),
        likelihood="discretized_logistic",
    )  # fmt: skip


def mixture(batch: int, size: int, components: int = 10) -> Subject:
    """PixelCNN++'s, of three channels that depend on each other."""
    x = levels(batch, 3, size, size)
    parameters = 0.3 * torch.randn(batch, 10 * components, size, size)
    parameters[:, components:].view(batch, 3, 3, components, size, size)[:, :, 1] -= 2

    def nll(given: Tensor) -> Tensor:
        logits, rest = given[:, :components], given[:, components:].view(batch, 3, 3, components, size, size)
        mean, log_scale, link = rest[:, :, 0], torch.clamp(rest[:, :, 1], min=-7), torch.tanh(rest[:, :, 2])
        r, g = x[:, :1], x[:, 1:2]
        means = torch.stack((mean[:, 0], mean[:, 1] + link[:, 0] * r, mean[:, 2] + link[:, 1] * r + link[:, 2] * g), dim=1)
        each = log_bin(x.unsqueeze(2), means, log_scale).sum(1)
        return -torch.logsumexp(each + F.log_softmax(logits, 1), 1).sum()

    return subject([parameters], x, nll, likelihood=DiscretizedLogisticMixture())


def counts(share: float, *shape: int) -> Tensor:
    """Of which this share is above zero."""
    return (torch.poisson(3 * torch.rand(shape)) + 1) * (torch.rand(shape) < share)


def poisson(share: float, constant: bool) -> Subject:
    """`F.poisson_nll_loss` leaves log x! out, which is a constant of the data."""
    x = counts(share, 128, 4000)
    lacking = 0.0 if constant else torch.lgamma(x + 1).sum().item()

    def nll(log_rate: Tensor) -> Tensor:
        if constant:
            return -torch.distributions.Poisson(log_rate.exp(), validate_args=False).log_prob(x).sum()
        return F.poisson_nll_loss(log_rate, x, reduction="sum")

    return subject([torch.randn(128, 4000)], x, nll, known=lacking, likelihood="poisson_log")


def scvi_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """A negative binomial's, with the terms that scvi-tools has."""
    log_theta_mu = torch.log(theta + mu + EPS)
    log_p = theta * (torch.log(theta + EPS) - log_theta_mu) + x * (torch.log(mu + EPS) - log_theta_mu)
    return log_p + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)


def scvi_zero_inflated(x: Tensor, mu: Tensor, theta: Tensor, logits: Tensor) -> Tensor:
    """Likewise, of its zero-inflated form."""
    softplus_pi, log_theta_mu = F.softplus(-logits), torch.log(theta + mu + EPS)
    pi_theta_log = -logits + theta * (torch.log(theta + EPS) - log_theta_mu)
    at_zero = F.softplus(pi_theta_log) - softplus_pi
    beyond = -softplus_pi + pi_theta_log + x * (torch.log(mu + EPS) - log_theta_mu)
    beyond = beyond + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return (x < EPS).float() * at_zero + (x > EPS).float() * beyond


def genes(share: float, each: bool = False, inflated: bool = False) -> Subject:
    """Cells by genes; the dispersion of each gene, or of each gene and cell."""
    shape, x = (128, 4000), counts(share, 128, 4000)
    parameters = [torch.randn(shape).exp(), torch.randn(shape if each else shape[1:]).exp()]
    if inflated:
        return subject(
            [*parameters, torch.randn(shape)], x, lambda *p: -scvi_zero_inflated(x, *p).sum(),
            likelihood="zero_inflated_negative_binomial",
        )  # fmt: skip
    return subject(parameters, x, lambda *p: -scvi_log_prob(x, *p).sum(), likelihood="negative_binomial")


def multinomial(*shape: int) -> Subject:
    x = counts(0.05, *shape)
    return subject([torch.randn(shape)], x, lambda y: -(F.log_softmax(y, -1) * x).sum(), likelihood="multinomial")


def labels(shape: tuple[int, ...], dim: int, padded: bool = False) -> Subject:
    classes = shape[dim]
    x = torch.randint(0, classes, shape[:dim] + shape[dim:][1:])
    if padded:
        x[torch.rand(x.shape) < 0.3] = -100

    def nll(y: Tensor) -> Tensor:
        if dim == -1:
            return F.cross_entropy(y.view(-1, classes), x.view(-1), reduction="sum")
        return F.cross_entropy(y, x, reduction="sum")

    return subject([torch.randn(shape)], x, nll, likelihood=Categorical(dim=dim))


def step(*shape: int) -> Subject:
    """The sample too, and a decoder that is a constant."""
    x, logits, mu, logvar = torch.rand(shape), torch.randn(shape), torch.randn(shape[0], 20), torch.randn(shape[0], 20)
    decoder, leaves = 0.1 * torch.randn(20, shape[1]), tuple(t.requires_grad_() for t in (logits, mu, logvar))

    def naive() -> Tensor:
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(logvar)
        recon = F.binary_cross_entropy_with_logits(logits + z @ decoder, x, reduction="sum")
        return recon + gaussian_kl(mu, logvar)

    def fused() -> Tensor:
        z, kl = fastelbo.sample_kl(mu, logvar)
        return fastelbo.loss(logits + z @ decoder, x, kl=kl, likelihood="bernoulli_logits").loss

    return Subject(leaves, naive, fused)


def prior(*latents: int) -> Subject:
    """The KL from a Gaussian that is learned, as hierarchies have it."""
    mu, logvar, prior_mu, prior_logvar = leaves = tuple((0.5 * torch.randn(latents)).requires_grad_() for _ in range(4))

    def naive() -> Tensor:
        ratio = logvar - prior_logvar
        return 0.5 * (ratio.exp() + (mu - prior_mu).pow(2) * torch.exp(-prior_logvar) - 1 - ratio).sum()

    return Subject(leaves, naive, lambda: fastelbo.kl_divergence(mu, logvar, (prior_mu, prior_logvar)))


def deviations(*latents: int) -> Subject:
    """Of an encoder that returns standard deviations."""
    mu, raw = leaves = tuple((0.5 * torch.randn(latents)).requires_grad_() for _ in range(2))

    def naive() -> Tensor:
        std = F.softplus(raw)
        return -0.5 * (1 + 2 * std.log() - mu.pow(2) - std.pow(2)).sum()

    return Subject(leaves, naive, lambda: fastelbo.kl_divergence(mu, F.softplus(raw), posterior="std"))


def log_ratio(*latents: int) -> Subject:
    """One sample's estimate of the KL, as flows need it."""
    mu, logvar = leaves = tuple((0.5 * torch.randn(latents)).requires_grad_() for _ in range(2))

    def naive() -> Tensor:
        q = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
        z = q.rsample()
        return (q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)).sum(1).mean()

    def fused() -> Tensor:
        _, log_q, log_p = fastelbo.sample_log_ratio(mu, logvar)
        return (log_q - log_p).mean()

    return Subject(leaves, naive, fused)


def sampled(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(logvar)


def gene_model(cells: int = 128, genes: int = 2000) -> Subject:
    """scVI's kind: shares of each cell's library, and a dispersion of each gene."""
    x = counts(0.1, cells, genes)
    encoder = nn.Sequential(nn.Linear(genes, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 20))
    decoder = nn.Sequential(nn.Linear(10, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, genes))
    log_theta, library = nn.Parameter(torch.zeros(genes)), x.sum(1, keepdim=True)

    def parameters(z: Tensor) -> tuple[Tensor, Tensor]:
        return library * torch.softmax(decoder(z), 1), log_theta.exp()

    def naive() -> Tensor:
        mu, logvar = encoder(torch.log1p(x)).chunk(2, 1)
        return -scvi_log_prob(x, *parameters(sampled(mu, logvar))).sum() + gaussian_kl(mu, logvar)

    def fused() -> Tensor:
        mu, logvar = encoder(torch.log1p(x)).chunk(2, 1)
        z, kl = fastelbo.sample_kl(mu, logvar)
        return fastelbo.loss(parameters(z), x, kl=kl, likelihood="negative_binomial").loss

    return Subject((*encoder.parameters(), *decoder.parameters(), log_theta), naive, fused)


def text_model(sentences: int = 32, words: int = 20, vocabulary: int = 5000) -> Subject:
    """Sentence-VAE's kind: recurrent both ways, a fifth of the words padding."""
    x = torch.randint(1, vocabulary, (sentences, words))
    x[torch.arange(words) >= torch.randint(words // 2, words + 1, (sentences, 1))] = 0
    table, encoder, decoder = nn.Embedding(vocabulary, 128), *(nn.GRU(128, 128, batch_first=True) for _ in range(2))
    to_latents, start, output = nn.Linear(128, 32), nn.Linear(16, 128), nn.Linear(128, vocabulary)

    def encoded() -> tuple[Tensor, ...]:
        return to_latents(encoder(table(x))[1][0]).chunk(2, 1)

    def decoded(z: Tensor) -> Tensor:
        return output(decoder(table(F.pad(x, (1, -1))), start(z).unsqueeze(0))[0])

    def naive() -> Tensor:
        mu, logvar = encoded()
        logits = decoded(sampled(mu, logvar))
        recon = F.cross_entropy(logits.view(-1, vocabulary), x.view(-1), ignore_index=0, reduction="sum")
        return recon + gaussian_kl(mu, logvar)

    def fused() -> Tensor:
        mu, logvar = encoded()
        z, kl = fastelbo.sample_kl(mu, logvar)
        return fastelbo.loss(decoded(z), x, kl=kl, likelihood=Categorical(dim=-1, ignore_index=0)).loss

    modules = table, encoder, decoder, to_latents, start, output
    return Subject(tuple(p for module in modules for p in module.parameters()), naive, fused)


def recommender(users: int = 200, items: int = 8000) -> Subject:
    """Mult-VAE's kind."""
    x = counts(0.02, users, items).clamp(max=1)
    encoder = nn.Sequential(nn.Linear(items, 200), nn.Tanh(), nn.Linear(200, 128))
    decoder = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, items))

    def naive() -> Tensor:
        mu, logvar = encoder(F.normalize(x)).chunk(2, 1)
        logits = decoder(sampled(mu, logvar))
        return -(F.log_softmax(logits, 1) * x).sum(1).mean() + 0.2 * gaussian_kl(mu, logvar) / users

    def fused() -> Tensor:
        mu, logvar = encoder(F.normalize(x)).chunk(2, 1)
        z, kl = fastelbo.sample_kl(mu, logvar, reduction="batchmean")
        return fastelbo.loss(decoder(z), x, kl=kl, beta=0.2, likelihood="multinomial", reduction="batchmean").loss

    return Subject((*encoder.parameters(), *decoder.parameters()), naive, fused)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{f"`{name}`, {shape[0]}x784": lambda name=name, shape=shape: usual(name, *shape)
       for name in ("bernoulli", "bernoulli_logits", "mse") for shape in ((1, 784), (128, 784))},
    "`bernoulli_logits` of a sure decoder, 128x784": lambda: sure_decoder(128, 784),
    "`bernoulli_logits` of a sure decoder, 64x64x64": lambda: sure_decoder(64, 64, 64),
    "`bernoulli_logits`, a loss of each, 128x784": lambda: rows(128, 784),
    **{f"`sample_kl` + `loss`, `bernoulli_logits`, {b}x784": lambda b=b: step(b, 784) for b in (1, 128)},
    "`mse` with free bits of dimensions, 128x784": lambda: usual(
        "mse", 128, 784, naive_kl=free_bits, weighting=Weighting(0.5, "dimension")
    ),
    "`bernoulli_logits` with a mask, 128x784": lambda: usual("bernoulli_logits", 128, 784, weighted=True),
    "`bernoulli_logits` with a mask, 32x3x64x64": lambda: usual("bernoulli_logits", 32, 3, 64, 64, weighted=True),
    "`mse` with a mask, 128x784": lambda: usual("mse", 128, 784, weighted=True),
    "`l1`, 32x3x64x64": lambda: usual("l1", 32, 3, 64, 64),
    "`gaussian`, log scale of each, 128x784": lambda: learned_scale(Gaussian, torch.distributions.Normal, 128, 784),
    "`gaussian`, one log scale, 128x784": lambda: learned_scale(Gaussian, torch.distributions.Normal),
    "`laplace`, log scale of each, 128x784": lambda: learned_scale(Laplace, torch.distributions.Laplace, 128, 784),
    "`gaussian`, a softly bounded log scale of each, 128x784": lambda: bounded_scale(128, 784),
    "`student_t`, log scale of each, 128x784": lambda: robust(128, 784),
    "`bernoulli_logits`, positives weighted, 128x784": lambda: weighted_positives(128, 784),
    "`continuous_bernoulli_logits`, 128x784": lambda: continuous(128, 784),
    "`discretized_logistic`, 32x3x64x64": lambda: logistic(32, 3, 64, 64),
    "`discretized_logistic_mixture`, 8x3x32x32": lambda: mixture(8, 32),
    "`categorical`, classes last, [32, 64, 1000]": lambda: labels((32, 64, 1000), -1),
    "the same, a third of it padding": lambda: labels((32, 64, 1000), -1, padded=True),
    "`categorical`, [32, 256, 28, 28]": lambda: labels((32, 256, 28, 28), 1),
    "`multinomial`, 256x8000": lambda: multinomial(256, 8000),
    "`multinomial`, 500x20108": lambda: multinomial(500, 20108),
    "`poisson_log`, 128x4000, 10 % above zero": lambda: poisson(0.1, True),
    "the same, naive without log x!": lambda: poisson(0.1, False),
    **{f"`negative_binomial`, 128x4000, {kind}, {share:.0%} above zero": lambda each=each, share=share: genes(share, each)
       for each, kind in ((False, "theta of genes"), (True, "theta of each")) for share in (0.05, 0.1, 0.3, 1.0)},
    **{f"`zero_inflated_negative_binomial`, 128x4000, {share:.0%} above zero": lambda share=share: genes(share, False, True)
       for share in (0.05, 0.1, 0.3, 1.0)},
    **{f"KL from a learned Gaussian, latents {b}x{n}": lambda b=b, n=n: prior(b, n) for b, n in ((128, 20), (128, 512))},
    **{f"KL of deviations, latents {b}x{n}": lambda b=b, n=n: deviations(b, n) for b, n in ((128, 20), (128, 512))},
    "`sample_log_ratio`, latents 128x512": lambda: log_ratio(128, 512),
    "gene model, 128 cells, 2000 genes": gene_model,
    "text model, 32 sentences of 20 words": text_model,
    "recommender, 200 users, 8000 items": recommender,
}  # fmt: skip


def check(subject: Subject) -> None:
    """Raise unless both agree in value and gradients, with the same noise."""
    found = []
    for call, known in ((subject.naive, subject.known), (subject.fused, 0.0)):
        torch.manual_seed(1)
        loss = call()
        found.append([loss.detach() + known, *torch.autograd.grad(loss, subject.leaves)])
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-2)  # in places, the naive formulas lose most of their digits


def ratio(subject: Subject, seconds: float) -> tuple[float, float]:
    """Microseconds of the naive call, and how many times as fast fastelbo is: medians of pairs in turns."""

    def step(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for leaf in subject.leaves:
                leaf.grad = None
            call().backward()

        return run

    samples = interleaved({"naive": step(subject.naive), "fused": step(subject.fused)}, torch.device("cpu"), seconds)
    pairs = list(zip(samples["naive"], samples["fused"], strict=True))
    return 1e6 * statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)


def compiled(subject: Subject) -> Subject:
    """Both under torch.compile."""
    torch.compiler.reset()  # or its limit of recompilations would turn them into eager ones
    found = subject._replace(naive=torch.compile(subject.naive), fused=torch.compile(subject.fused))
    if subject.naive() == subject.naive():  # where numbers are drawn, the compiler draws others
        check(found)
    return found


def measure(names, threads: int, seconds: float, compiles: bool = False) -> dict[str, tuple[float, float]]:
    torch.set_num_threads(threads)
    settle(torch.device("cpu"))
    found = {}
    for name in names:
        torch.manual_seed(0)
        made = SUBJECTS[name]()
        check(made)
        found[name] = ratio(compiled(made) if compiles else made, seconds)
    return found


def medians(runs: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    return {name: tuple(map(statistics.median, zip(*(run[name] for run in runs), strict=True))) for name in runs[0]}


Found = dict[str, dict[str, tuple[float, float]]]  # title of a column -> name of a row -> what `ratio` returns


def table(eager: Found, both: Found) -> str:
    """Markdown: how many times as fast as the naive code, eager and with both compiled, and how long that takes, eager."""
    header = ["", *eager, *both, "naive, ms"]
    rows = [header, ["---"] * len(header)]
    for name in next(iter(eager.values())):
        ratios = [by_name[name][1] for by_name in (eager | both).values()]
        cells = [f"{ratio:.2f}" + " ▼" * (ratio < 0.995) for ratio in ratios]
        rows.append([name, *cells, " / ".join(f"{by_name[name][0] / 1000:.3g}" for by_name in eager.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def commit() -> str:
    """With a plus sign where files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def stand(module: str) -> str:
    """Where and of what a table is."""
    processor = cpuinfo.get_cpu_info()["brand_raw"]
    return f"{processor}, torch {torch.__version__}, commit {commit()}. `{' '.join(['python -m', module, *sys.argv[1:]])}`"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.likelihoods", description=__doc__.partition(": ")[2])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row, and more where five pairs take longer")
    parser.add_argument("--runs", type=int, default=1, help="of the whole, of which medians are taken")
    parser.add_argument(
        "--compiled", action="store_true", help="both under torch.compile, too, once and with the first number of threads"
    )
    parser.add_argument("--match", default="", help="only rows with this in their name")
    parser.add_argument("--write", action="store_true", help=f"to bench/results/{KEPT.name}")
    given = parser.parse_args()
    if given.match and given.write:
        parser.error("--write keeps all rows, without --match")
    names = [name for name in SUBJECTS if given.match in name]
    runs = [{n: measure(names, n, given.seconds) for n in given.threads} for _ in range(given.runs)]
    eager = {in_words(n): medians([run[n] for run in runs]) for n in given.threads}
    first = given.threads[: given.compiled]
    both = {f"{in_words(n)}, both compiled": measure(names, n, given.seconds, compiles=True) for n in first}
    times = f"{len(runs)} run{'s' * (len(runs) > 1)}{', of one if compiled' * bool(both)}"
    text = f"""# Every likelihood on a CPU

How many times as fast as the eager formula that its users write, forward and backward in float32, with the KL of 20 latents in
both; medians of pairs in turns, and of {times}. ▼ marks where fastelbo loses.
{stand("bench.likelihoods")}

{table(eager, both)}
"""
    print(text)
    if given.write:
        KEPT.write_text(text)


if __name__ == "__main__":
    main()
