"""Triton kernels of fastelbo, and the functions that launch them.

This package knows tensors and constants: no options, no autograd, no users. Below each kernel stands the function that launches
it, with a docstring that says what it takes.
"""

from . import categorical, divergence, mixture, reconstruction
from .latents import draw_noise, sample_backward, sample_forward
from .launch import INTERPRETED
from .log_ratio import log_ratio_backward, log_ratio_forward
from .loss import loss_backward, loss_forward

__all__ = [
    "INTERPRETED",
    "categorical",
    "divergence",
    "draw_noise",
    "log_ratio_backward",
    "log_ratio_forward",
    "loss_backward",
    "loss_forward",
    "mixture",
    "reconstruction",
    "sample_backward",
    "sample_forward",
]
