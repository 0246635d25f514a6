"""The objective as a module."""

import torch
from torch import Tensor, nn

from .arguments import check_real, check_scale, find_likelihood, split_reduction
from .objective import ELBOTerms, Reduction, loss


class ELBOLoss(nn.Module):
    """Negative ELBO with options fixed once: `criterion(recon_x, x, mu, logvar)` is `fastelbo.loss` with them.

    `beta` is kept as a 0-d buffer of the default dtype: it moves with the module and is saved in its `state_dict`. Write to it
    (`criterion.beta.fill_(0.5)`), or pass a beta to `forward`, to change it from step to step.

    Args:
        likelihood, reduction, target_scale: as in `fastelbo.loss`.
        beta, scale: likewise, as numbers.

    Raises:
        TypeError, ValueError: as `fastelbo.loss`.
    """

    def __init__(
        self,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        reduction: Reduction = "sum",
        scale: float | None = None,
        target_scale: float = 1.0,
    ) -> None:
        super().__init__()
        row = find_likelihood(likelihood)
        split_reduction(reduction)
        if scale is not None:
            check_scale(check_real("scale", scale), row)
        check_real("target_scale", target_scale)
        self.likelihood, self.reduction, self.scale, self.target_scale = likelihood, reduction, scale, target_scale
        self.register_buffer("beta", torch.tensor(check_real("beta", beta)))

    def forward(
        self,
        recon_x: Tensor,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        kl: Tensor | None = None,
    ) -> ELBOTerms:
        """`fastelbo.loss` of the arguments; `beta=None` means the module's own."""
        return loss(
            recon_x, x, mu, logvar, self.beta if beta is None else beta, kl=kl,
            likelihood=self.likelihood, reduction=self.reduction, scale=self.scale, target_scale=self.target_scale,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"likelihood={self.likelihood!r}, beta={self.beta.item():g}, reduction={self.reduction!r},"
            f" scale={self.scale}, target_scale={self.target_scale:g}"
        )
