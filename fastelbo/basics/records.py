"""Records: options that are made once. They are frozen, and equal ones are one object, which a look-up finds by identity."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TypeVar

import torch
from typing_extensions import dataclass_transform

from .tracing import is_compiling

Kind = TypeVar("Kind", bound=type)

_made: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


class Record(type):
    """The type of records. A record's `__post_init__` checks its fields and makes them canonical, before equals are found."""

    field_names: tuple[str, ...]
    has_defaults: bool

    def __call__(cls, *args, **options):
        new = super().__call__(*args, **options)
        if is_compiling():  # no state: compiled code compares values
            return new
        try:
            return _made.setdefault((cls, *((type(value), value) for value in vars(new).values())), new)
        except TypeError:  # a user's own record of what has no hash
            return new


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: Kind) -> Kind:
    """Makes a dataclass of a class whose type is `Record`. Copies and pickles of a record are the record itself."""
    cls = dataclass(frozen=True, eq=False, repr=False)(cls)
    cls.field_names = tuple(field.name for field in fields(cls))
    cls.has_defaults = all(field.default is not MISSING for field in fields(cls))
    cls.__repr__, cls.__reduce__ = _represented, _reduced
    cls.__eq__, cls.__hash__ = _is_equal, object.__hash__
    return cls


def _is_equal(self, other) -> bool:
    """By value, for the records of compiled code; others are one object where they are equal, which their hash relies on."""
    if self is other or type(self) is not type(other):
        return self is other
    pairs = [(getattr(self, name), getattr(other, name)) for name in self.field_names]
    return all(a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b) for a, b in pairs)


def _represented(self) -> str:
    """The fields that are not as they are by default."""
    defaults = {field.name: field.default for field in fields(self)}
    shown = (f"{name}={getattr(self, name)!r}" for name in self.field_names if getattr(self, name) != defaults[name])
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _reduced(self):
    return _made_again, (type(self), {name: getattr(self, name) for name in self.field_names})


def _made_again(cls, options):
    return cls(**options)


def canonical(self, field: str, check: Callable) -> None:
    """Put what `check(name, value)` returns in a field's place; called from `__post_init__`."""
    object.__setattr__(self, field, check(f"{type(self).__name__}.{field}", getattr(self, field)))


def check_choice(name: str, value, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value
