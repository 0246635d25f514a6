"""Sample and KL of any posterior from any prior: the kernels of `latents.py` in full, and the KL of each dimension."""

from math import prod

import torch
import triton
import triton.language as tl

from . import posteriors
from .direct import Launch, allocator, lies
from .latents import clamped, divergence, divergence_bwd_kernel, divergence_fwd_kernel
from .launch import FINISH, MANY_REGISTERS, THREADS, TRITON_DTYPE, Segment, options_of, resident_programs, scratch, tile_size


@triton.jit(do_not_specialize=["batch", "chunks"])
def columns_kernel(
    mu, second, prior_mu, prior_second, kl_sums, mu_sums, square_sums, batch: tl.int64, columns, chunks: tl.int32,
    POSTERIOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRIOR: tl.constexpr, MU_ROW: tl.constexpr, SECOND_ROW: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over every so many rows of the KL and, unless None, of mu and mu^2: `[chunks, columns]`, float64."""
    blocks = tl.cdiv(columns, BLOCK)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(0) // blocks
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
        kl_tile += tl.where(mask, kl, 0.0)
        if mu_sums is not None:
            mu_tile += m
            square_tile += m * m
    out = chunk * columns + column
    tl.store(kl_sums + out, tl.sum(kl_tile.to(tl.float64), axis=0), mask=column < columns)
    if mu_sums is not None:
        tl.store(mu_sums + out, tl.sum(mu_tile.to(tl.float64), axis=0), mask=column < columns)
        tl.store(square_sums + out, tl.sum(square_tile.to(tl.float64), axis=0), mask=column < columns)


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
        posterior, prior: what `second` and `prior_second` are, by name. `clamp`: None, or bounds of `second`.
        kind: of the KL: "sum" over everything, of each "row", "column" or "element"; None: there is none.
        floor: None, or a least KL of an element.
        shares: what of the gradient of the KL with the floor goes to the posterior, and what to the prior.
        kl_weight: what the sums are times; 1 for elements.
        dtype: that of KLs and arithmetic. `layout`: the memory format of `mu`.
    """

    __slots__ = (
        "_backward", "_columns", "_forward", "_like", "_numbers", "_result", "device", "floor", "kind", "kl_weight", "layout",
        "programs", "rows", "z_dtype",
    )  # fmt: skip

    def __init__(
        self, mu, second, prior_mu, prior_second, *,
        posterior, clamp, prior, kind, floor, shares, kl_weight, dtype, layout=torch.contiguous_format,
    ) -> None:  # fmt: skip
        self.rows = mu.shape[0] if kind == "row" else 1
        # What tensors are allocated with: shapes, strides and, of KLs, their dtype.
        self._like = lies(mu)
        self._result = *{"element": self._like, "row": ((self.rows,), (1,))}.get(kind, ((), ())), dtype
        self.device, self.layout = mu.device, layout
        self.kind, self.floor, self.kl_weight = kind, floor, kl_weight
        self.z_dtype = torch.promote_types(mu.dtype, second.dtype)
        tile, options = tile_size(mu, second), options_of(mu.device)
        latents = Segment.of(mu, self.rows, tile)
        self.programs, columns = self.rows * latents.programs, prod(mu.shape[1:])
        self._numbers = (kl_weight, floor or 0.0), shares, (latents.columns, columns, latents.programs)
        constants = constants_of(mu, prior_mu, prior_second, posterior, clamp, prior) | {"DTYPE": TRITON_DTYPE[dtype]}
        streamed = constants | {"ALIGNED": latents.aligned, "WIDE": latents.wide, "BLOCK": tile}
        forward = {"ELEMENTS": kind == "element", "THREADS": THREADS, "FINISH": FINISH}
        self._forward = Launch(divergence_fwd_kernel, self.device, streamed | forward, options)
        per = {"FLOORED": floor is not None, "PER": kind if kind in ("column", "element") else "row"}
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
            self._columns = launch, blocks * chunks, (batch, columns, chunks)

    def forward(self, mu, second, noise, prior_mu, prior_second, stateless=False):
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
        self._forward(
            self.programs, (mu, second, prior_mu, prior_second, noise, z, kl, weighted, partials, arrived), (*weights, *sizes)
        )
        return z, kl, weighted

    def backward(self, grad_z, grad_kl, grad_weighted, mu, second, noise, prior_mu, prior_second, wants_prior):
        """Gradients by `mu`, `second`, `prior_mu` and `prior_second`, the latter of the shape of `mu` and None where unwanted.

        `grad_z`, `grad_kl` and `grad_weighted`, the gradients that arrived at what `forward` returns, or at sums over the batch
        if the kind is "column", are dense and lie as `mu` does; not all are None.
        """
        has_kl = grad_kl is not None or grad_weighted is not None
        like, empty = self._like, allocator(self.device)
        grad_mu, grad_second = empty(*like, mu.dtype) if has_kl else grad_z, empty(*like, second.dtype)
        grad_priors = [
            empty(*like, value.dtype) if wanted and has_kl else None
            for value, wanted in zip((prior_mu, prior_second), wants_prior, strict=True)
        ]
        weights, shares, sizes = self._numbers
        tensors = grad_z, mu, second, prior_mu, prior_second, noise, grad_mu, grad_second, *grad_priors, grad_kl, grad_weighted
        self._backward[has_kl](self.programs, tensors, (*weights, *shares, *sizes))
        return grad_mu, grad_second, *grad_priors

    def columns(self, mu, second, prior_mu, prior_second, statistics):
        """The KL summed over the batch and weighted; if `statistics`, the sums of mu and mu^2: `mu.shape[1:]` each."""
        launch, programs, (batch, columns, chunks) = self._columns
        # In the memory format of a batch of that many samples.
        partials = [
            torch.empty((chunks, *mu.shape[1:]), dtype=torch.float64, device=self.device, memory_format=self.layout)
            for _ in range(3 if statistics else 1)
        ]
        sums = (*partials, None, None)[:3]
        launch(programs, (mu, second, prior_mu, prior_second, *sums), (batch, columns, chunks))
        kl, *sums = (partial.sum(0) for partial in partials)
        dtype = self._result[2]
        return (kl * self.kl_weight).to(dtype), tuple(s.to(dtype) for s in sums) or None
