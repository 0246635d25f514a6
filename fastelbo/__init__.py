"""Fused kernels for the loss of variational autoencoders."""

from . import diagnostics, likelihoods, nn, reference, schedules
from .divergence import Weighting, kl_divergence
from .log_ratio import SampleLogRatio, sample_log_ratio
from .monte_carlo import LogLikelihood, log_likelihood
from .objective import elbo, loss
from .posteriors import Posterior
from .sampling import reparameterize, sample_kl
from .terms import ELBOTerms

__all__ = [
    "ELBOTerms",
    "LogLikelihood",
    "Posterior",
    "SampleLogRatio",
    "Weighting",
    "diagnostics",
    "elbo",
    "kl_divergence",
    "likelihoods",
    "log_likelihood",
    "loss",
    "nn",
    "reference",
    "reparameterize",
    "sample_kl",
    "sample_log_ratio",
    "schedules",
]
__version__ = "0.1.0"
