"""The same tests run for both backends, a process each: `FASTELBO_BACKEND` and `TRITON_INTERPRET` choose (see Makefile)."""

import os

import pytest
import torch

from fastelbo.engine import plan, traced
from fastelbo.likelihoods import L1, MSE, Bernoulli, BernoulliLogits

torch.backends.cudnn.allow_tf32 = False  # with the 10 bits of a product that it has by default, nothing agrees

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)  # tensors are small here, and a second thread waits for the process that tests the other backend
BACKEND = os.environ.get("FASTELBO_BACKEND") or ("triton" if DEVICE.type == "cuda" else "torch")
INTERPRETED = BACKEND == "triton" and DEVICE.type == "cpu"
COMPILED = BACKEND == "triton" and os.environ.get("TRITON_INTERPRET") != "1"

# Of what no backend has a part in, which the process of the other one tests.
once = pytest.mark.skipif(INTERPRETED, reason="the same for both backends, and Torch's is faster")


if INTERPRETED and not COMPILED:
    from interpreter import quicken

    quicken()


@pytest.fixture(autouse=True)
def _operators(monkeypatch):
    """Compiled calls reach the kernels, however small the tensors of a test are."""
    if BACKEND == "triton":
        monkeypatch.setattr(traced, "KERNELS_PAY", 0)


_kinds: dict = {}  # of launches, by their names


@pytest.fixture(autouse=True)
def _named_kinds(monkeypatch):
    """What a caller names as one kind of a launch is one, with the same tensors and dtypes: on a GPU nobody looks at them."""
    if BACKEND != "triton":
        return
    from fastelbo.kernels import direct

    launch = direct.Launch.__call__

    def checked(self, programs, tensors, numbers, kind=None):
        if kind is not None:
            found = tuple(t if t is None else t.dtype for t in tensors)
            assert _kinds.setdefault((self, kind), found) == found, (self.kernel, kind)
        return launch(self, programs, tensors, numbers, kind)

    monkeypatch.setattr(direct.Launch, "__call__", checked)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def by_functions(monkeypatch):
    """No sums by functions of Torch's own, which few elements on a CPU would take (`test_by_torch`)."""
    for kind in (L1, MSE, Bernoulli, BernoulliLogits):
        monkeypatch.setattr(kind, "sum_by_torch", None)
    for table in ("_plans", "_last"):  # which know of them
        monkeypatch.setattr(plan, table, {})


@pytest.fixture(autouse=True)
def _poison(request, monkeypatch):
    """Memory that nobody has written holds NaN, so that an element left out shows. Not where launches are counted."""
    if request.node.get_closest_marker("counts_launches"):
        return

    def poisoned(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    if BACKEND == "triton":
        from fastelbo.kernels import direct, launch

        monkeypatch.setattr(launch, "kept_scratch", {})  # what is kept for partial sums, too
        if direct._empty_cuda is not None:
            monkeypatch.setattr(direct, "_empty_cuda", poisoned(direct._empty_cuda))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_strided", poisoned(torch.empty_strided))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
