"""Fused kernels for the loss of variational autoencoders."""

from . import diagnostics, likelihoods, nn, reference, schedules
from .bounds.log_likelihood import LogLikelihood, log_likelihood
from .bounds.records import ELBO, IWAE
from .engine.loss import ELBOTerms
from .engine.sequences import PerSample
from .latents.posterior import CategoricalPosterior, Posterior
from .latents.weighting import Weighting
from .objective import elbo, loss
from .parts import SampleKL, SampleLogRatio, kl_divergence, nll, reparameterize, sample_kl, sample_log_ratio

__all__ = [
    "ELBO",
    "IWAE",
    "CategoricalPosterior",
    "ELBOTerms",
    "LogLikelihood",
    "PerSample",
    "Posterior",
    "SampleKL",
    "SampleLogRatio",
    "Weighting",
    "diagnostics",
    "elbo",
    "kl_divergence",
    "likelihoods",
    "log_likelihood",
    "loss",
    "nll",
    "nn",
    "reference",
    "reparameterize",
    "sample_kl",
    "sample_log_ratio",
    "schedules",
]
__version__ = "0.2.0.dev0"
