"""The links of counts: the same numbers as of what Torch composes, and no mean in memory."""

import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import fastelbo
from conftest import BACKEND, COMPILED, DEVICE, INTERPRETED
from fastelbo import ELBO, IWAE
from fastelbo.likelihoods import Likelihood, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from likelihood_cases import recon_x
from support import assert_no_worse, gradcheck, gradgradcheck, gradients, relative

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR tensor support is in beta|invariant checks)")

B, G = 6, 11
SHAPES = {Poisson: [(B, G)], NegativeBinomial: [(B, G), (G,)], ZeroInflatedNegativeBinomial: [(B, G), (G,), (B, G)]}
LINKED = {
    f"{kind.__name__}, {', '.join(links)}": kind(*links)
    for kind, of_mean in ((Poisson, ("softplus", "softmax")), *((kind, ("log", "softplus", "softmax")) for kind in
                          (NegativeBinomial, ZeroInflatedNegativeBinomial)))
    for mean in of_mean
    for links in ([(mean,)] if kind is Poisson else [(mean, "identity"), (mean, "log")])
}  # fmt: skip
LINKED["NegativeBinomial, identity, log"] = NegativeBinomial(inverse_dispersion="log")


def given(likelihood: Likelihood, dtype=torch.float64, batch: int = B) -> list[Tensor]:
    found = [torch.randn((batch, *shape[1:]) if len(shape) == 2 else shape, dtype=dtype) for shape in SHAPES[type(likelihood)]]
    if likelihood.mean == "identity":
        found[0] = found[0].exp()
    if getattr(likelihood, "inverse_dispersion", "log") == "identity":
        found[1] = found[1].exp()
    if likelihood.mean == "softmax":
        found.append(20 * torch.rand(batch, 1, dtype=dtype) + 1)
    return [p.to(DEVICE).requires_grad_() for p in found]


def composed(likelihood: Likelihood, parameters) -> list[Tensor]:
    """What the likelihood without links takes, by Torch."""
    found = list(parameters)
    if likelihood.mean == "softmax":
        found[0] = found.pop() * torch.softmax(found[0], -1)
    elif likelihood.mean != "identity":
        h = found[0]
        found[0] = torch.exp(h) if likelihood.mean == "log" else torch.logaddexp(h, torch.zeros_like(h))
    if getattr(likelihood, "inverse_dispersion", "identity") == "log":
        found[1] = torch.exp(found[1])
    return found


def counts(dtype=torch.float64, batch: int = B) -> Tensor:
    x = torch.poisson(3 * torch.rand(batch, G, dtype=dtype)) * (torch.rand(batch, G) < 0.5)
    x[2] = 0
    return x.to(DEVICE)


def weights(kind: str | None) -> Tensor | None:
    if kind is None:
        return None
    found = torch.rand({"cells": (B, 1), "genes": (G,), "elements": (B, G)}[kind], dtype=torch.float64, device=DEVICE)
    found.view(-1)[1] = 0
    return found


def cast(parameters, dtype=torch.float64) -> list[Tensor]:
    return [p.detach().to(dtype, copy=True).requires_grad_() for p in parameters]


def upstream(value: Tensor) -> Tensor:
    return torch.arange(1.0, value.numel() + 1).to(value).view(value.shape) * 1.5


def by_composition(likelihood, parameters, x, weight: Tensor | None = None, reduction: str = "sum") -> Tensor:
    """By the formula without links, in which no kernel has a part."""
    return reduced(type(likelihood)().nll(composed(likelihood, parameters), x), weight, reduction)


def reduced(terms: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    weight = torch.ones_like(terms) if weight is None else weight.expand_as(terms)
    terms = terms * weight
    if reduction == "none":
        return terms.flatten(1).sum(1)
    return terms.sum() / {"sum": 1, "batchmean": len(terms), "mean": weight.sum()}[reduction]


@pytest.mark.parametrize("weight", (None, "cells", "genes", "elements"))
@pytest.mark.parametrize("name", LINKED)
def test_equals_what_is_composed(name, weight):
    if BACKEND == "triton" and weight is not None and name.endswith("identity"):
        pytest.skip("as without links, and the interpreter is slow")
    likelihood, x, w = LINKED[name], counts(), weights(weight)
    # To a kernel a "sum" and a "batchmean" are a "mean" with another divisor.
    for reduction in ("sum", "batchmean", "mean", "none") if BACKEND == "torch" else ("mean", "none"):
        p = given(likelihood)
        values = [
            fastelbo.nll(recon_x(p), target, likelihood=likelihood, weight=w, reduction=reduction)
            for target in (x, x.to_sparse_csr())
        ]
        values.append(by_composition(likelihood, p, x, w, reduction))
        found = [[value, *gradients(value, *p, grad_outputs=upstream(value))] for value in values]
        for dense, sparse, truth in zip(*found, strict=True):
            assert relative(dense, truth) < 1e-12 and relative(sparse, truth) < 1e-12, reduction


@pytest.mark.parametrize("layout", ("dense", "csr"))
@pytest.mark.parametrize("name", LINKED)
def test_is_no_worse_in_float32(name, layout):
    """In one pass, of blocks of rows, and with weights, where the links are pulled back behind them."""
    likelihood, x = LINKED[name], counts(torch.float32)
    p, w = given(likelihood, torch.float32), weights("genes").float()
    target = x.to_sparse_csr() if layout == "csr" else x
    for weight in (None, w):
        wide, narrow, plain = cast(p), cast(p, torch.float32), type(likelihood)()

        def reference(tensors, dtype, plain=plain, weight=weight):
            terms = plain.nll(composed(likelihood, tensors), x.to(dtype))
            return (terms if weight is None else terms * weight.to(dtype)).sum()

        truth, naive = reference(wide, torch.float64), reference(narrow, torch.float32)
        found = fastelbo.nll(recon_x(p), target, likelihood=likelihood, weight=weight)
        assert_no_worse(found, naive, truth, truth.abs() + x.numel(), name)
        for g, n, t in zip(gradients(found, *p), gradients(naive, *narrow), gradients(truth, *wide), strict=True):
            assert_no_worse(g, n, t, (t.abs() + 4 * (1 + x.max())) * (x.numel() / g.numel()), f"{name}: gradient")


@pytest.mark.skipif(BACKEND != "torch", reason="a kernel has no blocks of rows")
@pytest.mark.parametrize("layout", ("dense", "csr"))
@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_blocks_are_of_whole_rows(dtype, reduction, layout, monkeypatch):
    """Of more elements than a block has: the softmax of each row, and the library's gradient, are of all of it."""
    monkeypatch.setattr("fastelbo.engine.reconstruction.block_size", lambda: 3 * G + 1)
    monkeypatch.setattr("fastelbo.engine.sparse_reconstruction.block_size", lambda: 3 * G + 1)
    batch, likelihood = 40, ZeroInflatedNegativeBinomial("softmax", "log")
    p, x = given(likelihood, dtype, batch), counts(torch.float32, batch)
    wide = cast(p)
    truth = ZeroInflatedNegativeBinomial().nll(composed(likelihood, wide), x.double())
    truth = truth.sum(1) if reduction == "none" else truth.sum()
    target = x.to_sparse_csr() if layout == "csr" else x
    found = fastelbo.nll(recon_x(p), target, likelihood=likelihood, reduction=reduction)
    assert relative(found, truth) < 1e-5
    of_truth = gradients(truth, *wide, grad_outputs=upstream(truth))
    for g, t in zip(gradients(found, *p, grad_outputs=upstream(found)), of_truth, strict=True):
        assert relative(g, t) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("needs", ((True, False), (False, True)), ids=("logits", "library"))
def test_one_of_the_two_gradients(needs):
    likelihood, x = Poisson("softmax"), counts(torch.float32)
    p = [t.detach().requires_grad_(need) for t, need in zip(given(likelihood, torch.float32), needs, strict=True)]
    wide = cast(p)
    truth = Poisson().nll(composed(likelihood, wide), x.double()).sum()
    found = fastelbo.nll(recon_x(p), x, likelihood=likelihood)
    for g, t, need in zip(p, gradients(truth, *wide), needs, strict=True):
        if need:
            assert relative(gradients(found, g)[0], t) < 1e-5


@pytest.mark.parametrize("layout", ("dense", "csr"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("name", LINKED)
def test_extremes(name, dtype, layout):
    """Logits of -100 and 80, of which float32 has no exp, or nothing to divide by."""
    likelihood = LINKED[name]
    if likelihood.mean == "identity":
        pytest.skip("no logits")
    if INTERPRETED and dtype == torch.float64 and layout == "csr":
        pytest.skip("by the functions that the others are by")
    p, x = given(likelihood, dtype), counts(dtype)
    with torch.no_grad():
        p[0][0, :4] = torch.tensor([-100.0, 80.0, -100.0, 80.0])
        x[0, :4] = torch.tensor([0.0, 0.0, 2.0, 3.0])
    wide = cast(p)
    truth = type(likelihood)().nll(composed(likelihood, wide), x.double()).sum()
    found = fastelbo.nll(recon_x(p), x.to_sparse_csr() if layout == "csr" else x, likelihood=likelihood)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert relative(found, truth) < tolerance
    for g, t in zip(gradients(found, *p), gradients(truth, *wide), strict=True):
        assert g.isfinite().all() and relative(g, t) < tolerance


@pytest.mark.parametrize("name", ("Poisson, softmax", "NegativeBinomial, softmax, log", "NegativeBinomial, log, log"))
def test_derivatives(name):
    likelihood, x = LINKED[name], counts()

    def value(*p):
        return fastelbo.nll(p[0] if len(p) == 1 else p, x, likelihood=likelihood)

    gradcheck(value, given(likelihood))
    if BACKEND == "torch" or name == "Poisson, softmax":  # of the same formula
        gradgradcheck(value, given(likelihood))


def test_what_is_not_counted_still_has_a_share():
    """A gene weighted by 0 is in the softmax all the same; a row of such cells may be NaN."""
    likelihood, x = NegativeBinomial("softmax"), counts(torch.float32)
    for w in (weights("genes"), weights("cells")):
        p = given(likelihood, torch.float32)
        wide = cast(p)
        truth = (NegativeBinomial().nll(composed(likelihood, wide), x.double()) * w).sum()
        found = fastelbo.nll(recon_x(p), x, likelihood=likelihood, weight=w.float())
        of_found = gradients(found, *p)
        for g, t in zip(of_found, gradients(truth, *wide), strict=True):
            assert relative(g, t) < 1e-5
    with torch.no_grad():
        p[0][1] = torch.nan  # whose weight is 0
    again = fastelbo.nll(recon_x(p), x, likelihood=likelihood, weight=w.float())
    assert relative(again, found) < 1e-6
    assert relative(gradients(again, p[0])[0], of_found[0]) < 1e-6


@pytest.mark.parametrize("bound", (ELBO(2), IWAE(3)), ids=str)
def test_bounds(bound):
    likelihood, x = NegativeBinomial("softmax", "log"), counts()
    library = x.sum(1, keepdim=True) + 1
    mu, logvar, of_z, theta = (
        torch.randn(shape, device=DEVICE, dtype=torch.float64).requires_grad_() for shape in ((B, 3), (B, 3), (3, G), (G,))
    )
    found = []
    for of, links in ((likelihood, lambda p: p), (NegativeBinomial(), lambda p: tuple(composed(likelihood, p)))):
        torch.manual_seed(4)
        loss = fastelbo.elbo(
            lambda z, links=links: links((z @ of_z, theta, library.repeat(len(z) // B, 1))), x, mu, logvar, likelihood=of,
            bound=bound,
        ).loss  # fmt: skip
        found.append([loss, *gradients(loss, mu, logvar, of_z, theta)])
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < 1e-12


@pytest.mark.skipif(INTERPRETED, reason="the compiler takes no interpreted kernel")
@pytest.mark.parametrize("weighted", (False, True))
def test_compiled(weighted):
    likelihood, x, w = NegativeBinomial("softmax", "log"), counts(), weights("genes") if weighted else None
    torch.compiler.reset()
    compiled = torch.compile(lambda p, x, w: fastelbo.nll(p, x, likelihood=likelihood, weight=w), fullgraph=True)
    p = given(likelihood)
    found, truth = compiled(tuple(p), x, w), fastelbo.nll(tuple(p), x, likelihood=likelihood, weight=w)
    assert relative(found, truth) < 1e-12
    for g, t in zip(gradients(found, *p), gradients(truth, *p), strict=True):
        assert relative(g, t) < 1e-12


def test_a_library_of_all():
    likelihood, (logits, _) = Poisson("softmax"), given(Poisson("softmax"))
    x = counts()
    one = fastelbo.nll((logits, 5.0), x, likelihood=likelihood)
    assert relative(one, fastelbo.nll((logits, torch.full_like(x[:, :1], 5.0)), x, likelihood=likelihood)) < 1e-12
    nothing = fastelbo.nll((logits, 0.0), torch.zeros_like(x), likelihood=likelihood)
    assert nothing == 0 and all(g.isfinite().all() for g in gradients(nothing, logits))


def test_one_gene():
    """As large as the target is the library then."""
    p = [torch.randn(B, 1, device=DEVICE).requires_grad_(), (3 * torch.rand(B, 1, device=DEVICE)).requires_grad_()]
    x = counts(torch.float32)[:, :1].contiguous()
    found, truth = fastelbo.nll(tuple(p), x, likelihood=Poisson("softmax")), Poisson().nll([p[1]], x).sum()
    assert relative(found, truth) < 1e-6
    by_logits, by_library = gradients(found, *p)
    assert by_logits.abs().max() < 1e-6 and relative(by_library, gradients(truth, p[1])[0]) < 1e-6


@pytest.mark.parametrize("layout", ("dense", "csr"))
@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("name", ("Poisson, softplus", "NegativeBinomial, log, log", "NegativeBinomial, softmax, log"))
def test_any_factor(name, reduction, layout):
    """Factors that are guessed and that are not, forward's own graph twice, and what comes from the first left alone."""
    likelihood, x = LINKED[name], counts()
    target = x.to_sparse_csr() if layout == "csr" else x
    for step, factor in enumerate((1.0, 3.0, 3.0) if INTERPRETED else (1.0, 1.0, 3.0, 3.0, -0.5)):
        p = given(likelihood)
        found = fastelbo.nll(recon_x(p), target, likelihood=likelihood, reduction=reduction)
        truth = by_composition(likelihood, p, x, reduction=reduction)
        assert relative(found, truth) < 1e-12
        first = gradients(found, *p, grad_outputs=factor * upstream(found), retain_graph=True)
        kept = [g.clone() for g in first]
        again = gradients(found, *p, grad_outputs=2 * factor * upstream(found))
        of_truth = gradients(truth, *p, grad_outputs=factor * upstream(truth))
        for g, k, a, t in zip(first, kept, again, of_truth, strict=True):
            assert relative(g, t) < 1e-12 and relative(a, 2 * t) < 1e-12, step
            assert torch.equal(g, k)


@pytest.mark.parametrize("layout", ("dense", "csr"))
@pytest.mark.parametrize("theta", ((), (1, 1), (B, 1), (G,), (1, G), (B, G)), ids=str)
@pytest.mark.parametrize("mean", ("log", "softmax"))
def test_dispersions_of_any_shape(mean, theta, layout):
    likelihood, x = NegativeBinomial(mean, "log"), counts()
    for reduction in ("mean", "none"):
        p = given(likelihood)
        p[1] = torch.randn(theta, dtype=torch.float64, device=DEVICE).requires_grad_()
        target = x.to_sparse_csr() if layout == "csr" else x
        found = fastelbo.nll(recon_x(p), target, likelihood=likelihood, reduction=reduction)
        truth = by_composition(likelihood, p, x, reduction=reduction)
        assert relative(found, truth) < 1e-12
        of_found, of_truth = (gradients(v, *p, grad_outputs=upstream(v)) for v in (found, truth))
        assert all(relative(g, t) < 1e-12 for g, t in zip(of_found, of_truth, strict=True))


@pytest.mark.parametrize("shape", ((), (1,), (1, 1), (B, 1), (4, 1), (B, 1, 1), (1, 4, 1), (B, 4, 1)), ids=str)
@pytest.mark.parametrize("kind", (Poisson, NegativeBinomial))
def test_libraries_of_any_shape(kind, shape):
    """Those of rows of more than one dimension, too, in memory in another order; the 0-d one is of all rows."""
    likelihood, dims = kind("softmax"), (B, G) if shape == (B, 1) else (B, 4, 2, G) if len(shape) > 3 else (B, 4, G)
    logits = torch.randn(dims, dtype=torch.float64, device=DEVICE).transpose(0, 1).contiguous().transpose(0, 1)
    library = (20 * torch.rand((*shape, 2), dtype=torch.float64, device=DEVICE) + 1)[..., 0].requires_grad_()
    theta = torch.rand(G, dtype=torch.float64, device=DEVICE) + 0.5
    p = [logits.requires_grad_(), *([theta.requires_grad_()] if kind is NegativeBinomial else []), library]
    x = torch.poisson(3 * torch.rand(dims, dtype=torch.float64)).to(DEVICE)
    for reduction in ("batchmean", "none"):
        found = fastelbo.nll(recon_x(p), x, likelihood=likelihood, reduction=reduction)
        truth = by_composition(likelihood, p, x, reduction=reduction)
        assert relative(found, truth) < 1e-12
        of_found, of_truth = (gradients(v, *p, grad_outputs=upstream(v)) for v in (found, truth))
        assert all(relative(g, t) < 1e-12 for g, t in zip(of_found, of_truth, strict=True))


@pytest.mark.parametrize("layout", ("dense", "csr"))
@pytest.mark.parametrize("likelihood", (Poisson("softmax"), NegativeBinomial("softmax", "log")), ids=str)
def test_a_library_of_0(likelihood, layout):
    """Where nothing was counted it has a gradient, which is no quotient by it; counts would have been impossible."""
    x, p = counts(), given(likelihood)
    with torch.no_grad():
        p[-1][2], p[-1][4] = 0.0, 0.0
    x[4] = 0
    wide = cast(p)
    target = x.to_sparse_csr() if layout == "csr" else x
    found = fastelbo.nll(recon_x(p), target, likelihood=likelihood)
    truth = by_composition(likelihood, wide, x)
    assert relative(found, truth) < 1e-12
    of_found, of_truth = gradients(found, *p), gradients(truth, *wide)
    assert all(relative(g, t) < 1e-12 for g, t in zip(of_found, of_truth, strict=True))
    assert (of_found[-1][2] != 0).all()
    if isinstance(likelihood, Poisson):
        x[2, 0] = 3.0
        target = x.to_sparse_csr() if layout == "csr" else x
        with pytest.raises(ValueError, match="x must") if DEVICE.type == "meta" else nullcontext():
            assert fastelbo.nll(recon_x(p), target, likelihood=likelihood) == torch.inf


@pytest.mark.parametrize("shift", (-3e4, 1e3, 1e4))
@pytest.mark.parametrize("name", ("Poisson, softmax", "NegativeBinomial, softmax, log"))
def test_logits_far_from_0(name, shift):
    """A softmax is of differences, which float32 has to all digits."""
    likelihood, x = LINKED[name], counts(torch.float32)
    p = given(likelihood, torch.float32)
    with torch.no_grad():
        p[0] += shift
    wide = cast(p)
    truth, found = by_composition(likelihood, wide, x.double()), fastelbo.nll(recon_x(p), x, likelihood=likelihood)
    assert relative(found, truth) < 1e-6
    assert all(relative(g, t) < 2e-6 for g, t in zip(gradients(found, *p), gradients(truth, *wide), strict=True))


@pytest.mark.parametrize("layout", ("dense", "csr"))
@pytest.mark.parametrize("shape", ((1, 2), (1, 1003), (3, 1040), (2, 70_003), (1, 131_077)), ids=str)
def test_rows_of_any_length(shape, layout):
    """Of one program and of several, which end at a multiple of 16 elements or not."""
    likelihood = NegativeBinomial("softmax", "log")
    logits, theta = torch.randn(shape) + 10 * (torch.rand(shape) < 0.01), torch.randn(shape[1])
    p = [t.to(DEVICE).requires_grad_() for t in (logits, theta, 3.0 * shape[1] * torch.ones(shape[0], 1))]
    x = (torch.poisson(3 * torch.rand(shape)) * (torch.rand(shape) < 0.5)).to(DEVICE)
    wide = cast(p)
    truth = by_composition(likelihood, wide, x.double())
    found = fastelbo.nll(recon_x(p), x.to_sparse_csr() if layout == "csr" else x, likelihood=likelihood)
    assert relative(found, truth) < 1e-6
    for g, t in zip(gradients(found, *p), gradients(truth, *wide), strict=True):
        assert relative(g, t) < 2e-5


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", LINKED)
def test_halves(name, dtype):
    """The gradient is rounded once, which the interpreter does to the next lower one, from one that float32 has."""
    likelihood, x = LINKED[name], counts(torch.float32)
    p = given(likelihood, dtype)
    wide = cast(p)
    truth, found = by_composition(likelihood, wide, x.double()), fastelbo.nll(recon_x(p), x, likelihood=likelihood)
    assert found.dtype == torch.float32 and relative(found, truth) < 1e-6
    for g, t in zip(gradients(found, *p), gradients(truth, *wide), strict=True):
        assert ((g.double() - t).abs() <= torch.finfo(dtype).eps * t.abs() + 1e-5 * t.abs().max()).all()


@pytest.mark.parametrize("row", ("counted", "not counted"))
def test_nan_is_no_finite_lie(row):
    likelihood, x, p = (
        NegativeBinomial("softmax", "log"),
        counts(torch.float32),
        given(LINKED["NegativeBinomial, softmax, log"]),
    )
    w = torch.ones(B, 1, device=DEVICE)
    w[1] = row == "counted"
    with torch.no_grad():
        p[0][1, 3] = torch.nan
    found = fastelbo.nll(recon_x(p), x, likelihood=likelihood, weight=w)
    by_logits, by_theta, by_library = gradients(found, *p)
    if row == "counted":
        assert found.isnan() and by_logits[1].isnan().all() and by_library[1].isnan() and by_theta.isnan().all()
        assert by_logits[[0, 2, 3, 4, 5]].isfinite().all()
    else:
        assert found.isfinite() and all(g.isfinite().all() for g in (by_logits, by_theta, by_library))
        assert (by_logits[1] == 0).all() and (by_library[1] == 0).all()


@pytest.mark.skipif(COMPILED, reason="as any other likelihood's")
@pytest.mark.parametrize(
    "name", ("Poisson, softplus", "NegativeBinomial, softmax, log", "ZeroInflatedNegativeBinomial, softmax, log")
)
def test_operators(name, monkeypatch):
    """Of a tracer, for which nothing is kept; also with four parameters."""
    likelihood, x, w = LINKED[name], counts(), weights("genes")
    torch.compiler.reset()
    call = torch.compile(
        lambda p, x, w: fastelbo.nll(recon_x(p), x, likelihood=likelihood, weight=w), fullgraph=True, backend="aot_eager"
    )
    for needs in ((True, True, True, True), (True, False, False, False), (False, True, True, True)):
        p = [t.detach().requires_grad_(need) for t, need in zip(given(likelihood), needs, strict=False)]
        wanted = [t for t in p if t.requires_grad]
        if not wanted:
            continue
        truth = by_composition(likelihood, p, x, weight=w)
        with monkeypatch.context() as patch:
            for method in ("nll", "link") if BACKEND == "triton" else ():
                patch.setattr(type(likelihood), method, lambda *args: pytest.fail("a formula"))
            found = call(p, x, w)
            by_call = gradients(found, *wanted)
        assert relative(found, truth) < 1e-12
        for g, t in zip(by_call, gradients(truth, *wanted), strict=True):
            assert relative(g, t) < 1e-12


@pytest.mark.skipif(BACKEND != "triton", reason="about the kernels")
@pytest.mark.parametrize("layout", ("dense", "csr"))
@pytest.mark.parametrize("name", [name for name in LINKED if not name.endswith("identity")])  # which decides nothing here
def test_launches(name, layout, monkeypatch):
    """The kernels compute it, and no formula does: two launches forward where a row's softmax is one of them, and else one."""
    from fastelbo.kernels.direct import Launch

    def nothing(*args):
        raise AssertionError("a formula")

    launches, launch = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel.__name__), launch(self, *args)))
    likelihood, x = LINKED[name], counts(torch.float32)
    for method in ("nll", "sparse_nll", "one_pass", "sparse_one_pass", "link"):
        monkeypatch.setattr(type(likelihood), method, nothing)
    monkeypatch.setattr("torch.softmax", nothing)
    monkeypatch.setattr("torch.exp", nothing)
    target = x.to_sparse_csr() if layout == "csr" else x
    main = ["reconstruction_kernel", "nonzeros_kernel"] if layout == "csr" else ["reconstruction_kernel"]
    forward, backward = main, main
    if likelihood.mean == "softmax":
        forward = ["softmax_kernel", *main]
    elif likelihood == Poisson("softplus") and layout == "dense":
        forward, backward = ["loss_fwd_kernel"], ["loss_bwd_kernel"]
    for _ in range(2):
        p = given(likelihood, torch.float32)
        value = fastelbo.nll(recon_x(p), target, likelihood=likelihood, reduction="none")
        assert launches == forward
        launches.clear()
        value.sum().backward()
        assert launches == backward
        launches.clear()
        with torch.no_grad():
            fastelbo.nll(recon_x(p), target, likelihood=likelihood)
        assert launches == forward
        launches.clear()


@pytest.mark.skipif(BACKEND != "triton", reason="about the kernels")
@pytest.mark.parametrize("name", ("NegativeBinomial, log, log", "NegativeBinomial, softmax, log"))
def test_no_mean_in_memory(name, monkeypatch):
    """What is as large as the target: one gradient, and the derivatives by dispersions of genes until they are added up."""
    likelihood, x = LINKED[name], counts(torch.float32)
    p, found, made = given(likelihood, torch.float32), [], torch.empty_strided
    p[1].requires_grad_(False)
    monkeypatch.setattr(
        torch, "empty_strided", lambda size, *args, **kw: (found.append(tuple(size)), made(size, *args, **kw))[1]
    )
    value = fastelbo.nll(recon_x(p), x, likelihood=likelihood)
    if DEVICE.type == "cpu":
        assert found.count((B, G)) == (0 if likelihood.mean == "softmax" else 1)
        value.backward()
        assert found.count((B, G)) == 1


def test_records():
    likelihood = NegativeBinomial("softmax", "log", target_scale=2.0)
    assert pickle.loads(pickle.dumps(likelihood)) is likelihood
    assert repr(likelihood) == "NegativeBinomial(target_scale=2.0, mean='softmax', inverse_dispersion='log')"
    assert NegativeBinomial() is NegativeBinomial("identity", "identity")
    assert NegativeBinomial("log").kernel == NegativeBinomial().kernel == "negative_binomial"


@pytest.mark.parametrize(
    ("make", "words"),
    (
        (
            lambda: NegativeBinomial(mean="exp"),
            "mean must be one of 'identity', 'log', 'softplus', 'softmax'; got",
        ),
        (lambda: NegativeBinomial(inverse_dispersion="softplus"), "inverse_dispersion must be one of 'identity', 'log'; got"),
        (lambda: Poisson(mean="log"), "that likelihood is PoissonLog, or 'poisson_log'"),
        (lambda: Poisson(mean=3), "Poisson.mean must be one of"),
    ),
)
def test_unknown_links(make, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make()


LOGITS = torch.zeros(G, G)


@pytest.mark.parametrize(
    ("tensors", "words"),
    (
        ((LOGITS, torch.ones(G)), r"tuple \(logits of the mean, inverse_dispersion, library\) for .*, got 2 tensors"),
        ((LOGITS, torch.ones(G), torch.ones(G)), r"recon_x\[2\], the library, must have one number for each row, \[B, 1\]"),
        ((LOGITS[0], torch.ones(G), 1.0), r"recon_x\[0\] must be \[B, G\] or have more dimensions for the link 'softmax'"),
        ((LOGITS, torch.ones(G), -1.0), r"recon_x\[2\] must not be negative"),
        ((LOGITS, torch.ones(G), -torch.ones(G, 1)), r"recon_x\[2\] must not be negative"),
        ((LOGITS, -torch.ones(G), torch.ones(G, 1)), r"recon_x\[1\] must be positive"),
    ),
)
def test_errors(tensors, words):
    x = torch.ones_like(tensors[0])
    with pytest.raises(ValueError, match=words):
        fastelbo.nll(tensors, x, likelihood=NegativeBinomial("softmax"))


@pytest.mark.parametrize(
    "likelihood", (NegativeBinomial("log", "log"), ZeroInflatedNegativeBinomial("softplus", "log")), ids=str
)
def test_a_dispersion_of_a_column(likelihood, monkeypatch):
    """As one of each batch of cells is; also in a block of one row, whose shape it has."""
    monkeypatch.setattr("fastelbo.engine.blocks.BLOCK", 40)
    monkeypatch.setattr("fastelbo.engine.blocks.THREAD", 1)
    table, x = torch.randn(20, 3, device=DEVICE, requires_grad=True), torch.poisson(torch.rand(5, 20, device=DEVICE))
    own = [torch.randn(5, 20, device=DEVICE, requires_grad=True) for _ in likelihood.parameters[1:]]
    leaves = table, *own

    def of(rows, column, more):
        return fastelbo.nll((rows, column, *more), x, likelihood=likelihood)

    found = gradients(of(own[0], table[:, 1], own[1:]), *leaves)
    expected = gradients(of(own[0], table[:, 1].contiguous(), own[1:]), *leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0][:, 1].abs().min() > 0
