"""The kernels' own elementary functions against float64."""

import pytest
import torch

from conftest import BACKEND

if BACKEND != "triton":
    pytest.skip("the Torch backend uses Torch's own functions", allow_module_level=True)

from device_functions import SIZE, run_box_muller, run_logarithms, run_pair
from fastelbo.kernels.numerics import exp_and_expm1, exp_and_softplus


def relative_error(value, exact):
    return ((value.double() - exact) / exact.abs().clamp_min(1e-300))[exact != 0].abs().max().item()


def padded(values) -> torch.Tensor:
    return torch.cat([values, torch.zeros(-len(values) % SIZE, dtype=values.dtype)])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_exp_and_expm1(dtype, device):
    wide = torch.linspace(-86.9, 88.3, 100 * SIZE, dtype=dtype)
    near_zero = torch.cat([s * torch.logspace(-30, 0, 20 * SIZE, dtype=dtype) for s in (1, -1)])
    for x in (wide, near_zero):
        exp, expm1 = (t.cpu() for t in run_pair(exp_and_expm1, x.to(device)))
        eps = torch.finfo(dtype).eps
        assert relative_error(exp, torch.exp(x.double())) <= 1.5 * eps
        assert relative_error(expm1, torch.expm1(x.double())) <= 3 * eps


def test_exp_at_the_ends(device):
    inf, nan = float("inf"), float("nan")
    x = padded(torch.tensor([88.72, 88.73, 89.0, 1e30, inf, -87.1, -1e30, -inf, nan, 0.0]))
    exp, expm1 = (t[:10].tolist() for t in run_pair(exp_and_expm1, x.to(device)))
    assert exp[0] == pytest.approx(3.3931e38, rel=1e-4)
    assert exp[1:8] == [inf, inf, inf, inf, 0, 0, 0]
    assert expm1[1:8] == [inf, inf, inf, inf, -1, -1, -1]
    assert exp[8] != exp[8]
    assert expm1[8] != expm1[8]
    assert (exp[9], expm1[9]) == (1, 0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_exp_and_softplus(dtype, device):
    x = -torch.cat([torch.linspace(0, 86.9, 99 * SIZE, dtype=dtype), torch.logspace(-30, 1.9, SIZE, dtype=dtype)])
    exp, softplus = (t.cpu() for t in run_pair(exp_and_softplus, x.to(device)))
    eps = torch.finfo(dtype).eps
    # A GPU's ex2.approx may itself be off by 1.4 eps.
    assert relative_error(exp, torch.exp(x.double())) <= 3 * eps
    assert relative_error(softplus, torch.log1p(torch.exp(x.double()))) <= 4 * eps
    ends = padded(torch.tensor([-87.5, -1e30, -float("inf"), float("nan")], dtype=dtype))
    for result in run_pair(exp_and_softplus, ends.to(device)):
        assert (result[:3] >= 0).all()
        assert (result[:3] < 2e-38).all()
        assert result[3] != result[3]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_logarithms(dtype, device):
    eps = torch.finfo(dtype).eps
    positive = torch.cat([torch.logspace(-44.5, 0, 50 * SIZE, dtype=dtype), torch.linspace(0.5, 1, 50 * SIZE, dtype=dtype)])
    log, of_positive, log1p = (t.cpu() for t in run_logarithms(positive.to(device)))
    assert torch.equal(log, of_positive)
    assert relative_error(log, torch.log(positive.double())) <= 1.5 * eps
    assert relative_error(log1p, torch.log1p(positive.double())) <= 3 * eps
    negative = torch.where(positive == 1, 0, -positive)
    _, _, log1p = run_logarithms(negative.to(device))
    assert relative_error(log1p.cpu(), torch.log1p(negative.double())) <= 3 * eps


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_logarithms_at_the_ends(dtype, device):
    """`log` is Torch's there. Of 0, of either sign, the others make no infinity, but what is below all clamps; NaN stays NaN in
    log1p."""
    inf, nan, tiny = float("inf"), float("nan"), torch.finfo(dtype).tiny
    x = torch.tensor([0.0, -0.0, inf, nan, -nan, -1.0, -tiny / 4, -inf, tiny, tiny / 4, torch.finfo(dtype).max], dtype=dtype)
    log, _, _ = run_logarithms(padded(x).to(device))
    torch.testing.assert_close(log[: len(x)].cpu(), torch.log(x), rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    _, of_positive, log1p = run_logarithms(padded(torch.tensor([0.0, -0.0, nan, -1.0], dtype=dtype)).to(device))
    assert (of_positive[:2] < -100).all()
    assert log1p[0] == log1p[1] == 0
    assert log1p[2].isnan()
    assert log1p[3] < -100


def test_box_muller_at_the_extreme_integers(device):
    edges = torch.tensor([0, 1, 2, 3, -1, -2, 2**31 - 1, -(2**31), 2**29, -(2**29), 2**30, -(2**30)])
    edges = torch.cat([edges, edges + 1, edges - 1]).clamp(-(2**31), 2**31 - 1)
    random = torch.randint(-(2**31), 2**31, (2**16 - len(edges) ** 2, 2))
    pairs = torch.cat([torch.cartesian_prod(edges, edges), random])
    out = run_box_muller(*(p.contiguous().to(device, torch.int32) for p in pairs.T)).double().cpu()
    # u is what the kernel rounds to float32: near 1 its logarithm depends on it. The rest is float64.
    u = ((pairs[:, 0] & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2 * torch.log(u.double()))
    angle = 2 * torch.pi * (pairs[:, 1] & 0xFFFFFFFF).double() * 2.0**-32
    assert (out[0] - radius * torch.cos(angle)).abs().max() < 5e-6
    assert (out[1] - radius * torch.sin(angle)).abs().max() < 5e-6
    assert 6.7 < out.abs().max() < 6.8
