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


def in_layout(layout: torch.memory_format, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in that layout; copied only where they are not in it yet."""
    return [t if t is None else t.contiguous(memory_format=layout) for t in tensors]


def dense(first: Tensor | None, *others: Tensor | None) -> list[Tensor | None]:
    """The tensors in the layout of the first; as they are, where that is None."""
    return [first, *others] if first is None else in_layout(layout_of(first), first, *others)


def dense_latents(mu: Tensor, logvar: Tensor, noise: Tensor) -> list[Tensor]:
    """The three in the layout of `mu`, by which noise is numbered; a seed in place of the noise has none."""
    if noise.is_floating_point():
        return dense(mu, logvar, noise)
    return [*dense(mu, logvar), noise]
