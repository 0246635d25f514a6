"""Backward does not depend on the calls before it: neither on the factor that one of its kind left, nor on the memory in which
upstream gradients and saved tensors come. Truth is the naive formula in float64."""

from dataclasses import replace

import pytest
import torch
from test_plan import CHANGES
from torch.utils.checkpoint import checkpoint

from calls import (
    FIELDS,
    Call,
    by_loss,
    check,
    check_backward,
    copies_of,
    expected_gradients,
    number,
    plain,
    same,
    truth,
    wanted,
)
from conftest import DEVICE


@pytest.mark.parametrize("reduction", ("batchmean", "none"))
@pytest.mark.parametrize("name", ("beta 1", "gaussian, log_scale"))
def test_upstream_factors_in_turns(name, reduction):
    """At a retained graph, while new ones leave another guess."""
    call = replace(CHANGES[name](Call()), reduction=reduction)
    loss = call.run().loss
    for factor in (1.0, 1 / 64, 0.0, 3.0, float("nan"), 1.0):
        upstream = torch.full_like(loss, factor)
        if reduction == "none":
            upstream[1] = 2.0
        if factor == factor:
            check_backward(call, loss, upstream, retain_graph=True)
            fresh = replace(CHANGES[name](Call()), reduction=reduction)
            check_backward(fresh, fresh.run().loss, upstream)
        else:
            assert torch.autograd.grad(loss, call.parameters[0], upstream, retain_graph=True)[0][0].isnan().all()


UPSTREAMS = {
    "expanded": lambda: number(0.5).expand(3),
    "strided": lambda: torch.rand(6, device=DEVICE)[::2],
    "expanded from a column": lambda: torch.rand(3, 1, device=DEVICE).expand(3, 3)[:, 1],
    "zeros without memory": lambda: torch._efficientzerotensor(3, device=DEVICE),
    "unaligned": lambda: torch.rand(4, device=DEVICE)[1:],
    "neg bit": lambda: torch._neg_view(torch.rand(3, device=DEVICE)),
}


@pytest.mark.parametrize("name", UPSTREAMS)
def test_upstreams_in_any_memory(name):
    for _ in range(2):
        for make in (lambda: torch.rand(3, device=DEVICE), UPSTREAMS[name]):
            call = replace(Call(), reduction="none")
            check_backward(call, call.run().loss, make())


def test_upstreams_of_a_sum_in_any_memory():
    for upstream in (number(2.0), number([2.0, 9.0])[0], number([9.0, 2.0])[1], torch._efficientzerotensor((), device=DEVICE)):
        call = Call()
        check_backward(call, call.run().loss, upstream)


def twice(loss, wrt, upstream):
    """The gradients, and those of their squares."""
    first = torch.autograd.grad(loss, wrt, upstream, create_graph=True)
    return first + torch.autograd.grad(sum(g.square().sum() for g in first), wrt, retain_graph=True)


def test_batched_and_second_derivatives_after_plain_ones():
    for _ in range(2):
        call = replace(Call(), reduction="none")
        check(call)
        loss = call.run().loss
        (got,) = torch.autograd.grad(
            loss, call.recon_x, torch.eye(3, device=DEVICE), retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        for i, row in enumerate(torch.eye(3, device=DEVICE)):
            same(got[i], expected_gradients(call, row)[0])
        upstream, of = torch.rand(3, device=DEVICE), copies_of(call)
        got = twice(loss, wanted(call), upstream)
        for g, e in zip(got, twice(truth(call, of)[0], [of(t) for t in wanted(call)], upstream.double()), strict=True):
            same(g, e)
        check_backward(call, loss, upstream)


def widened(t):
    """The same values in another dtype."""
    return t.double() if t.is_floating_point() else t


def reversed_strides(t):
    """The same values, with the dimensions in the opposite order in memory."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


@pytest.mark.parametrize(
    "unpack", (reversed_strides, lambda t: t.clone().contiguous(), lambda t: torch.stack((t, t), -1)[..., 0], widened)
)
@pytest.mark.parametrize("name", ("beta 1", "channels_last all", "transposed all", "gaussian, log_scale", "prior", "weight"))
def test_saved_tensors_that_come_back_otherwise(name, unpack):
    """The guess of the factor is wrong, so backward reads them again."""
    for factor in (1.0, 3.0):
        check(CHANGES[name](Call()))
        call = CHANGES[name](Call())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            loss = call.run().loss
        check_backward(call, loss, number(factor))


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(reentrant):
    for factor in (1.0, 5.0, 1.0):
        call = Call()
        loss = checkpoint(by_loss(call)[0], *(getattr(call, f) for f in FIELDS), use_reentrant=reentrant)
        expected = expected_gradients(call, number(factor))
        (loss * factor).backward()
        for t, e in zip(wanted(call), expected, strict=True):
            same(t.grad, e)
        check(Call())


@pytest.mark.parametrize("field", ("recon_x", "x", "mu", "logvar"))
def test_an_input_written_to_is_noticed(field):
    for _ in range(2):
        call = Call()
        loss = call.run().loss
        with torch.no_grad():
            getattr(call, field).mul_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        check(Call())


def test_results_written_to_are_the_users():
    """Neither the other results, nor the gradients, nor the next call's see it."""
    for _ in range(3):
        call = Call()
        loss, recon, kl = call.run()
        expected = expected_gradients(call, number(2.0))
        values = [t.item() for t in truth(call, plain)]
        loss.mul_(2)
        with torch.no_grad():
            recon.fill_(7.0)
            kl.fill_(9.0)
        assert loss.item() == pytest.approx(2 * values[0])
        got = torch.autograd.grad(loss, wanted(call), retain_graph=True)
        for g, e in zip(got, expected, strict=True):
            same(g, e)
            g.fill_(5.0)  # what was handed out
        check(Call())


@pytest.mark.parametrize("name", ("beta 1", "gaussian, log_scale", "prior", "reduction none", "kl", "no_grad"))
def test_results_stay_when_others_are_made(name):
    """Of three calls at once: forward of all, then backward of all, and only then a look."""
    calls = [CHANGES[name](Call()) for _ in range(3)]
    made = []
    for call in calls:
        with call.around():
            made.append(call.run())
    upstreams = [torch.full_like(terms.loss, factor) for terms, factor in zip(made, (1.0, 1.0, 2.0), strict=True)]
    grads = [
        torch.autograd.grad(terms.loss, wanted(call), upstream) if terms.loss.requires_grad else ()
        for call, terms, upstream in zip(calls, made, upstreams, strict=True)
    ]
    for call, terms, upstream, got in zip(calls, made, upstreams, grads, strict=True):
        for a, b in zip(terms, truth(call, plain), strict=True):
            same(a, b)
        if got:
            for g, e in zip(got, expected_gradients(call, upstream), strict=True):
                same(g, e)
