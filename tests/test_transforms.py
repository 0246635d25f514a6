"""`torch.func`, forward-mode AD, batched gradients and fake tensors: transformed calls keep no state and use the formula."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import fastelbo
from support import LIKELIHOODS, gradients, make_inputs, options


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_per_sample_gradients(likelihood, device):
    recon_x, x, mu, logvar = (t.detach() for t in make_inputs(likelihood, (5, 9), (5, 3), device=device))

    def one(recon_x, x, mu, logvar):
        return fastelbo.loss(recon_x[None], x[None], mu[None], logvar[None], **options(likelihood)).loss

    got = torch.func.vmap(torch.func.grad(one, argnums=(0, 2)))(recon_x, x, mu, logvar)
    recon_x.requires_grad_()
    mu.requires_grad_()
    expected = gradients(fastelbo.loss(recon_x, x, mu, logvar, **options(likelihood)).loss, recon_x, mu)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("way", ("elbo", "composed"))
def test_per_sample_gradients_of_a_model(way, device):
    """By all parameters of encoder and decoder: those of one sample at a time."""
    model = nn.ModuleDict({"encoder": nn.Linear(9, 6), "decoder": nn.Linear(3, 9)}).to(device)
    x, eps = torch.rand(5, 9, device=device), torch.randn(5, 3, device=device)

    def loss_of(model, x, eps):
        mu, logvar = model["encoder"](x).chunk(2, 1)
        if way == "elbo":
            return fastelbo.elbo(model["decoder"], x, mu, logvar, 0.5, likelihood="bernoulli_logits", eps=eps).loss
        z, kl = fastelbo.sample_kl(mu, logvar, eps=eps)
        return fastelbo.loss(model["decoder"](z), x, kl=kl, beta=0.5, likelihood="bernoulli_logits").loss

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, eps):
            return loss_of(self.model, x, eps)

    whole = Whole()
    parameters = {name: p.detach() for name, p in whole.named_parameters()}

    def one(parameters, x, eps):
        return torch.func.functional_call(whole, parameters, (x[None], eps[None]))

    found = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, x, eps)
    for i in range(5):
        alone = gradients(loss_of(model, x[i : i + 1], eps[i : i + 1]), *whole.parameters())
        for gradient, expected in zip(found.values(), alone, strict=True):
            torch.testing.assert_close(gradient[i], expected)


@pytest.mark.parametrize("transform", (torch.func.jacrev, torch.func.jacfwd))
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_jacobians(likelihood, transform, device):
    """Of the losses of all samples by the prediction: each by its own row alone."""
    recon_x, x, mu, logvar = (t.detach() for t in make_inputs(likelihood, (4, 6), (4, 3), device=device))

    def losses(recon_x, mu):
        return fastelbo.loss(recon_x, x, mu, logvar, 0.5, reduction="none", **options(likelihood)).loss

    by_recon_x, by_mu = transform(losses, argnums=(0, 1))(recon_x, mu)
    recon_x.requires_grad_(), mu.requires_grad_()
    rows = losses(recon_x, mu)
    for i in range(4):
        torch.testing.assert_close((by_recon_x[i], by_mu[i]), gradients(rows[i], recon_x, mu, retain_graph=True))


def test_vjp_and_jvp(device):
    """They agree with each other: u . (J v) = (u J) . v."""
    recon_x, x, mu, logvar = (t.detach() for t in make_inputs("bernoulli", (4, 6), (4, 3), torch.float64, device))
    eps = torch.randn_like(mu)

    def function(recon_x, mu, logvar):
        z, kl = fastelbo.sample_kl(mu, logvar, eps=eps, reduction="none")
        return fastelbo.loss(recon_x, x, kl=kl, beta=0.5, reduction="none").loss, z

    inputs = recon_x, mu, logvar
    tangents = [torch.randn_like(t) for t in inputs]
    outputs, pull_back = torch.func.vjp(function, *inputs)
    cotangents = tuple(torch.randn_like(o) for o in outputs)
    _, pushed = torch.func.jvp(function, inputs, tuple(tangents))
    left = sum((u * p).sum() for u, p in zip(cotangents, pushed, strict=True))
    right = sum((g * t).sum() for g, t in zip(pull_back(cotangents), tangents, strict=True))
    torch.testing.assert_close(left, right)


def test_hessian(device):
    """Second derivatives of the KL: 1 by mu, exp(logvar) / 2 by logvar."""
    mu, logvar = (t.detach() for t in make_inputs("mse", (2, 2), (2, 3), torch.float64, device)[2:])

    def kl(mu, logvar):
        return fastelbo.sample_kl(mu, logvar, eps=mu).kl

    (by_mu, mixed), (_, by_logvar) = torch.func.hessian(kl, argnums=(0, 1))(mu, logvar)
    torch.testing.assert_close(by_mu.reshape(6, 6), torch.eye(6, dtype=mu.dtype, device=device))
    torch.testing.assert_close(by_logvar.reshape(6, 6), torch.diag(0.5 * logvar.exp().flatten()))
    assert not mixed.any()


def test_vmap_of_a_backward_pass(device):
    """Over the gradient that arrives, forward untransformed."""
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    net = nn.Linear(3, 9).to(device)
    losses = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", reduction="none").loss
    losses = losses + fastelbo.sample_kl(mu, logvar, reduction="none").kl
    losses = losses + fastelbo.elbo(net, x, mu, logvar, likelihood="mse", reduction="none").loss

    def backward(upstream):
        return torch.autograd.grad(losses, (recon_x, mu), upstream, retain_graph=True)

    upstreams = torch.randn(4, 5, device=device)
    found = torch.func.vmap(backward)(upstreams)
    for i in range(4):
        torch.testing.assert_close((found[0][i], found[1][i]), backward(upstreams[i]))


class Wrapper(torch.Tensor):
    """Stands for another tensor, as DTensor does."""

    @staticmethod
    def __new__(cls, tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        made.tensor = tensor
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda w: w.tensor, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


@pytest.mark.parametrize("wrapped", ((True, True), (True, False), (False, True)), ids=str)
def test_tensors_that_stand_for_others(wrapped, device):
    inputs = [t.detach() for t in make_inputs("mse", (5, 9), (5, 30), device=device)]
    expected = fastelbo.loss(*inputs, likelihood="mse").loss
    first, second = wrapped
    recon_x, x, mu, logvar = (Wrapper(t) if w else t for t, w in zip(inputs, (first, second) * 2, strict=True))
    torch.testing.assert_close(fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse").loss.tensor, expected)
    z, kl = fastelbo.sample_kl(mu, logvar)
    torch.testing.assert_close(kl.tensor, fastelbo.sample_kl(*inputs[2:]).kl)
    noise = (z.tensor - inputs[2]) / torch.exp(0.5 * inputs[3])
    assert abs(noise.mean()) < 0.4
    assert 0.7 < noise.std() < 1.3


@pytest.mark.parametrize("randomness", ("same", "different", "error"))
def test_noise_under_vmap(randomness, device):
    mu = torch.zeros(4, 2, 50, device=device)
    draw = torch.func.vmap(lambda mu: fastelbo.reparameterize(mu, mu), randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            draw(mu)
        return
    z = draw(mu)
    assert torch.equal(z[0], z[1]) == (randomness == "same")
    assert 0.8 < z.std() < 1.2


def test_batched_upstream_gradients(device):
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    loss = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", reduction="none").loss
    got = gradients(loss, recon_x, grad_outputs=torch.eye(5, device=device), is_grads_batched=True, retain_graph=True)[0]
    for i in range(5):
        expected = gradients(loss[i], recon_x, retain_graph=True)[0]
        torch.testing.assert_close(got[i], expected)
    z = fastelbo.reparameterize(mu, logvar)
    got = gradients(z.sum(1), logvar, grad_outputs=torch.eye(5, device=device), is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(got[2], gradients(z.sum(1)[2], logvar)[0])


def test_forward_mode(device):
    recon_x, x, mu, logvar = (t.detach() for t in make_inputs("mse", (5, 9), (5, 3), device=device))
    tangent = torch.randn_like(recon_x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(recon_x, tangent)
        loss = fastelbo.loss(dual, x, mu, logvar, likelihood="mse").loss
        got = torch.autograd.forward_ad.unpack_dual(loss).tangent
        z = fastelbo.reparameterize(torch.autograd.forward_ad.make_dual(mu, mu), logvar)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(z).tangent, mu)
    torch.testing.assert_close(got, (2 * (recon_x - x) * tangent).sum())


def test_fake_tensors_leave_nothing_behind(device):
    with torch._subclasses.FakeTensorMode():
        recon_x = torch.rand(5, 9, device=device, requires_grad=True)
        mu = torch.rand(5, 3, device=device, requires_grad=True)
        loss = fastelbo.loss(recon_x, recon_x.detach(), mu, mu, likelihood="mse").loss
        assert loss.shape == ()
        loss.backward()
        assert recon_x.grad.shape == (5, 9)
        assert fastelbo.sample_kl(mu, mu).z.shape == (5, 3)
    inputs = make_inputs("mse", (5, 9), (5, 3), device=device)
    gradients(fastelbo.loss(*inputs, likelihood="mse").loss, inputs[0])


def test_generator_of_a_transformed_call(device):
    mu = torch.zeros(3, 5, device=device)

    def draw():
        generator = torch.Generator(device).manual_seed(3)
        return torch.func.grad(lambda lv: fastelbo.reparameterize(mu, lv, generator=generator).sum())(mu)

    assert torch.equal(draw(), draw())


def test_one_dimensional_inputs(device):
    recon_x, x, mu, logvar = (
        t.detach()[:, 0].clone().requires_grad_() for t in make_inputs("mse", (4, 1), (4, 1), device=device)
    )
    loss = fastelbo.loss(recon_x, x, mu, logvar, 0.5, likelihood="mse", reduction="none").loss
    upstream = torch.rand(4, device=device)
    plain = gradients(loss, recon_x, x, mu, logvar, grad_outputs=upstream, retain_graph=True)
    torch.testing.assert_close(gradients(loss, recon_x, x, mu, logvar, grad_outputs=upstream, create_graph=True), plain)
    torch.testing.assert_close(plain[0], 2 * (recon_x - x).detach() * upstream)
