"""The discretized logistic mixture: its formula against the distribution's definition, and the kernel against the formula."""

import itertools
import math

import pytest
import torch

from conftest import BACKEND
from fastelbo.likelihoods import DiscretizedLogisticMixture
from support import APPROXIMATE, assert_no_worse, relative

LEVELS = 256


def nll(parameters, x, *, levels, dim):
    """Of a target as it comes, integers or numbers."""
    likelihood = DiscretizedLogisticMixture(levels, dim)
    return likelihood.nll([parameters], likelihood.target(parameters, x, parameters.dtype))


def definition(parameters, x, levels):
    """-log p of one pixel, P parameters and C values in Python's floats, from differences of distribution functions."""
    channels = len(x)
    count = len(parameters) // (10 if channels == 3 else 1 + 2 * channels)
    each, half = 3 if channels == 3 else 2, 1 / (levels - 1)
    shares = [math.exp(v - max(parameters[:count])) for v in parameters[:count]]
    total = 0.0
    for k in range(count):

        def of(channel, number, k=k):
            return parameters[count + (each * channel + number) * count + k]

        p = shares[k] / sum(shares)
        for c in range(channels):
            mean, scale = of(c, 0), math.exp(max(of(c, 1), -7.0))
            if channels == 3 and c == 1:
                mean += math.tanh(of(0, 2)) * x[0]
            if channels == 3 and c == 2:
                mean += math.tanh(of(1, 2)) * x[0] + math.tanh(of(2, 2)) * x[1]
            upper = 1.0 if x[c] > 1 - half else 1 / (1 + math.exp(-(x[c] + half - mean) / scale))
            lower = 0.0 if x[c] < half - 1 else 1 / (1 + math.exp(-(x[c] - half - mean) / scale))
            p *= upper - lower
        total += p
    return -math.log(total)


def make(channels, count, dim=1, batch=2, spatial=(3, 5), dtype=torch.float32, device="cpu", log_scale=-3.0):
    """Parameters near their targets, as of a trained decoder, and targets of an integer dtype, some of them at the ends."""
    x = torch.randint(0, LEVELS, (batch, channels, *spatial))
    x.view(-1)[::7] = 0
    x.view(-1)[1::7] = LEVELS - 1
    rest = torch.randn(batch, channels, 3 if channels == 3 else 2, count, *spatial)
    rest[:, :, 0] = 0.2 * rest[:, :, 0] + as_numbers(x).float().unsqueeze(2)
    rest[:, :, 1] = 1.5 * rest[:, :, 1] + log_scale
    parameters = torch.cat((torch.randn(batch, count, *spatial), rest.flatten(1, 3)), 1).to(dtype)
    return parameters.movedim(1, dim).contiguous().to(device), x.movedim(1, dim).contiguous().to(device)


def as_numbers(x, levels=LEVELS):
    return 2 * x.double() / (levels - 1) - 1


def by_formula(parameters, x, weight=1.0, dim=1, levels=LEVELS, per_sample=False):
    """Value, or one a sample, and gradient, in the dtype of the parameters."""
    parameters = parameters.detach().requires_grad_()
    value = nll(parameters, x, levels=levels, dim=dim) * weight
    (gradient,) = torch.autograd.grad(value.sum(), parameters)
    return (value.reshape(len(value), -1).sum(1) if per_sample else value.sum()).detach(), gradient


# The formula.


@pytest.mark.parametrize("channels", (1, 2, 3, 4))
@pytest.mark.parametrize("dim", (1, -1))
def test_formula_is_the_definition(dim, channels):
    parameters, x = make(channels, 3, dim, dtype=torch.float64, log_scale=-1.0)  # wide enough for differences to have digits
    got = nll(parameters, as_numbers(x), levels=LEVELS, dim=dim)
    assert got.shape == (2, 3, 5)
    assert relative(nll(parameters, x, levels=LEVELS, dim=dim), got) < 1e-12
    pixels = (t.movedim(dim, -1).reshape(30, -1).tolist() for t in (parameters, as_numbers(x)))
    expected = [definition(p, values, LEVELS) for p, values in zip(*pixels, strict=True)]
    assert relative(got.flatten(), torch.tensor(expected, dtype=torch.float64)) < 1e-9


@pytest.mark.parametrize("channels, levels", ((1, 256), (1, 2), (1, 3), (3, 4), (2, 16)))
def test_probabilities_add_up_to_one(channels, levels):
    x = torch.tensor(list(itertools.product(range(levels), repeat=channels)))
    parameters = torch.randn(1, 40 if channels == 3 else 4 * (1 + 2 * channels), dtype=torch.float64).repeat(len(x), 1)
    assert nll(parameters, x, levels=levels, dim=1).neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("channels", (1, 3))
def test_formula_can_be_differentiated_twice(channels):
    parameters, x = make(channels, 2, spatial=(3,), dtype=torch.float64)
    parameters[0, -1] = 40.0  # a scale or coefficient far out
    parameters.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: nll(p, x, levels=LEVELS, dim=1), parameters)
    assert torch.autograd.gradgradcheck(lambda p: nll(p, x, levels=LEVELS, dim=1), parameters)
    number = as_numbers(x)[:, :, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: nll(parameters.detach()[:, :, :1], v, levels=LEVELS, dim=1), number)


def one_bin(log_scale, mean, level):
    """Parameters of one component of one channel."""
    return torch.tensor([[0.3, mean, log_scale]], dtype=torch.float64), torch.tensor([[level]])


# Where the difference of two sigmoids is 0 or 1, or is lost: log scale, mean, level, and -log p to be known otherwise.
def far(log_scale, mean, level):
    """Many scales from the mean P is the density's tail: exp(-d) (1 - exp(-width)), d of the nearer end."""
    inverse, half = math.exp(-log_scale), 1 / 255
    d = (abs(2 * level / 255 - 1 - mean) - half) * inverse
    if level in (0, 255):
        return d
    return d - math.log(-math.expm1(-2 * half * inverse))


EXTREMES = (
    (-7.0, 1.0, 100, far(-7.0, 1.0, 100)),
    (-7.0, -1.0, 200, far(-7.0, -1.0, 200)),
    (-20.0, 1.0, 100, far(-7.0, 1.0, 100)),
    (-3.0, 40.0, 3, far(-3.0, 40.0, 3)),
    (-7.0, 1.0, 0, far(-7.0, 1.0, 0)),
    (-7.0, -1.0, 255, far(-7.0, -1.0, 255)),
    (100.0, 0.5, 7, 100.0 + math.log(4 * 255 / 2)),
    (7.0, 0.5, 7, 7.0 + math.log(4 * 255 / 2) + ((14 / 255 - 1.5) / 2 * math.exp(-7.0)) ** 2),
    (100.0, 0.5, 0, math.log(2)),
    (-7.0, 2.0, 255, math.exp(-(1 + 1 / 255) * math.exp(7.0))),
    (-7.0, 0.0, 255, (1 - 1 / 255) * math.exp(7.0)),
    # The bin in whose middle the mean is.
    (-7.0, 2 * 77 / 255 - 1, 77, -math.log(math.tanh(math.exp(7.0) / 510))),
)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("log_scale, mean, level, expected", EXTREMES)
def test_formula_far_out(log_scale, mean, level, expected, dtype):
    parameters, x = one_bin(log_scale, mean, level)
    value, gradient = by_formula(parameters.to(dtype), x)
    # In float32 the mean is rounded, and then multiplied by up to exp(7).
    assert value.item() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 2e-4, abs=1e-30)
    assert gradient.isfinite().all()


# The kernel.

if BACKEND == "triton":
    from fastelbo.kernels import Mixture, mixture, positions

kernel = pytest.mark.skipif(BACKEND != "triton", reason="the Torch backend has the formula")


@pytest.fixture(params=("one block", "blocks"))
def blocks(request, monkeypatch):
    """Tiles as usual, or of few positions, and so several."""
    if request.param == "blocks":
        monkeypatch.setattr(mixture, "tile_shape", lambda components, *args: (4, 2 ** (components - 1).bit_length()))


def options(parameters, x, dim=1, per_sample=False, levels=LEVELS):
    return {
        "per_sample": per_sample, "dtype": torch.float64 if parameters.dtype == torch.float64 else torch.float32,
        "device": parameters.device,
        "levels": levels, "inner": math.prod(x.shape[2:]) if dim == 1 else 1, "channels": x.shape[dim],
    }  # fmt: skip


def forward(parameters, x, weight=None, divisor=1.0, guess=1.0, **kwargs):
    """Value, and gradient with the factor `guess`, a number for each row."""
    opts = options(parameters, x, **kwargs)
    guess = torch.as_tensor(guess, dtype=opts["dtype"], device=x.device)
    guess = guess.expand(len(x) if opts["per_sample"] else 1).contiguous()
    return Mixture(**opts).forward(parameters, x, weight, divisor, guess)


@kernel
@pytest.mark.parametrize("integer", (True, False), ids=("levels", "numbers"))
@pytest.mark.parametrize("channels, count", ((1, 1), (1, 10), (3, 1), (3, 5), (3, 16), (2, 3), (4, 2)))
@pytest.mark.parametrize("dim", (1, -1))
def test_float64(dim, channels, count, integer, blocks, device):
    parameters, x = make(channels, count, dim, dtype=torch.float64, device=device)
    x = x if integer else as_numbers(x)
    for got, expected in zip(forward(parameters, x, dim=dim), by_formula(parameters, x, dim=dim), strict=True):
        assert got.dtype == torch.float64
        assert got.shape == expected.shape
        assert relative(got, expected) < 1e-12


@kernel
@pytest.mark.parametrize("integer", (True, False), ids=("levels", "numbers"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("channels, count, dim", ((1, 10, 1), (3, 10, 1), (3, 5, -1), (4, 2, -1)))
def test_error_is_no_larger_than_the_formulas(channels, count, dim, dtype, integer, device):
    parameters, x = make(channels, count, dim, spatial=(8, 8), dtype=dtype, device=device)
    x = x.to(torch.uint8) if integer else as_numbers(x).float()
    exact = parameters.double(), as_numbers(x) if integer else x.double()
    truth, slope = by_formula(*exact, dim=dim)
    value, gradient = forward(parameters, x, dim=dim)
    naive, naive_gradient = by_formula(parameters.float(), x, dim=dim)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    assert_no_worse(value, naive, truth, truth, "value")
    # By kind of parameter: gradients by means are a thousand times those by logits. And a component's share is as uncertain as
    # the logarithms that it is made of are large.
    sizes = slope.movedim(dim, 1).abs().amax((0, 2, 3)).view([-1 if d == dim % 4 else 1 for d in range(4)])
    terms = sizes * (1 + nll(*exact, levels=LEVELS, dim=dim)).unsqueeze(dim)
    # By a mean: three exponentials and the quotients of a bin, of its share and of the scale.
    assert_no_worse(gradient, naive_gradient.to(dtype), slope, terms, "gradient", approximations=6)


@kernel
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("log_scale, mean, level, expected", EXTREMES)
def test_far_out(log_scale, mean, level, expected, dtype, device):
    parameters, x = one_bin(log_scale, mean, level)
    value, gradient = forward(parameters.to(device, dtype), x.to(device))
    assert value.item() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 2e-4, abs=1e-30)
    # A product that is fused with a sum sees that the mean, as the dtype has it, lies 1e-8 beside a level.
    slopes = [by_formula(p, x)[1] for p in (parameters, parameters.to(dtype).double())]
    error, size = min((gradient.cpu() - s).abs().max() for s in slopes), slopes[0].abs().max().clamp_min(1e-15)
    # The one component's logit has a gradient of 1 - 1, each of them an exponential over itself.
    assert error < (1e-9 * size if dtype == torch.float64 else 2e-4 * size + APPROXIMATE)


@kernel
@pytest.mark.parametrize("integer", (True, False), ids=("levels", "numbers"))
@pytest.mark.parametrize("log_scale", (-7.0, -5.0, -2.0, 0.0, 3.0, 7.0))
def test_levels_of_all_kinds(log_scale, integer, device):
    """A confident bin's small loss, too: of relative error, with the mean on a number that float32 has."""
    x = torch.tensor([0, 1, 2, 64, 158, 159, 160, 253, 254, 255], device=device).view(-1, 1)
    parameters = torch.tensor([[0.0, 0.25, log_scale]], device=device).repeat(len(x), 1)
    opts = {"per_sample": True}
    value, gradient = forward(parameters, x.to(torch.uint8) if integer else as_numbers(x), **opts)
    truth, slope = by_formula(parameters.double(), as_numbers(x), **opts)
    # The distance is rounded relative to itself if products are fused with sums, and else to what is a rounding of 1.
    assert ((value.double() / truth - 1).abs() < (1e-6 + 3e-7 * math.exp(-log_scale))).all()
    assert relative(gradient, slope) < 1e-6 + 3e-7 * math.exp(-log_scale)


@kernel
@pytest.mark.parametrize("levels", (16, 24, 64, 128))
def test_a_confident_bin_keeps_its_digits(levels, device):
    """P is next to 1: of a bin in whose middle the mean is, P = tanh(half its width, in scales, over 2)."""
    parameters = torch.tensor([[0.0, 0.25, -7.0]], device=device)
    value, _ = forward(parameters, torch.tensor([[0.25]], device=device), levels=levels)
    e = math.exp(-math.exp(7.0) / (levels - 1))
    assert value.item() == pytest.approx(math.log1p(e) - math.log1p(-e), rel=1e-5, abs=0)


@kernel
def test_log_scales_are_clamped_as_torch_clamps(device):
    parameters, x = make(3, 2, device=device)
    for i, value in enumerate((-7.0, -7.5, -1e30, -math.inf)):
        parameters[:, 4 + 6 * (i % 3), :, i] = value
    truth, slope = by_formula(parameters.double(), as_numbers(x))
    value, gradient = forward(parameters, x)
    assert relative(value, truth) < 1e-4
    assert relative(gradient, slope) < 1e-4
    assert ((gradient == 0) | (parameters != -7.5)).all()
    assert (gradient[parameters == -7.0] != 0).any()


@kernel
@pytest.mark.parametrize("number", (math.nan, math.inf))
@pytest.mark.parametrize("channels", (1, 3, 2))
def test_no_finite_lies(channels, number, device):
    """NaN in any parameter, or in the target, makes its own sample NaN and no other; so does an infinite logit."""
    parameters, x = make(channels, 2, batch=3, spatial=(4,), device=device)
    x = as_numbers(x).float()
    for i in range(parameters.shape[1] if number != number else 2):
        bad = parameters.clone()
        bad[1, i, 2] = number
        value, gradient = forward(bad, x, per_sample=True)
        assert value.isnan().tolist() == [False, True, False], i
        assert gradient[1, :, 2].isnan().any()
        assert gradient[::2].isfinite().all()
    if number != number:
        for c in range(channels):
            bad = x.clone()
            bad[1, c, 2] = number
            assert forward(parameters, bad, per_sample=True)[0].isnan().tolist() == [False, True, False]


@kernel
def test_a_component_that_is_masked_counts_nothing(device):
    parameters, x = make(3, 3, device=device)
    parameters[:, 1] = -math.inf
    value, gradient = forward(parameters, x)
    kept = [i for i in range(30) if i % 3 != 1]
    truth, slope = by_formula(parameters[:, kept].double(), as_numbers(x))
    assert relative(value, truth) < 1e-6
    assert relative(gradient[:, kept], slope) < 2e-6
    assert not gradient[:, 1::3].any()


@kernel
@pytest.mark.parametrize(
    "channels, dim, dtype",
    (
        (3, 1, torch.float32), (3, 1, torch.bfloat16), (3, 1, torch.bool), (3, 1, torch.uint8), (3, -1, torch.float32),
        (2, 1, torch.bool),
    ),
)  # fmt: skip
def test_weights(channels, dim, dtype, blocks, device):
    parameters, x = make(channels, 2, dim, batch=3, device=device)
    weight = torch.randint(0, 3, (3, 3, 5), device=device).to(dtype)
    clean = parameters.double()
    parameters.movedim(dim, -1)[weight == 0] = math.nan
    truth, slope = by_formula(clean, as_numbers(x), weight.double(), dim, per_sample=True)
    value, gradient = forward(parameters, x, weight, dim=dim, per_sample=True)
    assert relative(value, truth) < 1e-6
    assert relative(gradient, slope) < 1e-5
    assert not gradient.movedim(dim, -1)[weight == 0].any()


@kernel
@pytest.mark.parametrize(
    "levels, dtype", ((2, torch.bool), (256, torch.uint8), (65536, torch.int32), (32, torch.int8)), ids=str
)
def test_levels_and_dtypes(levels, dtype, device):
    parameters = torch.randn(3, 30, 7, device=device)
    x = torch.randint(0, levels, (3, 3, 7), device=device)
    truth, slope = by_formula(parameters.double(), as_numbers(x, levels), levels=levels)
    value, gradient = forward(parameters, x.to(dtype), levels=levels)
    assert relative(value, truth) < 1e-6
    assert relative(gradient, slope) < 5e-6


@kernel
@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("dim", (1, -1))
def test_divisor_and_samples(dim, per_sample, blocks, device):
    parameters, x = make(3, 2, dim, batch=3, device=device)
    truth, slope = by_formula(parameters.double(), as_numbers(x), dim=dim, per_sample=per_sample)
    guess = torch.tensor([1.0, 2.0, -3.0] if per_sample else [2.0], device=device)
    for divisor in (45.0, torch.tensor(45.0 if dim == 1 else 45, device=device)):
        value, gradient = forward(parameters, x, divisor=divisor, guess=guess, dim=dim, per_sample=per_sample)
        assert value.shape == truth.shape
        assert relative(value, truth / 45) < 1e-6
        assert relative(gradient, slope * guess.view(-1, 1, 1, 1) / 45) < 1e-5
    value, gradient = Mixture(**options(parameters, x, dim, per_sample)).forward(parameters, x, None, 1.0, None)
    assert gradient is None
    assert relative(value, truth) < 1e-6


@kernel
@pytest.mark.parametrize("channels", (3, 2))
@pytest.mark.parametrize("per_sample", (False, True))
def test_a_wrong_guess_is_corrected(per_sample, channels, blocks, device):
    parameters, x = make(channels, 2, batch=4, device=device)
    opts = options(parameters, x, per_sample=per_sample)
    _, slope = by_formula(parameters.double(), as_numbers(x))
    used = torch.tensor([1.0, 2.0, 3.0, math.nan] if per_sample else [2.0], device=device)
    _, stored = forward(parameters, x, divisor=5.0, guess=used, per_sample=per_sample)
    upstream = torch.tensor([1.0, 7.0, 3.0, math.nan], device=device) if per_sample else torch.tensor(7.0, device=device)
    launches = Mixture(**opts)
    gradient, seen = launches.backward(parameters, x, None, 5.0, upstream, stored, used)
    assert gradient is stored
    expected = slope * upstream.view(-1, 1, 1, 1) / 5
    assert relative(gradient[:3], expected[:3]) < 1e-5
    assert gradient[3].isnan().all() == per_sample
    assert torch.equal(seen.nan_to_num(9.0), upstream.reshape(-1).nan_to_num(9.0))
    assert seen.data_ptr() != upstream.data_ptr()
    # Where the factor is right, nothing is computed; by zeros in place of the parameters it would be something else.
    other = torch.zeros_like(parameters)
    again, _ = launches.backward(other, x, None, 5.0, upstream, gradient.clone(), seen)
    assert torch.equal(again[:3], gradient[:3])
    anew, _ = launches.backward(parameters, x, None, 5.0, upstream, None, None)
    assert relative(anew[:3], expected[:3]) < 1e-5


@kernel
@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("shape", ((0, 5), (3, 0)), ids=str)
def test_empty(shape, per_sample, device):
    batch, size = shape
    parameters, x = torch.empty(batch, 20, size, device=device), torch.zeros(batch, 3, size, device=device)
    value, gradient = forward(parameters, x, per_sample=per_sample)
    assert value.tolist() == ([0.0] * batch if per_sample else 0.0)
    assert gradient.shape == parameters.shape
    upstream = torch.full(value.shape, 3.0, device=device)
    launches = Mixture(**options(parameters, x, 1, per_sample))
    _, seen = launches.backward(parameters, x, None, 1.0, upstream, gradient, None)
    assert seen.tolist() == [3.0] * (batch if per_sample else 1)


@kernel
@pytest.mark.parametrize("channels, dim", ((3, 1), (3, -1), (2, 1)))
def test_wide_offsets(channels, dim, blocks, device, monkeypatch):
    """As tensors of more than 2^31 elements need them."""
    launch = positions.Launch
    monkeypatch.setattr(positions, "Launch", lambda k, device, constants, o: launch(k, device, constants | {"WIDE": True}, o))
    parameters, x = make(channels, 3, dim, device=device)
    for got, expected in zip(
        forward(parameters, x, dim=dim), by_formula(parameters.double(), as_numbers(x), dim=dim), strict=True
    ):
        assert relative(got, expected) < 1e-5
