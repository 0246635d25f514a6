"""Sample and KL of any posterior from any prior: all that `latents.py` has, and the KL of each dimension."""

from math import prod

import torch
import triton
import triton.language as tl

from . import posteriors
from .broadcast import Operand
from .direct import Launch, allocator, dtype_of, lies
from .latents import backward, clamped, divergence, forward, weight_tile
from .launch import FINISH, MANY_REGISTERS, THREADS, TRITON_DTYPE, Segment, options_of, resident_programs, scratch, tile_size
from .operands import scalar
from .reduction import all_arrived, count_arrival, ordered_sum


@triton.jit(do_not_specialize=["latents", "columns", "programs", "apart", "inner", "groups"])
def divergence_fwd_kernel(
    mu, logvar, prior_mu, prior_second, kl_weight, noise, z, kl_out, weighted_out, partials, arrived,
    kl_scale: tl.float64, floor: tl.float64, latents: tl.int64, columns: tl.int64, programs: tl.int32,
    apart: tl.int64, inner: tl.int64, groups: tl.int64,
    POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, WEIGHT: tl.constexpr, APART: tl.constexpr,
    ELEMENTS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    forward(
        mu, logvar, prior_mu, prior_second, kl_weight, noise, z, kl_out, weighted_out, partials, arrived, None, None, None,
        None, 1.0, 1.0, kl_scale, floor, latents, columns, programs, apart if APART else None, inner, groups,
        POSTERIOR, LOW, HIGH, PRIOR, MU_ROW, SECOND_ROW, WEIGHT, ELEMENTS, DTYPE, ALIGNED, WIDE, BLOCK, THREADS, FINISH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["latents", "columns", "programs", "apart", "inner", "groups"])
def divergence_bwd_kernel(
    grad_z, mu, logvar, prior_mu, prior_second, kl_weight, noise, grad_mu, grad_logvar, grad_prior_mu, grad_prior_second,
    grad_kl, grad_weighted, of_columns,
    kl_scale: tl.float64, floor: tl.float64, posterior_share: tl.float64, prior_share: tl.float64,
    latents: tl.int64, columns: tl.int64, programs: tl.int32, apart: tl.int64, inner: tl.int64, groups: tl.int64,
    HAS_KL: tl.constexpr, POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, WEIGHT: tl.constexpr, APART: tl.constexpr,
    FLOORED: tl.constexpr, PER: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    backward(
        grad_z, mu, logvar, prior_mu, prior_second, kl_weight, noise, grad_mu, grad_logvar, grad_prior_mu, grad_prior_second,
        None, grad_kl, grad_weighted, of_columns, None, 1.0, kl_scale, floor, posterior_share, prior_share,
        latents, columns, programs, apart if APART else None, inner, groups,
        HAS_KL, POSTERIOR, LOW, HIGH, PRIOR, MU_ROW, SECOND_ROW, WEIGHT, FLOORED, PER, DTYPE, ALIGNED, WIDE, BLOCK,
    )  # fmt: skip


@triton.jit
def sum_of_chunks(sums, chunks, columns, there, BLOCK: tl.constexpr):
    """Of some columns, in a fixed order."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for chunk in tl.range(0, chunks):
        # Other programs wrote them: past the L1 cache.
        total += tl.load(sums + chunk * columns, mask=there, other=0.0, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["batch", "chunks", "apart", "inner", "groups"])
def columns_kernel(
    mu, second, prior_mu, prior_second, kl_weight, of_columns, mu_out, square_out, kl_out, free_out, partials, arrived,
    kl_scale: tl.float64, free_bits: tl.float64, batch: tl.int64, columns, chunks: tl.int32,
    apart: tl.int64, inner: tl.int64, groups: tl.int64,
    POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, WEIGHT: tl.constexpr, APART: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the batch of the KL, times a weight, and, unless None, of mu and mu^2: `[columns]` each. Unless None, the KLs
    of all columns, and the same with `free_bits` under each: `[]`. A chunk of programs has every so many rows, and the last one
    to arrive at a block of columns adds up what each has left of it, float64; the last such one adds up the blocks."""
    blocks = tl.cdiv(columns, BLOCK)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    if not WIDE:
        batch = batch.to(tl.int32)
    kl_tile = tl.zeros([ROWS, BLOCK], dtype=DTYPE)
    mu_tile = tl.zeros([ROWS, BLOCK], dtype=DTYPE)
    square_tile = tl.zeros([ROWS, BLOCK], dtype=DTYPE)
    for start in tl.range(chunk * ROWS, batch, chunks * ROWS):
        row = start + tl.arange(0, ROWS)
        if WIDE:
            row = row.to(tl.int64)
        o = row[:, None] * columns + column[None, :]
        mask = (row < batch)[:, None] & (column < columns)[None, :]
        m = tl.load(mu + o, mask=mask, other=0.0).to(DTYPE)
        raw = clamped(tl.load(second + o, mask=mask, other=0.0).to(DTYPE), LOW, HIGH, DTYPE)
        std, _, lv, excess, _ = POSTERIOR(raw)
        place = tl.broadcast_to(column[None, :], [ROWS, BLOCK])
        kl, _, _, _, _ = divergence(
            m, raw, std, lv, excess, prior_mu, prior_second, o, place, mask, PRIOR, MU_ROW, SECOND_ROW, DTYPE
        )
        if kl_weight is not None:
            w = weight_tile(kl_weight, o, mask, apart if APART else None, inner, groups, WEIGHT, DTYPE)
            kl = tl.where(w == 0, 0.0, w * kl)
        kl_tile += tl.where(mask, kl, 0.0)
        if mu_out is not None:
            mu_tile += m
            square_tile += m * m
    sums, place, size = partials + column, chunk * columns, chunks * columns
    tl.store(sums + place, tl.sum(kl_tile.to(tl.float64), axis=0), mask=column < columns)
    if mu_out is not None:
        tl.store(sums + size + place, tl.sum(mu_tile.to(tl.float64), axis=0), mask=column < columns)
        tl.store(sums + 2 * size + place, tl.sum(square_tile.to(tl.float64), axis=0), mask=column < columns)
    if all_arrived(arrived, block, chunks):
        there = column < columns
        unweighted = sum_of_chunks(sums, chunks, columns, there, BLOCK)
        total = unweighted * kl_scale
        tl.store(of_columns + column, total.to(DTYPE), mask=there)
        if kl_out is not None:
            # What backward will read, so that both see the same columns above.
            floored = tl.where(total.to(DTYPE) <= scalar(None, free_bits, DTYPE), free_bits, total)
            ends = partials + (3 if mu_out is not None else 1) * size
            # Not of products, which each lane of a warp would fuse with the sum in a way of its own.
            tl.store(ends + block, tl.sum(unweighted))
            tl.store(ends + blocks + block, tl.sum(tl.where(there, floored, 0.0)))
            if count_arrival(arrived + blocks, blocks):
                tl.store(kl_out, (ordered_sum(ends, blocks, BLOCK) * kl_scale).to(DTYPE))
                tl.store(free_out, ordered_sum(ends + blocks, blocks, BLOCK).to(DTYPE))
        if mu_out is not None:
            total = sum_of_chunks(sums + size, chunks, columns, there, BLOCK)
            tl.store(mu_out + column, total.to(DTYPE), mask=there)
            total = sum_of_chunks(sums + 2 * size, chunks, columns, there, BLOCK)
            tl.store(square_out + column, total.to(DTYPE), mask=there)


def constants_of(mu, prior_mu, prior_second, posterior, clamp, prior) -> dict:
    """What kernels of any posterior and prior have as constants."""
    low, high = clamp or (None, None)
    function = None if prior is None else f"{prior}_prior"
    if prior in ("std", "var") and posterior in (prior, "var"):
        function = f"{prior}_of_{prior}_prior"
    return {
        "POSTERIOR": getattr(posteriors, posterior), "LOW": low, "HIGH": high,
        "PRIOR": function and getattr(posteriors, function),
        "MU_ROW": prior is not None and prior_mu.shape != mu.shape,
        "SECOND_ROW": prior is not None and prior_second.shape != mu.shape,
    }  # fmt: skip


class Divergence:
    """The launches of a sample and its KL for latents of one kind, with all that follows from shapes and options.

    Args:
        mu, second: of one shape `[B, ...]` and dense layout.
        prior_mu, prior_second: likewise, or one row of it for all, or None.
        kl_weight: weights of the KL's elements, which broadcast to `mu`, or None. What has the weight 0 does not count, not
            even if it is NaN. None where there are `free_bits`.
        posterior, prior: what `second` and `prior_second` are, by name. `clamp`: None, or bounds of `second`.
        kind: of the KL: "sum" over everything, of each "row", "column" or "element"; None: there is none.
        floor: None, or a least KL of an element. `free_bits`: None, or one of a "column".
        shares: what of the gradient of the KL with the floor goes to the posterior, and what to the prior.
        kl_scale: what the sums are times; 1 for elements.
        dtype: that of KLs and arithmetic.
    """

    __slots__ = (
        "_backward", "_columns", "_forward", "_like", "_like_column", "_numbers", "_result", "device", "floor",
        "kind", "programs", "rows", "weight", "z_dtype",
    )  # fmt: skip

    def __init__(
        self, mu, second, prior_mu, prior_second, kl_weight, *,
        posterior, clamp, prior, kind, floor, free_bits, shares, kl_scale, dtype,
    ) -> None:  # fmt: skip
        self.rows = mu.shape[0] if kind == "row" else 1
        # What tensors are allocated with: shapes, strides and, of KLs, their dtype.
        self._like = lies(mu)
        self._result = *{"element": self._like, "row": ((self.rows,), (1,))}.get(kind, ((), ())), dtype
        self.device, self.kind, self.floor = mu.device, kind, floor
        self.z_dtype = torch.promote_types(mu.dtype, second.dtype)
        order = tuple(sorted(range(mu.dim()), key=lambda d: (-mu.stride(d), d)))
        self.weight = weight = Operand.of(kl_weight, mu, order, 2)
        places = weight.apart, weight.inner, weight.groups
        tile, options = tile_size(mu, second), options_of(mu.device)
        latents = Segment.of(mu, self.rows, tile)
        self.programs, columns = self.rows * latents.programs, prod(mu.shape[1:])
        self._numbers = (
            (kl_scale, floor or free_bits or 0.0),
            shares,
            (latents.columns, columns, latents.programs, *places),
        )
        constants = constants_of(mu, prior_mu, prior_second, posterior, clamp, prior)
        constants |= {"WEIGHT": weight.mode, "APART": weight.apart != 0, "DTYPE": TRITON_DTYPE[dtype]}
        streamed = constants | {"ALIGNED": latents.aligned, "WIDE": latents.wide, "BLOCK": tile}
        forward = {"ELEMENTS": kind == "element", "THREADS": THREADS, "FINISH": FINISH}
        self._forward = Launch(divergence_fwd_kernel, self.device, streamed | forward, options)
        per = {"FLOORED": floor is not None, "PER": kind if kind in ("column", "element") else "row"}
        if free_bits is not None:
            per = {"FLOORED": True, "PER": "row"}
        self._backward = [
            Launch(divergence_bwd_kernel, self.device, {"HAS_KL": has_kl} | streamed | per, options) for has_kl in (False, True)
        ]
        if kind == "column":
            batch, block = mu.shape[0], min(max(16, triton.next_power_of_2(columns)), THREADS)
            rows, blocks = tile // block, triton.cdiv(columns, block)
            chunks = max(1, min(triton.cdiv(batch, rows), resident_programs(self.device) // max(blocks, 1)))
            wide = mu.numel() + chunks * rows * columns >= 2**31
            options = options | (MANY_REGISTERS if mu.element_size() == 2 else {})
            launch = Launch(columns_kernel, self.device, constants | {"WIDE": wide, "ROWS": rows, "BLOCK": block}, options)
            self._columns = (
                launch,
                blocks,
                free_bits is not None,
                (kl_scale, free_bits or 0.0, batch, columns, chunks, *places),
            )
            self._like_column = tuple(mu.shape[1:]), mu.stride()[1:], dtype

    def forward(self, mu, second, noise, prior_mu, prior_second, kl_weight, stateless=False):
        """A sample if there is `noise`, like `mu` or a seed from `draw_noise`, and KLs unless their kind is None.

        Returns `(z, kl, the KL with the floor)`: what was not asked for is None.
        """
        kind, empty = self.kind, allocator(self.device)
        weighted = partials = arrived = None
        z = None if noise is None else empty(*self._like, self.z_dtype)
        kl = None if kind is None else empty(*self._result)
        if kind not in (None, "element"):
            weighted = None if self.floor is None else empty(*self._result)
            sums = self.programs if self.floor is None else 2 * self.programs
            partials, arrived = scratch(self.device, self.rows, sums, stateless)
        weights, _, sizes = self._numbers
        kl_weight = self.weight.laid(kl_weight, mu)
        tensors = mu, second, prior_mu, prior_second, kl_weight, noise, z, kl, weighted, partials, arrived
        self._forward(self.programs, tensors, (*weights, *sizes), (dtype_of(noise), kl_weight is None))
        return z, kl, weighted

    def backward(
        self, grad_z, grad_kl, grad_weighted, mu, second, noise, prior_mu, prior_second, kl_weight, wants_prior, of_columns=None
    ):  # fmt: skip
        """Gradients by `mu`, `second`, `prior_mu` and `prior_second`, the latter of the shape of `mu` and None where unwanted.

        `grad_z`, `grad_kl` and `grad_weighted`, the gradients that arrived at what `forward` returns, or at sums over the batch
        if the kind is "column", are dense and lie as `mu` does; not all are None. With free bits they arrived at the totals,
        and `of_columns` is what `columns` returned.
        """
        has_kl = grad_kl is not None or grad_weighted is not None
        like, empty = self._like, allocator(self.device)
        grad_mu, grad_second = empty(*like, mu.dtype) if has_kl else grad_z, empty(*like, second.dtype)
        grad_priors = [
            empty(*like, value.dtype) if wanted and has_kl else None
            for value, wanted in zip((prior_mu, prior_second), wants_prior, strict=True)
        ]
        weights, shares, sizes = self._numbers
        kl_weight = self.weight.laid(kl_weight, mu)
        tensors = grad_z, mu, second, prior_mu, prior_second, kl_weight, noise, grad_mu, grad_second, *grad_priors
        tensors = *tensors, grad_kl, grad_weighted, of_columns
        kind = *map(dtype_of, (grad_z, grad_kl, grad_weighted, of_columns, noise)), *wants_prior
        self._backward[has_kl](self.programs, tensors, (*weights, *shares, *sizes), kind)
        return grad_mu, grad_second, *grad_priors

    def columns(self, mu, second, prior_mu, prior_second, kl_weight, statistics, stateless=False):
        """Of each column, the KL summed over the batch and weighted; if `statistics`, the sums of mu and mu^2: `mu.shape[1:]`.

        Returns `(kl, free, of_columns, *statistics)`: with free bits, the total and that with them; else None and None.
        """
        (launch, blocks, is_free, numbers), empty = self._columns, allocator(self.device)
        _, _, _, columns, chunks, *_ = numbers
        kl, free = (empty(*self._result), empty(*self._result)) if is_free else (None, None)
        outputs = [empty(*self._like_column) for _ in range(3 if statistics else 1)]
        partials, arrived = scratch(self.device, blocks + 1, len(outputs) * chunks * columns + 2 * blocks, stateless)
        kl_weight = self.weight.laid(kl_weight, mu)
        tensors = mu, second, prior_mu, prior_second, kl_weight, *(*outputs, None, None)[:3], kl, free, partials, arrived
        launch(blocks * chunks, tensors, numbers)
        return kl, free, *outputs
