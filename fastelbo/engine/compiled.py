"""A public function as one call in the graph that torch.compile makes.

Dynamo otherwise goes through all of its code, and before each run checks that nothing that it met there has changed, which
takes 10 to 20 us: as long as all that a small loss launches. What is called is traced behind Dynamo, where nothing is checked.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributions import Distribution

from ..basics.records import Record
from ..basics.tracing import constant_when_compiled, is_compiling
from .backend import VARIABLE

_calls: dict[str, Callable] = {}


def in_graph(function: Callable, values: dict[str, Any], **options) -> Any:
    """What `function(**values, **options)` returns; None where it cannot be one call, or raises. Dynamo must be tracing.

    What raises is to be traced after all, so that the user gets that error and not one of Dynamo's.
    """
    if any(isinstance(value, Distribution) for value in values.values()):
        return None
    name = _named(function, **options)
    return None if name is None else _call(name, **values)


@constant_when_compiled
def _named(function: Callable, **options) -> str | None:
    """The name by which `_call` finds a function with its options, which are spelled out in it; None if they cannot be."""
    if not all(map(_is_spelled_out, options.values())):
        return None
    name = f"{function.__name__}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    if name not in _calls:
        # All this brings the compiler, and so has to wait until there is one. A graph with a function in it that Torch does not
        # know would not be cached on disk.
        torch.compiler.allow_in_graph(_call)
        torch._inductor.config.unsafe_marked_cacheable_functions[f"{__name__}.{_call.__name__}"] = _version()
        _calls[name] = functools.partial(function, **options)
    return name


def _call(name: str, **values):
    try:
        return _calls[name](**values)
    except (TypeError, ValueError):
        if is_compiling():
            return None
        raise


def _is_spelled_out(option) -> bool:
    """Whether its repr is all of it: not of a record that is made in compiled code, which has no fields while that is traced,
    or whose class is the user's."""
    if isinstance(type(option), Record):
        is_ours = type(option).__module__.startswith(__name__.partition(".")[0] + ".")
        return is_ours and all(name in vars(option) and _is_spelled_out(vars(option)[name]) for name in option.field_names)
    if isinstance(option, tuple | list):
        return all(map(_is_spelled_out, option))
    return isinstance(option, str | float | int | None)


@functools.cache
def _version() -> str:
    """Changes with all that a cached graph depends on."""
    code = hashlib.sha256(os.environ.get(VARIABLE, "").encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()
