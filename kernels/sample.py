"""Sample and KL of N(mu, exp(logvar)) from N(0, I): the kernels of most calls."""

import torch
import triton
import triton.language as tl

from .direct import Launch, allocator, dtype_of, lies
from .latents import backward, forward
from .launch import FINISH, THREADS, TRITON_DTYPE, Segment, options_of, pointer_and_value, scratch, tile_size
from .posteriors import logvar as logvar_posterior


@triton.jit(do_not_specialize=["latents", "programs"])
def sample_fwd_kernel(
    mu, logvar, noise, z, kl_out, partials, arrived, kl_scale: tl.float64, latents: tl.int64, programs: tl.int32,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    forward(
        mu, logvar, None, None, None, noise, z, kl_out, None, partials, arrived, None, None, None, None,
        1.0, 1.0, kl_scale, 0.0, latents, latents, programs, None, 1, 1,
        logvar_posterior, None, None, None, False, False, None, False, DTYPE, ALIGNED, WIDE, BLOCK, THREADS, FINISH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["latents", "programs"])
def total_kernel(
    mu, logvar, recon, kl_out, loss_out, beta, recon_weight, partials, arrived,
    beta_value: tl.float64, recon_weight_value: tl.float64, kl_scale: tl.float64, latents: tl.int64, programs: tl.int32,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    forward(
        mu, logvar, None, None, None, None, None, kl_out, None, partials, arrived, recon, loss_out, beta, recon_weight,
        beta_value, recon_weight_value, kl_scale, 0.0, latents, latents, programs, None, 1, 1,
        logvar_posterior, None, None, None, False, False, None, False, DTYPE, ALIGNED, WIDE, BLOCK, THREADS, FINISH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["latents", "programs"])
def sample_bwd_kernel(
    grad_z, mu, logvar, noise, grad_mu, grad_logvar, grad_loss, grad_kl, beta,
    beta_value: tl.float64, kl_scale: tl.float64, latents: tl.int64, programs: tl.int32,
    HAS_KL: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    backward(
        grad_z, mu, logvar, None, None, None, noise, grad_mu, grad_logvar, None, None, grad_loss, grad_kl, None, None, beta,
        beta_value, kl_scale, 0.0, 1.0, 1.0, latents, latents, programs, None, 1, 1,
        HAS_KL, logvar_posterior, None, None, None, False, False, None, False, "row", DTYPE, ALIGNED, WIDE, BLOCK,
    )  # fmt: skip


def draw_noise(like: torch.Tensor, layout: torch.memory_format, generator: torch.Generator | None) -> torch.Tensor:
    """The seed of a stream of normals: a 0-d int64 tensor on the device, of 63 bits from Torch's generator, without a sync."""
    return allocator(like.device)((), (), torch.int64).random_(generator=generator)


class Sample:
    """The launches of a sample and its KL for latents of one kind, with all that follows from shapes and options.

    `mu` and `logvar` are of one shape `[B, ...]` and dense layout. The KL is times `kl_scale`, `[]` or `[B]`.
    """

    __slots__ = "_backward", "_forward", "_like", "_result", "_total", "device", "numbers", "programs", "rows", "z_dtype"

    def __init__(self, mu, logvar, *, kl_scale, per_sample, dtype) -> None:
        self.rows = mu.shape[0] if per_sample else 1
        self.device, shape = mu.device, (self.rows,) if per_sample else ()
        # What tensors are allocated with: shapes, strides and, of the KL, its dtype.
        self._result, self._like = (shape, (1,) * len(shape), dtype), lies(mu)
        self.z_dtype = torch.promote_types(mu.dtype, logvar.dtype)
        tile, options = tile_size(mu, logvar), options_of(mu.device)
        segment = Segment.of(mu, self.rows, tile)
        self.programs = self.rows * segment.programs
        self.numbers = kl_scale, segment.columns, segment.programs
        constants = {"DTYPE": TRITON_DTYPE[dtype], "ALIGNED": segment.aligned, "WIDE": segment.wide, "BLOCK": tile}
        summed = constants | {"THREADS": THREADS, "FINISH": FINISH}
        self._forward = Launch(sample_fwd_kernel, self.device, summed, options)
        self._total = Launch(total_kernel, self.device, summed, options)
        self._backward = [
            Launch(sample_bwd_kernel, self.device, {"HAS_KL": has_kl} | constants, options) for has_kl in (False, True)
        ]

    def forward(self, mu, logvar, noise, wants_kl, stateless=False):
        """z = mu + exp(logvar / 2) * noise, unless `noise` is None, and the KL if it is wanted: `(z, kl)`.

        `noise`: of the shape and layout of `mu`, or a seed from `draw_noise`. `stateless`: keep nothing for later calls.
        """
        kl, partials, arrived, empty = None, None, None, allocator(self.device)
        z = None if noise is None else empty(*self._like, self.z_dtype)
        if wants_kl:
            kl = empty(*self._result)
            partials, arrived = scratch(self.device, self.rows, self.programs, stateless)
        kind = wants_kl, dtype_of(noise)
        self._forward(self.programs, (mu, logvar, noise, z, kl, partials, arrived), self.numbers, kind)
        return z, kl

    def total(self, mu, logvar, recon, beta, recon_weight, stateless=False):
        """The KL, and the loss that it makes of a reconstruction, `[]` or `[B]`: `(kl, recon_weight * recon + beta * kl)`."""
        empty = allocator(self.device)
        kl, loss = empty(*self._result), empty(*self._result)
        partials, arrived = scratch(self.device, self.rows, self.programs, stateless)
        (of_kl, beta), (of_recon, recon_weight) = pointer_and_value(beta), pointer_and_value(recon_weight)
        tensors = mu, logvar, recon, kl, loss, of_kl, of_recon, partials, arrived
        self._total(self.programs, tensors, (beta, recon_weight, *self.numbers), (dtype_of(of_kl), dtype_of(of_recon)))
        return kl, loss

    def backward(self, grad_z, mu, logvar, noise, beta, upstreams):
        """Gradients by `mu` and `logvar`: `grad_z` arrived at z, `upstreams` at a loss, in which the KL is times `beta`, and at
        the KL, each `[]`, `[B]` or None; at least one of the three is there."""
        grad_loss, grad_kl = upstreams
        if self.rows > 1:
            grad_loss, grad_kl = [g if g is None else g.contiguous() for g in upstreams]
        has_kl = grad_loss is not None or grad_kl is not None
        empty = allocator(self.device)
        grad_mu, grad_logvar = empty(*self._like, mu.dtype) if has_kl else grad_z, empty(*self._like, logvar.dtype)
        kind = pointer = None
        if type(beta) is float:
            kind = dtype_of(grad_z), dtype_of(noise), dtype_of(grad_loss), dtype_of(grad_kl)
        else:
            pointer, beta = pointer_and_value(beta)
        self._backward[has_kl](
            self.programs,
            (grad_z, mu, logvar, noise, grad_mu, grad_logvar, grad_loss, grad_kl, pointer),
            (beta, *self.numbers),
            kind,
        )
        return grad_mu, grad_logvar
