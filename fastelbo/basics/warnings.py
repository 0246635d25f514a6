"""Warnings that name the user's line."""

import sys

_INSIDE = ("fastelbo", "torch")


def stacklevel_of_user() -> int:
    """The `stacklevel` with which a warning of the calling function names the line that called this library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level
