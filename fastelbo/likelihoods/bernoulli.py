"""Likelihoods of values in [0, 1]: Bernoulli and continuous Bernoulli, of probabilities or of their logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.numerics import (
    log1p,
    log_ratio_to_tanh,
    log_ratio_to_tanh_and_derivative,
    nan_unless,
    softplus,
    softplus_in_parts,
)
from ..basics.records import canonical, record
from ..basics.scalars import ONE, as_tensor, check_finite
from ..basics.tracing import behind_upstream, is_behind_dynamo, is_seen, is_wrapper
from .base import SUM, Likelihood, OnePass, check_given_once
from .values import BITS, UNIT

QUITE_FEW, FEW = 2**13, 2**14  # elements, up to which calls cost more than passes
SMALL_TERM = 2**-4  # nats of a loss, or of its linear part
SURE = 3  # of a logit's size in the mean

DENOMINATOR = 9.999999960041972e-13  # 1e-12 in float32, which Torch clamps by in every dtype


@record
class Bernoulli(Likelihood):
    """Bits or gray values by their probabilities: `F.binary_cross_entropy(recon_x, x)`, with its logarithms clamped at -100.

    `recon_x` and `x` lie in [0, 1]; `uint8` images take `target_scale=1/255`.
    """

    name = kernel = kernel_at_zero = "bernoulli"
    ranges = (UNIT,)
    checked_by_torch = True

    def support(self, first, x):
        return UNIT

    def nll(self, parameters, x):
        (p,) = parameters
        if is_behind_dynamo():
            return _Compiled.apply(p, x)
        # Torch's function raises on a CPU, and stops a GPU, where something is NaN or outside: here that gives NaN, throughout.
        inside = (p.clamp(0, 1) == p) & (x.clamp(0, 1) == x)
        invalid = (p + x) * torch.where(inside, 0.0, torch.nan).to(p.dtype)
        p, x, kind = torch.where(inside, p, 0.5), torch.where(inside, x, 0.5), p.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # which refuses this function on a GPU, even for float32
                return F.binary_cross_entropy(p, x, reduction="none") + invalid
        return F.binary_cross_entropy(p, x, reduction="none") + invalid

    def few(self, weighted):
        return 2**12  # since Torch's logarithms are not vectorized there

    def sum_by_torch(self, parameters, x, weight):
        try:
            total = torch._C._nn.binary_cross_entropy(parameters[0], x, weight, SUM)
        except RuntimeError:  # of what lies outside [0, 1]
            return None
        return total if weight is None or math.isfinite(total.item()) else None

    def at_zero(self, parameters):
        return self.nll_of_zeros(parameters)

    def one_pass(self, parameters, x, wants_value, out, spare):
        # As in Torch: logarithms clamped at -100. Its own functions take fewer calls, but their logarithms are not vectorized.
        (p,), (gradient,), values, scale = parameters, out, None, 1.0
        seen = p.numel() <= QUITE_FEW and p.dtype == torch.float32 and is_seen(p)
        if gradient is not None and seen:
            torch.ops.aten.binary_cross_entropy_backward.grad_input(ONE, p, x, None, 0, grad_input=gradient)
        elif gradient is not None:
            denominator = torch.sub(ONE, p, out=spare[1]).mul_(p).clamp_(min=DENOMINATOR)
            torch.sub(p, x, out=gradient).div_(denominator)
        if wants_value:
            of_one = torch.log(p, out=spare[0]).clamp_(min=-100)
            of_zero = torch.neg(p, out=spare[1]).log1p_().clamp_(min=-100)
            values, scale = torch.lerp(of_zero, of_one, x, out=of_zero), -1.0
        return OnePass(values, scale)


class _Compiled(torch.autograd.Function):
    """Likewise, for the compiler. Masks would be stored for backward, and on a CPU take five times as long."""

    @staticmethod
    def forward(ctx, p, x):
        ctx.save_for_backward(p, x)
        values = (x - 1) * log1p(-p).clamp(min=-100) - x * torch.log(p).clamp(min=-100)
        return torch.where((x - 1) * x <= 0, values, torch.nan)  # a logarithm is NaN where p lies outside

    @staticmethod
    def backward(ctx, upstream):
        p, x = ctx.saved_tensors
        spread = (1 - p) * p
        inside = (spread >= 0) & ((1 - x) * x >= 0)
        # What does not depend on the upstream, the compiler would write in forward, by a launch of its own, to read it again.
        by_p = torch.where(inside, upstream * (p - x), torch.nan) / spread.clamp(min=DENOMINATOR)
        return by_p, torch.where(inside, upstream * (log1p(-p) - torch.log(p)), torch.nan)


@record
class BernoulliLogits(Likelihood):
    """Bits or gray values by logits: `F.binary_cross_entropy_with_logits(recon_x, x, pos_weight=pos_weight)`.

    `recon_x` is the logits, or the tuple (logits, pos_weight) where the weight is a tensor: one that is learned, or one a
    feature.

    Args:
        pos_weight: a number that weighs the positive part, such as negatives / positives.

    Raises:
        TypeError: `pos_weight` is no number. A tensor goes into the tuple.
    """

    pos_weight: float | None = None
    name = kernel = "bernoulli_logits"
    kernel_at_zero = "bernoulli_logits_at_zero"
    parameters = ("logits", "pos_weight")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.pos_weight, Tensor):
            raise TypeError(
                "BernoulliLogits.pos_weight must be a number: pass a tensor as the second of the tuple (logits, pos_weight)"
            )
        if self.pos_weight is not None:
            canonical(self, "pos_weight", check_finite)

    @property
    def counts(self):
        return (1, 2)

    @property
    def fixed(self):
        return self.pos_weight

    def check(self, name, parameters, x):
        super().check(name, parameters, x)
        check_given_once(self, "pos_weight", parameters)

    def support(self, first, x):
        return BITS

    def nll(self, parameters, x):
        logits, *given = parameters
        weight = given[0] if given else self.pos_weight
        if is_behind_dynamo():
            return _CompiledLogits.apply(logits, x, weight)
        if weight is None and is_wrapper(logits):  # of Torch's functions that do it, DTensors have this one
            return F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        # That one loses what is small beside a logit.
        of_one = x * softplus(-logits)
        return (1 - x) * softplus(logits) + (of_one if weight is None else of_one * weight)

    def few(self, weighted):
        return 2**20 if weighted or self.pos_weight is not None else 2**17

    def sum_by_torch(self, parameters, x, weight):
        if x.numel() > 2**16 and torch.get_num_threads() == 1 and weight is None and self.pos_weight is None:
            return None  # since several threads cost each operator a start
        (logit,), positives = parameters, None if self.pos_weight is None else as_tensor(self.pos_weight, x.dtype)
        total = torch.binary_cross_entropy_with_logits(logit, x, weight, positives, SUM)
        if total.item() > SMALL_TERM * x.numel():
            return total
        # It loses what is small beside a logit, and so the digits of a sum that is all small; with weights of positives also
        # those of its gradient, which is right without.
        if positives is not None:
            return None
        with torch.no_grad():
            if weight is None:
                total.copy_(_linear(logit, x, None).sum() + _sums_of_logs(torch.abs(logit), 1).sum())
            else:
                total.copy_(self.one_pass(parameters, x, True, (None,), (None,) * 3).values.mul_(weight).sum())
        return total if math.isfinite(total.item()) else None

    def at_zero(self, parameters):
        return softplus(parameters[0])

    def one_pass_at_zero(self, parameters, wants_value, out, spare):
        (logit, *_), (to_logit, *to_weight), values = parameters, out, None
        if wants_value:
            positive, remainder = softplus_in_parts(logit, spare)
            values = positive.sub_(remainder)
        if to_logit is not None:
            torch.sigmoid(logit, out=to_logit)
        if to_weight and to_weight[0] is not None:
            to_weight[0].zero_()
        return OnePass(values, slopes=(1.0,) * len(parameters))

    def one_pass(self, parameters, x, wants_value, out, spare):
        if len(parameters) > 1 or self.pos_weight is not None:
            return self._weighted_in_one_pass(parameters, x, wants_value, out, spare)
        # max(l, 0) - x l + log1p(exp(-|l|)).
        (logit,), (gradient,), values = parameters, out, None
        if wants_value and logit.numel() <= FEW:
            # The same in fewer calls: softplus(y, -1) is -log1p(exp(-y)).
            values = _linear(logit, x, None).sub_(F.softplus(torch.abs(logit), -1))
        elif wants_value:
            positive = torch.clamp_min(logit, 0, out=spare[0])  # in an operator less than `softplus_in_parts`
            remainder = torch.sub(logit, positive, alpha=2, out=spare[1]).sigmoid_().neg_().log1p_()
            values = positive.addcmul_(logit, x, value=-1).sub_(remainder)
        if gradient is not None:
            torch.sigmoid(logit, out=gradient).sub_(x)
        return OnePass(values)

    def sums_in_one_pass(self, parameters, x, wants_value, out, spare, rows):
        (logit, *more), (gradient, *_), n = parameters, out, x.numel()
        if not wants_value or n <= 2 * FEW or more or self.pos_weight is not None or not is_seen(logit):
            return self.one_pass(parameters, x, wants_value, out, spare)
        linear = _in_parts(_linear(logit, x, spare[0]), rows, 1).sum((1, 2))
        p = torch.sigmoid(logit, out=spare[2] if gradient is None else gradient)
        is_large = rows == 1 and linear.item() > SMALL_TERM * n
        # Where the linear part is small, and logits are not, the sum is small: no need to find out by the cheaper form first.
        sizes = None if rows > 1 or is_large else torch.abs(logit, out=spare[1])
        if sizes is not None and sizes.sum().item() > SURE * n:
            total = linear.add_(_sums_of_logs(sizes, 1))
        else:
            # As in `one_pass`, but that log1p(exp(-|l|)) is -log(q), q = max(p, 1 - p): one logarithm for 64, of their product.
            q = torch.sub(ONE, p, out=spare[1])
            q = _in_parts(torch.maximum(p, q, out=q), rows, 64)
            total = linear - q.prod(1).log_().sum(1)
            if not is_large and not total.min().item() * rows > SMALL_TERM * n:  # or NaN
                small = torch.nonzero(~(total * rows > SMALL_TERM * n)).squeeze(1)
                sizes = torch.abs(logit, out=spare[1])
                sizes = sizes if len(small) == rows else sizes.view(rows, -1).index_select(0, small)
                total.index_copy_(0, small, linear.index_select(0, small) + _sums_of_logs(sizes, len(small)))
        if gradient is not None:
            gradient.sub_(x)
        return OnePass(total.unsqueeze(1))

    def _weighted_in_one_pass(self, parameters, x, wants_value, out, spare):
        # (1 - x) softplus(l) + w x softplus(-l), of which each is a maximum and log1p(exp(-|l|)): no two terms cancel.
        (logit, *given), (to_logit, *to_weight), values = parameters, out, None
        weight, to_weight = given[0] if given else None, to_weight[0] if to_weight else None
        number = 1.0 if self.pos_weight is None else self.pos_weight  # where there is no tensor
        if wants_value or to_weight is not None:
            values, remainder = softplus_in_parts(logit, spare)
            positive = torch.sub(values, logit, out=spare[2] if to_weight is None else to_weight).sub_(remainder).mul_(x)
            values.sub_(remainder)
            values.addcmul_(values, x, value=-1)
            values = values.add_(positive, alpha=number) if weight is None else values.addcmul_(positive, weight)
        if to_logit is not None:
            p = torch.sigmoid(logit, out=to_logit)
            p.addcmul_(p, x, value=-1)
            other = torch.neg(logit, out=spare[1]).sigmoid_().mul_(x)
            p.sub_(other, alpha=number) if weight is None else p.addcmul_(other, weight, value=-1)
        return OnePass(values, slopes=(1.0,) * len(parameters))

    def function(self, parameters):
        return self.kernel if parameters == 1 else "bernoulli_logits_weighted"


class _CompiledLogits(torch.autograd.Function):
    """The same for the compiler, by one logarithm. No two terms cancel."""

    @staticmethod
    def forward(ctx, logit, x, weight):
        tensor = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(logit, x, tensor)
        ctx.weight = weight if tensor is None else None
        size = logit.abs()
        rest = log1p(torch.exp(-size))
        if weight is None:
            return size * torch.where(logit > 0, 1 - x, x) + rest
        positive = weight * x
        return size * torch.where(logit > 0, 1 - x, positive) + (1 - x + positive) * rest

    @staticmethod
    def backward(ctx, upstream):
        logit, x, tensor = ctx.saved_tensors
        weight, by_weight = ctx.weight if tensor is None else tensor, None
        if weight is None:
            return upstream / (1 + torch.exp(-logit)) - upstream * x, -upstream * logit, None
        logit, x = behind_upstream(upstream, logit, x)
        e = torch.exp(-logit.abs())
        share = upstream / (1 + e)
        by_logit = share * ((1 - x) * torch.where(logit > 0, 1.0, e) - weight * x * torch.where(logit > 0, e, 1.0))
        of_one = (-logit).clamp(min=0) + log1p(e)
        if ctx.needs_input_grad[2]:
            by_weight = (upstream * x * of_one).sum_to_size(tensor.shape)
        return by_logit, upstream * (weight * of_one - (of_one + logit)), by_weight


@record
class ContinuousBernoulli(Likelihood):
    """Values in [0, 1], as a density: `-ContinuousBernoulli(recon_x).log_prob(x)` (Loaiza-Ganem and Cunningham, The Continuous
    Bernoulli, 2019). Probabilities are kept from 0 and 1 by one rounding, as `torch.distributions` does.
    """

    name = kernel = "continuous_bernoulli"
    ranges = (UNIT,)

    def support(self, first, x):
        return UNIT

    def nll(self, parameters, x):
        (p,) = parameters
        p = nan_unless((p >= 0) & (p <= 1), p)
        eps = torch.finfo(p.dtype).eps  # by which `torch.distributions.ContinuousBernoulli` keeps them from 0 and 1
        p = torch.where(p < eps, eps, torch.where(p > 1 - eps, 1 - eps, p))  # as clamp, but that the gradient by NaN is not 0
        return _continuous_nll(torch.log(p) - torch.log1p(-p), x)

    def one_pass(self, parameters, x, wants_value, out, spare):
        (p,), (gradient,), eps = parameters, out, torch.finfo(parameters[0].dtype).eps
        if not is_seen(p):
            return None
        lowest, highest = torch.aminmax(p)
        if not (lowest >= eps and highest <= 1 - eps):
            return None
        logit = torch.log(p, out=spare[4]).sub_(torch.neg(p, out=spare[5]).log1p_())
        values = _continuous_in_one_pass(logit, x, wants_value, gradient, spare)
        if gradient is not None:
            gradient.div_(torch.addcmul(p, p, p, value=-1))
        return OnePass(values)


@record
class ContinuousBernoulliLogits(Likelihood):
    """Values in [0, 1], as a density, by logits: `-ContinuousBernoulli(logits=recon_x).log_prob(x)` (Loaiza-Ganem and
    Cunningham, The Continuous Bernoulli, 2019).
    """

    name = kernel = "continuous_bernoulli_logits"

    def support(self, first, x):
        return BITS

    def nll(self, parameters, x):
        return _continuous_nll(parameters[0], x)

    def one_pass(self, parameters, x, wants_value, out, spare):
        return OnePass(_continuous_in_one_pass(parameters[0], x, wants_value, out[0], spare))


def _continuous_nll(logit: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit, x, reduction="none") - log_ratio_to_tanh(logit)


def _continuous_in_one_pass(logit: Tensor, x: Tensor, wants_value: bool, gradient: Tensor | None, spare) -> Tensor | None:
    """The negative log-likelihood of each, if it is wanted, and its derivative by the logit."""
    log_ratio, slope = log_ratio_to_tanh_and_derivative(logit)
    if gradient is not None:
        torch.sigmoid(logit, out=gradient).sub_(x).sub_(slope)
    if not wants_value:
        return None
    positive, remainder = softplus_in_parts(logit, spare)
    return positive.addcmul_(logit, x, value=-1).sub_(remainder).sub_(log_ratio)


def _linear(logit: Tensor, x: Tensor, buffer: Tensor | None) -> Tensor:
    """max(l, 0) - x l."""
    return torch.clamp_min(logit, 0, out=buffer).addcmul_(logit, x, value=-1)


def _sums_of_logs(sizes: Tensor, rows: int) -> Tensor:
    """The sums of log(1 + exp(-|l|)) of so many rows, with the digits of what is far below 1, from |l|, which it writes to."""
    # One logarithm for up to eight. It is -log(1 - p), p = sigmoid(-|l|), and 1 - (1 - p) (1 - q) = p + q - p q.
    rest = _in_parts(sizes.neg_().sigmoid_(), rows, 8)
    while rest.shape[1] > 1:
        one, other = rest.chunk(2, 1)
        rest = one.addcmul_(one, other, value=-1).add_(other)
    return rest.neg_().log1p_().sum((1, 2)).neg_()


def _in_parts(values: Tensor, rows: int, most: int) -> Tensor:
    """The same memory, `[rows, parts, columns]`: parts are a power of two up to `most`, of 64 columns or more."""
    size = values.numel() // rows
    parts = math.gcd(size, most)
    while parts > 1 and size < 64 * parts:
        parts //= 2
    columns = size // parts
    return values.as_strided((rows, parts, columns), (size, columns, 1))
