"""Running a decoder a second time as it ran the first: random states and autocast as they were, statistics left alone."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CodeType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import get_device_states, set_device_states

from .graph import graph_nodes


def autocast_kinds(kind: str) -> set[str]:
    """The kinds of devices whose autocast counts beside tensors on this one; meta tensors have none."""
    return {kind, "cpu"} if torch.amp.is_autocast_available(kind) else {"cpu"}


@contextlib.contextmanager
def autocast_without_cache(kind: str) -> Iterator[None]:
    """Autocast as it is, but each use of a weight casts it: a cast that is kept belongs to the graph of the run that made it,
    and one that was made without a graph would have none for whoever comes next."""
    with contextlib.ExitStack() as stack:
        for device in autocast_kinds(kind):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False))
        yield


class Replay:
    """What a decoder's runs depend on beside tensors: the autocast of this moment, and the random states of those in which it
    draws numbers, to be had again as `torch.utils.checkpoint` does it. Where it draws none, no state is touched, from which
    other threads may draw meanwhile."""

    def __init__(self, like: Tensor, generator: torch.Generator | None) -> None:
        self.kind, self.generator, self.probe = like.device.type, generator, like.new_empty(0)
        self.devices, _ = get_device_states(self.probe)
        self.states: list[list[Tensor] | None] = []  # before each of the first runs; None where it drew nothing
        kinds = autocast_kinds(self.kind)
        self.autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}

    def _now(self) -> list[Tensor]:
        own = [] if self.generator is None else [self.generator.get_state()]
        return [torch.get_rng_state(), *own, *get_device_states(self.probe)[1]]

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """A first run, the next one."""
        before = self._now()
        yield
        is_same = all(torch.equal(*pair) for pair in zip(before, self._now(), strict=True))
        self.states.append(None if is_same else before)

    @contextlib.contextmanager
    def again(self, run: int) -> Iterator[None]:
        """That run again. Afterwards all is as it was before."""
        with contextlib.ExitStack() as stack:
            if (states := self.states[run]) is not None:
                kind = {} if self.kind == "cpu" else {"device_type": self.kind}
                stack.enter_context(torch.random.fork_rng(self.devices, **kind))
                of_cpu, *states = states
                torch.set_rng_state(of_cpu)
                if self.generator is not None:
                    stack.callback(self.generator.set_state, self.generator.get_state())
                    self.generator.set_state(states.pop(0))
                set_device_states(self.devices, states, **kind)
            for device, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(device):  # compiled code would see even that it is switched off twice
                    stack.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
            yield


class Modules:
    """The modules that a decoder consists of, as far as can be seen: it is one, or refers to some."""

    def __init__(self, decoder: Callable) -> None:
        self.modules = list(dict.fromkeys(module for root in _roots(decoder) for module in root.modules()))
        self.buffers = [
            (module, name, buffer, buffer._version)
            for module in self.modules
            if not isinstance(module, _NormBase)
            for name, buffer in module.named_buffers(recurse=False)
            if not buffer.is_inference()
        ]
        self.modes, self.constants = [], []

    def first_run(self, outputs: Iterable[Tensor], stop) -> None:
        """To be called after a first run that ended in `outputs`: raises for what a second run would change or find changed."""
        changed = [
            f"{type(module).__name__}.{name}"
            for module, name, buffer, version in self.buffers
            if buffer._version != version or module._buffers.get(name) is not buffer
        ]
        if changed:
            raise RuntimeError(
                "decoder must be the same at every call, to be run again in backward, but its call changes"
                f" {', '.join(changed)}: put it in eval mode, or pass chunk=n_samples, which runs it once"
            )
        self._check_norms(outputs, stop)
        self.modes = [(module, module.training) for module in self.modules]
        fixed = (p for module in self.modules for p in module.parameters(recurse=False) if not p.requires_grad)
        used = (b for m in self.modules if not (m.training and isinstance(m, _NormBase)) for b in m.buffers(recurse=False))
        self.constants = [(t, t._version) for t in (*fixed, *used) if not t.is_inference()]

    def _check_norms(self, outputs: Iterable[Tensor], stop) -> None:
        norms = [module for module in self.modules if isinstance(module, _NormBase) and module.track_running_stats]
        if not all(isinstance(module, _BatchNorm) for module in norms):
            return  # an instance normalization's graph has copies of its statistics
        known = {buffer.data_ptr() for module in norms for buffer in module.buffers()}
        for node in graph_nodes([t.grad_fn for t in outputs], stop):
            if "BatchNorm" in node.name() and getattr(node, "_saved_training", False):
                mean = getattr(node, "_saved_running_mean", None)
                if mean is not None and mean.data_ptr() not in known:
                    raise RuntimeError(
                        "decoder has a batch normalization in training mode whose statistics a second run in backward would"
                        " move again, and whose module is out of sight: pass as decoder the module or a method of it, put it in"
                        " eval mode, or pass chunk=n_samples, which runs it once"
                    )

    def second_run(self) -> None:
        """To be called before a second run: raises for what has been changed since the first one."""
        for module, training in self.modes:
            if module.training != training:
                was, now = ("train", "eval")[not training], ("train", "eval")[not module.training]
                raise RuntimeError(
                    f"the decoder of fastelbo.elbo was in {was} mode and is in {now} mode now, in backward, which runs it"
                    " again: switch afterwards, or pass chunk=n_samples"
                )
        if any(t._version != version for t, version in self.constants):
            raise RuntimeError(CHANGED)

    @contextlib.contextmanager
    def statistics_held(self) -> Iterator[None]:
        """Running statistics, which a first run has moved, stay where they are."""
        held = []
        for module in self.modules:
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                name, value = ("track_running_stats", False) if isinstance(module, _BatchNorm) else ("momentum", 0.0)
                held.append((module, name, getattr(module, name)))
                setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, value in held:
                setattr(module, name, value)


CHANGED = (
    "a tensor that the decoder of fastelbo.elbo uses was written to between the call and its backward pass, which runs the"
    " decoder again: step the optimizer afterwards, or pass chunk=n_samples"
)


def check_alike_again(before: Tensor, again: Tensor, dtype: torch.dtype) -> None:
    """Raise where a second run, of predictions in `dtype`, ended in other values than the first one did. On a GPU that would
    take a sync."""
    if before.device.type != "cpu" or not before.numel():
        return
    largest = before.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    # What rounding may change: a layer may compute otherwise without gradients. Terms may cancel, so that a small value has no
    # more digits than a large one.
    tolerance = torch.finfo(dtype).eps ** 0.5 * (1 + largest)
    if not torch.allclose(again, before, rtol=0.0, atol=tolerance, equal_nan=True):
        raise RuntimeError(
            "the decoder of fastelbo.elbo returned other values in backward, which runs it again, than in the call: it uses"
            " something that has changed since then, or noise that does not come from Torch; pass chunk=n_samples, which runs"
            " it once"
        )


# Of what a decoder refers to, how far is looked: from a closure to an object to a list in it, and no longer lists than that.
DEPTH, LENGTH = 4, 256


def _roots(value, depth: int = 0) -> Iterator[nn.Module]:
    """The modules that something is or refers to."""
    if isinstance(value, nn.Module):
        yield value
        return
    if depth == DEPTH:
        return
    if isinstance(value, functools.partial):
        found = value.func, *value.args, *value.keywords.values()
    elif inspect.ismethod(value):
        found = (value.__self__, value.__func__)
    elif inspect.isfunction(value):
        cells = (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        found = *cells, *(value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__)
    elif isinstance(value, list | tuple | set | dict):
        found = () if len(value) > LENGTH else value.values() if isinstance(value, dict) else value
    elif inspect.ismodule(value) or inspect.isclass(value) or isinstance(value, Tensor):
        found = ()
    else:
        found = list(vars(value).values()) if hasattr(value, "__dict__") else ()
    for inner in found:
        yield from _roots(inner, depth + 1)


def _is_filled(cell) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that is assigned later
        return False


def _names(code: CodeType) -> Iterator[str]:
    """What a function and those within it take from outside by name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
