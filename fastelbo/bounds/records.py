"""The bounds on log p(x) that `elbo` can maximize, as records."""

from dataclasses import field

from ..basics.arguments import check_count
from ..basics.records import Record, canonical, check_choice, record

ESTIMATORS = ("standard", "stl", "dreg")


@record
class ELBO(metaclass=Record):
    """The evidence lower bound, whose reconstruction is the mean over `n_samples` samples of z (Kingma and Welling, 2013). Pass
    it as `bound=`; None and `ELBO()` are the same, one sample. It is frozen and compared by value.

    Args:
        n_samples: the samples of z for each datum, at least 1.
        chunk: how many of them go through the decoder at a time, as `[chunk * B, ...]`; by keyword. More are faster, in more
            memory. A `chunk` above `n_samples` is `n_samples`. Noise and dropout masks for a seed depend on it, and a batch
            normalization sees a whole chunk.

    Raises:
        TypeError, ValueError: an argument is no integer, or less than 1.
    """

    n_samples: int = 1
    chunk: int = field(default=1, kw_only=True)

    estimator = "standard"

    def __post_init__(self) -> None:
        canonical(self, "n_samples", check_count)
        canonical(self, "chunk", check_count)
        object.__setattr__(self, "chunk", min(self.chunk, self.n_samples))

    @property
    def chunks(self) -> list[slice]:
        return [slice(i, min(i + self.chunk, self.n_samples)) for i in range(0, self.n_samples, self.chunk)]


@record
class IWAE(ELBO):
    """The importance-weighted bound of Burda et al. (Importance Weighted Autoencoders, 2016), which is tighter than the ELBO
    and rises to log p(x) with K = `n_samples`:

        log(1/K sum_k w_k),    log w_k = log p(x | z_k) - beta (log q(z_k | x) - log p(z_k)).

    Pass it as `bound=`. With one sample it is the ELBO by a sampled KL. It is frozen and compared by value.

    Args:
        n_samples: K, the samples of z for each datum, at least 1.
        estimator: of the gradient; by keyword. `"standard"`: the derivative of the loss. `"stl"`: sticking the landing (Roeder
            et al., 2017), which takes of log q only what comes by way of z; it is biased for K > 1. `"dreg"`: doubly
            reparameterized (Tucker et al., 2019), without bias, and its signal does not fade as K grows. Where q is the
            posterior, the encoder's gradients by these two are 0 for all noise. They have no second derivatives, and `"dreg"`
            cannot be compiled.
        chunk: how many samples go through the decoder at a time, as in `ELBO`; by keyword.

    Raises:
        TypeError, ValueError: a number is no integer or less than 1, or `estimator` is unknown.
    """

    n_samples: int = field()  # or the ELBO's default would be its own
    estimator: str = field(default="standard", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("IWAE.estimator", self.estimator, ESTIMATORS)


def check_bound(bound: object) -> ELBO:
    """A bound, None being the ELBO of one sample."""
    if bound is None:
        return ONE_SAMPLE
    if not isinstance(bound, ELBO):
        found = bound.__name__ if isinstance(bound, type) else type(bound).__name__
        raise TypeError(f"bound must be a fastelbo.ELBO or a fastelbo.IWAE, got {found}")
    return bound


ONE_SAMPLE = ELBO()
