"""The autograd graph that a decoder has built, seen from outside: which leaves it has, and whether it can be built again."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from ..basics.tracing import is_wrapper


def decoder_leaves(outputs: Sequence[Tensor], z: GradientEdge) -> list[Tensor] | None:
    """The leaves, z aside, of the graph from z to `outputs`; None where a Function that builds it again cannot hold it.

    That is so where the graph reaches into an older one, which the outer one may need as well; where a leaf has hooks, which
    would run for every chunk; and where an autograd Function in it is written in Python, since that may hide leaves (a
    reentrant checkpoint), or count on the gradients of its leaves being there when it has run (FSDP2, DDP with a static graph)
    or when all of backward has (FSDP1). Compiled code is such a Function, and can be built again.
    """
    # Nodes are numbered as they are made, by each thread: what lies outside these bounds is not the decoder's.
    oldest, newest = z.node._sequence_nr(), max((o.grad_fn._sequence_nr() for o in outputs), default=0)
    leaves = []
    for node in graph_nodes([o.grad_fn for o in outputs], z.node):
        if node.name() == "torch::autograd::AccumulateGrad":
            leaf = node.variable
            if leaf._backward_hooks or "_is_flat_param" in leaf.__dict__ or is_wrapper(leaf):  # FSDP1's and 2's
                return None
            leaves.append(leaf)
        else:
            is_older = not oldest <= node._sequence_nr() <= newest
            is_python = isinstance(node, BackwardCFunction) and node.name() != "CompiledFunctionBackward"
            if is_older or is_python:
                return None
    return leaves


def graph_nodes(todo: list, stop=None) -> Iterator:
    """The nodes from which those of `todo` were computed, and these; as far as `stop`."""
    seen = {None, stop}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(following for following, _ in node.next_functions)
