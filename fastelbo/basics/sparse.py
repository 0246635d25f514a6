"""Matrices that are mostly zeros: rows in CSR, and what of them is not 0."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import REALS, check_reals

# Of the dtypes that Torch writes to no places of a tensor, those with the same bits that it does.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class Nonzeros(NamedTuple):
    """What of a matrix is not 0, and where that is."""

    values: Tensor  # [n]
    rows: Tensor  # [n], int64, as the next two
    columns: Tensor
    index: Tensor  # in the flat matrix
    starts: Tensor  # [B + 1], of the rows among them
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def of(self, value: Tensor) -> Tensor:
        """The elements at these places of what broadcasts to the matrix, `[n]`."""
        while value.dim() < 2:
            value = value.unsqueeze(0)
        if value.shape == self.shape:
            return value.reshape(-1).index_select(0, self.index)
        if value.shape[0] == 1:
            return value[0].expand(self.shape[1]).index_select(0, self.columns)
        return value[:, 0].index_select(0, self.rows)

    def sums(self, values: Tensor) -> Tensor:
        """Of such elements, over each row."""
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        return total.index_add(0, self.rows, values.double()).to(values.dtype)

    def totals(self, values: Tensor) -> Tensor:
        """Likewise, in half the time; it cannot be differentiated."""
        return torch.segment_reduce(values.double(), "sum", offsets=self.starts, initial=0).to(values.dtype)


class Rows(NamedTuple):
    """The rows of a CSR matrix."""

    starts: Tensor  # [B + 1]
    columns: Tensor  # [n]
    values: Tensor  # [n]
    shape: tuple[int, int]
    found: Nonzeros | None = None  # all of them, where that is known

    @classmethod
    def of(cls, x: Tensor) -> "Rows":
        batch, width = x.shape
        with torch._C._DisableFuncTorch():  # whose levels take no such tensor, and of which x is not part
            return cls(x.crow_indices(), x.col_indices(), x.values(), (batch, width))

    def checked(self, name: str, size: int) -> "Rows":
        """Raise unless each place of the matrix, which errors call `name`, has one value at most. What is there
        is then known, if the matrix has up to `size` elements."""
        starts, columns, (_, width) = self.starts, self.columns, self.shape
        count = columns.numel()
        if starts[0].item() != 0 or starts[-1].item() != count or (len(starts) > 1 and starts.diff().min().item() < 0):
            raise ValueError(f"{name}.crow_indices() must rise from 0 to the number of values, {count}: got {starts.tolist()}")
        if not count:
            return self
        low, high = (t.item() for t in torch.aminmax(columns))
        if low < 0 or high >= width:
            raise ValueError(f"{name}.col_indices() must be from 0 to {width - 1}, got from {low} to {high}")
        for rows, found in self.pieces(size):
            index = found.index
            if (index[1:] > index[:-1]).all():
                continue
            index = torch.sort(index).values  # columns may come in any order
            twice = index[1:][index[1:] == index[:-1]]
            if twice.numel():
                row, column = divmod(int(twice[0]), width)
                place = rows.start + row, column
                raise ValueError(
                    f"{name} must have one value for each place, got several at {place}: coalesce it as COO before"
                )
        return self._replace(found=found) if found.shape == self.shape else self

    def pieces(self, size: int) -> Iterator[tuple[slice, Nonzeros]]:
        """What is there, in as many rows at a time as have `size` elements, and these rows."""
        batch, width = self.shape
        height = max(1, size // max(1, width))
        if height >= batch:
            yield slice(0, batch), self.all()
            return
        starts = [*self.starts[:-1:height].tolist(), self.values.numel()]
        for i, top in enumerate(range(0, batch, height)):
            bottom = min(top + height, batch)
            yield slice(top, bottom), self.nonzeros(top, bottom, starts[i], starts[i + 1])

    def nonzeros(self, top: int, bottom: int, start: int, stop: int) -> Nonzeros:
        """Those of the rows from `top` to `bottom`, whose values are the ones from `start` to `stop`."""
        starts = self.starts[top : bottom + 1]
        rows = torch.repeat_interleave(starts.diff(), output_size=stop - start)
        columns, width = self.columns[start:stop].long(), self.shape[1]
        index = torch.add(columns, rows, alpha=width)
        return Nonzeros(
            self.values[start:stop], rows, columns, index, starts - start if start else starts, (bottom - top, width)
        )

    def all(self) -> Nonzeros:
        return self.found or self.nonzeros(0, self.shape[0], 0, self.values.numel())

    def dense(self) -> Tensor:
        """The matrix with its zeros."""
        values, (batch, width) = self.values, self.shape
        dtype = _SIGNED.get(values.dtype, values.dtype)
        matrix = torch.zeros(batch * width, dtype=dtype, device=values.device)
        matrix[self.all().index] = values.view(dtype)
        return matrix.view(values.dtype).view(self.shape)


def is_sparse(value) -> bool:
    """Whether it is a CSR matrix."""
    return isinstance(value, Tensor) and value.layout == torch.sparse_csr


def check_data(name: str, value) -> None:
    """A tensor of real numbers, dense or a CSR matrix."""
    if isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in REALS and not value.is_nested:
        return
    if is_sparse(value):
        if value.dim() != 2:
            raise ValueError(f"{name} must be a matrix [B, G] where it is sparse, got {tuple(value.shape)}")
        if value.dtype not in REALS:
            raise TypeError(f"{name} must be of booleans, integers or floats of 16 to 64 bits, got {value.dtype}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require grad where it is sparse: pass it dense, or {name}.detach()")
        return
    if isinstance(value, Tensor) and value.layout in (torch.sparse_coo, torch.sparse_csc):
        raise TypeError(
            f"{name} must be a dense tensor, got one of layout {value.layout}: a sparse one has the layout torch.sparse_csr, so"
            f" pass {name}.to_sparse_csr()"
        )
    if type(value).__module__.startswith("scipy.sparse"):
        raise TypeError(
            f"{name} must be a tensor, got {type(value).__name__} of scipy: pass torch.sparse_csr_tensor(c.indptr, c.indices,"
            f" c.data, c.shape), where c = {name}.tocsr()"
        )
    check_reals(name, value)
