"""Tensors that broadcast to a large one, read by index, from cache, and never expanded in memory."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# How an operand is indexed: there is none, with an element, one number for a whole row, or by the index of a broadcast.
ABSENT, ELEMENT, ROW, BROADCAST = (tl.constexpr(i) for i in range(4))


@triton.jit
def broadcast_index(o, apart, inner, groups):
    """Where in a smaller tensor the number for element `o` lies.

    From the last dimension on, its shape against the large one's: `inner` elements to each number, `groups` numbers, and,
    unless `apart` is None, others for each `apart` elements.
    """
    index = (o // inner) % groups
    if apart is not None:
        index += o // apart * groups
    return index


@triton.jit
def load_operand(
    pointer, o, mask, row_start, apart, inner, groups, MODE: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr
):
    """A tile of an operand, or a scalar where the whole row has one."""
    if not WIDE:
        inner, groups = inner.to(tl.int32), groups.to(tl.int32)
        if apart is not None:
            apart = apart.to(tl.int32)
    if MODE == ELEMENT:
        return tl.load(pointer + o, mask=mask, other=0.5).to(DTYPE)
    elif MODE == ROW:
        return tl.load(pointer + broadcast_index(row_start, apart, inner, groups)).to(DTYPE)
    else:
        return tl.load(pointer + broadcast_index(o, apart, inner, groups), mask=mask, other=0.5).to(DTYPE)


class Operand(NamedTuple):
    """How the kernel reads a tensor that broadcasts to a large one."""

    mode: tl.constexpr = ABSENT
    whole: bool = False  # it is as large
    apart: int = 0
    inner: int = 1
    groups: int = 1
    order: tuple[int, ...] = ()  # the dimensions of the large one as they lie in memory, outermost first

    @classmethod
    def of(cls, small: torch.Tensor | None, large: torch.Tensor, order: tuple[int, ...], most: int) -> "Operand":
        """A tensor with more than `most` runs of dimensions in common with the large one is expanded, and one with two behind a
        dimension that it has not; both are seldom."""
        if small is None:
            return cls()
        if small.shape == large.shape:
            return cls(ELEMENT, True)
        shape = (1,) * (large.dim() - small.dim()) + small.shape
        blocks = []  # [elements, whether the small tensor has them], with neighbours of one kind joined
        for d in order:
            kept = shape[d] != 1
            if large.shape[d] == 1:
                continue
            if blocks and blocks[-1][1] == kept:
                blocks[-1][0] *= large.shape[d]
            else:
                blocks.append([large.shape[d], kept])
        runs = sum(kept for _, kept in blocks)
        if runs > most or (runs == 2 and not blocks[0][1]):
            return cls(ELEMENT)
        inner = blocks.pop()[0] if blocks and not blocks[-1][1] else 1
        groups = blocks.pop()[0] if blocks else 1
        between = blocks.pop()[0] if blocks else 1
        return cls(BROADCAST, False, between * groups * inner if blocks else 0, inner, groups, order)

    def read_by(self, columns: int) -> "Operand":
        """As a scalar, where rows of so many elements have one number each."""
        return self._replace(mode=ROW) if self.mode == BROADCAST and self.inner % max(columns, 1) == 0 else self

    def laid(self, small: torch.Tensor | None, large: torch.Tensor) -> torch.Tensor | None:
        """The tensor as the kernel reads it."""
        if small is None or self.whole or (small.numel() == 1 and self.mode != ELEMENT):
            return small
        if self.mode == ELEMENT:
            return torch.empty_like(large, dtype=small.dtype).copy_(small)
        return small.reshape((1,) * (large.dim() - small.dim()) + small.shape).permute(self.order).contiguous()
