"""Triton kernels of fastelbo, and what launches them.

This package knows tensors and constants: no options, no autograd, no users. Below each kernel stands what launches it: a class
for tensors of one kind, which finds once what follows from their shapes, and whose methods take the tensors.
"""

from .categorical import Categorical
from .categorical_divergence import CategoricalDivergence
from .direct import INTERPRETED
from .divergence import Divergence
from .log_ratio import log_ratio_backward, log_ratio_forward
from .loss import Loss
from .mixture import Mixture
from .reconstruction import Family, Reconstruction
from .sample import Sample, draw_noise
from .softmax import RowReconstruction
from .sparse import SparseReconstruction
from .sparse_multinomial import SparseMultinomial

__all__ = [
    "INTERPRETED",
    "Categorical",
    "CategoricalDivergence",
    "Divergence",
    "Family",
    "Loss",
    "Mixture",
    "Reconstruction",
    "RowReconstruction",
    "Sample",
    "SparseMultinomial",
    "SparseReconstruction",
    "draw_noise",
    "log_ratio_backward",
    "log_ratio_forward",
]
