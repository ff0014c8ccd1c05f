"""Make the decisions true: cast what a node reads to the dtype that it runs in."""

from __future__ import annotations

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassContext, graph_pass


@graph_pass(numerics="rounds")
def insert_casts(graph: fx.Graph, context: PassContext) -> int:
    """Cast every eligible input of a node to the node's decided dtype.

    ``linear(x, w)`` decided as bf16 becomes ``linear(to(x, bf16), to(w, bf16))``. An input that
    already has the dtype is left alone, and so are integers and float64. One cast per use, right
    before the use, as torch.autocast does; sharing is another pass's work. At the borders of
    sub-graphs (the results of a ``cond`` branch, the operands of a ``while_loop``) each value
    has a dtype of its own.
    """
    edits = 0
    for node in list(graph.nodes):
        decision: ir.Decision | None = node.meta.get("decision")
        if decision is None:
            continue
        if decision.argument is not None:
            edits += _set_argument(node, decision.argument)
        if decision.dtype is not None:
            edits += _cast_inputs(graph, node, decision.dtype)
        if decision.each:
            edits += _cast_each(graph, node, decision.each)
    return edits


def _set_argument(node: fx.Node, dtype: torch.dtype) -> int:
    source = node.args[0]
    if not isinstance(source, fx.Node) or ir.dtype_of(source) is dtype:
        return 0
    node.target, node.args, node.kwargs = ir.call_with_dtype(node, dtype)
    return 1


def _cast_each(graph: fx.Graph, node: fx.Node, dtypes: tuple[torch.dtype | None, ...]) -> int:
    remaining = iter(dtypes)
    edits = 0

    def cast_if_needed(source: fx.Node) -> fx.Node:
        nonlocal edits
        dtype = next(remaining)
        if dtype is None or ir.dtype_of(source) is dtype:
            return source
        edits += 1
        return ir.add_cast(graph, source, dtype, before=node)

    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), cast_if_needed)
    return edits


def _cast_inputs(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> int:
    castable = set(ir.eligible_inputs(node))
    edits = 0

    def cast_if_needed(source: fx.Node) -> fx.Node:
        nonlocal edits
        if source not in castable or ir.dtype_of(source) is dtype:
            return source
        edits += 1
        return ir.add_cast(graph, source, dtype, before=node)

    node.args = fx.map_arg(node.args, cast_if_needed)
    node.kwargs = fx.map_arg(node.kwargs, cast_if_needed)
    return edits
