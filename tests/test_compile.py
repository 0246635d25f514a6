"""torch.compile: one graph forward and backward, results as eager, and no more compilations than inputs differ in kind."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import compile_fx, metrics
from torch.utils.flop_counter import FlopCounterMode

import fastelbo
import likelihood_cases
from conftest import INTERPRETED, once
from fastelbo import ELBO, IWAE, Weighting
from fastelbo.likelihoods import BernoulliLogits, DiscretizedLogistic, DiscretizedLogisticMixture, Gaussian, find_likelihood
from support import LIKELIHOODS, gradients, make_inputs, options

pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # Inductor's own

# Inductor compiles C++ or Triton, which takes seconds. `aot_eager` calls what was traced one by one, for all that is not in how
# it is compiled.
BACKENDS = ("inductor", "aot_eager")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


class Counted:
    """A function under torch.compile, in one graph, and how often it was compiled."""

    def __init__(self, function, backend="aot_eager"):
        self.counter = CompileCounterWithBackend(backend)
        self.call = torch.compile(function, fullgraph=True, backend=self.counter)

    def __call__(self, *args):
        return self.call(*args)

    @property
    def compilations(self) -> int:
        return self.counter.frame_count


def assert_same(function, compiled, wrt, *args, **tolerances):
    """Values and gradients of both, which return one tensor or several."""
    results = []
    for call in (function, compiled):
        outputs = call(*args)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        upstreams = [torch.full_like(o, 0.5 + i) for i, o in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, wrt, upstreams)
        results.append([*(o.detach() for o in outputs), *grads])
    torch.testing.assert_close(*results, **tolerances)


@pytest.mark.parametrize("reduction", ("sum", "none", ("mean", "batchmean")), ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss(likelihood, reduction, device):
    recon_x, x, mu, logvar = make_inputs(likelihood, (5, 9), (5, 3), device=device)

    def call(recon_x, x, mu, logvar):
        return fastelbo.loss(recon_x, x, mu, logvar, 0.3, reduction=reduction, **options(likelihood))

    assert_same(call, Counted(call), (recon_x, mu, logvar), recon_x, x, mu, logvar)


@pytest.mark.parametrize("reduction", ("none",) if INTERPRETED else ("mean", "none"))
def test_inductor(reduction, device):
    """All likelihoods, and sampling, in one graph."""
    inputs = [make_inputs(likelihood, (5, 9), (5, 3), device=device) for likelihood in LIKELIHOODS]

    def call(eps, *inputs):
        found = []
        for likelihood, (recon_x, x, mu, logvar) in zip(LIKELIHOODS, inputs, strict=True):
            z, kl = fastelbo.sample_kl(mu, logvar, eps=eps, reduction=reduction)
            found += [z, *fastelbo.loss(recon_x, x, kl=kl, beta=0.3, reduction=reduction, **options(likelihood))]
            found += [*fastelbo.loss(recon_x, x, mu, logvar, 0.3, reduction=reduction, **options(likelihood))]
        return found

    wrt = [t for four in inputs for t in four if t.requires_grad]
    assert_same(call, Counted(call, "inductor"), wrt, torch.randn(5, 3, device=device), *inputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_sample_kl_and_loss(reduction, device):
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)

    def call(recon_x, x, mu, logvar, eps):
        z, kl = fastelbo.sample_kl(mu, logvar, reduction=reduction, eps=eps)
        terms = fastelbo.loss(recon_x, x, kl=kl, beta=0.3, likelihood="mse", reduction=reduction)
        return *terms, z, fastelbo.reparameterize(mu, logvar, eps=eps)

    args = recon_x, x, mu, logvar, torch.randn_like(mu)
    assert_same(call, Counted(call), (recon_x, mu, logvar), *args)


@pytest.mark.parametrize("likelihood", ("bernoulli_logits", Gaussian("optimal")), ids=("name", "of sums"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nll(backend, reduction, likelihood, device):
    recon_x, x, *_ = make_inputs("bernoulli_logits", (5, 9), (5, 3), device=device)

    def call(recon_x, x, weight):
        return fastelbo.nll(recon_x, x, likelihood=likelihood, weight=weight, reduction=reduction)

    compiled = Counted(call, backend)
    assert_same(call, compiled, (recon_x,), recon_x, x, torch.rand_like(x), rtol=1e-5, atol=1e-5)
    assert compiled.compilations == 1


def test_criterion(device):
    recon_x, x, mu, logvar = make_inputs("gaussian", (5, 9), (5, 3), device=device)
    criterion = fastelbo.nn.ELBOLoss(Gaussian(scale=0.4), beta=0.3, reduction="mean").to(device)
    compiled, counts = Counted(criterion), []
    for beta in (0.3, 0.7, 1.0):
        criterion.beta.fill_(beta)
        assert_same(criterion, compiled, (recon_x, mu, logvar), recon_x, x, mu, logvar)
        counts.append(compiled.compilations)
    # Of a float64 number on a CPU Dynamo first makes a symbol, finds that nobody asks for its value, and begins again.
    assert counts[0] <= (2 if device.type == "cpu" else 1)
    assert counts == counts[:1] * 3


class VAE(nn.Module):
    def __init__(self, features=12, latent=3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, 16), nn.SiLU(), nn.Linear(16, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 16), nn.SiLU(), nn.Linear(16, features))

    def encode(self, x):
        return self.encoder(x).chunk(2, 1)


def by_elbo(model, x, eps):
    mu, logvar = model.encode(x)
    return fastelbo.elbo(model.decoder, x, mu, logvar, 0.5, likelihood="bernoulli_logits", eps=eps).loss


def composed(model, x, eps):
    z, kl = fastelbo.sample_kl(*model.encode(x), eps=eps)
    return fastelbo.loss(model.decoder(z), x, kl=kl, beta=0.5, likelihood="bernoulli_logits").loss


@pytest.mark.parametrize("way, backend", ((by_elbo, "inductor"), (by_elbo, "aot_eager"), (composed, "aot_eager")))
def test_training_step(way, backend, device):
    """Forward, backward and the optimizer in one graph; `elbo` takes the composed path."""
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = VAE().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches, noise = torch.rand(6, 5, 12).to(device), torch.randn(6, 5, 3).to(device)

        def loss_of(x, eps, model=model):
            return way(model, x, eps) / len(x)

        function = torch.compile(loss_of, fullgraph=True, backend=backend) if compile else loss_of
        losses.append([])
        for x, eps in zip(batches, noise, strict=True):
            optimizer.zero_grad()
            loss = function(x, eps)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_fresh_at_each_call(backend, device):
    mu = torch.zeros(64, 50, device=device)
    compiled = torch.compile(fastelbo.reparameterize, fullgraph=True, backend=backend)
    torch.manual_seed(1)
    first, second = compiled(mu, mu), compiled(mu, mu)
    assert not torch.equal(first, second)
    for sample in (first, second):
        assert abs(sample.mean()) < 0.06
        assert abs(sample.std() - 1) < 0.06
    torch.manual_seed(1)
    assert torch.equal(compiled(mu, mu), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_has_the_noise_of_forward(backend, device):
    """By the logarithm of the variance, z has the derivative (z - mu) / 2."""
    mu, logvar = (torch.randn(8, 5, device=device, requires_grad=True) for _ in range(2))
    z = torch.compile(fastelbo.reparameterize, fullgraph=True, backend=backend)(mu, logvar)
    by_mu, by_logvar = gradients(z.sum(), mu, logvar)
    torch.testing.assert_close(by_mu, torch.ones_like(mu))
    torch.testing.assert_close(by_logvar, 0.5 * (z - mu).detach(), rtol=1e-4, atol=1e-5)


def test_dynamic_batches_compile_twice(device):
    """With a beta that changes as well."""

    def call(recon_x, x, mu, logvar, beta):
        z, kl = fastelbo.sample_kl(mu, logvar, eps=torch.ones_like(mu), reduction="batchmean")
        return z.sum(), *fastelbo.loss(recon_x, x, kl=kl, beta=beta, likelihood="mse", reduction="mean")

    compiled = Counted(call)
    for batch, beta in ((5, 0.1), (6, 0.2), (7, 0.35), (64, 1.0)):
        recon_x, x, mu, logvar = make_inputs("mse", (batch, 9), (batch, 3), device=device)
        assert_same(call, compiled, (recon_x, mu, logvar), recon_x, x, mu, logvar, beta)
    assert compiled.compilations == 2


WITH_SMALLER = {
    "weight": lambda w: {"weight": w},
    "several samples": lambda w: {"weight": w, "weighting": None, "bound": ELBO(2)},
    "importance weights": lambda w: {"weight": w, "weighting": None, "bound": IWAE(2)},
    "kl_weight": lambda w: {"kl_weight": w[..., :3]},
    "prior": lambda w: {"prior": (w[..., :3], w[..., :3])},
}


@once
@pytest.mark.parametrize("name", WITH_SMALLER)
def test_what_broadcasts_where_all_sizes_are_dynamic(name, device):
    """A size of 1 is a number there, others are symbols, or numbers once something settles them."""
    x, mu, decoder = torch.randn(4, 6, device=device), torch.randn(4, 3, device=device), nn.Linear(3, 6, device=device)

    def call(x, mu, w):
        given = {"weighting": Weighting(free_bits=0.1), **WITH_SMALLER[name](w)}
        eps = torch.ones_like(mu).expand(2, *mu.shape) if "bound" in given else torch.ones_like(mu)
        return fastelbo.elbo(decoder, x, mu, mu, likelihood="mse", eps=eps, **given).loss

    for shape in ((6,), (1, 6), (4, 1)) if "weight" in WITH_SMALLER[name](x) else ((6,), (1, 6)):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        w = torch.rand(shape, device=device) + 0.1
        torch.testing.assert_close(compiled(x, mu, w), call(x, mu, w))


def by_loss(inputs, eps, net):
    recon_x, x, mu, logvar = inputs
    return 2.5 * fastelbo.loss(recon_x, x, mu, logvar, 0.5, likelihood="mse").loss


def by_sample(inputs, eps, net):
    z, kl = fastelbo.sample_kl(*inputs[2:], eps=eps)
    return z.square().sum() + kl


def around_decoder(inputs, eps, net):
    return fastelbo.elbo(net, inputs[1], *inputs[2:], eps=eps, likelihood="mse").loss


@pytest.mark.filterwarnings("ignore")  # of Dynamo, which looks at a tensor's grad and gives up frames
@pytest.mark.parametrize("compiled_autograd", (False, True), ids=("", "compiled autograd"))
@pytest.mark.parametrize("way", (by_loss, by_sample, around_decoder))
def test_backward_of_an_eager_loss(way, compiled_autograd, device):
    """A compiled function calls the backward pass of what it was not traced with."""
    inputs = make_inputs("mse", (5, 9), (5, 3), device=device)
    inputs[1].requires_grad_()
    eps, net = torch.randn(5, 3, device=device), nn.Linear(3, 9).to(device)
    leaves = [*inputs, *net.parameters()]
    expected = torch.autograd.grad(way(inputs, eps, net), leaves, allow_unused=True)
    loss = way(inputs, eps, net)
    if compiled_autograd:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss.backward()
    else:
        torch.compile(lambda loss: loss.backward(), backend="aot_eager")(loss)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.filterwarnings("ignore")  # likewise
def test_a_plain_call_after_a_transformed_one(device):
    """Dynamo has given the function up by then, and goes on with the frames inside it."""
    recon_x, x, mu, logvar = (t.detach() for t in make_inputs("mse", (5, 9), (5, 3), device=device))

    def call(recon_x):
        return fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", reduction="none").loss

    compiled = torch.compile(call, backend="aot_eager")
    twice = torch.func.vmap(compiled)(torch.stack([recon_x, 2 * recon_x]))
    torch.testing.assert_close(twice[0], call(recon_x))
    recon_x.requires_grad_()
    loss = compiled(recon_x)
    torch.testing.assert_close(loss, twice[0])
    torch.testing.assert_close(gradients(loss.sum(), recon_x)[0], 2 * (recon_x - x).detach())


def test_import_does_not_bring_the_compiler():
    code = "import sys, fastelbo; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_float_that_changes_compiles_twice(device):
    recon_x, x, mu, logvar = make_inputs("bernoulli", (5, 9), (5, 3), device=device)

    def call(recon_x, x, mu, logvar, beta):
        return fastelbo.loss(recon_x, x, mu, logvar, beta)

    compiled = Counted(call)
    for beta in (0.1, 0.2, 0.35, 1.0):
        assert_same(call, compiled, (recon_x, mu, logvar), recon_x, x, mu, logvar, beta)
    assert compiled.compilations <= 2


RECORDS_OF_A_NUMBER = {
    "float": (lambda n: Gaussian(scale=n), (0.1, 0.2, 0.35)),
    "integer": (lambda n: DiscretizedLogistic(levels=n), (16, 32, 64)),
    "pair": (lambda n: DiscretizedLogistic(interval=(-n, n)), (1.0, 1.5, 2.25)),
}


@pytest.mark.parametrize("kind", RECORDS_OF_A_NUMBER)
@pytest.mark.parametrize("made", ("inside", "outside", "in a module"))
def test_numbers_of_a_record(made, kind, device):
    """They may differ from call to call, and be symbols to the compiler, which sees them differ."""
    mean, x, mu, logvar = make_inputs("gaussian", (5, 9), (5, 3), device=device)
    record_of, numbers = RECORDS_OF_A_NUMBER[kind]
    x = torch.tanh(x)  # in [-1, 1], where all have it
    recon_x = mean if kind == "float" else (mean, torch.zeros((), device=device))

    def call(number_or_record, recon_x, x, mu, logvar):
        likelihood = record_of(number_or_record) if made == "inside" else number_or_record
        return fastelbo.loss(recon_x, x, mu, logvar, likelihood=likelihood)

    compiled, counter = Counted(call), CompileCounterWithBackend("aot_eager")
    for number in numbers:
        if made == "in a module":
            criterion = fastelbo.nn.ELBOLoss(record_of(number)).to(device)
            twin = torch.compile(criterion, fullgraph=True, backend=counter)
            assert_same(criterion, twin, (mean, mu, logvar), recon_x, x, mu, logvar)
        else:
            given = number if made == "inside" else record_of(number)
            assert_same(call, compiled, (mean, mu, logvar), given, recon_x, x, mu, logvar)
    assert max(compiled.compilations, counter.frame_count) <= 2 * len(numbers)


@pytest.mark.parametrize("where", ("device", "cpu"))
def test_a_tensor_beta_compiles_once(where, device):
    """The same tensor as the scale, too."""
    recon_x, x, mu, logvar = make_inputs("gaussian", (5, 9), (5, 3), device=device)

    def call(recon_x, x, mu, logvar, beta):
        return fastelbo.loss((recon_x, beta), x, mu, logvar, beta, likelihood="gaussian")

    compiled = Counted(call)
    for value in (0.1, 0.2, 0.35):
        beta = torch.tensor(value, device=device if where == "device" else "cpu")
        assert_same(call, compiled, (recon_x, mu, logvar), recon_x, x, mu, logvar, beta)
    assert compiled.compilations == 1


def test_gradients_of_target_and_beta(device):
    recon_x, x, mu, logvar = make_inputs("bernoulli_logits", (5, 9), (5, 3), device=device)
    beta = torch.tensor(0.3, device=device, requires_grad=True)
    x.requires_grad_()

    def call(*args):
        return fastelbo.loss(*args, likelihood="bernoulli_logits")

    args = recon_x, x, mu, logvar, beta
    assert_same(call, Counted(call), args, *args)


@pytest.mark.parametrize("needs", ((True, False, False), (False, True, False), (False, False, True)), ids=str)
def test_any_subset_of_inputs(needs, device):
    inputs = make_inputs("mse", (5, 9), (5, 3), device=device)
    for tensor, need in zip((inputs[0], inputs[2], inputs[3]), needs, strict=True):
        tensor.requires_grad_(need)

    def call(*args):
        return fastelbo.loss(*args, likelihood="mse").loss

    assert_same(call, Counted(call), [t for t in inputs if t.requires_grad], *inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_dtypes(backend, device):
    """Channels last, halves of one tensor, bytes as targets, half precision."""
    h = torch.randn(2, 8, 3, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    recon_x = torch.randn(2, 6, 8, 8, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    recon_x.requires_grad_()
    x = torch.randint(0, 256, recon_x.shape, dtype=torch.uint8, device=device)
    eps = torch.randn(2, 4, 3, 5, device=device)

    def call(recon_x, x, h, eps):
        z, kl = fastelbo.sample_kl(*h.chunk(2, 1), eps=eps)
        return z, *fastelbo.loss(recon_x, x, kl=kl, likelihood=BernoulliLogits(target_scale=1 / 255))

    assert_same(call, Counted(call, backend), (recon_x, h), recon_x, x, h, eps)


def test_transforms_under_compile(device):
    """Per-sample gradients, compiled."""
    recon_x, x, mu, logvar = (t.detach() for t in make_inputs("mse", (5, 9), (5, 3), device=device))

    def one(recon_x, x, mu, logvar):
        return fastelbo.loss(recon_x[None], x[None], mu[None], logvar[None], 0.5, likelihood="mse").loss

    def call(*args):
        return torch.func.vmap(torch.func.grad(one, argnums=(0, 2)))(*args)

    by_recon_x, by_mu = Counted(call)(recon_x, x, mu, logvar)
    torch.testing.assert_close(by_recon_x, 2 * (recon_x - x))
    torch.testing.assert_close(by_mu, 0.5 * mu)


def test_errors_name_the_argument(device):
    compiled = torch.compile(fastelbo.loss, backend="aot_eager")
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    with pytest.raises(ValueError, match="x must have the shape of"):
        compiled(recon_x, x[:, :8], mu, logvar)


WRONG = {
    "beta": ({"beta": torch.ones(4)}, "beta must be a number, a 0-d tensor or a tensor that broadcasts"),
    "prior": ({"prior": (torch.zeros(2), torch.zeros(3))}, r"prior\[0\] must have the shape of mu or one that broadcasts"),
    "likelihood": ({"likelihood": "mean"}, "likelihood must be"),
    "reduction": ({"reduction": "men"}, "reduction must be"),
    "weight": ({"weight": torch.ones(4, 1)}, "weight must broadcast to x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_an_eager_call(name, device):
    options, words = WRONG[name]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    tensors = make_inputs("mse", (5, 9), (5, 3), device=device)
    for call in (fastelbo.loss, torch.compile(fastelbo.loss, backend="aot_eager")):
        with pytest.raises(ValueError, match=words):
            call(*tensors, **{"likelihood": "mse"} | options)


@pytest.mark.skipif(INTERPRETED, reason="kernels do not look at values")
def test_errors_of_values():
    """Where what Dynamo has found runs as it is, values are seen."""
    _, x, mu, logvar = make_inputs("bernoulli", (5, 9), (5, 3))
    compiled = Counted(lambda recon_x: fastelbo.loss(recon_x, x, mu, logvar).loss, backend="eager")
    compiled(x)
    with pytest.raises(ValueError, match="recon_x must lie in"):
        compiled(x + 2)


CALLS = {
    "nll": lambda r, x, mu, logvar, **chosen: (fastelbo.nll(r, x, weight=x, **chosen),),
    "loss": lambda r, x, mu, logvar, **chosen: fastelbo.loss(r, x, mu, logvar, 0.5, **chosen),
    "sample_kl": lambda r, x, mu, logvar, **chosen: fastelbo.sample_kl(mu, logvar),
    "reparameterize": lambda r, x, mu, logvar, **chosen: (fastelbo.reparameterize(mu, logvar),),
    "kl_divergence": lambda r, x, mu, logvar, **chosen: (fastelbo.kl_divergence(mu, logvar, (logvar, mu)),),
    "elbo": lambda r, x, mu, logvar, **chosen: fastelbo.elbo(lambda z: r, x, mu, logvar, 0.5, **chosen),
}


@pytest.mark.parametrize("likelihood", ("mse", Gaussian(scale=0.3)), ids=("name", "record"))
@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_one_node(call, likelihood, device):
    """Dynamo does not go through the code of this library: what it meets is checked before each run, in Python's time."""
    counter = CompileCounterWithBackend("aot_eager")
    tensors = make_inputs("mse", (5, 9), (5, 3), device=device)
    compiled = torch.compile(
        lambda *t: sum(map(torch.sum, CALLS[call](*t, likelihood=likelihood))), fullgraph=True, backend=counter
    )
    compiled(*tensors).backward()
    (graph,) = counter.graphs
    ours = [n for n in graph.graph.nodes if n.op == "call_function" and n.target.__module__.startswith("fastelbo")]
    assert len(ours) == (2 if call == "elbo" else 1)
    results = {"loss": 3, "elbo": 3, "sample_kl": 2}.get(call, 1)
    assert counter.op_count <= len(ours) + 4 * results + 2  # the rest takes results apart, and sums them up


def test_a_distribution_is_one_node(device):
    """What is made of it goes into the call."""
    counter = CompileCounterWithBackend("aot_eager")
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)

    def call(recon_x):
        return fastelbo.loss(torch.distributions.Normal(recon_x, 0.5), x, mu, logvar).recon

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend=counter)(recon_x), call(recon_x))
    (graph,) = counter.graphs
    ours = [n for n in graph.graph.nodes if n.op == "call_function" and n.target.__module__.startswith("fastelbo")]
    assert len(ours) == 1


def test_options_made_inside(device):
    """A record that compiled code makes has its own fields, and one that changes is noticed."""
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)

    def inside(scale):
        return fastelbo.loss(
            recon_x, x, mu, logvar, likelihood=Gaussian(scale=scale), weighting=Weighting(free_bits=scale)
        ).loss

    compiled = Counted(inside)
    for scale in (0.3, 2.0):
        torch.testing.assert_close(compiled(scale), inside(scale))

    def outside(likelihood):
        return fastelbo.loss(recon_x, x, mu, logvar, likelihood=likelihood).loss

    compiled, compilations = Counted(outside), []
    for scale in (0.3, 2.0, 0.3):
        torch.testing.assert_close(compiled(Gaussian(scale=scale)), outside(Gaussian(scale=scale)))
        compilations.append(compiled.compilations)
    assert compilations[1] == compilations[2]


CASES = likelihood_cases.CASES
WEIGHTED = CASES | {name: CASES["continuous_bernoulli"]._replace(likelihood=name) for name in ("mse", "bernoulli")}


@pytest.mark.parametrize("dtype", (torch.float64,) if INTERPRETED else (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights(name, dtype, device):
    """What weighs nothing may be NaN; no gradient of a parameter that others share comes from it."""
    case = WEIGHTED[name]
    parameters, x = case.make(dtype=dtype, device=device)
    shape, likelihood = list(x.shape), find_likelihood(case.likelihood)
    if (dim := likelihood.term_dim(parameters[0], x)) is not None:
        shape[dim] = 1
    if likelihood.by_rows:  # of which a NaN is in every share
        shape[-1] = 1
    weight = (torch.rand(shape, device=device) * 3).floor() / 2
    none = weight == 0
    with torch.no_grad():
        if x.is_floating_point():
            x = x.masked_fill(none, torch.nan)
        none = none.unsqueeze(1) if x.dim() < parameters[0].dim() else none
        parameters = [p.masked_fill(none, torch.nan) if p.shape == parameters[0].shape else p for p in parameters]
    parameters = [p.requires_grad_() for p in parameters]

    def call(*parameters):
        kl = torch.zeros(len(x), device=device)
        options = {"likelihood": case.likelihood, "weight": weight, "reduction": "none"}
        return fastelbo.loss(likelihood_cases.recon_x(parameters), x, kl=kl, **options).recon

    tolerances = {} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    compiled = Counted(call)
    assert_same(call, compiled, parameters, *parameters, **tolerances)
    assert all(g.isfinite().all() for g in gradients(compiled(*parameters).sum(), *parameters))


def test_collapsed_posterior_keeps_its_gradient(device):
    """Near a variance of 1, where the terms of the naive derivative cancel."""
    mu = torch.zeros(10, 100, device=device)
    for posterior, near in (("logvar", 0.0), ("std", 1.0), ("var", 1.0)):
        second = torch.linspace(near - 1e-3, near + 1e-3, 1000, device=device).reshape(10, 100).requires_grad_()

        def call(second, posterior=posterior):
            return fastelbo.kl_divergence(mu, second, posterior=posterior)

        by_second = gradients(Counted(call)(second), second)[0]
        wide = second.detach().double()
        expected = {"logvar": 0.5 * torch.expm1(wide), "std": wide - 1 / wide, "var": 0.5 - 0.5 / wide}[posterior]
        assert ((by_second - expected).abs() <= 1e-6 * expected.abs()).all()


def test_gradients_of_weights_and_targets(device):
    """Where they want some, and where a parameter does not."""
    mean, scale, x = (torch.rand(4, 5, device=device, requires_grad=True) for _ in range(3))
    weight = torch.tensor([[0.0, 1.0, 0.5, 2.0, 3.0]], device=device, requires_grad=True)

    def call(mean, scale, x, weight):
        return fastelbo.loss((mean, scale), x, kl=torch.zeros((), device=device), weight=weight, likelihood="gaussian").recon

    for wants in ((True, False, False, False), (False, True, True, False), (True, True, False, True)):
        tensors = [t.detach().requires_grad_(want) for t, want in zip((mean, scale, x, weight), wants, strict=True)]
        assert_same(call, Counted(call), [t for t in tensors if t.requires_grad], *tensors)


def test_own_likelihood(device):
    """One that a user wrote, of the same name as another."""
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)

    def made(factor):
        class Own(Gaussian):
            def nll(self, parameters, x):
                return factor * (parameters[0] - x).square()

        return Own()

    for factor in (1.0, 3.0):
        own = made(factor)

        def call(own=own):
            return fastelbo.loss(recon_x, x, mu, logvar, likelihood=own).recon

        torch.testing.assert_close(Counted(call)(), call())


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="compiled once, on a CPU")
@pytest.mark.parametrize(
    ("likelihood", "count"),
    (
        ("bernoulli", 1),
        ("bernoulli_logits", 1),
        (BernoulliLogits(pos_weight=3.0), 1),
        ("continuous_bernoulli_logits", 1),
        ("multinomial", 1),
        ("mse", 1),
        ("laplace", 1),
        ("gaussian", 2),
        ("negative_binomial", 2),
        (DiscretizedLogisticMixture(), 1),
    ),
    ids=str,
)
def test_passes_of_compiled_formulas(likelihood, count, monkeypatch):
    """What `compiled_excess` says, Inductor counts in its code, which it looks at where its log of metrics is on."""
    monkeypatch.setattr(compile_fx, "inductor_metrics_log", logging.Logger("metrics", logging.INFO))
    likelihood = find_likelihood(likelihood)
    is_mixture = likelihood.name == "discretized_logistic_mixture"
    shape, of_x = ((2, 100, 32, 32), (2, 3, 32, 32)) if is_mixture else ((64, 4096), (64, 4096))
    x, parameters = torch.rand(of_x), [torch.rand(shape).add_(0.1).requires_grad_() for _ in range(count)]
    metrics.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        call = torch.compile(lambda *y: fastelbo.nll(y, x, likelihood=likelihood), fullgraph=True)
        call(*parameters).backward()
    first = parameters[0].numel()
    passes = metrics.num_bytes_accessed / (first * x.itemsize)
    assert passes - (3 * count + 2 * x.numel() / first) == pytest.approx(likelihood.compiled_excess, abs=0.1)


@once
def test_graphs_are_kept_on_disk(tmp_path):
    """Torch keeps what it compiled for the next process only if it knows each function in the graph; and not for other code."""
    code = """
import sys, torch, fastelbo
from fastelbo.engine import compiled
if len(sys.argv) > 1:
    compiled._version = lambda: sys.argv[1]
x = torch.rand(4, 9)
torch.compile(lambda r: (2 * r).sum())(torch.rand(4, 9, requires_grad=True)).backward()
before = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
torch.compile(lambda r: fastelbo.loss(r, x, x, x).loss)(torch.rand(4, 9, requires_grad=True)).backward()
print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] - before)
"""
    found = []
    for version in ([], [], ["another"], ["another"]):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0"}
        run = subprocess.run([sys.executable, "-c", code, *version], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        found.append(int(run.stdout))
    assert found == [0, 1, 0, 1]


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="about Torch on a CPU")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="makes normals of its own of those, too")
def test_much_noise_on_a_cpu_is_what_an_eager_call_draws():
    mu, logvar = torch.randn(80, 30), torch.randn(80, 30)
    for call in (fastelbo.reparameterize, fastelbo.sample_kl, fastelbo.sample_log_ratio):
        results = []
        for run in (call, Counted(call, "inductor")):
            torch.manual_seed(5)
            result = run(mu, logvar)
            results.append(result if isinstance(result, torch.Tensor) else result[0])
        torch.testing.assert_close(*results)


NAN, INF = float("nan"), float("inf")
RARE = {
    "probabilities": ("bernoulli", [[0.0, 1.0, 0.0, 1.0, 0.5, 1e-30]], [[0.0, 1.0, 1.0, 0.0, 0.3, 0.5]]),
    "not a number": ("bernoulli", [[NAN, 0.5, -0.1, 1.5]], [[0.5, 0.5, 0.5, 0.5]]),
    "no probability": ("bernoulli", [[0.5, 0.5]], [[1.5, -1e-30]]),
    "positives": (BernoulliLogits(pos_weight=3.0), [[-30.0, 30.0, 0.0, 2.0]], [[0.0, 1.0, 1.0, 0.3]]),
    "ignored": ("categorical", [[0.5, NAN, 2.0], [1.0, -1.0, 0.0]], [-100, 2]),
    "labels of nothing": ("categorical", [[0.5, 1.0, 2.0], [1.0, -1.0, 0.0]], [7, 2]),
    "labels of places": (
        "categorical", [[[0.5, NAN], [1.0, 2.0], [0.0, 1.0]], [[0.0, 1.0], [-INF, 0.0], [2.0, 2.0]]], [[1, -100], [2, 9]],
    ),
    "bins": (
        "discretized_logistic",
        ([[-1.0, 1.0, 0.0, 3.0, -3.0, 0.2, 0.0, 0.3]], [[-4.0, -4.0, -9.0, -3.0, 1.0, 10.0, -6.0, 80.0]]),
        [[-1.0, 1.0, 0.0, 1.0, -1.0, 0.2, 1.0, 0.0]],
    ),
    "narrow and wide bins": (DiscretizedLogistic(levels=3), ([[0.1, -0.2]], [[-90.0, 90.0]]), [[0.0, 0.0]]),
    "no bins": ("discretized_logistic", ([[0.0], [NAN]], [[0.0], [0.0]]), [[1.5], [0.0]]),
    "masked items": ("multinomial", [[-INF, 1.0, 0.5], [1.0, -INF, 0.0]], [[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]),
    "items that cannot be": ("multinomial", [[-INF, 1.0, 0.5]], [[1.0, 2.0, 1.0]]),
    "counts": ("poisson_log", [[0.0, 1.0, -9.0, 7.0, 0.5, 0.5]], [[0.0, 1.0, 2.0, 1500.0, 0.25, 2e6]]),
    "no counts": ("poisson_log", [[0.0], [1.0]], [[-0.5], [NAN]]),
    "small dispersions": (
        "negative_binomial", ([[0.5, 3.0, 0.0, 0.1]], [[1e-12, 1e-37, 1e-3, 5e-39]]), [[0.0, 4.0, 0.0, 2e4]],
    ),
    "large dispersions": ("negative_binomial", ([[0.5, 3.0, 2.0, 1.0]], [[1e5, 1e12, 1e20, 1e30]]), [[1.0, 4.0, 0.0, 3e7]]),
    "dispersions of all": ("negative_binomial", ([[0.5, 3.0], [2.0, 1.0]], [0.3, 7.0]), [[1.0, 4.0], [0.0, 300.0]]),
    "no dispersions": ("negative_binomial", ([[0.5], [3.0], [1.0]], [[0.0], [-1.0], [NAN]]), [[1.0], [4.0], [0.0]]),
    "more zeros": (
        "zero_inflated_negative_binomial", ([[2.0, 1e3, 3.0, 0.0, 1.0]], [[1.0, 50.0, 4.0, 1e-9, 2.0]],
        [[-60.0, -120.0, 40.0, 0.0, 0.3]]), [[0.0, 0.0, 2.0, 0.0, 7.0]],
    ),
}  # fmt: skip


# Where an interpreted kernel computes, what Inductor compiles is around it: for that, `test_inductor` is enough.
@pytest.mark.parametrize("backend", BACKENDS[1:] if INTERPRETED else BACKENDS)
@pytest.mark.parametrize("name", RARE)
def test_rare_values(name, backend):
    """Likelihoods have forms of their own for the compiler: they give what the formula gives."""
    likelihood, first, x = RARE[name]
    given = first if isinstance(first, tuple) else (first,)
    parameters, x = [torch.tensor(p, requires_grad=True) for p in given], torch.tensor(x)

    def call(*parameters):
        recon_x = parameters if len(parameters) > 1 else parameters[0]
        return fastelbo.loss(recon_x, x, kl=torch.zeros(len(x)), likelihood=likelihood, reduction="none").recon

    with FlopCounterMode(display=False):  # under which no backend computes
        expected = call(*parameters)
    upstream = torch.rand(len(x))
    got = Counted(call, backend)(*parameters)
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(*(torch.autograd.grad(v, parameters, upstream) for v in (got, expected)), equal_nan=True)
