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


def in_graph(function: Callable, values: dict[str, Any], **options) -> Any:
    """What `function(**values, **options)` returns; None where it cannot be one call, or raises. Dynamo must be tracing.

    What raises is to be traced after all, so that the user gets that error and not one of Dynamo's.
    """
    # What is looked up here, Dynamo guards: each name takes time before each run.
    for value in values.values():
        if isinstance(value, Distribution):
            return None
    described: dict[str, Any] = {}
    for key, option in options.items():
        described[key] = option
        if option is not None and (fields := _fields(type(option))) is not PLAIN:
            if fields is None:
                return None
            described[key] = {KIND: type(option).__name__, **{field: getattr(option, field) for field in fields}}
    return _call(_name_of(function), **values, **described)


KIND = "kind"
PLAIN = "plain"


def _call(name: str, **arguments):
    for key, value in arguments.items():
        if isinstance(value, dict):  # a record, of which a graph can hold the fields
            fields = dict(value)
            arguments[key] = _kinds[fields.pop(KIND)](**fields)
    try:
        return _functions[name](**arguments)
    except (TypeError, ValueError):
        if is_compiling():
            return None
        raise


@constant_when_compiled
def _name_of(function: Callable) -> str:
    """By which `_call` finds it. The code's version is in it, and so in the graph, by which Torch finds what it has compiled
    and kept on disk. The compiler has to be there already, since this brings it."""
    name = f"{function.__name__}, {_version()}"
    if name not in _functions:
        _functions[name] = function
        torch.compiler.allow_in_graph(_call)
        # Or a graph with this function in it would not be kept on disk. What stands here does not count there in each case.
        torch._inductor.config.unsafe_marked_cacheable_functions[f"{__name__}.{_call.__name__}"] = _version()
    return name


@constant_when_compiled
def _fields(kind: type) -> tuple[str, ...] | str | None:
    """Those of a record of this library's, which its class's name stands for; PLAIN for what a graph holds as it is."""
    if kind in (str, tuple, list):
        return PLAIN
    if not isinstance(kind, Record) or not kind.__module__.startswith(__name__.partition(".")[0] + "."):
        return None
    _kinds[kind.__name__] = kind
    return kind.field_names


@functools.cache
def _version() -> str:
    """Changes with all that a graph on disk depends on."""
    code = hashlib.sha256(os.environ.get(VARIABLE, "").encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()[:16]
