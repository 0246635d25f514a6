"""Records: options that are made once. They are frozen, and equal ones are one object, so that a look-up compares identities."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch


class Record(type):
    """The type of records. A record's `__post_init__` checks its fields and makes them canonical, before equals are found."""

    _made: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def __call__(cls, *args, **options):
        new = super().__call__(*args, **options)
        if torch.compiler.is_compiling():  # no state: compiled code compares values
            return new
        return Record._made.setdefault((cls, *((type(value), value) for value in vars(new).values())), new)


def record(cls):
    """Makes a dataclass of a class whose type is `Record`. Copies and pickles of a record are the record itself."""
    cls.__reduce__ = _reduced
    return dataclass(frozen=True, eq=False)(cls)


def _reduced(self):
    return _made_again, (type(self), {field.name: getattr(self, field.name) for field in fields(self)})


def _made_again(cls, options):
    return cls(**options)


def canonical(self, field: str, check: Callable) -> None:
    """Put what `check(name, value)` returns in a field's place; called from `__post_init__`."""
    object.__setattr__(self, field, check(f"{type(self).__name__}.{field}", getattr(self, field)))


def check_choice(name: str, value, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value
