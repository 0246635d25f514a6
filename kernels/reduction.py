"""Sums over many programs in one launch: partial sums, then the last program of a row adds them in a fixed order.

Tiles are accumulated in the kernel's own dtype. What is left then is short and is added up in float64: equal or similar
terms, which data are full of, would all be rounded the same way in float32.
"""

import triton
import triton.language as tl


@triton.jit
def fold(tile, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """One sum a thread, of neighbours that it holds: what it keeps from tile to tile."""
    return tl.sum(tile.reshape([THREADS, SIZE // THREADS]), axis=1)


@triton.jit
def arrive_last(partials, arrivals, row, programs, value):
    """Leave `value`, float64, as this program's partial sum; true in the last program of the row to do so."""
    tl.store(partials + tl.program_id(0), value)
    return count_arrival(arrivals + row, programs)


@triton.jit
def all_arrived(arrivals, row, programs):
    """Likewise, of a program whose threads have all stored something."""
    tl.debug_barrier()  # the counter is one thread's
    return count_arrival(arrivals + row, programs)


@triton.jit
def count_arrival(counter, programs):
    """Whether this is the last of so many programs to come here.

    The counter is acquire-release: whoever sees it full sees what all have stored. It is set back to zero for the next launch.
    """
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def ordered_sum(partials, count, SIZE: tl.constexpr):
    """Sum of `count` partial sums, bitwise the same on each run."""
    total = tl.zeros([SIZE], dtype=tl.float64)
    for start in tl.range(0, count, SIZE):
        i = start + tl.arange(0, SIZE)
        # Other programs wrote them: past the L1 cache.
        total += tl.load(partials + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)
