"""The registered operators, by Torch's own checks and against the formula."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastelbo
from conftest import BACKEND
from fastelbo import formula
from support import LIKELIHOODS, ContiguousWhenUnpacked, gradients, make_inputs, options

ops = torch.ops.fastelbo
SINGLE = torch.float32
TAKES_SEEDS = BACKEND == "triton"


def loss_arguments(device, likelihood="mse", per_sample=False, given=False, channels_last=False):
    shape = (3, 4, 5, 2) if channels_last else (3, 7)
    recon_x, x, mu, logvar = make_inputs(likelihood, shape, (3, 2), device=device)
    if channels_last:
        recon_x = recon_x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    scale = torch.tensor(0.4, device=device) if likelihood == "gaussian" else None
    kl = None
    if given:
        mu = logvar = None
        kl = torch.rand(3 if per_sample else (), device=device, requires_grad=True)
    return recon_x, x, mu, logvar, kl, scale, likelihood, 1.0, per_sample, SINGLE


def latents(device, dtype=SINGLE, strided=False):
    mu, logvar = make_inputs("mse", (3, 2), (3, 4, 2, 5) if strided else (3, 4), dtype, device)[2:]
    return (t.detach().transpose(1, 3).requires_grad_() if strided else t for t in (mu, logvar))


def seed(device):
    return torch.tensor(1234567, device=device)


def cases(name, device):
    """Arguments of each kind that the operator sees."""
    if name == "loss":
        yield from (loss_arguments(device, likelihood) for likelihood in LIKELIHOODS)
        yield loss_arguments(device, per_sample=True)
        yield loss_arguments(device, given=True)
        yield loss_arguments(device, per_sample=True, given=True)
        yield loss_arguments(device, channels_last=True)
    elif name == "loss_backward":
        for per_sample in (False, True):
            recon_x, x, mu, logvar, _, scale, *rest = loss_arguments(device, "gaussian", per_sample)
            upstream = torch.rand(3 if per_sample else (), device=device)
            for to_recon, to_kl in ((upstream, upstream), (upstream, None), (None, upstream)):
                yield to_recon, to_kl, recon_x.detach(), x, mu.detach(), logvar.detach(), scale, *rest
    elif name in ("reparameterize", "sample_kl"):
        for strided in (False, True):
            mu, logvar = latents(device, strided=strided)
            noises = [torch.randn_like(mu)] + [seed(device)] * TAKES_SEEDS
            for noise in noises:
                for per_sample in ((),) if name == "reparameterize" else ((False,), (True,)):
                    yield mu, logvar, noise, *per_sample, SINGLE
    elif name == "sample_backward":
        mu, logvar = (t.detach() for t in latents(device))
        grad_z, eps, per_sample = torch.rand_like(mu), torch.randn_like(mu), torch.rand(3, device=device)
        for to_z, to_kl in ((grad_z, per_sample[0].clone()), (grad_z, None), (None, per_sample)):
            yield to_z, to_kl, mu, logvar, eps, to_kl is per_sample, SINGLE


NAMES = sorted(
    name.removeprefix("fastelbo::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastelbo::")
)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    """Schema, autograd registration, fake tensors, and AOT with dynamic shapes, against what the operator really does."""
    arguments = list(cases(name, device))
    assert arguments
    for args in arguments:
        torch.library.opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize("per_sample", (False, True), ids=("sum", "none"))
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss_is_the_formula(likelihood, per_sample, device):
    """In values, gradients and second derivatives, that by the target included."""
    *tensors, kl, scale, _, _, _, dtype = loss_arguments(device, likelihood, per_sample)
    tensors[1].requires_grad_()

    def by_operator():
        return ops.loss(*tensors, kl, scale, likelihood, 0.5, per_sample, dtype)

    def by_formula():
        return formula.objective(
            *tensors, kl, 1.0, likelihood=likelihood, scale=scale, target_scale=0.5, weights=(1.0, 1.0),
            per_sample=per_sample, dtype=dtype,
        )[1:]  # fmt: skip

    results = []
    for way in (by_operator, by_formula):
        recon, kl_sum = way()
        total = (2 * recon + 3 * kl_sum).sum()
        first = gradients(total, *tensors, retain_graph=True)
        wrt = [tensors[0], *tensors[2:]]
        plain = gradients(total, *wrt, retain_graph=True)  # without the target: by the operator's own backward
        again = gradients(total, *tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), tensors, allow_unused=True)
        results.append([recon, kl_sum, *first, *plain, *again, *second])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upstreams", ((2.0, 3.0), (2.0, None), (None, 3.0)), ids=str)
def test_sampling_is_the_formula(upstreams, device):
    mu, logvar = latents(device, torch.float64)
    eps = torch.randn_like(mu).requires_grad_()
    results = []
    for z, kl in (
        ops.sample_kl(mu, logvar, eps, False, torch.float64),
        (formula.sample(mu, logvar, eps, torch.float64), formula.divergence(mu, logvar, 1.0, False, torch.float64)),
    ):
        total = sum(c * t.square().sum() for c, t in zip(upstreams, (z, kl), strict=True) if c is not None)
        plain = gradients(total, mu, logvar, retain_graph=True)
        again = gradients(total, mu, logvar, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), (mu, logvar), retain_graph=True)
        by_noise = torch.autograd.grad(total, eps, allow_unused=True)[0]
        results.append([z, kl, *plain, *again, *second, torch.zeros_like(eps) if by_noise is None else by_noise])
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not TAKES_SEEDS, reason="the Torch backend draws its noise at once")
def test_a_seed_gives_the_same_noise_again(device):
    """In forward, in backward and in the formula for second derivatives; also where mu comes back with other strides."""
    for strided in (False, True):
        mu, logvar = latents(device, strided=strided)
        z = ops.reparameterize(mu, logvar, seed(device), SINGLE)
        upstream = torch.rand_like(z)
        for create_graph in (False, True):
            (by_logvar,) = gradients(z, logvar, grad_outputs=upstream, retain_graph=True, create_graph=create_graph)
            torch.testing.assert_close(by_logvar, 0.5 * upstream * (z - mu))


def test_saved_tensors_that_come_back_in_another_layout(device):
    """As in eager mode: the noise is numbered as it was in forward."""
    mu, logvar = (
        torch.randn(2, 4, 3, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
    )
    with ContiguousWhenUnpacked(), FlopCounterMode(display=False):
        z, kl = fastelbo.sample_kl(mu, logvar)
    by_mu, by_logvar = gradients(z.sum() + kl, mu, logvar)
    torch.testing.assert_close(by_mu, 1 + mu)
    torch.testing.assert_close(by_logvar, 0.5 * (z - mu) + 0.5 * torch.expm1(logvar), rtol=1e-4, atol=1e-5)


def test_dispatch_modes_see_the_same_numbers(device):
    """As the counters, tracers and memory estimators do that are dispatch modes."""
    inputs = make_inputs("mse", (5, 9), (5, 3), device=device)
    results = []
    for traced in (False, True):
        with FlopCounterMode(display=False) if traced else torch.enable_grad():
            loss = fastelbo.loss(*inputs, 0.3, likelihood="mse", reduction="mean").loss
            results.append((loss, *gradients(loss, inputs[0], *inputs[2:])))
    torch.testing.assert_close(*results)


def test_batched_backward_after_a_dispatch_mode(device):
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    with FlopCounterMode(display=False):
        losses = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", reduction="none").loss
        losses = losses + fastelbo.sample_kl(mu, logvar, reduction="none").kl
    upstreams = torch.randn(4, 5, device=device)

    def backward(upstream, **options):
        return torch.autograd.grad(losses, (recon_x, mu, logvar), upstream, retain_graph=True, **options)

    for found in (backward(upstreams, is_grads_batched=True), torch.func.vmap(backward)(upstreams)):
        for i in range(4):
            torch.testing.assert_close([gradient[i] for gradient in found], list(backward(upstreams[i])))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_backward_under_a_dispatch_mode_alone(likelihood, device):
    inputs = make_inputs(likelihood, (5, 9), (5, 3), device=device)
    eps = torch.randn(5, 3, device=device)
    net = torch.nn.Linear(3, 9).to(device)

    def decoder(z):
        return torch.sigmoid(net(z))

    results = []
    for traced in (False, True):
        loss = fastelbo.elbo(decoder, inputs[1], *inputs[2:], eps=eps, **options(likelihood)).loss
        loss = loss + fastelbo.loss(*inputs, **options(likelihood)).loss
        with FlopCounterMode(display=False) if traced else torch.enable_grad():
            results.append(gradients(loss, inputs[0], *inputs[2:], *net.parameters()))
    torch.testing.assert_close(*results)
