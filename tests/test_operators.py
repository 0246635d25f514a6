"""The registered operators, by Torch's own checks and against the formula."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

import fastelbo
from conftest import BACKEND
from fastelbo.engine import formula, traced
from fastelbo.engine.call import KLCall, LossCall
from fastelbo.engine.operators import encoded
from fastelbo.latents.posterior import LOGVAR, Latents, Posterior
from fastelbo.likelihoods import (
    BernoulliLogits,
    Gaussian,
    ZeroInflatedNegativeBinomial,
    code_of,
    find_likelihood,
    likelihood_of,
)
from likelihood_cases import CASES
from support import LIKELIHOODS, ContiguousWhenUnpacked, gradients, make_inputs, options

ops = torch.ops.fastelbo
SINGLE = torch.float32
TAKES_SEEDS = BACKEND == "triton"
SCALED = Gaussian(scale=0.4, target_scale=0.5)


def loss_arguments(device, likelihood="mse", per_sample=False, given=False, channels_last=False, weight=None):
    shape = (3, 4, 5, 2) if channels_last else (3, 7)
    record = find_likelihood(likelihood)
    recon_x, x, mu, logvar = make_inputs(record.name, shape, (3, 2), device=device)
    if channels_last:
        recon_x = recon_x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    kl = None
    if given:
        mu = logvar = None
        kl = torch.rand(3 if per_sample else (), device=device, requires_grad=True)
    return recon_x, None, None, None, x, weight, mu, logvar, kl, *code_of(record), per_sample, SINGLE


def of_several(name, device, weight=None):
    """A likelihood of any parameters, which all want gradients."""
    if name == FOUR:
        likelihood, x = ZeroInflatedNegativeBinomial("softmax", "log"), torch.randint(0, 3, (3, 7), device=device).float()
        parameters = [torch.randn(shape, device=device) for shape in ((3, 7), (7,), (3, 7))]
        parameters.append(9 * torch.rand(3, 1, device=device))
    else:
        likelihood = find_likelihood(CASES[name].likelihood)
        parameters, x = CASES[name].make(dtype=SINGLE, device=device)
    four = (*(p.requires_grad_() for p in parameters), None, None, None)[:4]
    return *four, x, weight, None, None, None, *code_of(likelihood), False, SINGLE


FOUR = "zero-inflated counts by the softmax of a row"
SEVERAL = [*(name for name, case in CASES.items() if find_likelihood(case.likelihood).inner is None), FOUR]


def latents(device, dtype=SINGLE, strided=False):
    mu, logvar = make_inputs("mse", (3, 2), (3, 4, 2, 5) if strided else (3, 4), dtype, device)[2:]
    return (t.detach().transpose(1, 3).requires_grad_() if strided else t for t in (mu, logvar))


def seed(device):
    return torch.tensor(1234567, device=device)


CALLS = {
    "z": KLCall(Latents(LOGVAR), SINGLE, None),
    "sum": KLCall(Latents(LOGVAR), SINGLE, "sum"),
    "row": KLCall(Latents(LOGVAR), SINGLE, "row"),
    "clamped": KLCall(Latents(Posterior("log_std", (-1.0, float("inf")))), SINGLE, "row"),
    "floor": KLCall(Latents(Posterior("log_std")), SINGLE, "sum", floor=0.2),
    "prior": KLCall(Latents(LOGVAR, "std"), SINGLE, "element"),
    "balance": KLCall(Latents(LOGVAR, "logvar"), SINGLE, "row", shares=(0.2, 0.8)),
    "columns": KLCall(Latents(LOGVAR, "log_std"), SINGLE, "column", statistics=True),
}


def latents_arguments(name, device, noise=None, strided=False):
    mu, second = latents(device, strided=strided)
    prior = None, None
    if CALLS[name].latents.prior is not None:
        prior = torch.randn_like(mu).requires_grad_(), torch.rand_like(mu).requires_grad_()
    return mu, second, *prior, noise, *encoded(CALLS[name])


def cases(name, device):
    """Arguments of each kind that the operator sees."""
    if name == "loss":
        yield from (loss_arguments(device, likelihood) for likelihood in (*LIKELIHOODS, SCALED))
        yield loss_arguments(device, per_sample=True)
        yield loss_arguments(device, given=True)
        yield loss_arguments(device, per_sample=True, given=True)
        yield loss_arguments(device, channels_last=True)
        yield loss_arguments(device, BernoulliLogits(pos_weight=2.0), weight=torch.rand(3, 1, device=device))
        yield of_several("multinomial, dim 2", device, weight=torch.rand(3, 1, 6, device=device))  # one for all items
    elif name == "loss_backward":
        for per_sample in (False, True):
            recon_x, _, _, _, x, weight, mu, logvar, kl, *rest = loss_arguments(device, "gaussian", per_sample)
            upstream = torch.rand(3 if per_sample else (), device=device)
            for to_recon, to_kl in ((upstream, upstream.clone()), (upstream, None), (None, upstream)):
                latent = mu.detach(), logvar.detach()
                one = recon_x.detach(), None, None, None
                yield to_recon, to_kl, *one, x, weight, *latent, kl, *rest, [True, False, False, False]
    elif name == "latents":
        for call in CALLS:
            strided = call in ("sum", "floor", "columns")
            noise = seed(device) if TAKES_SEEDS else torch.randn_like(next(iter(latents(device, strided=strided))))
            yield latents_arguments(call, device, None if call in ("columns", "prior") else noise, strided)
        for strided in (False, True):
            yield latents_arguments("row", device, torch.randn_like(next(iter(latents(device, strided=strided)))), strided)
    elif name == "latents_backward":
        for call in ("sum", "row", "balance"):
            mu, second, prior_mu, prior_second, _, *rest = latents_arguments(call, device)
            tensors = [t if t is None else t.detach() for t in (mu, second, prior_mu, prior_second)]
            eps, grad_z = torch.randn_like(tensors[0]), torch.rand_like(tensors[0])
            upstream = torch.rand(() if call == "sum" else 3, device=device)
            to_weighted = upstream.clone() if call == "balance" else None
            for to_z, to_kl in ((grad_z, upstream), (grad_z, None), (None, upstream)):
                wants = [t is not None for t in tensors[2:]]
                yield to_z, to_kl, None if to_kl is None else to_weighted, *tensors, eps, *rest, wants


def cases_of_several(name, device):
    """Likewise, of each likelihood of other parameters: tracers see the same of all but their number."""
    for case in SEVERAL:
        arguments = of_several(case, device)
        if name == "loss":
            yield arguments
        else:
            tensors = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
            yield torch.tensor(2.0, device=device), None, *tensors, [t is not None for t in tensors[:4]]


NAMES = sorted(
    name.removeprefix("fastelbo::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastelbo::")
)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    """Schema, autograd registration, fake tensors, and AOT with dynamic shapes, against what the operator really does."""
    if BACKEND == "torch" and name.endswith("backward"):
        pytest.skip("without kernels the derivatives are the formula's")
    arguments = list(cases(name, device))
    assert arguments
    operator, seen = getattr(ops, name).default, ("test_schema", "test_autograd_registration", "test_faketensor")
    for args in arguments:
        # Where there are no kernels, what is differentiated is the formula.
        torch.library.opcheck(operator, args, test_utils=seen if BACKEND == "torch" else "ALL")
    if name.startswith("loss"):
        several = list(cases_of_several(name, device))
        for i, args in enumerate(several):
            torch.library.opcheck(operator, args, test_utils="ALL" if i < 2 else seen)


@pytest.mark.parametrize("case", SEVERAL)
def test_a_likelihood_from_its_code(case):
    likelihood = ZeroInflatedNegativeBinomial("softmax", "log") if case == FOUR else find_likelihood(CASES[case].likelihood)
    code, numbers = code_of(likelihood)
    assert likelihood_of(code, tuple(numbers)) is likelihood


@pytest.mark.parametrize("per_sample", (False, True), ids=("sum", "none"))
@pytest.mark.parametrize("likelihood", (*LIKELIHOODS, SCALED, *SEVERAL), ids=str)
def test_loss_is_the_formula(likelihood, per_sample, device):
    """In values, gradients and second derivatives, that by the target included."""
    if likelihood in SEVERAL:
        *arguments, code, numbers, _, dtype = of_several(likelihood, device)
    else:
        *arguments, code, numbers, _, dtype = loss_arguments(device, likelihood, per_sample)
    if arguments[4].is_floating_point():
        arguments[4].requires_grad_()
    there = [t for t in arguments if t is not None]
    reduction = "none" if per_sample else "sum"
    latents = 2 if arguments[6] is not None else 0
    call = LossCall(likelihood_of(code, tuple(numbers)), reduction, reduction, dtype, len(there) - 1 - latents, False, latents)

    def by_formula():
        _, recon, kl = formula.terms(call, (1.0, 1.0), 1.0, there)
        return recon, torch.zeros_like(recon) if kl is None else kl

    results = []
    for way in (lambda: ops.loss(*arguments, code, numbers, per_sample, dtype), by_formula):
        recon, kl_sum = way()
        total = (2 * recon + 3 * kl_sum).sum()
        wrt = [t for t in there if t.requires_grad]
        first = gradients(total, *wrt, retain_graph=True)
        others = [t for t in wrt if t is not arguments[4]]
        plain = gradients(total, *others, retain_graph=True)  # without the target: by the operator's own backward
        again = gradients(total, *wrt, create_graph=True)
        second = []
        if any(g.requires_grad for g in again):
            second = torch.autograd.grad(sum(g.square().sum() for g in again), wrt, allow_unused=True, materialize_grads=True)
        results.append([recon, kl_sum, *first, *plain, *again, *second])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape, latent", (((3, 0), (3, 2)), ((3, 7), (3, 0)), ((3, 0), (3, 0)), ((0, 7), (0, 2))), ids=str)
def test_of_nothing(shape, latent, device):
    recon_x, x, mu, logvar = make_inputs("mse", shape, latent, device=device)
    recon, kl = ops.loss(recon_x, None, None, None, x, None, mu, logvar, None, *code_of(find_likelihood("mse")), False, SINGLE)
    found = gradients(recon + 3 * kl, recon_x, mu, logvar)
    torch.testing.assert_close(found, (2 * (recon_x - x), 3 * mu, 1.5 * torch.expm1(logvar)))
    _, kl, *_ = ops.latents(mu, logvar, None, None, None, *encoded(CALLS["sum"]))
    torch.testing.assert_close(gradients(kl, mu, logvar), (mu, 0.5 * torch.expm1(logvar)))


@pytest.mark.parametrize("upstreams", ((2.0, 3.0), (2.0, None), (None, 3.0)), ids=str)
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.kind in ("sum", "row")])
def test_sampling_is_the_formula(name, upstreams, device):
    *tensors, eps, _, _, _, _, _, _, _, _ = latents_arguments(name, device)
    call = CALLS[name]._replace(dtype=torch.float64)
    tensors = [t.detach().double().requires_grad_() for t in tensors if t is not None]
    eps = torch.randn_like(tensors[0]).requires_grad_()
    results = []
    for z, kl, weighted in (
        ops.latents(*(*tensors, None, None)[:4], eps, *encoded(call))[:3],
        formula.divergence(call, eps, *tensors)[:3],
    ):
        outputs = [z, kl] if weighted is None or weighted.shape != kl.shape else [z, kl + 2 * weighted]
        total = sum(c * t.square().sum() for c, t in zip(upstreams, outputs, strict=True) if c is not None)
        plain = gradients(total, *tensors, retain_graph=True, allow_unused=True)
        again = gradients(total, *tensors, create_graph=True, allow_unused=True)
        again = [g for g in again if g is not None]
        second = torch.autograd.grad(
            sum(g.square().sum() for g in again), tensors, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        by_noise = torch.autograd.grad(total, eps, allow_unused=True, materialize_grads=True)
        results.append([z, kl, *(g for g in plain if g is not None), *again, *second, *by_noise])
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not TAKES_SEEDS, reason="the Torch backend draws its noise at once")
def test_a_seed_gives_the_same_noise_again(device):
    """In forward, in backward and in the formula for second derivatives; also where mu comes back with other strides."""
    for strided in (False, True):
        mu, logvar = latents(device, strided=strided)
        z = ops.latents(mu, logvar, None, None, seed(device), *encoded(CALLS["z"]))[0]
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
    for is_traced in (False, True):
        with FlopCounterMode(display=False) if is_traced else torch.enable_grad():
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
    for is_traced in (False, True):
        loss = fastelbo.elbo(decoder, inputs[1], *inputs[2:], eps=eps, **options(likelihood)).loss
        loss = loss + fastelbo.loss(*inputs, **options(likelihood)).loss
        with FlopCounterMode(display=False) if is_traced else torch.enable_grad():
            results.append(gradients(loss, inputs[0], *inputs[2:], *net.parameters()))
    torch.testing.assert_close(*results)


@pytest.mark.skipif(BACKEND != "triton", reason="about the kernels")
@pytest.mark.parametrize(("likelihood", "channels"), (("l1", 3), ("discretized_logistic_mixture", 20)))
def test_large_calls_reach_the_kernels(likelihood, channels, device, monkeypatch):
    """From as many bytes on as a formula would move more: small ones are the formula, for Inductor to fuse, and all of those
    that move no more."""
    found = []

    def compiler(graph, _):
        found.append(graph.code)
        return make_boxed_func(graph.forward)

    prediction, x = (torch.rand(2, n, 3, 3, device=device) for n in (channels, 3))
    saved = find_likelihood(likelihood).compiled_excess * prediction.numel() * 4
    for least in (max(saved, 1), saved + 1):
        monkeypatch.setattr(traced, "KERNELS_PAY", least)
        torch.compiler.reset()
        backend = aot_autograd(fw_compiler=compiler)
        torch.compile(lambda: fastelbo.loss(prediction, x, kl=torch.zeros(()), likelihood=likelihood).loss, backend=backend)()
    assert ["fastelbo" in code for code in found] == [saved > 0, False]
