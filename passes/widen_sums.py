"""Leave out the rounding between a sum of 16-bit gradients and its use in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import StepContext

aten = torch.ops.aten
_SUM = aten.sum.dim_IntList
_VIEWS = frozenset({aten.view.default, aten.alias.default, aten.detach.default})


@graph_pass(numerics="rounds")
def widen_sums(graph: fx.Graph, context: StepContext) -> int:
    """``to(sum(d, [0]), float32)`` of a 16-bit d becomes ``sum(d, [0], dtype=float32)``.

    The gradient of a bias: the sum is computed in float32 anyway, and rounded to 16 bit only to be
    widened again. A sum that anything else reads stays, and with it the rounding.
    """
    edits = 0
    for node in graph.find_nodes(op="call_function", target=_SUM):
        chain = _to_float32(node)
        if chain is not None and "dtype" not in node.kwargs:
            _widen(graph, node, chain)
            edits += 1
    return edits


def _to_float32(node: fx.Node) -> list[fx.Node] | None:
    """The views and the cast after a 16-bit value; None if anything else reads it."""
    chain = []
    while ir.dtype_of(node) in (torch.bfloat16, torch.float16) and len(node.users) == 1:
        node = next(iter(node.users))
        chain.append(node)
        if node.target is aten._to_copy.default and ir.dtype_of(node) is torch.float32:
            return chain
        if node.target not in _VIEWS:
            return None
    return None


def _widen(graph: fx.Graph, node: fx.Node, chain: list[fx.Node]) -> None:
    node.kwargs = {**node.kwargs, "dtype": torch.float32}
    for wide in (node, *chain[:-1]):
        value: Any = wide.meta["val"]
        wide.meta["val"] = ir.retype(value, torch.float32)
    cast = chain[-1]
    cast.replace_all_uses_with(cast.all_input_nodes[0])
    graph.erase_node(cast)
