"""The naive formulas in plain Torch, written to be read: what every kernel is tested and timed against."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import ContinuousBernoulli, Laplace, Normal, Poisson


def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    beta: float | Tensor = 1.0,
    *,
    likelihood: str = "bernoulli",
    scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative ELBO in nats, summed over the batch: `(loss, recon, kl)`, each `[]`.

    `recon_x` is what the decoder says of `x`, of the same shape; `mu` and `logvar` are the mean and the logarithm of the
    variance of the encoder's Gaussian. The KL: Kingma and Welling, Auto-Encoding Variational Bayes (2013), appendix B.
    """
    if likelihood == "bernoulli":
        recon = F.binary_cross_entropy(recon_x, x, reduction="sum")
    elif likelihood == "bernoulli_logits":
        recon = F.binary_cross_entropy_with_logits(recon_x, x, reduction="sum")
    elif likelihood == "mse":
        recon = F.mse_loss(recon_x, x, reduction="sum")
    elif likelihood == "l1":
        recon = F.l1_loss(recon_x, x, reduction="sum")
    elif likelihood == "gaussian":
        recon = -Normal(recon_x, scale, validate_args=False).log_prob(x).sum()
    elif likelihood == "laplace":
        recon = -Laplace(recon_x, scale, validate_args=False).log_prob(x).sum()
    elif likelihood == "poisson":
        recon = -Poisson(recon_x, validate_args=False).log_prob(x).sum()
    elif likelihood == "poisson_log":
        recon = -Poisson(recon_x.exp(), validate_args=False).log_prob(x).sum()
    elif likelihood == "continuous_bernoulli":
        recon = -ContinuousBernoulli(recon_x, validate_args=False).log_prob(x).sum()
    elif likelihood == "continuous_bernoulli_logits":
        recon = -ContinuousBernoulli(logits=recon_x, validate_args=False).log_prob(x).sum()
    else:
        raise ValueError(f"unknown likelihood {likelihood!r}")
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return recon + beta * kl, recon, kl


def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    """A sample of N(mu, exp(logvar)) through which gradients flow to both."""
    std = torch.exp(0.5 * logvar)
    eps = torch.randn_like(std)
    return mu + eps * std
