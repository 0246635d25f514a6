"""The objective as a module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import Self

from .basics.arguments import split_reduction
from .basics.scalars import check_real
from .diagnostics import Monitor
from .engine.loss import ELBOTerms
from .engine.sequences import PerSample
from .latents.posterior import LOGVAR, CategoricalPosterior, Posterior, find_posterior
from .latents.weighting import ALL, Weighting
from .likelihoods import Likelihood, find_likelihood
from .objective import Prior, Reduction, loss


class ELBOLoss(nn.Module):
    """The negative ELBO as a module, with options fixed once: `criterion(recon_x, x, mu, logvar)` is `fastelbo.loss` with them.

    `beta` is a 0-d float64 buffer. It moves with the module, keeps its digits whatever dtype the module is cast to, and is
    saved in the `state_dict`. To change it from step to step, write to it (`criterion.beta.fill_(0.5)`) or pass a beta to
    `forward`.

    Args:
        likelihood, reduction, posterior, weighting: as in `fastelbo.loss`.
        beta, recon_weight: as in `fastelbo.loss`; numbers.

    Raises:
        TypeError, ValueError: as `fastelbo.loss`.
    """

    beta: Tensor

    def __init__(
        self,
        likelihood: str | Likelihood | None = None,
        beta: float = 1.0,
        reduction: Reduction = "sum",
        posterior: str | Posterior | CategoricalPosterior = "logvar",
        weighting: Weighting | None = None,
        recon_weight: float = 1.0,
    ) -> None:
        super().__init__()
        find_likelihood(likelihood)
        if not isinstance(reduction, PerSample):
            split_reduction(reduction)
        find_posterior(posterior)
        if weighting is not None and not isinstance(weighting, Weighting):
            raise TypeError(f"weighting must be a Weighting, got {type(weighting).__name__}")
        self.likelihood, self.reduction, self.posterior, self.weighting = likelihood, reduction, posterior, weighting
        self.recon_weight = check_real("recon_weight", recon_weight)
        self.register_buffer("beta", torch.tensor(check_real("beta", beta), dtype=_widest(torch.get_default_device())))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `double` and the like do to the module: they move beta, and do not cast it."""
        device = fn(torch.zeros((), device=self.beta.device)).device
        beta = self.beta = self.beta.to(_widest(device))
        super()._apply(fn, recurse)
        if self.beta.dtype != beta.dtype:
            self.beta = beta.to(device)
        return self

    def forward(
        self,
        recon_x: Tensor | tuple[Tensor | float, ...] | Distribution,
        x: Tensor,
        mu: Tensor | Distribution | None = None,
        logvar: Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        kl: Tensor | None = None,
        prior: Prior | None = None,
        weight: Tensor | None = None,
        recon_weight: float | Tensor | None = None,
        kl_weight: Tensor | None = None,
        monitor: Monitor | None = None,
    ) -> ELBOTerms:
        """`fastelbo.loss` of the arguments; None as `beta` or `recon_weight` means the module's own."""
        return loss(
            recon_x, x, mu, logvar, self.beta if beta is None else beta, kl=kl, prior=prior, weight=weight, monitor=monitor,
            recon_weight=self.recon_weight if recon_weight is None else recon_weight, kl_weight=kl_weight,
            likelihood=self.likelihood, posterior=self.posterior, weighting=self.weighting, reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        beta = "?" if self.beta.is_meta else f"{self.beta.item():g}"
        shown = f"likelihood={self.likelihood or find_likelihood(None).name!r}, beta={beta}, reduction={self.reduction!r}"
        if find_posterior(self.posterior) != LOGVAR:
            shown += f", posterior={self.posterior!r}"
        if self.recon_weight != 1:
            shown += f", recon_weight={self.recon_weight:g}"
        return shown if self.weighting in (None, ALL) else f"{shown}, weighting={self.weighting}"


WITHOUT_FLOAT64 = ("mps",)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
