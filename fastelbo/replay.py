"""Running a decoder a second time as it ran the first: random states and autocast as they were, statistics left alone."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import get_device_states, set_device_states

from .graph import graph_nodes


class Replay:
    """The random states and the autocast of this moment, to be had again, as `torch.utils.checkpoint` does it."""

    def __init__(self, like: torch.Tensor, generator: torch.Generator | None) -> None:
        self.kind = like.device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.states = get_device_states(like)
        self.generator = None if generator is None else generator.clone_state()
        self.autocast = [
            {
                "device_type": kind,
                "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind),
                "cache_enabled": False,  # a cast weight that is kept belongs to the graph of the run that cast it
            }
            for kind in {self.kind, "cpu"}
        ]

    @contextlib.contextmanager
    def again(self) -> Iterator[torch.Generator | None]:
        """Gives the generator of that moment, if there was one. Afterwards all is as it was before."""
        with contextlib.ExitStack() as stack:
            kind = {} if self.kind == "cpu" else {"device_type": self.kind}
            stack.enter_context(torch.random.fork_rng(self.devices, **kind))
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.states, **kind)
            for options in self.autocast:
                stack.enter_context(torch.autocast(**options))
            yield None if self.generator is None else self.generator.clone_state()


class Modules:
    """The modules that a decoder consists of, as far as can be seen: it is one, or a method or closure of some."""

    def __init__(self, decoder: Callable) -> None:
        self.modules = list(dict.fromkeys(module for root in _roots(decoder) for module in root.modules()))
        self.versions = {
            f"{type(module).__name__}.{name}": (buffer, buffer._version)
            for module in self.modules
            if not isinstance(module, _NormBase)
            for name, buffer in module.named_buffers(recurse=False)
            if not buffer.is_inference()
        }

    def check(self, outputs: Iterable[torch.Tensor], stop) -> None:
        """Raise, after a first run that ended in `outputs`, for what a second run would change or find changed."""
        changed = [name for name, (buffer, version) in self.versions.items() if buffer._version != version]
        if changed:
            raise RuntimeError(
                "decoder must be the same at every call, to be run again in backward, but its call changes"
                f" {', '.join(changed)}: put it in eval mode, or pass chunk=n_samples, which runs it once"
            )
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


def _roots(decoder, seen: frozenset = frozenset()) -> Iterator[nn.Module]:
    """The modules that a callable is, or to which it refers by name."""
    if isinstance(decoder, nn.Module):
        yield decoder
    elif isinstance(decoder, functools.partial):
        for value in (decoder.func, *decoder.args, *decoder.keywords.values()):
            yield from _roots(value, seen)
    elif inspect.ismethod(decoder):
        yield from _roots(decoder.__self__, seen)
    elif inspect.isfunction(decoder) and decoder not in seen:
        found = inspect.getclosurevars(decoder)
        for value in (*found.nonlocals.values(), *found.globals.values()):
            yield from _roots(value, seen | {decoder})
