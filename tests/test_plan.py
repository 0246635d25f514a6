"""A call does not depend on the calls before it, whatever they leave behind for the next of their kind.

Each test calls A, then B, which differs in one field, then both again, always with other data, and holds all values and
gradients against float64. What is kept for A and found for B gives a wrong number here, or no gradient.
"""

import contextlib
import random
from dataclasses import replace

import pytest
import torch
import torch.distributions as D
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calls import SHAPE, Call, bits, check, leaf, probabilities
from conftest import DEVICE
from fastelbo import Posterior, Weighting
from fastelbo.engine import plan
from fastelbo.likelihoods import BernoulliLogits, Categorical, DiscretizedLogistic, Gaussian, Laplace, Multinomial
from likelihood_cases import _discretized, _laplace, _normal, _soft, _weighted_bernoulli

FACTORS = ((1.0, 0.0, 0.0), (1 / 64, 0.5, -3.0))  # of loss, recon and kl


def change(**fields):
    """To these values, or to what functions of the call make."""

    def changed(call):
        made = {k: f(call) if callable(f) and k not in ("terms", "around") else f for k, f in fields.items()}
        return replace(call, **made)

    return changed


def family(likelihood, terms):
    return change(likelihood=likelihood, terms=terms)


def pair(likelihood, terms, shape=SHAPE):
    """Of two parameters."""
    return change(likelihood=likelihood, terms=terms, recon_x=lambda c: (c.recon_x, leaf(probabilities(shape))))


def of_one(distribution):
    return lambda parameters, x: -distribution(parameters[0]).log_prob(x)


LIKELIHOODS = {
    "bernoulli": family("bernoulli", of_one(lambda p: D.Bernoulli(p, validate_args=False))),
    "mse": family("mse", lambda p, x: (p[0] - x).square()),
    "l1": family("l1", lambda p, x: (p[0] - x).abs()),
    "gaussian": family("gaussian", of_one(lambda p: D.Normal(p, 1.0))),
    "laplace": family("laplace", of_one(lambda p: D.Laplace(p, 1.0, validate_args=False))),
    "poisson": family("poisson", of_one(lambda p: D.Poisson(p, validate_args=False))),
    "poisson_log": family("poisson_log", of_one(lambda p: D.Poisson(p.exp(), validate_args=False))),
    "continuous_bernoulli": family("continuous_bernoulli", of_one(lambda p: D.ContinuousBernoulli(p, validate_args=False))),
    "pos_weight 3": family(BernoulliLogits(3.0), lambda p, x: _weighted_bernoulli((p[0], 3.0), x)),
    "pos_weight 2": family(BernoulliLogits(2.0), lambda p, x: _weighted_bernoulli((p[0], 2.0), x)),
    "categorical": family("categorical", _soft(1)),
    "categorical, dim 2": family(Categorical(2), _soft(2)),
    "multinomial, dim 3": family(Multinomial(3), _soft(3)),
    **{f"gaussian, {kind}": pair(Gaussian(parameter=kind), _normal(kind)) for kind in ("scale", "log_scale", "logvar")},
    **{f"laplace, {kind}": pair(Laplace(parameter=kind), _laplace(kind)) for kind in ("scale", "log_scale", "logvar")},
    "gaussian, soft -1": pair(Gaussian(parameter="log_scale", soft_min=-1.0), _normal("log_scale", -1.0)),
    "gaussian, soft -2": pair(Gaussian(parameter="log_scale", soft_min=-2.0), _normal("log_scale", -2.0)),
    "gaussian, one scale": pair(Gaussian(parameter="log_scale"), _normal("log_scale"), ()),
    "gaussian, a scale a channel": pair(Gaussian(parameter="log_scale"), _normal("log_scale"), (4, 1, 1)),
    "256 levels": pair(DiscretizedLogistic(), _discretized("log_scale")),
    "16 levels": pair(DiscretizedLogistic(levels=16), _discretized("log_scale", 16)),
}


def prior(call):
    return tuple(leaf(torch.rand_like(call.mu) - 0.5) for _ in range(2))


def with_prior(**fields):
    return change(prior=prior, **fields)


def weights(*shape):
    return lambda call: torch.rand(shape, device=DEVICE)


OPTIONS = {
    **{f"posterior {p}": change(posterior=p) for p in ("log_std", "std", "var")},
    "clamp": change(posterior=Posterior("logvar", (0.5, 0.9))),
    "clamp 0.6": change(posterior=Posterior("logvar", (0.5, 0.6))),
    "clamp of log_std": change(posterior=Posterior("log_std", (0.5, 0.9))),
    "prior": with_prior(),
    "prior, float64": change(prior=lambda c: tuple(leaf(t.double()) for t in prior(c))),
    "prior, bfloat16": change(prior=lambda c: tuple(leaf(t.bfloat16()) for t in prior(c))),
    "prior, no gradient": change(prior=lambda c: tuple(t.detach() for t in prior(c))),
    "prior of channels": change(prior=lambda c: tuple(leaf(t[0, :, :1, :1]) for t in prior(c))),
    **{
        f"free bits per {p}": change(weighting=Weighting(free_bits=0.4, free_bits_per=p))
        for p in ("element", "dimension", "channel")
    },
    **{f"free bits per {p}": change(weighting=Weighting(free_bits=9.0, free_bits_per=p)) for p in ("sample", "batch")},
    "free bits 0.3": change(weighting=Weighting(free_bits=0.3)),
    "capacity": change(weighting=Weighting(capacity=12.0)),
    "capacity 2": change(weighting=Weighting(capacity=2.0)),
    "capacity, tensor": change(weighting=lambda c: Weighting(capacity=torch.tensor(12.0, device=DEVICE))),
    "capacity per sample": change(weighting=Weighting(capacity=12.0, capacity_per="sample")),
    "balance": with_prior(weighting=Weighting(balance=(0.2, 0.8))),
    "balance 0.1": with_prior(weighting=Weighting(balance=(0.1, 1.0))),
    **{f"reduction {r}": change(reduction=r) for r in ("sum", "mean", "none")},
    "reduction mean, sum": change(reduction=("mean", "sum")),
    "reduction sum, mean": change(reduction=("sum", "mean")),
    "reduction mean, batchmean": change(reduction=("mean", "batchmean")),
    "beta 4.0": change(beta=4.0),
    "beta 1": change(beta=1),
    "beta 0": change(beta=0),
    "beta, tensor": change(beta=lambda c: torch.tensor(0.7, device=DEVICE)),
    "beta, tensor of ints": change(beta=lambda c: torch.tensor(2, device=DEVICE)),
    "beta, on the CPU": change(beta=lambda c: torch.tensor(0.7)),
    "beta, with gradient": change(beta=lambda c: leaf(torch.tensor(0.7, device=DEVICE))),
    "beta, per channel": change(beta=lambda c: torch.rand(5, 1, 1, device=DEVICE)),
    "beta, per channel with gradient": change(beta=lambda c: leaf(torch.rand(5, 1, 1, device=DEVICE))),
    "kl": change(mu=None, logvar=None, kl=lambda c: leaf(torch.rand((), device=DEVICE))),
    "kl, no gradient": change(mu=None, logvar=None, kl=lambda c: torch.rand((), device=DEVICE)),
    "kl, float64": change(mu=None, logvar=None, kl=lambda c: leaf(torch.rand((), device=DEVICE).double())),
    "kl of samples": change(mu=None, logvar=None, kl=lambda c: leaf(torch.rand(3, device=DEVICE)), reduction="none"),
    "weight": change(weight=weights(*SHAPE)),
    "weight of channels": change(weight=weights(4, 1, 1)),
    "weight of samples": change(weight=weights(3, 1, 1, 1)),
    "weight, bool": change(weight=lambda c: bits() > 0),
    "weight, expanded": change(weight=lambda c: torch.rand(3, 1, 1, 1, device=DEVICE).expand(SHAPE)),
    "weight, transposed": change(weight=lambda c: turned(torch.rand(SHAPE, device=DEVICE), 1, 2)),
    "weight, float64": change(weight=lambda c: torch.rand(SHAPE, dtype=torch.float64, device=DEVICE)),
    "weight, mean": change(weight=weights(*SHAPE), reduction="mean"),
    "weight, none": change(weight=weights(*SHAPE), reduction="none"),
}


def turned(t, *dims):
    """The same values behind transposed strides."""
    return t.detach().transpose(*dims).contiguous().transpose(*dims)


def unaligned(t):
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return memory[1:].view(t.shape).copy_(t.detach())


class Sub(Tensor):
    pass


class Watched(Tensor):
    """With a `__torch_function__` of its own, which changes nothing."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(Tensor):
    """No memory of its own: the tensor behind it is `elem`."""

    @staticmethod
    def __new__(cls, elem):
        return Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), dtype=elem.dtype, device=elem.device, requires_grad=elem.requires_grad
        )

    def __init__(self, elem):
        self.elem = elem.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inside, outside = (
            (lambda t: t.elem if isinstance(t, Wrapper) else t),
            (lambda t: Wrapper(t) if isinstance(t, Tensor) else t),
        )
        args, kwargs = torch.utils._pytree.tree_map(inside, (args, kwargs or {}))
        return torch.utils._pytree.tree_map(outside, func(*args, **kwargs))


FACTS = {
    "float64": lambda t: t.detach().double(),
    "bfloat16": lambda t: t.detach().bfloat16(),
    "float16": lambda t: t.detach().half(),
    "channels_last": lambda t: t.detach().contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: turned(t, 1, 2),
    "batch last": lambda t: turned(t, 0, 3),
    "sliced": lambda t: torch.stack((t, t + 1), -1).detach()[..., 0],
    "expanded": lambda t: t.detach()[:, :1].expand(t.shape),
    "of one number": lambda t: t.detach().flatten()[0].expand(t.shape),
    "unaligned": unaligned,
    "subclass": lambda t: t.detach().as_subclass(Sub),
    "torch function": lambda t: t.detach().as_subclass(Watched),
    "parameter": lambda t: torch.nn.Parameter(t.detach()),
    "wrapper": Wrapper,
    "other gradient": lambda t: t.detach().requires_grad_(not t.requires_grad),
    "neg bit": lambda t: torch._neg_view(-t.detach()),
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def fact(name, *fields):
    """Of these arguments one fact is another."""

    def changed(call):
        made = {f: FACTS[name](getattr(call, f)) for f in fields}
        for f, t in made.items():
            if name not in ("wrapper", "other gradient"):
                t.requires_grad_(getattr(call, f).requires_grad)
        return replace(call, **made)

    return changed


TENSORS = {
    **{f"{name} {f}": fact(name, f) for f in ("recon_x", "x", "mu", "logvar") for name in FACTS},
    **{f"{name} all": fact(name, "recon_x", "x", "mu", "logvar") for name in FACTS},
    **{f"{dtype} x": change(x=lambda c, dtype=dtype: c.x.to(dtype)) for dtype in INTEGERS},
    "channels_last recon_x and mu": fact("channels_last", "recon_x", "mu"),
    "no gradient": change(recon_x=lambda c: c.recon_x.detach(), mu=lambda c: c.mu.detach(), logvar=lambda c: c.logvar.detach()),
    "another batch": change(
        recon_x=lambda c: leaf(probabilities((2, 4, 2, 2))), x=lambda c: bits((2, 4, 2, 2)),
        mu=lambda c: leaf(torch.randn(2, 5, 2, 2, device=DEVICE)), logvar=lambda c: leaf(torch.rand(2, 5, 2, 2, device=DEVICE)),
    ),
    "another shape of as many": change(recon_x=lambda c: leaf(probabilities((3, 16))), x=lambda c: bits((3, 16))),
    "another shape of latents": change(
        mu=lambda c: leaf(torch.randn(3, 20, device=DEVICE)), logvar=lambda c: leaf(torch.rand(3, 20, device=DEVICE))
    ),
    "no samples": change(
        recon_x=lambda c: leaf(probabilities((0, 4, 2, 2))), x=lambda c: bits((0, 4, 2, 2)), reduction="sum",
        mu=lambda c: leaf(torch.randn(0, 5, 2, 2, device=DEVICE)), logvar=lambda c: leaf(torch.rand(0, 5, 2, 2, device=DEVICE)),
    ),
    "no latents": change(
        mu=lambda c: leaf(torch.randn(3, 0, device=DEVICE)), logvar=lambda c: leaf(torch.rand(3, 0, device=DEVICE))
    ),
    "mu is logvar": lambda c: replace(c, mu=c.logvar),
    "recon_x is x": lambda c: replace(c, x=c.recon_x, reduction="sum"),
    "recon_x is mu": lambda c: replace(c, mu=c.recon_x, logvar=leaf(torch.rand_like(c.recon_x))),
}  # fmt: skip


class Counter(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16)


AROUND = {
    "no_grad": change(around=torch.no_grad),
    "inference_mode": change(around=torch.inference_mode),
    "autocast": change(around=autocast),
    "autocast of bfloat16": lambda c: replace(fact("bfloat16", "recon_x", "mu", "logvar")(c), around=autocast),
    "default dtype float64": change(around=default_dtype),
    "default device meta": change(around=lambda: torch.device("meta")),
    "dispatch mode": change(around=Counter),
    "forward mode, unused": change(around=torch.autograd.forward_ad.dual_level),
    "saved on the CPU": change(around=torch.autograd.graph.save_on_cpu),
}
CHANGES = {**LIKELIHOODS, **OPTIONS, **TENSORS, **AROUND}


@pytest.mark.parametrize("name", CHANGES)
def test_one_field_differs(name):
    """Both twice, and each time with other factors that arrive in backward."""
    for factors in FACTORS:
        check(Call(), factors)
        check(CHANGES[name](Call()), factors)


@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_the_first_call_decides_nothing(name, monkeypatch):
    for table in ("_plans", "_paths", "_last"):
        monkeypatch.setattr(plan, table, {})
    for factors in FACTORS:
        check(CHANGES[name](Call()), factors)
        check(Call(), factors)


def test_all_in_any_order():
    """Each call after any other."""
    order = list(CHANGES)
    random.Random(0).shuffle(order)
    for i, name in enumerate(order):
        try:
            check(CHANGES[name](Call()), FACTORS[i % len(FACTORS)])
        except AssertionError as error:
            raise AssertionError(f"{name}, after {order[:i][-5:]}") from error
