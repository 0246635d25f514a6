"""The traffic budget: the tensors that each primitive reads and writes, once each, and nothing else."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Traffic(NamedTuple):
    """Arguments of the kernel, by name, that pass through its loops."""

    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()


BUDGET = {
    "loss forward": Traffic(("prediction", "target", "mu", "logvar"), ("gradient",)),
    "loss forward, no gradient": Traffic(("prediction", "target", "mu", "logvar")),
    "loss forward, kl given": Traffic(("prediction", "target"), ("gradient",)),
    "loss forward, kl given, no gradient": Traffic(("prediction", "target")),
    "loss backward, factor as guessed": Traffic(("mu", "logvar"), ("grad_mu", "grad_logvar")),
    "loss backward, another factor": Traffic(("prediction", "target", "mu", "logvar"), ("gradient", "grad_mu", "grad_logvar")),
    "sample forward": Traffic(("mu", "logvar"), ("z",)),
    "sample backward": Traffic(("grad_z", "mu", "logvar"), ("grad_mu", "grad_logvar")),
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
LIKE = {"gradient": "prediction", "z": "mu", "grad_z": "mu", "grad_mu": "mu", "grad_logvar": "logvar"}


def least_bytes(subject: str, backward: bool, tensors: Mapping[str, Tensor]) -> int:
    """Bytes that a subject has to read and write, given its inputs by name."""
    moved = [name for primitive in LEAST[subject, backward] for names in BUDGET[primitive] for name in names]
    return sum(tensors[LIKE.get(name, name)].nbytes for name in moved)
