"""Launches whose whole way is known: what they are given, what they make, and what they return."""

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import CodeType

import torch
import triton.language as tl

from .direct import UNUSUAL, Launch, allocator, launching
from .launch import NO_SCRATCH, is_capturing, kept_scratch, scratch

Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides and dtype of a tensor to make


class Prepared:
    """A launch of one kind, in which each parameter of the kernel is what has its name.

    Args:
        launch: the kernel; `kind`: a name for which of the arguments are there, and for their dtypes; `programs`: how many.
        takes: the arguments of `run`, by name, as they are here: tensors, floats or None. A `beta` that is a float is the
            kernel's `beta_value`, and its `beta` is None; one that is a tensor is its `beta`.
        makes: tensors to make, by name.
        values: numbers that are always the same, by name.
        gives: the names of what `run` returns, or None in the place of a name.
        sums: the `partials` that the kernel adds up, `arrived` the counters of so many `rows`; none where it adds nothing up.

    `run` goes part by part until the kernel is compiled. Then it is one function that was written for this kind, in which
    nothing is looked up by name, packed into tuples or gone through in a loop.
    """

    __slots__ = "gives", "kind", "launch", "makes", "numbers", "programs", "rows", "run", "sums", "takes", "tensors", "values"

    def __init__(
        self, launch: Launch, kind: Hashable, programs: int, *, takes: Mapping[str, torch.Tensor | float | None],
        makes: Mapping[str, Like], values: Mapping[str, float], gives: Sequence[str | None], rows: int = 0, sums: int = 0,
    ) -> None:  # fmt: skip
        self.launch, self.kind, self.programs, self.rows, self.sums = launch, (kind,), programs, rows, sums  # None is no name
        self.takes, self.makes, self.gives = tuple(takes), makes, tuple(gives)
        there = {name for name, value in takes.items() if isinstance(value, torch.Tensor)} | makes.keys()
        there |= {"partials", "arrived"} if sums else set()
        tensors, numbers = _parameters(launch.kernel.fn)
        self.tensors = tuple(name if name in there else None for name in tensors)
        floats = {f"{name}_value": name for name, value in takes.items() if isinstance(value, float | int)}
        self.numbers = tuple(floats.get(name, name) for name in numbers)
        self.values = {f"{name}_value": 1.0 for name in there} | values  # of numbers that are on the device: not read
        self.run: Callable[..., tuple] = self.by_parts

    def by_parts(self, *given, stateless: bool = False) -> tuple:
        """What `run` does, as every machine and every mode can; `stateless`: keep nothing for later calls."""
        launch, named = self.launch, self.values | dict(zip(self.takes, given, strict=True))
        empty = allocator(launch.device)
        named |= {name: empty(*like) for name, like in self.makes.items()}
        if self.sums:
            named["partials"], named["arrived"] = scratch(launch.device, self.rows, self.sums, stateless)
        tensors = [name if name is None else named[name] for name in self.tensors]
        launch(self.programs, tensors, [named[name] for name in self.numbers], self.kind)
        if self.run == self.by_parts and not stateless and launch.handles and self.kind in launch.handles:
            self.run = launch.written(self.kind, self._code(), self._names(empty))
        return tuple(name if name is None else named[name] for name in self.gives)

    def _names(self, empty: Callable[..., torch.Tensor]) -> dict:
        names = {"by_parts": self.by_parts, "empty": empty, "grid": self.programs, "all_sums": self.sums, "all_rows": self.rows}
        names |= {"is_capturing": is_capturing, "kept_scratch": kept_scratch, "NO_SCRATCH": NO_SCRATCH}
        for name, like in self.makes.items():
            names |= zip((f"{name}_shape", f"{name}_strides", f"{name}_dtype"), like, strict=True)
        return names | self.values

    def _code(self) -> CodeType:
        return _written(self.takes, tuple(self.makes), self.tensors, self.numbers, self.gives, self.sums > 0)


@functools.cache
def _parameters(function: Callable) -> tuple[list[str], list[str]]:
    """The names of a kernel's tensors, and of its numbers, the first of which has a type."""
    given = [p for p in inspect.signature(function).parameters.values() if p.annotation is not tl.constexpr]
    names, first = [p.name for p in given], next(i for i, p in enumerate(given) if p.annotation is not p.empty)
    return names[:first], names[first:]


@functools.cache
def _written(takes, makes, tensors, numbers, gives, has_sums) -> CodeType:
    """The code of `run`."""
    given, there = ", ".join(takes), [name for name in tensors if name]
    lines = [
        f"def run({given}):",
        f"    if {UNUSUAL}{' or is_capturing()' if has_sums else ''}:",
        f"        return by_parts({given})",
        "    stream = raw_stream(gpu)",
    ]
    if has_sums:
        lines += [
            "    (partials, arrived), most_sums, most_rows = kept_scratch.get((gpu, stream), NO_SCRATCH)",
            "    if most_sums < all_sums or most_rows < all_rows:",
            f"        return by_parts({given})",
        ]
    lines += [
        *(f"    {name} = empty({name}_shape, {name}_strides, {name}_dtype)" for name in makes),
        *(f"    to_{name} = {name}.data_ptr()" for name in there),
        f"    if ({' | '.join(f'to_{name}' for name in there)}) & 15:",
        f"        return by_parts({given})",
        launching("grid", [*("None" if name is None else f"to_{name}" for name in tensors), *numbers]),
        f"    return {', '.join(map(str, gives))},",
    ]
    return compile("\n".join(lines), __file__, "exec")


def number_kinds(*numbers: torch.Tensor | float) -> tuple[torch.dtype | None, ...]:
    """For the kind of a launch: the dtype of each number that is on the device."""
    return tuple(number.dtype if isinstance(number, torch.Tensor) else None for number in numbers)
