"""`kl_weight`: weights of the elements of mu in the KL, in all calls that have one. What has the weight 0 does not count."""

from dataclasses import replace

import pytest
import torch
from test_divergence import WEIGHTINGS
from test_posterior import STD, inputs_of, make_latents, naive, prior_for
from torch.utils.checkpoint import checkpoint

import fastelbo
from conftest import BACKEND, DEVICE
from fastelbo import ELBO, IWAE, Posterior, Weighting, kl_divergence, sample_kl
from support import gradcheck, gradgradcheck, relative

B, T, D = 4, 3, 5
SHAPE = B, T, D


def rand(*shape):
    return torch.rand(*shape, device=DEVICE)


# By shape and dtype; some weights are 0.
WEIGHTS = {
    "elements": lambda: rand(B, T, D).mul(3).floor(),
    "time steps": lambda: rand(B, T, 1) > 0.4,
    "samples": lambda: torch.tensor([2, 0, 1, 3], device=DEVICE).view(B, 1, 1),
    "one sample": lambda: rand(T, D).double(),
    "dimensions": lambda: rand(D).half(),
    "one": lambda: rand(1, 1, 1),
    "another layout": lambda: rand(D, T, B).permute(2, 1, 0),
    "samples and dimensions": lambda: rand(B, 1, D),
}
REDUCED = {
    "sum": lambda kl, w: kl.sum(),
    "batchmean": lambda kl, w: kl.sum() / B,
    "mean": lambda kl, w: kl.sum() / w.sum(),
    "none": lambda kl, w: kl.flatten(1).sum(1),
    "dimension": lambda kl, w: kl.sum(0) / w.sum(0),
    "element": lambda kl, w: kl,
}


def kl_elements(mu, logvar):
    zeros = torch.zeros_like(mu)
    return naive("logvar", None, mu, logvar, zeros, zeros)


def truth_of(posterior, kind, latents, weight, reduction):
    w = weight.double().expand(SHAPE)
    return REDUCED[reduction](naive(posterior, kind, *latents) * w, w)


@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("posterior", "kind"), (("logvar", None), ("std", "pair"), ("log_std", "row")))
def test_kl_divergence(posterior, kind, name, reduction):
    latents = make_latents(posterior, SHAPE, torch.float64, DEVICE)
    prior = None if kind is None else prior_for("pair", posterior, *latents[2:])
    if kind == "row":
        latents = *latents[:2], *(t[:1].detach().requires_grad_() for t in latents[2:])
        prior = latents[2:]
    weight, wrt = WEIGHTS[name](), latents[:2] if kind is None else latents
    if reduction == "dimension" and not weight.expand(SHAPE).sum(0).all():
        weight = weight + 1
    for _ in range(2):  # the second time by what is kept of the first
        got = kl_divergence(*latents[:2], prior, posterior=posterior, kl_weight=weight, reduction=reduction)
        expected = truth_of(posterior, kind and "pair", latents, weight, reduction)
        assert got.shape == expected.shape and got.dtype == torch.float64
        torch.testing.assert_close(got, expected)
        upstream = torch.randn_like(got)
        torch.testing.assert_close(
            torch.autograd.grad(got, wrt, upstream, retain_graph=True), torch.autograd.grad(expected, wrt, upstream)
        )


@pytest.mark.parametrize("kind", (None, "pair"))
@pytest.mark.parametrize("posterior", ("logvar", "std"))
@pytest.mark.parametrize("reduction", ("sum", "mean", "none", "dimension"))
def test_nothing_comes_from_where_the_weight_is_0(reduction, posterior, kind):
    """NaN, infinite and forbidden values lie there."""
    latents = make_latents(posterior, SHAPE, torch.float64, DEVICE)
    mask = torch.ones(B, T, 1, dtype=torch.bool, device=DEVICE)
    mask[1, 2] = mask[3, 0] = False
    for tensor in latents:
        bad = torch.tensor([torch.nan, torch.inf, -1.0, 0.0, -torch.inf], device=DEVICE, dtype=torch.float64)
        tensor.data[1, 2], tensor.data[3, 0] = bad, torch.nan
    prior, wrt = None if kind is None else latents[2:], latents[:2] if kind is None else latents
    clean = [torch.where(mask, t, 0.5).detach().requires_grad_() for t in latents]
    options = {"posterior": posterior, "kl_weight": mask, "reduction": reduction}
    got = kl_divergence(*latents[:2], prior, **options)
    expected = kl_divergence(*clean[:2], None if kind is None else clean[2:], **options)
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), wrt), torch.autograd.grad(expected.sum(), clean[: len(wrt)])
    )  # which is 0 there
    # By the formula, too.
    formula = kl_divergence(*latents[:2], prior, **options | {"kl_weight": mask.double().requires_grad_()})
    torch.testing.assert_close(formula, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(formula.sum(), wrt))


@pytest.mark.parametrize("reduction", ("sum", "mean", "batchmean"))
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("balanced", (False, True), ids=("", "balanced"))
def test_a_weight_is_how_often_a_sample_is_there(balanced, name, reduction):
    """With free bits, capacity and balance: against a batch in which samples are repeated, or left out."""
    weighting = replace(WEIGHTINGS[name][0], balance=(0.2, 0.7)) if balanced else WEIGHTINGS[name][0]
    latents = make_latents("logvar", SHAPE, torch.float64, DEVICE)
    counts = torch.tensor([2, 0, 1, 3], device=DEVICE)
    prior, wrt = (latents[2:], latents) if balanced else (None, latents[:2])
    got = kl_divergence(*latents[:2], prior, weighting=weighting, kl_weight=counts.view(B, 1, 1), reduction=reduction)
    repeated = [t.repeat_interleave(counts, 0) for t in latents]
    expected = kl_divergence(*repeated[:2], repeated[2:] if balanced else None, weighting=weighting, reduction=reduction)
    if reduction == "batchmean":
        expected = expected * counts.sum() / B
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, wrt, materialize_grads=True), torch.autograd.grad(expected, wrt, materialize_grads=True)
    )


@pytest.mark.parametrize("reduction", ("sum", "mean", "dimension", "element", "none"))
@pytest.mark.parametrize("per", ("element", "dimension"))
def test_free_bits_of_weighted_elements(per, reduction):
    if per == "dimension" and reduction in ("element", "none"):
        pytest.skip("without meaning")
    mu, logvar, *_ = make_latents("logvar", SHAPE, torch.float64, DEVICE)
    weight = rand(*SHAPE).double() + 0.1
    kl = kl_elements(mu, logvar)
    if per == "element":
        expected = REDUCED[reduction](kl.clamp_min(0.7) * weight, weight)
    else:
        means = ((kl * weight).sum(0) / weight.sum(0)).clamp_min(0.7)
        total = (means * weight.sum(0)).sum()
        expected = {"sum": total, "mean": total / weight.sum(), "dimension": means}[reduction]
    got = kl_divergence(mu, logvar, weighting=Weighting(0.7, per), kl_weight=weight, reduction=reduction)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), (mu, logvar), retain_graph=True), torch.autograd.grad(expected.sum(), (mu, logvar))
    )


@pytest.mark.parametrize("kind", (None, "pair"))
@pytest.mark.parametrize("name", ("elements", "time steps", "samples"))
@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_sample_kl(reduction, name, kind):
    """z is without it."""
    posterior = "logvar" if kind is None else "log_std"
    latents = mu, second, *_ = make_latents(posterior, SHAPE, torch.float64, DEVICE)
    prior, weight = None if kind is None else latents[2:], WEIGHTS[name]()
    eps, wrt = torch.randn_like(mu), inputs_of(kind, latents)
    for weighting in (None, Weighting(0.5)):
        got = sample_kl(
            mu, second, posterior=posterior, prior=prior, eps=eps, kl_weight=weight, reduction=reduction, weighting=weighting
        )
        z = mu + STD[posterior](second) * eps
        kl = kl_divergence(mu, second, prior, posterior=posterior, kl_weight=weight, reduction=reduction, weighting=weighting)
        torch.testing.assert_close(tuple(got), (z, kl))
        upstreams = torch.randn_like(z), torch.randn_like(kl)
        torch.testing.assert_close(
            torch.autograd.grad(tuple(got), wrt, upstreams),
            torch.autograd.grad((z, kl), wrt, upstreams, materialize_grads=True),
        )


def batch():
    mu, logvar, *prior = make_latents("logvar", SHAPE, torch.float64, DEVICE)
    return rand(B, 7).double().requires_grad_(), rand(B, 7).double(), mu, logvar, prior


@pytest.mark.parametrize("reduction", ("sum", "mean", "none", ("mean", "batchmean")))
def test_loss_elbo_and_module(reduction):
    """The loss has beta times the weighted KL, with a prior, free bits, a capacity or a beta of each too."""
    recon_x, x, mu, logvar, prior = batch()
    kl_reduction = reduction if isinstance(reduction, str) else reduction[1]
    mask, matrix = WEIGHTS["samples"](), rand(T * D, 7).double()
    for extra in (
        {},
        {"prior": prior},
        {"weighting": Weighting(0.3)},
        {"weighting": Weighting(capacity=2.0, capacity_per="sample")},
    ):
        options = {"likelihood": "mse", "reduction": reduction, "kl_weight": mask} | extra
        terms = fastelbo.loss(recon_x, x, mu, logvar, 0.5, **options)
        kl = kl_divergence(mu, logvar, extra.get("prior"), kl_weight=mask, reduction=kl_reduction)
        torch.testing.assert_close(terms.kl, kl)
        weighted = kl_divergence(mu, logvar, **extra, kl_weight=mask, reduction=kl_reduction)
        torch.testing.assert_close(terms.loss, terms.recon + 0.5 * weighted)
        got = torch.autograd.grad(terms.loss.sum(), (mu, logvar), retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(0.5 * weighted.sum(), (mu, logvar)))
        torch.manual_seed(3)
        ours = fastelbo.elbo(lambda z: z.flatten(1) @ matrix, x, mu, logvar, 0.5, **options)
        torch.manual_seed(3)
        z = fastelbo.reparameterize(mu, logvar)
        theirs = fastelbo.loss(z.flatten(1) @ matrix, x, mu, logvar, 0.5, **options)
        torch.testing.assert_close(tuple(ours), tuple(theirs))
    criterion = fastelbo.nn.ELBOLoss("mse", 0.5, reduction)
    torch.testing.assert_close(
        criterion(recon_x, x, mu, logvar, kl_weight=mask).loss,
        fastelbo.loss(recon_x, x, mu, logvar, 0.5, likelihood="mse", reduction=reduction, kl_weight=mask).loss,
    )


def test_with_a_beta_of_each_dimension():
    recon_x, x, mu, logvar, _ = batch()
    beta, weight = rand(D).double(), WEIGHTS["time steps"]()
    terms = fastelbo.loss(recon_x, x, mu, logvar, beta, likelihood="mse", kl_weight=weight, reduction="none")
    kl = kl_elements(mu, logvar) * weight
    torch.testing.assert_close(terms.loss, terms.recon + (kl * beta).flatten(1).sum(1))
    torch.testing.assert_close(terms.kl, kl.flatten(1).sum(1))


def test_several_samples():
    """The KL of an ELBO of several samples has it; an IWAE has none."""
    _, x, mu, logvar, _ = batch()
    matrix, mask = rand(T * D, 7).double(), WEIGHTS["samples"]()
    eps = torch.randn(2, *SHAPE, dtype=torch.float64, device=DEVICE)

    def value(kl_weight, bound):
        return fastelbo.elbo(
            lambda z: z.flatten(1) @ matrix, x, mu, logvar, 0.5, likelihood="mse", bound=bound, eps=eps, kl_weight=kl_weight
        )

    torch.testing.assert_close(value(mask, ELBO(2)).kl, kl_divergence(mu, logvar, kl_weight=mask))
    torch.testing.assert_close(
        value(mask, ELBO(2)).loss - value(None, ELBO(2)).loss,
        0.5 * (kl_divergence(mu, logvar, kl_weight=mask) - kl_divergence(mu, logvar)),
    )
    with pytest.raises(ValueError, match="kl_weight is for the KL of an ELBO"):
        value(mask, IWAE(2))


@pytest.mark.parametrize("check", (gradcheck, gradgradcheck), ids=("first", "second"))
@pytest.mark.parametrize("everything", (False, True), ids=("usual", "weight too"))
@pytest.mark.parametrize("reduction", ("sum", "mean", "none", "dimension"))
def test_gradcheck(reduction, everything, check):
    mu, logvar, *prior = make_latents("logvar", (2, 2), torch.float64, DEVICE)
    weight = (rand(2, 1).double() + 0.5).requires_grad_(everything)

    def function(mu, logvar, prior_mu, prior_logvar, weight):
        return kl_divergence(mu, logvar, (prior_mu, prior_logvar), kl_weight=weight, reduction=reduction)

    assert check(function, (mu, logvar, *prior, weight), nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_dtypes(dtype):
    """Weights do not decide the dtype of results."""
    mu, logvar, *_ = make_latents("logvar", SHAPE, dtype, DEVICE)
    weight = rand(B, T, 1).double()
    got = kl_divergence(mu, logvar, kl_weight=weight)
    expected = (kl_elements(mu.double(), logvar.double()) * weight).sum()
    assert got.dtype == torch.float32 and relative(got, expected) < 1e-6
    (by_mu,) = torch.autograd.grad(got, mu)
    assert by_mu.dtype == dtype and relative(by_mu, mu.detach().double() * weight) < torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ("channels", "pixels", "elements"))
def test_channels_last(name):
    mu, logvar = (
        torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
    )
    shapes = {"channels": (2, 3, 1, 1), "pixels": (2, 1, 4, 5), "elements": (2, 3, 4, 5)}
    weight = rand(*shapes[name])
    got = kl_divergence(mu, logvar, kl_weight=weight)
    assert relative(got, (kl_elements(mu.double(), logvar.double()) * weight).sum()) < 1e-6
    (by_mu,) = torch.autograd.grad(got, mu)
    assert relative(by_mu, mu.detach() * weight) < 1e-6


def test_surrounded():
    """Compiled, by torch.func, under checkpoint, autocast and inference mode."""
    mu, logvar, *_ = make_latents("logvar", SHAPE, torch.float64, DEVICE)
    weight = WEIGHTS["time steps"]()

    def value(mu, logvar, weight):
        return (
            kl_divergence(mu, logvar, kl_weight=weight, reduction="mean") + sample_kl(mu, logvar, kl_weight=weight, eps=mu).kl
        )

    expected = value(mu, logvar, weight)
    grads = torch.autograd.grad(expected, (mu, logvar))
    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    for call in (compiled, lambda *args: checkpoint(value, *args, use_reentrant=False)):
        found = call(mu, logvar, weight)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, (mu, logvar)), grads)
    torch.testing.assert_close(torch.func.grad(value, (0, 1))(mu.detach(), logvar.detach(), weight), grads)
    each = torch.func.vmap(lambda m, lv, w: kl_divergence(m, lv, kl_weight=w))(mu.detach(), logvar.detach(), weight)
    torch.testing.assert_close(each, kl_divergence(mu, logvar, kl_weight=weight, reduction="none").detach())
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(value(mu, logvar, weight), expected.detach())


def test_compiled_objectives():
    recon_x, x, mu, logvar, _ = batch()
    mask, matrix = WEIGHTS["samples"](), rand(T * D, 7).double()

    def step(recon_x, x, mu, logvar, mask):
        terms = fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", kl_weight=mask)
        decoded = fastelbo.elbo(lambda z: z.flatten(1) @ matrix, x, mu, logvar, likelihood="mse", kl_weight=mask, eps=mu)
        return terms.loss + decoded.loss

    expected = step(recon_x, x, mu, logvar, mask)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(recon_x, x, mu, logvar, mask)
    torch.testing.assert_close(found, expected)
    wrt = recon_x, mu, logvar
    torch.testing.assert_close(torch.autograd.grad(found, wrt), torch.autograd.grad(expected, wrt))


@pytest.mark.skipif(BACKEND != "triton", reason="about launches")
@pytest.mark.parametrize("reduction", ("sum", "none", "dimension"))
def test_one_launch_each_way(reduction, monkeypatch):
    from fastelbo.kernels.direct import Launch

    launches, launch = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launches.append(self.kernel), launch(self, *args)))
    mu, logvar, *prior = make_latents("logvar", SHAPE, torch.float32, DEVICE)
    found = kl_divergence(mu, logvar, prior, kl_weight=WEIGHTS["time steps"](), reduction=reduction)
    assert len(launches) == 1
    found.sum().backward()
    assert len(launches) == 2


def test_of_nothing():
    mu, logvar = (torch.zeros(0, D, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.ones(0, 1, device=DEVICE)
    assert kl_divergence(mu, logvar, kl_weight=weight) == 0
    assert kl_divergence(mu, logvar, kl_weight=weight, reduction="mean").isnan()
    mu, logvar = (torch.zeros(2, D, device=DEVICE) for _ in range(2))
    none = torch.zeros(2, 1, device=DEVICE)
    assert kl_divergence(mu, logvar, kl_weight=none) == 0
    assert kl_divergence(mu, logvar, kl_weight=none, reduction="mean").isnan()


BAD = (
    ({"kl_weight": 0.5}, TypeError, "kl_weight must be a tensor.*got 0.5: beta takes a number"),
    ({"kl_weight": "x"}, TypeError, "kl_weight must be"),
    (
        {"kl_weight": torch.ones(2, T, D, device=DEVICE)},
        ValueError,
        r"kl_weight must .* mu: got kl_weight \(2, 3, 5\)",
    ),
    ({"kl_weight": torch.ones(B, device=DEVICE)}, ValueError, "kl_weight must broadcast to mu"),
    ({"kl_weight": torch.ones(D, device=DEVICE, dtype=torch.complex64)}, TypeError, "kl_weight must be"),
    ({"kl_weight": torch.ones(D, device="meta")}, ValueError, "kl_weight must be on the device of mu"),
    (
        {"kl_weight": torch.ones(B, T, 1, device=DEVICE), "weighting": Weighting(1.0, "sample")},
        ValueError,
        r"kl_weight must have one number for each sample .* \(4, 3, 1\); reduction=PerSample\(batch_dims=2\) makes a sample",
    ),
    (
        {"kl_weight": torch.ones(D, device=DEVICE), "weighting": Weighting(1.0, "channel")},
        ValueError,
        "kl_weight must have one number for each channel of a sample",
    ),
)


@pytest.mark.parametrize(("arguments", "error", "words"), BAD)
def test_errors(arguments, error, words):
    recon_x, x, mu, logvar, _ = batch()
    for call in (
        lambda: kl_divergence(mu, logvar, **arguments),
        lambda: sample_kl(mu, logvar, **arguments),
        lambda: fastelbo.loss(recon_x, x, mu, logvar, likelihood="mse", **arguments),
        lambda: fastelbo.elbo(lambda z: recon_x, x, mu, logvar, likelihood="mse", **arguments),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("shape", ((B, T, 1), (B, 1, 1)))
def test_a_beta_of_samples_names_it(shape):
    recon_x, x, mu, logvar, _ = batch()
    with pytest.raises(ValueError, match=r"beta must be.*kl_weight takes weights of samples and elements"):
        fastelbo.loss(recon_x, x, mu, logvar, torch.ones(shape, device=DEVICE), likelihood="mse")


def test_not_with_a_given_kl():
    recon_x, x, mu, _, _ = batch()
    weight = WEIGHTS["samples"]()
    with pytest.raises(ValueError, match=r"kl_weight must not be given with kl"):
        fastelbo.loss(recon_x, x, kl=mu.sum(), likelihood="mse", kl_weight=weight)


def test_with_a_clamp():
    mu, logvar, *_ = make_latents("logvar", SHAPE, torch.float64, DEVICE)
    weight, posterior = WEIGHTS["elements"](), Posterior(clamp=(-0.5, 0.5))
    got = kl_divergence(mu, logvar, posterior=posterior, kl_weight=weight)
    expected = (kl_elements(mu, logvar.clamp(-0.5, 0.5)) * weight).sum()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, (mu, logvar), retain_graph=True), torch.autograd.grad(expected, (mu, logvar))
    )


@pytest.mark.parametrize("reduction", ("sum", "mean", "none", "dimension"))
def test_of_categorical_latents(reduction):
    """A weight for each group, of which a masked one may be NaN; with the free bits of a world model's steps."""
    q, p = (torch.randn(B, T, 6, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = rand(B, T).double()
    weight[1, 2] = 0
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=t) for t in (q, p)))
    reduced = {
        "sum": (kl * weight).sum(),
        "mean": (kl * weight).sum() / weight.sum(),
        "none": (kl * weight).sum(1),
        "dimension": (kl * weight).sum(0) / weight.sum(0),
    }
    upstream = torch.randn_like(reduced[reduction])
    expected = torch.autograd.grad(reduced[reduction], (q, p), upstream)
    q.data[1, 2] = torch.nan
    got = kl_divergence(q, prior=p, posterior="categorical", kl_weight=weight, reduction=reduction)
    torch.testing.assert_close(got, reduced[reduction])
    torch.testing.assert_close(torch.autograd.grad(got, (q, p), upstream), expected)
    steps = kl_divergence(
        q[:1], prior=p[:1], posterior="categorical", kl_weight=weight[:1], weighting=Weighting(1.0), reduction="sum"
    )
    torch.testing.assert_close(steps, (kl[:1].clamp_min(1.0) * weight[:1]).sum())


@pytest.mark.parametrize("reduction", ("sum", "mean", "element"))
def test_the_gradient_by_a_weight_of_0_is_0(reduction):
    """As that of `weight`: what does not count may be NaN, and so may its KL."""
    mu, logvar, *_ = make_latents("logvar", (B, D), torch.float64, DEVICE)
    weight = rand(B, D).double()
    weight[1] = 0
    kl = kl_elements(mu, logvar).detach()
    got = kl_divergence(mu, logvar, kl_weight=weight.requires_grad_(), reduction=reduction).sum()
    of_mean = (kl * weight).sum().detach() / weight.sum().detach().square()
    expected = kl / weight.sum().detach() - of_mean if reduction == "mean" else kl
    expected[1] = -of_mean if reduction == "mean" else 0
    torch.testing.assert_close(torch.autograd.grad(got, weight)[0], expected)
