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

_functions: dict[str, Callable] = {}
_kinds: dict[str, Record] = {}


def may_be_in_graph(function: Callable) -> Callable:
    """What `in_graph` may call by its name."""
    _functions[function.__name__] = function
    return function


def in_graph(name: str, values: dict[str, Any], **options) -> Any:
    """What the function of this name returns for these arguments; None where it cannot be one call, or raises. Dynamo
    must be tracing.

    What raises is to be traced after all, so that the user gets that error and not one of Dynamo's.
    """
    # What is looked up here, Dynamo guards: each name takes time before each run.
    found = _found(name, [type(value) for value in values.values()], {key: type(option) for key, option in options.items()})
    if found is None:
        return None
    address, records = found
    for key, kind, fields in records:
        options[key] = {KIND: kind, **{field: getattr(options[key], field) for field in fields}}
    return _call(address, **values, **options)


KIND = "kind"


def _call(address: str, **arguments):
    for key, value in arguments.items():
        if isinstance(value, dict):  # a record, of which a graph can hold the fields
            fields = dict(value)
            arguments[key] = _kinds[fields.pop(KIND)](**fields)
    try:
        return _functions[address.partition(",")[0]](**arguments)
    except (TypeError, ValueError):
        if is_compiling():
            return None
        raise


@constant_when_compiled
def _found(name: str, values: list[type], options: dict[str, type]):
    """The address by which `_call` finds the function, and of each option that is a record its key, class and fields, which a
    graph can hold in its place; None where the call has something that no graph can hold.

    The code's version is in the address, and so in the graph, by which Torch finds what it has compiled and kept on disk. The
    compiler has to be there already, since this brings it.
    """
    records = []
    for key, kind in options.items():
        if kind in (str, tuple, list, type(None)):
            continue
        if not isinstance(kind, Record) or not kind.__module__.startswith(__name__.partition(".")[0] + "."):
            return None
        _kinds[kind.__name__] = kind
        records.append((key, kind.__name__, kind.field_names))
    if any(issubclass(kind, Distribution) for kind in values):
        return None
    torch.compiler.allow_in_graph(_call)
    # Or a graph with this function in it would not be kept on disk. What stands here does not count there in each case.
    torch._inductor.config.unsafe_marked_cacheable_functions[f"{__name__}.{_call.__name__}"] = _version()
    return f"{name}, {_version()}", tuple(records)


@functools.cache
def _version() -> str:
    """Changes with all that a graph on disk depends on."""
    code = hashlib.sha256(os.environ.get(VARIABLE, "").encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()[:16]
