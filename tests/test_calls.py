"""What a call costs on the host, in counts, which do not depend on the machine: Python calls and, by kernel, launches."""

import functools
import sys

import pytest
import torch

import fastelbo
from bench import host
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


# Python calls forward and backward; of torch 2.13, its operators and allocations.
MOST = {
    "loss, bernoulli": (27, 27, 60, 13),
    "loss, bernoulli_logits": (33, 27, 51, 13),
    "loss, mse": (16, 23, 31, 11),
    "loss, learned scale": (47, 27, 83, 18),
    "loss, mask": (37, 27, 56, 11),
    "loss, prior": (37, 24, 49, 20),
    "loss, free bits": (28, 23, 68, 18),
    "kl_divergence": (10, 23, 16, 7),
    "kl_divergence, log_std": (32, 24, 21, 9),
    "sample_kl + loss": (46, 36, 93, 22),
    "elbo": (38, 27, 91, 24),
}


@pytest.fixture(scope="module")
def counted():
    return host.measure(torch.device("cpu"))


@counts_calls
@pytest.mark.parametrize("name", MOST)
def test_a_repeated_call_costs_no_more_than_it_did(name, counted):
    ours = counted[name][0]
    size = 4 if torch.__version__.startswith("2.13.") else 2
    assert all(a <= b for a, b in zip(ours[:size], MOST[name][:size], strict=True)), (ours, MOST[name])


@counts_calls
def test_elbo_is_no_dearer_than_its_parts(counted):
    elbo, parts = counted["elbo"][0], counted["sample_kl + loss"][0]
    assert elbo.python - 1 <= parts.python  # the decoder is a call itself
    # Autograd samples few latents, by an operator more and two Python calls less.
    assert elbo.backward <= parts.backward and elbo.operators <= parts.operators + 1


@counts_calls
def test_what_is_counted():
    """By functions of which all is known."""

    def leaf(x):
        return x * 2  # one operator, one allocation; its backward is another, after that of a sum

    x = torch.ones(3, requires_grad=True)
    found = host.count(lambda: leaf(x).sum(), torch.device("cpu"))
    assert found.python == 1
    more = host.count(lambda: leaf(leaf(x)).sum(), torch.device("cpu"))
    assert more.python == 2 and more.operators > found.operators and more.allocations > found.allocations


@counts_calls
def test_counts_of_items_take_few_operators():
    """Threads share each, which takes them as long to begin and to end as some thousand elements do."""
    logits, x = torch.randn(4, 5000).requires_grad_(), torch.poisson(torch.rand(4, 5000))
    found = host.count(lambda: fastelbo.nll(logits, x, likelihood="multinomial"), torch.device("cpu"))
    assert found.operators <= 67 or not torch.__version__.startswith("2.13.")


@counts_calls
@pytest.mark.parametrize(("name", "most"), (("kl_divergence", 1), ("sample_kl", 2), ("loss", 1)))
def test_many_latents_take_no_exponential_twice(name, most):
    """Backward finds what forward kept."""
    mu, logvar = (torch.randn(128, 512).requires_grad_() for _ in range(2))
    recon_x = torch.randn(128, 10).requires_grad_()
    call = {
        "kl_divergence": lambda: fastelbo.kl_divergence(mu, logvar),
        "sample_kl": lambda: sum(t.sum() for t in fastelbo.sample_kl(mu, logvar)),
        "loss": lambda: fastelbo.loss(recon_x, torch.zeros(128, 10), mu, logvar, likelihood="gaussian").loss,
    }[name]
    call().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as found:
        call().backward()
    assert sum(e.name in ("aten::exp", "aten::exp_", "aten::expm1") for e in found.events()) == most


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
        found.append((numbers, list(launches), calls(call, 4) if BACKEND == "torch" else 0))  # 3 settle the guessed factor
    for numbers, launched, count in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][0], numbers, strict=True))
        assert launched == found[0][1] and len(launched) == (2 if BACKEND == "triton" else 0)
        assert count == found[0][2]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_name_is_the_object_with_its_defaults(name):
    assert type(BY_NAME[name])() is BY_NAME[name] == fastelbo.likelihoods.find_likelihood(name)
