"""The upstream factor that the next backward will probably see.

A loss is the root of its graph, so the gradient of its reconstruction is known up to one factor, which hardly ever changes:
1, or 1/batch, or a loss scale. Forward stores the gradient times the factor that the last backward of its like saw; backward
compares on the device, without a sync, and computes anew where it differs. Any guess gives right gradients.
"""

import torch
from torch import Tensor

_is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# The factors that captured graphs read: kept as long as the process, since a graph may be replayed as long.
_captured: list[Tensor] = []


class Guess:
    """The factor of calls that are alike. It is replaced and never written again, and is only used on the stream that wrote it,
    so no launch can see it change."""

    __slots__ = "at_first", "gpu", "known", "number", "seen"

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, like: "Guess | None" = None) -> None:
        """At first it is 1, or what it is for calls that are nearly alike."""
        self.at_first, self.gpu = (rows, dtype, device), device.index if device.type == "cuda" else None
        self.known: tuple[int, Tensor] | None = None if like is None else like.known
        self.number = 1.0 if like is None else like.number  # where it is looked at without a sync
        self.seen = 1.0 if like is None else like.seen
        if self.known is None and device.type == "cpu":
            self.known = 0, _ones(*self.at_first)

    def factor(self) -> Tensor:
        """What the last backward saw, `[rows]`."""
        known = self.known
        if self.gpu is None:
            return known[1]
        if _is_capturing():
            if known is None:
                return _ones(*self.at_first)
            # Capture begins with a sync of the device, so what another stream wrote is there.
            _captured.append(known[1])
            return known[1]
        stream = _raw_stream(self.gpu)  # its number, without an object for it
        if known is None or known[0] != stream:
            known = self.known = stream, _ones(*self.at_first)
        return known[1]

    def remember(self, factor: Tensor | float) -> None:
        """Guess `factor` next time. Not while a graph is captured: each replay would write the tensor again."""
        if type(factor) is float:
            # Of one that changes from call to call nothing is known, and what was stored with 1 needs only to be multiplied.
            self.number = factor if factor == self.seen else 1.0
            self.seen = factor
        elif self.gpu is None:
            self.known = 0, factor
        elif not _is_capturing():
            self.known = _raw_stream(self.gpu), factor


def _ones(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made in inference mode cannot be saved outside of it
        return torch.ones(rows, dtype=dtype, device=device)
