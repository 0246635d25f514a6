"""The noise: standard normal to the far tail, keyed on (seed, index), the same in forward and backward."""

import math

import pytest
import torch

import fastelbo
from conftest import BACKEND
from support import gradients, relative

triton_only = pytest.mark.skipif(BACKEND != "triton", reason="the kernels' own noise")


def standard_normals(*shape, device, **kwargs):
    zeros = torch.zeros(*shape, device=device)
    return fastelbo.reparameterize(zeros, zeros, **kwargs)


@triton_only
def test_ten_million_normals(device):
    z = standard_normals(10_000_000, device=device).double().cpu()
    n = len(z)
    # Kolmogorov and Smirnov: the largest distance of the two distribution functions, at a significance of 1e-3.
    distance = (torch.special.ndtr(z.sort().values) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance + 0.5 / n < 1.949 / n**0.5
    for sigma in (3, 4):
        for tail in ((z > sigma).sum().item(), (z < -sigma).sum().item()):
            expected = n * 0.5 * math.erfc(sigma / math.sqrt(2))
            assert abs(tail - expected) < 5 * expected**0.5
    assert z.abs().max() > 5
    # Neighbours, which share a Philox call or a Box-Muller radius, are independent in value and in magnitude.
    for lag in (1, 2, 3, 4):
        for series in (z, z.abs()):
            a, b = series[:-lag] - series.mean(), series[lag:] - series.mean()
            assert abs((a * b).mean() / series.var()) < 5 / n**0.5


def test_seed_and_generator(device):
    def draw(seed):
        torch.manual_seed(seed)
        return standard_normals(3, 50, device=device)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(standard_normals(3, 50, device=device), standard_normals(3, 50, device=device))
    own = [standard_normals(3, 50, device=device, generator=torch.Generator(device).manual_seed(4)) for _ in range(2)]
    assert torch.equal(*own)


def test_two_calls_share_no_noise(device):
    z = torch.cat([standard_normals(1, 10_000, device=device) for _ in range(4)])
    correlation = torch.corrcoef(z) - torch.eye(4, device=device)
    assert correlation.abs().max() < 0.06


@pytest.mark.parametrize("features", (1, 3, 16, 37, 2053))
@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_backward_has_the_noise_of_forward(features, reduction, device):
    """Also where a row starts in the middle of a Philox call."""
    mu = torch.zeros(5, features, device=device, requires_grad=True)
    logvar = torch.zeros(5, features, device=device, requires_grad=True)
    z, kl = fastelbo.sample_kl(mu, logvar, reduction=reduction)
    upstream = torch.randn_like(z)
    (gradient,) = gradients(z, logvar, grad_outputs=upstream)
    torch.testing.assert_close(gradient, 0.5 * upstream * z.detach())
    assert not kl.detach().any()


def test_noise_depends_on_the_index_only(device):
    """Not on reduction, dtype of the mean, or how the work is cut."""
    zeros = torch.zeros(7, 37, device=device)
    samples = []
    for reduction in ("sum", "none"):
        torch.manual_seed(9)
        samples.append(fastelbo.sample_kl(zeros, zeros, reduction=reduction).z)
    torch.manual_seed(9)
    samples.append(fastelbo.reparameterize(zeros, zeros))
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])
    if BACKEND == "triton":
        torch.manual_seed(9)
        longer = torch.zeros(7 * 37 + 5, device=device)
        assert torch.equal(fastelbo.reparameterize(longer, longer)[: 7 * 37], samples[0].flatten())


@triton_only
def test_noise_is_one_stream_however_it_is_cut(device):
    from device_functions import run_normals

    seed = torch.tensor(-5, device=device)
    whole = run_normals(seed, 4096, 4096, True)
    for size, aligned in ((16, True), (128, True), (512, True), (1024, True), (1024, False)):
        assert torch.equal(run_normals(seed, 4096, size, aligned), whole)


@pytest.mark.skipif(BACKEND != "torch", reason="the values of torch.randn_like are the Torch backend's")
@pytest.mark.parametrize("of", (fastelbo.reparameterize, lambda *latents: fastelbo.sample_kl(*latents).z), ids=("z", "with KL"))
@pytest.mark.parametrize("size", (6, 3000), ids=("few", "many"))
@pytest.mark.parametrize(
    "lie",
    {
        "contiguous": lambda t: t,
        "channels last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 1),
        "halves": lambda t: t.chunk(2, 1)[0],
        "halves of channels last": lambda t: t.to(memory_format=torch.channels_last).chunk(2, 1)[1],
        "every other": lambda t: t[:, :, ::2],
    }.items(),
    ids=lambda item: item[0],
)
def test_the_naive_codes_own_z(lie, size, of, device):
    """However the latents lie."""
    mu, logvar = (lie[1](torch.randn(3, 4, 5, size, device=device)) for _ in range(2))
    torch.manual_seed(11)
    z = of(mu, logvar)
    torch.manual_seed(11)
    assert torch.equal(z, fastelbo.reference.reparameterize(mu, logvar))
    generator = torch.Generator(device).manual_seed(11)
    if of is fastelbo.reparameterize:
        assert torch.equal(of(mu, logvar, generator=generator), z)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64), ids=str)
def test_sample_is_mu_plus_std_times_eps(dtype, device):
    mu, logvar, eps = (torch.randn(33, 129, device=device).to(dtype) for _ in range(3))
    mu.requires_grad_()
    logvar.requires_grad_()
    z, kl = fastelbo.sample_kl(mu, logvar, eps=eps)
    m, lv, e = (t.detach().double().requires_grad_() for t in (mu, logvar, eps))
    exact = m + torch.exp(0.5 * lv) * e
    exact_kl = -0.5 * (1 + lv - m.square() - lv.exp()).sum()
    tolerance = 2 * torch.finfo(dtype).eps
    assert z.dtype == dtype
    assert relative(z, exact) <= tolerance
    assert relative(kl, exact_kl) <= 2e-7
    upstream = torch.randn_like(z)
    got = gradients((z * upstream).sum() + 0.3 * kl, mu, logvar)
    expected = gradients((exact * upstream.double()).sum() + 0.3 * exact_kl, m, lv)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) <= tolerance


def test_dtypes_of_mu_and_logvar_may_differ(device):
    mu = torch.randn(4, 5, device=device, dtype=torch.bfloat16, requires_grad=True)
    logvar = torch.randn(4, 5, device=device, requires_grad=True)
    z, kl = fastelbo.sample_kl(mu, logvar, eps=torch.ones_like(logvar))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, mu.float() + torch.exp(0.5 * logvar))
    grads = gradients(z.sum() + kl, mu, logvar)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(grads[0], (1 + mu.detach().float()).bfloat16())
