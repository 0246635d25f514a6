"""Compiles kernels ahead of time, in exactly the specialization that their launchers ask for. Needs no GPU.

The launchers run on CPU tensors with Triton's `JITFunction.run` replaced by a recorder; what they would have launched is
then compiled for each target with Triton's own argument binder.
"""

from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastelbo import kernels
from fastelbo.kernels.launch import THREADS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple
    options: dict


def record(call) -> Launch:
    """The one launch that `call()` asks for."""
    (launch,) = record_all(call)
    return launch


def record_all(call) -> list[Launch]:
    """The launches that `call()` asks for."""
    launches, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: launches.append(Launch(self, args, options))
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def specialization(launch: Launch) -> str:
    """What Triton tells the compilations of a kernel apart by."""
    _, found, options = _bind("sm_90", launch)
    return f"{launch.kernel.__name__} {found} {options}"


def compile_for(target: str, launch: Launch):
    kernel, _, options = launch = _on(target, launch)
    backend = make_backend(TARGETS[target])
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, *_bind(target, launch))
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=parsed.__dict__)


def _on(target: str, launch: Launch) -> Launch:
    """The launch as it would be on a machine with that target's warps."""
    options = launch.options | {"num_warps": THREADS // TARGETS[target].warp_size}
    if TARGETS[target].backend == "hip":
        options.pop("maxnreg", None)
    return launch._replace(options=options)


def _bind(target: str, launch: Launch):
    kernel, args, options = launch
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS[target]))(*args, **options)


def loss_forward(
    likelihood, prediction, target, latent=torch.float32, *, features=784, per_sample=False, gradient=True, kl=False, samples=1
):
    """`samples`: of each datum, in so many times the target's rows."""
    recon_x, x, mu, logvar = _tensors(prediction, target, latent, features, samples)
    rows = len(recon_x) if per_sample else 1
    dtype = torch.float64 if prediction == torch.float64 else torch.float32
    guess = torch.ones(rows, dtype=dtype) if gradient else None
    tensors = recon_x, x, *((torch.zeros((rows,) if per_sample else ()),) if kl else (mu, logvar))
    launches = kernels.Loss(tensors, **_settings(likelihood, per_sample, dtype))
    return record(lambda: launches.forward(tensors, 1.0, 1.0, guess))


def loss_backward(
    likelihood,
    prediction,
    target,
    latent=torch.float32,
    *,
    per_sample=False,
    retained=False,
    recon=True,
    latents=True,
    kl=False,
    samples=1,
):
    recon_x, x, mu, logvar = _tensors(prediction, target, latent, samples=samples)
    dtype = torch.float64 if prediction == torch.float64 else torch.float32
    upstream = torch.ones((len(recon_x),) if per_sample else (), dtype=dtype)
    stored = (None, None) if retained or not recon else (torch.empty_like(recon_x), upstream.reshape(-1))
    tensors = recon_x, x
    if latents or kl:
        tensors = *tensors, *((mu, logvar) if latents else (torch.zeros_like(upstream),))
    launches = kernels.Loss(tensors, **_settings(likelihood, per_sample, dtype))
    return record(lambda: launches.backward(tensors, 1.0, 1.0, (upstream, None, None), *stored, recon, latents or kl))


def reconstruction(
    likelihood,
    *parameters,
    target=torch.float32,
    links=(None, None),
    weight=None,
    shapes=(),
    per_sample=False,
    features=784,
    guess=None,
):
    """The kernel of several parameters, of these dtypes: forward, or backward if forward's factor was `guess`.

    `shapes`: those of parameters that are smaller than the target. `weight`: a dtype, or a tensor that broadcasts.
    """
    shapes = [shapes[i - 1] if i and i <= len(shapes) else (128, features) for i in range(len(parameters))]
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, parameters, strict=True)]
    x = torch.zeros(128, features, dtype=target)
    if isinstance(weight, torch.dtype):
        weight = torch.zeros_like(x, dtype=weight)
    dtype = torch.float64 if torch.float64 in parameters else torch.float32
    rows, wants = 128 if per_sample else 1, (True,) * len(tensors)
    family = kernels.Family(likelihood, links=links)
    launches = kernels.Reconstruction(family=family, per_sample=per_sample, dtype=dtype, device=x.device)
    factor = torch.ones(rows, dtype=dtype)
    if guess is None:
        return record(lambda: launches.forward(tensors, x, weight, 1.0, factor, wants))
    gradients = [torch.empty_like(t) if t.shape == x.shape else None for t in tensors]
    return record(lambda: launches.backward(tensors, x, weight, 1.0, factor, gradients, guess, wants))


def sparse(
    likelihood, *parameters, values=torch.float32, index=torch.int64, rows=128, features=784, count=128, links=(None, None),
    weight=None, shapes=(), per_sample=False, guess=None,
):  # fmt: skip
    """Both kernels of a target with `count` nonzeros: of all as zeros, and of these; the arguments are those of
    `reconstruction`."""
    shapes = [shapes[i - 1] if i and i <= len(shapes) else (rows, features) for i in range(len(parameters))]
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, parameters, strict=True)]
    x = torch.zeros(rows + 1, dtype=index), torch.zeros(count, dtype=index), torch.zeros(count, dtype=values)
    dtype = torch.float64 if torch.float64 in parameters else torch.float32
    at_zero = f"{likelihood.removesuffix('_weighted')}_at_zero"
    launches = kernels.SparseReconstruction(
        family=kernels.Family(likelihood, at_zero, links), per_sample=per_sample, dtype=dtype, device=x[0].device
    )
    factor, wants = torch.ones(rows if per_sample else 1, dtype=dtype), (True,) * len(tensors)
    if guess is None:
        return record_all(lambda: launches.forward(tensors, x, weight, 1.0, factor, wants))
    gradients = [torch.empty_like(t) if t.shape == tensors[0].shape else None for t in tensors]
    return record_all(lambda: launches.backward(tensors, x, weight, 1.0, factor, gradients, guess, wants))


def of_rows(
    likelihood, *parameters, target=torch.float32, dispersion=None, weight=None, shapes=(), per_sample=False, features=784,
    backward=False, at_zero=None, library=torch.float32,
):  # fmt: skip
    """The kernels of a mean by the softmax of a row, behind whose parameters comes the library: the two of forward, or the one
    of backward; with `at_zero`, a device function, those of a sparse target, one more of each. See `reconstruction`."""
    shapes = [shapes[i - 1] if i and i <= len(shapes) else (128, features) for i in range(len(parameters))]
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, parameters, strict=True)]
    tensors.append(torch.ones(128, 1, dtype=library))
    x = torch.zeros(128, features, dtype=target)
    if at_zero is not None:
        x = torch.zeros(129, dtype=torch.int64), torch.zeros(128, dtype=torch.int64), torch.zeros(128, dtype=target)
    dtype = torch.float64 if torch.float64 in parameters else torch.float32
    family, wants = kernels.Family(likelihood, at_zero, ("softmax", dispersion)), (True,) * len(tensors)
    launches = kernels.RowReconstruction(family=family, per_sample=per_sample, dtype=dtype, device=tensors[0].device)
    if not backward:
        return record_all(lambda: launches.forward(tensors, x, weight, 1.0, wants))
    upstream, sums = torch.ones(128 if per_sample else 1, dtype=dtype), [None, torch.zeros(5, 128, dtype=torch.float64)]
    return record_all(lambda: launches.backward(tensors, x, weight, 1.0, upstream, sums, wants))


def categorical(*shape, dense=False, dtype=torch.float32, per_sample=False):
    """Logits `[B, K, ...]`, against labels or dense targets."""
    logits, inner = torch.zeros(shape, dtype=dtype), torch.Size(shape[2:]).numel()
    x = torch.zeros(shape) if dense else torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    options = {"classes": shape[1], "inner": inner, "ignore_index": -100, "target_scale": 1.0}
    return _positions(kernels.Categorical, logits, x, per_sample, options)


def sparse_multinomial(
    *shape, dtype=torch.float32, values=torch.float32, index=torch.int64, count=128, weight=None, per_sample=False, guess=None
):
    """Logits `[B, G]`, against `count` nonzeros: forward, or backward if forward's factor was `guess`. `weight`: a dtype."""
    logits = torch.zeros(shape, dtype=dtype)
    x = torch.zeros(shape[0] + 1, dtype=index), torch.zeros(count, dtype=index), torch.zeros(count, dtype=values)
    options = {"classes": shape[1], "inner": 1, "ignore_index": 0, "target_scale": 1.0}
    weight = None if weight is None else torch.ones(shape[0], dtype=weight)
    return _positions(kernels.SparseMultinomial, logits, x, per_sample, options, weight, guess)


def mixture(channels, components, *place, dtype=torch.float32, per_sample=False, interval=False):
    """Parameters `[B, P, *place]` of so many components, of images in [-1, 1], or in another `interval`."""
    count = 10 * components if channels == 3 else components * (1 + 2 * channels)
    parameters, x = torch.zeros(8, count, *place, dtype=dtype), torch.zeros(8, channels, *place)
    options = {"levels": 256, "inner": torch.Size(place).numel(), "channels": channels}
    if interval:
        options |= {"target_scale": 2.0, "target_shift": -1.0}
    return _positions(kernels.Mixture, parameters, x, per_sample, options)


def _positions(kind, prediction, x, per_sample, options, weight=None, guess=None):
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    factor = torch.ones(len(prediction) if per_sample else 1, dtype=dtype)
    launches = kind(per_sample=per_sample, dtype=dtype, device=prediction.device, **options)
    if guess is None:
        return record(lambda: launches.forward(prediction, x, weight, 1.0, factor))
    return record(lambda: launches.backward(prediction, x, weight, 1.0, factor, torch.empty_like(prediction), guess))


def divergence_forward(latent, *, posterior="logvar", prior=None, kind="sum", weight=None):
    launches, mu, noise, priors = _divergence(latent, posterior, prior, kind, weight)
    return record(lambda: launches.forward(mu, mu.clone(), noise, *priors, weight))


def divergence_backward(latent, *, posterior="logvar", prior=None, weight=None):
    launches, mu, noise, priors = _divergence(latent, posterior, prior, "sum", weight)
    upstream = torch.ones((), dtype=torch.promote_types(latent, torch.float32))
    upstreams, wants = (mu.clone(), upstream, None), [prior is not None] * 2
    return record(lambda: launches.backward(*upstreams, mu, mu.clone(), noise, *priors, weight, wants))


def divergence_columns(latent, *, weight=None):
    launches, mu, _, priors = _divergence(latent, "logvar", None, "column", weight)
    return record(lambda: launches.columns(mu, mu.clone(), *priors, weight, False))


def _divergence(latent, posterior, prior, kind, weight):
    """`weight` broadcasts to latents of the shape `[128, 64]`."""
    mu, noise, dtype = _latents(latent, True, 64)
    priors = (None, None) if prior is None else (mu.clone(), mu.clone())
    launches = kernels.Divergence(
        mu, mu, *priors, weight, posterior=posterior, clamp=None, prior=prior, kind=kind, floor=None,
        free_bits=None, shares=(1.0, 1.0), kl_scale=1.0,
        dtype=dtype,
    )  # fmt: skip
    return launches, mu, noise, priors


def classes_forward(*shape, dtype=torch.float32, prior=True, unimix=0.01, kind="sum", floor=None):
    """The KL of categorical latents by logits `[..., K]`, from a prior's or from the uniform distribution."""
    launches, logits, prior = _classes(shape, dtype, prior, unimix, kind, floor)
    return record(lambda: launches.forward(logits, prior))


def classes_backward(*shape, dtype=torch.float32, prior=True, unimix=0.01, kind="sum", floor=None):
    launches, logits, prior = _classes(shape, dtype, prior, unimix, kind, floor)
    size = {"sum": (), "row": shape[:1], "column": shape[1:-1], "element": shape[:-1]}[kind]
    upstream = torch.ones(size, dtype=torch.promote_types(dtype, torch.float32))
    weighted = None if floor is None else upstream.clone()
    return record(lambda: launches.backward(logits, prior, upstream, weighted, (True, prior is not None)))


def _classes(shape, dtype, has_prior, unimix, kind, floor):
    logits = torch.zeros(shape, dtype=dtype)
    prior = logits.clone() if has_prior else None
    launches = kernels.CategoricalDivergence(
        logits, prior, unimix=unimix, kind=kind, floor=floor, shares=(1.0, 1.0), kl_scale=1.0,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    return launches, logits, prior


def sample_forward(latent, *, seeded=True, per_sample=False, features=20, wants_kl=True):
    mu, noise, dtype = _latents(latent, seeded, features)
    launches = kernels.Sample(mu, mu, kl_scale=1.0, per_sample=per_sample, dtype=dtype)
    return record(lambda: launches.forward(mu, mu.clone(), noise, wants_kl))


def total(latent, *, per_sample=False, features=20):
    mu, _, dtype = _latents(latent, True, features)
    recon = torch.ones(len(mu) if per_sample else (), dtype=dtype)
    launches = kernels.Sample(mu, mu, kl_scale=1.0, per_sample=per_sample, dtype=dtype)
    return record(lambda: launches.total(mu, mu.clone(), recon, 0.5, 2.0))


def sample_backward(latent, *, seeded=True):
    mu, noise, dtype = _latents(latent, seeded)
    upstreams = None, torch.ones((), dtype=dtype)
    launches = kernels.Sample(mu, mu, kl_scale=1.0, per_sample=False, dtype=dtype)
    return record(lambda: launches.backward(mu.clone(), mu, mu.clone(), noise, 1.0, upstreams))


def log_ratio_forward(latent, *, posterior="logvar", prior=None, features=64, wants_logs=True):
    mu, noise, dtype = _latents(latent, True, features)
    priors = (None, None) if prior is None else (mu.clone(), mu.clone())
    options = {"samples": 8, "posterior": posterior, "clamp": None, "prior": prior, "dtype": dtype, "wants_logs": wants_logs}
    return record(lambda: kernels.log_ratio_forward(mu, mu.clone(), noise, *priors, **options))


def log_ratio_backward(latent, *, posterior="logvar", prior=None, features=64, logs=True, held=True):
    """`logs`: whether gradients arrived at the log densities too; `held`: with a number that the path is times."""
    mu, noise, dtype = _latents(latent, True, features)
    priors = (None, None) if prior is None else (mu.clone(), mu.clone())
    each = torch.ones(8 * len(mu), dtype=dtype)
    options = {
        "samples": 8, "held": held, "path_scale": each if held else None, "posterior": posterior, "clamp": None,
        "prior": prior, "dtype": dtype,
    }  # fmt: skip
    upstreams = mu.repeat(8, 1), *((each, each.clone()) if logs else (None, None))
    wants = [prior is not None] * 2
    return record(lambda: kernels.log_ratio_backward(*upstreams, mu, mu.clone(), noise, *priors, wants, **options))


def _tensors(prediction, target, latent, features=784, samples=1):
    recon_x, x = torch.zeros(128, features, dtype=prediction), torch.zeros(128 // samples, features, dtype=target)
    return recon_x, x, *(torch.zeros(128, 20, dtype=latent) for _ in range(2))


def _latents(latent, seeded, features=20):
    mu = torch.zeros(128, features, dtype=latent)
    noise = torch.zeros((), dtype=torch.int64) if seeded else torch.zeros_like(mu)
    return mu, noise, torch.float64 if latent == torch.float64 else torch.float32


def _settings(likelihood, per_sample, dtype):
    return {
        "likelihood": likelihood, "scale": 1.0, "target_scale": 1.0, "scales": (1.0, 1.0), "per_sample": per_sample,
        "dtype": dtype,
    }  # fmt: skip
