"""Fused kernels for the loss of variational autoencoders."""

from . import diagnostics, likelihoods, nn, reference, schedules
from .divergence import Weighting, kl_divergence
from .objective import elbo, loss
from .posteriors import Posterior
from .sampling import reparameterize, sample_kl
from .terms import ELBOTerms

__all__ = [
    "ELBOTerms",
    "Posterior",
    "Weighting",
    "diagnostics",
    "elbo",
    "kl_divergence",
    "likelihoods",
    "loss",
    "nn",
    "reference",
    "reparameterize",
    "sample_kl",
    "schedules",
]
__version__ = "0.1.0"
