"""`elbo`: around any decoder, with the gradients of the composed calls and of the naive code."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastelbo
from conftest import once
from fastelbo import ELBO, IWAE
from support import gradients, options
from support import naive as naive_loss

B, LATENT, FEATURES = 6, 4, 10


def latents(device):
    mu = (0.3 * torch.randn(B, LATENT, device=device)).requires_grad_()
    logvar = (0.3 * torch.randn(B, LATENT, device=device)).requires_grad_()
    return mu, logvar


def network(device, batchnorm=False, dropout=False) -> nn.Sequential:
    middle = [nn.BatchNorm1d(16)] * batchnorm + [nn.ReLU()] + [nn.Dropout(0.5)] * dropout
    return nn.Sequential(nn.Linear(LATENT, 16), *middle, nn.Linear(16, FEATURES)).to(device)


def by_elbo(decoder, x, mu, logvar, eps, beta=0.5, **kwargs):
    return fastelbo.elbo(decoder, x, mu, logvar, beta, eps=eps, **kwargs)


def composed(decoder, x, mu, logvar, eps, beta=0.5, **kwargs):
    z, kl = fastelbo.sample_kl(mu, logvar, eps=eps)
    return fastelbo.loss(decoder(z), x, kl=kl, beta=beta, **kwargs)


def naive(decoder, x, mu, logvar, eps, beta=0.5, **kwargs):
    z = mu + torch.exp(0.5 * logvar) * eps
    return naive_loss(decoder(z), x, mu, logvar, beta, **kwargs)


def compare(make_decoder, device, likelihood="bernoulli_logits", use=lambda t: 3 * t[0] + t[2], rtol=1e-4):
    """Results and gradients by all three ways; `make_decoder()` gives a decoder and the tensors whose gradients count."""
    results = []
    for way in (by_elbo, composed, naive):
        torch.manual_seed(0)
        mu, logvar = latents(device)
        x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)
        decoder, tensors = make_decoder()
        terms = way(decoder, x, mu, logvar, eps, **options(likelihood))
        for t in tensors:
            t.grad = None
        use(terms).backward()
        results.append([*(t.detach() for t in terms), mu.grad, logvar.grad, *(t.grad for t in tensors)])
    assert all(t is not None for t in results[0])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dropout", (False, True), ids=("", "dropout"))
@pytest.mark.parametrize("batchnorm", (False, True), ids=("", "batchnorm"))
def test_module(batchnorm, dropout, device):
    def make():
        net = network(device, batchnorm, dropout)
        return net, list(net.parameters())

    compare(make, device)


def test_batchnorm_statistics_move_once(device):
    net = network(device, batchnorm=True)
    mu, logvar = latents(device)
    by_elbo(net, torch.rand(B, FEATURES, device=device), mu, logvar, None, likelihood="mse").loss.backward()
    assert net[1].num_batches_tracked == 1


@pytest.mark.parametrize("likelihood", ("bernoulli", "mse", "gaussian"))
def test_likelihoods(likelihood, device):
    def make():
        net = network(device)
        return (lambda z: torch.sigmoid(net(z))), list(net.parameters())

    compare(make, device, likelihood=likelihood)


@pytest.mark.parametrize(
    "use", (lambda t: t[0], lambda t: t[1], lambda t: 2 * t[1] + 5 * t[2], lambda t: t[0] * 1e-3), ids=range(4)
)
def test_outputs_apart(use, device):
    def make():
        net = network(device)
        return net, list(net.parameters())

    compare(make, device, use=use)


def test_only_the_kl_is_used(device):
    net = network(device)
    mu, logvar = latents(device)
    terms = by_elbo(net, torch.rand(B, FEATURES, device=device), mu, logvar, None, likelihood="mse")
    terms.kl.backward()
    torch.testing.assert_close(mu.grad, mu.detach())
    assert all(p.grad is None for p in net.parameters())


def test_bound_method(device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(device)

        def decode(self, z):
            return self.net(z)

    def make():
        model = Model()
        return model.decode, list(model.parameters())

    compare(make, device)


def test_lambda_over_leaves(device):
    def make():
        net, shift = network(device), torch.randn(FEATURES, device=device, requires_grad=True)
        return (lambda z: net(z) + shift), [shift, *net.parameters()]

    compare(make, device)


def test_a_parameter_used_outside_as_well(device):
    """Weights tied between encoder and decoder: both paths count."""

    def make():
        weight = torch.randn(LATENT, FEATURES, device=device, requires_grad=True)
        return (lambda z: z @ weight), [weight]

    results = []
    for way in (by_elbo, composed, naive):
        torch.manual_seed(0)
        x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)
        decoder, (weight,) = make()
        hidden = x @ weight.T
        way(decoder, x, hidden, 0.1 * hidden, eps, likelihood="mse")[0].backward()
        results.append(weight.grad)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_lambda_over_a_tensor_computed_before(device):
    """A conditional decoder: what it closes over has a graph of its own, shared with the encoder."""

    def make():
        net, condition = network(device), torch.randn(B, FEATURES, device=device, requires_grad=True)
        hidden = condition.tanh()
        return (lambda z: net(z) * hidden + hidden), [condition, *net.parameters()]

    compare(make, device)


def test_decoder_that_sees_the_latents_graph(device):
    results = []
    for way in (by_elbo, composed, naive):
        torch.manual_seed(0)
        x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)
        encoder, net = nn.Linear(FEATURES, LATENT).to(device), network(device)
        h = encoder(x)
        mu, logvar = 2 * h, 0.1 * h
        way(lambda z: net(z + h), x, mu, logvar, eps, likelihood="mse")[0].backward()  # noqa: B023
        results.append([p.grad for p in (*encoder.parameters(), *net.parameters())])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_leaf_with_hooks_runs_them_once(device):
    calls = []

    def make():
        net = network(device)
        net[0].weight.register_hook(lambda g: calls.append(1) or 2 * g)
        return net, list(net.parameters())

    compare(make, device)
    assert len(calls) == 3


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
def test_checkpoint_inside_the_decoder(reentrant, device):
    def make():
        net = network(device, dropout=True)
        return (lambda z: checkpoint(net, z, use_reentrant=reentrant)), list(net.parameters())

    compare(make, device)


@pytest.mark.parametrize("way", (by_elbo, composed))
@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
def test_checkpoint_around_encoder_sampling_and_decoder(reentrant, way, device):
    """The noise of the recomputation is the first noise."""
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        encoder, net = nn.Linear(FEATURES, 2 * LATENT).to(device), network(device)
        x = torch.rand(B, FEATURES, device=device, requires_grad=True)

        def region(x):
            return way(net, x.detach(), *encoder(x).chunk(2, 1), None, likelihood="mse").loss  # noqa: B023

        torch.manual_seed(5)
        loss = checkpoint(region, x, use_reentrant=reentrant) if checkpointed else region(x)
        loss.backward()
        results.append([p.grad for p in (*encoder.parameters(), *net.parameters())])
    torch.testing.assert_close(*results)


def test_decoder_that_writes_to_z(device):
    def make():
        net = network(device)
        return (lambda z: net(z.mul_(2))), list(net.parameters())

    compare(make, device)


def test_identity_decoder(device):
    for way in (by_elbo, composed):
        torch.manual_seed(0)
        mu, logvar = latents(device)
        x, eps = torch.rand(B, LATENT, device=device), torch.randn(B, LATENT, device=device)
        way(lambda z: z, x, mu, logvar, eps, likelihood="mse").loss.backward()
        z = mu + torch.exp(0.5 * logvar) * eps
        torch.testing.assert_close(mu.grad, (2 * (z - x) + 0.5 * mu).detach())


@pytest.mark.parametrize("frozen", ("encoder", "decoder", "mu", "logvar"))
def test_frozen_parts(frozen, device):
    results = []
    for way in (by_elbo, composed, naive):
        torch.manual_seed(0)
        mu, logvar = latents(device)
        net = network(device)
        mu.requires_grad_(frozen not in ("encoder", "mu"))
        logvar.requires_grad_(frozen not in ("encoder", "logvar"))
        net.requires_grad_(frozen != "decoder")
        x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)
        way(net, x, mu, logvar, eps, likelihood="mse")[0].backward()
        results.append([t.grad for t in (mu, logvar, *net.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_target_and_beta_that_require_grad(device):
    results = []
    for way in (by_elbo, naive):
        torch.manual_seed(0)
        mu, logvar = latents(device)
        net = network(device)
        x = torch.rand(B, FEATURES, device=device, requires_grad=True)
        beta = torch.tensor(0.2, device=device, requires_grad=True)
        way(net, x, mu, logvar, torch.ones_like(mu), beta, likelihood="mse")[0].backward()
        results.append([x.grad, beta.grad, mu.grad])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("beta_too", (False, True), ids=("", "beta"))
@pytest.mark.parametrize(
    "lay",
    (
        lambda x: x.contiguous(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat_interleave(2, 3)[..., ::2],
        lambda x: x[:1].expand_as(x),
    ),
    ids=("contiguous", "channels last", "transposed", "strided", "expanded"),
)
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels last"))
def test_a_target_in_another_layout_keeps_its_gradient(last, lay, beta_too, device):
    results = []
    for way in (by_elbo, composed, naive):
        torch.manual_seed(0)
        mu, logvar = latents(device)
        net = nn.Sequential(nn.Linear(LATENT, 24), nn.Unflatten(1, (2, 3, 4))).to(device)
        x = lay(torch.rand(B, 2, 3, 4)).to(device).detach().requires_grad_()
        beta = torch.tensor(0.2, device=device, requires_grad=beta_too)

        def decoder(z, net=net):
            return net(z).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

        way(decoder, x, mu, logvar, torch.ones_like(mu), beta, likelihood="mse")[0].backward()
        results.append([x.grad, mu.grad, *(p.grad for p in net.parameters()), *([beta.grad] * beta_too)])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_noise_that_requires_grad(device):
    results = []
    for way in (by_elbo, composed, naive):
        torch.manual_seed(0)
        mu, logvar = latents(device)
        net, x = network(device), torch.rand(B, FEATURES, device=device)
        eps = torch.randn(B, LATENT, device=device, requires_grad=True)
        way(net, x, mu, logvar, eps, likelihood="mse")[0].backward()
        results.append([eps.grad, mu.grad, logvar.grad])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_decoder_that_returns_a_leaf(device):
    mu, logvar = latents(device)
    constant = torch.zeros(B, FEATURES, device=device, requires_grad=True)
    x = torch.rand(B, FEATURES, device=device)
    by_elbo(lambda z: constant, x, mu, logvar, None, likelihood="mse").loss.backward()
    torch.testing.assert_close(constant.grad, -2 * x)
    torch.testing.assert_close(mu.grad, 0.5 * mu.detach())


def test_a_hook_registered_after_the_call_runs_once(device):
    (mu, logvar), net, x = latents(device), network(device), torch.rand(B, FEATURES, device=device)
    calls, eps = [], torch.randn(B, LATENT, device=device)
    (expected,) = gradients(by_elbo(net, x, mu, logvar, eps, likelihood="mse").loss, net[0].weight)
    loss = by_elbo(net, x, mu, logvar, eps, likelihood="mse").loss
    net[0].weight.register_hook(lambda g: calls.append(1) or 2 * g)
    loss.backward()
    torch.testing.assert_close(net[0].weight.grad, 2 * expected)
    assert len(calls) == 1


def test_a_tensor_from_inside_the_decoder_in_another_loss(device):
    """Its graph is part of the objective's, and lives as long."""
    results = []
    for way in (by_elbo, naive):
        torch.manual_seed(0)
        (mu, logvar), net, kept = latents(device), network(device), []
        x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)

        def decoder(z, net=net, kept=kept):
            kept.append(net[:2](z))
            return net[2](kept[0])

        (way(decoder, x, mu, logvar, eps, likelihood="mse")[0] + kept[0].square().sum()).backward()
        results.append([mu.grad, logvar.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*results)


def test_a_function_in_python(device):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, weight):
            ctx.variable = weight
            return z * weight

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.variable.detach(), gradient.sum()

    def make():
        net, weight = network(device), torch.tensor(1.5, device=device, requires_grad=True)
        return (lambda z: Scale.apply(net(z), weight)), list(net.parameters())

    compare(make, device)


def test_in_another_thread_than_what_the_decoder_uses(device):
    results = []
    for way in (by_elbo, naive):
        torch.manual_seed(0)
        mu, logvar = latents(device)
        net, x = network(device), torch.rand(B, FEATURES, device=device)
        condition = torch.ones(FEATURES, device=device, requires_grad=True)
        hidden = condition.tanh()
        terms = []
        worker = threading.Thread(
            target=lambda: terms.extend(way(lambda z: net(z) * hidden, x, mu, logvar, torch.ones_like(mu), likelihood="mse"))  # noqa: B023
        )
        worker.start()
        worker.join()
        (terms[0] + hidden.sum()).backward()
        results.append([condition.grad, mu.grad])
    torch.testing.assert_close(*results)


def test_dtype_of_the_prediction_counts(device):
    mu, logvar = latents(device)
    weight = torch.randn(LATENT, FEATURES, device=device, dtype=torch.float64, requires_grad=True)
    x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)
    got = by_elbo(lambda z: z.double() @ weight, x, mu, logvar, eps, likelihood="mse")
    expected = composed(lambda z: z.double() @ weight, x, mu, logvar, eps, likelihood="mse")
    assert {t.dtype for t in got} == {torch.float64}
    torch.testing.assert_close(list(got), list(expected))
    torch.testing.assert_close(gradients(got.loss, mu, weight), gradients(expected.loss, mu, weight))


def test_retained_graph(device):
    mu, logvar = latents(device)
    net = network(device)
    loss = by_elbo(net, torch.rand(B, FEATURES, device=device), mu, logvar, None, likelihood="mse").loss
    first = gradients(loss, mu, net[0].weight, retain_graph=True)
    second = gradients(3 * loss, mu, net[0].weight, retain_graph=True)
    (only,) = gradients(loss, net[2].bias)
    torch.testing.assert_close([3 * g for g in first], list(second))
    assert only.abs().sum() > 0


def test_accumulation_over_micro_batches(device):
    net = network(device)
    twin = copy.deepcopy(net)
    x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)
    mu, logvar = latents(device)
    by_elbo(net, x, mu, logvar, eps, likelihood="mse").loss.backward()
    whole = mu.grad.clone()
    mu.grad = None
    for part in (slice(0, 2), slice(2, B)):
        by_elbo(twin, x[part], mu[part], logvar[part], eps[part], likelihood="mse").loss.backward()
    torch.testing.assert_close(mu.grad, whole)
    torch.testing.assert_close([p.grad for p in twin.parameters()], [p.grad for p in net.parameters()])


@pytest.mark.parametrize("likelihood", ("bernoulli_logits", "mse"))
def test_second_derivatives(likelihood, device):
    """A gradient penalty, as adversarial training has it, and a product with the Hessian's rows in one batch."""
    results, (mu, logvar) = [], latents(device)
    net = nn.Sequential(nn.Linear(LATENT, 16), nn.Tanh(), nn.Linear(16, FEATURES)).to(device)
    x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)
    for way in (by_elbo, naive):
        loss = way(net, x, mu, logvar, eps, **options(likelihood))[0]
        first = gradients(loss, mu, logvar, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        loss = way(net, x, mu, logvar, eps, **options(likelihood))[0]
        rows = gradients(loss, mu, grad_outputs=torch.arange(3.0, device=device), is_grads_batched=True)
        results.append([*gradients(penalty, mu, logvar, *net.parameters()), *rows])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", ("batchmean", "mean", "none", ("mean", "sum")), ids=str)
def test_reductions(reduction, device):
    mu, logvar = latents(device)
    net = network(device)
    x, eps = torch.rand(B, FEATURES, device=device), torch.randn(B, LATENT, device=device)
    got = by_elbo(net, x, mu, logvar, eps, likelihood="mse", reduction=reduction)
    z = mu + torch.exp(0.5 * logvar) * eps
    expected = fastelbo.loss(net(z), x, mu, logvar, 0.5, likelihood="mse", reduction=reduction)
    torch.testing.assert_close(list(got), list(expected))
    wrt = (mu, logvar, *net.parameters())
    torch.testing.assert_close(gradients(got.loss.sum(), *wrt), gradients(expected.loss.sum(), *wrt))


def test_bad_decoders(device):
    mu, logvar = latents(device)
    x = torch.rand(B, FEATURES, device=device)
    with pytest.raises(TypeError, match="decoder must be callable"):
        fastelbo.elbo(3, x, mu, logvar)
    with pytest.raises(TypeError, match=r"decoder\(z\) must be a tensor, got tuple"):
        fastelbo.elbo(lambda z: (z, z), x, mu, logvar)
    with pytest.raises(ValueError, match=r"decoder\(z\) must have the shape of x: .*\(6, 4\).*\(6, 10\)"):
        fastelbo.elbo(lambda z: z, x, mu, logvar)
    with pytest.raises(ValueError, match="batch size"):
        fastelbo.elbo(lambda z: z, x[:3], mu, logvar, reduction="none")


@once
@pytest.mark.parametrize(
    "likelihood, kind", (("bernoulli_logits", tuple), ("mse", list), (fastelbo.likelihoods.Gaussian(scale=0.5), tuple))
)
def test_a_tuple_of_one(likelihood, kind, device):
    """Is the one, in every call, and as fused."""
    (mu, logvar), net = latents(device), network(device)
    x = torch.rand(B, FEATURES, device=device)
    weight, eps = torch.rand(B, 1, device=device), torch.randn(3, *mu.shape, device=device)
    options = {"likelihood": likelihood}

    def wrapped(z):
        return kind([net(z)])

    calls = {
        "elbo": lambda decoder: fastelbo.elbo(decoder, x, mu, logvar, eps=eps[0], **options),
        "loss": lambda decoder: fastelbo.loss(decoder(mu), x, mu, logvar, **options),
        "module": lambda decoder: fastelbo.nn.ELBOLoss(**options).to(device)(decoder(mu), x, mu, logvar),
        "kl": lambda decoder: fastelbo.loss(decoder(mu), x, kl=logvar.sum(), **options),
        "weight": lambda decoder: fastelbo.elbo(decoder, x, mu, logvar, eps=eps[0], weight=weight, **options),
        "posterior": lambda decoder: fastelbo.elbo(decoder, x, mu, logvar, eps=eps[0], posterior="log_std", **options),
        "samples": lambda decoder: fastelbo.elbo(decoder, x, mu, logvar, bound=ELBO(3, chunk=2), eps=eps, **options),
        "iwae": lambda decoder: fastelbo.elbo(decoder, x, mu, logvar, bound=IWAE(3), eps=eps, **options),
    }
    for name, call in calls.items():
        losses = [call(decoder).loss for decoder in (net, wrapped)]
        assert losses[0].grad_fn.name() == losses[1].grad_fn.name(), name
        found = [[loss.detach(), *gradients(loss, mu, logvar, *net.parameters())] for loss in losses]
        torch.testing.assert_close(*found, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    if likelihood != "mse":
        estimates = [fastelbo.log_likelihood(d, x, mu, logvar, n_samples=3, eps=eps, **options) for d in (net, wrapped)]
        torch.testing.assert_close(*estimates, rtol=0, atol=0)


def test_a_tuple_of_several_is_a_whole_vaes(device):
    mu, logvar = latents(device)
    x = torch.rand(B, FEATURES, device=device)
    with pytest.raises(TypeError, match="pass the decoder alone, not the whole VAE"):
        fastelbo.elbo(lambda z: (x, mu, logvar), x, mu, logvar)


def test_no_grad(device):
    mu, logvar = latents(device)
    net = network(device)
    with torch.no_grad():
        terms = by_elbo(net, torch.rand(B, FEATURES, device=device), mu, logvar, None, likelihood="mse")
    assert terms.loss.grad_fn is None
