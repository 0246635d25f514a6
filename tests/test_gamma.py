"""log Gamma, digamma and their increments against float64, sums of logarithms and Taylor's series."""

import math

import pytest
import torch

from conftest import BACKEND

if BACKEND != "triton":
    pytest.skip("the Torch backend uses Torch's own functions", allow_module_level=True)

from device_functions import SIZE, run_pair, run_triple
from fastelbo.kernels.gamma import lgamma_and_digamma, log_gamma_ratio
from support import APPROXIMATE

INF, NAN = float("inf"), float("nan")
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)


def padded(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, torch.ones(-len(values) % SIZE, dtype=values.dtype)])


def single(x, device):
    """log Gamma and digamma, of any number of elements, in float64 on the host."""
    return [t.cpu()[: len(x)].double() for t in run_pair(lgamma_and_digamma, padded(x).to(device))]


def ratio(a, n, device):
    """Likewise the three results of `log_gamma_ratio`."""
    return [t.cpu()[: len(a)].double() for t in run_triple(log_gamma_ratio, padded(a).to(device), padded(n).to(device))]


def worst(value, exact, scale, dtype):
    """The largest error, in units of the dtype's eps of the scale, without what two quotients of a compiled kernel may add."""
    error = ((value - exact).abs() / scale).max().item()
    return (error - (2 * APPROXIMATE if dtype == torch.float32 else 0.0)) / torch.finfo(dtype).eps


def logarithmic(low: float, high: float, count: int) -> torch.Tensor:
    return torch.exp(torch.empty(count, dtype=torch.float64).uniform_(math.log(low), math.log(high)))


# 1, 2 and 1.46163 are the zeros, 1, 2, 3 and 10 the places where the formula changes.
SPECIAL = (1.0, 1.4616321449683622, 2.0, 3.0, 10.0)


@DTYPES
def test_log_gamma_and_digamma(dtype, device):
    near = [place + sign * logarithmic(1e-8, 0.3, SIZE) for place in SPECIAL for sign in (1, -1)]
    wide = torch.logspace(-8, 8, 16 * SIZE), torch.linspace(0.001, 12, 16 * SIZE), torch.arange(1, 8 * SIZE)
    x = torch.cat([*wide, *near, 10 ** torch.arange(9.0)]).to(dtype)
    lgamma, digamma = single(x, device)
    exact_lgamma, exact_digamma = torch.lgamma(x.double()), torch.digamma(x.double())
    if dtype == torch.float32:
        # Relative at the zeros too, as far as float64 can tell.
        assert worst(lgamma, exact_lgamma, exact_lgamma.abs().clamp_min(1e-7), dtype) <= 4
        assert worst(digamma, exact_digamma, exact_digamma.abs().clamp_min(1e-6), dtype) <= 4
    else:
        assert worst(lgamma, exact_lgamma, exact_lgamma.abs().clamp_min(1), dtype) <= 60
        assert worst(digamma, exact_digamma, exact_digamma.abs().clamp_min(1), dtype) <= 15


@DTYPES
def test_log_factorials(dtype, device):
    counts = torch.arange(1500)
    exact = torch.tensor([math.log(math.factorial(n)) for n in counts.tolist()], dtype=torch.float64)
    value, _ = single((counts + 1).to(dtype), device)
    assert value[:2].tolist() == [0, 0]
    assert worst(value, exact, exact.clamp_min(1e-30), dtype) <= (2.5 if dtype == torch.float32 else 20)


@DTYPES
def test_the_ends(dtype, device):
    lgamma, digamma = single(torch.tensor([0.0, -0.0, -0.5, -3.0, -INF, NAN, INF], dtype=dtype), device)
    for value in (lgamma, digamma):
        assert value[:6].isnan().all()
        assert value[6] == INF


def check_ratio(results, exact, a, n, dtype, doubt=0):
    """The ratio to roundings of itself and of how far log Gamma can have fallen, the others to roundings of themselves.

    `doubt` is what the exact increase of digamma is itself known to.
    """
    limits = (4.0, 4.0, 3.0) if dtype == torch.float32 else (25.0, 10.0, 15.0)
    exact_ratio, exact_increase = exact
    fall = torch.log1p(n.double() / a.double())
    assert worst(results[0], exact_ratio, exact_ratio.abs() + fall, dtype) <= limits[0]
    increase_scale = exact_increase + doubt / torch.finfo(dtype).eps
    assert worst(results[1], exact_increase, increase_scale, dtype) <= limits[1]
    exact_digamma = torch.digamma(a.double() + n.double())
    assert worst(results[2], exact_digamma, exact_digamma.abs().clamp_min(1), dtype) <= limits[2]


def pairs(count):
    """Arguments over the whole range, and more of them where neither is large."""
    a = torch.cat([logarithmic(1e-8, 1e8, count), logarithmic(0.01, 100, count), 20 * torch.rand(count)])
    return a, torch.cat([logarithmic(1, 1000, count), logarithmic(1, 30, 2 * count)]).round()


@DTYPES
def test_ratio_of_whole_numbers_of_steps(dtype, device):
    """Gamma(a + n) / Gamma(a) is a (a + 1) ... (a + n - 1)."""
    a, n = (t.to(dtype) for t in pairs(2 * SIZE))
    a[:SIZE] = a[:SIZE].ceil()
    steps = [[x + i for i in range(int(y))] for x, y in zip(a.tolist(), n.tolist(), strict=True)]
    log_sums = torch.tensor([math.fsum(map(math.log, terms)) for terms in steps], dtype=torch.float64)
    inverse_sums = torch.tensor([math.fsum(1 / term for term in terms) for terms in steps], dtype=torch.float64)
    check_ratio(ratio(a, n, device), (log_sums, inverse_sums), a, n, dtype)


@DTYPES
def test_ratio_of_small_steps(dtype, device):
    """To the second order in n / a, which is small enough for the third to be nothing."""
    a = torch.cat([logarithmic(1e-8, 1e8, 4 * SIZE), logarithmic(0.1, 20, 4 * SIZE)]).to(dtype)
    n = (a.double() * logarithmic(1e-12, 1e-5 if dtype == torch.float32 else 1e-8, len(a))).to(dtype)
    x, h = a.double(), n.double()
    # Hurwitz's zeta, since torch.polygamma(1, x) has an error of 1e-10.
    first, second, third = torch.digamma(x), torch.special.zeta(2.0, x), -2 * torch.special.zeta(3.0, x)
    check_ratio(ratio(a, n, device), (h * first + h * h / 2 * second, h * second + h * h / 2 * third), a, n, dtype)


@DTYPES
def test_ratio_of_large_steps(dtype, device):
    """Where n is no less than a, the difference of the values is good enough, in float64."""
    a = torch.cat([logarithmic(1e-8, 1e8, 8 * SIZE), logarithmic(0.01, 20, 8 * SIZE)])
    n = a * logarithmic(1, 1e16, len(a))
    keep = n < 1e8
    a, n = a[keep].to(dtype), n[keep].to(dtype)
    x, y = a.double(), a.double() + n.double()
    exact = torch.lgamma(y) - torch.lgamma(x), torch.digamma(y) - torch.digamma(x)
    check_ratio(ratio(a, n, device), exact, a, n, dtype, doubt=2**-52 * (torch.digamma(y).abs() + exact[1]))


@DTYPES
def test_no_step_changes_nothing(dtype, device):
    a = torch.cat([logarithmic(1e-8, 1e8, SIZE), torch.arange(1.0, SIZE + 1)]).to(dtype)
    increase, slope, digamma = ratio(a, torch.zeros_like(a), device)
    assert not increase.any()
    assert not slope.any()
    exact = torch.digamma(a.double())
    assert worst(digamma, exact, exact.abs().clamp_min(1), dtype) <= (3 if dtype == torch.float32 else 15)


@DTYPES
def test_ratio_outside_its_domain_is_nan(dtype, device):
    a = torch.tensor([0.0, -1.0, NAN, 1.0, 1.0, 20.0, 20.0, -INF], dtype=dtype)
    n = torch.tensor([1.0, 3.0, 1.0, NAN, -0.5, NAN, -1.0, 1.0], dtype=dtype)
    for value in ratio(a, n, device):
        assert value.isnan().all()
    for a, n in ((INF, 1.0), (1.0, INF), (20.0, INF)):
        increase, slope, digamma = ratio(torch.tensor([a], dtype=dtype), torch.tensor([n], dtype=dtype), device)
        assert not increase.isfinite()
        assert not slope.isfinite()
        assert digamma == INF
