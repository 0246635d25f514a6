"""torch.export with a batch of any size: what was exported gives the eager numbers at another one."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.export import Dim, export

import fastelbo
from conftest import INTERPRETED
from fastelbo import ELBO, IWAE, Posterior, Weighting
from fastelbo import likelihoods as lk

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter
REDUCTIONS = ("sum", "batchmean", "mean", "none", ("mean", "batchmean"))
SAMPLES = 4

SHAPES = {
    "p": (6,), "x": (6,), "mu": (3,), "logvar": (3,), "eps": (3,), "w": (6,), "scale": (6,), "logits": (5, 7), "labels": (7,),
    "parameters": (20, 2, 2), "image": (3, 2, 2), "noise": (3,),
}  # fmt: skip


def inputs(names: str, batch: int, device) -> list[torch.Tensor]:
    """The tensors of those names, in (0, 1); the noise of several samples has the batch second."""
    shapes = [(SAMPLES, batch, 3) if name == "noise" else (batch, *SHAPES[name]) for name in names.split()]
    return [torch.rand(s).mul(4).long().to(device) if s[1:] == (7,) else torch.rand(s).to(device) for s in shapes]


class Model(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.net = call, nn.Sequential(nn.Linear(3, 6), nn.Sigmoid())
        self.criterion = fastelbo.nn.ELBOLoss(beta=0.3, reduction="batchmean")

    def forward(self, *args):
        return tuple(self.call(self, *args))


def of_loss(names="p x mu logvar", **options):
    def call(model, p, x, mu, logvar, weight=None):
        return fastelbo.loss(p, x, mu, logvar, 0.3, weight=weight, **options)

    return names, call


def of_elbo(names="x mu logvar eps", **options):
    return names, lambda model, x, mu, logvar, eps: fastelbo.elbo(model.net, x, mu, logvar, 0.3, eps=eps, **options)


def of_pair(likelihood, reduction="mean"):
    def call(model, p, x, mu, logvar, scale):
        return fastelbo.loss((p, scale), x, mu, logvar, likelihood=likelihood, reduction=reduction)

    return "p x mu logvar scale", call


PLAIN = {f"bernoulli {r}": of_loss(reduction=r) for r in REDUCTIONS}
PLAIN["gaussian none"] = of_loss(likelihood=lk.Gaussian(scale=0.5), reduction="none")
GENERAL = {
    **{f"weights {r}": of_loss("p x mu logvar w", likelihood="mse", reduction=r) for r in REDUCTIONS},
    **{f"optimal {r}": of_loss("p x mu logvar w", likelihood=lk.Gaussian("optimal"), reduction=r) for r in ("mean", "none")},
    **{f"scale {r}": of_pair("gaussian", r) for r in REDUCTIONS},
    "counts": of_pair("negative_binomial"),
    "labels": of_loss("logits labels mu logvar", likelihood="categorical", reduction="mean"),
    "multinomial": of_loss(likelihood="multinomial", reduction="mean"),
    "mixture": of_loss("parameters image mu logvar", likelihood="discretized_logistic_mixture", reduction="mean"),
    "beta of dimensions": (
        "p x mu logvar", lambda model, *a: fastelbo.loss(*a, a[0].new_ones(3), reduction="batchmean"),
    ),
    "beta of the batch": ("p x mu logvar", lambda model, *a: fastelbo.loss(*a, 1 / a[0].shape[0], reduction="sum")),
    "module": ("p x mu logvar", lambda model, *a: model.criterion(*a)),
    "Normal": (
        "p x mu scale",
        lambda model, p, x, mu, scale: fastelbo.loss(p, x, Normal(mu, scale[:, :3] + 1, validate_args=False), reduction="mean"),
    ),
    "prior": (
        "p x mu logvar", lambda model, p, x, mu, logvar: fastelbo.loss(p, x, mu, logvar, prior=(logvar, mu), reduction="mean"),
    ),
    **{
        f"free bits per {per}": of_loss(reduction="batchmean", weighting=Weighting(free_bits=0.1, free_bits_per=per))
        for per in ("element", "dimension", "channel", "sample", "batch")
    },
    "capacity": of_loss(reduction="batchmean", weighting=Weighting(capacity=0.1, capacity_per="sample")),
    **{f"elbo {r}": of_elbo(reduction=r) for r in REDUCTIONS},
    "elbo, clamped": of_elbo(posterior=Posterior(clamp=(-1, 1)), reduction="mean"),
    "samples": of_elbo("x mu logvar noise", bound=ELBO(SAMPLES, chunk=2), reduction="mean"),
    "iwae": of_elbo("x mu logvar noise", bound=IWAE(SAMPLES, chunk=2), reduction="batchmean"),
    "log_likelihood": (
        "x mu logvar noise",
        lambda model, x, mu, logvar, eps: fastelbo.log_likelihood(
            model.net, x, mu, logvar, n_samples=SAMPLES, chunk=2, eps=eps
        ),
    ),
    **{
        f"sample_kl {r}": ("mu logvar eps", lambda model, mu, lv, eps, r=r: fastelbo.sample_kl(mu, lv, eps=eps, reduction=r))
        for r in REDUCTIONS[:4]
    },
    "sample_kl, std": (
        "mu scale eps",
        lambda model, mu, scale, eps: fastelbo.sample_kl(mu, scale[:, :3], eps=eps, reduction="mean", posterior="std"),
    ),
    "reparameterize": ("mu logvar eps", lambda model, mu, lv, eps: [fastelbo.reparameterize(mu, lv, eps=eps)]),
    **{
        f"kl {r}": ("mu logvar", lambda model, mu, lv, r=r: [fastelbo.kl_divergence(mu, lv, reduction=r)])
        for r in ("mean", "none", "dimension", "element")
    },
    "sample_log_ratio": ("mu logvar eps", lambda model, mu, lv, eps: fastelbo.sample_log_ratio(mu, lv, eps=eps)),
    "flow": (
        "mu logvar noise",
        lambda model, mu, lv, eps: fastelbo.sample_log_ratio(
            mu, lv, n_samples=SAMPLES, eps=eps, flow=lambda z: (2 * z, z.sum(1))
        ),
    ),
}  # fmt: skip
# An export is the formula, whatever the backend.
SOME = ["elbo sum", "reparameterize", "samples"]
BOTH = [(True, "Dim"), (True, "AUTO"), (False, "Dim"), (False, "AUTO")]


def check(names, call, strict, how, device):
    torch.compiler.reset()
    model, args = Model(call).to(device), inputs(names, 4, device)
    batch = Dim("batch", min=2, max=64) if how == "Dim" else Dim.AUTO
    shapes = tuple({int(name == "noise"): batch} for name in names.split())
    program = export(model, tuple(args), dynamic_shapes=(shapes,), strict=strict).module()
    assert not any("fastelbo" in str(node.target) for node in program.graph.nodes)  # which it can run without
    for size in (4, 7):
        args = inputs(names, size, device)
        torch.testing.assert_close(program(*args), model(*args))


@pytest.mark.parametrize("strict, how", BOTH, ids=("strict", "strict, AUTO", "not strict", "not strict, AUTO"))
@pytest.mark.parametrize("name", ["bernoulli sum"] if INTERPRETED else PLAIN)
def test_loss(name, strict, how, device):
    check(*PLAIN[name], strict, how, device)


@pytest.mark.parametrize("name", SOME if INTERPRETED else GENERAL)
def test_general_calls(name, device):
    """In two of the ways, in turns."""
    strict, how = BOTH[1 + list(GENERAL).index(name) % 2]
    check(*GENERAL[name], strict, how, device)
