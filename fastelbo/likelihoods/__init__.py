"""The likelihoods p(x | z): what a decoder's output parametrizes.

Wherever a likelihood is asked for, a name stands for one with its defaults, and an object of this module for one with options
of its own. A likelihood of several parameters takes them as a tuple in place of `recon_x`, in the order given here; all but the
first may be smaller, as long as they broadcast to its shape: a 0-d tensor, a number a channel `[C, 1, 1]`, a number a feature
`[G]`. A number stands for a 0-d tensor, which is made at every call: one that stays belongs to the object where it has a field
for it.

| name | object | `recon_x` |
|---|---|---|
| `"bernoulli"` | `Bernoulli` | probabilities |
| `"bernoulli_logits"` | `BernoulliLogits` | logits, or (logits, weights of the positive part) |
| `"mse"`, `"l1"` | `MSE`, `L1` | values |
| `"gaussian"` | `Gaussian` | mean, or (mean, scale) |
| `"laplace"` | `Laplace` | mean, or (mean, scale) |
| | `StudentT` | mean, or (mean, scale) |
| `"categorical"` | `Categorical` | logits, with a dimension of classes |
| `"multinomial"` | `Multinomial` | logits, with a dimension of items |
| `"poisson"`, `"poisson_log"` | `Poisson`, `PoissonLog` | rate, or its logarithm |
| `"negative_binomial"` | `NegativeBinomial` | (mean, inverse dispersion) |
| `"zero_inflated_negative_binomial"` | `ZeroInflatedNegativeBinomial` | (mean, inverse dispersion, logits of the extra zeros) |
| `"discretized_logistic"` | `DiscretizedLogistic` | (mean, log scale) |
| `"discretized_logistic_mixture"` | `DiscretizedLogisticMixture` | all parameters of the mixture, along one dimension |
| `"continuous_bernoulli"` | `ContinuousBernoulli` | probabilities |
| `"continuous_bernoulli_logits"` | `ContinuousBernoulliLogits` | logits |

All are negative log-likelihoods in nats with their constants, so that they can be compared with others and be turned into bits;
but for `"mse"` and `"l1"`, which are no densities, and `"multinomial"`, without the coefficient that only the data determine.

Each has `target_scale`, 1 by default: `x` is multiplied by it, such as 1/255 for `uint8` images. The discretized logistics have
`interval` on top of it, where the values of a floating `x` lie then, and take an `x` of integers as the levels that these are.

`Poisson`, `NegativeBinomial` and `ZeroInflatedNegativeBinomial` have a `mean`, the link that makes it of what comes, and the
last two an `inverse_dispersion`. With `mean="softmax"` the library comes behind the other tensors.

A target that is mostly zeros may be a matrix `[B, G]` of the layout `torch.sparse_csr` for both kinds of Bernoulli, of Poisson
and of negative binomial, the zero-inflated one included, and for `Multinomial`.

A distribution of `torch.distributions` in the place of `recon_x` brings its likelihood with it, and its own constants: a
`Multinomial` its coefficient, a `NegativeBinomial` no 1e-8. Two conventions stay those of the table: a `Bernoulli` of
probabilities clamps logarithms at -100, where Torch keeps probabilities from 0 and 1, and takes gray values; a `Categorical`
ignores the label -100.

A likelihood of your own is a subclass of `Likelihood` with its formula, `nll`.
"""

import ast
import functools

from ..basics.records import record
from .base import Likelihood
from .bernoulli import Bernoulli, BernoulliLogits, ContinuousBernoulli, ContinuousBernoulliLogits
from .classes import Categorical, Multinomial
from .counts import NegativeBinomial, ZeroInflatedNegativeBinomial
from .errors import L1, MSE
from .location import Gaussian, Laplace, StudentT
from .logistic import DiscretizedLogistic, DiscretizedLogisticMixture
from .poisson import Poisson, PoissonLog
from .values import Range

__all__ = [
    "L1",
    "MSE",
    "Bernoulli",
    "BernoulliLogits",
    "Categorical",
    "ContinuousBernoulli",
    "ContinuousBernoulliLogits",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "Laplace",
    "Likelihood",
    "Multinomial",
    "NegativeBinomial",
    "Poisson",
    "PoissonLog",
    "Range",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "record",
]

_KINDS: dict[str, type[Likelihood]] = {
    kind.name: kind for kind in map(globals().__getitem__, __all__) if kind not in (Likelihood, Range, record)
}

BY_NAME: dict[str, Likelihood] = {name: kind() for name, kind in sorted(_KINDS.items()) if kind.has_defaults}
"""The likelihood that a name stands for."""


def find_likelihood(likelihood: str | Likelihood | None) -> Likelihood:
    """The likelihood that a name stands for, or the object that it is; None: Bernoulli's."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood is None:
        return BY_NAME["bernoulli"]
    found = BY_NAME.get(likelihood) if isinstance(likelihood, str) else None
    if found is None:
        names = ", ".join(map(repr, BY_NAME))
        raise ValueError(f"likelihood must be an object of fastelbo.likelihoods or one of {names}; got {likelihood!r}")
    return found


def code_of(likelihood: Likelihood) -> tuple[str, list[float]] | None:
    """A likelihood of this module as a string and the numbers in it, from which `likelihood_of` makes it again, in another
    process too. They are apart since to torch.compile a number may be a symbol, for which what it compiles holds as well."""
    kind = type(likelihood)
    if _KINDS.get(likelihood.name) is not kind:
        return None
    numbers: list[float] = []

    def emptied(value):
        if isinstance(value, tuple):
            return tuple(map(emptied, value))
        if not isinstance(value, int | float):
            return value
        numbers.append(value)
        return 0

    return likelihood.name + repr([emptied(getattr(likelihood, field)) for field in kind.field_names]), numbers


@functools.lru_cache
def likelihood_of(code: str, numbers: tuple[float, ...]) -> Likelihood:
    name, values = code[:-1].split("[")
    given = iter(numbers)

    def filled(value):
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return next(given) if value == 0 else value

    found = map(filled, ast.literal_eval(f"[{values}]"))
    return _KINDS[name](**dict(zip(_KINDS[name].field_names, found, strict=True)))
