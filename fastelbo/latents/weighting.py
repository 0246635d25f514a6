"""What of the KL enters the objective: free bits, capacity, balance, and a beta for each dimension."""

from collections.abc import Sequence

from torch import Tensor

from ..basics.arguments import REDUCTIONS, broadcasts, check_device, check_number, check_reals, check_reduction
from ..basics.records import Record, canonical, check_choice, record
from ..basics.scalars import check_real

FREE_BITS_PER = ("element", "dimension", "channel", "sample", "batch")
CAPACITY_PER = ("batch", "sample")


@record
class Weighting(metaclass=Record):
    """What of the KL enters the loss: free bits, a capacity, or balanced gradients, in nats. Pass it as `weighting=`; None and
    `Weighting()` are the same, all of the KL. It is frozen and compared by value.

    The loss has beta times what the weighting makes of the KL; `kl` in its results is the KL itself. `kl_divergence` and
    `sample_kl` return what the weighting makes of it, for the loss that it is added to. B samples b have latent dimensions d;
    of categorical latents, groups.

    Args:
        free_bits: lambda: a KL below it counts as lambda and has no gradient. None: no free bits.
        free_bits_per: what the lambda is for. `"element"`: the sum over b and d of max(lambda, KL_bd). `"dimension"`: the sum
            over d of max(lambda, mean over b of KL_bd), the objective of Kingma et al. (Improved Variational Inference with
            Inverse Autoregressive Flow, 2016) with a group for each dimension. `"channel"`: likewise, with a group for each
            channel of `[B, C, ...]`, as in their code. `"sample"`: the sum over b of max(lambda, KL_b), the free nats of
            DreamerV3 (Hafner et al., 2023). `"batch"`: max(lambda, mean over b of KL_b), those of DreamerV1 and V2 (Hafner et
            al., 2020, 2021).
        capacity: C: the KL is drawn to it by |KL - C| (Burgess et al., Understanding disentangling in beta-VAE, 2018), whose
            gamma is beta here. A number, or a 0-d tensor, which may change from step to step. None: no capacity.
        capacity_per: `"batch"`: |mean over b of KL_b - C|. `"sample"`: the mean over b of |KL_b - C|, as pythae's
            DisentangledBetaVAE.
        balance: (a, b): a KL(q || sg(p)) + b KL(sg(q) || p), where sg stops the gradient. The value is a + b times the KL, or
            times what free bits or capacity make of it; the gradients by the posterior q and the prior p are a and b times
            theirs. It needs a prior. DreamerV2 (Hafner et al., 2021) has (0.2, 0.8); DreamerV3's code (0.1, 1.0), its `rep` and
            `dyn`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, negative or unknown, or both free bits and a capacity came.
    """

    free_bits: float | None = None
    free_bits_per: str = "element"
    capacity: float | Tensor | None = None
    capacity_per: str = "batch"
    balance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_choice("Weighting.free_bits_per", self.free_bits_per, FREE_BITS_PER)
        check_choice("Weighting.capacity_per", self.capacity_per, CAPACITY_PER)
        if self.free_bits is not None and self.capacity is not None:
            raise ValueError("Weighting.free_bits and Weighting.capacity exclude each other: give one of them")
        canonical(self, "free_bits", _checked_free_bits)
        canonical(self, "capacity", _checked_capacity)
        canonical(self, "balance", _checked_balance)


def _checked_free_bits(name: str, free_bits) -> float | None:
    if free_bits is None:
        return None
    free_bits = check_real(name, free_bits, "a number or None")
    if not free_bits >= 0:
        raise ValueError(f"{name} must not be negative, got {free_bits}")
    return free_bits


def _checked_capacity(name: str, capacity) -> float | Tensor | None:
    if capacity is None:
        return None
    if isinstance(capacity, Tensor):  # kept, since its value may change from step to step
        return _checked_tensor(name, capacity)
    capacity = check_real(name, capacity, "a number or a 0-d tensor")
    if not capacity >= 0:
        raise ValueError(f"{name} must not be negative, got {capacity}")
    return capacity


def _checked_tensor(name: str, capacity: Tensor) -> Tensor:
    check_reals(name, capacity)
    if capacity.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(capacity.shape)}")
    return capacity


def _checked_balance(name: str, balance) -> tuple[float, ...] | None:
    if balance is None:
        return None
    if not isinstance(balance, tuple | list) or len(balance) != 2:
        raise ValueError(f"{name} must be a pair (posterior, prior) of numbers; got {balance!r}")
    balance = tuple(check_real(f"{name}[{i}]", share) for i, share in enumerate(balance))
    if not (min(balance) >= 0 and sum(balance) > 0):
        raise ValueError(f"{name} must be two numbers that are not negative, and not both 0; got {balance}")
    return balance


ALL = Weighting()


def shares_of(weighting: Weighting) -> tuple[float, tuple[float, float] | None]:
    """What the balance makes the KL times, and the shares of it, 1 in all, that go to the posterior and to the prior."""
    if weighting.balance is None:
        return 1.0, None
    total = sum(weighting.balance)
    return total, (weighting.balance[0] / total, weighting.balance[1] / total)


# What free bits can be for, where the KL keeps dimensions; no capacity can.
FREE_BITS_OF = {"dimension": ("element", "dimension"), "element": ("element",)}


def check_weighting(
    weighting, mu: Tensor, has_prior: bool, beta: float | Tensor, reduction: str, reductions: Sequence[str] = REDUCTIONS
) -> Weighting:
    """A `Weighting` that goes with the rest of the call; None stands for the KL as it is."""
    if weighting is None:
        return ALL
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be a Weighting, got {type(weighting).__name__}")
    check_reduction(reduction, reductions)
    each = is_of_each(beta)
    if reduction in FREE_BITS_OF and weighting.capacity is not None:
        raise ValueError(f"Weighting.capacity is about whole samples: reduction {reduction!r} has no place for it")
    if weighting.free_bits is not None:
        per = weighting.free_bits_per
        if per not in FREE_BITS_OF.get(reduction, FREE_BITS_PER):
            raise ValueError(f"Weighting.free_bits_per={per!r} sums over more than reduction {reduction!r} leaves apart")
        if each and per not in ("element", "dimension"):
            raise ValueError(f"Weighting.free_bits_per={per!r} needs a beta that is one number, not one for each dimension")
        if reduction == "none" and per not in ("element", "sample"):
            raise ValueError(f"Weighting.free_bits_per={per!r} is about the batch: reduction 'none' has no place for it")
    if weighting.capacity is not None:
        capacity = check_number("Weighting.capacity", weighting.capacity, mu)
        if not isinstance(capacity, Tensor) and not capacity >= 0:
            raise ValueError(f"Weighting.capacity must not be negative, got {capacity}")
        if each:
            raise ValueError("Weighting.capacity needs a beta that is one number, not one for each dimension")
        if reduction == "none" and weighting.capacity_per == "batch":
            raise ValueError("Weighting.capacity_per='batch' is about the batch: with reduction 'none', use 'sample'")
    if weighting.balance is not None and not has_prior:
        raise ValueError("Weighting.balance needs a prior: the standard normal one has no gradient to balance")
    return weighting


def counts_of(per: str, weight: Tensor | None, mu: Tensor, dtype) -> float | Tensor:
    """How often each group of elements counts: once for each sample that it has, or by the samples' weights."""
    if weight is None:
        return 1.0 if per in ("element", "sample") else mu.shape[0]
    weight = weight.to(dtype).reshape([1] * (mu.dim() - weight.dim()) + list(weight.shape))
    if per in ("element", "dimension"):
        weight = weight.expand(mu.shape)
    else:
        shared = 2 if per == "channel" else 1
        if any(n != 1 for n in weight.shape[shared:]):
            one = "channel of a sample" if per == "channel" else "sample"
            advice = "; reduction=PerSample(batch_dims=2) makes a sample of each time step" if per == "sample" else ""
            raise ValueError(
                f"kl_weight must have one number for each {one} with a weighting per {per!r}:"
                f" got shape {tuple(weight.shape)}{advice}"
            )
        weight = weight.flatten(shared).squeeze(-1) if mu.dim() > shared else weight
        weight = weight.expand(mu.shape[:shared])
    return weight if per in ("element", "sample") else weight.sum(0)


def is_of_each(beta) -> bool:
    """Whether it has a weight for each latent dimension."""
    return isinstance(beta, Tensor) and beta.dim() > 0


def check_beta(beta, mu: Tensor) -> float | Tensor:
    """A number, a 0-d tensor, or a tensor that broadcasts to `mu.shape[1:]`: one for each latent dimension or group of them."""
    if not is_of_each(beta):
        return check_number("beta", beta, mu)
    check_reals("beta", beta)
    check_device("beta", beta, "mu", mu)
    if not broadcasts(beta, mu.shape[1:]):
        raise ValueError(
            "beta must be a number, a 0-d tensor or a tensor that broadcasts to a sample of mu:"
            f" got beta {tuple(beta.shape)} and mu {tuple(mu.shape)}; kl_weight takes weights of samples and elements"
        )
    return beta.expand(mu.shape[1:])
