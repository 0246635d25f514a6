"""`elbo` of many samples and by the importance-weighted bound: what holds when the decoder runs again in backward.

That values and gradients are the right ones is in test_truth.py; here they are held against one call with its graph kept.
"""

import contextlib
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastelbo
from bench.measure import peak_bytes
from conftest import DEVICE, INTERPRETED, once
from fastelbo import ELBO, IWAE
from fastelbo.likelihoods import Gaussian
from likelihood_cases import CASES
from support import ContiguousWhenUnpacked, gradients

B, LATENT, FEATURES, K = 3, 4, 10, 4

# Some of the likelihoods: one that the loss kernel computes, and one or two of each kernel that takes a sample at a time.
SOME = ("poisson_log", "gaussian, logvar", "negative_binomial", "categorical", "pos_weight of features")


def latents(device, dtype=torch.float32):
    mu = (0.3 * torch.randn(B, LATENT, device=device, dtype=dtype)).requires_grad_()
    return mu, (0.3 * torch.randn(B, LATENT, device=device, dtype=dtype)).requires_grad_()


def network(device, *middle) -> nn.Sequential:
    return nn.Sequential(nn.Linear(LATENT, 16), *middle, nn.SiLU(), nn.Linear(16, FEATURES)).to(device)


def target(device):
    return torch.rand(B, FEATURES, device=device)


def iwae(decoder, x, mu, logvar, eps=None, n_samples=K, estimator="standard", chunk=1, **options):
    bound = IWAE(n_samples, estimator=estimator, chunk=chunk)
    return fastelbo.elbo(decoder, x, mu, logvar, eps=eps, bound=bound, **{"likelihood": "bernoulli_logits"} | options).loss


def by_one_call(decoder, x, mu, logvar, eps, bound=IWAE, beta=1.0, **options):
    """The loss of each sample by `fastelbo.loss`, put together here; `[B]`."""
    samples = fastelbo.sample_log_ratio(mu, logvar, n_samples=len(eps), eps=eps)
    rows = []
    for z, log_q, log_p in zip(*samples, strict=True):
        kl = log_q - log_p if bound is IWAE else torch.zeros_like(log_q)
        rows.append(fastelbo.loss(decoder(z), x, kl=kl, beta=beta, reduction="none", **options).loss)
    rows = torch.stack(rows)
    return rows.mean(0) if bound is ELBO else math.log(len(eps)) - torch.logsumexp(-rows, 0)


@pytest.mark.parametrize("bound", (ELBO, IWAE))
@pytest.mark.parametrize("name", SOME if INTERPRETED else CASES)
def test_every_likelihood(name, bound, device):
    """A chunk of several samples, each against the one target."""
    case = CASES[name]
    parameters, x = case.make(device=device)
    mu, logvar = latents(device, torch.float64)
    eps = torch.randn(3, B, LATENT, device=device, dtype=torch.float64)
    mix = torch.randn(LATENT, device=device, dtype=torch.float64)

    def decoder(z):
        shares = torch.sigmoid(z @ mix)  # which keep what is positive so, and probabilities

        def of(p):
            if p.shape[:1] != parameters[0].shape[:1] or p.dim() < parameters[0].dim():
                return p
            return p.repeat(len(z) // B, *[1] * (p.dim() - 1)) * shares.view(-1, *[1] * (p.dim() - 1))

        made = tuple(map(of, parameters))
        return made if len(made) > 1 else made[0]

    wrt = (mu, logvar, *parameters)
    options = {"likelihood": case.likelihood}
    expected = by_one_call(decoder, x, mu, logvar, eps, bound, **options)
    upstream = torch.rand(B, device=device, dtype=torch.float64)
    expected = [expected, *gradients(expected, *wrt, grad_outputs=upstream, allow_unused=True)]
    for chunk in (2,) if INTERPRETED else (1, 2, 3):
        terms = fastelbo.elbo(
            decoder, x, mu, logvar, 0.0 if bound is ELBO else 1.0, bound=bound(3, chunk=chunk), eps=eps, reduction="none",
            **options,
        )  # fmt: skip
        found = [terms.loss, *gradients(terms.loss, *wrt, grad_outputs=upstream, allow_unused=True)]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_weights_and_reductions(device):
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    eps, weight = torch.randn(K, B, LATENT, device=device), torch.tensor([[1.0], [0.0], [0.5]], device=device)
    x[1] = float("nan")  # has no weight
    rows = by_one_call(net, x, mu, logvar, eps, ELBO, likelihood="bernoulli_logits", weight=weight)
    for reduction, divisor in (("sum", 1), ("batchmean", B), ("mean", 1.5 * FEATURES), ("none", None)):
        kl = fastelbo.kl_divergence(mu, logvar, reduction=reduction)
        expected = (rows if divisor is None else rows.sum() / divisor) + 0.3 * kl
        terms = fastelbo.elbo(
            net, x, mu, logvar, 0.3, bound=ELBO(K), eps=eps, weight=weight, likelihood="bernoulli_logits", reduction=reduction
        )
        torch.testing.assert_close(terms.loss, expected)
        torch.testing.assert_close(terms.recon + 0.3 * terms.kl, expected)
    rows = by_one_call(net, x, mu, logvar, eps, likelihood="bernoulli_logits", weight=weight)
    for reduction, expected in (("sum", rows.sum()), ("batchmean", rows.mean()), ("none", rows)):
        torch.testing.assert_close(iwae(net, x, mu, logvar, eps, weight=weight, reduction=reduction), expected)


@pytest.mark.parametrize("likelihood", ("bernoulli_logits", "categorical"))
@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean"))
def test_learned_weights(reduction, likelihood, device):
    """A mean divides by their sum, through which a gradient goes as well."""
    net, (mu, logvar) = network(device), latents(device)
    x = target(device) if likelihood == "bernoulli_logits" else torch.tensor([0, 3, 9], device=device)
    weight = torch.rand(x.shape, device=device, requires_grad=True)
    options = {
        "eps": torch.randn(K, B, LATENT, device=device),
        "likelihood": likelihood,
        "reduction": reduction,
    }
    results = []
    for chunk in (1, 3, K):
        loss = fastelbo.elbo(net, x, mu, logvar, 0.3, weight=weight, bound=ELBO(K, chunk=chunk), **options).loss
        results.append([loss.detach(), *gradients(loss, weight, mu, *net.parameters())])
    samples = fastelbo.sample_log_ratio(mu, logvar, n_samples=K, eps=options["eps"]).z
    if likelihood == "categorical":
        terms = torch.stack([F.cross_entropy(net(z), x, reduction="none") for z in samples])
    else:
        terms = torch.stack([F.binary_cross_entropy_with_logits(net(z), x, reduction="none") for z in samples])
    divisor = {"sum": 1.0, "batchmean": B, "mean": weight.sum()}[reduction]
    kl = fastelbo.kl_divergence(mu, logvar, reduction=reduction)
    exact = (terms * weight).sum() / (K * divisor) + 0.3 * kl
    expected = [exact.detach(), *gradients(exact, weight, mu, *net.parameters())]
    for found in results:
        torch.testing.assert_close(found, expected)


def test_iwae_has_the_terms_of_the_elbo(device):
    net, x, (mu, logvar), eps = network(device), target(device), latents(device), torch.randn(K, B, LATENT, device=device)
    monitors = [fastelbo.diagnostics.Monitor() for _ in range(2)]
    options = {"likelihood": "bernoulli_logits", "eps": eps, "reduction": "batchmean"}
    elbo = fastelbo.elbo(net, x, mu, logvar, bound=ELBO(K), monitor=monitors[0], **options)
    bound = fastelbo.elbo(net, x, mu, logvar, bound=IWAE(K), monitor=monitors[1], **options)
    torch.testing.assert_close([bound.recon, bound.kl], [elbo.recon.detach(), elbo.kl.detach()])
    assert not bound.recon.requires_grad and not bound.kl.requires_grad
    for name in ("kl_per_dimension", "mean_variance", "recon", "bits_per_dimension"):
        torch.testing.assert_close(getattr(monitors[1], name), getattr(monitors[0], name))
    torch.testing.assert_close(monitors[0].recon.float(), elbo.recon.detach())


def test_elbo_takes_what_the_kl_takes(device):
    """Weightings, a beta for each dimension, priors and other posteriors."""
    net, x, (mu, second), eps = network(device), target(device), latents(device), torch.randn(K, B, LATENT, device=device)
    prior = torch.randn(LATENT, device=device, requires_grad=True), torch.randn(B, LATENT, device=device, requires_grad=True)
    beta = torch.rand(LATENT, device=device)
    options = {"posterior": "log_std", "prior": prior, "weighting": fastelbo.Weighting(free_bits=0.2)}
    loss = fastelbo.elbo(net, x, mu, second, beta, bound=ELBO(K), eps=eps, likelihood="mse", **options).loss
    z = mu + torch.exp(second) * eps
    recon = sum(fastelbo.loss(net(sample), x, kl=torch.zeros((), device=device), likelihood="mse").recon for sample in z) / K
    expected = recon + fastelbo.loss(x, x, mu, second, beta, likelihood="mse", **options).loss
    wrt = (mu, second, *prior, *net.parameters())
    torch.testing.assert_close([loss, *gradients(loss, *wrt)], [expected, *gradients(expected, *wrt)], rtol=1e-5, atol=1e-5)


# Memory.


@once
@pytest.mark.counts_launches
@pytest.mark.parametrize("estimator", (None, "standard", "stl", "dreg"))
def test_memory_does_not_grow(estimator, device):
    """But for the sums of the gradients by the parameters, which grow while each chunk has its own."""
    decoder = nn.Sequential(nn.Linear(LATENT, 64), *[nn.SiLU(), nn.Linear(64, 64)] * 8, nn.Linear(64, 512)).to(device)
    sums, batch = sum(4 * p.numel() for p in decoder.parameters()), 256
    x, mu = torch.rand(batch, 512, device=device), torch.randn(batch, LATENT, device=device, requires_grad=True)
    logvar = torch.zeros(batch, LATENT, device=device, requires_grad=True)
    kind = ELBO if estimator is None else functools.partial(IWAE, estimator=estimator)

    def step(n_samples, chunk=1):
        bound = kind(n_samples, chunk=chunk)
        loss = fastelbo.elbo(decoder, x, mu, logvar, likelihood="bernoulli_logits", bound=bound).loss
        gradients(loss, mu, logvar, *decoder.parameters())

    step(2)  # what a thread keeps between calls is there
    one, *several = (peak_bytes(lambda k=k: step(k), device) for k in (1, 8, 24))
    assert max(several) - sums <= 1.2 * one, (one, several, sums)
    assert peak_bytes(lambda: step(8, chunk=8), device) > 5 * one  # this measures what it should


# The decoder, run again.


class Recorder(nn.Module):
    """Keeps what came out of a module at each call."""

    def __init__(self, module):
        super().__init__()
        self.module, self.outputs, self.inputs = module, [], []

    def forward(self, z):
        out = self.module(z)
        self.inputs.append(z.detach().clone())
        self.outputs.append(out.detach().clone())
        return out


@pytest.mark.parametrize("own_generator", (False, True))
@pytest.mark.parametrize("chunk", (1, 3))
def test_noise_and_dropout_agree(chunk, own_generator, device):
    recorder = Recorder(network(device, nn.Dropout(0.5)))
    x, (mu, logvar) = target(device), latents(device)
    generator = torch.Generator(device).manual_seed(1) if own_generator else None
    loss = iwae(recorder, x, mu, logvar, generator=generator, chunk=chunk)
    torch.rand(5, device=device)  # other random numbers are drawn in between
    if own_generator:
        torch.rand(5, device=device, generator=generator)
    states = torch.get_rng_state(), None if generator is None else generator.get_state()
    gradients(loss, mu, logvar)
    assert torch.equal(torch.get_rng_state(), states[0]), "backward moved the random state"
    assert generator is None or torch.equal(generator.get_state(), states[1])
    calls = -(-K // chunk)
    assert len(recorder.outputs) == 2 * calls
    for seen in (recorder.inputs, recorder.outputs):
        assert all(torch.equal(a, b) for a, b in zip(seen[:calls], seen[calls:], strict=True))
        assert not torch.equal(seen[0][:B], seen[1][:B])  # each sample has its own


@pytest.mark.parametrize("own_generator", (False, True))
def test_a_decoder_without_noise_leaves_random_states_alone(own_generator, device, monkeypatch):
    """Other threads may draw from them meanwhile, and would draw numbers twice: noise is kept, and not drawn again."""
    recorder = Recorder(network(device))
    x, (mu, logvar) = target(device), latents(device)
    generator = torch.Generator(device).manual_seed(1) if own_generator else None
    loss = iwae(recorder, x, mu, logvar, generator=generator)
    with monkeypatch.context() as patch:
        for place, name in ((torch, "set_rng_state"), (torch.random, "fork_rng")):
            patch.setattr(place, name, lambda *_, **__: pytest.fail("a random state was set"))
        gradients(loss, mu, logvar)
    assert all(torch.equal(a, b) for a, b in zip(recorder.inputs[:K], recorder.inputs[K:], strict=True))


@pytest.mark.parametrize("default", (False, True))
def test_a_generator_that_the_decoder_uses_too(default, device):
    """It goes on from the noise to the decoder, in backward as in forward."""
    generator = torch.default_generator if default and device.type == "cpu" else torch.Generator(device).manual_seed(1)
    net, x, (mu, logvar) = network(device), target(device), latents(device)

    def noisy(z):
        return net(z) + torch.randn(len(z), FEATURES, device=device, generator=generator)

    recorder = Recorder(noisy)
    loss = iwae(recorder, x, mu, logvar, generator=generator)
    state = generator.get_state()
    gradients(loss, mu)
    assert torch.equal(generator.get_state(), state)
    for seen in (recorder.inputs, recorder.outputs):
        assert all(torch.equal(a, b) for a, b in zip(seen[:K], seen[K:], strict=True))


def test_gradient_under_dropout(device):
    """Of the very masks that forward drew: those that a loop over the samples draws."""
    net, x, (mu, logvar), eps = network(device, nn.Dropout(0.5)), target(device), latents(device), torch.randn(K, B, LATENT)
    eps, wrt = eps.to(device), (mu, logvar, *net.parameters())
    torch.manual_seed(3)
    loss = iwae(net, x, mu, logvar, eps, reduction="none")
    torch.manual_seed(3)
    expected = by_one_call(net, x, mu, logvar, eps, likelihood="bernoulli_logits")
    torch.testing.assert_close(loss, expected)
    upstream = torch.rand(B, device=device)
    torch.testing.assert_close(
        gradients(loss, *wrt, grad_outputs=upstream), gradients(expected, *wrt, grad_outputs=upstream), rtol=1e-4, atol=1e-6
    )


def closures(net):
    """Ways to call a network."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def decode(self, z):
            return self.net(z)

    class Plain:
        def __init__(self):
            self.net = net

        def decode(self, z):
            return self.net(z)

        __call__ = decode

    model, plain, nets = Model(), Plain(), {"nets": [net]}
    return {
        "module": net,
        "method": model.decode,
        "lambda": lambda z: net(z),
        "lambda over a method": lambda z: model.decode(z),
        "partial": functools.partial(lambda z, other: other(z), other=net),
        "callable": plain,
        "method of no module": plain.decode,
        "lambda over an object": lambda z: next(inner(z) for inner in (plain.decode,)),
        "lambda over a list": lambda z: nets["nets"][0](z),
    }


@once
@pytest.mark.parametrize("way", closures(nn.Identity()))
@pytest.mark.parametrize("norm", (nn.BatchNorm1d, functools.partial(nn.BatchNorm1d, momentum=None)), ids=("", "cumulative"))
def test_statistics_move_once(way, norm, device):
    """As in a loop over the samples."""
    net, x, (mu, logvar), eps = network(device, norm(16)), target(device), latents(device), torch.randn(K, B, LATENT)
    eps, initial, wrt = eps.to(device), {k: v.clone() for k, v in net.state_dict().items()}, (mu, logvar, *net.parameters())
    expected = by_one_call(net, x, mu, logvar, eps, likelihood="bernoulli_logits").sum()
    expected, moved = gradients(expected, *wrt), {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(initial)
    found = gradients(iwae(closures(net)[way], x, mu, logvar, eps), *wrt)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert int(net[1].num_batches_tracked) == K and net[1].track_running_stats
    torch.testing.assert_close(dict(net.state_dict()), moved, rtol=1e-6, atol=1e-6)


@once
def test_statistics_of_instance_normalization(device):
    norm = nn.InstanceNorm1d(4, track_running_stats=True).to(device)
    net = nn.Sequential(network(device), nn.Unflatten(1, (2, 5)), nn.Conv1d(2, 4, 1, device=device), norm, nn.Flatten())
    x, (mu, logvar) = torch.rand(B, 20, device=device), latents(device)
    loss = iwae(net, x, mu, logvar)
    moved = norm.running_mean.clone()
    gradients(loss, mu)
    assert torch.equal(norm.running_mean, moved) and norm.momentum == 0.1


@once
def test_statistics_out_of_sight(device):
    class Decoder:
        __slots__ = ("net",)

        def __call__(self, z):
            return self.net(z)

    decoder = Decoder()
    decoder.net = network(device, nn.BatchNorm1d(16))
    x, (mu, logvar) = target(device), latents(device)
    with pytest.raises(RuntimeError, match=r"batch normalization in training mode .* out of sight"):
        iwae(decoder, x, mu, logvar)
    gradients(iwae(decoder, x, mu, logvar, chunk=K), mu)
    decoder.net.eval()
    gradients(iwae(decoder, x, mu, logvar), mu)


@once
def test_a_decoder_that_changes_itself(device):
    net = network(device)
    net[0] = nn.utils.parametrizations.spectral_norm(net[0])
    x, (mu, logvar) = target(device), latents(device)
    with pytest.raises(RuntimeError, match=r"its call changes _SpectralNorm\._u, _SpectralNorm\._v"):
        iwae(net, x, mu, logvar)
    gradients(iwae(net, x, mu, logvar, chunk=K), mu)
    gradients(iwae(net.eval(), x, mu, logvar), mu)


class Counter(nn.Module):
    """Counts its calls in a buffer, in place or not, and multiplies by the count."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.ones(()))

    def forward(self, z):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.calls.clone() * z


@once
@pytest.mark.parametrize("in_place", (False, True))
def test_a_decoder_that_counts(in_place, device):
    """Of two modules of one class, the first one changes."""
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    counters = nn.ModuleList([Counter(in_place), Counter(in_place)]).to(device)
    with pytest.raises(RuntimeError, match=r"its call changes Counter\.calls"):
        iwae(lambda z: counters[0](net(z)), x, mu, logvar)


@once
def test_a_decoder_that_is_changed_before_backward(device):
    net, x, (mu, logvar) = network(device, nn.Dropout(0.5)), target(device), latents(device)
    loss = iwae(net, x, mu, logvar)
    net.eval()
    with pytest.raises(RuntimeError, match="was in train mode and is in eval mode now, in backward"):
        loss.backward()
    net[0].weight.requires_grad_(False)
    loss = iwae(net, x, mu, logvar)
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(RuntimeError, match="written to between the call and its backward pass"):
        loss.backward()


@once
@pytest.mark.skipif(DEVICE.type != "cpu", reason="would take a sync")
@pytest.mark.parametrize("bound", (ELBO(K, chunk=2), IWAE(K), IWAE(K, estimator="dreg")), ids=str)
@pytest.mark.parametrize("change", ("rebound", "attribute", "written", "numpy"))
def test_a_decoder_that_uses_something_else_in_backward(change, bound, device):
    """Which is no leaf, as the condition of a batch is, or its own noise."""
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    net.condition = condition = torch.ones((), device=device)
    rng = np.random.default_rng(0)

    def decoder(z):
        if change == "numpy":
            return net(z) + float(rng.normal())
        return net(z) + (condition if change == "rebound" else net.condition)

    loss = fastelbo.elbo(decoder, x, mu, logvar, likelihood="bernoulli_logits", bound=bound).loss
    if change == "rebound":
        condition = torch.zeros((), device=device)
    elif change == "attribute":
        net.condition = torch.zeros((), device=device)
    elif change == "written":
        condition.zero_()
    with pytest.raises(RuntimeError, match="returned other values in backward"):
        loss.backward()
    assert mu.grad is None


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype, device):
    """Backward, outside of it, decodes as forward did."""
    recorder, x, (mu, logvar) = Recorder(network(device)), target(device), latents(device)
    eps, results = torch.randn(K, B, LATENT, device=device), []
    for chunk in (1, K):
        with torch.autocast(device.type, dtype):
            loss = iwae(recorder, x, mu, logvar, eps, chunk=chunk)
        assert loss.dtype == torch.float32
        results.append([loss, *gradients(loss, mu, logvar, *recorder.parameters())])
    assert {out.dtype for out in recorder.outputs} == {dtype}
    torch.testing.assert_close(*results, rtol=2e-2, atol=1e-2)


@once
def test_autocast_with_weights_that_were_cast_before(device):
    """Their casts belong to another graph; and those that are made here are nobody else's."""
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    with torch.autocast(device.type, torch.bfloat16):
        net(mu)
        loss = iwae(net, x, mu, logvar, reduction="none")
    assert loss.grad_fn.name() == "SamplesBackward"
    with torch.autocast(device.type, torch.bfloat16):
        fastelbo.log_likelihood(net, x, mu, logvar, likelihood="bernoulli_logits", n_samples=2)
        assert all(g.abs().max() > 0 for g in gradients(net(mu).sum(), *net.parameters()))


def test_float16_loss_scale(device):
    """The upstream gradient is there before anything is rounded: none of it underflows."""
    net, x, (mu, logvar) = network(device).half(), target(device), (t.detach().half().requires_grad_() for t in latents(device))
    eps = torch.randn(K, B, LATENT, device=device).half()

    def scaled(factor):
        loss = iwae(net, x, mu, logvar, eps, reduction="batchmean") * 1e-6
        return [g.float() / factor for g in gradients(loss * factor, mu, *net.parameters())]

    plain, found = scaled(1.0), scaled(65536.0 * 64)
    double = [t.detach().double().requires_grad_(t.requires_grad) for t in (mu, logvar)]
    network64 = nn.Sequential(nn.Linear(LATENT, 16), nn.SiLU(), nn.Linear(16, FEATURES)).to(device).double()
    network64.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
    truth = iwae(network64, x.double(), *double, eps.double(), reduction="batchmean") * 1e-6
    truth = [g.float() for g in gradients(truth, double[0], *network64.parameters())]
    for a, b, c in zip(found, plain, truth, strict=True):
        torch.testing.assert_close(a, c, rtol=2e-2, atol=1e-2 * c.abs().max().item())
        assert (a - c).abs().max() < (b - c).abs().max()


def test_gradient_is_computed_once(device, monkeypatch):
    """Backward knows the factor of each row before the loss is computed again: nothing is corrected afterwards."""
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    from fastelbo.engine.backend import backend_for

    factors = []
    backend = backend_for(device)
    original = backend.loss_backward

    def recorded(plan, beta, tensors, divisor, upstreams, stored, sums, used, needs):
        factors.append(stored is not None and torch.equal(upstreams[0], used))
        return original(plan, beta, tensors, divisor, upstreams, stored, sums, used, needs)

    monkeypatch.setattr(backend, "loss_backward", recorded)
    gradients(3 * iwae(net, x, mu, logvar, chunk=3), mu)
    assert factors == [True, True]


# What the decoder may be made of.


def agrees(decoder, device, wrt=(), kept=False, **options):
    """In two chunks, whose graphs are rebuilt or all `kept`, and in one."""
    x, (mu, logvar), eps = target(device), latents(device), torch.randn(K, B, LATENT, device=device)
    results = []
    for chunk in (2, K):
        warned = pytest.warns(UserWarning, match="keeps the graphs") if kept and chunk == 2 else contextlib.nullcontext()
        with warned:
            loss = iwae(decoder, x, mu, logvar, eps, chunk=chunk, reduction="none", **options)
        assert (loss.grad_fn.name() == "SamplesBackward") == (chunk == 2 and not kept)
        upstream = torch.arange(1.0, B + 1, device=device)
        results.append([loss, *gradients(loss, mu, logvar, *wrt, grad_outputs=upstream)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@once
def test_closure_over_a_leaf(device):
    net, shift = network(device), torch.randn(FEATURES, device=device, requires_grad=True)
    agrees(lambda z: net(z) + shift, device, (shift, *net.parameters()))


@once
def test_output_that_is_computed_before(device):
    """A weight of the positive part, whose graph belongs to the outer one: it is kept."""
    net, log_ratio = network(device), torch.tensor(0.7, device=device, requires_grad=True)

    class Exponential:  # a graph is gone with its first backward pass, so each call has its own
        def __init__(self):
            self.ratio = log_ratio.exp()

        def __call__(self, z):
            return net(z), self.ratio

    x, (mu, logvar), eps = target(device), latents(device), torch.randn(K, B, LATENT, device=device)
    with pytest.warns(UserWarning, match="keeps the graphs"):
        losses = [iwae(Exponential(), x, mu, logvar, eps, chunk=chunk) for chunk in (2, K)]
    wrt = (mu, logvar, log_ratio, *net.parameters())
    torch.testing.assert_close(*([loss, *gradients(loss, *wrt)] for loss in losses), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ("standard", "stl", "dreg"))
def test_closure_over_features_of_the_encoder(estimator, device):
    """Their graph belongs to the outer one: it is kept."""
    net, x, (mu, logvar), eps = network(device), target(device), latents(device), torch.randn(K, B, LATENT, device=device)
    encoder = torch.randn(FEATURES, device=device, requires_grad=True)
    features, results = 2 * encoder, []
    for chunk in (1, 3, K):
        warned = pytest.warns(UserWarning, match="keeps the graphs") if chunk < K else contextlib.nullcontext()
        with warned:
            loss = iwae(lambda z: net(z) + features, x, mu, logvar, eps, chunk=chunk, estimator=estimator)
        results.append(gradients(loss, mu, logvar, encoder, *net.parameters(), retain_graph=True))
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-5)


@once
@pytest.mark.parametrize("likelihood", (Gaussian(parameter="log_scale"), "bernoulli_logits"), ids=("scale", "pos_weight"))
def test_output_that_is_a_leaf(likelihood, device):
    """A scale, or a weight, that is learned by itself."""
    net, learned = network(device), torch.ones(FEATURES, device=device, requires_grad=True)
    agrees(lambda z: (net(z), learned), device, (learned, *net.parameters()), likelihood=likelihood)


@once
def test_closure_over_a_name_that_is_assigned_later(device):
    net = network(device)

    def decoder(z):
        return net(z) if z is not None else later

    agrees(decoder, device, tuple(net.parameters()))
    later = None


@once
def test_frozen_decoder(device):
    agrees(network(device).requires_grad_(False), device)


@once
def test_fixed_latents(device):
    net, x = network(device), target(device)
    mu, logvar, eps = torch.zeros(B, LATENT, device=device), torch.zeros(B, LATENT, device=device), torch.randn(K, B, LATENT)
    found = [gradients(iwae(net, x, mu, logvar, eps.to(device), chunk=chunk), *net.parameters()) for chunk in (1, K)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@once
def test_weights_shared_with_the_encoder(device):
    weight = torch.randn(LATENT, FEATURES, device=device, requires_grad=True)
    x, eps = target(device), torch.randn(K, B, LATENT, device=device)

    def loss_of(chunk):
        return iwae(lambda z: z @ weight, x, x @ weight.T, 0.1 * (x @ weight.T), eps, chunk=chunk, reduction="none")

    assert loss_of(1).grad_fn.name() == "SamplesBackward"
    found = [gradients(loss_of(chunk).sum(), weight) for chunk in (1, K)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_decoder_writes_to_z(device):
    net = nn.Sequential(nn.SiLU(inplace=True), *network(device))
    agrees(net, device, tuple(net.parameters()))


@once
def test_checkpoint_within(device):
    net = network(device)
    agrees(lambda z: checkpoint(net, z, use_reentrant=False), device, tuple(net.parameters()))


@once
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it, and hides that
def test_compiled_decoder(device):
    net = network(device)
    agrees(torch.compile(net, backend="aot_eager"), device, tuple(net.parameters()))


@once
def test_function_in_python(device):
    """It may hide what it depends on: the graph is kept."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return 2 * t

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    net = network(device)
    agrees(lambda z: Double.apply(net(z)), device, tuple(net.parameters()), kept=True)


@once
def test_hooks_on_leaves(device):
    net, seen = network(device), []
    net[0].weight.register_hook(seen.append)
    agrees(net, device, tuple(net.parameters()), kept=True)
    assert len(seen) == 2  # once a backward pass
    late, x, (mu, logvar) = network(device), target(device), latents(device)
    loss = iwae(late, x, mu, logvar)
    late[0].weight.register_hook(seen.append)
    with pytest.raises(RuntimeError, match="given a hook after the call"):
        loss.backward()


@once
def test_decoder_that_uses_other_tensors_later(device):
    nets = [network(device) for _ in range(2)]
    calls = iter(range(100))
    x, (mu, logvar) = target(device), latents(device)
    loss = iwae(lambda z: nets[min(next(calls), 1)](z), x, mu, logvar)
    with pytest.raises(RuntimeError, match="uses a tensor now that its first sample did not use"):
        loss.backward()


@once
def test_optimizer_stepped_too_early(device):
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    loss = iwae(net, x, mu, logvar)
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="written to between the call and its backward pass"):
        loss.backward()


# Autograd.


def test_backward_again_through_a_retained_graph(device):
    net, x, (mu, logvar) = network(device, nn.Dropout(0.5)), target(device), latents(device)
    loss = iwae(net, x, mu, logvar)
    first = gradients(loss, mu, *net.parameters(), retain_graph=True)
    again = gradients(loss, mu, *net.parameters(), grad_outputs=torch.tensor(2.0, device=device))
    torch.testing.assert_close([2 * g for g in first], list(again))


def test_saved_tensors_that_come_back_otherwise(device):
    net, x, (mu, logvar), eps = network(device), target(device), latents(device), torch.randn(K, B, LATENT, device=device)
    results = []
    for context in (torch.enable_grad, ContiguousWhenUnpacked):
        with context():
            loss = iwae(net, x, mu, logvar, eps)
        results.append(gradients(loss, mu, logvar, *net.parameters()))
    torch.testing.assert_close(*results)


def test_second_derivatives(device):
    x, eps = torch.rand(1, 2, device=device, dtype=torch.float64), torch.randn(2, 1, 2, device=device, dtype=torch.float64)
    inputs = [torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True) for shape in ((1, 2), (1, 2), (2, 2))]

    def loss(mu, logvar, weight, **options):
        return iwae(lambda z: torch.sin(z @ weight), x, mu, logvar, eps, n_samples=2, **options)

    assert torch.autograd.gradgradcheck(functools.partial(loss, chunk=2), inputs)
    for options, match in (
        ({"chunk": 1}, "pass chunk=n_samples"),
        ({"chunk": 2, "estimator": "stl"}, "cannot be differentiated"),
        ({"chunk": 2, "estimator": "dreg"}, "cannot be differentiated"),
    ):
        with pytest.raises(RuntimeError, match=match):
            gradients(loss(*inputs, **options), *inputs, create_graph=True)


@once
@pytest.mark.parametrize("needs", ("mu", "logvar", "x", "beta", "scale", "prior", "none"))
def test_any_input_alone(needs, device):
    net, x = network(device).requires_grad_(False), target(device)
    mu, logvar = (t.detach() for t in latents(device))
    eps, prior = (
        torch.randn(K, B, LATENT, device=device),
        (torch.zeros(LATENT, device=device), torch.ones(LATENT, device=device)),
    )
    beta, scale = torch.tensor(0.5, device=device), torch.tensor(0.7, device=device)
    wanted = {"mu": mu, "logvar": logvar, "x": x, "beta": beta, "scale": scale, "prior": prior[1]}.get(needs)
    if wanted is not None:
        wanted.requires_grad_()
    losses = [
        fastelbo.elbo(
            lambda z: (net(z), scale), x, mu, logvar, beta, likelihood="gaussian", prior=prior, bound=IWAE(K, chunk=chunk),
            eps=eps,
        ).loss
        for chunk in (1, K)
    ]  # fmt: skip
    torch.testing.assert_close(*losses)
    if wanted is None:
        assert not any(loss.requires_grad for loss in losses)
    else:
        torch.testing.assert_close(*(gradients(loss, wanted) for loss in losses), rtol=1e-4, atol=1e-5)


def test_noise_that_requires_grad(device):
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    eps = torch.randn(K, B, LATENT, device=device, requires_grad=True)
    with pytest.warns(UserWarning, match="keeps the graphs of all samples"):
        losses = [iwae(net, x, mu, logvar, eps, chunk=chunk) for chunk in (1, K)]
    torch.testing.assert_close(*(gradients(loss, eps, mu) for loss in losses), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bound", (ELBO(K, chunk=2), IWAE(K, chunk=2), IWAE(K, estimator="stl", chunk=2)), ids=str)
def test_compiled(bound, device):
    net, x, (mu, logvar), eps = network(device), target(device), latents(device), torch.randn(K, B, LATENT, device=device)

    def call(mu, logvar):
        return fastelbo.elbo(net, x, mu, logvar, bound=bound, eps=eps, likelihood="bernoulli_logits").loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [[f(mu, logvar), *gradients(f(mu, logvar), mu, logvar, *net.parameters())] for f in (call, compiled)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_per_sample_gradients(device):
    net, x, (mu, logvar), eps = network(device), target(device), latents(device), torch.randn(K, B, LATENT, device=device)

    def one(x, mu, logvar, eps):
        return iwae(net, x[None], mu[None], logvar[None], eps[:, None])

    found = torch.func.vmap(torch.func.grad(one, 1), (0, 0, 0, 1))(x, mu.detach(), logvar.detach(), eps)
    torch.testing.assert_close(found, gradients(iwae(net, x, mu, logvar, eps), mu)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="neither compiled nor transformed"):
        torch.func.grad(lambda mu: iwae(net, x, mu, logvar, eps, estimator="dreg"))(mu.detach())


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_without_gradient(context, device):
    recorder, x, (mu, logvar), eps = Recorder(network(device)), target(device), latents(device), torch.randn(K, B, LATENT)
    with context():
        loss = iwae(recorder, x, mu, logvar, eps.to(device))
    assert not loss.requires_grad and len(recorder.outputs) == K
    torch.testing.assert_close(loss, iwae(recorder, x, mu, logvar, eps.to(device)).detach())


@pytest.mark.parametrize("likelihood", ("mse", "laplace"))
def test_no_data(likelihood, device):
    net, x, empty = network(device), torch.empty(0, FEATURES, device=device), torch.empty(0, LATENT, device=device)
    mu, logvar = empty.requires_grad_(), empty.clone().requires_grad_()
    for bound in (ELBO(K, chunk=2), IWAE(K, chunk=2)):
        loss = fastelbo.elbo(net, x, mu, logvar, likelihood=likelihood, bound=bound).loss
        assert loss == 0
        assert all(g.abs().sum() == 0 for g in gradients(loss, mu, *net.parameters()))


# log_likelihood and sample_log_ratio; that they are right is in test_truth.py.


def test_log_likelihood_is_the_bound(device):
    net, x, (mu, logvar), eps = network(device), target(device), latents(device), torch.randn(7, B, LATENT, device=device)
    bound = -iwae(net, x, mu, logvar, eps, n_samples=7, reduction="none")
    for chunk in (1, 3, 100):
        found = fastelbo.log_likelihood(net, x, mu, logvar, likelihood="bernoulli_logits", eps=eps, n_samples=7, chunk=chunk)
        torch.testing.assert_close(found.log_p, bound.detach())
        assert not found.log_p.requires_grad
    samples = fastelbo.sample_log_ratio(mu, logvar, n_samples=7, eps=eps)
    log_p_x = -F.binary_cross_entropy_with_logits(net(samples.z), x.expand(7, -1, -1), reduction="none").sum(-1)
    w = torch.exp((log_p_x + samples.log_p - samples.log_q).double())
    torch.testing.assert_close(found.standard_error.double(), w.std(0) / 7**0.5 / w.mean(0), rtol=1e-4, atol=1e-6)


def test_log_likelihood_of_one_sample_and_of_weights_that_underflow(device):
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    found = fastelbo.log_likelihood(net, x, mu, logvar, likelihood="bernoulli_logits", n_samples=1)
    assert found.log_p.isfinite().all() and found.standard_error.isnan().all()
    found = fastelbo.log_likelihood(net, x, mu, logvar, likelihood=Gaussian(scale=1e-3), n_samples=20)
    assert found.log_p.isfinite().all() and (found.log_p < -1e4).all() and found.standard_error.isfinite().all()


@once
def test_progress_bar(device, capsys):
    pytest.importorskip("tqdm")
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    fastelbo.log_likelihood(net, x, mu, logvar, likelihood="bernoulli_logits", n_samples=6, chunk=2, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_dtypes(device):
    net, x, (mu, logvar) = network(device), target(device), latents(device)
    torch.set_default_dtype(torch.float64)
    try:
        for bound in (ELBO(2), IWAE(2)):
            terms = fastelbo.elbo(net, x, mu, logvar, likelihood="mse", bound=bound)
            assert {t.dtype for t in terms} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    found = fastelbo.sample_log_ratio(mu, logvar, flow=lambda z: (2 * z.double(), z.sum(1)))
    assert found.log_q.dtype == found.log_p.dtype == torch.float64
    torch.testing.assert_close(found.log_p, torch.distributions.Normal(0.0, 1.0).log_prob(found.z).sum(1))
    loss = fastelbo.elbo(lambda z: net(z.float()), x, mu.double(), logvar, likelihood="mse", bound=IWAE(np.int64(2))).loss
    assert loss.dtype == torch.float64


def test_sample_log_ratio_draws_as_reparameterize(device):
    mu, logvar = latents(device)
    torch.manual_seed(5)
    z = fastelbo.reparameterize(mu, logvar)
    torch.manual_seed(5)
    torch.testing.assert_close(fastelbo.sample_log_ratio(mu, logvar).z, z)
    generator = torch.Generator(device).manual_seed(5)
    samples = fastelbo.sample_log_ratio(mu, logvar, n_samples=3, generator=generator)
    assert samples.z.shape == (3, B, LATENT) and samples.log_q.shape == samples.log_p.shape == (3, B)
    assert not torch.equal(samples.z[0], samples.z[1])
    assert fastelbo.sample_log_ratio(mu.bfloat16(), logvar.bfloat16()).z.dtype == torch.bfloat16


# Errors.


@once
@pytest.mark.parametrize(
    "options, error, match",
    (
        ({"bound": "iwae"}, TypeError, "bound must be a fastelbo.ELBO or a fastelbo.IWAE, got str"),
        ({"bound": 5}, TypeError, "bound must be a fastelbo.ELBO or a fastelbo.IWAE, got int"),
        ({"reduction": "mean"}, ValueError, "reduction must be 'sum', 'batchmean' or 'none' for an IWAE, got 'mean'"),
        ({"reduction": ("sum", "batchmean")}, ValueError, r"'none' for an IWAE, got \('sum', 'batchmean'\)"),
        ({"weighting": fastelbo.Weighting(free_bits=0.1)}, ValueError, "weighting is for the KL of an ELBO"),
        ({"beta": torch.ones(LATENT)}, ValueError, "beta must be a number or a 0-d tensor"),
        ({"eps": torch.zeros(B, LATENT)}, ValueError, r"eps must have the shape of mu behind a dimension of n_samples"),
        ({"eps": torch.zeros(K, B, LATENT), "generator": torch.Generator(DEVICE)}, ValueError, "eps or generator, not both"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"decoder": 3}, TypeError, "decoder must be callable, got int"),
        ({"decoder": lambda z: z[:, :1]}, ValueError, r"decoder\(z\) must have the shape of x"),
        ({"decoder": lambda z: z[:1]}, ValueError, r"decoder\(z\) must have a row for each of the 3 of z, got \(1, 4\)"),
        ({"decoder": lambda z: (z, z, z)}, ValueError, r"decoder\(z\) must be .* the tuple \(logits, pos_weight\) for"),
        ({"decoder": lambda z: (z, z), "likelihood": "mse"}, ValueError, r"decoder\(z\) must be a tensor for .* 'mse', got 2"),
        ({"x": torch.rand(2, FEATURES)}, ValueError, "x and mu must have the same batch size"),
        ({"likelihood": Gaussian("optimal")}, ValueError, r"likelihood must not be Gaussian\(scale='optimal'\) with several"),
        ({"x": torch.full((B, FEATURES), 7)}, ValueError, r"x must lie in \[0, 1\]"),
    ),
)  # fmt: skip
def test_errors_name_the_argument(options, error, match, device):
    if "must lie in" in match and device.type != "cpu":
        pytest.skip("nobody looks at values on a GPU")
    arguments = {"decoder": network(device), "x": target(device), "beta": 1.0} | options
    mu, logvar = latents(device)
    rest = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items() if k not in ("decoder", "beta")}
    rest = {"likelihood": "bernoulli_logits", "bound": IWAE(K)} | rest
    with pytest.raises(error, match=match):
        fastelbo.elbo(arguments["decoder"], rest.pop("x"), mu, logvar, arguments["beta"], **rest)


@once
@pytest.mark.parametrize(
    "options, error, match",
    (
        ({"n_samples": 0}, ValueError, "n_samples must be at least 1"),
        ({"eps": torch.zeros(2, B, LATENT)}, ValueError, "eps must have the shape of mu"),
        ({"flow": 1}, TypeError, "flow must be callable, got int"),
        ({"flow": lambda z: z}, TypeError, r"flow\(z\) must be a pair \(z, log_det\) of tensors, got Tensor"),
        ({"flow": lambda z: (z[:, :1], z[:, 0])}, ValueError, r"flow\(z\)\[0\] must have the shape of z"),
        ({"flow": lambda z: (z, z)}, ValueError, r"flow\(z\)\[1\] must have one log_det a row, \(3,\): got \(3, 4\)"),
    ),
)
def test_errors_of_sample_log_ratio(options, error, match, device):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=match):
        fastelbo.sample_log_ratio(*latents(device), **options)


@pytest.mark.parametrize(
    "make, error, match",
    (
        *(
            case
            for kind in (ELBO, IWAE)
            for case in (
                (lambda kind=kind: kind(0), ValueError, f"{kind.__name__}.n_samples must be at least 1, got 0"),
                (lambda kind=kind: kind(2.0), TypeError, f"{kind.__name__}.n_samples must be an integer, got float"),
                (lambda kind=kind: kind(2, chunk=0), ValueError, f"{kind.__name__}.chunk must be at least 1, got 0"),
                (lambda kind=kind: kind(2, chunk=True), TypeError, f"{kind.__name__}.chunk must be an integer, got bool"),
                (lambda kind=kind: kind(2, 1), TypeError, "positional"),
            )
        ),
        (lambda: IWAE(2, estimator="rws"), ValueError, "IWAE.estimator must be one of 'standard', 'stl', 'dreg'; got 'rws'"),
        (lambda: IWAE(2, estimator=None), ValueError, "IWAE.estimator must be one of 'standard', 'stl', 'dreg'; got None"),
        (lambda: ELBO(2, estimator="stl"), TypeError, "estimator"),
        (lambda: IWAE(), TypeError, "n_samples"),
    ),
)
def test_errors_of_bounds(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.usefixtures("by_functions")
def test_no_bound_is_the_elbo_of_one_sample(device):
    net, x, (mu, logvar), eps = network(device), target(device), latents(device), torch.randn(B, LATENT, device=device)
    results = []
    for options in ({}, {"bound": None}, {"bound": ELBO()}, {"bound": ELBO(1, chunk=7)}):
        terms = fastelbo.elbo(net, x, mu, logvar, 0.5, eps=eps, likelihood="bernoulli_logits", **options)
        results.append([*terms, *gradients(terms.loss, mu, logvar, *net.parameters())])
        assert terms.loss.grad_fn.name() == "LossBackward"
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@once
def test_log_likelihood_needs_a_density(device):
    with pytest.raises(ValueError, match="likelihood must be a density here, such as 'gaussian' or 'laplace'; got 'mse'"):
        fastelbo.log_likelihood(network(device), target(device), *latents(device), likelihood="mse")
