"""What a call costs on the host, in counts, which do not depend on the machine: Python calls and, by kernel, launches."""

import functools
import sys

import pytest
import torch

import fastelbo
from conftest import BACKEND
from fastelbo import Posterior, Weighting
from fastelbo.likelihoods import BY_NAME, Bernoulli, Gaussian
from support import gradients, make_inputs

SHAPE, LATENT = (128, 784), (128, 20)
pytestmark = pytest.mark.counts_launches
counts_calls = pytest.mark.skipif(BACKEND != "torch", reason="the interpreter of Triton makes calls of its own")


def calls(function, times=3) -> int:
    """Python function calls of the last of several."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    for i in range(times):
        if i == times - 1:
            sys.setprofile(profile)
        try:
            result = function()
        finally:
            sys.setprofile(None)
        outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None and t.requires_grad]
        sum(t.sum() for t in outputs).backward()
    return count - 1  # `function` itself


@counts_calls
@pytest.mark.parametrize("name", ("bernoulli", "bernoulli_logits", "mse", "gaussian"))
def test_loss(name):
    recon_x, x, mu, logvar = make_inputs(name, SHAPE, LATENT)
    assert calls(lambda: fastelbo.loss(recon_x, x, mu, logvar, likelihood=name)) <= 20


@counts_calls
def test_parts():
    _, _, mu, logvar = make_inputs("mse", SHAPE, LATENT)
    assert calls(lambda: fastelbo.sample_kl(mu, logvar)) <= 15
    assert calls(lambda: fastelbo.kl_divergence(mu, logvar)) <= 13


@counts_calls
@pytest.mark.parametrize("name", ("mse", "bernoulli_logits"))
def test_elbo_is_no_dearer_than_its_parts(name):
    _, x, mu, logvar = make_inputs(name, SHAPE, LATENT)
    weight = torch.randn(20, 784, requires_grad=True)

    def composed():
        z, kl = fastelbo.sample_kl(mu, logvar)
        return fastelbo.loss(z @ weight, x, kl=kl, likelihood=name)

    def fused():
        return fastelbo.elbo(lambda z: z @ weight, x, mu, logvar, likelihood=name)

    assert calls(fused) - 1 <= 1.1 * calls(composed)  # the decoder is a call itself


SPELLINGS = {
    "bernoulli": ({"likelihood": "bernoulli"}, {"likelihood": Bernoulli()}, {}),
    "gaussian": ({"likelihood": "gaussian"}, {"likelihood": Gaussian()}, {"likelihood": Gaussian(scale=1, parameter="scale")}),
    "posterior": ({}, {"posterior": "logvar"}, {"posterior": Posterior()}, {"posterior": Posterior("logvar", (None, None))}),
    "weighting": ({}, {"weighting": None}, {"weighting": Weighting()}),
    "reduction": ({"reduction": "mean"}, {"reduction": ("mean", "mean")}, {"reduction": ["mean", "mean"]}),
}


@pytest.fixture
def launches(monkeypatch):
    """The launches of kernels through Triton's interpreter, or none on the Torch backend."""
    found = []
    if BACKEND == "triton":
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__
        monkeypatch.setattr(
            GridExecutor, "__call__", lambda self, *a, **k: found.append(self.fn.__name__) or launch(self, *a, **k)
        )
    return found


@pytest.mark.parametrize("case", SPELLINGS)
def test_spelling_does_not_change_the_path(case, launches):
    """The same Python calls and launches, and the same numbers to the last bit."""
    recon_x, x, mu, logvar = make_inputs("bernoulli", (3, 7), (3, 2))
    found = []
    for options in SPELLINGS[case]:
        call = functools.partial(fastelbo.loss, recon_x, x, mu, logvar, **options)
        launches.clear()
        terms = call()
        numbers = [*terms, *gradients(terms.loss, recon_x, mu, logvar)]
        found.append((numbers, list(launches), calls(call) if BACKEND == "torch" else 0))
    for numbers, launched, count in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][0], numbers, strict=True))
        assert launched == found[0][1] and len(launched) == (2 if BACKEND == "triton" else 0)
        assert count == found[0][2]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_name_is_the_object_with_its_defaults(name):
    assert type(BY_NAME[name])() is BY_NAME[name] == fastelbo.likelihoods.find_likelihood(name)
