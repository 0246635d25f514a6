"""The autograd graph that a decoder has built, seen from outside: which leaves it has, and whether a Function can hold it."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from ..basics.tracing import is_wrapper


def decoder_leaves(outputs: Sequence[Tensor], z: GradientEdge, *, rebuilt: bool = False) -> list[Tensor] | None:
    """The leaves, z aside, of the graph from z to `outputs`; None where a Function cannot hold that graph.

    That is so where an output is a leaf itself, or none has a graph; where the graph reaches into an older one, which the outer
    one may need as well; where a leaf has hooks, which would run twice; and where an autograd Function in it is written in
    Python, since that may hide leaves (a reentrant checkpoint), or count on the gradients of its leaves being there when it has
    run (FSDP2, DDP with a static graph) or when all of backward has (FSDP1). Also where it shares a leaf with the graph behind
    z, into which its differentiation would go on; but not if it is `rebuilt` from a detached z, as compiled code can be.
    """
    # One loop each and no calls, which cost more than what they do. Nodes are numbered as they are made, by each thread: what
    # lies outside these bounds is not the decoder's.
    oldest, newest, todo = z.node._sequence_nr(), 0, []
    for output in outputs:
        if output.requires_grad:
            node = output.grad_fn
            if node is None:
                return None
            newest = max(newest, node._sequence_nr())
            todo.append(node)
    if not todo:
        return None if not rebuilt else []
    accumulators, seen = {}, {None, z.node}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == ACCUMULATES:
            leaf = node.variable
            if leaf._backward_hooks or "_is_flat_param" in leaf.__dict__ or (rebuilt and is_wrapper(leaf)):  # FSDP1's and 2's
                return None
            accumulators[node] = leaf
            continue
        if not oldest <= node._sequence_nr() <= newest:
            return None
        if isinstance(node, BackwardCFunction) and not (rebuilt and node.name() == "CompiledFunctionBackward"):
            return None
        for following, _ in node.next_functions:
            todo.append(following)
    if not rebuilt:
        for node, _ in z.node.next_functions:
            todo.append(node)
        while todo:
            node = todo.pop()
            if node in seen and node not in accumulators:
                continue
            if node in accumulators:
                return None
            seen.add(node)
            for following, _ in node.next_functions:
                todo.append(following)
    return list(accumulators.values())


ACCUMULATES = "torch::autograd::AccumulateGrad"


def graph_nodes(todo: list, stop=None) -> Iterator:
    """The nodes from which those of `todo` were computed, and these; as far as `stop`."""
    seen = {None, stop}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(following for following, _ in node.next_functions)
