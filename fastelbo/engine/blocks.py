"""Blocks that fit in a CPU's cache, and memory that stays in it: what the Torch backend computes in."""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a block, and of each thread's part of it at least: a few buffers of 3 MB stay in the last-level cache. Smaller
# blocks would fit in a nearer one, but starting the threads for every operation costs more than that gains.
BLOCK, THREAD = 3 * 2**18, 2**16

# Elements that a temporary tensor may have without costing more than memory that is kept.
SMALL = 2**14

# And latents of which forward keeps what backward needs, in no more tensors than autograd would: exponentials take longer.
KEPT = 2**18


def added_up(parts: list[tuple], like: Tensor, weight: float, per_sample: bool, dtype: torch.dtype) -> Tensor:
    """The sums of blocks, `(index of the rows, sum)`, added up and times `weight`, `[]` or `[B]`."""
    if len(parts) == 1:
        return parts[0][1].mul_(weight) if weight != 1 else parts[0][1]
    if not per_sample:
        return torch.stack([part for _, part in parts]).sum(dtype=torch.float64).mul_(weight).to(dtype)
    total = torch.zeros(like.shape[:1], dtype=torch.float64, device=like.device)
    for rows, part in parts:
        total[rows] += part
    return total.mul_(weight).to(dtype)


def converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else scratch(name, value, dtype).copy_(value)


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}


_memory = _Memory()


def scratch(name: str | int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of the shape of `like`. Each thread keeps its own for the next call: the page faults of fresh memory cost as much
    as the arithmetic."""
    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=dtype)
    memory = _memory.buffers.get((name, dtype))
    if memory is None or memory.numel() < like.numel():
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            memory = _memory.buffers[name, dtype] = torch.empty(
                max(block_size(), like.numel()), dtype=dtype, device=like.device
            )
    return memory.as_strided(like.shape, like.stride())


SPARES = 10  # buffers that `spare` has


class _Spare:
    __slots__ = "dtype", "like"

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype = like, dtype

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < SPARES:
            raise IndexError(i)  # which ends a loop
        return scratch(i, self.like, self.dtype)


def spare(like: Tensor, dtype: torch.dtype) -> _Spare | tuple[None, ...]:
    """Buffers of the shape of `like`, likewise, each made when it is asked for; None where new ones cost no more."""
    if like.numel() <= SMALL or like.device.type != "cpu":
        return (None,) * SPARES
    return _Spare(like, dtype)


def block_size() -> int:
    """Elements of a block on a CPU."""
    return max(BLOCK, THREAD * torch.get_num_threads())


def cut_alike(per_sample: bool, *tensors: Tensor | None) -> Iterator[tuple]:
    """The tensors cut alike into blocks that fit in cache, flat or as `[rows, features]`: `(index of the rows, *blocks)`.

    The first of them is not None; None stays None. A device other than a CPU has nothing to gain from blocks and gets one.
    """
    first = tensors[0]
    numel = first.numel()
    limit = block_size() if first.device.type == "cpu" else numel
    if numel <= limit and not per_sample:
        yield ..., *tensors
        return
    rows = first.shape[0] if per_sample else 1
    columns = numel // max(rows, 1)
    if numel <= limit:
        yield ..., *(t if t is None else t.as_strided((rows, columns), (columns, 1)) for t in tensors)
        return
    height, width = max(1, limit // columns), min(limit, columns)
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            shape, start = (min(height, rows - i), min(width, columns - j)), i * columns + j
            index = slice(i, i + height) if per_sample else ...
            yield (
                index,
                *(t if t is None else t.as_strided(shape, (columns, 1), t.storage_offset() + start) for t in tensors),
            )
