"""The autograd graph that a decoder has built, seen from outside: which leaves it has, and whether a Function can hold it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..basics.tracing import is_wrapper


def decoder_leaves(
    outputs: Sequence[Tensor], z: torch.autograd.graph.GradientEdge, *, rebuilt: bool = False
) -> list[Tensor] | None:
    """The leaves, z aside, of the graph from z to `outputs`; None where a Function cannot hold that graph.

    That is so where it reaches into an older graph, which the outer one may need as well; where a leaf has hooks, which would
    run twice; and where an autograd Function in it is written in Python, since that may hide leaves (a reentrant checkpoint),
    or count on the gradients of its leaves being there when it has run (FSDP2, DDP with a static graph) or when all of backward
    has (FSDP1). Also where it shares a leaf with the graph behind z, into which its differentiation would go on; but not if it
    is `rebuilt` from a detached z, which compiled code can be, too.
    """
    # Nodes are numbered as they are made, by each thread: what lies outside these bounds is not the decoder's.
    oldest, newest = z.node._sequence_nr(), max((t.grad_fn._sequence_nr() for t in outputs), default=0)
    accumulators = {}
    for node in graph_nodes([t.grad_fn for t in outputs], stop=z.node):
        if node.name() == "torch::autograd::AccumulateGrad":
            leaf = node.variable
            if leaf._backward_hooks or "_is_flat_param" in leaf.__dict__ or (rebuilt and is_wrapper(leaf)):  # FSDP1's and 2's
                return None
            accumulators[node] = leaf
        elif not oldest <= node._sequence_nr() <= newest or (
            isinstance(node, torch.autograd.function.BackwardCFunction)
            and not (rebuilt and node.name() == "CompiledFunctionBackward")
        ):
            return None
    if not rebuilt and any(node in accumulators for node in graph_nodes([node for node, _ in z.node.next_functions])):
        return None
    return list(accumulators.values())


def graph_nodes(todo: list, stop=None) -> Iterator:
    """The nodes from which those of `todo` were computed, and these; as far as `stop`."""
    seen = {None, stop}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(following for following, _ in node.next_functions)
