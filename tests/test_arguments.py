"""What may be passed, and what it means: reductions, beta, targets, layouts, sizes."""

import fractions

import pytest
import torch

import fastelbo
from fastelbo.likelihoods import BernoulliLogits, Gaussian
from support import LIKELIHOODS, gradients, make_inputs, naive, options

REDUCTIONS = (
    "sum",
    "batchmean",
    "mean",
    "none",
    *((a, b) for a in ("sum", "batchmean", "mean") for b in ("sum", "batchmean", "mean")),
)


def reduced(reduction, likelihood, inputs, beta):
    """The naive code, sample by sample, reduced by hand."""
    samples = [naive(*(t[i : i + 1] for t in inputs), **options(likelihood)) for i in range(len(inputs[0]))]
    recon, kl = (torch.stack([s[j] for s in samples]) for j in (1, 2))
    if reduction == "none":
        return recon + beta * kl, recon, kl
    names = reduction if isinstance(reduction, tuple) else (reduction, reduction)
    sizes = inputs[0], inputs[2]
    divisors = [{"sum": 1, "batchmean": len(t), "mean": t.numel()}[name] for name, t in zip(names, sizes, strict=True)]
    recon, kl = recon.sum() / divisors[0], kl.sum() / divisors[1]
    return recon + beta * kl, recon, kl


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_reductions(likelihood, reduction, device):
    inputs = make_inputs(likelihood, (5, 2, 21), (5, 3, 11), device=device)
    got = fastelbo.loss(*inputs, 0.3, reduction=reduction, **options(likelihood))
    expected = reduced(reduction, likelihood, inputs, 0.3)
    wrt = inputs[0], inputs[2], inputs[3]
    upstream = torch.randn_like(got.loss)
    torch.testing.assert_close(list(got), list(expected))
    torch.testing.assert_close(
        gradients(got.loss, *wrt, grad_outputs=upstream), gradients(expected[0], *wrt, grad_outputs=upstream)
    )


@pytest.mark.parametrize("features, latent", ((32, 16), (37, 5), (1, 1), (1040, 1029)))
def test_none_with_aligned_and_ragged_rows(features, latent, device):
    inputs = make_inputs("mse", (6, features), (6, latent), device=device)
    got = fastelbo.loss(*inputs, 0.3, reduction="none", likelihood="mse")
    expected = reduced("none", "mse", inputs, 0.3)
    torch.testing.assert_close(list(got), list(expected))
    wrt = inputs[0], inputs[2], inputs[3]
    torch.testing.assert_close(gradients(got.loss.sum(), *wrt), gradients(expected[0].sum(), *wrt))


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean", "none"))
def test_given_kl(reduction, device):
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), device=device)
    whole = fastelbo.loss(recon_x, x, mu, logvar, 0.3, reduction=reduction, likelihood="mse")
    kl = fastelbo.sample_kl(mu, logvar, reduction=reduction).kl
    got = fastelbo.loss(recon_x, x, kl=kl, beta=0.3, reduction=reduction, likelihood="mse")
    torch.testing.assert_close(list(got), list(whole))
    wrt = recon_x, mu, logvar
    torch.testing.assert_close(gradients(got.loss.sum(), *wrt), gradients(whole.loss.sum(), *wrt))


@pytest.mark.parametrize(
    "layout", (lambda kl: kl[:1].expand(5), lambda kl: kl.repeat_interleave(2)[::2]), ids=("expanded", "strided")
)
def test_given_kl_of_samples_in_any_layout(layout, device):
    recon_x, x, _, _ = make_inputs("mse", (5, 9), (5, 3), device=device)
    kl = layout(torch.rand(5, device=device)).requires_grad_()
    got = fastelbo.loss(recon_x, x, kl=kl, beta=0.3, reduction="none", likelihood="mse")
    torch.testing.assert_close(got.loss, (recon_x - x).square().sum(1) + 0.3 * kl)
    upstream = torch.rand(5, device=device)
    torch.testing.assert_close(gradients(got.loss, kl, grad_outputs=upstream)[0], 0.3 * upstream)


@pytest.mark.parametrize(
    "beta",
    (2, 0.25, 0.0, -1.0, fractions.Fraction(1, 2), torch.tensor(0.5), torch.tensor(3), torch.tensor(0.1, dtype=torch.float64)),
    ids=repr,
)
def test_beta(beta, device):
    inputs = make_inputs("mse", (5, 9), (5, 3), device=device)
    for b in (beta, beta.to(device)) if isinstance(beta, torch.Tensor) else (beta,):
        loss, recon, kl = fastelbo.loss(*inputs, b, likelihood="mse")
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, recon + float(beta) * kl)
        (gradient,) = gradients(loss, inputs[2])
        torch.testing.assert_close(gradient, float(beta) * inputs[2].detach())


def test_beta_keeps_its_float64_digits(device):
    recon_x, x, mu, logvar = make_inputs("mse", (5, 9), (5, 3), torch.float64, device)
    loss, recon, kl = fastelbo.loss(recon_x, x, mu, logvar, 0.1, likelihood="mse")
    assert abs((loss - (recon + 0.1 * kl)) / loss) < 1e-15


@pytest.mark.parametrize("where", ("cpu", "device"))
def test_gradient_of_beta(where, device):
    inputs = make_inputs("mse", (5, 9), (5, 3), device=device)
    beta = torch.tensor(0.5, device=device if where == "device" else "cpu", requires_grad=True)
    loss, _, kl = fastelbo.loss(*inputs, beta, likelihood="mse", reduction="none")
    (2 * loss).sum().backward()
    assert beta.grad.device == beta.device
    torch.testing.assert_close(beta.grad.item(), 2 * kl.sum().item())


INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("prediction", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=str)
def test_target_dtypes(dtype, prediction, device):
    recon_x = torch.randn(4, 131, device=device).to(prediction).requires_grad_()
    x = (torch.rand(4, 131, device=device) > 0.5).to(dtype)
    kl = torch.zeros((), device=device)
    got = fastelbo.loss(recon_x, x, kl=kl, likelihood="bernoulli_logits").recon
    wide = recon_x.detach().double().requires_grad_()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(wide, x.double(), reduction="sum")
    torch.testing.assert_close(got.double(), expected, rtol=3e-7, atol=0)
    tolerance = torch.finfo(prediction).eps
    torch.testing.assert_close(
        gradients(got, recon_x)[0].double(), gradients(expected, wide)[0], rtol=tolerance, atol=tolerance
    )
    assert got.dtype == (torch.float64 if prediction == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_target_scale_of_bytes(dtype, device):
    recon_x = torch.rand(4, 131, device=device, dtype=dtype, requires_grad=True)
    x = torch.randint(0, 256, (4, 131), device=device, dtype=torch.uint8)
    kl = torch.zeros((), device=device)
    for likelihood in LIKELIHOODS:
        got = fastelbo.loss(recon_x, x, kl=kl, **options(likelihood, target_scale=1 / 255)).recon
        expected = naive(recon_x, x.to(dtype) / 255, *[torch.zeros(1, 1, device=device)] * 2, **options(likelihood))[1]
        rtol = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0)
        torch.testing.assert_close(gradients(got, recon_x), gradients(expected, recon_x), rtol=10 * rtol, atol=rtol)


@pytest.mark.parametrize("where", ("number", "weighted", "cpu", "device"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_scale(dtype, where, device):
    """A number of the likelihood, whatever a second tensor would be; or a tensor beside the means."""
    recon_x, x, mu, logvar = make_inputs("gaussian", (5, 9), (5, 3), dtype, device)
    for number in (0.1, 1, 30.0):
        likelihood, given, weight = Gaussian(scale=number, parameter="log_scale", soft_min=1.0), recon_x, None
        if where == "weighted":
            weight = torch.ones((), device=device)
        elif where != "number":
            scale = torch.tensor(number, dtype=dtype, device=device if where == "device" else "cpu")
            likelihood, given = "gaussian", (recon_x, scale)
        got = fastelbo.loss(given, x, mu, logvar, likelihood=likelihood, weight=weight).recon
        expected = -torch.distributions.Normal(recon_x, number).log_prob(x).sum()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, recon_x), gradients(expected, recon_x))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda t: t[:, :1].expand_as(t),
    "offset": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view_as(t),
}


@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_layouts(first, second, reduction, device):
    """Prediction and target, mu and logvar in each pair of layouts: the same numbers, whatever has to be copied."""
    recon_x, x, mu, logvar = (torch.randn(3, 4, 5, 6, device=device) for _ in range(4))
    recon_x, mu = (LAYOUTS[first](t).requires_grad_() for t in (recon_x, mu))
    x, logvar = LAYOUTS[second](x), LAYOUTS[second](logvar).requires_grad_()
    eps = torch.randn_like(recon_x)
    got = fastelbo.loss(recon_x, x, mu, logvar, reduction=reduction, likelihood="mse")
    z, kl = fastelbo.sample_kl(mu, logvar, eps=eps, reduction=reduction)
    expected = reduced(reduction, "mse", (recon_x, x, mu, logvar), 1.0)
    expected_z = mu + torch.exp(0.5 * logvar) * eps
    torch.testing.assert_close([*got, kl, z], [*expected, expected[2], expected_z])
    upstream = LAYOUTS[second](torch.randn(3, 4, 5, 6, device=device))
    ours = gradients(got.loss.sum() + (z * upstream).sum(), recon_x, mu, logvar)
    torch.testing.assert_close(ours, gradients(expected[0].sum() + (expected_z * upstream).sum(), recon_x, mu, logvar))


def test_channels_last_is_not_copied(device, monkeypatch):
    recon_x, x = (torch.rand(3, 4, 5, 6, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    recon_x.requires_grad_()
    loss = fastelbo.loss(recon_x, x, kl=torch.zeros((), device=device)).loss
    (gradient,) = gradients(loss, recon_x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    from fastelbo.engine.plan import find_objective, loss_plan

    plan = loss_plan("recon_x", find_objective("bernoulli", "logvar", "sum"), (recon_x, x), 1, False, 0, (1.0, 1.0))
    assert plan.is_dense


def test_halves_of_one_encoder_output(device):
    h = torch.randn(6, 8, 3, device=device, requires_grad=True)
    mu, logvar = h.chunk(2, dim=1)
    recon_x, x = torch.rand(6, 5, device=device), torch.rand(6, 5, device=device)
    got = gradients(fastelbo.loss(recon_x, x, mu, logvar).loss, h)
    mu, logvar = h.chunk(2, dim=1)
    torch.testing.assert_close(got, gradients(naive(recon_x, x, mu, logvar)[0], h))


@pytest.mark.parametrize("reduction", ("sum", "batchmean", "mean", "none"))
@pytest.mark.parametrize("shape", ((0, 3), (4, 0), (0, 0)), ids=str)
def test_empty_batches(shape, reduction, device):
    recon_x = torch.rand(shape, device=device, requires_grad=True)
    mu = torch.rand(shape, device=device, requires_grad=True)
    x = torch.rand(shape, device=device)
    got = fastelbo.loss(recon_x, x, mu, mu, reduction=reduction)
    if reduction == "none":
        expected = torch.zeros(shape[0], device=device)
    else:
        count = {"sum": 1, "batchmean": shape[0], "mean": 0}[reduction]
        expected = torch.zeros((), device=device) / count
    for term in got:
        torch.testing.assert_close(term.detach(), expected, equal_nan=True)
    got.loss.sum().backward()
    assert recon_x.grad.shape == mu.grad.shape == shape
    z, kl = fastelbo.sample_kl(mu, mu, reduction=reduction)
    assert z.shape == shape
    torch.testing.assert_close(kl.detach(), expected, equal_nan=True)


def test_results_are_float32_for_short_floats_and_float64_for_one_double(device):
    for dtypes, expected in (((torch.float16, torch.bfloat16), torch.float32), ((torch.float32, torch.float64), torch.float64)):
        recon_x, x, _, _ = make_inputs("mse", (5, 9), (5, 3), dtypes[0], device)
        _, _, mu, logvar = make_inputs("mse", (5, 9), (5, 3), dtypes[1], device)
        terms = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse")
        assert {t.dtype for t in terms} == {expected}
        assert gradients(terms.loss, recon_x)[0].dtype == dtypes[0]


@pytest.mark.parametrize("compiled", (False, True), ids=("", "compiled"))
def test_whose_dtype_counts(compiled, device):
    """That of predictions, latents, priors and a given KL: a float64 of anything else leaves results in float32."""
    p, x, mu, logvar = make_inputs("bernoulli", (5, 9), (5, 3), device=device)
    w, eps, one = torch.rand(5, 9, device=device), torch.randn(5, 3, device=device), torch.ones((), device=device)
    wide = {t: t.detach().double() for t in (p, x, mu, logvar, w, eps, one)}
    learned = wide[one].clone().requires_grad_()

    def decoder(z):
        return z.sigmoid().repeat(1, 3)

    def gaussian(scale, **options):
        return fastelbo.loss((p, scale), x, mu, logvar, likelihood="gaussian", **options).loss

    double = {
        "recon_x": lambda: fastelbo.loss(wide[p], x, mu, logvar).loss,
        "recon_x, weighted": lambda: fastelbo.loss(wide[p], x, mu, logvar, weight=w).loss,
        "recon_x[1]": lambda: gaussian(wide[w]),
        "recon_x[1], one for all": lambda: gaussian(wide[one]),
        "recon_x[1], one for all, weighted": lambda: gaussian(wide[one], weight=w),
        "recon_x[1], learned": lambda: gaussian(learned),
        "pos_weight": lambda: fastelbo.loss((p, wide[one]), x, mu, logvar, likelihood="bernoulli_logits").loss,
        "mu": lambda: fastelbo.loss(p, x, wide[mu], logvar).loss,
        "logvar": lambda: fastelbo.elbo(decoder, x, mu, wide[logvar], eps=eps).loss,
        "prior": lambda: fastelbo.kl_divergence(mu, logvar, (mu, wide[logvar])),
        "prior of a sample": lambda: fastelbo.sample_log_ratio(mu, logvar, prior=(wide[one], one), eps=eps).log_q,
        "kl": lambda: fastelbo.loss(p, x, kl=wide[one]).recon,
        "flow": lambda: fastelbo.sample_log_ratio(mu, logvar, flow=lambda z: (z, z.sum(1).double()), eps=eps).log_p,
    }
    single = {
        "x": lambda: fastelbo.loss(p, wide[x], mu, logvar).loss,
        "x of elbo": lambda: fastelbo.elbo(decoder, wide[x], mu, logvar, eps=eps).loss,
        "weight": lambda: fastelbo.loss(p, x, mu, logvar, weight=wide[w], reduction="mean").loss,
        "beta": lambda: fastelbo.loss(p, x, mu, logvar, wide[one]).loss,
        "beta, learned": lambda: fastelbo.loss(p, x, mu, logvar, learned).loss,
        "beta of dimensions": lambda: fastelbo.loss(p, x, mu, logvar, wide[eps][0]).loss,
        "scale": lambda: fastelbo.loss(p, x, mu, logvar, likelihood=Gaussian(scale=0.3)).loss,
        "scale, weighted": lambda: fastelbo.loss(p, x, mu, logvar, likelihood=Gaussian(scale=0.3), weight=w).loss,
        "pos_weight, a number": lambda: fastelbo.loss(p, x, mu, logvar, likelihood=BernoulliLogits(2.0)).loss,
        "capacity": lambda: fastelbo.loss(p, x, mu, logvar, weighting=fastelbo.Weighting(capacity=learned)).loss,
        "eps": lambda: fastelbo.sample_kl(mu, logvar, eps=wide[eps]).kl,
        "eps of log_likelihood": lambda: (
            fastelbo.log_likelihood(
                decoder, wide[x], mu, logvar, n_samples=1, eps=wide[eps][None], weight=wide[w]
            ).standard_error
        ),
    }
    for calls, expected in ((double, torch.float64), (single, torch.float32)):
        for name, call in calls.items():
            if compiled:
                torch.compiler.reset()
                call = torch.compile(call, backend="eager")
            assert call().dtype == expected, name


def test_module(device):
    inputs = make_inputs("mse", (5, 9), (5, 3), device=device)
    criterion = fastelbo.nn.ELBOLoss(likelihood="mse", beta=4.0, reduction="batchmean").to(device)
    torch.testing.assert_close(criterion(*inputs), fastelbo.loss(*inputs, 4.0, likelihood="mse", reduction="batchmean"))
    torch.testing.assert_close(criterion(*inputs, 0.5), fastelbo.loss(*inputs, 0.5, likelihood="mse", reduction="batchmean"))
    criterion.beta.fill_(2.0)
    twin = fastelbo.nn.ELBOLoss(likelihood="mse", reduction="batchmean").to(device)
    twin.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(twin(*inputs), fastelbo.loss(*inputs, 2.0, likelihood="mse", reduction="batchmean"))
    kl = fastelbo.sample_kl(inputs[2], inputs[3], reduction="batchmean").kl
    torch.testing.assert_close(twin(inputs[0], inputs[1], kl=kl).loss, twin(*inputs).loss)
    assert repr(twin) == "ELBOLoss(likelihood='mse', beta=2, reduction='batchmean')"
    assert repr(fastelbo.nn.ELBOLoss()) == "ELBOLoss(likelihood='bernoulli', beta=1, reduction='sum')"
    spelled = fastelbo.nn.ELBOLoss("mse", 2.0, "batchmean", posterior=fastelbo.Posterior(), weighting=fastelbo.Weighting())
    assert repr(spelled) == repr(twin)
    twin = fastelbo.nn.ELBOLoss(posterior="std", weighting=fastelbo.Weighting(free_bits=0.5))
    assert f"posterior='std', weighting={fastelbo.Weighting(free_bits=0.5)}" in repr(twin)
