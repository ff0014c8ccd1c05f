"""Erase what nothing reads."""

from __future__ import annotations

from typing import cast

from torch import fx
from torch._ops import OpOverload

from mpgraph import ir
from mpgraph.pipeline import PassContext, graph_pass


@graph_pass(numerics="exact")
def remove_dead(graph: fx.Graph, context: PassContext) -> int:
    """Erase nodes without users that neither write, nor draw random numbers, nor assert.

    ``dropout`` whose result is unused stays: without it, every later random number changes. So
    does ``batch_norm``, which updates its running statistics.
    """
    edits = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and _is_pure(node):
            graph.erase_node(node)
            edits += 1
    return edits


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr" or (node.op == "placeholder" and "slot" in node.meta):
        return True  # the caller passes one value per placeholder that is left
    return (
        node.op == "call_function"
        and not node.is_impure()
        and not ir.is_mutating(node)
        and not ir.running_statistics(node)
        and not ir.is_higher_order(node)
        and not ir.is_random(node)
        and not _only_checks(node)
        and not _is_of_a_transform(node)
    )


def _is_of_a_transform(node: fx.Node) -> bool:
    """Whether the call opens or closes a function transform such as ``vmap``."""
    return str(getattr(node.target, "__module__", "")).startswith("torch._functorch")


def _only_checks(node: fx.Node) -> bool:
    """Whether the operator yields nothing, so that it can only be there for what it checks."""
    return ir.is_operator(node) and not cast(OpOverload, node.target)._schema.returns
