"""The traffic budget: the tensors that each primitive reads and writes, once each, and no others."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """A loop over tiles: what it reads and writes, by the names of the kernels' arguments; of `numbers`, one in each turn."""

    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


RECONSTRUCTION = "prediction", "target"
LATENTS = "mu", "logvar"
PRIOR = "prior_mu", "prior_second"
WEIGHT = ("kl_weight",)  # of each element
GAUSSIAN = "mu", "second"  # a posterior of any parametrization
PARAMETERS = "first", "second", "third"  # of a likelihood that has several


def of_samples(reads: tuple[str, ...], writes: tuple[str, ...]) -> tuple[Stream, Stream]:
    """A loop over tiles, and within it one over the samples of a datum, which reads what arrived at each and nothing else."""
    numbers = "grad_log_q", "grad_log_p", "path_scale"
    return Stream(("grad_z", *reads), writes, numbers), Stream(("grad_z",), (), numbers)


BUDGET = {
    "loss forward": (Stream(RECONSTRUCTION, ("gradient",)), Stream(LATENTS)),
    "loss forward, no gradient": (Stream(RECONSTRUCTION), Stream(LATENTS)),
    "loss forward, kl given": (Stream(RECONSTRUCTION, ("gradient",)),),
    "loss forward, kl given, no gradient": (Stream(RECONSTRUCTION),),
    "loss backward, factor as guessed": (Stream(LATENTS, ("grad_mu", "grad_logvar")),),
    "loss backward, another factor": (Stream(RECONSTRUCTION, ("gradient",)), Stream(LATENTS, ("grad_mu", "grad_logvar"))),
    "sample forward": (Stream(LATENTS, ("z",)),),
    "sample backward": (Stream(("grad_z", *LATENTS), ("grad_mu", "grad_logvar")),),
    "sample forward, prior": (Stream((*LATENTS, *PRIOR), ("z",)),),
    "sample backward, prior": (
        Stream(("grad_z", *LATENTS, *PRIOR), ("grad_mu", "grad_logvar", "grad_prior_mu", "grad_prior_second")),
    ),
    "sample forward, weights": (Stream((*LATENTS, *WEIGHT), ("z",)),),
    "sample backward, weights": (Stream(("grad_z", *LATENTS, *WEIGHT), ("grad_mu", "grad_logvar")),),
    "log ratio forward": (Stream(GAUSSIAN, ("z",)),),
    "log ratio forward, prior": (Stream((*GAUSSIAN, *PRIOR), ("z",)),),
    "log ratio backward": of_samples(GAUSSIAN, ("grad_mu", "grad_second")),
    "log ratio backward, prior": of_samples(
        (*GAUSSIAN, *PRIOR), ("grad_mu", "grad_second", "grad_prior_mu", "grad_prior_second")
    ),
}
LIKE = {"gradient": "prediction", "z": "mu", "grad_z": "mu", "grad_mu": "mu", "grad_logvar": "logvar"} | {
    f"grad_{name}": name for name in (*PARAMETERS, *PRIOR)
}

# The least that forward alone, and forward with backward, can do with: what the benchmarks call the floor. A factor that is new
# at each step is no reason to read anything twice, even if fastelbo does.
LEAST = {
    ("loss", False): ("loss forward, no gradient",),
    ("loss", True): ("loss forward", "loss backward, factor as guessed"),
    ("sample", False): ("sample forward",),
    ("sample", True): ("sample forward", "sample backward"),
    ("objective", False): ("sample forward", "loss forward, kl given, no gradient"),
    ("objective", True): ("sample forward", "loss forward, kl given", "sample backward"),
}


def least_bytes(subject: str, backward: bool, tensors: Mapping[str, Tensor]) -> int:
    """Bytes that a subject has to read and write, given its inputs by name."""
    streams = [stream for primitive in LEAST[subject, backward] for stream in BUDGET[primitive]]
    return sum(tensors[LIKE.get(name, name)].nbytes for stream in streams for name in (*stream.reads, *stream.writes))
