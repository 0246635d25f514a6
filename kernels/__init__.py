"""Triton kernels of fastelbo, and the functions that launch them.

This package knows tensors and constants: no options, no autograd, no users. Below each kernel stands the function that launches
it, with a docstring that says what it takes.
"""

from . import categorical, divergence, mixture, reconstruction
from .direct import INTERPRETED, stream_of
from .divergence import Divergence
from .latents import Sample, draw_noise
from .log_ratio import log_ratio_backward, log_ratio_forward
from .loss import Loss
from .reconstruction import Reconstruction

__all__ = [
    "INTERPRETED",
    "Divergence",
    "Loss",
    "Reconstruction",
    "Sample",
    "categorical",
    "divergence",
    "draw_noise",
    "log_ratio_backward",
    "log_ratio_forward",
    "mixture",
    "reconstruction",
    "stream_of",
]
