"""Sample and KL of N(mu, exp(logvar)) from N(0, I): the kernels of most calls."""

from collections.abc import Hashable

import torch
import triton
import triton.language as tl

from .direct import Launch, allocator, lies
from .latents import backward, forward
from .launch import FINISH, THREADS, TRITON_DTYPE, Segment, options_of, tile_size
from .posteriors import logvar as logvar_posterior
from .prepared import Prepared, number_kinds


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


def draw_noise(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """The seed of a stream of normals: a 0-d int64 tensor on the device, of 63 bits from Torch's generator, without a sync."""
    return allocator(like.device)((), (), torch.int64).random_(generator=generator)


class Sample:
    """The launches of a sample and its KL for latents of one kind, with all that follows from shapes and options.

    `mu` and `logvar` are of one shape `[B, ...]` and dense layout. The KL is times `kl_scale`, `[]` or `[B]`.
    """

    __slots__ = (
        "_backward", "_backwards", "_forward", "_forwards", "_like", "_result", "_total", "_totals", "device", "programs",
        "rows", "values", "z_dtype",
    )  # fmt: skip

    def __init__(self, mu, logvar, *, kl_scale, per_sample, dtype) -> None:
        self.rows = mu.shape[0] if per_sample else 1
        self.device, shape = mu.device, (self.rows,) if per_sample else ()
        # What tensors are made like: shapes, strides and, of the KL, its dtype.
        self._result, self._like = (shape, (1,) * len(shape), dtype), lies(mu)
        self.z_dtype = torch.promote_types(mu.dtype, logvar.dtype)
        tile, options = tile_size(mu, logvar), options_of(mu.device)
        segment = Segment.of(mu, self.rows, tile)
        self.programs = self.rows * segment.programs
        self.values = {"kl_scale": kl_scale, "latents": segment.columns, "programs": segment.programs}
        constants = {"DTYPE": TRITON_DTYPE[dtype], "ALIGNED": segment.aligned, "WIDE": segment.wide, "BLOCK": tile}
        summed = constants | {"THREADS": THREADS, "FINISH": FINISH}
        self._forward = Launch(sample_fwd_kernel, self.device, summed, options)
        self._total = Launch(total_kernel, self.device, summed, options)
        self._backward = [
            Launch(sample_bwd_kernel, self.device, {"HAS_KL": has_kl} | constants, options) for has_kl in (False, True)
        ]
        self._forwards: dict[Hashable, Prepared] = {}  # by kind
        self._totals: dict[Hashable, Prepared] = {}
        self._backwards: dict[Hashable, Prepared] = {}

    def forward(self, mu, logvar, noise, wants_kl, stateless=False):
        """z = mu + exp(logvar / 2) * noise, unless `noise` is None, and the KL if it is wanted: `(z, kl)`.

        `noise`: of the shape and layout of `mu`, or a seed from `draw_noise`. `stateless`: keep nothing for later calls.
        """
        kind = wants_kl, noise if noise is None else noise.dtype
        prepared = self._forwards.get(kind) or self._prepare_forward(kind, mu, logvar, noise)
        return prepared.by_parts(mu, logvar, noise, stateless=True) if stateless else prepared.run(mu, logvar, noise)

    def _prepare_forward(self, kind, mu, logvar, noise) -> Prepared:
        wants_kl, makes = kind[0], {}
        if noise is not None:
            makes["z"] = *self._like, self.z_dtype
        if wants_kl:
            makes["kl_out"] = self._result
        made = self._forwards[kind] = Prepared(
            self._forward, kind, self.programs, takes={"mu": mu, "logvar": logvar, "noise": noise}, makes=makes,
            values=self.values, gives=[name if name in makes else None for name in ("z", "kl_out")], rows=self.rows,
            sums=self.programs if wants_kl else 0,
        )  # fmt: skip
        return made

    def total(self, mu, logvar, recon, beta, recon_weight, stateless=False):
        """The KL, and the loss that it makes of a reconstruction, `[]` or `[B]`: `(kl, recon_weight * recon + beta * kl)`."""
        kind = None if type(beta) is type(recon_weight) is float else number_kinds(beta, recon_weight)
        given = mu, logvar, recon, beta, recon_weight
        prepared = self._totals.get(kind)
        if prepared is None:
            takes = dict(zip(("mu", "logvar", "recon", "beta", "recon_weight"), given, strict=True))
            prepared = self._totals[kind] = Prepared(
                self._total, kind, self.programs, takes=takes, makes={"kl_out": self._result, "loss_out": self._result},
                values=self.values, gives=("kl_out", "loss_out"), rows=self.rows, sums=self.programs,
            )  # fmt: skip
        return prepared.by_parts(*given, stateless=True) if stateless else prepared.run(*given)

    def backward(self, grad_z, mu, logvar, noise, beta, upstreams):
        """Gradients by `mu` and `logvar`: `grad_z` arrived at z, `upstreams` at a loss, in which the KL is times `beta`, and at
        the KL, each `[]`, `[B]` or None; at least one of the three is there."""
        of_loss, of_kl = upstreams
        if self.rows > 1:
            of_loss, of_kl = [g if g is None else g.contiguous() for g in upstreams]
        kind = (
            noise if noise is None else noise.dtype, grad_z if grad_z is None else grad_z.dtype,
            of_loss if of_loss is None else of_loss.dtype, of_kl if of_kl is None else of_kl.dtype,
            None if type(beta) is float else beta.dtype,
        )  # fmt: skip
        prepared = self._backwards.get(kind) or self._prepare_backward(kind, grad_z, mu, logvar, noise, beta, of_loss, of_kl)
        return prepared.run(grad_z, mu, logvar, noise, beta, of_loss, of_kl)

    def _prepare_backward(self, kind, *given) -> Prepared:
        names = "grad_z", "mu", "logvar", "noise", "beta", "grad_loss", "grad_kl"
        takes = dict(zip(names, given, strict=True))
        has_kl = not takes["grad_loss"] is takes["grad_kl"] is None
        makes = {"grad_logvar": (*self._like, takes["logvar"].dtype)}
        if has_kl:
            makes["grad_mu"] = *self._like, takes["mu"].dtype
        made = self._backwards[kind] = Prepared(
            self._backward[has_kl], kind, self.programs, takes=takes, makes=makes, values=self.values,
            # What arrived at z is the gradient by mu, if nothing comes on top.
            gives=("grad_mu" if has_kl else "grad_z", "grad_logvar"),
        )  # fmt: skip
        return made
