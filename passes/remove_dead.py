"""Erase what nothing reads."""

from __future__ import annotations

from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassContext, graph_pass
from mpgraph.step.slots import StepSlot


@graph_pass(numerics="exact")
def remove_dead(graph: fx.Graph, context: PassContext) -> int:
    """Erase nodes without users that neither write, nor draw random numbers, nor assert.

    ``dropout`` whose result is unused stays: without it, every later random number changes. So
    does ``batch_norm``, which updates its running statistics. A tensor of a step's batch stays: it
    is handed over whether or not the loss reads it.
    """
    edits = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and _is_pure(node):
            graph.erase_node(node)
            edits += 1
    return edits


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op == "placeholder":
        # The caller passes one value per placeholder that is left.
        return "slot" in node.meta and not _is_of_a_batch(node.meta["slot"])
    return (
        node.op == "call_function"
        and not node.is_impure()
        and not ir.is_mutating(node)
        and not ir.running_statistics(node)
        and not ir.is_higher_order(node)
        and not ir.is_random(node)
        and not ir.only_checks(node)
        and not _is_of_a_transform(node)
    )


def _is_of_a_batch(slot: object) -> bool:
    return isinstance(slot, StepSlot) and slot.kind == "input"


def _is_of_a_transform(node: fx.Node) -> bool:
    """Whether the call opens or closes a function transform such as ``vmap``."""
    return str(getattr(node.target, "__module__", "")).startswith("torch._functorch")
