"""How a launch is laid out: tiles, programs, integer width; the memory in which programs add up; launches that nobody keeps."""

import functools
import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .direct import INTERPRETED, Launch, raw_stream

is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)

# Of a program, and so of the running sums: each thread keeps one.
THREADS = 128

# At most, on a multiprocessor.
PROGRAMS = 16

# A row's partial sums are added up this many at a time: 1024 made ptxas spill a register.
FINISH = 512

# For a kernel that ptxas would otherwise make spill a value or two, to fit one more program on a multiprocessor. AMD's compiler
# takes no such number.
MANY_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}

# The dtype that a kernel computes and accumulates in, by the dtype of its results.
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def pointer_and_value(number: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    """A kernel takes a number that may be on the device twice. One of the two is None or unused."""
    return (number, 1.0) if isinstance(number, torch.Tensor) else (None, number)


def tile_size(first: torch.Tensor, second: torch.Tensor) -> int:
    """Elements of a tile, from the two tensors that are loaded together.

    A thread loads 16 bytes of the wider one, and as many elements of the other. With more, the compiler no longer issues the
    loads of a tile before it waits for the first, and exchanges tensors of two widths between threads.
    """
    if INTERPRETED:  # to which a tile of few elements costs as much as one of thousands, and one of more costs more
        return min(65536, max(1024, triton.next_power_of_2(first.numel())))
    return THREADS * 16 // max(first.element_size(), second.element_size())


@functools.cache
def resident_programs(device: torch.device) -> int:
    """Programs that the device can hold at once; more only queue up."""
    if device.type != "cuda":
        return PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def options_of(device: torch.device) -> dict:
    """What every launch is compiled with. Triton's default for the fusion of products and sums changes after 3.9."""
    warp = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return {"num_warps": THREADS // warp, "enable_fp_fusion": True}


class Segment(NamedTuple):
    """`rows` rows of `columns` elements each, flat in memory, and the programs that stream one row."""

    columns: int
    programs: int
    aligned: bool  # every row starts at a multiple of 16 elements
    wide: bool  # offsets need 64 bits

    @classmethod
    def of(cls, tensor: torch.Tensor | None, rows: int, tile: int) -> "Segment":
        if tensor is None or rows == 0:
            return cls(0, 0, True, False)
        columns = tensor.numel() // rows
        programs = min(triton.cdiv(columns, tile), max(1, resident_programs(tensor.device) // rows))
        # The loop counter runs past the end by at most one stride.
        wide = tensor.numel() + programs * tile >= 2**31
        return cls(columns, max(1, programs), rows == 1 or columns % 16 == 0, wide)


kept_scratch: dict[tuple[int | None, int], tuple[tuple, int, int]] = {}  # and how many there are of each
NO_SCRATCH: tuple[tuple, int, int] = (None, None), -1, -1  # too few for a launch of nothing, too


def scratch(device: torch.device, rows: int, programs: int, stateless: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for partial sums, float64, at least one a program, and counters, int32, at least one zero a row, which the last
    program of each row sets back to zero.

    Launches on one stream run one after the other and share theirs; where there are no streams, a thread's do. A captured
    launch takes its own, since its graph may be replayed on any stream; so does a stateless one, which may run while
    `torch.compile` warms a graph up, with memory from the graph's pool, in which nothing may stay.
    """
    index = device.index  # of a GPU
    if stateless or (index is not None and is_capturing()):
        return _new_scratch(device, rows, programs)
    key = index, threading.get_ident() if index is None else raw_stream(index)
    memory, most_programs, most_rows = kept_scratch.get(key, NO_SCRATCH)
    if most_programs < programs or most_rows < rows:
        programs, rows = max(programs, 4096), max(rows, 1024)
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            memory = _new_scratch(device, rows, programs)
        kept_scratch[key] = memory, programs, rows
    return memory


def _new_scratch(device: torch.device, rows: int, programs: int) -> tuple[torch.Tensor, torch.Tensor]:
    partials = torch.empty(programs, dtype=torch.float64, device=device)
    return partials, torch.zeros(rows, dtype=torch.int32, device=device)


_launches: dict[tuple, Launch] = {}


def launch(kernel, programs: int, device: torch.device, *args, **constants) -> None:
    """Launch on `device`, whichever is current. No programs, no launch."""
    # Kernels and device functions are told apart by their addresses, since a hash of them takes long; a launch keeps them.
    key = id(kernel), device, *[c if type(c) in PLAIN else id(c) for c in constants.values()]
    found = _launches.get(key)
    if found is None:
        found = _launches[key] = Launch(kernel, device, constants, options_of(device))
    found(programs, args[: found.tensors], args[found.tensors :])


PLAIN = (int, bool, str, float, type(None))
