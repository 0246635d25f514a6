"""Fused kernels for the loss of variational autoencoders."""

from . import nn, reference
from .objective import ELBOTerms, elbo, loss
from .sampling import reparameterize, sample_kl

__all__ = ["ELBOTerms", "elbo", "loss", "nn", "reference", "reparameterize", "sample_kl"]
__version__ = "0.1.0"
