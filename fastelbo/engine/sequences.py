"""Several batch dimensions, such as sequences and their steps: they become one for a call, and its values get them back."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributions import Distribution, Normal

from ..basics.arguments import check_count, check_dense
from ..basics.records import Record, canonical, record
from ..basics.sparse import check_data, is_sparse
from ..latents.posterior import check_latents
from ..likelihoods.distributions import Parametrized, of_distribution


@record
class PerSample(metaclass=Record):
    """One value a sample, where a batch has several dimensions, such as one for each step of each sequence, `[B, T]`. Pass it
    as `reduction=`; `PerSample()` is `"none"`. It is frozen and compared by value.

    The first `batch_dims` dimensions of data, latents and weights are the batch's, and those of results. What broadcasts does
    so from the last dimension on, as ever. Where a likelihood has a `dim`, it counts as if the batch had one dimension.

    Args:
        batch_dims: how many dimensions, at least 1.

    Raises:
        TypeError, ValueError: `batch_dims` is no integer, or less than 1.
    """

    batch_dims: int = 1

    def __post_init__(self) -> None:
        canonical(self, "batch_dims", check_count)


class Batch(NamedTuple):
    """The batch dimensions of a call."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, name: str, value: Any, reduction: PerSample) -> "Batch":
        check_data(name, value)
        if reduction.batch_dims > 1 and is_sparse(value):
            raise ValueError(f"{name} must be dense with {reduction!r}: a sparse one has one batch dimension")
        if value.dim() < reduction.batch_dims:
            raise ValueError(
                f"{name} must have {reduction.batch_dims} batch dimensions, as {reduction!r} says: got {tuple(value.shape)}"
            )
        return cls(tuple(value.shape[: reduction.batch_dims]))

    def merged(self, name: str, value: Any, dim: int = 0) -> Any:
        """With one batch dimension, which is this one."""
        if not isinstance(value, Tensor):
            return value  # an error further in
        if value.is_nested:  # which has no shape
            check_dense(name, value)
        behind = dim + len(self.sizes)
        if tuple(value.shape[dim:behind]) != self.sizes:
            where = "have behind n_samples" if dim else "begin with"
            raise ValueError(f"{name} must {where} the batch dimensions {self.sizes}: got {tuple(value.shape)}")
        return value.flatten(dim, behind - 1)

    def merged_smaller(self, value: Any, rank: int) -> Any:
        """Likewise, of what broadcasts to so many dimensions, the batch's among them."""
        dims = len(self.sizes)
        if not isinstance(value, Tensor) or value.dim() <= rank - dims:
            return value
        shape = [1] * (rank - value.dim()) + list(value.shape)
        if len(shape) > rank or any(n != 1 and n != size for n, size in zip(shape, self.sizes, strict=False)):
            return value  # an error further in
        return value.reshape(shape).expand(*self.sizes, *shape[dims:]).flatten(0, dims - 1)

    def merged_prediction(self, name: str, prediction: Any, likelihood: Any) -> Any:
        """Likewise, of what a decoder returned."""
        if isinstance(prediction, Distribution):
            found, tensors = of_distribution(name, prediction, likelihood)
            return Parametrized(found, self.merged_prediction(name, tensors, found))
        first, *others = prediction if isinstance(prediction, tuple | list) and prediction else (prediction,)
        rank = first.dim() if isinstance(first, Tensor) else 0
        return self.merged(name, first), *(self.merged_smaller(t, rank) for t in others)

    def around(self, decoder: Callable[[Tensor], Any], likelihood: Any) -> Callable[[Tensor], Any]:
        """The decoder as one of rows, of which it may get several samples."""

        def of_rows(z: Tensor) -> Any:
            several = self
            if z.shape[0]:
                several = Batch((z.shape[0] // math.prod(self.sizes[1:]), *self.sizes[1:]))
            return several.merged_prediction("decoder(z)", decoder(several.apart(z)), likelihood)

        return of_rows

    def apart(self, value: Tensor) -> Tensor:
        """A value for each sample, by the batch's dimensions."""
        return value.unflatten(0, self.sizes)


def merged_latents(
    mu: Any, logvar: Any, posterior: Any, prior: Any, kl_weight: Any, reduction: PerSample, batch: Batch | None = None
) -> tuple[Batch, dict[str, Any]]:
    """The batch, that of the latents if none is given, and the arguments of `kl_divergence` by these names."""
    latents, tensors = check_latents(mu, logvar, posterior, prior, kl_weight, samples=False)
    own, priors, weight = latents.split(tensors)
    batch = Batch.of("mu", own[0], reduction) if batch is None else batch
    own, priors = ([batch.merged("mu", t) for t in given] for given in (own, priors))
    merged_prior: Sequence[Tensor] | Distribution | Tensor | None = None
    if latents.is_categorical:
        merged_prior = priors[0] if priors else None
    elif priors and latents.prior == latents.posterior.parameter:
        merged_prior = tuple(priors)
    elif priors:
        merged_prior = Normal(*priors, validate_args=False)
    return batch, {
        "mu": own[0], "logvar": own[1] if len(own) > 1 else None, "posterior": latents.posterior, "prior": merged_prior,
        "kl_weight": batch.merged_smaller(weight, latents.terms(tensors).dim()),
    }  # fmt: skip
