"""The upstream factor that the next backward will probably see.

A loss is the root of its graph, so the gradient of its reconstruction is known up to one factor, which hardly ever changes:
1, or 1/batch, or a loss scale. Forward stores the gradient times the factor that the last backward of its like saw; backward
compares on the device, without a sync, and computes anew where it differs. Any guess gives right gradients.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

LIMIT = 1024  # entries, a few bytes each on the device

# What makes calls alike -> (stream, factor). A factor is replaced and never written again, and is only used on the stream that
# wrote it, so no launch can see it change.
_table: dict[Hashable, tuple[int, Tensor]] = {}
# The factors that captured graphs read: kept as long as the process, since a graph may be replayed as long.
_captured: list[Tensor] = []


def guess(key: Hashable, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The factor that the last backward of this kind saw, `[rows]`; at first 1."""
    known = _table.get(key)
    if _is_capturing(device):
        if known is None:
            return torch.ones(rows, dtype=dtype, device=device)
        # Capture begins with a sync of the device, so what another stream wrote is there.
        _captured.append(known[1])
        return known[1]
    stream = _stream(device)
    if known is None or known[0] != stream:
        known = stream, torch.ones(rows, dtype=dtype, device=device)
        _remember(key, *known)
    return known[1]


def remember(key: Hashable, factor: Tensor) -> None:
    """Guess `factor` next time. Not while a graph is captured: each replay would write the tensor again."""
    if not _is_capturing(factor.device):
        _remember(key, _stream(factor.device), factor)


def _remember(key: Hashable, stream: int, factor: Tensor) -> None:
    if len(_table) >= LIMIT and key not in _table:
        _table.clear()
    _table[key] = (stream, factor)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
