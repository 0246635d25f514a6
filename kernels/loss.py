"""The loss: reconstruction, KL and the prediction's gradient in one launch; its backward in another.

Every tensor is seen as `rows` rows: one row of everything, or one row a sample for `reduction="none"`. Each row has `programs`
programs. The first `recon_programs` of them stream the reconstruction, the others the KL, a tile at a time, and the last one
to arrive adds their partial sums up.
"""

from collections.abc import Hashable

import triton
import triton.language as tl

from . import likelihoods
from .direct import Launch, lies
from .launch import FINISH, THREADS, TRITON_DTYPE, Segment, options_of, tile_size
from .numerics import exp_and_expm1
from .operands import factor_of_term, row_bounds, scalar
from .prepared import Prepared, number_kinds
from .reduction import arrive_last, fold, ordered_sum


@triton.jit
def recon_tile(
    prediction, target, gradient, offsets, mask, factor, scale, target_scale, LIKELIHOOD: tl.constexpr, DTYPE: tl.constexpr
):
    """Negative log-likelihood of a tile; stores `factor` times the gradient unless `gradient` is None."""
    p = tl.load(prediction + offsets, mask=mask, other=0.0).to(DTYPE)
    t = tl.load(target + offsets, mask=mask, other=0).to(DTYPE) * target_scale
    nll, slope, _, _ = LIKELIHOOD(p, tl.log(scale), 1.0 / scale, t, scale, factor)
    if gradient is not None:
        tl.store(gradient + offsets, slope.to(gradient.dtype.element_ty), mask=mask)
    return tl.where(mask, nll, 0.0)


@triton.jit
def target_row(target, base, row, batch, features, SHARED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """The pointer from which a row's offsets, from `base` on, lead to its target: row % batch of one that samples share."""
    if SHARED:
        # The compiler sees that 16 divides the difference where it sees that of both.
        return target + (row_bounds(row % batch, features, ALIGNED, WIDE)[0] - base)
    else:
        return target


@triton.jit
def kl_tile(mu, logvar, offsets, mask, DTYPE: tl.constexpr):
    """KL(N(mu, exp(logvar)) || N(0, 1)) of a tile, in nats."""
    m = tl.load(mu + offsets, mask=mask, other=0.0).to(DTYPE)
    lv = tl.load(logvar + offsets, mask=mask, other=0.0).to(DTYPE)
    _, expm1 = exp_and_expm1(lv)
    return tl.where(mask, 0.5 * (m * m + (expm1 - lv)), 0.0)


@triton.jit
def kl_backward_tile(mu, logvar, grad_mu, grad_logvar, offsets, mask, factor, DTYPE: tl.constexpr):
    m = tl.load(mu + offsets, mask=mask, other=0.0).to(DTYPE)
    lv = tl.load(logvar + offsets, mask=mask, other=0.0).to(DTYPE)
    _, expm1 = exp_and_expm1(lv)
    tl.store(grad_mu + offsets, (factor * m).to(grad_mu.dtype.element_ty), mask=mask)
    tl.store(grad_logvar + offsets, (0.5 * factor * expm1).to(grad_logvar.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["features", "latents", "recon_programs", "programs", "batch"])
def loss_fwd_kernel(
    prediction, target, gradient, guess, mu, logvar, kl, partials, arrived, loss_out, recon_out, kl_out, beta, recon_weight,
    beta_value: tl.float64, recon_weight_value: tl.float64,
    scale_value: tl.float64, target_scale: tl.float64, recon_scale: tl.float64, kl_scale: tl.float64,
    features: tl.int64, latents: tl.int64, recon_programs: tl.int32, programs: tl.int32, batch: tl.int32,
    LIKELIHOOD: tl.constexpr, SHARED: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    LATENTS_ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    sums = tl.zeros([THREADS], dtype=DTYPE)
    if worker < recon_programs:
        factor = scalar(None, recon_scale, DTYPE)
        if gradient is not None:
            factor *= tl.load(guess + row)
        s = scalar(None, scale_value, DTYPE)
        ts = scalar(None, target_scale, DTYPE)
        base, end = row_bounds(row, features, ALIGNED, WIDE)
        target = target_row(target, base, row, batch, features, SHARED, ALIGNED, WIDE)
        for start in tl.range(worker * BLOCK, end, recon_programs * BLOCK):
            o = start + tl.arange(0, BLOCK)
            tile = recon_tile(prediction, target, gradient, base + o, o < end, factor, s, ts, LIKELIHOOD, DTYPE)
            sums += fold(tile, BLOCK, THREADS)
        if ALIGNED:
            if worker == 0:
                o = end + tl.arange(0, THREADS)  # more than are left, to fit the sums
                sums += recon_tile(prediction, target, gradient, base + o, o < features, factor, s, ts, LIKELIHOOD, DTYPE)
    elif mu is not None:
        base, end = row_bounds(row, latents, LATENTS_ALIGNED, WIDE)
        for start in tl.range((worker - recon_programs) * BLOCK, end, (programs - recon_programs) * BLOCK):
            o = start + tl.arange(0, BLOCK)
            sums += fold(kl_tile(mu, logvar, base + o, o < end, DTYPE), BLOCK, THREADS)
        if LATENTS_ALIGNED:
            if worker == recon_programs:
                o = end + tl.arange(0, THREADS)
                sums += kl_tile(mu, logvar, base + o, o < latents, DTYPE)
    if arrive_last(partials, arrived, row, programs, tl.sum(sums.to(tl.float64))):
        first = partials + row * programs
        recon_sum = ordered_sum(first, recon_programs, FINISH) * recon_scale
        if kl is None:
            kl_sum = ordered_sum(first + recon_programs, programs - recon_programs, FINISH) * kl_scale
        else:
            kl_sum = tl.load(kl + row).to(tl.float64)
        weighted = scalar(recon_weight, recon_weight_value, tl.float64) * recon_sum
        tl.store(loss_out + row, (weighted + scalar(beta, beta_value, tl.float64) * kl_sum).to(DTYPE))
        tl.store(recon_out + row, recon_sum.to(DTYPE))
        tl.store(kl_out + row, kl_sum.to(DTYPE))


@triton.jit(do_not_specialize=["features", "latents", "recon_programs", "programs", "batch"])
def loss_bwd_kernel(
    prediction, target, gradient, used, seen, mu, logvar, grad_mu, grad_logvar, grad_kl, grad_loss, grad_recon, grad_own_kl,
    beta, recon_weight, beta_value: tl.float64, recon_weight_value: tl.float64,
    scale_value: tl.float64, target_scale: tl.float64, recon_scale: tl.float64, kl_scale: tl.float64,
    features: tl.int64, latents: tl.int64, recon_programs: tl.int32, programs: tl.int32, batch: tl.int32,
    LIKELIHOOD: tl.constexpr, SHARED: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    LATENTS_ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // programs
    worker = tl.program_id(0) % programs
    if worker < recon_programs:
        if gradient is not None:
            factor = factor_of_term(grad_loss, grad_recon, row, recon_weight, recon_weight_value, DTYPE)
            if worker == 0:
                tl.store(seen + row, factor)
            wrong = True
            if used is not None:
                wrong = factor != tl.load(used + row)  # NaN is never what was guessed
            if wrong:
                factor *= scalar(None, recon_scale, DTYPE)
                s = scalar(None, scale_value, DTYPE)
                ts = scalar(None, target_scale, DTYPE)
                base, end = row_bounds(row, features, ALIGNED, WIDE)
                target = target_row(target, base, row, batch, features, SHARED, ALIGNED, WIDE)
                for start in tl.range(worker * BLOCK, end, recon_programs * BLOCK):
                    o = start + tl.arange(0, BLOCK)
                    recon_tile(prediction, target, gradient, base + o, o < end, factor, s, ts, LIKELIHOOD, DTYPE)
                if ALIGNED:
                    if worker == 0:
                        o = end + tl.arange(0, 16)
                        recon_tile(prediction, target, gradient, base + o, o < features, factor, s, ts, LIKELIHOOD, DTYPE)
    else:
        factor = factor_of_term(grad_loss, grad_own_kl, row, beta, beta_value, DTYPE)
        if grad_kl is not None:
            tl.store(grad_kl + row, factor)
        if mu is not None:
            factor *= scalar(None, kl_scale, DTYPE)
            base, end = row_bounds(row, latents, LATENTS_ALIGNED, WIDE)
            for start in tl.range((worker - recon_programs) * BLOCK, end, (programs - recon_programs) * BLOCK):
                o = start + tl.arange(0, BLOCK)
                kl_backward_tile(mu, logvar, grad_mu, grad_logvar, base + o, o < end, factor, DTYPE)
            if LATENTS_ALIGNED:
                if worker == recon_programs:
                    o = end + tl.arange(0, 16)
                    kl_backward_tile(mu, logvar, grad_mu, grad_logvar, base + o, o < latents, factor, DTYPE)


class Loss:
    """The launches of the loss for tensors of one kind, with all that follows from shapes and options.

    Args:
        tensors: prediction and target of one shape `[B, ...]` and one dense layout; and mu and logvar, likewise, or a KL that
            is reduced already, or neither.
        likelihood: the name of its device function; `scale`: of those that have a fixed one.
        scales: the factors that turn the sums of reconstruction and KL into the reduction asked for.
        per_sample: one result a sample, `[B]`, instead of one, `[]`. Then the target may have a fraction of the rows of the
            prediction, which has several samples of each datum, one of every datum in turn: row r of it is held against row
            r % B of the target. There are no mu and logvar then.
        dtype: that of results and arithmetic.
    """

    __slots__ = (
        "_backward", "_backwards", "_forward", "_forwards", "_like_latents", "_like_recon", "_names", "_result", "device",
        "latents", "recon", "rows", "values",
    )  # fmt: skip

    def __init__(self, tensors, *, likelihood, scale, target_scale, scales, per_sample, dtype) -> None:
        recon_x, x, *rest = tensors
        mu = rest[0] if len(rest) == 2 else None
        self._names = "prediction", "target", *{0: (), 1: ("kl",), 2: ("mu", "logvar")}[len(rest)]
        self.rows = recon_x.shape[0] if per_sample else 1
        self.device, shape = recon_x.device, (self.rows,) if per_sample else ()
        # What tensors are made like: shapes, strides and, of results, their dtype.
        self._result = shape, (1,) * len(shape), dtype
        self._like_recon, self._like_latents = lies(recon_x), mu if mu is None else lies(mu)
        tile, options = tile_size(recon_x, x), options_of(recon_x.device)
        recon, latents = Segment.of(recon_x, self.rows, tile), Segment.of(mu, self.rows, tile)
        self.recon, self.latents = recon.programs, latents.programs
        batch = x.shape[0] if per_sample and x.shape[0] != self.rows else 0
        self.values = {
            "scale_value": scale, "target_scale": target_scale, "recon_scale": scales[0], "kl_scale": scales[1],
            "features": recon.columns, "latents": latents.columns, "batch": batch,
        }  # fmt: skip
        constants = {
            "LIKELIHOOD": likelihoods.fixed_gaussian if likelihood == "gaussian" else getattr(likelihoods, likelihood),
            "SHARED": batch != 0, "DTYPE": TRITON_DTYPE[dtype], "ALIGNED": recon.aligned,
            "LATENTS_ALIGNED": latents.aligned, "WIDE": recon.wide or latents.wide, "BLOCK": tile,
        }  # fmt: skip
        self._backward = Launch(loss_bwd_kernel, self.device, constants, options)
        self._forward = Launch(loss_fwd_kernel, self.device, constants | {"THREADS": THREADS, "FINISH": FINISH}, options)
        self._forwards: dict[Hashable, Prepared] = {}  # by kind
        self._backwards: dict[Hashable, Prepared] = {}

    def forward(self, tensors, beta, recon_weight, guess, stateless=False):
        """Loss, reconstruction and KL, and the gradient of the reconstruction.

        - `beta`, `recon_weight`: floats, or 0-d tensors on the device. `guess`, `[B]` or `[1]`, of `dtype`: the upstream factor
          to store the gradient with; None: no gradient is wanted.
        - `stateless`: keep nothing for later calls.

        Returns `(loss, recon, kl, gradient)`: three tensors `[]` or `[B]`, loss and KL None where there are no latents, and
        `guess * d recon / d recon_x` or None.
        """
        kind: Hashable = guess is None
        if type(beta) is not float or type(recon_weight) is not float:
            kind = kind, *number_kinds(beta, recon_weight)
        prepared = self._forwards.get(kind) or self._prepare_forward(kind, tensors, beta, recon_weight, guess)
        if stateless:
            return prepared.by_parts(*tensors, beta, recon_weight, guess, stateless=True)
        return prepared.run(*tensors, beta, recon_weight, guess)

    def _prepare_forward(self, kind, tensors, *factors) -> Prepared:
        names, programs, result = self._names, self.recon + self.latents, self._result
        makes = {"loss_out": result, "recon_out": result, "kl_out": result}
        if factors[-1] is not None:
            makes["gradient"] = *self._like_recon, tensors[0].dtype
        has_loss = len(names) > 2
        made = self._forwards[kind] = Prepared(
            self._forward, kind, self.rows * programs,
            takes=dict(zip((*names, "beta", "recon_weight", "guess"), (*tensors, *factors), strict=True)), makes=makes,
            values=self.values | {"recon_programs": self.recon, "programs": programs},
            gives=(
                "loss_out" if has_loss else None, "recon_out", "kl_out" if has_loss else None,
                "gradient" if "gradient" in makes else None,
            ),
            rows=self.rows, sums=self.rows * programs,
        )  # fmt: skip
        return made

    def backward(self, tensors, beta, recon_weight, upstreams, gradient, used, wants_recon, wants_rest):
        """Gradients by the prediction, if `wants_recon`, and by mu and logvar, or the KL, if `wants_rest`.

        `upstreams`: the gradients that arrived at loss, reconstruction and KL, each `[]`, `[B]` or None; one that a wanted
        gradient needs is there. `gradient` is what forward stored with the factor `used`, or None: corrected where it lies, or
        computed anew.

        Returns a gradient or None for each tensor, and behind them `seen`, `[B]` or `[1]`, the upstream factor of the
        reconstruction, for the next forward to guess.
        """
        if self.rows > 1:
            upstreams = [g if g is None else g.contiguous() for g in upstreams]
        of_loss, of_recon, of_kl = upstreams
        kind: Hashable = (
            wants_recon, wants_rest, used if used is None else used.dtype, of_loss if of_loss is None else of_loss.dtype,
            of_recon if of_recon is None else of_recon.dtype, of_kl if of_kl is None else of_kl.dtype,
        )  # fmt: skip
        if type(beta) is not float or type(recon_weight) is not float:
            kind = kind, *number_kinds(beta, recon_weight)
        prepared = self._backwards.get(kind)
        if prepared is None:
            prepared = self._prepare_backward(
                kind, tensors, wants_recon, wants_rest, beta, recon_weight, *upstreams, gradient, used
            )
        return prepared.run(*tensors, beta, recon_weight, of_loss, of_recon, of_kl, gradient, used)

    def _prepare_backward(self, kind, tensors, wants_recon, wants_rest, *factors) -> Prepared:
        names = *self._names, "beta", "recon_weight", "grad_loss", "grad_recon", "grad_own_kl", "gradient", "used"
        takes = dict(zip(names, (*tensors, *factors), strict=True))
        makes, recon, latents = {}, 0, 0
        if wants_recon:
            recon, makes["seen"] = self.recon, ((self.rows,), (1,), self._result[2])
            if takes["gradient"] is None:
                makes["gradient"] = *self._like_recon, tensors[0].dtype
        else:
            takes["gradient"] = None
        if wants_rest and "kl" in takes:
            latents, makes["grad_kl"] = 1, self._result
        elif wants_rest:
            latents = self.latents
            makes |= {f"grad_{name}": (*self._like_latents, takes[name].dtype) for name in ("mu", "logvar")}
        else:
            takes |= dict.fromkeys(self._names[2:])
        made = self._backwards[kind] = Prepared(
            self._backward, kind, self.rows * (recon + latents), takes=takes, makes=makes,
            values=self.values | {"recon_programs": recon, "programs": recon + latents},
            gives=(
                "gradient" if wants_recon else None, None,
                *(f"grad_{name}" if wants_rest else None for name in self._names[2:]), "seen" if wants_recon else None,
            ),
        )  # fmt: skip
        return made
