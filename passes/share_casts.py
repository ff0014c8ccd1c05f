"""One cast per value and dtype, wherever that leaves every gradient as it was."""

from __future__ import annotations

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassContext, graph_pass

Key = tuple[fx.Node, torch.dtype, bool]


@graph_pass(numerics="exact")
def share_casts(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite two casts of one value to one dtype as one cast with two uses.

    Parameters are shared, as in torch.autocast's cache (aten/src/ATen/autocast_mode.cpp,
    cached_cast): their 16-bit gradients meet in 16 bit. Values that carry no gradient are shared
    too. Any other value keeps one cast per use, whose gradients meet in float32. Not shared: two
    casts with a write to the value in between, or on two sides of a ``no_grad`` border (a cast
    made without gradients would lose those of the other side).
    """
    writes = ir.Writes(graph)
    differentiable = ir.differentiable(graph, context.grad)
    first: dict[Key, fx.Node] = {}
    edits = 0
    for node in list(graph.nodes):
        if not (ir.is_cast(node) and ir.is_inserted(node)):
            continue
        source = ir.cast_source(node)
        if source in differentiable and not ir.is_parameter(source):
            continue
        key = (source, ir.cast_target(node), bool(node.meta.get("grad", context.grad)))
        earlier = first.setdefault(key, node)
        if earlier is node:
            continue
        if writes.between(source, earlier, node):
            first[key] = node
            continue
        node.replace_all_uses_with(earlier)
        graph.erase_node(node)
        edits += 1
    return edits
