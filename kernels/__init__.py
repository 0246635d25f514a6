"""Triton kernels of fastelbo, and the functions that launch them.

This package knows tensors: no options, no autograd, no users. It offers the same primitives, with the same signatures,
as `fastelbo.torch_backend`: `draw_noise`, `loss_forward`, `loss_backward`, `sample_forward` and `sample_backward`. What has no
such twin, since the Torch backend takes the formula, is `log_ratio_forward` and `log_ratio_backward`, and in modules:
`reconstruction`, `categorical` and `mixture`, each with `forward` and `backward`, and `divergence`.
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
