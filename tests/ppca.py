"""Probabilistic PCA: the VAE of which all that a VAE estimates is known exactly."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal


class PPCA(NamedTuple):
    """p(z) = N(0, I) and p(x | z) = N(W z + b, scale^2 I), for x `[B, D]` and z `[B, L]` (Tipping and Bishop, 1999)."""

    weight: Tensor  # [D, L]
    bias: Tensor  # [D]
    scale: float

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias

    def log_p(self, x: Tensor) -> Tensor:
        """log p(x), `[B]`."""
        noise = self.scale**2 * torch.eye(len(self.bias)).to(x)
        return MultivariateNormal(self.bias, self.weight @ self.weight.T + noise).log_prob(x)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) of `z` `[..., B, L]`."""
        constants = len(self.bias) * math.log(self.scale) + 0.5 * (x.shape[-1] + z.shape[-1]) * math.log(2 * math.pi)
        squares = ((x - self.decode(z)) / self.scale).square().sum(-1) + z.square().sum(-1)
        return -0.5 * squares - constants

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z | x)."""
        m = self.weight.T @ self.weight + self.scale**2 * torch.eye(self.weight.shape[1]).to(x)
        mean = torch.linalg.solve(m, self.weight.T @ (x - self.bias).T).T
        return MultivariateNormal(mean, self.scale**2 * torch.linalg.inv(m))

    def diagonal_posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar of p(z | x), where the columns of W are orthogonal."""
        posterior = self.posterior(x)
        variance = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(posterior.covariance_matrix, torch.diag_embed(variance), rtol=0, atol=1e-14)
        return posterior.mean.contiguous(), variance.log().expand_as(posterior.mean).contiguous()

    def reconstruction(self, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        """The mean of -log p(x | z) over z of N(mu, exp(logvar)), `[B]`."""
        squares = (x - self.decode(mu)).square().sum(1) + logvar.exp() @ self.weight.square().sum(0)
        return len(self.bias) * (math.log(self.scale) + 0.5 * math.log(2 * math.pi)) + squares / (2 * self.scale**2)

    def orthogonal(self) -> "PPCA":
        """The same p(x), of a z turned so that the columns of W are orthogonal."""
        u, singular, _ = torch.linalg.svd(self.weight, full_matrices=False)
        return self._replace(weight=u * singular)


def make_ppca(features: int, latent: int, scale: float, device="cpu") -> PPCA:
    weight, bias = (torch.randn(shape, dtype=torch.float64, device=device) for shape in ((features, latent), (features,)))
    return PPCA(weight, bias, scale)


def maximization(x: Tensor, mu: Tensor, logvar: Tensor) -> PPCA:
    """The M-step of EM: the model with the largest ELBO of `x` for posteriors N(mu, exp(logvar))."""
    ones = torch.cat((mu, torch.ones_like(mu[:, :1])), 1)
    variances = torch.cat((logvar.exp(), torch.zeros_like(mu[:, :1])), 1).sum(0)
    joint = torch.linalg.solve(ones.T @ ones + variances.diag(), ones.T @ x).T
    weight, bias = joint[:, :-1], joint[:, -1]
    squares = (x - ones @ joint.T).square().sum() + (weight.square() @ variances[:-1]).sum()
    return PPCA(weight.contiguous(), bias.contiguous(), math.sqrt(squares.item() / x.numel()))


def maximum_likelihood(x: Tensor, latent: int) -> tuple[float, float]:
    """The largest mean of log p(x) over all models of so many latents, and their scale (Tipping and Bishop, 1999, 3.2)."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    variance = eigenvalues[latent:].mean().item()
    logdet = eigenvalues[:latent].log().sum().item() + (len(eigenvalues) - latent) * math.log(variance)
    return -0.5 * (len(eigenvalues) * (math.log(2 * math.pi) + 1) + logdet), math.sqrt(variance)


def relative_variance(p: MultivariateNormal, mu: Tensor, logvar: Tensor) -> Tensor:
    """Var_q(p / q), `[B]`, of a p with diagonal covariance and q = N(mu, exp(logvar)), wider than p."""
    v, u = p.covariance_matrix.diagonal(dim1=-2, dim2=-1), logvar.exp()
    return (u / (v * (2 * u - v)).sqrt() * ((p.mean - mu).square() / (2 * u - v)).exp()).prod(1) - 1


def sigma_points(mu: Tensor) -> Tensor:
    """Noise `[2 L, B, L]` over which the mean of any function that is quadratic in z is exact."""
    unit = math.sqrt(mu.shape[1]) * torch.eye(mu.shape[1]).to(mu)
    return torch.cat((unit, -unit))[:, None].repeat(1, len(mu), 1)
