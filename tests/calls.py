"""A call of `fastelbo.loss` in one record, and all of its results held against the naive formulas in float64."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

import fastelbo
from conftest import DEVICE
from fastelbo import Posterior
from likelihood_cases import reduce

FIELDS = "recon_x", "x", "mu", "logvar"
SHAPE, LATENT = (3, 4, 2, 2), (3, 5, 2, 2)


def logits(parameters, x):
    return F.binary_cross_entropy_with_logits(parameters[0], x, reduction="none")


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def probabilities(shape=SHAPE) -> Tensor:
    """Which every likelihood takes: as probabilities, logits, means, rates and scales."""
    return torch.rand(shape, device=DEVICE) * 0.8 + 0.1


def bits(shape=SHAPE) -> Tensor:
    return torch.randint(0, 2, shape, device=DEVICE).float()


@dataclass
class Call:
    """The arguments, of fresh data. `terms(parameters, x)` is the truth of the likelihood, `around` what the call is made in.

    The tensors go with every likelihood, and `logvar` with every posterior, so that a changed field alone tells calls apart.
    """

    recon_x: Tensor | tuple[Tensor, ...] = field(default_factory=lambda: leaf(probabilities()))
    x: Tensor = field(default_factory=bits)
    mu: Tensor | None = field(default_factory=lambda: leaf(torch.randn(LATENT, device=DEVICE)))
    logvar: Tensor | None = field(default_factory=lambda: leaf(torch.rand(LATENT, device=DEVICE) + 0.3))
    beta: float | Tensor = 0.5
    kl: Tensor | None = None
    likelihood: object = "bernoulli_logits"
    posterior: object = "logvar"
    prior: tuple[Tensor, Tensor] | None = None
    weighting: fastelbo.Weighting | None = None
    weight: Tensor | None = None
    reduction: str | tuple[str, str] = "batchmean"
    terms: Callable = logits
    around: Callable = contextlib.nullcontext

    def run(self):
        return fastelbo.loss(
            self.recon_x, self.x, self.mu, self.logvar, self.beta, kl=self.kl, likelihood=self.likelihood,
            posterior=self.posterior, prior=self.prior, weighting=self.weighting, weight=self.weight, reduction=self.reduction,
        )  # fmt: skip

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.recon_x if isinstance(self.recon_x, tuple) else (self.recon_x,)

    @property
    def tensors(self) -> list[Tensor]:
        """Each once, and first those that say the dtype of the results."""
        pos_weight = getattr(self.likelihood, "pos_weight", None)
        given = *self.parameters, self.mu, self.logvar, self.kl, *(self.prior or ()), self.x, self.beta, self.weight, pos_weight
        return list({id(t): t for t in given if isinstance(t, Tensor)}.values())


def plain(t: Tensor) -> Tensor:
    """An independent copy in float64, without subclass, layout and neg bit, that requires grad like the original."""
    inner = getattr(t, "elem", t)
    copy = torch.empty(t.shape, dtype=torch.float64, device=t.device)
    return copy.copy_(inner.detach().as_subclass(Tensor)).requires_grad_(t.requires_grad)


def reductions(call: Call) -> tuple[str, str]:
    return call.reduction if isinstance(call.reduction, tuple) else (call.reduction, call.reduction)


def gaussian(call: Call, of: Callable) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents."""
    posterior = Posterior(call.posterior) if isinstance(call.posterior, str) else call.posterior
    name, clamp = posterior.parameter, posterior.clamp
    mu, second = of(call.mu), of(call.logvar)
    sigma = {"logvar": lambda s: (s / 2).exp(), "log_std": torch.exp, "std": lambda s: s, "var": torch.sqrt}[name]
    return mu, sigma(second.clamp(*clamp) if clamp else second)


def divergence(call: Call, of: Callable) -> tuple[Tensor, Tensor]:
    """The KL, and what of it enters the loss, times beta."""
    beta = of(call.beta) if isinstance(call.beta, Tensor) else call.beta
    if call.kl is not None:
        return of(call.kl) * 1, beta * of(call.kl)
    of_q, reduction = gaussian(call, of), reductions(call)[1]
    of_p = tuple(map(of, call.prior)) if call.prior else (torch.zeros_like(of_q[0]),) * 2
    of_p = of_p[0], (of_p[1] / 2).exp()

    def kl_of(q, p):
        return D.kl_divergence(D.Normal(*q, validate_args=False), D.Normal(*p, validate_args=False))

    elements, w = kl_of(of_q, of_p), call.weighting or fastelbo.Weighting()
    if w.balance is not None:
        fixed_q, fixed_p = (tuple(t.detach() for t in pair) for pair in (of_q, of_p))
        counted = w.balance[0] * kl_of(of_q, fixed_p) + w.balance[1] * kl_of(fixed_q, of_p)
        return reduce(elements, reduction), beta * reduce(counted, reduction)
    samples, free, per = elements.flatten(1).sum(1), w.free_bits, w.free_bits_per
    if free is not None:
        assert reduction == "batchmean"
        groups = {
            "element": lambda: elements / len(elements), "dimension": lambda: elements.mean(0),
            "channel": lambda: elements.flatten(2).sum(2).mean(0), "sample": lambda: samples / len(samples),
            "batch": samples.mean,
        }[per]()  # fmt: skip
        least = free / len(elements) if per in ("element", "sample") else free
        counted = groups.clamp_min(least).sum()
    elif w.capacity is not None:
        assert reduction == "batchmean"
        counted = (samples - w.capacity).abs().mean() if w.capacity_per == "sample" else (samples.mean() - w.capacity).abs()
    else:
        counted = reduce(elements * beta, reduction)
        beta = 1
    return reduce(elements, reduction), beta * counted


def truth(call: Call, of: Callable) -> tuple[Tensor, Tensor, Tensor]:
    terms = call.terms([of(p) for p in call.parameters], of(call.x))
    recon = reduce(terms, reductions(call)[0], None if call.weight is None else of(call.weight))
    kl, counted = divergence(call, of)
    return recon + counted, recon, kl


def gradients_of(terms, coefficients, wanted):
    total = sum((c * t).sum() for c, t in zip(coefficients, terms, strict=True) if t.requires_grad)
    if not wanted or not isinstance(total, Tensor):
        return [None] * len(wanted)
    return torch.autograd.grad(total, wanted, allow_unused=True)


def check(call: Call, coefficients=(1.0, 0.5, -0.25)) -> None:
    """All numbers and dtypes of the loss, and who requires grad."""
    with call.around():
        terms = call.run()
    floats = [t.dtype for t in (*call.parameters, call.mu, call.logvar, call.kl, *(call.prior or ())) if t is not None]
    compare(call, terms, lambda of: truth(call, of), coefficients, [result_dtype(*floats)] * 3)


def wanted(call: Call) -> list[Tensor]:
    return [t for t in call.tensors if t.requires_grad]


def copies_of(call: Call) -> Callable:
    """What finds the copy of a tensor of the call, always the same one."""
    copies = {id(t): plain(t) for t in call.tensors}
    return lambda t: copies[id(t)] if id(t) in copies else plain(t)


def result_dtype(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def compare(call: Call, found, expected: Callable, coefficients, dtypes) -> None:
    """Results and gradients with what `expected` makes of copies of the tensors, which `of` finds."""
    of = copies_of(call)
    with call.around() if call.around in (torch.no_grad, torch.inference_mode) else contextlib.nullcontext():
        expected = expected(of)
    differentiable = any(t.requires_grad for t in expected)
    for a, b, dtype in zip(found, expected, dtypes, strict=True):
        assert b.requires_grad <= a.requires_grad <= differentiable
        same(a, b, dtype)
    got = gradients_of(found, coefficients, wanted(call))
    by_truth = gradients_of(expected, coefficients, [of(t) for t in wanted(call)])
    for t, a, b in zip(wanted(call), got, by_truth, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same(a, b, t.dtype)


def same(got: Tensor, expected: Tensor, dtype=None) -> None:
    dtype = dtype or got.dtype
    assert got.dtype == dtype
    assert got.shape == expected.shape
    # A float64 result of float32 data has what those are rounded to, no less.
    torch.testing.assert_close(plain(got).detach(), expected.detach().to(dtype).double(), **TOLERANCES[dtype])


TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
}


def expected_gradients(call, upstream):
    """By what the call has, of the loss times what arrives at it, in float64."""
    of = copies_of(call)
    return torch.autograd.grad(truth(call, of)[0], [of(t) for t in wanted(call)], plain(upstream).detach())


def check_backward(call, loss, upstream, **kwargs):
    got = torch.autograd.grad(loss, wanted(call), upstream, **kwargs)
    for g, e in zip(got, expected_gradients(call, upstream), strict=True):
        same(g, e)


def number(value):
    return torch.tensor(value, device=DEVICE)


def by_loss(call):
    """A function of the tensors alone, and these."""
    return lambda *t: replace(call, **dict(zip(FIELDS, t, strict=True))).run().loss, [getattr(call, f).detach() for f in FIELDS]
