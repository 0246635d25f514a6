"""Errors, squared and absolute: likelihoods that are no densities, and what a Gaussian's and Laplace's are made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.records import record
from ..basics.tracing import behind_upstream, is_behind_dynamo
from .base import SUM, Likelihood, OnePass


@record
class MSE(Likelihood):
    """The squared error: `F.mse_loss(recon_x, x)`, without the 1/2 that a Gaussian has. It is no density."""

    name = kernel = "mse"
    is_density = False

    def nll(self, parameters, x):
        if is_behind_dynamo():
            return CompiledSquares.apply(parameters[0], x)
        return F.mse_loss(parameters[0], x, reduction="none")

    def sum_by_torch(self, parameters, x, weight):
        return torch._C._nn.mse_loss(parameters[0], x, SUM)

    def one_pass(self, parameters, x, wants_value, out, spare):
        return OnePass(squared(parameters[0], x, wants_value, out[0], spare), slopes=(2.0,))


@record
class L1(Likelihood):
    """The absolute error: `F.l1_loss(recon_x, x)`. It is no density."""

    name = kernel = "l1"
    is_density = False

    def nll(self, parameters, x):
        if is_behind_dynamo():
            return CompiledDistances.apply(parameters[0], x)
        return F.l1_loss(parameters[0], x, reduction="none")

    def sum_by_torch(self, parameters, x, weight):
        return torch._C._nn.l1_loss(parameters[0], x, SUM)

    def one_pass(self, parameters, x, wants_value, out, spare):
        return OnePass(absolute(parameters[0], x, wants_value, out[0], spare))


def squared(y: Tensor, x: Tensor, wants_value: bool, difference: Tensor | None, spare: Sequence[Tensor]) -> Tensor | None:
    """The squares of differences, if they are wanted, and the differences."""
    if difference is None:
        if spare[0] is None:
            return F.mse_loss(y, x, reduction="none")
        return torch.ops.aten.mse_loss.out(y, x, 0, out=spare[0])  # not reduced; a pass less than below
    torch.sub(y, x, out=difference)
    # torch.dot would be one pass less, but is off by 2e-4 for half a million elements.
    return torch.mul(difference, difference, out=spare[1]) if wants_value else None


class CompiledSquares(torch.autograd.Function):
    """Squares of differences for the compiler."""

    @staticmethod
    def forward(ctx, y, x):
        ctx.save_for_backward(y, x)
        return (y - x).square()

    @staticmethod
    def backward(ctx, upstream):
        y, x = ctx.saved_tensors
        (y,) = behind_upstream(upstream, y)
        slope = 2 * upstream * (y - x)
        return slope, -slope


def absolute(y: Tensor, x: Tensor, wants_value: bool, signs: Tensor | None, spare: Sequence[Tensor]) -> Tensor | None:
    """The sizes of differences, if they are wanted, and their signs."""
    difference = torch.sub(y, x, out=spare[0] if signs is None else signs)
    values = torch.abs(difference, out=spare[1]) if wants_value else None
    difference.sign_()
    return values


class CompiledDistances(torch.autograd.Function):
    """The sizes of differences, likewise."""

    @staticmethod
    def forward(ctx, y, x):
        ctx.save_for_backward(y, x)
        return (y - x).abs()

    @staticmethod
    def backward(ctx, upstream):
        y, x = ctx.saved_tensors
        (y,) = behind_upstream(upstream, y)
        slope = upstream * torch.sign(y - x)
        return slope, -slope
