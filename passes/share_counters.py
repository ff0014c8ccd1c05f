"""Compute once what equal step counters give."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

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
    values: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = dict.fromkeys(others, first)
    order = list(graph.nodes)
    derived = {*places}
    for node in order:
        if node.op != "call_function" or node.target is _copy:
            continue
        if not _is_small(node):
            continue
        key = _key(node, same)
        if node in derived or any(same.get(a, a) in derived for a in node.all_input_nodes):
            derived.add(node)
        if key in values:
            same[node] = values[key]
        else:
            values[key] = node
    written = {n.args[0]: same.get(n.args[1], n.args[1]) for n in order if n.target is _copy}
    news = {written.get(place, place) for place in places}
    if len(news) > 1:
        return 0
    edits = 0
    for node, other in same.items():
        for user in list(node.users):
            if user.target is _copy and user.args[0] is node:
                continue  # the counter itself is still written
            user.replace_input_with(node, other)
            edits += 1
    return edits


def _is_small(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _key(node: fx.Node, same: dict[fx.Node, fx.Node]) -> Any:
    args = fx.map_arg((node.args, node.kwargs), lambda n: _Same(same.get(n, n)))  # type: ignore[arg-type,return-value]
    return node.target, _frozen(args)


class _Same:
    """A node as part of a key."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.node is other.node

    def __hash__(self) -> int:
        return hash(self.node)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value) if isinstance(value, (int, float)) else value
