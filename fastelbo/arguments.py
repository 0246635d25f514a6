"""Checks of what users pass: every error names the argument, what came and what was expected."""

from math import nan

import torch
from torch import Tensor

from .likelihoods import BY_NAME, BernoulliLogits, Categorical, DiscretizedLogisticMixture, Likelihood
from .scalars import check_integer, check_real
from .tracing import is_traced

REDUCTIONS = ("sum", "batchmean", "mean", "none")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_REALS = FLOATS + _INTEGERS


def check_prediction(name: str, value) -> None:
    """A floating-point tensor with a batch dimension."""
    check_floats(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must have the batch as its first dimension, got a 0-d tensor")


def check_floats(name: str, value) -> None:
    """A dense floating-point tensor."""
    check_dense(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def check_reals(name: str, value) -> None:
    """A dense tensor of real numbers."""
    check_dense(name, value)
    if value.dtype not in _REALS:
        raise TypeError(f"{name} must be a tensor of booleans, integers or floats of 16 to 64 bits, got {value.dtype}")


def check_dense(name: str, value) -> None:
    """A tensor of elements with strides, not a sparse, nested or packed one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:  # of nested ones, only the jagged have a layout of their own
        found = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {found}")


def check_alike(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same shape and device: nothing is broadcast."""
    if value.shape != other.shape:
        advice = f"; of one size, so {other_name}.view_as({name}) may be meant" if value.numel() == other.numel() else ""
        raise ValueError(
            f"{name} must have the shape of {other_name}:"
            f" got {name} {tuple(value.shape)} and {other_name} {tuple(other.shape)}{advice}"
        )
    check_device(name, value, other_name, other)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}: got {value.device} and {other.device}")


def check_latents(mu, logvar) -> None:
    check_prediction("mu", mu)
    check_prediction("logvar", logvar)
    check_alike("logvar", logvar, "mu", mu)


def check_generator(generator, mu: Tensor) -> None:
    """None, or one on the device of `mu`."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    device = generator.device
    if device.type != mu.device.type or device.index not in (None, mu.device.index):  # "cuda" stands for the current one
        raise ValueError(f"generator must be on the device of mu: got {generator.device} and {mu.device}")


def check_noise(eps, generator, mu: Tensor, n_samples: int | None = None) -> None:
    """Noise that is given: of the shape of `mu`, or behind a dimension of several samples."""
    if generator is not None:
        raise ValueError("give eps or generator, not both")
    check_prediction("eps", eps)
    if n_samples is None:
        check_alike("eps", eps, "mu", mu)
        return
    if eps.shape != (n_samples, *mu.shape):
        raise ValueError(
            f"eps must have the shape of mu behind a dimension of n_samples: got {tuple(eps.shape)}"
            f" and not {(n_samples, *mu.shape)}"
        )
    check_device("eps", eps, "mu", mu)


def check_count(name: str, value, expected: str = "an integer") -> int:
    value = check_integer(name, value, expected)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_batch(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape[:1] != other.shape[:1]:
        raise ValueError(
            f"{name} and {other_name} must have the same batch size, their first dimension:"
            f" got {name} {tuple(value.shape)} and {other_name} {tuple(other.shape)}"
        )


def find_likelihood(likelihood) -> Likelihood:
    """The likelihood that a name stands for, or the object that it is."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    found = BY_NAME.get(likelihood) if isinstance(likelihood, str) else None
    if found is None:
        names = ", ".join(map(repr, BY_NAME))
        raise ValueError(f"likelihood must be an object of fastelbo.likelihoods or one of {names}; got {likelihood!r}")
    return found


def unwrapped(recon_x):
    """The tensor alone of a tuple of one, which is what decoders return that always return a tuple."""
    return recon_x[0] if isinstance(recon_x, tuple | list) and len(recon_x) == 1 else recon_x


def check_parameters(name: str, recon_x, likelihood: Likelihood, scale) -> list[Tensor]:
    """The tensors that parametrize a likelihood, from a tensor or a tuple of them; the first has the full shape."""
    names = likelihood.parameters
    given = list(recon_x) if isinstance(recon_x, tuple | list) else [recon_x]
    fixed = isinstance(likelihood, BernoulliLogits) or getattr(likelihood, "scale", None) == "optimal"
    expected = {1} if fixed else {1, 2} if names == ("mean", "scale") else {len(names)}
    if len(given) not in expected:
        needed = " or ".join(sorted("a tensor" if n == 1 else f"the tuple ({', '.join(names)})" for n in expected))
        raise ValueError(f"{name} must be {needed} for the likelihood {likelihood.name!r}, got {len(given)} tensors")
    for i, value in enumerate(given):
        label = name if len(given) == 1 else f"{name}[{i}]"
        if i == 0:
            check_prediction(label, value)
        else:
            _check_smaller(label, value, f"{name}[0]", given[0])
    first = given[0]
    if len(given) == 1 and 2 in expected:
        given.append(_as_parameter(check_scale(scale, likelihood, first), first))
    elif scale is not None:
        check_scale(scale, likelihood, first)  # where there is none
        raise ValueError(f"give scale, or {name} as a tuple, not both")
    if isinstance(likelihood, BernoulliLogits) and likelihood.pos_weight is not None:
        weight = likelihood.pos_weight
        if isinstance(weight, Tensor):
            _check_smaller("pos_weight", weight, name, first)
        given.append(_as_parameter(weight, first))
    return given


def _as_parameter(number: float | Tensor, like: Tensor) -> Tensor:
    """A number has no say in the dtype of results, be it in a 0-d tensor."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(number, Tensor):
        return number.to(like.device, number.dtype if number.dim() else dtype)
    return torch.full((), number, dtype=dtype, device=like.device)


def _check_smaller(name: str, value, other_name: str, other: Tensor) -> None:
    """A floating-point tensor that broadcasts to `other`."""
    check_floats(name, value)
    _check_broadcasts(name, value, other_name, other.shape)
    if value.dim() > 0 or value.device.type != "cpu":
        check_device(name, value, other_name, other)


def _check_broadcasts(name: str, value: Tensor, other_name: str, shape: torch.Size) -> None:
    fits = value.dim() <= len(shape) and all(n in (1, m) for n, m in zip(reversed(value.shape), reversed(shape), strict=False))
    if not fits:
        raise ValueError(f"{name} must broadcast to {other_name}: got {name} {tuple(value.shape)} and {tuple(shape)}")


def check_fits(name: str, parameters: list[Tensor], x: Tensor, likelihood: Likelihood) -> None:
    """Parameters and target fit together."""
    first = parameters[0]
    if isinstance(likelihood, DiscretizedLogisticMixture):
        _check_mixture(name, first, x, likelihood)
    elif isinstance(likelihood, Categorical) and x.dim() == first.dim() - 1:
        dim = _check_dim(likelihood, first)
        if x.is_floating_point():
            raise TypeError(f"x must be of an integer dtype for labels, got {x.dtype}")
        expected = first.shape[:dim] + first.shape[dim + 1 :]
        if x.shape != expected:
            raise ValueError(
                f"x must have the shape of {name} without its dimension {dim} of classes, {tuple(expected)}, or that of {name},"
                f" {tuple(first.shape)}; got {tuple(x.shape)}"
                + ("; for classes that come last, use likelihoods.Categorical(dim=-1)" if x.shape == first.shape[:-1] else "")
            )
    else:
        if hasattr(likelihood, "dim"):
            _check_dim(likelihood, first)
        check_alike(name, first, "x", x)
    check_device(name, first, "x", x)


def _check_dim(likelihood: Likelihood, first: Tensor) -> int:
    if not -first.dim() < likelihood.dim < first.dim() or likelihood.dim % first.dim() == 0:
        raise ValueError(
            f"{type(likelihood).__name__}.dim must be a dimension of recon_x {tuple(first.shape)} other than the batch,"
            f" got {likelihood.dim}"
        )
    return likelihood.dim % first.dim()


def _check_mixture(name: str, first: Tensor, x: Tensor, likelihood: DiscretizedLogisticMixture) -> None:
    dim, last = _check_dim(likelihood, first), x.shape[:-1] == first.shape[:-1]
    if x.dim() != first.dim() or any(n != m for d, (n, m) in enumerate(zip(x.shape, first.shape, strict=True)) if d != dim):
        raise ValueError(
            f"x must have the shape of {name} but for dimension {dim}, its channels:"
            f" got {name} {tuple(first.shape)} and x {tuple(x.shape)}"
            + ("; for channels that come last, use likelihoods.DiscretizedLogisticMixture(dim=-1)" if last else "")
        )
    channels, found = x.shape[dim], first.shape[dim]
    each = 10 if channels == 3 else 1 + 2 * channels
    if found % each or found == 0:
        raise ValueError(
            f"{name} must have {each} parameters a component for {channels} channels, along dimension {dim}: got {found} in all"
        )


def check_weight(weight, x: Tensor, dim: int | None) -> Tensor | None:
    """Weights that broadcast to `x`, with as many dimensions; without `dim`, its classes or channels, which share one."""
    if weight is None:
        return None
    check_reals("weight", weight)
    _check_broadcasts("weight", weight, "x", x.shape)
    check_device("weight", weight, "x", x)
    weight = weight.reshape((1,) * (x.dim() - weight.dim()) + weight.shape)
    if dim is None:
        return weight
    if weight.shape[dim] != 1:
        raise ValueError(
            f"weight must have 1 element along dimension {dim} of x, which has one term; got {tuple(weight.shape)}"
        )
    return weight.squeeze(dim)


def check_reduction(reduction) -> str:
    """One name of `REDUCTIONS`."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}; got {reduction!r}")
    return reduction


def split_reduction(reduction) -> tuple[str, str]:
    """The reductions of reconstruction and KL, from one name or a pair."""
    if not isinstance(reduction, tuple | list):
        return (check_reduction(reduction),) * 2
    if len(reduction) != 2:
        raise ValueError(f"reduction must be a name or a pair (reconstruction, kl); got {reduction!r}")
    recon, kl = map(check_reduction, reduction)
    if "none" in (recon, kl):
        raise ValueError(f"reduction 'none' cannot be paired: give the name alone; got {reduction!r}")
    return recon, kl


def factor_of(reduction: str, value: Tensor) -> float:
    """The factor that makes the sum over `value` the reduction; NaN for a mean over nothing, as in Torch."""
    if reduction == "batchmean":
        count = value.shape[0]
    elif reduction == "mean":
        count = value.numel()
    else:
        return 1.0
    return 1 / count if count else nan


def check_number(name: str, value, like: Tensor) -> float | Tensor:
    """A real number as a float, a real 0-d tensor as it is; as a float, too, if it lies on the CPU and wants no gradient."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        check_reals(name, value)
        if value.device.type != "cpu" and value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} or on the CPU, got {value.device}")
        if value.device.type == "cpu" and not value.requires_grad and not is_traced(value):
            return float(value)
        return value
    return check_real(name, value, "a number or a 0-d tensor")


def check_scale(scale, likelihood: Likelihood, like: Tensor | None = None) -> float | Tensor:
    """The scale of a likelihood that has one, 1 if not given. A tensor must be near `like`."""
    kind = getattr(likelihood, "scale", "scale" if likelihood.name in ("gaussian", "laplace") else None)
    if scale is None:
        return 0.0 if kind in ("log_scale", "logvar") else 1.0
    if kind is None:
        raise ValueError(f"scale is for the likelihoods 'gaussian' and 'laplace'; got it with {likelihood.name!r}")
    if kind == "optimal":
        raise ValueError("scale must not be given to a Gaussian whose scale is 'optimal'")
    if isinstance(scale, Tensor) and scale.dim() > 0:
        _check_smaller("scale", scale, "recon_x", like)
        return scale
    scale = check_number("scale", scale, like)
    if not isinstance(scale, Tensor) and kind == "scale" and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale
