"""Memory layouts: the backends see tensors as flat memory, so tensors that meet must lie in the same dense layout."""

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def dense(first: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The tensors in the layout of the first, contiguous or channels last; copied only where they are not in it yet."""
    layout = torch.contiguous_format
    if not first.is_contiguous():
        channels_last = _CHANNELS_LAST.get(first.dim())
        if channels_last is not None and first.is_contiguous(memory_format=channels_last):
            layout = channels_last
    return [t if t is None else t.contiguous(memory_format=layout) for t in (first, *others)]
