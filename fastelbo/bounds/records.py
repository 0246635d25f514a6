"""The bounds on log p(x) that `elbo` can maximize, as records."""

from dataclasses import field

from ..basics.arguments import check_count
from ..basics.records import Record, canonical, check_choice, record

ESTIMATORS = ("standard", "stl", "dreg")


@record
class ELBO(metaclass=Record):
    """The evidence lower bound, whose reconstruction is the mean over samples of z (Kingma and Welling, 2013).

    Args:
        n_samples: samples of z for each datum.
        chunk: samples that go through the decoder at a time, as `[chunk * B, ...]`: more is faster, in more memory. Noise and
            masks depend on it, for a seed, and a batch normalization sees a whole chunk.
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
    """The tighter bound of Burda et al. (Importance Weighted Autoencoders, 2016), of K = `n_samples`:

        log(1/K sum_k w_k),    log w_k = log p(x | z_k) - beta (log q(z_k | x) - log p(z_k)).

    Args:
        n_samples: samples of z for each datum. With one it is the ELBO by a sampled KL.
        estimator: of the gradient. `"standard"`: the derivative of the bound. `"stl"`: sticking the landing (Roeder et al.,
            2017): of log q, only what comes by way of z; biased for K > 1. `"dreg"`: doubly reparameterized (Tucker et al.,
            2019): without bias, and its signal does not fade as K grows. Where q is the posterior, the encoder's gradients by
            these two are 0 for all noise. They have no second derivatives, and `"dreg"` cannot be compiled.
        chunk: as in `ELBO`.
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
