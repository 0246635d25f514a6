"""What may surround a call that is not plain eager mode: compilers, dispatch modes, transformations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._subclasses import FakeTensor

_compiler, _forward_ad = torch.compiler, torch.autograd.forward_ad
_is_dynamo_compiling, _dispatch_modes, _is_in_transform = (
    torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
)  # fmt: skip

# Types of arguments behind which nothing else can be.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, float, int, type(None)))


def is_compiling() -> bool:
    """Whether torch.compile or torch.export traces a call: in Dynamo, or behind it, where Torch 2.11's own function does not
    say so."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and torch._guards.TracingContext.try_get() is not None


def is_behind_dynamo() -> bool:
    """Whether it traces a call that is one node of Dynamo's graph, and so takes Functions written in Python."""
    return is_compiling() and not torch.compiler.is_dynamo_compiling() and not is_transformed()


def is_surrounded() -> bool:
    """Whether torch.compile or a dispatch mode (fake tensors, counters) traces a call, torch.func transforms it, or it carries
    forward-mode tangents."""
    return (  # what `torch.compiler.is_compiling` asks, too; by short names, since to look for one takes as long as to call it
        _is_dynamo_compiling()
        or _compiler._is_compiling_flag
        or _dispatch_modes() > 0
        or _is_in_transform()
        or _forward_ad._current_level >= 0
    )


def is_traced(*values) -> bool:
    """Whether it is, or has tensors among its values that stand for others (DTensor, fake tensors)."""
    return is_surrounded() or (not _PLAIN.issuperset(map(type, values)) and any(map(is_wrapper, values)))


def is_seen(value: Tensor, *others: Tensor | None) -> bool:
    """Whether values are looked at: of eager calls on a CPU."""
    return value.device.type == "cpu" and not is_traced(value, *others)


def has_values(tensors: Sequence[Tensor]) -> bool:
    """Whether there are any to look at without a sync: of tensors on a CPU, none of them a fake one outside of its mode."""
    return all(t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in tensors)


def is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_wrapper(value) -> bool:
    """Whether it is a tensor whose operations are Python's, so that there may be no memory of its own behind it."""
    return isinstance(value, Tensor) and type(value).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def is_differentiated(upstreams: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass will itself be differentiated (create_graph), or is batched (is_grads_batched, vmap)."""
    if torch.is_grad_enabled() or is_transformed():
        return True
    return any(g is not None and _is_batched(g) for g in upstreams)


def has_symbolic_zeros(upstreams: Sequence[Tensor | None]) -> bool:
    """Whether a tensor's memory does not hold its values: some second derivatives are zeros without any, and views negate."""
    return any(g is not None and (g._is_zerotensor() or g.is_neg()) for g in upstreams)


def needs_formula(upstreams: Sequence[Tensor | None]) -> bool:
    """Whether an eager backward pass must be made of Torch operations."""
    if torch.is_grad_enabled() or is_surrounded():
        return True
    for g in upstreams:  # what the functions above ask, in one loop without calls
        if g is not None and (_is_batched(g) or g._is_zerotensor() or g.is_neg() or (type(g) is not Tensor and is_wrapper(g))):
            return True
    return False


_is_batched = torch._C._functorch.is_legacy_batchedtensor


def behind_upstream(upstream: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors, in the backward pass of a Function for the compiler. What does not depend on the upstream, it would write in
    forward, by a loop of its own, to read it again."""
    nothing = upstream - upstream
    return [t + nothing for t in tensors]


def never_compiled(function: Callable) -> Callable:
    """Keeps torch.compile out of a function and of all that it calls.

    A compiled function may run what was not traced with it, such as the backward pass of a loss from outside. Dynamo then looks
    into that frame by itself, and a graph break there cuts the formula off from its inputs, whose gradients vanish. This is
    what `torch.compiler.disable` does, without a second and more to import all of the compiler.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def constant_when_compiled(function: Callable) -> Callable:
    """Makes what a function returns a constant to torch.compile, which does not look inside: this is
    `torch.compiler.assume_constant_result`, again without the import."""
    function._dynamo_marked_constant = True
    return function
