"""Remove casts that change nothing."""

from __future__ import annotations

from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassContext, graph_pass


@graph_pass(numerics="exact")
def fold_casts(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite ``to(to(x, b), c)`` to ``to(x, c)`` when the inner cast loses nothing.

    ``fp32 -> bf16 -> fp32`` stays: its inner cast rounds, and that rounding is what the policy
    (or the model) asked for. The outer cast must be one that mpgraph inserted: a cast that the
    model wrote may be there for the copy that it makes. ``b`` must hold every value of both ends,
    and have no other use: gradients that met in ``b`` would meet in a narrower dtype. Where
    torch.autocast's gradients are to be kept to the bit, ``x`` may have no gradient: each cast
    makes a dense copy of it, and a later reduction adds in the order of its strides.
    """
    ordered = ir.differentiable(graph, context.grad) if context.strict else set()
    edits = 0
    for outer in list(graph.nodes):
        if ir.is_cast(outer) and ir.is_inserted(outer) and ir.is_cast(ir.cast_source(outer)):
            edits += _fold(graph, outer, ordered)
    return edits


def _fold(graph: fx.Graph, outer: fx.Node, ordered: set[fx.Node]) -> int:
    inner = ir.cast_source(outer)
    source = ir.cast_source(inner)
    start, middle, end = ir.dtype_of(source), ir.cast_target(inner), ir.cast_target(outer)
    if start is None or len(inner.users) > 1:
        return 0
    if source in ordered:
        return 0
    if not (ir.is_lossless(start, middle) and ir.is_lossless(end, middle)):
        return 0
    if start is end:
        outer.replace_all_uses_with(source)
    else:
        replacement = ir.add_cast(graph, source, end, before=outer)
        replacement.meta = dict(outer.meta)
        outer.replace_all_uses_with(replacement)
    graph.erase_node(outer)
    graph.erase_node(inner)
    return 1
