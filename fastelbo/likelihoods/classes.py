"""Likelihoods over a dimension of classes or items: categorical and multinomial, of logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.arguments import check_alike
from ..basics.records import canonical, record
from ..basics.scalars import ONE, check_integer
from ..basics.tracing import is_behind_dynamo, is_seen
from .base import Likelihood, OnePass, check_labelled_dim, check_own_dim
from .values import NONNEGATIVE, Range

# Elements of rows, for each thread, that stay in a cache from one operator to the next.
PART = 2**19


def whole_chunks(rows: int) -> int:
    """So many rows, or a few less that are dealt out evenly: Torch's softmax gives a thread 32 at a time."""
    chunks = 32 * torch.get_num_threads()
    return max(1, rows // chunks * chunks or rows)


WEIGHTS = NONNEGATIVE._replace(silent=True)  # of logarithms; a negative one gives a finite loss


@record
class Classes(Likelihood):
    """The base of both, whose targets are of the shape of the logits, one weight for each class."""

    parameters = ("logits",)

    def __post_init__(self):
        super().__post_init__()
        check_own_dim(self)

    def check_target(self, name, first, x):
        check_labelled_dim(self, first)
        check_alike(name, first, "x", x)

    def support(self, first, x):
        return WEIGHTS

    def geometry(self, logits: Tensor) -> dict[str, float]:
        """How the kernel sees the logits, `[outer, classes, inner]`, and what it multiplies their targets by."""
        dim = check_labelled_dim(self, logits)
        inner = logits.shape[dim + 1 :].numel()
        return {"classes": logits.shape[dim], "inner": inner, "target_scale": self.target_scale}

    def nll(self, parameters, x):
        if is_behind_dynamo():
            return _CompiledCounts.apply(parameters[0], x, self.dim % x.dim())
        log_p = F.log_softmax(parameters[0], self.dim)
        # An item that is masked by a logit of -infinity has no counts.
        return -torch.where((x == 0) & log_p.isinf(), 0.0, log_p * x).sum(self.dim)

    def one_pass(self, parameters, x, wants_value, out, spare):
        (logits,), (gradient,), dim = parameters, out, self.dim % parameters[0].dim()
        if not is_seen(x):
            return None
        values = logits.new_empty(logits.shape[:dim] + logits.shape[dim:][1:])
        height = whole_chunks(PART * torch.get_num_threads() // max(1, logits[0].numel()))
        buffer = spare[0]
        for i in range(0, len(logits), height):
            rows = slice(i, i + height)
            t, g = x[rows], None if gradient is None else gradient[rows]
            log_p = torch.log_softmax(logits[rows], dim, out=None if buffer is None else buffer[: len(t)])
            # The product lies where the gradient will, so that less has to stay in cache.
            product = torch.mul(log_p, t, out=g)
            torch.sum(product, dim, out=values[rows])
            if g is not None:  # x, and p times the sum of x taken from it
                torch.ops.aten._log_softmax_backward_data.out(t, log_p, dim, x.dtype, out=g)
        return OnePass(values, -1.0, slopes=(-1.0,)) if math.isfinite(values.sum().item()) else None

    def at_zero(self, parameters):
        """What an item without counts adds."""
        return torch.zeros_like(parameters[0])

    def sparse_nll(self, parameters, x):
        log_p = F.log_softmax(parameters[0], -1)
        own = x.of(log_p)
        of_nan = (0 * log_p.masked_fill(log_p.isinf(), 0.0)).sum(-1)  # which a row without counts has, too
        return of_nan - x.sums(torch.where((x.values == 0) & own.isinf(), 0.0, own * x.values))

    def sparse_one_pass(self, parameters, x, wants_value, out, spare):
        found = Classes.sparse_sum_in_one_pass(self, parameters, x, wants_value, out, spare)
        if found is None or found.values is None:
            return found
        return found._replace(values=x.totals(found.values))

    def sparse_sum_in_one_pass(self, parameters, x, wants_value, out, spare):
        (logits,), (gradient,) = parameters, out
        if not is_seen(logits):
            return None
        p = torch.softmax(logits, -1, out=spare[0] if gradient is None else gradient)
        chosen, total = x.of(p), x.totals(x.values)
        # Probabilities whose logarithm has lost its digits, or NaN; and rows that may hide one.
        if not total.all() or not chosen.min() > 1e-30:
            return None
        if gradient is not None:
            p.mul_(total.unsqueeze(1)).view(-1).scatter_add_(0, x.index, -x.values)
        return OnePass(chosen.log_().mul_(x.values) if wants_value else None, -1.0)


@record
class Categorical(Classes):
    """Classes by logits: `F.cross_entropy(recon_x, x)`, for labels or for probabilities of the classes.

    `recon_x` is the logits, `[B, K, ...]`. `x` is labels `[B, ...]` of an integer dtype, or, of the shape of the logits,
    probabilities: one-hot or soft.

    Args:
        dim: the dimension of the classes in the logits; -1 for `[B, ..., K]`.
        ignore_index: positions with this label count neither in a sum nor in the number that a mean divides by.

    Raises:
        TypeError, ValueError: an argument is no integer, or `dim` is 0, the dimension of the batch.
    """

    dim: int = 1
    ignore_index: int = -100
    name = kernel = "categorical"

    def __post_init__(self):
        super().__post_init__()
        canonical(self, "ignore_index", check_integer)

    def check_target(self, name, first, x):
        if x.dim() != first.dim() - 1:
            super().check_target(name, first, x)
            return
        dim = check_labelled_dim(self, first)
        if x.is_floating_point():
            raise TypeError(f"x must be of an integer dtype for labels, got {x.dtype}")
        expected = first.shape[:dim] + first.shape[dim + 1 :]
        if x.shape != expected:
            raise ValueError(
                f"x must have the shape of {name} without its dimension {dim} of classes, {tuple(expected)}, or that of {name},"
                f" {tuple(first.shape)}; got {tuple(x.shape)}"
                + ("; for classes that come last, use likelihoods.Categorical(dim=-1)" if x.shape == first.shape[:-1] else "")
            )

    def term_dim(self, first, x):
        return None if x.dim() < first.dim() else super().term_dim(first, x)

    def counts_by_values(self, first, x):
        return x.dim() < first.dim()

    def count(self, first, x, weight, dtype):
        if x.dim() == first.dim():
            return super().count(first, x, weight, dtype)
        counted = x.long() != self.ignore_index
        return (counted if weight is None else counted * weight.to(dtype)).sum(dtype=dtype)

    def support(self, first, x):
        if x.dim() == first.dim():
            return WEIGHTS
        highest, ignored = first.shape[self.dim] - 1, self.ignore_index
        return Range(f"have labels from 0 to {highest}, or ignore_index={ignored},", 0, highest, unscaled=True, but=ignored)

    def target(self, first, x, dtype):
        # Labels in 64 bits, since a short dtype may not hold what they are compared with.
        return x.long() if x.dim() < first.dim() else super().target(first, x, dtype)

    def nll(self, parameters, x):
        (logits,) = parameters
        if x.dim() == logits.dim():
            return super().nll(parameters, x)
        ignored = x == self.ignore_index
        # NaN for labels that are none, as nothing can be raised where the values are not seen.
        outside = ~ignored & ((x < 0) | (x >= logits.shape[self.dim]))
        if is_behind_dynamo():
            return _Compiled.apply(logits, x, ignored, outside, self.dim % logits.dim())
        logits = logits.movedim(self.dim, 1)
        if not is_seen(x) or ignored.any():
            logits = torch.where(ignored.unsqueeze(1), 0.0, logits)  # or the gradient by a NaN that does not count would be NaN
        nll = F.cross_entropy(logits, torch.where(ignored | outside, 0, x), reduction="none")
        return torch.where(outside, torch.nan, torch.where(ignored, 0.0, nll))

    def one_pass(self, parameters, x, wants_value, out, spare):
        (logits,), (gradient,) = parameters, out
        if x.dim() == logits.dim():
            return super().one_pass(parameters, x, wants_value, out, spare)
        if not is_seen(x):
            return None
        ignored = x == self.ignore_index
        some = ignored.any()
        labels = x.masked_fill(ignored, 0) if some else x
        lowest, highest = torch.aminmax(labels)
        if lowest < 0 or highest >= logits.shape[self.dim]:
            return None
        index = labels.unsqueeze(self.dim)
        p = torch.softmax(logits, self.dim, out=spare[0] if gradient is None else gradient)
        chosen = p.gather(self.dim, index)
        if not chosen.min() > 1e-30:  # whose logarithm has lost its digits, or NaN
            return None
        values = torch.log(chosen).squeeze(self.dim)
        if gradient is not None:
            gradient.scatter_(self.dim, index, chosen.sub_(ONE))
        if some:
            values.masked_fill_(ignored, 0)
            if gradient is not None and self.dim in (-1, logits.dim() - 1):  # in whole rows, which is faster
                gradient.view(-1, logits.shape[-1]).index_fill_(0, ignored.view(-1).nonzero().squeeze(1), 0)
            elif gradient is not None:
                gradient.masked_fill_(ignored.unsqueeze(self.dim), 0)
        return OnePass(values, -1.0)

    def constants(self, parameters, x):
        return self.geometry(parameters[0]) | {"ignore_index": self.ignore_index}


def _normalizers(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What the logarithms of probabilities are less than logits, in two terms, so that their digits are kept."""
    highest = logits.amax(dim, keepdim=True)
    return highest, (logits - highest).exp().sum(dim, keepdim=True).log()


class _CompiledCounts(torch.autograd.Function):
    """The multinomial's for the compiler: masks would be stored for backward, and on a CPU take twice as long."""

    @staticmethod
    def forward(ctx, logits, x, dim):
        highest, log_sum = _normalizers(logits, dim)
        total = x.sum(dim, keepdim=True)
        ctx.save_for_backward(logits, x, highest, log_sum, total)
        ctx.dim = dim
        # Two terms that are not negative; the first and the normalizer are from one pass.
        distance = (_finite(logits - highest) * x * 2).sum(dim) * -0.5
        return distance + (total * log_sum).squeeze(dim)

    @staticmethod
    def backward(ctx, upstream):
        logits, x, highest, log_sum, total = ctx.saved_tensors
        log_p, upstream = logits - highest - log_sum, upstream.unsqueeze(ctx.dim)
        # What does not depend on the upstream, the compiler would write in forward, to read it again.
        by_logits = torch.exp(log_p) * (total * upstream) - x * upstream
        return by_logits, -_finite(log_p) * upstream, None


def _finite(log_p: Tensor) -> Tensor:
    """An item that is masked by a logit of -infinity has no counts; twice the least number is infinite where it has some."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


class _Compiled(torch.autograd.Function):
    """Cross entropy for the compiler: 0 without a gradient where a label is `ignored`, NaN without one where it is `outside`,
    whatever the logits are. Those that `torch.where` makes would be written anew, and on a CPU take five times as long."""

    @staticmethod
    def forward(ctx, logits, labels, ignored, outside, dim):
        highest, log_sum = _normalizers(logits, dim)
        # In the 32 bits that logits have, so that the compiler puts as many in a vector.
        counted = torch.where(ignored | outside, -1, labels).to(torch.int32).unsqueeze(dim)
        ctx.save_for_backward(logits, counted, highest, log_sum)
        ctx.dim = dim
        nll = log_sum - (logits.gather(dim, counted.clamp(min=0).long()) - highest)
        return torch.where(outside, torch.nan, torch.where(ignored, 0.0, nll.squeeze(dim)))

    @staticmethod
    def backward(ctx, upstream):
        logits, counted, highest, log_sum = ctx.saved_tensors
        dim, p, upstream = ctx.dim, torch.exp(logits - highest - log_sum), upstream.unsqueeze(ctx.dim)
        if logits.device.type == "cpu" and dim == logits.dim() - 1:  # where a second pass over few takes less
            none = counted < 0
            slopes = torch.where(none, 0.0, p * upstream)
            slopes = slopes.scatter_add(dim, counted.clamp(min=0).long(), torch.where(none, 0.0, -upstream))
        else:
            classes = torch.arange(logits.shape[dim], dtype=torch.int32, device=logits.device)
            classes = classes.view(-1, *[1] * (logits.dim() - 1 - dim))
            slopes = torch.where(classes == counted, p - 1, p) * upstream
            slopes = torch.where(counted < 0, 0.0, slopes)
        return slopes, None, None, None, None


@record
class Multinomial(Classes):
    """Counts of items by logits: `-(log_softmax(recon_x) * x).sum(dim)`, as Mult-VAE has it.

    `x` holds counts, of the shape of the logits. The multinomial coefficient is left out, since only the data determine it.
    (Liang et al., Variational Autoencoders for Collaborative Filtering, 2018.)

    Args:
        dim: the dimension of the items in the logits.

    Raises:
        TypeError, ValueError: `dim` is no integer, or 0, the dimension of the batch.
    """

    dim: int = -1
    name = "multinomial"
    kernel, kernel_at_zero = "categorical", "sparse_multinomial"  # with targets of the shape of the logits

    def constants(self, parameters, x):
        return self.geometry(parameters[0]) | {"ignore_index": 0}
