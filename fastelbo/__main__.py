"""`python -m fastelbo`: what a bug report should say of a machine, whether fastelbo is right on it, and what its calls cost.

It needs nothing but torch. What cannot be found out is reported with the reason.
"""

import functools
import importlib
import importlib.util
import os
import platform
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils import collect_env

import fastelbo

from .engine.backend import VARIABLE, choose
from .likelihoods import BY_NAME

# Of the self-test, in float32: far above its rounding errors, far below what a mistake makes.
TOLERANCE = 1e-5

# More than one program on a GPU, and no multiple of 16 elements, so that the kernels' tails run as well.
SHAPE, LATENT = (33, 785), (33, 21)

# So small that a call's time is what happens on the host around the arithmetic.
SMALL, SMALL_LATENT = (2, 16), (2, 4)

BETA = 0.5
COLUMNS = ("loss", "recon", "kl", "z", "d recon_x", "d mu", "d logvar")

Errors = dict[str, float]

# Those that `reference.elbo_loss` has, too.
PLAIN = [name for name, likelihood in BY_NAME.items() if likelihood.is_plain(1)]


def main() -> int:
    device, no_gpu = find_device()
    for name, text in environment(device, no_gpu):
        print(f"{name:<18}{text}", flush=True)  # before what may bring the process down
    print("\nSelf-test in float32: largest error over largest magnitude, against fastelbo.reference in float64")
    print(f"{'':<33}" + "".join(f"{name:>10}" for name in COLUMNS))
    good = True
    for subject, passed, text in self_test(device):
        print(f"{subject:<33}{text}", flush=True)
        good = good and passed
    print(f"self-test {'ok' if good else 'FAILED'}: each error must be at most {TOLERANCE:g}")
    if good:
        print("\n" + attempt(lambda: "\n".join(launch_cost(device))))
    return 0 if good else 1


def attempt(find: Callable[[], str]) -> str:
    """What `find` returns and the warnings that it gave, or why it failed: a report must not die of what it is to report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            text = find()
        except Exception as error:
            text = f"not known: {why(error)}"
    return "; ".join([text, *dict.fromkeys(one_line(warning.message) for warning in caught)])  # each once


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(message: object) -> str:
    return textwrap.shorten(str(message), 400)


def find_device() -> tuple[torch.device, str]:
    """The current GPU, or the CPU and why no GPU."""
    gpu: list[torch.device] = []

    def look() -> str:
        if torch.cuda.is_available():
            gpu.append(torch.device("cuda", torch.cuda.current_device()))
        return "no CUDA or ROCm GPU"

    no_gpu = attempt(look)
    return (gpu[0], "") if gpu else (torch.device("cpu"), f"; {no_gpu}")


def environment(device: torch.device, no_gpu: str) -> Iterator[tuple[str, str]]:
    describe = describe_gpu if device.type == "cuda" else describe_cpu
    yield "fastelbo", fastelbo.__version__
    yield "torch", torch.__version__
    yield "triton", attempt(find_triton)
    yield "Python", f"{platform.python_version()}, {platform.python_implementation()}"
    yield "platform", attempt(platform.platform)
    yield "CUDA or ROCm", attempt(find_runtime)
    yield "driver", attempt(find_driver)
    yield "device", attempt(lambda: describe(device)) + no_gpu
    for name in (VARIABLE, "TRITON_INTERPRET"):
        yield name, os.environ.get(name) or "not set"
    yield "backend", attempt(lambda: "{0.backend.__name__}: {0.reason}".format(choose(device)))


def find_triton() -> str:
    # By import: it may fail where the package is there, and builds for other systems are distributed under other names.
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return importlib.import_module("triton").__version__


def find_runtime() -> str:
    for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)):
        if version:
            return f"{name} {version}"
    return "neither: this torch is built for CPUs"


def find_driver() -> str:
    if torch.version.hip:
        return "not known: torch can tell NVIDIA's alone"
    return f"NVIDIA {version}" if (version := collect_env.get_nvidia_driver_version(collect_env.run)) else "none found"


def describe_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    return (
        f"{device}, one of {torch.cuda.device_count()}: {properties.name},"
        f" {properties.gcnArchName if torch.version.hip else capability}, {total:.1f} GiB of memory, {free:.1f} free"
    )


def describe_cpu(device: torch.device) -> str:
    name = f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device}: {name}, {torch.get_num_threads()} threads"


def self_test(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """Each subject, whether it passed, and its errors or why there are none."""
    cases = [(f"loss {name}", functools.partial(loss_errors, device, name)) for name in PLAIN]
    said: set[str] = set()
    for subject, errors_of in [*cases, ("sample_kl", functools.partial(sample_errors, device))]:
        try:
            errors = errors_of()
        except Exception as error:
            reason = why(error)
            yield subject, False, f"  FAILED: {'the same' if reason in said else reason}"
            said.add(reason)
        else:
            passed = all(error <= TOLERANCE for error in errors.values())  # NaN is not
            cells = (f"{errors[name]:>10.1e}" if name in errors else f"{'-':>10}" for name in COLUMNS)
            yield subject, passed, f"{''.join(cells)}  {'ok' if passed else 'FAILED'}"


def loss_errors(device: torch.device, likelihood: str) -> Errors:
    recon_x, x, mu, logvar = inputs(likelihood, SHAPE, LATENT)
    exact = [t.double().requires_grad_(i != 1) for i, t in enumerate((recon_x, x, mu, logvar))]
    truth = fastelbo.reference.elbo_loss(*exact, BETA, likelihood=likelihood)
    true_gradients = torch.autograd.grad(truth[0], (exact[0], *exact[2:]))
    recon_x, x, mu, logvar = (t.to(device).requires_grad_(i != 1) for i, t in enumerate((recon_x, x, mu, logvar)))
    found = []
    # Forward stores the gradient for the upstream factor of the last backward: right the second time, wrong the third.
    for upstream in (1.0, 1.0, 3.0):
        terms = fastelbo.loss(recon_x, x, mu, logvar, BETA, likelihood=likelihood)
        gradients = torch.autograd.grad(terms.loss * upstream, (recon_x, mu, logvar))
        found.append([relative(value, true) for value, true in zip(terms, truth, strict=True)])
        found[-1] += [relative(value, upstream * true) for value, true in zip(gradients, true_gradients, strict=True)]
    return worst(found, "loss", "recon", "kl", "d recon_x", "d mu", "d logvar")


def sample_errors(device: torch.device) -> Errors:
    _, _, mu, logvar = inputs("mse", SHAPE, LATENT)
    arrived = mu.flip(0)  # as good as any gradient at z
    exact_mu, exact_logvar = mu.double().requires_grad_(), logvar.double().requires_grad_()
    mu, logvar = mu.to(device).requires_grad_(), logvar.to(device).requires_grad_()
    generator = torch.Generator(device)
    # One seed gives one noise, which is what a sample of the standard normal is.
    zeros = torch.zeros(LATENT, dtype=torch.float32, device=device)
    noise = fastelbo.sample_kl(zeros, zeros, generator=generator.manual_seed(0)).z.cpu().double()
    if not (abs(noise.mean()) < 0.2 and 0.8 < noise.std() < 1.2):  # five standard deviations
        raise ArithmeticError(f"the noise has mean {noise.mean():.2g} and standard deviation {noise.std():.2g}")
    z, kl = fastelbo.sample_kl(mu, logvar, generator=generator.manual_seed(0))
    gradients = torch.autograd.grad((z, kl), (mu, logvar), (arrived.to(device), torch.ones_like(kl)))
    true_z = exact_mu + torch.exp(0.5 * exact_logvar) * noise
    _, _, true_kl = fastelbo.reference.elbo_loss(noise, noise, exact_mu, exact_logvar, likelihood="mse")
    true_gradients = torch.autograd.grad((true_z * arrived).sum() + true_kl, (exact_mu, exact_logvar))
    pairs = zip((z, kl, *gradients), (true_z, true_kl, *true_gradients), strict=True)
    return worst([[relative(value, true) for value, true in pairs]], "z", "kl", "d mu", "d logvar")


def inputs(likelihood: str, shape: tuple[int, ...], latent: tuple[int, ...]) -> list[Tensor]:
    """`recon_x`, `x`, `mu` and `logvar`, on the CPU in float32."""
    generator = torch.Generator().manual_seed(0)
    recon_x, x = torch.rand((2, *shape), dtype=torch.float32, generator=generator)
    mu, logvar = torch.randn((2, *latent), dtype=torch.float32, generator=generator)
    return [0.05 + 0.9 * recon_x if any(BY_NAME[likelihood].ranges[:1]) else 4 * recon_x - 2, x, mu, logvar]


def relative(value: Tensor, truth: Tensor) -> float:
    """Largest error over largest magnitude."""
    value, truth = value.detach().cpu().double(), truth.detach()
    return ((value - truth).abs().max() / truth.abs().max()).item()


def worst(rows: list[list[float]], *names: str) -> Errors:
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).amax(0).tolist(), strict=True))  # keeps a NaN


def launch_cost(device: torch.device) -> Iterator[str]:
    """What a call costs the host, fastelbo's next to the naive one."""
    recon_x, x, mu, logvar = (t.to(device) for t in inputs("bernoulli", SMALL, SMALL_LATENT))
    for tensor in (recon_x, mu, logvar):
        tensor.requires_grad_()

    def fused():
        return fastelbo.loss(recon_x, x, mu, logvar)[0]

    def naive():
        return fastelbo.reference.elbo_loss(recon_x, x, mu, logvar)[0]

    def sample_naively():
        return fastelbo.reference.reparameterize(mu, logvar), -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    def backward(loss):
        return lambda: torch.autograd.grad(loss(), (recon_x, mu, logvar))

    yield f"Host time of a call, {SMALL} with latents {SMALL_LATENT}, median in us"
    yield f"{'':<33}{'fastelbo':>10}{'naive':>10}"
    for name, calls in (
        ("loss", (fused, naive)),
        ("loss and backward", (backward(fused), backward(naive))),
        ("sample_kl", (lambda: fastelbo.sample_kl(mu, logvar), sample_naively)),
    ):
        yield f"{name:<33}" + "".join(f"{1e6 * seconds:>10.1f}" for seconds in host_times(device, *calls))


def host_times(device: torch.device, *calls: Callable, seconds: float = 0.3) -> list[float]:
    """The median time until each call returns, in turns for that many seconds."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # what is compiled or imported once
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a full queue would make the host wait
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    sys.exit(main())
