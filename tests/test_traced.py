"""Traced and transformed calls keep no state and use the formula: right, if not fused yet."""

import pytest
import torch

import fastelbo
from support import LIKELIHOODS, gradients, make_inputs, options


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_compile(likelihood, device):
    inputs = make_inputs(likelihood, (5, 9), (5, 3), device=device)

    def step(recon_x, x, mu, logvar):
        z, kl = fastelbo.sample_kl(mu, logvar, eps=torch.ones_like(mu))
        terms = fastelbo.loss(recon_x, x, mu, logvar, 0.3, reduction="mean", **options(likelihood))
        return terms.loss + z.sum() + kl

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wrt = inputs[0], inputs[2], inputs[3]
    torch.testing.assert_close(compiled(*inputs), step(*inputs))
    torch.testing.assert_close(gradients(compiled(*inputs), *wrt), gradients(step(*inputs), *wrt))


def test_compiled_sampling_is_fresh(device):
    mu = torch.zeros(3, 5, device=device)
    compiled = torch.compile(fastelbo.reparameterize, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(mu, mu), compiled(mu, mu))


def test_compiled_elbo(device):
    mu, logvar = (torch.randn(4, 3, device=device, requires_grad=True) for _ in range(2))
    x, eps = torch.rand(4, 6, device=device), torch.randn(4, 3, device=device)
    net = torch.nn.Linear(3, 6).to(device)

    def step(x, mu, logvar):
        return fastelbo.elbo(net, x, mu, logvar, 0.5, likelihood="mse", eps=eps).loss

    wrt = mu, logvar, *net.parameters()
    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(x, mu, logvar), *wrt), gradients(step(x, mu, logvar), *wrt))


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


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # Torch's own, for its decompositions
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
