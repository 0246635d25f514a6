"""Likelihoods of counts: negative binomial and its zero-inflated form."""

import math

import torch
from torch import Tensor

from ..basics.gamma import log_factorial, log_gamma_ratio, log_gamma_ratio_in_parts
from ..basics.numerics import fitting, room, softplus, softplus_in_parts, sum_of_logs, sum_of_softplus
from ..basics.records import record
from ..basics.scalars import ONE
from ..basics.tracing import is_seen
from .base import Likelihood, OnePass
from .links import Linked
from .values import NONNEGATIVE, POSITIVE

EPS = 1e-8  # by which scvi-tools keeps its logarithms from 0, and so a mean of 0 with a count above it from infinity


@record
class NegativeBinomial(Linked):
    """Counts that vary more than a Poisson's: mean mu, variance mu + mu^2 / theta.

    `recon_x` is the tuple (mu, theta); theta is the inverse dispersion. It is scvi-tools' `NegativeBinomial(mu, theta)` (Lopez
    et al., Deep generative modeling for single-cell transcriptomics, 2018). Means and counts are not negative, theta is
    positive.
    """

    mean: str = "identity"
    inverse_dispersion: str = "identity"
    name = "negative_binomial"
    kernel, kernel_at_zero = "negative_binomial", "negative_binomial_at_zero"
    summed = (1,)
    unlinked, unlinked_ranges = ("mean", "inverse_dispersion"), (NONNEGATIVE, POSITIVE)

    def support(self, first, x):
        return NONNEGATIVE

    def nll(self, parameters, x):
        mean, theta = self.link(parameters)
        return zeros_nll(mean, theta) + _beyond_zero(mean, theta, x)

    def at_zero(self, parameters):
        return zeros_nll(*self.link(parameters))

    def one_pass(self, parameters, x, wants_value, out, spare):
        return self._in_one_pass(parameters, x, wants_value, out, spare, False)

    def sums_in_one_pass(self, parameters, x, wants_value, out, spare, rows):
        return self._in_one_pass(parameters, x, wants_value, out, spare, rows == 1)

    def _in_one_pass(self, parameters, x, wants_value, out, spare, in_sum):
        (mean, theta), (to_mean, to_theta) = parameters, out
        index, count = _above_zero(x)
        if not _is_common(mean, theta, count):
            return None
        if index is None:
            values, by_theta = _counts_in_one_pass(mean, theta, x, wants_value, to_mean, to_theta, spare)
        else:
            values, by_theta = _zeros_in_one_pass(mean, theta, to_mean, to_theta, spare)
            if wants_value and in_sum:  # what few others add to one sum needs no place among the values
                values = values.sum().view(1, 1)
            _add_beyond_zero(mean, theta, count, index, values if wants_value else None, to_mean, by_theta)
        _put_sums(by_theta, to_theta)
        return OnePass(values if wants_value else None, slopes=(1.0, 1.0))

    def one_pass_at_zero(self, parameters, wants_value, out, spare):
        (mean, theta), (to_mean, to_theta) = parameters, out
        if not _is_common(mean, theta, mean.new_zeros(())):
            return None
        values, _ = _zeros_in_one_pass(mean, theta, to_mean, to_theta, spare)
        return OnePass(values, slopes=(1.0, 1.0))


@record
class ZeroInflatedNegativeBinomial(Linked):
    """Counts with more zeros than a negative binomial has: scvi-tools' `ZeroInflatedNegativeBinomial(mu, theta, zi_logits)`.

    `recon_x` is the tuple (mu, theta, logits of the share of extra zeros); the first two, and the links `mean` and
    `inverse_dispersion`, are as in `NegativeBinomial`. With "softmax" the library comes behind the three.
    """

    mean: str = "identity"
    inverse_dispersion: str = "identity"
    name = "zero_inflated_negative_binomial"
    kernel, kernel_at_zero = "zero_inflated_negative_binomial", "zero_inflated_negative_binomial_at_zero"
    summed = (1,)
    unlinked, unlinked_ranges = ("mean", "inverse_dispersion", "zi_logits"), (NONNEGATIVE, POSITIVE, None)

    def support(self, first, x):
        return NONNEGATIVE

    def nll(self, parameters, x):
        mean, theta, logits = self.link(parameters)
        zeros = zeros_nll(mean, theta)
        is_zero = _inflated_zeros_nll(zeros, logits)
        return torch.where((x < EPS) & (x >= 0), is_zero, softplus(logits) + zeros + _beyond_zero(mean, theta, x))

    def at_zero(self, parameters):
        mean, theta, logits = self.link(parameters)
        return _inflated_zeros_nll(zeros_nll(mean, theta), logits)

    def one_pass(self, parameters, x, wants_value, out, spare):
        return self._in_one_pass(parameters, x, wants_value, out, spare, False)

    def sums_in_one_pass(self, parameters, x, wants_value, out, spare, rows):
        return self._in_one_pass(parameters, x, wants_value, out, spare, rows == 1)

    def _in_one_pass(self, parameters, x, wants_value, out, spare, in_sum):
        (mean, theta, logits), (to_mean, to_theta, to_logits) = parameters, out
        if logits.shape != x.shape or not logits.is_contiguous():
            return None
        index, count = _above_zero(x, 1.0)
        if not _is_common(mean, theta, count, EPS):
            return None
        of_all = index is None or index.numel() > MANY * x.numel()
        if of_all:
            values, by_theta = _counts_in_one_pass(mean, theta, x, wants_value or index is not None, to_mean, to_theta, spare)
        else:
            values, by_theta = _zeros_in_one_pass(mean, theta, to_mean, to_theta, spare)
        if index is None:
            p = torch.sigmoid(logits, out=spare[2] if to_logits is None else to_logits)
            if wants_value and in_sum:
                values = values.sum().add_(sum_of_softplus(logits, p, spare[3])).view(1, 1)
            elif wants_value:
                values.add_(softplus(logits))
            _put_sums(by_theta, to_theta)
            return OnePass(values if wants_value else None, slopes=(1.0, 1.0, 1.0))
        parts = _inflated_zeros_in_one_pass(values, logits, to_logits, spare)
        if parts is None:
            return None
        inflated, by_zeros, p, least = parts
        own = inflated.view(-1).index_select(0, index)
        if to_logits is not None:
            to_logits.view(-1).scatter_(0, index, own)
        by_zeros.view(-1).index_fill_(0, index, 1)
        for gradient in (to_mean, by_theta):
            if gradient is not None:
                gradient.mul_(by_zeros)
        if wants_value:
            logits, beyond = (t.view(-1).index_select(0, index) for t in (logits, values))
            if in_sum and not of_all:
                p.view(-1).index_fill_(0, index, 1)
                logs = sum_of_logs(p, 8 if least > 1e-4 else 1)
                values = beyond.sum().add_(sum_of_softplus(logits, own)).sub_(logs).view(1, 1)
            else:
                values = p.log_().neg_()
                values.view(-1).scatter_(0, index, softplus(logits).add_(beyond))
        if not of_all:
            _add_beyond_zero(mean, theta, count, index, values if wants_value else None, to_mean, by_theta)
        _put_sums(by_theta, to_theta)
        return OnePass(values if wants_value else None, slopes=(1.0, 1.0, 1.0))

    def one_pass_at_zero(self, parameters, wants_value, out, spare):
        (mean, theta, logits), (to_mean, to_theta, to_logits) = parameters, out
        if not logits.is_contiguous() or not _is_common(mean, theta, mean.new_zeros(())):
            return None
        zeros, _ = _zeros_in_one_pass(mean, theta, to_mean, to_theta, spare)
        parts = _inflated_zeros_in_one_pass(zeros, logits, to_logits, spare)
        if parts is None:
            return None
        _, by_zeros, p, _ = parts
        for gradient in (to_mean, to_theta):
            if gradient is not None:
                gradient.mul_(by_zeros)
        return OnePass(p.log_().neg_() if wants_value else None, slopes=(1.0, 1.0, 1.0))


@record
class NegativeBinomialLogits(Likelihood):
    """Torch's `NegativeBinomial`, which stands for it: by logits of success and the number of failures.

    Its mean, `total_count * exp(logits)`, would overflow where its log-likelihood does not, and scvi-tools' 1e-8 hide a small
    one.
    """

    name = "negative_binomial"
    parameters = ("logits", "total_count")
    ranges = (None, NONNEGATIVE)

    def support(self, first, x):
        return NONNEGATIVE

    def nll(self, parameters, x):
        logits, failures = parameters
        nothing = (failures == 0) & (x == 0)
        ways = log_gamma_ratio(torch.where(nothing, 1.0, failures), x)
        return failures * softplus(logits) + x * softplus(-logits) + log_factorial(x) - ways

    def at_zero(self, parameters):
        logits, failures = parameters
        return failures * softplus(logits)

    def one_pass(self, parameters, x, wants_value, out, spare):
        (logits, failures), (to_logits, to_failures), values = parameters, out, None
        if not is_seen(x) or x.dtype != torch.float32 or not (logits.is_contiguous() and x.is_contiguous()):
            return None
        index, count = _above_zero(x)
        (lowest, highest), (least, most) = torch.aminmax(failures), _ends(count, 0.0)
        if not (lowest >= LEAST and highest + most < MOST and least >= 0):
            return None
        # Each softplus is a maximum and log1p(exp(-|l|)), so that no two terms cancel.
        above, rest = softplus_in_parts(logits, (spare[2], spare[3]))
        if to_failures is not None:
            torch.sub(above, rest, out=to_failures)
        if wants_value:
            values = torch.mul(above, failures, out=spare[0])
            values.addcmul_(torch.add(x, failures, out=spare[1]), rest, value=-1).addcmul_(above.sub_(logits), x)
        if to_logits is not None:
            torch.sigmoid(logits, out=to_logits).mul_(failures)
            to_logits.addcmul_(torch.neg(logits, out=spare[1]).sigmoid_(), x, value=-1)
        _add_beyond_zero(logits, failures, count, index, values, None, to_failures, _ways_of)
        return OnePass(values, slopes=(1.0, 1.0))

    def one_pass_at_zero(self, parameters, wants_value, out, spare):
        (logits, failures), (to_logits, to_failures) = parameters, out
        above, rest = softplus_in_parts(logits, (spare[2], spare[3]))
        softplus = torch.sub(above, rest, out=spare[1] if to_failures is None else to_failures)
        if to_logits is not None:
            torch.sigmoid(logits, out=to_logits).mul_(failures)
        return OnePass(torch.mul(softplus, failures, out=spare[0]) if wants_value else None, slopes=(1.0, 1.0))


def zeros_nll(mean: Tensor, theta: Tensor) -> Tensor:
    """-log p(0) of a negative binomial."""
    return torch.where((mean >= 0) & (theta > 0), theta, torch.nan) * torch.log1p(mean / (theta + EPS))


def _inflated_zeros_nll(zeros: Tensor, logits: Tensor) -> Tensor:
    """-log p(0) with the share of extra zeros that these logits are, from that without.

    log p(0) = log(1 - q), q = sigmoid(-logits) (1 - exp(-zeros)); where q is near 1, as a difference.
    """
    q = -torch.sigmoid(-logits) * torch.expm1(-zeros)
    near = q < 0.5
    return torch.where(near, -torch.log1p(-torch.where(near, q, 0.0)), softplus(-logits) - softplus(-logits - zeros))


def _beyond_zero(mean: Tensor, theta: Tensor, x: Tensor) -> Tensor:
    """What -log p(x) is more than -log p(0)."""
    return log_factorial(x) - log_gamma_ratio(theta, x) + x * torch.log1p(theta / (mean + EPS))


MANY = 0.25  # of the elements, from which on a form for all takes less time than one by indices


def _above_zero(x: Tensor, share: float = MANY) -> tuple[Tensor | None, Tensor]:
    """Flat indices of what is not 0, and that; None and all, where it is more than about this share."""
    if not is_seen(x) or not x.is_contiguous():
        return None, x
    flat, n = x.view(-1), x.numel()
    some = flat.unfold(0, max(1, n // 256), max(1, n // 4))  # of four places
    if torch.count_nonzero(some).item() >= share * some.numel() and (share < 1 or flat.min() > 0):
        return None, x
    index = flat.bool().nonzero().squeeze(1)  # comparing floats takes more time than making bools of them
    if index.numel() >= share * n:
        return None, x
    return index, flat.index_select(0, index)


LEAST, MOST = 1e-6, 1e8  # of theta, and of theta and a count, for the faster form in float32


def _is_common(mean: Tensor, theta: Tensor, count: Tensor, fewest: float = 0.0) -> bool:
    """Whether nothing is rare: no NaN, no mean below 0, no count below this one, nothing that the series are not for."""
    if not is_seen(count) or count.dtype != torch.float32 or not (mean.is_contiguous() and count.is_contiguous()):
        return False
    (lowest_mean, highest_mean), (lowest, highest), (least, most) = (_ends(t, fewest) for t in (mean, theta, count))
    return lowest_mean >= 0 and highest_mean < MOST and lowest >= LEAST and highest + most < MOST and least >= fewest


def _ends(values: Tensor, of_none: float) -> tuple[float, float]:
    """The lowest and the highest, NaN if one is."""
    if not values.numel():
        return of_none, of_none
    lowest, highest = torch.aminmax(values)
    return lowest.item(), highest.item()


def _zeros_in_one_pass(mean, theta, to_mean, to_theta, spare) -> tuple[Tensor, Tensor | None]:
    """-log p(0) of a negative binomial, theta log1p(mean / theta), and its derivative by theta, both of each element; that by
    the mean is in `to_mean`. The former is in `spare[1]`, the latter in `to_theta`, or in `spare[0]` where that is smaller."""
    above, by_theta = theta + EPS, None
    ratio = torch.div(mean, above, out=spare[0])
    values = torch.log1p(ratio, out=spare[1])
    if to_mean is not None or to_theta is not None:
        share = torch.add(mean, above, out=to_mean)
        torch.div(theta, share, out=share)
        if to_theta is not None:
            own = to_theta if to_theta.shape == mean.shape else ratio
            by_theta = torch.addcmul(values, share, ratio, value=-1, out=own)
    return values.mul_(theta), by_theta


def _put_sums(gradient: Tensor | None, to: Tensor | None) -> None:
    """The gradient by a parameter that elements share, of that of each element. Added up by pairs: a place that took one after
    the other would lose the digits of all but the first."""
    if gradient is not None and to is not None and gradient is not to:
        to.copy_(gradient.sum_to_size(to.shape))


def _inflated_zeros_in_one_pass(zeros, logits, to_logits, spare) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """The share of extra zeros, the derivative of -log p(0) by `zeros`, p(0), and the least of these; None where that is too
    small to divide by. The derivative by `logits` goes to `to_logits`, if that is there."""
    inflated = torch.sigmoid(logits, out=fitting(spare[2], logits))
    # exp2 takes a third of the time of exp, and one rounding more, as `zeros` has several.
    by_zeros = torch.mul(zeros, -1 / math.log(2), out=spare[4]).exp2_()
    # inflated + (1 - inflated) exp(-zeros), of which neither term is negative.
    p = torch.lerp(by_zeros, ONE, inflated, out=spare[3])
    least = p.min().item()
    if not least > 1e-30:  # or NaN
        return None
    if to_logits is not None:
        torch.addcdiv(inflated, inflated, p, value=-1, out=to_logits)
    return inflated, by_zeros.addcmul_(by_zeros, inflated, value=-1).div_(p), p, least


CHUNK = 2**17  # elements for each thread


def _chunks(x: Tensor) -> list[slice]:
    """Some rows at a time, for what needs a dozen tensors of their size."""
    height = max(1, CHUNK * torch.get_num_threads() // max(1, x[0].numel()))
    return [slice(i, i + height) for i in range(0, x.shape[0], height)]


def _rows_of(theta: Tensor, x: Tensor, rows: slice) -> Tensor:
    return theta[rows] if theta.dim() == x.dim() and theta.shape[0] == x.shape[0] else theta


def _counts_in_one_pass(mean, theta, count, wants_value, to_mean, to_theta, spare) -> tuple[Tensor, Tensor | None]:
    """`_zeros_in_one_pass` of counts of any size, which lies where that does; the values, if they are wanted."""
    values = room(spare[1], mean)
    by_theta = to_theta if to_theta is None or to_theta.shape == mean.shape else room(spare[0], mean)
    for rows in _chunks(mean):
        m, n, a = mean[rows], count[rows], _rows_of(theta, mean, rows)
        top, rest, slope = log_gamma_ratio_in_parts(a, n)
        above, positive = a + EPS, m + EPS
        total = m + above
        zeros = torch.div(m, above, out=values[rows]).log1p_()  # and -log p(0) is theta times that
        if by_theta is not None:
            torch.sub(zeros, slope, out=by_theta[rows])
            by_theta[rows].addcdiv_(torch.addcmul(n, m, a / above, value=-1, out=slope), total)
        if wants_value:
            # log1p(theta / mean) is the logarithm of total / mean, and `top` goes into the same one.
            logs = torch.div(total, top.mul_(positive), out=top).log_().add_(ONE)
            torch.addcmul(log_factorial(n).sub_(rest).addcmul_(logs, n), zeros, a, out=zeros)
        if to_mean is not None:
            share = torch.div(a, total, out=to_mean[rows])
            share.addcmul_(share, torch.div(n, positive, out=positive), value=-1)
    return values, by_theta


def _add_beyond_zero(mean, theta, count, index, values, to_mean, to_theta, of=None) -> None:
    """Add what a negative binomial's -log p(x) is more than -log p(0), and the derivatives: of the elements in `index`, whose
    counts come and which the others are zeros beside, or of all if it is None. `values` may be their sum, where there is an
    index. `of` computes it: `_beyond_zero_of`, or another one."""
    of, shape, places = of or _beyond_zero_of, mean.shape, (values, to_mean, to_theta)
    wants = [place is not None for place in places]
    if index is None:
        for rows in _chunks(mean):
            found = of(mean[rows], _rows_of(theta, mean, rows), count[rows], wants)
            for place, part in zip(places, found, strict=True):
                if place is not None:
                    place[rows].add_(part)
        return
    found = of(mean.view(-1).index_select(0, index), _at(theta, shape, index), count, wants)
    for place, part in zip(places, found, strict=True):
        if place is not None and place.numel() < mean.numel():
            place.add_(part.sum())
        elif place is not None:
            place.view(-1).scatter_add_(0, index, part)


def _at(theta: Tensor, shape: torch.Size, index: Tensor) -> Tensor:
    """The elements at these places of what broadcasts to this shape, flat; one that all share as it is."""
    if theta.numel() == 1:
        return theta.reshape(())
    if theta.dim() == len(shape) and theta.shape[0] == 1 and theta.shape[1:] == shape[1:]:
        return theta.reshape(-1).index_select(0, index % theta.numel())
    return theta.expand(shape).reshape(-1).index_select(0, index)


def _beyond_zero_of(mean, theta, count, wants) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Value, and derivatives by mean and theta, of which the first two may not be wanted."""
    value, by_mean, mean = None, None, mean + EPS
    top, rest, slope = log_gamma_ratio_in_parts(theta, count)
    total = mean + theta
    if wants[0]:
        # log1p(theta / mean) is the logarithm of total / mean, and `top` goes into the same one.
        logs = torch.div(total, top.mul_(mean), out=top).log_().add_(ONE)
        value = log_factorial(count).sub_(rest).addcmul_(logs, count)
    share = torch.div(count, total, out=total)
    if wants[1]:
        by_mean = torch.div(theta, mean, out=mean).mul_(share).neg_()
    return value, by_mean, share.sub_(slope)


def _ways_of(_, failures, count, wants) -> tuple[Tensor | None, None, Tensor]:
    """Likewise, the number of ways to come by so many successes, by its logarithm, which depends on no logits."""
    top, rest, slope = log_gamma_ratio_in_parts(failures, count)
    value = log_factorial(count).sub_(rest).addcmul_(top.log_().sub_(ONE), count, value=-1) if wants[0] else None
    return value, None, slope.neg_()
