"""Whether all that a graph writes are its inputs, each after everything that reads it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mpgraph import ir

aten = torch.ops.aten


def writes_last(graph: fx.Graph) -> bool:
    """Whether ``copy_`` into an input is the only write, once for each, behind all of its readers.

    Then the value that is copied is the input's next value, and nothing else in the graph changes
    without the copy. Views of an input read it too.
    """
    nodes = {node: index for index, node in enumerate(graph.nodes)}
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if node.target is aten.copy_.default and _is_plain_copy(node):
            place = node.args[0]
            if place in written or not _is_last(node, place, nodes):
                return False
            written.add(place)
        elif not is_number(node) and _may_write(node.target):
            return False
    return True


def _is_plain_copy(node: fx.Node) -> bool:
    place, value = node.args[:2]
    if not isinstance(place, fx.Node) or not isinstance(value, fx.Node) or node.users:
        return False
    new, old = value.meta["val"], place.meta["val"]
    is_same = new.dtype is old.dtype and tuple(new.shape) == tuple(old.shape)
    return place.op == "placeholder" and is_same


def _is_last(write: fx.Node, place: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether nothing reads a place, or a view of it, after it is written."""
    views, last = [place], 0
    for view in views:
        for reader in view.users:
            if reader is write:
                continue
            last = max(last, order[reader])
            if _is_view(reader.target) and reader not in views:
                views.append(reader)
    return last < order[write]


def _is_view(target: Any) -> bool:
    """Whether an operator may return memory of its input; where that is not known, it may."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(value.alias_info is not None for value in target._schema.returns)


def _may_write(target: Any) -> bool:
    """Whether a function may write to what it is given, or is composed of others that may."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    writes = ir.updates_statistics(target) or target._schema.is_mutable
    return writes or target._can_decompose()


def is_number(node: fx.Node) -> bool:
    """Whether a node yields a size, or sizes: what does so writes nothing and has no parts.

    ``torch.ops.aten.size`` is not even an operator of the dispatcher, though torch records it.
    """
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return len(values) > 0 and all(isinstance(item, numbers) for item in values)
