"""Memory layouts: the backends see tensors as flat memory, so tensors that meet must lie in the same dense layout."""

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(tensor: Tensor) -> torch.memory_format:
    """Channels last where the tensor lies so, otherwise contiguous, whether it does or not."""
    channels_last = _CHANNELS_LAST.get(tensor.dim())
    if channels_last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last


def without_copies(value: Tensor, last: int = 0) -> Tensor:
    """Of a tensor that was expanded, what was expanded: one of each row of copies, but for those in the `last` dimensions."""
    for dim in range(value.dim() - last):
        if value.shape[dim] > 1 and value.stride(dim) == 0:
            value = value.narrow(dim, 0, 1)
    return value
