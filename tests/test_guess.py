"""The gradient stored in forward with a guessed upstream factor: right for every factor, computed anew only when it changes; on
a CPU, which multiplies one of the factor 1, only when it changes from another."""

import math
import os
import threading

import pytest
import torch

import fastelbo
from conftest import BACKEND
from fastelbo.engine import plan
from support import LIKELIHOODS, gradients, make_inputs, options, relative

pytestmark = pytest.mark.usefixtures("by_functions")

MULTIPLIES = BACKEND == "torch" and not torch.cuda.is_available()
FACTORS = (1.0, 1.0, 1 / 64, 1 / 64, 65536.0, 0.0, math.nan, 3.0, 3.0, 3.0)


def loss_of(recon_x, x, likelihood, **kwargs):
    kl = torch.zeros(recon_x.shape[:1] if kwargs.get("reduction") == "none" else (), device=x.device)
    return fastelbo.loss(recon_x, x, kl=kl, **kwargs, **options(likelihood)).loss


def true_gradient(recon_x, x, likelihood):
    recon_x = recon_x.detach().double().requires_grad_()
    return gradients(loss_of(recon_x, x.double(), likelihood), recon_x)[0]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_any_sequence_of_factors(likelihood, device):
    recomputed = []
    for factor in FACTORS:
        recon_x, x, _, _ = make_inputs(likelihood, (4, 51), (4, 1), device=device)
        truth = true_gradient(recon_x, x, likelihood) * factor
        (gradient,) = gradients(loss_of(recon_x, x, likelihood) * factor, recon_x)
        if math.isnan(factor):
            assert gradient.isnan().all()
        elif factor == 0:
            assert not gradient.any()
        else:
            assert relative(gradient, truth) < 1e-6
        recomputed.append(was_recomputed(likelihood, factor, (4, 51), device))
    # The factor has just been seen by the backward above, so a second call of its like computes nothing anew; NaN always does.
    assert recomputed == [math.isnan(f) for f in FACTORS]


def was_recomputed(likelihood, factor, shape, device, **kwargs) -> bool:
    """Whether backward looks at prediction and target again: in between they are replaced behind autograd's back."""
    recon_x, x, _, _ = make_inputs(likelihood, shape, (shape[0], 1), device=device)
    loss = loss_of(recon_x, x, likelihood, **kwargs).sum() * factor
    original = recon_x.detach().clone(), x.clone()
    recon_x.data.fill_(0.25)
    x.data.fill_(0.75)
    (gradient,) = gradients(loss, recon_x)
    recon_x.data.copy_(original[0])
    x.data.copy_(original[1])
    kwargs.pop("reduction", None)
    return not relative(gradient, true_gradient(recon_x, x, likelihood) * factor) < 1e-6 and factor != 0


@pytest.fixture
def unknown():
    """No factor has been seen yet."""
    plan._plans.clear()
    plan._paths.clear()


@pytest.mark.usefixtures("unknown")
def test_a_repeated_factor_recomputes_nothing(device):
    """The counter: of each run of equal factors only the first is computed anew, and none after 1 where that is multiplied."""
    shape = (4, 60)
    counter = [was_recomputed("mse", f, shape, device) for f in (1.0, 1.0, 0.25, 0.25, 0.25, 65536.0, 65536.0, 1.0, 1.0)]
    assert counter == [False, False, not MULTIPLIES, False, False, True, False, True, False]


@pytest.mark.usefixtures("unknown")
@pytest.mark.skipif(not MULTIPLIES, reason="about Torch on a CPU")
def test_a_factor_that_changes_at_each_call_recomputes_nothing(device):
    """It is not guessed, and what is stored with 1 is multiplied; nor is a new one that stays, such as 1 / batch."""
    assert not any(was_recomputed("mse", f, (4, 61), device) for f in (0.5, 2.0, 0.125, 3.0, 0.25, 0.25, 0.25))


@pytest.mark.usefixtures("unknown")
@pytest.mark.skipif(not MULTIPLIES, reason="about Torch on a CPU")
def test_a_gradient_that_overflows_with_the_factor_1_is_computed_anew(device):
    """The derivative by a rate of 1e-39 is none of float32's numbers, a thousandth of it is."""
    rate, x = torch.tensor([[1e-39, 2.0]], requires_grad=True), torch.ones(1, 2)
    loss = fastelbo.loss(rate, x, kl=torch.zeros(()), likelihood="poisson").loss
    (gradient,) = gradients(loss * 1e-3, rate)
    torch.testing.assert_close(gradient.double(), 1e-3 * (1 - 1 / rate.detach().double()), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("unknown")
def test_calls_of_different_kinds_do_not_disturb_each_other(device):
    """Other sizes, likelihoods and dtypes have factors of their own, as the last, smaller batch of an epoch has."""
    counter = []
    for _ in range(3):
        counter.append(was_recomputed("mse", 0.5, (6, 10), device))
        counter.append(was_recomputed("mse", 0.125, (5, 10), device))
        counter.append(was_recomputed("bernoulli_logits", 4.0, (6, 10), device))
    assert counter == [not MULTIPLIES] * 3 + [False] * 6


@pytest.mark.parametrize("factor", (65536.0, 1 / 64))
def test_float16_under_a_loss_scale(factor, device):
    """An unscaled gradient stored in float16 would overflow or underflow; one that is mean-scaled would lose its bits."""
    for _ in range(3):
        recon_x, x, _, _ = make_inputs("bernoulli_logits", (64, 784), (64, 1), torch.float16, device)
        truth = true_gradient(recon_x, x, "bernoulli_logits") * factor / recon_x.numel()
        loss = loss_of(recon_x, x, "bernoulli_logits", reduction="mean")
        (gradient,) = gradients(loss * factor, recon_x)
        assert gradient.dtype == torch.float16
        # One rounding of float16, and half of its smallest number.
        assert ((gradient.double() - truth).abs() <= 1e-3 * truth.abs() + 3e-8).all()


def test_factors_of_samples(device):
    """`reduction="none"`: each row has a factor of its own."""
    for factors in ([1.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 2.0, 1.0], [0.0, math.nan, -3.0]):
        recon_x, x, _, _ = make_inputs("mse", (3, 20), (3, 1), device=device)
        upstream = torch.tensor(factors, device=device)
        (gradient,) = gradients(loss_of(recon_x, x, "mse", reduction="none"), recon_x, grad_outputs=upstream)
        truth = true_gradient(recon_x, x, "mse")
        for row, factor in enumerate(factors):
            if math.isnan(factor):
                assert gradient[row].isnan().all()
            else:
                torch.testing.assert_close(gradient[row], (truth[row] * factor).float())


def test_factors_that_their_owner_writes_to(device):
    """Between forward and backward, as a buffer of importance weights is filled anew: the guess is none of his memory."""
    x, factors = torch.randn(3, 20, device=device), torch.rand(3, device=device)
    for step in range(6):
        recon_x = torch.randn(3, 20, device=device).requires_grad_()
        recon = fastelbo.nll(recon_x, x, likelihood="mse", reduction="none")
        if step > 3:
            factors.mul_(3)
        (gradient,) = gradients(recon, recon_x, grad_outputs=factors)
        torch.testing.assert_close(gradient, 2 * (recon_x.detach() - x) * factors[:, None])


def test_expanded_upstream_of_samples(device):
    """`loss.mean().backward()` brings a gradient with stride 0."""
    counter = [was_recomputed("mse", f, (6, 33), device, reduction="none") for f in (1.0, 0.5, 0.5, 0.5)]
    assert counter == [False, True, False, False]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter patches triton.language while it runs"
)
def test_two_threads(device):
    """Each thread with factors of its own, calls of one kind: a guess from the other thread may be wrong, never a gradient."""
    errors, failures = [], []

    def work(factor):
        try:
            generator = torch.Generator(device).manual_seed(int(factor))
            for step in range(40):
                recon_x = torch.randn(16, 50, generator=generator, device=device).requires_grad_()
                x = torch.randn(16, 50, generator=generator, device=device)
                f = factor + step % 3
                (gradient,) = gradients(loss_of(recon_x, x, "mse") * f, recon_x)
                errors.append(relative(gradient, 2 * f * (recon_x - x)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f,)) for f in (3.0, 7.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(errors) == 80
    assert max(errors) < 1e-6


def test_the_tables_are_bounded(device):
    limit, tables = plan.LIMIT, (plan._objectives, plan._paths, plan._plans)
    plan.LIMIT = 4
    for table in tables:
        table.clear()
    try:
        for size in range(1, 12):
            recon_x, x, _, _ = make_inputs("mse", (1, size), (1, 1), device=device)
            (gradient,) = gradients(loss_of(recon_x, x, "mse") * 2, recon_x)
            assert relative(gradient, 4 * (recon_x - x)) < 1e-6
        assert max(map(len, tables)) <= 4
    finally:
        plan.LIMIT = limit
