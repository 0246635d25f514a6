"""Formulas of Torch operations that keep their digits, in value and in derivatives, where the textbook's do not."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .scalars import ONE
from .tracing import is_behind_dynamo, is_compiling, is_seen, is_transformed, never_compiled


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); `F.softplus` becomes x beyond a threshold, where its derivative jumps by 2e-9."""
    return _CompiledSoftplus.apply(x) if is_behind_dynamo() else -F.logsigmoid(-x)


# Beyond which softplus(x) is x in float64, too. Torch's operator has 20, where they are 2e-9 apart.
SOFTPLUS_IS_LINEAR = 40.0


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) for x from -1 to 1, for the compiler. On a CPU a logarithm takes three quarters of `torch.log1p`: what 1 + x
    loses by rounding is added again, to first order. A GPU's logarithm has few digits near 1."""
    if x.device.type != "cpu":
        return torch.log1p(x)
    rounded = 1 + x
    return torch.log(rounded) + (x - (rounded - 1))


class _CompiledSoftplus(torch.autograd.Function):
    """The same for the compiler, whose derivative of `logsigmoid` chooses among integers of 64 bits."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0) + log1p(torch.exp(-x.abs()))

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return upstream * torch.sigmoid(x)


class CompiledBound(torch.autograd.Function):
    """softplus and the reciprocal of its exponential, sigmoid(-x), for the compiler: each pass takes one exponential, and only
    one of them a logarithm."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        e = torch.exp(-x.abs())
        return x.clamp(min=0) + log1p(e), torch.where(x > 0, e, 1.0) / (1 + e)

    @staticmethod
    def backward(ctx, to_value, to_inverse):
        (x,) = ctx.saved_tensors
        e = torch.exp(-x.abs())
        share = 1 / (1 + e)
        inverse = torch.where(x > 0, e, 1.0) * share
        return (to_value - to_inverse * inverse) * (torch.where(x > 0, 1.0, e) * share)


def softplus_in_parts(logit: Tensor, spare) -> tuple[Tensor, Tensor]:
    """max(l, 0), and what log(1 + exp(l)) is less than it: log(1 - q) with q = sigmoid(-|l|), which is cheaper than exp. They
    lie in the first two buffers."""
    remainder = torch.abs(logit, out=spare[1]).neg_().sigmoid_().neg_().log1p_()
    return torch.clamp_min(logit, 0, out=spare[0]), remainder


def sum_of_softplus(x: Tensor, p: Tensor, buffer: Tensor | None = None) -> Tensor:
    """The sum of log(1 + exp(x)), given p = sigmoid(x): max(x, 0) - log(max(p, 1 - p)), in each term off by a rounding of 1."""
    q = torch.sub(ONE, p, out=buffer)
    logs = sum_of_logs(torch.maximum(p, q, out=q), 64)
    return torch.clamp_min(x, 0, out=q).sum().sub_(logs)


def sum_of_logs(values: Tensor, together: int) -> Tensor:
    """With one logarithm for the product of so many, which must not underflow."""
    flat = values.view(-1)
    n = flat.numel() // together * together
    total = flat[:n].view(together, -1).prod(0).log_().sum()
    return total if n == flat.numel() else total.add_(torch.log(flat[n:]).sum())


def nan_unless(valid: Tensor, x: Tensor) -> Tensor:
    """x where it is `valid`; elsewhere NaN, with a gradient of NaN."""
    return x * torch.where(valid, 1.0, torch.nan).to(x.dtype)  # or the default dtype would count


def positive(x: Tensor) -> Tensor:
    """x where it is positive; elsewhere NaN, with a gradient of NaN."""
    return nan_unless(x > 0, x)


def with_derivative(function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, element by element, with that derivative in place of autograd's, in which terms would cancel.

    Not where Dynamo goes through a call, which takes no Function with a `jvp`, and warns where it traces one at all: there it
    is autograd's.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        @never_compiled
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return function(x)

        @staticmethod
        @never_compiled
        def backward(ctx, upstream):
            return upstream * derivative(*ctx.saved_tensors)

    class Transformed(torch.autograd.Function):  # the form that torch.func wants, which costs three times as much
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return function(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        backward = staticmethod(Eager.backward)

        @staticmethod
        def jvp(ctx, tangent):
            return tangent * derivative(*ctx.saved_tensors)

    def call(x: Tensor) -> Tensor:
        if is_compiling():
            return Eager.apply(x) if is_behind_dynamo() else function(x)
        if is_transformed():
            return Transformed.apply(x)
        return Eager.apply(x) if x.requires_grad else function(x)

    return call


# What a variance is more than its logarithm, less 1: of a Gaussian's KL from N(0, 1), twice what is not the mean's. Its minimum
# of 0 is where the variance is 1, and there the derivatives of its terms cancel. From the logarithm, the deviation and the
# variance itself; the last two are NaN, as their derivatives are, of what is negative:
excess_of_logvar = with_derivative(lambda x: torch.expm1(x) - x, torch.expm1)
excess_of_std = with_derivative(
    lambda x: (x - 1) * (x + 1) - 2 * torch.log(x), lambda x: torch.where(x >= 0, 2 * ((x - 1) * (x + 1) / x), torch.nan)
)
excess_of_var = with_derivative(lambda x: x - 1 - torch.log(x), lambda x: torch.where(x >= 0, (x - 1) / x, torch.nan))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0 (Maechler, Accurately computing log(1 - exp(-|a|)), 2012)."""
    small = x < math.log(2)
    near = torch.log(-torch.expm1(-torch.where(small, x, 1.0)))
    return torch.where(small, near, torch.log1p(-torch.exp(-torch.where(small, 1.0, x))))


def log_bin(lower: Tensor, upper: Tensor, width: Tensor, log_width: Tensor, x: Tensor, half: float) -> Tensor:
    """The logarithm of what a standard logistic distribution holds between `lower` and `upper`, which are `width` apart; of the
    lowest bin, with x less than `half` from -1, from -infinity, of the highest to infinity.

    sigmoid(upper) - sigmoid(lower) = sigmoid(upper) sigmoid(-lower) (1 - exp(-width)): nothing cancels, however little that is.
    """
    if lower.dtype == torch.float32 and is_behind_dynamo():
        return _CompiledBin.apply(lower, upper, width.detach(), log_width, x.detach(), half)
    lowest, highest = x < half - 1, x > 1 - half
    log_p = torch.where(highest, 0.0, F.logsigmoid(upper)) + torch.where(lowest, 0.0, F.logsigmoid(-lower))
    return log_p + torch.where(lowest | highest, 0.0, _log_mass(width, log_width))


class _CompiledBin(torch.autograd.Function):
    """The same in float32 for the compiler, with one logarithm: log1p of what the three probabilities lack of 1, together."""

    @staticmethod
    def forward(ctx, lower, upper, width, log_width, x, half):
        ctx.save_for_backward(lower, upper, width, log_width, x)
        ctx.half = half
        lowest, highest = x < half - 1, x > 1 - half
        above = torch.where(highest, 0.0, torch.exp(-upper.abs()))
        below = torch.where(lowest, 0.0, torch.exp(-lower.abs()))
        outside = above + below + above * below
        is_narrow, is_end = width < 1, lowest | highest
        w = width * width
        narrow = log_width - 0.5 * width + w * (1 / 24 - w * (1 / 2880 - w * (1 / 181440 - w * (1 / 9676800))))
        missed = torch.where(is_narrow | is_end, 0.0, torch.exp(-width))
        log_p = torch.where(highest, 0.0, upper.clamp(max=0)) - torch.where(lowest, 0.0, lower.clamp(min=0))
        log_p = log_p + log1p(-(missed + outside) / (1 + outside))
        return log_p + torch.where(is_narrow & ~is_end, narrow, 0.0)

    @staticmethod
    def backward(ctx, upstream):
        lower, upper, width, log_width, x = ctx.saved_tensors
        lowest, highest = x < ctx.half - 1, x > 1 - ctx.half
        by_upper = torch.where(highest, 0.0, torch.sigmoid(-upper) * upstream)
        by_lower = torch.where(lowest, 0.0, -torch.sigmoid(lower) * upstream)
        # width / expm1(width): narrow ones would lose digits there.
        w, rest = width * width, torch.exp(-width)
        narrow = 1 - 0.5 * width + w * (1 / 12 - w * (1 / 720 - w * (1 / 30240 - w * (1 / 1209600))))
        wide = width * rest / (1 - rest)
        by_width = torch.where(lowest | highest, 0.0, torch.where(width < 1, narrow, wide) * upstream)
        found = by_lower.sum_to_size(lower.shape), by_upper.sum_to_size(upper.shape)
        return *found, None, by_width.sum_to_size(log_width.shape), None, None


# A bound that is this far away is none: what it adds is below the least number of float32.
_FAR = {dtype: torch.tensor(104.0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def bin_in_one_pass(
    x: Tensor, centered: Tensor, inverse: Tensor, half: float, buffers: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`-log_bin` of the bins from `centered - half` to `centered + half` times `inverse`, which have no bound where x is at an
    end of [-1, 1]; its derivatives by what is taken from `centered`, over `inverse`, and by the logarithm of the scale.

    Seven buffers, to be written to, or None. None where x is outside, or widths overflow or underflow: `log_bin` is for that.
    """
    (low, high), (narrowest, widest) = torch.aminmax(x), torch.aminmax(inverse)
    if not (low.item() >= -1 - half and high.item() <= 1 + half and narrowest.item() * half > 1e-30 and widest.item() < 1e30):
        return None
    upper = torch.add(centered, half, out=buffers[0]).mul_(inverse)
    lower = torch.sub(centered, half, out=buffers[1]).mul_(inverse)
    at_end = torch.gt(x, 1 - half, out=torch.empty_like(x))
    upper.lerp_(_FAR[x.dtype], at_end.expand_as(upper))
    at_start = torch.lt(x, half - 1, out=torch.empty_like(x))
    lower.lerp_(-_FAR[x.dtype], at_start.expand_as(lower))
    between = at_end.add_(at_start).neg_().add_(1)
    width = torch.mul(inverse, 2 * half, out=fitting(buffers[2], inverse))
    mass = torch.neg(width, out=fitting(buffers[3], inverse)).expm1_().neg_().log_()
    below, above = torch.neg(upper, out=buffers[4]), torch.sigmoid(lower, out=buffers[5])
    values = torch.ops.aten.softplus.out(below, 1, SOFTPLUS_IS_LINEAR, out=room(buffers[6], below))
    below.sigmoid_()
    by_scale = upper.mul_(below).addcmul_(above, lower, value=-1)
    by_scale.addcmul_(between, width.div_(torch.expm1(width)))
    values.add_(torch.ops.aten.softplus.out(lower, 1, SOFTPLUS_IS_LINEAR, out=lower)).addcmul_(between, mass, value=-1)
    return values, below.sub_(above), by_scale


def room(buffer: Tensor | None, like: Tensor) -> Tensor:
    """A buffer, or new memory where there is none."""
    return torch.empty_like(like) if buffer is None else buffer


def fitting(buffer: Tensor | None, like: Tensor) -> Tensor | None:
    """A buffer for what has the shape of `like`, which may be smaller."""
    return buffer if buffer is None or buffer.shape == like.shape else None


def _log_mass(width: Tensor, log_width: Tensor) -> Tensor:
    """log(1 - exp(-width)), in which a width that underflows keeps its logarithm."""
    if is_seen(width) and (width > 1e-30).all():
        return log1mexp(width)
    small = width < 0.1
    w = torch.where(small, width, 0.0).square()
    near = log_width - 0.5 * width + w * (1 / 24 - w * (1 / 2880 - w * (1 / 181440 - w * (1 / 9676800))))
    return torch.where(small, near, log1mexp(torch.where(small, 1.0, width)))


# Taylor's series in x^2 of log(x / tanh(x / 2)), and of its derivative over x.
_LOG_RATIO_TO_TANH = math.log(2), 1 / 12, -7 / 1440, 31 / 90720, -127 / 4838400, 73 / 34214400
_ITS_SLOPE = tuple(2 * i * c for i, c in enumerate(_LOG_RATIO_TO_TANH))[1:]


def log_ratio_to_tanh(x: Tensor) -> Tensor:
    """log(x / tanh(x / 2)), which is even, and log 2 at 0."""
    square = x * x
    small = square < (0.01 if x.dtype == torch.float64 else 0.25)  # as far as the series goes
    s = torch.where(small, square, 0.0)
    constant, *rest, last = _LOG_RATIO_TO_TANH
    near = last * s
    for coefficient in reversed(rest):
        near = (coefficient + near) * s
    near = constant + near
    far = torch.where(small, 1.0, x.abs())
    return torch.where(small, near, far.log() + softplus(-far) - log1mexp(far))


def log_ratio_to_tanh_and_derivative(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with its derivative, 1 / x - 1 / sinh(x), which is odd."""
    size = x.abs()
    least = 0.1 if x.dtype == torch.float64 else 0.5
    is_small = torch.lt(size, least, out=torch.empty_like(x))
    t = torch.clamp(x, -least, least)
    s = torch.mul(t, t)
    near, near_slope = _polynomial(s, _LOG_RATIO_TO_TANH), _polynomial(s, _ITS_SLOPE).mul_(t)
    size.clamp_(min=least)
    e = torch.neg(size).exp_()
    twice = torch.add(e, e).div_(1 - e)  # 2 e / (1 - e), and 1 / tanh(x / 2) is 1 more
    slope = torch.reciprocal(size).sub_(torch.div(twice, e.add_(1))).copysign_(x)
    value = torch.log(size).add_(twice.log1p_())
    return choose(is_small, near, value), choose(is_small, near_slope, slope)


def choose(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` where a mask of the same dtype is 1, `other` where it is 0, both finite, in the place of `other`. On a CPU
    `torch.where` takes ten times as long: it jumps."""
    return torch.lerp(other, one, mask, out=other)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """From the constant upwards."""
    *rest, last = coefficients
    total = torch.mul(x, last)
    for coefficient in reversed(rest[1:]):
        total.add_(coefficient).mul_(x)
    return total.add_(rest[0])
