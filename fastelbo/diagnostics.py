"""What to look at while a VAE trains: which latent dimensions carry information, and what the reconstruction costs."""

import math
import warnings

import torch
from torch import Tensor

from .engine.divergence import Statistics


class CollapseWarning(UserWarning):
    """Hardly any latent dimension depends on the data."""


class Monitor:
    """Collects diagnostics from the calls of `fastelbo.loss` or `fastelbo.elbo` that it is passed to as `monitor=`.

    The KL of each dimension and the moments of the posterior means come from the pass that computes the KL, and are added up on
    the device in float64, a few small operations a call. Nothing waits for the device until a value is read on the host.
    Where a call needs the KL of each sample or element (`reduction="none"`, free bits or a capacity of those), mu and logvar
    are read once more; the data never are.
    Everything is about the calls since the last `reset`, such as an epoch. Where a call has a `kl_weight`, each dimension's
    means and variances are over the weights, from a pass of their own; a dimension whose weights are all 0 has NaN.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all calls."""
        self._samples = 0  # of those with a posterior
        self._latents: Tensor | None = None  # [4, *latent shape]: sums over samples of KL, mu, mu^2, and their weights
        self._recon: Tensor | None = None  # [2]: nats, and elements that they are of
        self._batches = 0

    def record(self, batch: int, recon: Tensor, elements: float | Tensor, statistics: Statistics | None) -> None:
        """One call: the sum of its reconstruction over `batch` samples, the number of its elements (or the sum of their
        weights), and what the KL's pass has collected."""
        if batch == 0:
            return
        with torch.no_grad():
            recon = recon.detach().double()
            # To copy a number from the host would wait for the device; to fill does not.
            elements = elements.double() if isinstance(elements, Tensor) else recon.new_full((), elements)
            new = torch.stack([recon, elements])
            if statistics is not None and statistics[-2]:
                self._record_latents(statistics)  # which may raise
            self._recon = new if self._recon is None else self._recon + new
            self._batches += batch

    def _record_latents(self, statistics: Statistics) -> None:
        *sums, posteriors, weight = statistics
        weight = torch.full_like(sums[0], posteriors) if weight is None else weight
        new = torch.stack([t.double() for t in (*sums, weight)])
        if self._latents is not None and self._latents.shape != new.shape:
            raise ValueError(
                "monitor must see latents of one shape, and be reset before another:"
                f" got {tuple(new.shape[1:])} after {tuple(self._latents.shape[1:])}"
            )
        self._latents = new if self._latents is None else self._latents + new
        self._samples += posteriors

    @property
    def kl_per_dimension(self) -> Tensor:
        """KL of each latent dimension in nats, the mean over samples, or over their weights: `[*latent shape]`, float64."""
        total, _, _, count = self._seen()
        return total / count

    @property
    def kl(self) -> Tensor:
        """KL in nats a sample: `[]`."""
        return self._seen()[0].sum() / self._samples

    @property
    def mean_variance(self) -> Tensor:
        """Variance over the data of each dimension of the posterior mean: `[*latent shape]`, float64.

        Of sums that each call makes in float32: of means some hundred times as far from 0 as they vary, few digits are left.
        """
        _, total, squares, count = self._seen()
        total, squares = total / count, squares / count
        return (squares - total.square()).clamp_min(0)

    def active_units(self, threshold: float = 0.01) -> Tensor:
        """The number of latent dimensions whose posterior mean varies over the data by more than `threshold`: `[]`, int64.

        Burda et al., Importance Weighted Autoencoders (2016), whose threshold is 0.01.
        """
        return (self.mean_variance > threshold).sum()

    @property
    def recon(self) -> Tensor:
        """Reconstruction in nats a sample: `[]`, float64."""
        return self._recon_sums()[0] / self._batches

    @property
    def bits_per_dimension(self) -> Tensor:
        """Reconstruction in bits for each element of the target that counts: `[]`, float64.

        A rate in the sense of compression only for likelihoods of discrete data. A density's is that of the data as they were
        scaled: for bytes brought to [0, 1], add log2(255).
        """
        nats, elements = self._recon_sums()
        return nats / elements / math.log(2)

    def is_collapsed(self, threshold: float = 0.01, share: float = 0.1) -> bool:
        """Whether less than `share` of the latent dimensions are active. Waits for the device."""
        return int(self.active_units(threshold)) < share * self._dimensions()

    def warn_if_collapsed(self, threshold: float = 0.01, share: float = 0.1) -> None:
        """Emit a `CollapseWarning` if less than `share` of the latent dimensions are active. Waits for the device."""
        if self.is_collapsed(threshold, share):
            active, latents = int(self.active_units(threshold)), self._dimensions()
            warnings.warn(
                f"posterior collapse: the means of only {active} of {latents} latent dimensions vary by more than {threshold:g}"
                f" over {self._samples} samples; the KL is {self.kl:.3g} nats a sample. A beta that warms up, free bits or a"
                " weaker decoder may help",
                CollapseWarning,
                stacklevel=2,
            )

    def _seen(self) -> Tensor:
        if self._latents is None:
            raise RuntimeError(
                "monitor has seen no posterior of which it tells, a Gaussian: pass it to a call of loss or elbo that has mu and"
                " logvar"
            )
        return self._latents

    def _dimensions(self) -> int:
        """How many have counted."""
        return int((self._seen()[3] != 0).sum())

    def _recon_sums(self) -> Tensor:
        if self._recon is None:
            raise RuntimeError("monitor has seen no call: pass it to loss or elbo as monitor=")
        return self._recon
