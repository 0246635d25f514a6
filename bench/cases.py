"""The cases: what is timed, at which shapes, with which likelihoods and dtypes, and in which mode."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

# Shapes that people train with: reconstruction, and latents of one sample.
SHAPES = {
    "1x784": (20,),  # MNIST, one at a time
    "128x784": (20,),
    "128x3x32x32": (128,),  # CIFAR
    "64x3x64x64": (128,),  # CelebA
    "8x3x256x256": (4, 32, 32),  # a latent diffusion model's autoencoder
    "1x3x17x256x256": (16, 5, 32, 32),  # likewise for video
    "128x20000": (10,),  # gene expression, all genes
    "4096x4000": (10,),  # likewise, the variable ones: 64 MB
    "65536x784": (20,),
    "65536x3x32x32": (128,),  # 768 MB
}
# Latents alone, from 2 to 16 million.
LATENTS = ("1x2", "128x20", "64x512", "8x4x32x32", "1024x1024", "4096x4096")
# Whole training steps: likelihoods of the models in `models.py`.
MODELS = {"mlp-784": "bernoulli", "conv-3x64x64": "bernoulli_logits", "genes-20000": "gaussian"}

LIKELIHOODS = "bernoulli", "bernoulli_logits", "mse", "gaussian"
# Predictions (or latents), and targets.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "bfloat16+uint8": (torch.bfloat16, torch.uint8),
    "float16": (torch.float16, torch.float16),
}
SUBJECTS = {
    "loss": "reconstruction, KL and their sum",
    "sample": "reparameterized sample and KL",
    "objective": "sample, KL and loss, for a given decoder output",
    "step": "a whole training step: encoder, sample, decoder, loss, their backward, Adam",
}
MODES = {
    "forward": "nothing requires grad",
    "backward": "forward and backward",
    "scaled": "likewise, from loss / batch size: a factor other than 1, the same at each step",
    "varying": "likewise, from loss * factor, another factor at each step",
}


class Case(NamedTuple):
    subject: str
    shape: str
    likelihood: str  # "-" where there is none
    dtypes: str
    mode: str

    @property
    def id(self) -> str:
        return " ".join(self)


def sizes(shape: str) -> tuple[int, ...]:
    """(128, 784) for "128x784"."""
    return tuple(map(int, shape.split("x")))


CHOICES = {
    "subjects": SUBJECTS,
    "shapes": (*SHAPES, *LATENTS, *MODELS),
    "likelihoods": LIKELIHOODS,
    "dtypes": DTYPES,
    "modes": MODES,
}


def all_cases() -> Iterator[Case]:
    yield from map(Case._make, itertools.product(["loss", "objective"], SHAPES, LIKELIHOODS, DTYPES, MODES))
    yield from map(Case._make, itertools.product(["sample"], LATENTS, ["-"], ["float32", "bfloat16"], ["forward", "backward"]))
    yield from (Case("step", model, likelihood, "float32", "backward") for model, likelihood in MODELS.items())


# Of SHAPES and LATENTS, those that people train with on a CPU, of each kind one.
ON_CPU = ("1x784", "128x784", "64x3x64x64", "4096x4000", "1x2", "128x20", "64x512", "1024x1024")


def usual(case: Case, cuda: bool) -> bool:
    """Whether `make bench` runs a case: every size once, every option at a small and a large one. On a CPU the sizes are fewer,
    and the options at one of them, so that ten minutes are enough, with all that has to be compiled."""
    small_and_large = case.shape in ("128x784", "4096x4000" if cuda else "64x3x64x64")
    if case.subject == "step":
        return True
    if not cuda and case.shape not in ON_CPU:
        return False
    if case.subject == "sample":
        return cuda or case.dtypes == "float32"
    if case.dtypes == "float32" and case.mode == "backward":
        if case.subject == "objective":
            return case.likelihood == "bernoulli_logits" and (cuda or small_and_large or case.shape == "1x784")
        return cuda or case.likelihood != "gaussian" or small_and_large
    if case.subject == "objective" or not small_and_large or (not cuda and case.shape == "128x784"):
        return False
    if case.dtypes == "float32":
        return case.likelihood in (("bernoulli", "bernoulli_logits") if cuda else ("bernoulli_logits",))
    return case.mode == "backward" and case.likelihood in (("bernoulli_logits", "mse") if cuda else ("bernoulli_logits",))


def again(case: Case) -> bool:
    """Whether `make bench` runs one of the usual cases, eager, with another number of threads, too: those of the overview."""
    return (case.dtypes, case.mode) == ("float32", "backward")


def select(chosen: dict[str, list[str] | None], cuda: bool, of_usual: bool = False) -> list[Case]:
    """The usual cases, or those that were chosen: then any subject, shape and likelihood, float32, and forward and backward.

    `of_usual`: those of the usual cases that were chosen.
    """
    wanted = {name: values for name, values in chosen.items() if values}
    of_usual = of_usual or not wanted
    if not of_usual:
        wanted = {"dtypes": ["float32"], "modes": ["backward"]} | wanted
    wanted["likelihoods"] = [*wanted.get("likelihoods", LIKELIHOODS), "-"]
    cases = (case for case in all_cases() if usual(case, cuda) or not of_usual)
    return [c for c in cases if all(v in wanted.get(name, [v]) for name, v in zip(CHOICES, c, strict=True))]
