"""Compute once what equal step counters give."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import StepContext

_copy = torch.ops.aten.copy_.default


@graph_pass(numerics="exact")
def share_counters(graph: fx.Graph, context: StepContext) -> int:
    """Read one of several counters that are equal now and change alike.

    Optimizers keep one step counter per parameter. Counters whose values are equal, and that are
    written with the same function of themselves, stay equal: all but the first are written only.
    ``context.equal`` says which placeholders hold equal numbers.
    """
    edits = 0
    for names in context.equal:
        places = [n for n in graph.find_nodes(op="placeholder") if n.meta["slot"].name in names]
        edits += _merge(graph, places)
    return edits


def _merge(graph: fx.Graph, places: list[fx.Node]) -> int:
    """Replace what is computed from the others by what is computed from the first."""
    if len(places) < 2:
        return 0
    first, *others = places
    order = list(graph.nodes)
    values: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = dict.fromkeys(others, first)
    for node in order:
        if _is_of_update(node):
            known = values.setdefault(_key(node, same), node)
            if known is not node:
                same[node] = known
    written = {n.args[0]: same.get(n.args[1], n.args[1]) for n in order if n.target is _copy}
    if len({written.get(place, place) for place in places}) > 1:
        return 0
    edits = 0
    for node, other in same.items():
        for user in list(node.users):
            if user.target is _copy and user.args[0] is node:
                continue  # the counter itself is still written
            user.replace_input_with(node, other)
            edits += 1
    return edits


def _is_of_update(node: fx.Node) -> bool:
    """Whether the node computes one number of the update, the same one for the same inputs."""
    value = node.meta.get("val")
    is_number = isinstance(value, torch.Tensor) and value.dim() == 0
    is_pure = ir.is_operator(node) and not ir.is_mutating(node) and not ir.is_random(node)
    return is_number and is_pure and node.meta.get("part") == "update"


def _key(node: fx.Node, same: dict[fx.Node, fx.Node]) -> Any:
    args = fx.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))
    return node.target, _frozen(args)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    # 0.0 and -0.0 are equal, and not the same; so are 1 and True.
    return (type(value), repr(value)) if isinstance(value, (int, float)) else value
