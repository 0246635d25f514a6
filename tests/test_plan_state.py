"""What a call leaves behind for the next of its kind harms nothing: not backward, not other threads, tracers or transforms, and
it holds no tensor. Each test warms a call up first, and calls it again afterwards."""

import contextlib
import copy
import gc
import os
import pickle
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from test_plan import CHANGES, Counter, Wrapper
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

import fastelbo
from calls import (
    FIELDS,
    LATENT,
    SHAPE,
    Call,
    bits,
    by_loss,
    check,
    check_backward,
    expected_gradients,
    leaf,
    number,
    plain,
    probabilities,
    same,
    truth,
    wanted,
)
from conftest import DEVICE, INTERPRETED
from fastelbo import Weighting
from likelihood_cases import CASES as LIKELIHOODS
from likelihood_cases import recon_x

# --- tracers and transforms


def by_grad(call):
    function, tensors = by_loss(call)
    return torch.func.grad(function, (0, 2, 3))(*tensors)


def by_vmap(call):
    """Over two copies of each tensor."""
    function, tensors = by_loss(call)
    found = torch.func.vmap(torch.func.grad(function, (0, 2, 3)))(*(torch.stack((t, t)) for t in tensors))
    return [g[1] for g in found]


def by_make_fx(call):
    function, tensors = by_loss(call)

    def gradient(*tensors):
        tensors = [t.detach().requires_grad_(i != 1) for i, t in enumerate(tensors)]
        return torch.autograd.grad(function(*tensors), (tensors[0], *tensors[2:]))

    return make_fx(gradient)(*tensors)(*tensors)


def by_compile(call):
    function, tensors = by_loss(call)
    tensors = [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]
    torch.compiler.reset()
    loss = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    return torch.autograd.grad(loss, (tensors[0], *tensors[2:]))


def by_dispatch_mode(call):
    with Counter():
        return torch.autograd.grad(call.run().loss, wanted(call))


def by_wrappers(call):
    tensors = [Wrapper(t) for t in (call.recon_x, call.x, call.mu, call.logvar)]
    loss = by_loss(call)[0](*tensors)
    return torch.autograd.grad(loss, (tensors[0], *tensors[2:]))


WAYS = (by_grad, by_vmap, by_make_fx, by_dispatch_mode, by_wrappers)
CASES = [(way, name) for way in WAYS for name in ("beta 4.0", "reduction mean")]
CASES += [(by_compile, "beta 4.0")]  # which takes seconds


@pytest.mark.parametrize("warm", (False, True), ids=("first", "afterwards"))
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{way.__name__}-{name}" for way, name in CASES])
def test_traced_and_transformed_calls(case, warm):
    """Before an eager call of their kind, whose shape is new then, and after it."""
    (way, name), size = CASES[case], 30 + 2 * case + warm
    for eager in (True, False, True) if warm else (False, True):
        call = CHANGES[name](replace(Call(), recon_x=leaf(probabilities((3, size))), x=bits((3, size))))
        if eager:
            check(call)
        else:
            for g, e in zip(way(call), expected_gradients(call, number(1.0)), strict=True):
                same(g, e)


@pytest.mark.parametrize("warm", (False, True), ids=("first", "afterwards"))
def test_fake_and_meta_tensors(warm):
    """They have no values, so what they leave behind would have none."""
    size = 100 + warm

    def make():
        return replace(Call(), recon_x=leaf(probabilities((3, size))), x=bits((3, size)))

    for eager in (True, False, True) if warm else (False, True):
        if eager:
            check(make())
            continue
        with FakeTensorMode():
            call = make()
            loss = call.run().loss
            assert loss.shape == ()
            assert [g.shape for g in torch.autograd.grad(loss, wanted(call))] == [t.shape for t in wanted(call)]
        tensors = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in by_loss(make())[1]]
        loss = by_loss(make())[0](*tensors)
        assert (loss.device.type, loss.shape) == ("meta", ())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_tensors_without_values(name):
    """Nobody looks at them, whatever the likelihood is: fake ones outside of their mode, and those on meta."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parameters, x = LIKELIHOODS[name].make()
    for convert in (mode.from_tensor, lambda t: t.to("meta")):
        given = [convert(p.detach()).requires_grad_() for p in parameters]
        found = fastelbo.nll(recon_x(given), convert(x), likelihood=LIKELIHOODS[name].likelihood, reduction="none")
        assert found.shape == x.shape[:1]
        assert [g.shape for g in torch.autograd.grad(found.sum(), given)] == [p.shape for p in parameters]
        with torch.no_grad():
            assert fastelbo.nll(recon_x(given), convert(x), likelihood=LIKELIHOODS[name].likelihood).shape == ()


def test_forward_mode_in_turns():
    for _ in range(3):
        call = Call()
        check(call)
        function, tensors = by_loss(call)
        tangents = [torch.randn_like(t) for t in tensors]
        by_x = replace(call, x=leaf(call.x))
        gradients = expected_gradients(by_x, number(1.0))
        gradients = dict(zip(map(id, wanted(by_x)), gradients, strict=True))
        slope = sum((gradients[id(getattr(by_x, f))] * t).sum() for f, t in zip(FIELDS, tangents, strict=True))
        same(torch.func.jvp(function, tuple(tensors), tuple(tangents))[1].float(), slope)  # 0-d tangents may be float64
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
            same(torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent, slope)


# --- what has no strides


NOT_DENSE = {
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.flatten(1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "mkldnn": lambda t: t.cpu().to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta state)")
@pytest.mark.parametrize("field", ("recon_x", "x", "mu", "logvar"))
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_what_is_not_dense_is_refused_after_a_dense_one(kind, field):
    call = Call()
    other = replace(call, **{field: NOT_DENSE[kind](getattr(call, field).detach()).requires_grad_(field != "x")})
    for _ in range(2):
        check(Call())
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            other.run()


# --- records


def pickled(record):
    return pickle.loads(pickle.dumps(record))


@pytest.mark.parametrize("twin_of", (copy.copy, copy.deepcopy, pickled))
@pytest.mark.parametrize(
    "name",
    (
        "gaussian, log_scale",
        "gaussian, soft -1",
        "pos_weight 3",
        "categorical, dim 2",
        "16 levels",
        "clamp",
        "free bits per sample",
    ),
)
def test_copies_of_records(name, twin_of):
    for copied in (False, True):
        call = CHANGES[name](Call())
        if copied:
            call = replace(call, **{f: twin_of(getattr(call, f)) for f in ("likelihood", "posterior", "weighting")})
        check(call)


@pytest.mark.parametrize("twin_of", (copy.deepcopy, pickled))
def test_copies_of_the_module(twin_of):
    """Its beta is its own: it may be written to between two calls."""
    criterion = fastelbo.nn.ELBOLoss("bernoulli_logits", beta=0.5, reduction="batchmean").to(DEVICE)
    for beta in (0.5, 2.0, 0.0, 0.5):
        for module in (criterion, twin_of(criterion)):
            module.beta.fill_(beta)
            call = replace(Call(), beta=beta)
            found = module(call.recon_x, call.x, call.mu, call.logvar)
            for a, b in zip(found, truth(call, plain), strict=True):
                same(a, b)


def test_tensors_that_are_written_to():
    """A second parameter and a capacity: their values are those of now."""
    ratio, capacity = torch.ones(4, 1, 1, device=DEVICE), torch.tensor(12.0, device=DEVICE)
    weighting = Weighting(capacity=capacity)
    for value in (1.0, 3.0, 0.5):
        ratio.fill_(value)
        capacity.fill_(12 * value)

        def weighted(p, x, value=value):
            return -(value * x * torch.nn.functional.logsigmoid(p[0]) + (1 - x) * torch.nn.functional.logsigmoid(-p[0]))

        call = Call()
        check(replace(call, recon_x=(call.recon_x, ratio), likelihood="bernoulli_logits", terms=weighted))
        check(replace(Call(), weighting=weighting))


# --- threads


@contextlib.contextmanager
def raised():
    """What threads raise is raised here."""
    errors, threads = [], []

    def start(function, *args):
        def run():
            try:
                function(*args)
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter patches triton.language while it runs")
@pytest.mark.parametrize("name", ("beta 4.0", "reduction none", "gaussian, log_scale", "prior"))
def test_threads_that_make_the_same_call(name):
    """With other data, large enough to be switched inside of, and factors of their own."""
    barrier, make = threading.Barrier(8), threading.Lock()

    def work(factor):
        barrier.wait(timeout=60)
        for _ in range(6):
            with make:
                call = CHANGES[name](Call())
            check(call, (factor, 0.0, 1.0))

    with raised() as start:
        for i in range(8):
            start(work, 1.0 + i)


def test_backward_in_another_thread():
    """While its own thread has gone on, and with other threads before and after it."""
    for factor in (1.0, 2.0, 2.0):
        call = Call()
        loss = call.run().loss
        check(Call())
        with raised() as start:
            start(check_backward, call, loss, number(factor))
        with raised() as start:
            start(check, Call())
        check(Call())


# --- memory


KEPT_BY = ("beta 4.0", "gaussian, log_scale", "prior", "weight", "kl", "beta, with gradient", "transposed all",
           "reduction none", "no_grad", "free bits per dimension", "pos_weight 3")  # fmt: skip


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("name", KEPT_BY)
def test_no_tensor_is_kept(name, backward):
    """Neither inputs nor results, nor the memory of which they are views, whether or not there was a backward."""
    gc.freeze()  # what was there before is not looked at, which would take most of the time
    for _ in range(2):
        refs, storages = passing(CHANGES[name](Call()), backward)
        if not all(s.expired() for s in storages):  # in cycles, which the interpreter makes
            gc.collect()
        assert not [r for r in refs if r() is not None]
        assert all(s.expired() for s in storages)
    gc.unfreeze()


def passing(call, backward):
    """Weak references to all tensors of a call and their memory."""
    memory = torch.zeros(2 * call.x.numel(), dtype=call.x.dtype, device=DEVICE)
    call.x = memory[: call.x.numel()].view(SHAPE).copy_(call.x)
    latents = [leaf(torch.randn(LATENT, device=DEVICE)) for _ in range(2)]
    with call.around():
        results = [*call.run(), *fastelbo.sample_kl(*latents)]
    if backward and results[0].requires_grad:
        upstreams = [torch.full_like(r, 2.0) for r in results]
        results += *torch.autograd.grad(results, (*wanted(call), *latents), upstreams, allow_unused=True), *upstreams
    tensors = [t for t in (*call.tensors, memory, *latents, *results) if t is not None]
    return [weakref.ref(t) for t in tensors], [StorageWeakRef(t.untyped_storage()) for t in tensors]


def resident() -> int:
    """Bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_shapes_that_never_repeat_take_no_memory():
    """One tensor of each would be 70 MB, or 40 MB."""
    n, size = (20, 500_000) if INTERPRETED else (3000, 6000)
    before, values, ones = 0, probabilities((1, size + n)), torch.ones(1, size + n, device=DEVICE)
    latents = [leaf(t[:1]) for t in (Call().mu, Call().logvar)]
    for i in range(n):
        call = Call(leaf(values[:, : size + i].clone()), ones[:, : size + i].clone(), *latents)
        loss = call.run().loss
        loss.backward()
        if i % 3 == 0:
            z, kl = fastelbo.sample_kl(*(torch.zeros(1, i + 1, device=DEVICE, requires_grad=True) for _ in range(2)))
            (z.sum() + kl).backward()
        before = before or (i == n // 10 and resident())
    same(loss, truth(call, plain)[0])
    assert resident() - before < 2**25
