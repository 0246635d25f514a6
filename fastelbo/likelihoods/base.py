"""What a likelihood is: a record that owns all that is true of it. Nobody else asks which likelihood it has."""

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..basics.arguments import check_alike, check_device, check_prediction, check_smaller
from ..basics.records import Record, canonical, record
from ..basics.scalars import check_finite, check_integer
from ..basics.sparse import Nonzeros
from .values import Range

SUM: Any = 2  # the reduction "sum", as Torch's functions take it below `torch.nn.functional`, whose Python costs 2 us


class OnePass(NamedTuple):
    """What `Likelihood.one_pass` returns: an element's negative log-likelihood is `scale * values + constant`, and its
    derivatives are `slopes` times what was written for each parameter."""

    values: Tensor | None
    scale: float = 1.0
    constant: float = 0.0
    slopes: Sequence[float] = (1.0,)


# What a subclass that defines the former does not take over from its parent.
_GO_WITH = {
    "nll": ("one_pass", "sum_by_torch", "kernel", "at_zero", "kernel_at_zero", "sparse_sum_in_one_pass"),
    "one_pass": ("sums_in_one_pass",), "sums_in_one_pass": ("summed",),
    **dict.fromkeys(("sum_by_torch", "support", "ranges"), ("checked_by_torch",)),
}  # fmt: skip


@record
class Likelihood(metaclass=Record):
    """p(x | z): what a decoder's output parametrizes. The base of all likelihoods, and of your own.

    One of your own has to have `nll`, the formula of a term, and may have a `name`. It is then differentiated by autograd, a
    block at a time, and goes wherever a likelihood does: weights, reductions, bounds, checks and torch.compile need no more.

        @record
        class LogCosh(Likelihood):
            scale: float = 1.0
            name = "log_cosh"

            def nll(self, parameters, x):
                distance = (x - parameters[0]) / self.scale
                return torch.logaddexp(distance, -distance) + math.log(self.scale * math.pi / 2)

    `record`, of this package, makes options of annotated fields, and the class frozen and compared by value; without fields of
    its own a class needs none. `parameters` names the tensors, if there are several. Each of `ranges`, `support`, `is_density`,
    `one_pass` and `kernel` is one more step that may be left out; docs/own-likelihood.md goes through them.

    Args:
        target_scale: `x` is multiplied by it, such as 1/255 for `uint8` images.
    """

    target_scale: float = field(default=1.0, kw_only=True)

    name: ClassVar[str]
    """By which it can be asked for, if it is one of this package's, and under which errors speak of it. If there is none, that
    of its class."""
    parameters: ClassVar[tuple[str, ...]] = ("recon_x",)
    """What its tensors are; all but the first may be smaller, as long as they broadcast to it."""
    is_density: ClassVar[bool] = True
    """Whether exp(-nll) is a density or a probability."""
    kernel: ClassVar[str | None] = None
    """Its device function in `kernels/likelihoods.py`, or elsewhere as "module:function", which is imported when a kernel first
    needs it; of one with a `dim`, the module of `kernels`; None: there is none."""
    is_own: ClassVar[bool] = False
    """Whether its formula is defined outside of this package."""
    compiled_excess: ClassVar[int] = 0
    """Passes over the first parameter that its formula and the gradient take, once `torch.compile` has fused them, beyond those
    of a kernel, which reads each tensor twice and writes each gradient: counted in Inductor's code."""

    def __init_subclass__(cls) -> None:
        """A formula of one's own has none of its parent's other forms, nor a form what is said of another one."""
        if not hasattr(cls, "name"):
            cls.name = cls.__name__
        is_outside = cls.__module__.partition(".")[0] != __name__.partition(".")[0]
        cls.is_own = is_outside and (cls.is_own or "nll" in cls.__dict__)
        if is_outside and "target" in cls.__dict__:
            raise TypeError(f"{cls.__name__}.target must not be defined: transform x in nll, and give `scaling` what is linear")
        for own, others in _GO_WITH.items():
            if own in cls.__dict__:
                for name in others:
                    if name not in cls.__dict__:
                        setattr(cls, name, getattr(Likelihood, name))

    def __post_init__(self) -> None:
        canonical(self, "target_scale", check_finite)

    # --- the tensors of a call

    @property
    def ranges(self) -> tuple[Range | None, ...]:
        """Where its parameters must lie, in their order; None: anywhere, and so those that are not there."""
        return ()

    @property
    def dim(self) -> int | None:
        """The dimension along which one term is made of many elements, as classes or channels; None: an element has its own."""
        return None

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tensors of parameters it takes."""
        return (len(self.parameters),)

    def check(self, name: str, parameters: Sequence[Tensor], x: Tensor) -> None:
        """Raise unless parameters, which errors call `name`, and target fit together."""
        if len(parameters) not in self.counts:
            expected = ("a tensor" if n == 1 else f"the tuple ({', '.join(self.parameters[:n])})" for n in self.counts)
            raise ValueError(
                f"{name} must be {' or '.join(expected)} for the likelihood {self.name!r}, got {len(parameters)} tensors"
            )
        labels = [name] if len(parameters) == 1 else [f"{name}[{i}]" for i in range(len(parameters))]
        check_prediction(labels[0], parameters[0])
        for label, value in zip(labels[1:], parameters[1:], strict=True):
            check_smaller(label, value, labels[0], parameters[0])
        self.check_target(labels[0], parameters[0], x)
        check_device(labels[0], parameters[0], "x", x)

    def check_target(self, name: str, first: Tensor, x: Tensor) -> None:
        """Raise unless the target fits the first parameter."""
        check_alike(name, first, "x", x)

    def term_dim(self, first: Tensor, x: Tensor) -> int | None:
        """The dimension of `x` that has one term."""
        return None if self.dim is None else self.dim % x.dim()

    def terms(self, first: Tensor, x: Tensor) -> torch.Size:
        """The shape of the terms of the negative log-likelihood."""
        dim = self.term_dim(first, x)
        return x.shape if dim is None else x.shape[:dim] + x.shape[dim + 1 :]

    def count(self, first: Tensor, x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> float | Tensor:
        """What a mean divides by: the number of terms, or the sum of their weights, which has as many dimensions."""
        number = torch.sym_float(math.prod(self.terms(first, x)))
        if weight is None:
            return number
        return weight.to(dtype).sum() * (number / max(weight.numel(), 1))

    def counts_by_values(self, first: Tensor, x: Tensor) -> bool:
        """Whether `count` depends on the target's values."""
        return False

    def support(self, first: Tensor, x: Tensor) -> Range | None:
        """Where the target `x`, as it came, must lie; None: anywhere."""

    # --- the formula

    def scaling(self, x: Tensor) -> tuple[float, float]:
        """What the target is multiplied by, and what is added to it then."""
        return self.target_scale, 0.0

    def target(self, first: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The target as `nll` takes it."""
        (scale, shift), x = self.scaling(x), x.to(dtype)
        x = x if scale == 1 else x * scale
        return x if shift == 0 else x + shift

    def nll(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """The negative log-likelihood in nats: one number for each of `terms`.

        Made of Torch operations that autograd can differentiate as often as it likes. All tensors come in one floating dtype,
        `x` as `target` makes it.
        """
        raise NotImplementedError

    one_pass: ClassVar[Callable[..., OnePass | None] | None] = None
    """`one_pass(parameters, x, wants_value, out, spare)`: value and derivatives of each element, without branches.

    All tensors have one shape and dtype, `x` as `target` makes it. The derivative by each parameter goes into the tensor of
    `out` at its place, unless that is None. `spare[0]` to `spare[9]` are buffers of that shape, to be written to, or None, as
    `out=` takes both; the values may lie there.
    It returns None where some of the input needs `nll`, as one whose derivatives overflow does, and where it would have to look
    for that but cannot without a sync (`is_seen`). None: there is no such form, and autograd differentiates `nll`.
    """

    sums_in_one_pass: ClassVar[Callable[..., OnePass | None] | None] = None
    """`sums_in_one_pass(parameters, x, wants_value, out, spare, rows)`: `one_pass` where of the values nothing but the sum of
    each of so many rows is wanted, of which each lies in one piece: there may be fewer, `[rows, any]`, or all of them, of their
    own shape. None: it is `one_pass`."""

    summed: ClassVar[tuple[int, ...]] = ()
    """The parameters by which `sums_in_one_pass` writes sums of derivatives where there is one row and they are smaller than
    the first: `out` has their shape then."""

    sum_by_torch: ClassVar[Callable[..., Tensor | None] | None] = None
    """`sum_by_torch(parameters, x, weight)`: the sum of `nll`, each times its weight unless that is None, by a function of
    Torch's own, which autograd differentiates: of one parameter, on a CPU, up to `few` elements. It returns None where it
    cannot keep the digits that `one_pass` keeps, where it is not finite, since a weight of 0 may hide that, and where another
    way costs less. None: Torch has none."""

    checked_by_torch: ClassVar[bool] = False
    """Whether `sum_by_torch` returns None, too, for whatever lies outside of `support` and `ranges`."""

    def few(self, weighted: bool) -> int:
        """Elements, of one block at most, up to which `sum_by_torch` costs less than what takes fewer passes; 0 if `weighted`
        and Torch's function takes no weights."""
        return 0 if weighted else 2**18

    # --- a target that is mostly zeros

    at_zero: ClassVar[Callable[..., Tensor] | None] = None
    """`at_zero(parameters)`: `nll` of zeros, in closed form, of the shape of the first parameter. None: there is none, and the
    target must be dense."""

    kernel_at_zero: ClassVar[str | None] = None
    """Its device function likewise, beside `kernel`; of one with a `dim`, the module of `kernels` for sparse targets; None:
    Torch computes these."""

    def nll_of_zeros(self, parameters: Sequence[Tensor]) -> Tensor:
        """An `at_zero` for a formula in which a target of 0 costs nothing."""
        return self.nll(parameters, _zeros_like(parameters[0]))

    def one_pass_at_zero(self, parameters, wants_value, out, spare) -> OnePass | None:
        """`one_pass` of zeros."""
        return None if self.one_pass is None else self.one_pass(parameters, _zeros_like(parameters[0]), wants_value, out, spare)

    def sparse_nll(self, parameters: Sequence[Tensor], x: Nonzeros) -> Tensor:
        """`nll` of a matrix that is 0 elsewhere."""
        assert self.at_zero is not None
        zeros, own = self.at_zero(parameters), self.nll([x.of(p) for p in parameters], x.values)
        return zeros.reshape(-1).index_copy(0, x.index, own).view(zeros.shape)

    def sparse_one_pass(self, parameters, x: Nonzeros, wants_value, out, spare) -> OnePass | None:
        """`one_pass` likewise, of contiguous rows."""
        if self.one_pass is None or (found := self.one_pass_at_zero(parameters, wants_value, out, spare)) is None:
            return None
        if not x.values.numel():
            return found
        slopes = [None if to is None else torch.empty_like(x.values) for to in out]
        own = self.one_pass([x.of(p) for p in parameters], x.values, wants_value, slopes, (None,) * 10)
        if own is None:
            return None
        if found.values is not None and own.values is not None:
            nll = torch.add(own.values * own.scale, own.constant - found.constant)
            found.values.view(-1).scatter_(0, x.index, nll.div_(found.scale))
        for to, slope in zip(out, slopes, strict=True):  # which `found.slopes` are times, too
            if to is not None and slope is not None:
                to.view(-1).scatter_(0, x.index, slope)
        return found

    sparse_sum_in_one_pass: ClassVar[Callable[..., OnePass | None] | None] = None
    """Likewise, where nothing but the sum of all values is wanted: these may be fewer, and lie in any shape."""

    # --- parameters that are transformed first

    links: ClassVar[tuple[str, ...] | None] = None
    """How the parameters that `one_pass` takes are made of those that come; None: they are those. See `links.py`."""
    by_rows: ClassVar[bool] = False
    """Whether that takes whole rows."""

    def takes_samples(self, parameters: int, weighted: bool) -> bool:
        """Whether a call may have several samples of all of x, one after the other."""
        return self.is_plain(parameters) and not weighted

    # --- one that is not a sum of terms

    @property
    def inner(self) -> "Likelihood | None":
        """The likelihood of whose sums `compose` makes this one; None: it is a sum of terms itself."""

    def compose(self, sums: Tensor, counts: float | Tensor, total: float | Tensor) -> Tensor:
        """The reconstruction, from the sums of `inner`, `[]` or `[B]`, each over `counts` elements, `total` in all."""
        raise NotImplementedError

    # --- the kernel

    @property
    def fixed(self) -> float | None:
        """The number that stands for a second parameter that is not given; None: there is none."""

    def function(self, parameters: int) -> str | None:
        """The device function for so many parameters, the `fixed` one counted."""
        return self.kernel

    @property
    def constant(self) -> float | None:
        """A number that its device function takes beside the parameters."""

    def is_plain(self, parameters: int) -> bool:
        """Whether the kernel for most likelihoods computes it, from so many tensors: one, whose elements have a term each."""
        alone = parameters == 1 and 1 in self.counts and self.dim is None and self.constant is None
        return alone and self.kernel is not None and self.function(1) == self.function(1 if self.fixed is None else 2)

    def constants(self, parameters: Sequence[Tensor], x: Tensor) -> dict[str, Any]:
        """What its kernel asks for beside tensors."""
        scale, shift = self.scaling(x)
        found = {"target_scale": scale, "target_shift": shift}
        return found if self.constant is None else found | {"constant": self.constant}


def _zeros_like(first: Tensor) -> Tensor:
    """In the memory of one."""
    return first.new_zeros(()).expand(first.shape)


def check_own(
    name: str, likelihood: Likelihood, parameters: Sequence[Tensor], x: Tensor, dtype: torch.dtype, differentiates: bool
) -> None:
    """Raise where a formula of one's own gives something else than a value of each term, or, if that is to be differentiated,
    uses a tensor that wants a gradient and is none of the parameters, which errors call `name`: it would get none. One row is
    computed, where tensors of such a shape first come."""
    first = parameters[0]
    rows = [p[:1] if p.dim() == first.dim() and p.shape[0] == first.shape[0] else p for p in parameters]
    given = [p.detach().to(dtype) for p in rows]
    with torch.set_grad_enabled(differentiates):
        if x.layout == torch.strided:
            target, expected = likelihood.target(given[0], x.detach()[:1], dtype), likelihood.terms(given[0], x[:1])
            found = {"nll": likelihood.nll(given, target)}
        else:
            assert likelihood.at_zero is not None
            zeros, expected = _zeros_like(given[0]), likelihood.terms(given[0], given[0])
            found = {"nll": likelihood.nll(given, zeros), "at_zero": likelihood.at_zero(given)}
        for method, values in found.items():
            label = f"{method} of the likelihood {likelihood.name!r}"
            if not isinstance(values, Tensor):
                raise TypeError(f"{label} must return a tensor, got {type(values).__name__}")
            if values.shape != expected:
                raise ValueError(
                    f"{label} must return a value of each term, of the shape {tuple(expected)} for one row,"
                    f" got {tuple(values.shape)}: reductions come later"
                )
            if values.requires_grad:
                raise ValueError(
                    f"{label} uses a tensor that requires grad and is none of its parameters, so it would get no gradient:"
                    f" pass it in the tuple {name}, and name it in `parameters`; or detach it"
                )


def check_given_once(likelihood: Likelihood, field: str, parameters: Sequence[Tensor]) -> None:
    """Raise where the second of two parameters has a number of the record in its place as well."""
    value = getattr(likelihood, field)
    if len(parameters) == 2 and value != getattr(type(likelihood), field):
        tensors = ", ".join(likelihood.parameters)
        name = type(likelihood).__name__
        raise ValueError(f"give {name}.{field} or the tuple ({tensors}), not both: got {field}={value!r}")


def check_labelled_dim(likelihood: Likelihood, first: Tensor) -> int:
    """The dimension of classes or channels in a first parameter, which has to have it beside that of the batch."""
    dim = likelihood.dim or 0
    if not -first.dim() < dim < first.dim() or dim % first.dim() == 0:
        raise ValueError(
            f"{type(likelihood).__name__}.dim must be a dimension of recon_x {tuple(first.shape)} other than the batch,"
            f" got {dim}"
        )
    return dim % first.dim()


def check_own_dim(likelihood: Likelihood) -> None:
    canonical(likelihood, "dim", check_integer)
    if likelihood.dim == 0:
        raise ValueError(f"{type(likelihood).__name__}.dim must not be 0, the dimension of the batch")
