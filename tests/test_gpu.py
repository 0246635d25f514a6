"""What only a CUDA GPU can show: graphs, streams, launches, syncs, autocast, and tensors of more than 2^31 elements."""

import itertools
import warnings

import pytest
import torch

import fastelbo
from bench.measure import device_events
from conftest import BACKEND
from support import gradients, make_inputs, naive, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
of_the_kernels = pytest.mark.skipif(BACKEND != "triton", reason="the Torch backend launches what it launches")


def test_two_runs_are_bitwise_equal(device):
    inputs = make_inputs("bernoulli_logits", (512, 4001), (512, 33), device=device)
    results = []
    for _ in range(3):
        torch.manual_seed(7)
        terms = fastelbo.loss(*inputs, 0.3, likelihood="bernoulli_logits")
        z, kl = fastelbo.sample_kl(inputs[2], inputs[3])
        results.append([*terms, z, kl, *gradients(terms.loss + z.sum() + kl, inputs[0], inputs[2], inputs[3])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def count_kernels(function) -> int:
    """Kernels, copies and fills."""
    for _ in range(3):
        function()
    return len(device_events(function))


@of_the_kernels
@pytest.mark.counts_launches
def test_launches(device):
    """One for the loss, one for its backward, two for seed and sample, one for their backward."""
    recon_x, x, mu, logvar = make_inputs("mse", (128, 784), (128, 20), device=device)
    one = torch.ones((), device=device)
    with torch.no_grad():
        assert count_kernels(lambda: fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse")) == 1
        assert count_kernels(lambda: fastelbo.sample_kl(mu, logvar)) == 2
    wrt = recon_x, mu, logvar

    def loss():
        gradients(fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse").loss, *wrt, grad_outputs=one)

    upstream = torch.ones_like(mu)

    def sample():
        z, kl = fastelbo.sample_kl(mu, logvar)
        torch.autograd.grad((z, kl), (mu, logvar), (upstream, one))

    assert count_kernels(loss) == 2
    assert count_kernels(sample) == 3


@pytest.fixture
def syncs_raise():
    """A function after which each sync raises, until the test ends."""

    def set_mode(mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a prototype
            torch.cuda.set_sync_debug_mode(mode)

    def begin():
        torch.cuda.synchronize()
        set_mode("error")

    yield begin
    set_mode("default")


def test_no_sync(syncs_raise, device):
    recon_x, x, mu, logvar = make_inputs("bernoulli", (128, 784), (128, 20), device=device)
    beta = torch.tensor(0.5, device=device, requires_grad=True)
    net = torch.nn.Linear(20, 784).to(device)

    def step():
        fastelbo.loss(recon_x, x, mu, logvar, beta).loss.backward()
        fastelbo.elbo(lambda z: net(z).sigmoid(), x, mu, logvar, 0.1).loss.backward()
        bound = fastelbo.IWAE(4, estimator="dreg", chunk=2)
        fastelbo.elbo(net, x, mu, logvar, beta, likelihood="bernoulli_logits", bound=bound).loss.backward()
        fastelbo.log_likelihood(net, x, mu, logvar, likelihood="bernoulli_logits", n_samples=4, chunk=2)

    step()
    syncs_raise()
    step()


def calls_with_options(device):
    """A function that makes calls with every kind of option and differentiates them, and the tensors it differentiates by."""
    mean, counts, mu, logvar = make_inputs("mse", (64, 300), (64, 8), device=device)
    counts = counts.abs().round()
    theta, logits, log_scale = (torch.randn(s, device=device, requires_grad=True) for s in ((300,), (64, 300), ()))
    mask, labels = torch.rand(64, 1, device=device) > 0.2, torch.randint(0, 300, (64,), device=device)
    prior, capacity = (mu.detach() / 2, logvar.detach() / 2), torch.tensor(3.0, device=device)
    monitor = fastelbo.diagnostics.Monitor()
    soft = fastelbo.likelihoods.Gaussian(parameter="log_scale", soft_min=-6.0)

    def call():
        zeros = (mean.exp(), theta.exp(), logits)
        free = fastelbo.Weighting(free_bits=0.1)
        drawn = fastelbo.Weighting(capacity=capacity, balance=(0.2, 0.8))
        losses = (
            fastelbo.loss(
                zeros, counts, mu, logvar, likelihood="zero_inflated_negative_binomial", weight=mask, reduction="mean",
                posterior=fastelbo.Posterior("log_std", (-3.0, 3.0)), prior=prior, weighting=drawn, monitor=monitor,
            ),
            fastelbo.loss((mean, log_scale), counts, mu, logvar, likelihood=soft, weighting=free, reduction="batchmean"),
            fastelbo.loss(logits, labels, mu, logvar, likelihood="categorical", reduction="mean", prior=prior),
            fastelbo.loss(logits, counts, mu, logvar, likelihood="multinomial", reduction="batchmean"),
            fastelbo.loss(mean, counts, mu, logvar, likelihood=fastelbo.likelihoods.Gaussian("optimal")),
        )  # fmt: skip
        total = sum(terms.loss for terms in losses)
        # Without its graph, which a captured call would keep, and with it the stream on which leaves expect their gradients.
        return total.detach(), gradients(total, *wrt)

    wrt = mean, mu, logvar, theta, logits, log_scale
    return call, wrt


def test_no_sync_of_any_option(syncs_raise, device):
    call, _ = calls_with_options(device)
    call()
    syncs_raise()
    call()


def test_options_are_bitwise_repeatable(device):
    call, _ = calls_with_options(device)
    call()
    first, second = call(), call()
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_graph_replay_of_options(device):
    call, wrt = calls_with_options(device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, grads = call()
    for _ in range(3):
        with torch.no_grad():
            for tensor in wrt:
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        expected = call()
        torch.testing.assert_close(total, expected[0])
        torch.testing.assert_close(grads, expected[1])


@of_the_kernels
@pytest.mark.counts_launches
def test_launches_of_several_parameters(device):
    """One for the reconstruction and its gradients, one for its backward, which finds its factor guessed."""
    mean, x, _, _ = make_inputs("mse", (128, 784), (128, 20), device=device)
    logvar = torch.randn(128, 784, device=device, requires_grad=True)
    kl, one = torch.zeros((), device=device), torch.ones((), device=device)
    likelihood = fastelbo.likelihoods.Gaussian(parameter="logvar")

    def recon():
        return fastelbo.loss((mean, logvar), x, kl=kl, beta=0.0, likelihood=likelihood).recon

    with torch.no_grad():
        forward = count_kernels(recon)
    # Beside it, beta * kl and the sum with it; and a copy of kl, which whoever is given it may write to.
    assert forward <= 4
    assert count_kernels(lambda: gradients(recon(), mean, logvar, grad_outputs=one)) <= forward + 1


def test_graph_replay(device):
    """Right gradients for what the inputs hold at replay, with fresh noise each time."""
    recon_x, x, mu, logvar = make_inputs("mse", (64, 100), (64, 8), device=device)
    factor = torch.ones((), device=device)

    def step():
        z, kl = fastelbo.sample_kl(mu, logvar)
        loss = fastelbo.loss(recon_x, x, kl=kl, likelihood="mse").loss
        grads = gradients(loss * factor + z.sum(), recon_x, mu, logvar)
        return loss, z, grads

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, z, grads = step()
    samples = []
    for value in (1.0, 1.0, 0.25, 65536.0, 0.25):
        with torch.no_grad():
            recon_x.copy_(torch.randn_like(recon_x))
            factor.fill_(value)
        graph.replay()
        torch.testing.assert_close(loss, naive(recon_x, x, mu, logvar, likelihood="mse")[0].detach())
        torch.testing.assert_close(grads[0], 2 * value * (recon_x - x).detach())
        torch.testing.assert_close(grads[1], 1 + value * mu.detach())
        torch.testing.assert_close(grads[2], (0.5 * (z - mu) + 0.5 * value * torch.expm1(logvar)).detach())
        samples.append(z.detach().clone())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(samples))


def test_replays_on_two_streams_at_once(device):
    """Two graphs of calls alike, each with counters of its own."""
    replays = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        recon_x, x, mu, logvar = make_inputs("bernoulli_logits", (256, 1000), (256, 8), device=device)

        def step(recon_x=recon_x, x=x, mu=mu, logvar=logvar):
            z, kl = fastelbo.sample_kl(mu, logvar)
            terms = fastelbo.loss(recon_x, x, mu, logvar, likelihood="bernoulli_logits")
            by_sample = gradients(z.sum(), logvar)[0] - 0.5 * (z - mu)  # which is 0 with one noise for both
            found = kl, *terms, *gradients(terms.loss, recon_x, mu, logvar)
            return z.detach(), by_sample.detach(), [t.detach() for t in found]

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = [t.clone() for t in step()[2]]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            z, by_sample, found = step()
        replays.append((stream, graph, z, by_sample, found, expected, []))
    for _ in range(50):
        for stream, graph, *_ in replays:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for _, _, z, by_sample, found, expected, samples in replays:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert by_sample.abs().max() < 1e-4
            samples.append(z.clone())
        torch.cuda.synchronize()
    for *_, samples in replays:
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(samples))


def test_many_samples_in_a_graph(device, monkeypatch):
    net = torch.nn.Linear(8, 100).to(device)
    _, x, mu, logvar = make_inputs("mse", (64, 100), (64, 8), device=device)
    eps, wrt = torch.randn(4, 64, 8, device=device), (mu, logvar, *net.parameters())

    def step(chunk=4):
        loss = fastelbo.elbo(net, x, mu, logvar, likelihood="mse", bound=fastelbo.IWAE(4, chunk=chunk), eps=eps).loss
        return [loss.detach(), *gradients(loss, *wrt)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        eps.normal_()
        graph.replay()
        torch.testing.assert_close(found, step(1), rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capture elbo with chunk=n_samples"):
        step(1)


def test_a_replay_allocates_nothing(syncs_raise, device):
    inputs = make_inputs("mse", (64, 100), (64, 8), device=device)

    def step():
        terms = fastelbo.loss(*inputs, likelihood="mse")
        return gradients(terms.loss + fastelbo.sample_kl(inputs[2], inputs[3]).kl, inputs[0], *inputs[2:])

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    syncs_raise()
    for _ in range(3):
        graph.replay()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before
    torch.testing.assert_close(results[0], 2 * (inputs[0] - inputs[1]).detach())


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # which make_graphed_callables keeps from its warm-up
def test_graphed_callables(device):
    """`make_graphed_callables` warms up with gradients that mean nothing, so that every guess is wrong."""
    inputs = make_inputs("mse", (64, 100), (64, 8), device=device)

    def call(*inputs):
        return tuple(fastelbo.loss(*inputs, 0.5, likelihood="mse"))

    graphed = torch.cuda.make_graphed_callables(call, inputs)
    for factor in (1.0, 1.0, 0.25):
        others = make_inputs("mse", (64, 100), (64, 8), device=device)
        wrt = others[0], *others[2:]
        results = []
        for function in (graphed, call):
            terms = function(*others)
            results.append([*(t.detach().clone() for t in terms), *gradients(terms[0] * factor + terms[2], *wrt)])
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.parametrize("way", ("elbo", "composed"))
def test_reduce_overhead(way, device):
    """A training step under torch.compile with CUDA graphs: what it learns is what it learns eagerly, and noise is fresh."""
    torch.compiler.reset()
    net = torch.nn.Linear(8, 100).to(device)
    _, x, mu, logvar = make_inputs("mse", (64, 100), (64, 8), device=device)

    def step(x, mu, logvar, eps):
        if way == "elbo":
            terms = fastelbo.elbo(net, x, mu, logvar, 0.5, likelihood="mse", eps=eps)
        else:
            z, kl = fastelbo.sample_kl(mu, logvar, eps=eps)
            terms = fastelbo.loss(net(z), x, kl=kl, beta=0.5, likelihood="mse")
        return terms.loss, fastelbo.reparameterize(mu, logvar)

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    samples, wrt = [], (mu, logvar, *net.parameters())
    for _ in range(5):
        eps = torch.randn_like(mu)
        results = []
        for function in (compiled, step):
            torch.compiler.cudagraph_mark_step_begin()
            loss, _ = function(x, mu, logvar, eps)
            results.append([loss.detach().clone(), *(g.clone() for g in gradients(loss, *wrt))])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
        torch.compiler.cudagraph_mark_step_begin()
        samples.append(compiled(x, mu, logvar, eps)[1].detach().clone())
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(samples, 2))
    assert all(abs(((z - mu) * (-0.5 * logvar).exp()).std() - 1) < 0.15 for z in samples)


@of_the_kernels
@pytest.mark.counts_launches
def test_no_cast_kernels_under_autocast(device):
    recon_x, x, mu, logvar = make_inputs("bernoulli_logits", (128, 784), (128, 20), device=device)
    recon_x = recon_x.detach().bfloat16().requires_grad_()
    x = (255 * x).round().to(torch.uint8)
    one, likelihood = torch.ones((), device=device), fastelbo.likelihoods.BernoulliLogits(target_scale=1 / 255)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = fastelbo.loss(recon_x, x, mu, logvar, likelihood=likelihood).loss
        gradients(loss, recon_x, mu, logvar, grad_outputs=one)

    assert count_kernels(step) == 2


def test_two_streams_at_once(device):
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [make_inputs("mse", (256, 1000), (256, 8), device=device) for _ in range(2)]
    truth = [2 * (r - x).detach() for r, x, _, _ in inputs]
    torch.cuda.synchronize()
    for step in range(50):
        results = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                recon_x, x, mu, logvar = inputs[i]
                factor = 1.0 + i + step % 3
                loss = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse").loss * factor
                results.append((factor, loss, gradients(loss, recon_x)[0]))
        torch.cuda.synchronize()
        for i, (factor, _, gradient) in enumerate(results):
            assert relative(gradient, factor * truth[i]) < 1e-6


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype, device):
    net = torch.nn.Linear(16, 784).to(device)
    x = torch.rand(32, 784, device=device).round()
    mu, logvar = (torch.randn(32, 16, device=device, requires_grad=True) for _ in range(2))
    eps = torch.randn_like(mu)
    grads = []
    for autocast in (True, False):
        with torch.autocast("cuda", dtype, enabled=autocast):
            terms = fastelbo.elbo(net, x, mu, logvar, likelihood="bernoulli_logits", eps=eps)
        assert terms.loss.dtype == torch.float32
        grads.append(gradients(terms.loss, mu, logvar, *net.parameters()))
    for a, b in zip(*grads, strict=True):
        assert relative(a, b) < 0.02


def test_pointers_that_are_not_aligned(device):
    recon_x, x = (torch.rand(128 * 784 + 3, device=device)[3:].view(128, 784) for _ in range(2))
    recon_x.requires_grad_()
    loss = fastelbo.loss(recon_x, x, kl=torch.zeros((), device=device), likelihood="mse").loss
    torch.testing.assert_close(gradients(loss, recon_x)[0], 2 * (recon_x - x).detach())


def test_more_than_two_to_the_31_elements(device):
    n = 2**31 + 1037
    if torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    recon_x = torch.zeros(1, n, dtype=torch.bfloat16, device=device)
    x = torch.zeros(1, n, dtype=torch.uint8, device=device)
    ends = [0, 2**31 - 1, 2**31, n - 1]
    recon_x[0, ends] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16, device=device)
    recon_x.requires_grad_()
    loss = fastelbo.loss(recon_x, x, kl=torch.zeros((), device=device), likelihood="mse").loss
    assert loss.item() == 30
    (gradient,) = gradients(loss, recon_x)
    assert gradient[0, ends].tolist() == [2, 4, 6, 8]
    assert gradient.count_nonzero().item() == 4


def test_many_latents(device):
    n = 2**31 + 16
    if torch.cuda.get_device_properties(device).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GB")
    zeros = torch.zeros(1, n, dtype=torch.bfloat16, device=device)
    z, kl = fastelbo.sample_kl(zeros, zeros)
    assert kl.item() == 0
    for part in (z[0, : 2**24], z[0, -(2**24) :]):
        assert abs(part.float().mean()) < 2e-3
        assert abs(part.float().std() - 1) < 2e-3
    assert not torch.equal(z[0, : 2**20], z[0, 2**31 - 2**20 : 2**31])
