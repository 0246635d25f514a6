"""Schedules have the values of their formulas, as floats and as tensors, and a compiled step with one compiles once."""

import pickle
from fractions import Fraction
from itertools import pairwise
from math import ceil, cos, inf, nan, pi, sqrt

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastelbo
from conftest import once
from fastelbo import schedules
from support import make_inputs

EACH = {
    "linear": schedules.linear(7, 0.1, 0.7, delay=3),
    "falling": schedules.linear(0.5, 25.0, 5.0),
    "cosine": schedules.cosine(10, 0.1, 0.7, delay=2.5),
    "cyclical": schedules.cyclical(10, 0.3, 0.1, 0.7),
    "cyclical, ending": schedules.cyclical(8, 1, 0.1, 0.7, cycles=3, shape="cosine"),
    "cyclical, of fractions": schedules.cyclical(7.5, 0.4, cycles=2),
}


@pytest.fixture(params=EACH.values(), ids=EACH)
def schedule(request):
    return request.param


@pytest.mark.parametrize("step, expected", ((-5, 0.5), (0, 0.5), (4, 0.5), (9, 1.5), (11.5, 2.0), (14, 2.5), (10**9, 2.5)))
def test_linear(step, expected):
    assert schedules.linear(10, 0.5, 2.5, delay=4)(step) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "step, share", ((-5, 0), (4, 0), (6, (1 - sqrt(0.5)) / 2), (8, 0.5), (10, (1 + sqrt(0.5)) / 2), (12, 1), (10**9, 1))
)
def test_cosine(step, share):
    assert schedules.cosine(8, 0.5, 2.5, delay=4)(step) == pytest.approx(0.5 + 2 * share, rel=1e-15)


def test_default_is_from_nothing_to_one():
    assert [schedules.linear(4)(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [schedules.cosine(2)(step) for step in range(4)] == pytest.approx([0, 0.5, 1, 1], rel=1e-15)


@pytest.mark.parametrize("ratio", (Fraction(1, 4), Fraction(1, 2), Fraction(1)))
@pytest.mark.parametrize("shape", schedules.SHAPES)
def test_cyclical_is_the_formula_of_the_paper(shape, ratio):
    """tau = mod(t - 1, ceil(T / M)) / (T / M), and beta = f(tau) up to R, then 1, with t from 1."""
    total, cycles = 40, 4
    schedule = schedules.cyclical(total / cycles, float(ratio), shape=shape)
    for t in range(1, total + 1):
        tau = Fraction((t - 1) % ceil(total / cycles), total // cycles)
        share = min(tau / ratio, Fraction(1))
        expected = float(share) if shape == "linear" else (1 - cos(pi * share)) / 2
        assert schedule(t - 1) == pytest.approx(expected, rel=1e-15, abs=1e-16)


def test_cyclical_is_the_published_code():
    """`frange_cycle_linear` of haofuml/cyclical_annealing for 40 steps, with its defaults of 4 cycles and a ratio of 0.5."""
    published = [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1] * 4
    assert [schedules.cyclical(10)(step) for step in range(40)] == pytest.approx(published, rel=1e-15)


def test_cycles():
    once, forever = schedules.cyclical(6, cycles=2), schedules.cyclical(6)
    assert (
        [once(step) for step in range(12)] == [forever(step) for step in range(12)] == [forever(step) for step in range(12, 24)]
    )
    assert forever(12) == 0
    assert [once(step) for step in range(12, 24)] == [1] * 12
    assert schedules.cyclical(4, 1, cycles=1)(3) == 0.75  # the last before it stays
    assert schedules.cyclical(4, 1, cycles=1)(4) == 1


@pytest.mark.parametrize("of", (schedules.linear, schedules.cosine))
@pytest.mark.parametrize("start, stop", ((0.1, 0.7), (0.7, 0.1), (-1e-3, 25.0)))
def test_monotonic_between_the_exact_ends(of, start, stop):
    steps = 1000
    values = [of(steps, start, stop)(step) for step in range(steps + 1)]
    assert (values[0], values[-1]) == (start, stop)
    sign = 1 if stop > start else -1
    assert all(sign * (b - a) > 0 for a, b in pairwise(values))


@pytest.mark.parametrize(
    "dtype", (torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64), ids=lambda dtype: str(dtype)[6:]
)
def test_tensors_have_the_values_of_floats(schedule, dtype, device):
    steps = torch.arange(60, dtype=dtype, device=device)
    values = schedule(steps)
    assert values.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert values.device == steps.device
    expected = torch.tensor([schedule(step) for step in range(60)], dtype=torch.float64)
    precise = {"rtol": 1e-14, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(values.double().cpu(), expected, **precise)
    one = schedule(steps[20])
    assert one.shape == ()
    assert one == values[20]


def test_late_steps_are_not_rounded(device):
    """A float32 holds no odd number of this size."""
    schedule = schedules.cyclical(1000)
    step = 1000 * 2**30 + 333
    assert schedule(torch.tensor(step, device=device)).item() == pytest.approx(0.666, rel=1e-6)
    assert schedule(step) == pytest.approx(0.666, rel=1e-15)
    assert schedule(torch.tensor(-3, device=device)) == schedule(-3) == 0


def test_nothing_is_read_back(schedule):
    assert schedule(torch.tensor(3, device="meta")).device.type == "meta"


def test_nan_stays(schedule, device):
    assert schedule(nan) != schedule(nan)
    assert schedule(torch.tensor(nan, device=device)).isnan()


def test_pickle_and_equality(schedule):
    other = pickle.loads(pickle.dumps(schedule))
    assert other == schedule
    assert hash(other) == hash(schedule)
    assert [other(step) for step in range(30)] == [schedule(step) for step in range(30)]
    assert sum(schedule == one for one in EACH.values()) == 1


@once
@pytest.mark.parametrize("name", EACH)
def test_compiled_step_compiles_once(name, device):
    """A step in a tensor, counted on in the graph, or beta in a tensor that is written between the steps."""
    torch.compiler.reset()
    schedule = EACH[name]
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    in_graph, between = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")

    def objective(recon_x, x, mu, logvar, beta):
        return fastelbo.loss(recon_x, x, mu, logvar, beta, likelihood="mse").loss

    @torch.compile(fullgraph=True, backend=in_graph)
    def counting(recon_x, x, mu, logvar, step):
        loss = objective(recon_x, x, mu, logvar, schedule(step))
        step.add_(1)
        return loss

    filled = torch.compile(objective, fullgraph=True, backend=between)
    step, beta = torch.tensor(0, device=device), torch.tensor(0.0, device=device)
    for number in range(27):
        expected = objective(recon_x, x, mu, logvar, schedule(number))
        beta.fill_(schedule(number))
        for loss in (counting(recon_x, x, mu, logvar, step), filled(recon_x, x, mu, logvar, beta)):
            torch.testing.assert_close(loss, expected)
            found, wanted = torch.autograd.grad(loss, mu)[0], torch.autograd.grad(expected, mu, retain_graph=True)[0]
            torch.testing.assert_close(found, wanted)
    assert step == 27
    assert in_graph.frame_count == between.frame_count == 1


@once
def test_compiled_integer_step():
    """Which becomes a symbol at the second step. Of a remainder of floats the compiler's own code is wrong."""
    torch.compiler.reset()
    schedule = schedules.cyclical(4)
    scaled = torch.compile(lambda x, step: x * schedule(step))
    for step in range(9):
        assert scaled(torch.ones(3), step).tolist() == pytest.approx([schedule(step)] * 3)


@once
def test_made_in_compiled_code():
    """Of numbers that are constants there, and of symbols."""

    def call(steps, stop, step):
        ramp, cycle = schedules.linear(steps, 0.0, stop, delay=1), schedules.cyclical(period=steps, ratio=0.5, stop=stop)
        return ramp(step) + 10 * cycle(step) + schedules.cosine(10)(step)

    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for steps, stop in ((8, 0.5), (7.5, 2.0)):
            for step in (torch.tensor(3), torch.tensor([0.5, 30.0])):
                torch.testing.assert_close(compiled(steps, stop, step), call(steps, stop, step))


BAD = [
    (lambda: schedules.linear(0), ValueError, "steps must be positive, got 0"),
    (lambda: schedules.linear("10"), TypeError, "steps must be a number, got str"),
    (lambda: schedules.linear(inf), ValueError, "steps must be finite, got inf"),
    (lambda: schedules.cosine(10, start=nan), ValueError, "start must be finite, got nan"),
    (lambda: schedules.cosine(10, stop=torch.tensor(1.0)), TypeError, "stop must be a number, got Tensor"),
    (lambda: schedules.linear(10, delay=-1), ValueError, "delay must not be negative, got -1"),
    (lambda: schedules.cyclical(-3), ValueError, "period must be positive, got -3"),
    (lambda: schedules.cyclical(10, 0), ValueError, "ratio must be positive, got 0"),
    (lambda: schedules.cyclical(10, 1.5), ValueError, "ratio must be at most 1, got 1.5"),
    (lambda: schedules.cyclical(10, cycles=0), ValueError, "cycles must be at least 1, got 0"),
    (lambda: schedules.cyclical(10, cycles=2.0), TypeError, "cycles must be an integer or None, got float"),
    (lambda: schedules.cyclical(10, shape="sigmoid"), ValueError, "shape must be one of 'linear', 'cosine'; got 'sigmoid'"),
    (lambda: schedules.linear(10)("3"), TypeError, "step must be a number or a tensor, got str"),
    (lambda: schedules.linear(10)(torch.tensor(1j)), TypeError, "step must be a tensor of booleans.*, got torch.complex64"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for *_, message in BAD])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
