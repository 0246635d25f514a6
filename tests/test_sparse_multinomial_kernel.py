"""The kernel of a multinomial in CSR against float64, and next to that of the dense target, whose digits it has."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastelbo
from conftest import BACKEND, DEVICE
from fastelbo import IWAE
from support import assert_no_worse, gradgradcheck, gradients, relative

if BACKEND != "triton":
    pytest.skip("the Torch backend has a formula instead", allow_module_level=True)

from fastelbo.engine import backend
from fastelbo.kernels import Categorical, SparseMultinomial, direct, sparse_multinomial
from fastelbo.likelihoods import Multinomial

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR tensor support is in beta|invariant checks)")

# Of one item; of whole tiles and not, aligned and not; of more rows than there are programs.
SHAPES = (3, 1), (2, 2), (3, 16), (4, 33), (40, 7), (2, 200)


@pytest.fixture(params=("one tile", "tiles"))
def tiles(request, monkeypatch):
    """A row in one tile if it fits, as usual; or tiles of 16 items, and 4 nonzeros at a time."""
    if request.param == "tiles":
        monkeypatch.setattr(sparse_multinomial, "tile_shape", lambda *args: (1, 16))
        monkeypatch.setattr(sparse_multinomial, "BLOCK", 4)


def counts(shape, dtype=torch.float32) -> Tensor:
    """With a row of nothing but zeros, and one without any."""
    x = torch.poisson(3 * torch.rand(shape)) * (torch.rand(shape) < 0.3)
    x[0] = torch.arange(1, shape[1] + 1) % 5
    x[1] = 0
    return x.to(DEVICE, dtype)


def csr(x: Tensor, index=torch.int64) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows start, columns in no order, and values, of which some are 0."""
    kept = (x != 0) | (torch.rand(x.shape, device=x.device) < 0.1)
    kept[1] = False
    columns = [row.nonzero().flatten() for row in kept]
    columns = [c[torch.randperm(len(c), device=c.device)] for c in columns]
    starts = torch.tensor([0, *(len(c) for c in columns)], device=x.device).cumsum(0)
    values = torch.cat([row[c] for row, c in zip(x, columns, strict=True)])
    return starts.to(index), torch.cat(columns).to(index), values


def made(logits: Tensor, per_sample=False, of=SparseMultinomial, target_scale=1.0):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return of(
        per_sample=per_sample, dtype=dtype, device=logits.device, classes=logits.shape[1], inner=1, ignore_index=0,
        target_scale=target_scale,
    )  # fmt: skip


def forward(logits, target, weight=None, divisor=1.0, guess=1.0, **options):
    launches = made(logits, **options)
    rows = len(logits) if launches.per_sample else 1
    guess = torch.as_tensor(guess, dtype=launches.dtype, device=logits.device).expand(rows).contiguous()
    return launches.forward(logits, target, weight, divisor, guess)


def by_torch(logits, x, weight=None) -> tuple[Tensor, Tensor]:
    """Values of rows, and the gradient of their sum."""
    logits = logits.detach().requires_grad_()
    values = -(F.log_softmax(logits, 1) * x.to(logits.dtype)).sum(1)
    if weight is not None:
        values = values * weight
    return values, *gradients(values.sum(), logits)


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, per_sample, tiles):
    check_truth(shape, per_sample)


@pytest.mark.parametrize("shape", ((2, 4096), (2, 5000), (2, 8192), (3, 20_011)), ids=str)
def test_long_rows(shape):
    """Of as many as the tiles of compiled code hold, and of more."""
    check_truth(shape, False)


def check_truth(shape, per_sample):
    x, logits = counts(shape), 4 * torch.randn(shape, device=DEVICE)
    value, gradient = forward(logits, csr(x), per_sample=per_sample)
    naive, naive_gradient = by_torch(logits, x)
    truth, truth_gradient = by_torch(logits.double(), x)
    if not per_sample:
        naive, truth = naive.sum(), truth.sum()
    assert_no_worse(value, naive, truth, truth.abs() + 1e-30, "value")
    total = x.double().sum(1, keepdim=True)
    assert_no_worse(gradient, naive_gradient, truth_gradient, total + x + 1e-30, "gradient")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape, tiles):
    x, logits = counts(shape), 4 * torch.randn(shape, device=DEVICE).double()
    weight = torch.rand(shape[0], device=DEVICE)
    value, gradient = forward(logits, csr(x, torch.int32), weight, 3.0, 1.5)
    truth, truth_gradient = by_torch(logits, x, weight.double())
    assert relative(value, truth.sum() / 3) < 1e-12 and relative(gradient, 0.5 * truth_gradient) < 1e-12
    scaled = forward(logits, csr(x.int()), target_scale=0.25)
    for found, other in zip(scaled, forward(logits, csr(x / 4)), strict=True):
        assert relative(found, other) < 1e-12


@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("distance", (0.0, 5.0, 15.0, 40.0, 90.0, 200.0))
def test_the_digits_of_the_dense_kernel(distance, per_sample, tiles):
    """Of confident logits, whose loss is small; of masked items without counts; of ties."""
    shape = 3, 37
    logits, x = torch.randn(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)
    logits[:, 5], logits[2, 9], logits[:, 11] = distance, distance, -torch.inf
    x[0, 5], x[2, 5], x[2, 9] = 7, 2, 3
    value, gradient = forward(logits, csr(x), per_sample=per_sample)
    dense, dense_gradient = forward(logits, x, per_sample=per_sample, of=Categorical)
    size = torch.finfo(torch.float32).eps
    assert ((value - dense).abs() <= 8 * size * dense.abs()).all()
    assert ((gradient - dense_gradient).abs() <= 32 * size * dense_gradient.abs()).all()
    assert gradient[:, 11].eq(0).all() and gradient.isfinite().all()


def test_what_is_not_finite(tiles):
    """As of the dense target: a count where the logit is -inf, a logit of inf, no logit but -inf, and NaN, counts or not."""
    x, logits = counts((8, 21)), torch.randn(8, 21, device=DEVICE)
    x[4:] = 0
    x[2, 3], logits[2, 3], logits[3, 4] = 2, -torch.inf, torch.inf
    logits[4], logits[5, 6], logits[6, 7] = -torch.inf, torch.nan, torch.inf
    value, gradient = forward(logits, csr(x), per_sample=True)
    dense, dense_gradient = forward(logits, x, per_sample=True, of=Categorical)
    assert dense[2] == torch.inf and dense[3:7].isnan().all() and dense[[0, 1, 7]].isfinite().all()
    torch.testing.assert_close(value, dense, equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, dense_gradient, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_count_are_not_read(tiles):
    x, logits = counts((6, 21)), torch.randn(6, 21, device=DEVICE)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0, 1.0], device=DEVICE)
    starts, columns, values = csr(x)
    truth, truth_gradient = by_torch(logits.double(), x, weight.double())
    logits[2], values[starts[4] : starts[5]] = torch.nan, torch.nan
    value, gradient = forward(logits, (starts, columns, values), weight)
    assert relative(value, truth.sum()) < 1e-6 and relative(gradient, truth_gradient) < 1e-6
    assert gradient[[2, 4]].eq(0).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_short_logits(dtype, tiles):
    x, logits = counts((4, 100)), (4 * torch.randn(4, 100, device=DEVICE)).to(dtype)
    value, gradient = forward(logits, csr(x.short()))
    truth, truth_gradient = by_torch(logits.double(), x)
    assert gradient.dtype == dtype and value.dtype == torch.float32 and relative(value, truth.sum()) < 1e-6
    assert ((gradient.double() - truth_gradient).abs() <= torch.finfo(dtype).eps * truth_gradient.abs() + 1e-5).all()


@pytest.mark.parametrize("per_sample", (False, True))
def test_another_factor(per_sample, tiles):
    """A stored gradient is left alone where the factor was the right one, and corrected where it lies where it was not."""
    x, logits = counts((5, 40)), torch.randn(5, 40, device=DEVICE)
    launches, target, rows = made(logits, per_sample), csr(x), 5 if per_sample else 1
    used = torch.arange(1.0, rows + 1, device=DEVICE)
    _, gradient = launches.forward(logits, target, None, 2.0, used)
    kept = gradient.clone()
    again, seen = launches.backward(logits, target, None, 2.0, used if per_sample else used[0], gradient, used)
    assert again.data_ptr() == gradient.data_ptr() and torch.equal(again, kept) and torch.equal(seen, used)
    marked = gradient.fill_(7.0)
    factor = used.clone()
    factor[-1] = 3.5
    again, seen = launches.backward(logits, target, None, 2.0, factor if per_sample else factor[0], marked, used)
    truth = by_torch(logits.double(), x)[1] * (factor / 2).double().view(-1, 1)
    assert torch.equal(seen, factor) and relative(again[-1:], truth[-1:]) < 1e-6
    assert not per_sample or again[:-1].eq(7).all()
    anew, _ = launches.backward(logits, target, None, 2.0, factor if per_sample else factor[0], None, None)
    assert relative(anew, truth) < 1e-6


def test_sums_repeat_bit_by_bit():
    x, logits = counts((64, 300)), torch.randn(64, 300, device=DEVICE)
    target = csr(x)
    found = [forward(logits, target) for _ in range(3)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_it_computes_calls(reduction, weighted, monkeypatch):
    """One launch each way, and no formula; of either kind of indices by the same plan; and never another factor twice."""
    launches, launch = [], direct.Launch.__call__
    monkeypatch.setattr(
        direct.Launch, "__call__", lambda self, *args: (launches.append(self.kernel.__name__), launch(self, *args))
    )

    def nothing(*args):
        raise AssertionError("a formula")

    for method in ("nll", "sparse_nll", "one_pass", "sparse_one_pass"):
        monkeypatch.setattr(Multinomial, method, nothing)
    assert backend.has_kernels(DEVICE)
    x, logits = counts((6, 50)), torch.randn(6, 50, device=DEVICE, requires_grad=True)
    weight = torch.rand(6, 1, device=DEVICE) if weighted else None
    wide = logits.detach().double().requires_grad_()
    terms = -(F.log_softmax(wide, 1) * x).sum(1) * (1.0 if weight is None else weight.double()[:, 0])
    truth = terms if reduction == "none" else terms.sum() / (6 if weight is None else weight.double().sum())
    factor = torch.arange(1.0, 1.0 + truth.numel(), device=DEVICE).view(truth.shape)
    for index in (torch.int64, torch.int32, torch.int64):
        target = torch.sparse_csr_tensor(*csr(x, index), x.shape)
        found = fastelbo.nll(logits, target, likelihood="multinomial", reduction=reduction, weight=weight)
        by_logits = gradients(found, logits, grad_outputs=factor)[0]
        assert launches == ["sparse_multinomial_kernel"] * 2
        launches.clear()
        assert relative(found, truth) < 1e-6
        assert relative(by_logits, gradients(truth, wide, grad_outputs=factor.double(), retain_graph=True)[0]) < 1e-6


@pytest.mark.parametrize("bound", (IWAE(3), IWAE(4, estimator="dreg", chunk=2)), ids=str)
def test_bounds(bound):
    x, (mu, logvar) = counts((3, 12), torch.float64), torch.randn(2, 3, 2, device=DEVICE).double()
    matrix, eps = torch.randn(2, 12, device=DEVICE).double(), torch.randn(bound.n_samples, 3, 2, device=DEVICE).double()
    leaves = [t.requires_grad_() for t in (mu, logvar, matrix)]
    found = []
    for target in (torch.sparse_csr_tensor(*csr(x), x.shape), x):
        loss, *_ = fastelbo.elbo(lambda z: z @ matrix, target, mu, logvar, likelihood="multinomial", bound=bound, eps=eps)
        found.append([loss, *gradients(loss, *leaves)])
    assert all(relative(sparse, dense) < 1e-12 for sparse, dense in zip(*found, strict=True))


def test_second_derivatives():
    x, logits = counts((3, 6), torch.float64), torch.randn(3, 6, device=DEVICE).double().requires_grad_()
    target = torch.sparse_csr_tensor(*csr(x), x.shape)
    assert gradgradcheck(lambda p: fastelbo.nll(p, target, likelihood="multinomial", reduction="none"), (logits,))
