"""Targets in CSR: the same numbers as of the dense target, and no memory of its size."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Multinomial, NegativeBinomial, Poisson

import fastelbo
from bench.measure import peak_bytes
from conftest import BACKEND, DEVICE, INTERPRETED, once
from fastelbo import ELBO, IWAE
from fastelbo.diagnostics import Monitor
from fastelbo.likelihoods import BernoulliLogits, Categorical
from likelihood_cases import CASES, recon_x
from support import assert_no_worse, gradcheck, gradgradcheck, gradients, relative

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR tensor support is in beta|invariant checks)")

BATCH, WIDTH = 6, 11
WHOLE, GENES, CELLS = (BATCH, WIDTH), (WIDTH,), (BATCH, 1)


class Case(NamedTuple):
    """One of `likelihood_cases`, with parameters of these shapes."""

    of: str
    shapes: tuple[tuple[int, ...], ...]
    bits: bool = False

    def parameters(self, dtype=torch.float64) -> list[Tensor]:
        found = [p.to(DEVICE, dtype) for p in CASES[self.of].parameters(*self.shapes)]
        return [p.requires_grad_() for p in found]

    @property
    def likelihood(self):
        return CASES[self.of].likelihood

    def truth(self, parameters, x):
        return CASES[self.of].truth(parameters, x)

    @property
    def dim(self) -> int | None:
        return -1 if self.of.startswith("multinomial") else None


SPARSE = {
    "poisson": Case("poisson", (WHOLE,)),
    "poisson_log": Case("poisson_log", (WHOLE,)),
    "negative_binomial, each": Case("negative_binomial", (WHOLE, WHOLE)),
    "negative_binomial of genes": Case("negative_binomial", (WHOLE, GENES)),
    "negative_binomial of cells": Case("negative_binomial", (WHOLE, CELLS)),
    "zero_inflated, each": Case("zero_inflated", (WHOLE, WHOLE, WHOLE)),
    "zero_inflated of genes": Case("zero_inflated", (WHOLE, GENES, GENES)),
    "zero_inflated of one": Case("zero_inflated", (WHOLE, (), (1, WIDTH))),
    "multinomial": Case("multinomial", (WHOLE,)),
    "pos_weight": Case("pos_weight", (WHOLE,), bits=True),
    "pos_weight of genes": Case("pos_weight of features", (WHOLE, GENES), bits=True),
}
REDUCTIONS = ("sum", "batchmean", "mean", "none")


def counts(bits: bool = False) -> Tensor:
    """Half of them zeros, and one row of nothing else."""
    x = torch.poisson(3 * torch.rand(WHOLE)) * (torch.rand(WHOLE) < 0.5)
    x[2] = 0
    return (x.clamp(max=1) if bits else x).to(DEVICE)


def csr(x: Tensor, index=torch.int64, values=None) -> Tensor:
    """With columns in no order, and with some of the zeros."""
    kept = (x != 0) | (torch.rand(x.shape, device=x.device) < 0.1)
    kept[2] = x[2] != 0
    columns = [row.nonzero().flatten() for row in kept]
    columns = [c[torch.randperm(len(c), device=c.device)] for c in columns]
    starts = torch.tensor([0, *(len(c) for c in columns)], device=x.device).cumsum(0)
    found = torch.cat([row[c] for row, c in zip(x, columns, strict=True)])
    return torch.sparse_csr_tensor(starts.to(index), torch.cat(columns).to(index), found.to(values or x.dtype), x.shape)


def weights(kind: str | None, dtype=torch.float32) -> Tensor | None:
    if kind is None:
        return None
    found = torch.rand(CELLS if kind == "cells" else GENES, device=DEVICE, dtype=dtype)
    found.view(-1)[1] = 0
    return found


def both(parameters, x, **options) -> list[list[Tensor]]:
    """Results and gradients of the dense target, and of the sparse one."""
    mu, logvar = (torch.randn(BATCH, 3, device=DEVICE, dtype=torch.float64).requires_grad_() for _ in range(2))
    found = []
    for target in (x, csr(x)):
        terms = fastelbo.loss(recon_x(parameters), target, mu, logvar, 0.7, **options)
        upstream = torch.arange(1.0, BATCH + 1).to(terms.loss) if terms.loss.dim() else torch.tensor(1.5).to(terms.loss)
        found.append([*terms, *gradients(terms.loss, *parameters, mu, logvar, grad_outputs=upstream)])
    return found


@contextlib.contextmanager
def raises(kind: type[Exception], *words: str):
    with pytest.raises(kind) as found:
        yield
    assert all(word in str(found.value) for word in words), found.value


@pytest.mark.parametrize("weight", (None, "cells", "genes"))
@pytest.mark.parametrize("name", SPARSE)
def test_equals_the_dense_call(name, weight):
    case = SPARSE[name]
    if case.dim is not None and weight == "genes":
        pytest.skip("items share a weight")
    for reduction in REDUCTIONS if BACKEND == "torch" else ("mean", "none"):  # the interpreter is slow
        found = both(
            case.parameters(), counts(case.bits), likelihood=case.likelihood, weight=weights(weight), reduction=reduction
        )
        for dense, sparse in zip(*found, strict=True):
            assert sparse.shape == dense.shape and relative(sparse, dense) < 1e-12, reduction


@pytest.mark.parametrize("name", SPARSE)
def test_truth(name):
    """Against `torch.distributions` in float64, and no worse than they are in float32."""
    case, x = SPARSE[name], counts(SPARSE[name].bits)
    p = case.parameters(torch.float32)
    wide, narrow = [t.detach().double().requires_grad_() for t in p], [t.detach().clone().requires_grad_() for t in p]
    truth, naive = case.truth(wide, x.double()), case.truth(narrow, x)
    found = fastelbo.nll(recon_x(p), csr(x), likelihood=case.likelihood)
    assert_no_worse(found, naive.sum(), truth.sum(), truth.abs().sum() + truth.numel(), name)
    for g, n, t in zip(gradients(found, *p), gradients(naive.sum(), *narrow), gradients(truth.sum(), *wide), strict=True):
        magnitude = (t.abs() + 4 * (1 + x.max())) * (x.numel() / g.numel())
        assert_no_worse(g, n, t, magnitude, f"{name}: gradient")


@pytest.mark.parametrize("name", SPARSE if BACKEND == "torch" else ("poisson_log", "negative_binomial of genes", "multinomial"))
def test_gradients_are_derivatives(name):
    case, weight = SPARSE[name], weights("cells", torch.float64)
    x = csr(counts(case.bits))
    for reduction, w in (("sum", None), ("none", weight)):

        def recon(*p, w=w, reduction=reduction):
            return fastelbo.nll(recon_x(p), x, likelihood=case.likelihood, reduction=reduction, weight=w)

        assert gradcheck(recon, case.parameters(), nondet_tol=1e-12)
        assert BACKEND == "triton" or gradgradcheck(recon, case.parameters())  # of the same formula


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_short_predictions(dtype):
    """Their gradients are rounded once."""
    for name in ("negative_binomial of genes", "multinomial", "pos_weight"):
        case, x = SPARSE[name], counts(SPARSE[name].bits)
        p = case.parameters(dtype)
        wide = [t.detach().double().requires_grad_() for t in p]
        recon = fastelbo.nll(recon_x(p), csr(x), likelihood=case.likelihood)
        truth = fastelbo.nll(recon_x(wide), x, likelihood=case.likelihood)
        assert recon.dtype == torch.float32 and relative(recon, truth) < 1e-5
        for g, t in zip(gradients(recon, *p), gradients(truth, *wide), strict=True):
            assert g.dtype == dtype and relative(g, t) < torch.finfo(dtype).eps


@once
@pytest.mark.parametrize("index", (torch.int32, torch.int64))
@pytest.mark.parametrize("values", (torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64))
def test_any_dtype(values, index):
    case = SPARSE["poisson_log"]
    (p,), x = case.parameters(torch.float32), counts(values == torch.bool)
    x[2, 3] = 1  # or a row without counts has the multinomial's formula take over
    sparse, dense = (fastelbo.nll(p, t, likelihood="poisson_log") for t in (csr(x, index, values), x))
    assert sparse.dtype == torch.float32 and relative(sparse, dense) < 1e-6
    found = [gradients(fastelbo.nll(p, t, likelihood="multinomial"), p)[0] for t in (csr(x, index, values), x)]
    assert relative(*found) < 1e-6
    scaled = fastelbo.likelihoods.PoissonLog(target_scale=3.0)
    assert relative(*(fastelbo.nll(p, t, likelihood=scaled) for t in (csr(x, index, values), x))) < 1e-6


UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("values", UNSIGNED, ids=str)
@pytest.mark.parametrize("name", ("poisson", "multinomial", "pos_weight"))
def test_unsigned_dtypes(name, values):
    """Torch makes no dense matrix of them, at whose values the checks look."""
    case = SPARSE[name]
    (p, *others), x = case.parameters(torch.float32), counts(case.bits)
    x[0, 0] = 1
    sparse, dense = (fastelbo.nll(recon_x([p, *others]), t, likelihood=case.likelihood) for t in (csr(x, values=values), x))
    assert relative(sparse, dense) < 1e-6
    if DEVICE.type == "cpu":
        with raises(ValueError, "recon_x must not be negative", "from -1"):
            fastelbo.nll(torch.where(x > 0, -1.0, 1.0), csr(x, values=values), likelihood="poisson")
        with raises(ValueError, "x must lie in [0, 1]", "from 0 to 2"):
            fastelbo.nll(p, csr(2 * (x > 0), values=values), likelihood="bernoulli_logits")


@pytest.mark.parametrize("name", SPARSE)
def test_nothing_but_zeros(name):
    case = SPARSE[name]
    for dense, sparse in zip(
        *both(case.parameters(), torch.zeros(WHOLE, device=DEVICE), likelihood=case.likelihood), strict=True
    ):
        assert relative(sparse, dense) < 1e-12


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("shape", ((0, WIDTH), (BATCH, 0)))
def test_nothing(name, shape):
    case = SPARSE[name]
    p = [t.detach()[: shape[0], : shape[1]].requires_grad_() for t in case.parameters() if t.shape == WHOLE]
    p += [torch.ones(shape[1:] if t.shape == GENES else (), device=DEVICE) for t in case.parameters() if t.shape != WHOLE]
    empty = torch.sparse_csr_tensor(
        torch.zeros(shape[0] + 1, dtype=torch.int64, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE),
        torch.zeros(0, device=DEVICE), shape,
    )  # fmt: skip
    for reduction in REDUCTIONS:
        options = {"likelihood": case.likelihood, "reduction": reduction}
        found = fastelbo.nll(recon_x(p), empty, **options)
        expected = fastelbo.nll(recon_x(p), torch.zeros(shape, device=DEVICE), **options)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert gradients(found.sum(), p[0])[0].shape == shape


def test_distributions():
    """With the constants of Torch's own."""
    logits, total = torch.randn(WHOLE, device=DEVICE).double().requires_grad_(), torch.rand(GENES, device=DEVICE).double()
    total.requires_grad_()
    x, of_cells = counts(), torch.randn(WHOLE, device=DEVICE).double().requires_grad_()
    x[2, 3] = 4  # or a row without counts has the formula take over
    found = fastelbo.nll(NegativeBinomial(total, logits=logits), csr(x))
    truth = -NegativeBinomial(total, logits=logits).log_prob(x.double()).sum()
    assert relative(found, truth) < 1e-12
    for g, t in zip(gradients(found, logits, total), gradients(truth, logits, total), strict=True):
        assert relative(g, t) < 1e-12
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        given = of_cells.detach().to(dtype).requires_grad_()
        items = fastelbo.nll(Multinomial(logits=given, validate_args=False), csr(x), reduction="none")
        rows = zip(x.sum(1), given.double(), x.double(), strict=True)
        each = torch.stack([-Multinomial(int(n), logits=row).log_prob(c) for n, row, c in rows])
        assert relative(items, each) < most and relative(*(gradients(r.sum(), given)[0] for r in (items, each))) < most
    p = torch.rand(WHOLE, device=DEVICE).double().requires_grad_()
    bits = counts(True)
    found, truth = fastelbo.nll(Bernoulli(p), csr(bits)), -Bernoulli(p).log_prob(bits.double()).sum()
    assert relative(found, truth) < 1e-12 and relative(*(gradients(r, p)[0] for r in (found, truth))) < 1e-12


def test_soft_classes_have_to_be_dense():
    """A target of as many dimensions as the logits has may be labels or probabilities, which its values alone do not tell."""
    with pytest.raises(TypeError, match="x must be dense for the likelihood 'categorical'"):
        fastelbo.nll(torch.randn(WHOLE, device=DEVICE), csr(counts()), likelihood=Categorical(dim=1))


def test_weights_that_lie_otherwise_at_the_next_call():
    """In the same shape: the next call's strides are its own."""
    p, x = torch.rand(WHOLE, device=DEVICE).add(0.1).requires_grad_(), counts()
    large = torch.rand(2 * BATCH, 2 * WIDTH, device=DEVICE)
    views = large[:BATCH, :WIDTH], large[::2, ::2], large[:WIDTH, :BATCH].t() if WIDTH <= 2 * BATCH else large[:BATCH, 1::2]
    for weight in (*views, large[:1, :WIDTH].expand(WHOLE), large[:BATCH, :1].expand(WHOLE), views[0].contiguous()):
        found = fastelbo.nll(p, csr(x), likelihood="poisson", weight=weight)
        truth = (weight.double() * -Poisson(p.double()).log_prob(x.double())).sum()
        assert relative(found, truth) < 1e-5 and relative(*(gradients(r, p)[0] for r in (found, truth))) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="the same kernels as above, for minutes")
@pytest.mark.parametrize("name", ("poisson", "negative_binomial of genes", "zero_inflated, each", "multinomial"))
@pytest.mark.parametrize(
    "bound", (ELBO(), ELBO(3, chunk=2), IWAE(4, chunk=2), IWAE(3, estimator="dreg"), IWAE(2, estimator="stl", chunk=2)), ids=str
)
def test_bounds(name, bound):
    case, x = SPARSE[name], counts().double()
    mu, logvar = (torch.randn(BATCH, 3, device=DEVICE).double().requires_grad_() for _ in range(2))
    matrix, others = torch.randn(3, WIDTH, device=DEVICE).double(), case.parameters()[1:]
    others = [t.detach()[:1].requires_grad_() if t.shape == WHOLE else t for t in others]
    eps = torch.randn(*(() if bound == ELBO() else (bound.n_samples,)), BATCH, 3, device=DEVICE).double()
    matrix.requires_grad_()

    def decoder(z):
        first = z @ matrix
        return recon_x([first if name == "multinomial" else first.exp(), *others])

    found = []
    for target in (csr(x), x):
        terms = fastelbo.elbo(
            decoder, target, mu, logvar, 0.5, likelihood=case.likelihood, bound=bound, eps=eps, reduction="batchmean"
        )
        found.append([*terms, *gradients(terms.loss, matrix, *others, mu, logvar)])
    for sparse, dense in zip(*found, strict=True):
        assert relative(sparse, dense) < 1e-12
    options = {"likelihood": case.likelihood, "n_samples": 2, "eps": eps.reshape(-1, BATCH, 3)[:1].expand(2, -1, -1)}
    log_p = [fastelbo.log_likelihood(decoder, target, mu, logvar, **options).log_p for target in (csr(x), x)]
    assert relative(*log_p) < 1e-12


def test_module_monitor_and_steps():
    x, (logits,) = counts(True), SPARSE["pos_weight"].parameters()
    mu, logvar = (torch.randn(BATCH, 3, device=DEVICE).double().requires_grad_() for _ in range(2))
    criterion = fastelbo.nn.ELBOLoss(BernoulliLogits(3.0), beta=2.0, reduction="none").to(DEVICE)
    options = {"weighting": fastelbo.Weighting(free_bits=0.1), "reduction": "mean", "likelihood": "bernoulli_logits"}
    found = []
    for target in (csr(x), x):
        monitor = Monitor()
        found.append(
            [
                *criterion(logits, target, mu, logvar, weight=weights(None)),
                *fastelbo.loss(logits, target, mu, logvar, **options, monitor=monitor),
                *fastelbo.loss(logits, target, kl=mu.sum(), likelihood="bernoulli_logits", recon_weight=0.3),
                fastelbo.nll(logits, target, likelihood="bernoulli_logits", reduction=fastelbo.PerSample()),
                monitor.recon,
                monitor.bits_per_dimension,
            ]
        )
    for sparse, dense in zip(*found, strict=True):
        assert relative(sparse, dense) < 1e-12


@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_any_upstream(reduction):
    """What forward has stored is right for the factor that it guessed, and for any other; also a second time."""
    case, x = SPARSE["negative_binomial of genes"], counts()
    p = case.parameters(torch.float32)
    truth = [t.detach().double().requires_grad_() for t in p]
    by_one = gradients(case.truth(truth, x.double()).sum(), *truth)
    for factor in (1.0, 1.0, 3.0, 3.0, -0.5):
        recon = fastelbo.nll(recon_x(p), csr(x), likelihood=case.likelihood, reduction=reduction).sum()
        for times in (1.0, 2.0, 1.0):
            found = gradients(factor * times * recon, *p, retain_graph=True)
            assert all(relative(g, factor * times * t) < 1e-5 for g, t in zip(found, by_one, strict=True))


def test_a_gradient_that_is_handed_out_is_left_alone():
    (p,) = SPARSE["poisson_log"].parameters(torch.float32)
    recon = fastelbo.nll(p, csr(counts()), likelihood="poisson_log")
    (first,) = gradients(recon, p, retain_graph=True)
    kept = first.clone()
    gradients(5 * recon, p)
    assert torch.equal(first, kept)


def test_seldom_gradients():
    """By a weight, and by factors on the device; of several losses of one graph."""
    case, x = SPARSE["zero_inflated, each"], counts().double()
    p, w, beta = case.parameters(), weights("cells", torch.float64).requires_grad_(), torch.tensor(0.3, dtype=torch.float64)
    beta, mu = beta.to(DEVICE).requires_grad_(), torch.randn(BATCH, 2, device=DEVICE).double().requires_grad_()
    found = []
    for target in (csr(x), x):
        terms = fastelbo.loss(
            recon_x(p), target, mu, mu, beta, likelihood=case.likelihood, weight=w, recon_weight=beta, reduction="mean"
        )
        found.append(gradients(terms.loss + 2 * terms.recon + terms.kl, *p, w, beta, mu))
    assert all(relative(*pair) < 1e-12 for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", SPARSE)
def test_a_weight_of_0_hides_nan(name):
    case, x, w = SPARSE[name], counts(SPARSE[name].bits), weights("cells")
    p = case.parameters(torch.float32)
    clean = [t.detach().clone().requires_grad_() for t in p]
    sparse = csr(x)
    with torch.no_grad():
        p[0][1] = float("nan")
        sparse.values()[sparse.crow_indices()[1] : sparse.crow_indices()[2]] = float("nan")
    found = fastelbo.nll(recon_x(p), sparse, likelihood=case.likelihood, weight=w)
    expected = fastelbo.nll(recon_x(clean), x, likelihood=case.likelihood, weight=w)
    assert relative(found, expected) < 1e-5
    for a, b in zip(gradients(found, *p), gradients(expected, *clean), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("row", (0, 2))
def test_nan_is_no_finite_lie(name, row):
    """Not in a row of nothing but zeros, either."""
    case, x = SPARSE[name], counts(SPARSE[name].bits)
    p = case.parameters(torch.float32)
    with torch.no_grad():
        p[0][row, 3] = float("nan")
    recon = fastelbo.nll(recon_x(p), csr(x), likelihood=case.likelihood, reduction="none")
    assert torch.equal(recon.isnan(), torch.arange(BATCH, device=DEVICE) == row)
    assert gradients(recon.sum(), p[0])[0][row, 3].isnan()


def test_items_without_counts_may_be_masked():
    logits, x = torch.randn(WHOLE, device=DEVICE), counts()
    logits[:, 4], x[:, 4] = -torch.inf, 0
    logits.requires_grad_()
    explicit = torch.sparse_csr_tensor(
        torch.arange(BATCH + 1, device=DEVICE) * WIDTH, torch.arange(WIDTH, device=DEVICE).repeat(BATCH), x.flatten(), WHOLE
    )
    dense = fastelbo.nll(logits, x, likelihood="multinomial")
    for target in (csr(x), explicit):
        sparse = fastelbo.nll(logits, target, likelihood="multinomial")
        assert (
            relative(sparse, dense) < 1e-6
            and relative(*(gradients(r, logits, retain_graph=True)[0] for r in (sparse, dense))) < 1e-6
        )


# --- what surrounds a call


def test_transforms():
    case, x = SPARSE["negative_binomial, each"], counts().double()
    (mean, theta), sparse = (t.detach() for t in case.parameters()), csr(x)

    def by(target):
        return lambda m, t: fastelbo.nll((m, t), target, likelihood="negative_binomial")

    for transform in (torch.func.grad, torch.func.hessian):
        assert relative(transform(by(sparse))(mean, theta), transform(by(x))(mean, theta)) < 1e-12
    several = torch.stack([mean, 2 * mean])
    assert relative(torch.vmap(by(sparse), (0, None))(several, theta), torch.vmap(by(x), (0, None))(several, theta)) < 1e-12
    tangents = torch.randn_like(mean), torch.randn_like(theta)
    assert relative(*(torch.func.jvp(by(t), (mean, theta), tangents)[1] for t in (sparse, x))) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by Dynamo, where it gives up
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled(backend):
    """Torch leaves the call out of its graph, or says that it takes no sparse tensor where that has to be whole."""
    (p,), x = SPARSE["poisson"].parameters(), counts()
    mu = torch.randn(BATCH, 2, device=DEVICE).double().requires_grad_()

    def step(p, target):
        return fastelbo.loss(2 * p, target, mu, mu, likelihood="poisson").loss

    sparse, dense = torch.compile(step, backend=backend)(p, csr(x)), step(p, x)
    for s, d in zip((sparse, *gradients(sparse, p, mu)), (dense, *gradients(dense, p, mu)), strict=True):
        assert relative(s, d) < 1e-12
    torch._dynamo.reset()
    with raises(Exception, "sparse"):
        torch.compile(step, backend=backend, fullgraph=True)(p, csr(x))


def test_meta():
    x = csr(counts()).to("meta")
    for name in SPARSE:
        p = [t.detach().to("meta").requires_grad_() for t in SPARSE[name].parameters()]
        recon = fastelbo.nll(recon_x(p), x, likelihood=SPARSE[name].likelihood, reduction="none")
        assert recon.shape == (BATCH,) and all(g.shape == t.shape for g, t in zip(gradients(recon.sum(), *p), p, strict=True))


# --- memory


@once
@pytest.mark.skipif(BACKEND != "torch", reason="of the Torch backend")
@pytest.mark.parametrize(
    "likelihood", ("negative_binomial", "zero_inflated_negative_binomial", "multinomial", "bernoulli_logits")
)
def test_no_memory_of_the_size_of_the_target(likelihood):
    batch, width = 2000, 2000
    x = (torch.rand(batch, width) < 0.02).float()
    sparse, size = x.to_sparse_csr(), x.numel() * 4
    first, genes = torch.rand(batch, width, requires_grad=True), torch.rand(width, requires_grad=True)
    count = {"negative_binomial": 2, "zero_inflated_negative_binomial": 3}.get(likelihood, 1)
    p = [first, genes, genes][:count]

    def step(target):
        return gradients(fastelbo.nll(recon_x(p), target, likelihood=likelihood, reduction="mean"), first)

    for _ in range(2):  # scratch memory is kept, and the guess is right the second time
        step(sparse)
    assert size <= peak_bytes(lambda: step(sparse), torch.device("cpu")) < 1.25 * size  # the gradient alone


# --- errors


def call(x, **options):
    return fastelbo.nll(torch.rand(WHOLE, device=DEVICE), x, **{"likelihood": "poisson", **options})


@pytest.mark.parametrize("layout", (torch.sparse_coo, torch.sparse_csc))
def test_other_layouts(layout):
    x = counts().to_sparse() if layout == torch.sparse_coo else counts().to_sparse_csc()
    latents = torch.zeros(BATCH, 2, device=DEVICE)
    with raises(TypeError, "x must be", str(layout), "x.to_sparse_csr()"):
        call(x)
    with raises(TypeError, "x must be", str(layout), "x.to_sparse_csr()"):
        fastelbo.elbo(lambda z: z, x, latents, latents, likelihood="poisson", bound=ELBO(2))
    assert call(x.to_sparse_csr()).isfinite()


def test_scipy():
    scipy = pytest.importorskip("scipy.sparse")
    (p,) = SPARSE["poisson"].parameters()
    for make in (scipy.csr_matrix, scipy.coo_array):
        x = counts()
        matrix = make(x.cpu().numpy())
        with raises(TypeError, "x must be a tensor", "scipy", "torch.sparse_csr_tensor(c.indptr, c.indices, c.data, c.shape)"):
            call(matrix)
        c = matrix.tocsr()
        found = fastelbo.nll(p, torch.sparse_csr_tensor(c.indptr, c.indices, c.data, c.shape).to(DEVICE), likelihood="poisson")
        assert relative(found, fastelbo.nll(p, x, likelihood="poisson")) < 1e-12


def test_likelihoods_without_a_closed_form():
    for name in ("discretized_logistic", "continuous_bernoulli"):
        with raises(TypeError, "x must be dense", name, "no closed form"):
            call(csr(counts()), likelihood=name)

    class Own(fastelbo.likelihoods.Likelihood):
        def nll(self, parameters, x):
            return (parameters[0] - x).abs()

    class WithZero(Own):
        def nll(self, parameters, x):
            return (parameters[0] - x).square()

        at_zero = fastelbo.likelihoods.Likelihood.nll_of_zeros

    with raises(TypeError, "x must be dense", "Own"):
        call(csr(counts()), likelihood=Own())
    (p,), x = SPARSE["poisson"].parameters(), counts().double()
    assert relative(fastelbo.nll(p, csr(x), likelihood=WithZero()), (p - x).square().sum()) < 1e-12


def test_shapes_and_gradients():
    x = csr(counts())
    with raises(ValueError, "must have the shape of x", str(WHOLE)):
        fastelbo.nll(torch.rand(BATCH, WIDTH + 1, device=DEVICE), x, likelihood="poisson")
    with raises(ValueError, "x must not require grad where it is sparse"):
        call(x.detach().requires_grad_())
    with raises(ValueError, "x must be dense with PerSample(batch_dims=2)"):
        call(x, reduction=fastelbo.PerSample(2))
    with raises(ValueError, "x must be a matrix"):
        call(torch.ones(2, *WHOLE, device=DEVICE).to_sparse_csr())
    with raises(TypeError, "recon_x must be a dense tensor"):
        fastelbo.nll(x, x, likelihood="poisson")
    with raises(TypeError, "recon_x must be a dense tensor, got a nested one"):
        nested = torch.nested.nested_tensor([torch.rand(WIDTH)] * BATCH, device=DEVICE, layout=torch.jagged)
        fastelbo.nll(nested, x, likelihood="poisson")
    latents = torch.zeros(BATCH, 2, device=DEVICE)
    for other, kind in ((0.5, "float"), ("mu", "str"), (None, "NoneType")):
        with raises(TypeError, "recon_x must be a tensor", kind):
            fastelbo.nll(other, x, likelihood="poisson")
    with raises(TypeError, "logvar must be a tensor, got float"):
        fastelbo.loss(torch.rand(WHOLE, device=DEVICE), x, latents, 0.5, likelihood="poisson")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="nothing is looked at on a GPU")
@pytest.mark.parametrize("height", [1, 2, 3, BATCH])
def test_what_only_a_look_tells(height, monkeypatch):
    # It is looked for in some rows at a time, where they are many.
    monkeypatch.setattr("fastelbo.engine.sparse.block_size", lambda: height * WIDTH)

    def matrix(starts, columns, values=(1.0, 2.0, 3.0)):
        given = torch.tensor(starts), torch.tensor(columns), torch.tensor(values)
        return torch.sparse_csr_tensor(*given, WHOLE, check_invariants=False)

    rows = [0, 2, 3, 3, 3, 3, 3]
    with raises(ValueError, "one value for each place", "(0, 4)"):
        call(matrix(rows, [4, 4, 1]))
    with raises(ValueError, "x.col_indices()", f"from 0 to {WIDTH - 1}"):
        call(matrix(rows, [4, WIDTH, 1]))
    with raises(ValueError, "x.crow_indices()", "rise from 0"):
        call(matrix([0, 2, 1, 3, 3, 3, 3], [4, 2, 1]))
    assert call(matrix(rows, [4, 1, 4])).isfinite()
    with raises(ValueError, "one value for each place", "(4, 3)"):
        call(matrix([0, 1, 1, 1, 1, 3, 3], [4, 3, 3]))
    with raises(ValueError, "x must not be negative", "from -2"):
        call(matrix(rows, [4, 3, 1], (1.0, -2.0, 3.0)))
    with raises(ValueError, "x must lie in [0, 1]"):
        call(matrix(rows, [4, 3, 1], (1, 2, 1)), likelihood="bernoulli_logits")
    with raises(ValueError, "recon_x must not be negative"):
        fastelbo.nll(-torch.ones(WHOLE), matrix(rows, [4, 3, 1]), likelihood="poisson")


@pytest.mark.parametrize("likelihood", ("negative_binomial", "poisson"))
@pytest.mark.parametrize("count", (0.0, 3.0))
def test_one_value_alone(count, likelihood):
    """The only one that is stored, which may be a zero."""
    parts = torch.tensor([0, 1, 1]), torch.tensor([2]), torch.tensor([count])
    x = torch.sparse_csr_tensor(*parts, (2, 5)).to(DEVICE)
    rate, theta = torch.rand(2, 2, 5, device=DEVICE).add(0.1).unbind()
    given = (rate.requires_grad_(), theta) if likelihood == "negative_binomial" else rate.requires_grad_()
    for reduction in ("sum", "none"):
        got, expected = (fastelbo.nll(given, t, likelihood=likelihood, reduction=reduction) for t in (x, x.to_dense()))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), rate)[0] for v in (got, expected)))
