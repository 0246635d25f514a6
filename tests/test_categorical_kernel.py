"""The cross-entropy kernel against float64: values, gradients, and what is excluded."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import BACKEND
from support import assert_no_worse, relative

if BACKEND != "triton":
    pytest.skip("the Torch backend has a formula instead", allow_module_level=True)

from fastelbo.kernels import Categorical, categorical, positions

IGNORED = -100
# Shape and dimension of the classes: both layouts; fewer and more classes than a tile has; one; next to a power of 2; so few
# positions together that a tile spans them all; aligned and not.
SHAPES = (
    ((5, 10), 1), ((33, 2), 1), ((3, 1), 1), ((2, 1, 3), 1), ((2, 7, 5), 1), ((4, 6, 11), -1), ((2, 257, 3, 7), 1),
    ((2, 16, 48), 1), ((2, 5000), 1), ((3, 64), 1),
)  # fmt: skip


@pytest.fixture(params=("one tile", "tiles"))
def tiles(request, monkeypatch):
    """All classes in one tile if they fit, as usual; or tiles of 4 positions and 16 classes, and so several of both."""
    if request.param == "tiles":
        monkeypatch.setattr(categorical, "tile_shape", lambda *args: (4, 16))


def options(logits, dim=1, per_sample=False, ignore_index=IGNORED, target_scale=1.0):
    dim %= logits.dim()
    return {
        "per_sample": per_sample, "dtype": torch.float64 if logits.dtype == torch.float64 else torch.float32,
        "device": logits.device, "classes": logits.shape[dim], "inner": math.prod(logits.shape[dim + 1 :]),
        "ignore_index": ignore_index, "target_scale": target_scale,
    }  # fmt: skip


def forward(logits, x, weight=None, divisor=1.0, guess=1.0, **kwargs):
    """Value, and gradient with the factor `guess`, a number for each row."""
    opts = options(logits, **kwargs)
    rows = len(logits) if opts["per_sample"] else 1
    guess = torch.as_tensor(guess, dtype=opts["dtype"], device=logits.device).expand(rows).contiguous()
    return Categorical(**opts).forward(logits, x, weight, divisor, guess)


def by_torch(logits, x, dim=1, per_sample=False):
    """Value, or one a sample, and gradient, by Torch in the dtype of `logits`."""
    logits = logits.detach().requires_grad_()
    by_class = logits.movedim(dim, 1)
    if x.dim() == logits.dim():
        nll = -(F.log_softmax(by_class, 1) * x.movedim(dim, 1)).sum(1)
    else:
        nll = F.cross_entropy(by_class, x.long(), ignore_index=IGNORED, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    return (nll.flatten(1).sum(1) if nll.dim() > 1 else nll) if per_sample else nll.sum(), gradient


def make(shape, dim, dense, device, dtype=torch.float32, spread=3.0):
    logits = (spread * torch.randn(shape)).to(device, dtype)
    if dense:
        return logits, (torch.rand(shape) * (torch.rand(shape) < 0.5)).to(device, dtype)
    labels = torch.randint(0, shape[dim], shape[:dim] + shape[dim % len(shape) + 1 :])
    return logits, labels.to(device)


def magnitudes(logits, x, dim):
    """What is added up in the gradient; a probability is as uncertain as the logit, less the largest, is large."""
    p = torch.softmax(logits.double(), dim) * (1 + logits.double().amax(dim, keepdim=True) - logits.double())
    t = x.double() if x.dim() == p.dim() else F.one_hot(x.long(), p.shape[dim]).movedim(-1, dim).double()
    return p * t.sum(dim, keepdim=True) + t


@pytest.mark.parametrize("dense", (False, True), ids=("labels", "targets"))
@pytest.mark.parametrize("shape, dim", SHAPES, ids=str)
def test_float64(shape, dim, dense, tiles, device):
    logits, x = make(shape, dim, dense, device, torch.float64)
    for got, expected in zip(forward(logits, x, dim=dim), by_torch(logits, x, dim), strict=True):
        assert got.dtype == torch.float64
        assert got.shape == expected.shape
        assert relative(got, expected) < 1e-13


@pytest.mark.parametrize("spread", (3.0, 30.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dense", (False, True), ids=("labels", "targets"))
@pytest.mark.parametrize("shape, dim", SHAPES[-5:], ids=str)
def test_error_is_no_larger_than_torchs(shape, dim, dense, dtype, spread, device):
    logits, x = make(shape, dim, dense, device, dtype, spread)
    truth, slope = by_torch(logits.double(), x.double() if dense else x, dim)
    value, gradient = forward(logits, x, dim=dim)
    naive, naive_gradient = by_torch(logits, x, dim)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    assert_no_worse(value, naive.float(), truth.detach(), truth.detach(), "value")
    terms = magnitudes(logits, x, dim).clamp_min(1e-27)  # times eps: next to what underflows
    assert_no_worse(gradient, naive_gradient, slope, terms, "gradient")


@pytest.mark.parametrize("dense", (False, True), ids=("labels", "targets"))
@pytest.mark.parametrize("gap", (0.0, 5.0, 17.0, 30.0, 80.0))
def test_a_confident_distribution_keeps_its_digits(gap, dense, tiles, device):
    """Where Torch's own loss is 0 in float32 because exp(-gap) is below a rounding of 1, and its gradient too."""
    logits = torch.rand(6, 40).sub(gap)
    labels = torch.tensor([0, 3, 15, 16, 39, 20])
    logits[torch.arange(6), labels] = 1.0
    others = torch.exp(logits.double() - 1.0)
    others[torch.arange(6), labels] = 0
    r = others.sum(1)
    slope = others / (1 + r)[:, None]
    slope[torch.arange(6), labels] = -r / (1 + r)
    x = F.one_hot(labels, 40) if dense else labels
    value, gradient = forward(logits.to(device), x.to(device), per_sample=True)
    assert ((value.cpu() / torch.log1p(r) - 1).abs() < 2e-6).all()
    assert ((gradient.cpu() / slope - 1).abs() < 2e-6).all()


@pytest.mark.parametrize("dense", (False, True), ids=("labels", "targets"))
@pytest.mark.parametrize("scale", (50.0, 1e4, 1e30))
def test_large_logits(scale, dense, tiles, device):
    logits = torch.tensor([[0.0, 1.0, -1.0, 1.0], [1.0, -1.0, 0.5, 0.0]]).repeat(1, 10).mul(scale)
    labels = torch.tensor([2, 0])
    x = F.one_hot(labels, 40) if dense else labels
    truth = by_torch(logits.double(), x)
    for got, expected in zip(forward(logits.to(device), x.to(device)), truth, strict=True):
        assert relative(got.cpu(), expected) < 1e-6


@pytest.mark.parametrize("dense", (False, True), ids=("labels", "targets"))
@pytest.mark.parametrize("mask", (-math.inf, torch.finfo(torch.float32).min))
@pytest.mark.parametrize("dim", (1, 2))
def test_masked_classes_count_nothing(dim, mask, dense, tiles, device):
    """As if they were not there, a whole tile of them first."""
    logits, x = make((2, 60, 30) if dim == 1 else (2, 30, 60), dim, dense, device)
    masked = torch.arange(60, device=device) < 33
    masked[40:45] = True
    there = torch.nonzero(~masked)[:, 0]
    logits.index_fill_(dim, torch.nonzero(masked)[:, 0], mask)
    if dense:
        x.index_fill_(dim, torch.nonzero(masked)[:, 0], 0.0)
        kept = x.double().index_select(dim, there)
    else:
        x = x % len(there)
        kept, x = x, there[x]
    truth, slope = by_torch(logits.double().index_select(dim, there), kept, dim)
    value, gradient = forward(logits, x, dim=dim)
    assert relative(value, truth) < 1e-6
    assert relative(gradient.index_select(dim, there), slope) < 1e-6
    assert not gradient.index_select(dim, torch.nonzero(masked)[:, 0]).any()


@pytest.mark.parametrize("dense", (False, True), ids=("labels", "targets"))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf, "all"))
@pytest.mark.parametrize("shape", ((3, 20), (3, 20, 1, 2)), ids=str)
def test_no_finite_lies(shape, bad, dense, tiles, device):
    """In its own sample, and nowhere else."""
    logits, x = make(shape, 1, dense, device)
    at = (1, 7) + (0,) * (len(shape) - 2)
    if dense:
        x[at] = 1.0
    else:
        x[at[:1] + at[2:]] = 7
    if bad == "all":
        logits[1] = -math.inf
    else:
        logits[at] = bad
    value, gradient = forward(logits, x, per_sample=True)
    truth, slope = by_torch(logits.double(), x, per_sample=True)
    assert value.isfinite().tolist() == [True, False, True]
    assert value[1].isinf() == truth[1].isinf()
    assert (gradient.isnan() == slope.isnan()).all()
    finite = slope.isfinite()
    assert relative(gradient[finite], slope[finite]) < 1e-6
    assert relative(value[::2], truth[::2]) < 1e-6


@pytest.mark.parametrize("dim", (1, 2))
def test_ignored_labels(dim, tiles, device):
    logits, x = make((3, 30, 30), dim, False, device)
    x[torch.rand(x.shape, device=device) < 0.5] = IGNORED
    logits.movedim(dim, 2)[x == IGNORED] = math.nan
    clean = torch.where(logits.isnan(), 0.0, logits.double())
    for got, expected in zip(forward(logits, x, dim=dim), by_torch(clean, x, dim), strict=True):
        assert relative(got, expected) < 1e-6
    value, gradient = forward(logits, torch.full_like(x, IGNORED), dim=dim)
    assert value == 0
    assert not gradient.any()


def test_a_label_that_may_be_ignored_is_first_of_all_a_number(device):
    """`ignore_index` may be a class, and need not fit in the dtype of the labels."""
    logits, x = make((9, 10), 1, False, device)
    truth = F.cross_entropy(logits.double(), x, ignore_index=int(x[0]), reduction="sum")
    assert relative(forward(logits, x.to(torch.uint8), ignore_index=int(x[0]))[0], truth) < 1e-6
    assert relative(forward(logits, x.to(torch.uint8), ignore_index=-100)[0], by_torch(logits.double(), x)[0]) < 1e-6


@pytest.mark.parametrize("label", (-1, 10, 2**32, 2**32 + 3, -(2**40), 2**62))
@pytest.mark.parametrize("shape", ((3, 10), (3, 10, 1, 2)), ids=str)
def test_labels_that_are_no_class_make_nan(shape, label, tiles, device):
    logits, x = make(shape, 1, False, device)
    truth, slope = by_torch(logits.double(), x, per_sample=True)
    x[1] = label
    value, gradient = forward(logits, x, per_sample=True)
    assert value.isnan().tolist() == [False, True, False]
    assert relative(value[::2], truth[::2]) < 1e-6
    assert gradient[1].isnan().all()
    assert relative(gradient[::2], slope[::2]) < 1e-6


@pytest.mark.parametrize(
    "dim, dense, dtype",
    (
        *((1, False, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.uint8)),
        (2, False, torch.float32), (1, True, torch.bool), (2, True, torch.float32),
    ),
)  # fmt: skip
def test_weights(dim, dense, dtype, tiles, device):
    logits, x = make((3, 30, 30), dim, dense, device)
    weight = torch.randint(0, 3, (3, 30), device=device).to(dtype)
    if not dense:
        x[weight == 0] = 77  # no class
    logits.movedim(dim, 2)[weight == 0] = math.nan
    clean = torch.where(logits.isnan(), 0.0, logits.double()).requires_grad_()
    if dense:
        nll = -(F.log_softmax(clean, dim) * x.double()).sum(dim)
    else:
        nll = F.cross_entropy(clean.movedim(dim, 1), torch.where(weight == 0, 0, x), reduction="none")
    truth = (nll * weight.double()).sum(1)
    (slope,) = torch.autograd.grad(truth.sum(), clean)
    value, gradient = forward(logits, x, weight, dim=dim, per_sample=True)
    assert relative(value, truth) < 1e-6
    assert relative(gradient, slope) < 1e-6
    assert not gradient.movedim(dim, 2)[weight == 0].any()


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool), ids=str)
def test_dtypes_of_labels(dtype, device):
    classes = 2 if dtype == torch.bool else 100
    logits, x = make((20, classes, 3), 1, False, device)
    truth, slope = by_torch(logits.double(), x)
    value, gradient = forward(logits, x.to(dtype))
    assert relative(value, truth) < 1e-6
    assert relative(gradient, slope) < 1e-6


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int64, torch.bool, torch.bfloat16, torch.float64), ids=str)
def test_dtypes_and_scale_of_targets(dtype, device):
    logits = torch.randn(20, 100, device=device)
    x = torch.randint(0, 2 if dtype == torch.bool else 5, logits.shape, device=device).to(dtype)
    truth, slope = by_torch(logits.double(), x.double() * 0.3)
    value, gradient = forward(logits, x, target_scale=0.3)
    assert relative(value, truth) < 1e-6
    assert relative(gradient, slope) < 1e-6


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("shape, dim", (((3, 20, 7), 1), ((3, 7, 20), 2)), ids=str)
def test_divisor_and_samples(shape, dim, per_sample, tiles, device):
    logits, x = make(shape, dim, False, device)
    truth, slope = by_torch(logits.double(), x, dim, per_sample)
    guess = torch.tensor([1.0, 2.0, -3.0], device=device) if per_sample else torch.tensor([2.0], device=device)
    for divisor in (21.0, torch.tensor(21.0, device=device), torch.tensor(21, device=device)):
        value, gradient = forward(logits, x, divisor=divisor, guess=guess, dim=dim, per_sample=per_sample)
        assert value.shape == truth.shape
        assert relative(value, truth / 21) < 1e-6
        assert relative(gradient, slope * guess.view(-1, 1, 1) / 21) < 1e-6
    for divisor in (0.0, torch.tensor(0.0, device=device)):  # a mean of nothing
        value, _ = forward(logits, torch.full_like(x, IGNORED), divisor=divisor, dim=dim, per_sample=per_sample)
        assert value.isnan().all()


def test_no_gradient_without_a_guess(tiles, device):
    logits, x = make((3, 20), 1, False, device)
    value, gradient = Categorical(**options(logits)).forward(logits, x, None, 1.0, None)
    assert gradient is None
    assert relative(value, by_torch(logits.double(), x)[0]) < 1e-6


@pytest.mark.parametrize("dense", (False, True), ids=("labels", "targets"))
@pytest.mark.parametrize("per_sample", (False, True))
def test_a_wrong_guess_is_corrected(per_sample, dense, tiles, device):
    logits, x = make((4, 20, 3), 1, dense, device)
    opts = options(logits, per_sample=per_sample)
    _, slope = by_torch(logits.double(), x)
    used = torch.tensor([1.0, 2.0, 3.0, math.nan] if per_sample else [2.0], device=device)
    _, stored = forward(logits, x, divisor=5.0, guess=used, per_sample=per_sample)
    upstream = torch.tensor([1.0, 7.0, 3.0, math.nan], device=device) if per_sample else torch.tensor(7.0, device=device)
    other = torch.zeros_like(logits)  # in place of the logits, where they should not be looked at
    launches = Categorical(**opts)
    gradient, seen = launches.backward(logits, x, None, 5.0, upstream, stored, used)
    assert gradient is stored
    expected = slope * upstream.view(-1, 1, 1) / 5
    assert relative(gradient[:3], expected[:3]) < 1e-6
    assert gradient[3].isnan().all() == per_sample
    assert seen.shape == used.shape
    assert torch.equal(seen.nan_to_num(9.0), upstream.reshape(-1).nan_to_num(9.0))
    assert seen.data_ptr() != upstream.data_ptr()
    # Where the factor is right, nothing is computed; by a zero in place of the logits it would be something else.
    again, _ = launches.backward(other, x, None, 5.0, upstream, gradient.clone(), seen)
    assert torch.equal(again[:3], gradient[:3])
    anew, _ = launches.backward(logits, x, None, 5.0, upstream, None, None)
    assert relative(anew[:3], expected[:3]) < 1e-6


def test_float16_under_a_loss_scale(device):
    """Unscaled or in the wrong order, the gradient of a mean would underflow."""
    logits, x = make((64, 1000), 1, False, device, torch.float16)
    _, slope = by_torch(logits.double(), x)
    _, gradient = forward(logits, x, divisor=1e6, guess=65536.0)
    assert relative(gradient, slope * 65536 / 1e6) < 1e-3


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("shape", ((0, 5), (0, 5, 3), (3, 5, 0)), ids=str)
def test_empty(shape, per_sample, device):
    logits, x = torch.empty(shape, device=device), torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    value, gradient = forward(logits, x, per_sample=per_sample)
    assert value.tolist() == ([0.0] * shape[0] if per_sample else 0.0)
    assert gradient.shape == shape
    upstream = torch.full(value.shape, 3.0, device=device)
    launches = Categorical(**options(logits, per_sample=per_sample))
    _, seen = launches.backward(logits, x, None, 1.0, upstream, gradient, None)
    assert seen.tolist() == [3.0] * (shape[0] if per_sample else 1)


@pytest.mark.parametrize("dense", (False, True), ids=("labels", "targets"))
@pytest.mark.parametrize("shape, dim", SHAPES[4:7], ids=str)
def test_wide_offsets(shape, dim, dense, tiles, device, monkeypatch):
    """As tensors of more than 2^31 elements need them."""
    launch = positions.Launch
    monkeypatch.setattr(positions, "Launch", lambda k, device, constants, o: launch(k, device, constants | {"WIDE": True}, o))
    logits, x = make(shape, dim, dense, device)
    for got, expected in zip(forward(logits, x, dim=dim), by_torch(logits.double(), x, dim), strict=True):
        assert relative(got, expected) < 1e-6


def test_sums_of_many_equal_terms(device):
    """Each would be rounded the same way in float32."""
    logits, x = torch.full((2**16, 2), 0.1, device=device), torch.zeros(2**16, dtype=torch.int64, device=device)
    assert relative(forward(logits, x)[0], torch.tensor(2**16 * math.log(2.0), dtype=torch.float64)) < 1e-7


def test_programs_keep_what_they_read_again_in_cache(monkeypatch):
    monkeypatch.setattr(positions, "_multiprocessors_and_cache", lambda device: (132, 50 * 2**20))
    programs = positions.programs_of
    assert programs(100_000, 1, None, 0) == 2084  # of 2112, so that each has as many blocks, 48, but the last
    assert programs(512, 1, None, 160_000) == 256  # of 264, two on each multiprocessor; 2 blocks each
    assert programs(10_000, 1, None, 32_000) == 770  # of 819, whose blocks are 25 MB of 50; 13 blocks each
    assert programs(10, 512, None, 0) == 4
    assert programs(1, 5000, None, 160_000) == 1
