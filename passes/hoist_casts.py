"""Move narrowing casts towards the inputs, where narrow values would be widened for nothing."""

from __future__ import annotations

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassContext, graph_pass

_JOIN = frozenset({torch.ops.aten.cat.default, torch.ops.aten.stack.default})


@graph_pass(numerics="exact")
def hoist_casts(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite ``to(cat([a, to(b, fp32)]), bf16)`` to ``cat([to(a, bf16), b])``.

    A class token in float32 joined to 16-bit patches, only to be lowered again for the next
    matrix product, is joined in 16 bit at once. Joining moves values and changes none, forward
    and backward, so every bit stays. Not moved: a cast of a join that something else reads.
    """
    edits = 0
    for node in list(graph.nodes):
        if ir.is_cast(node) and ir.is_inserted(node) and _is_worth_it(node):
            _hoist(graph, node)
            edits += 1
    return edits


def _is_worth_it(cast: fx.Node) -> bool:
    join = ir.cast_source(cast)
    if join.target not in _JOIN or len(join.users) != 1:
        return False
    return any(_came_from(part, ir.cast_target(cast)) for part in join.args[0])  # type: ignore[union-attr]


def _came_from(part: fx.Node, dtype: torch.dtype) -> bool:
    return ir.is_cast(part) and ir.is_inserted(part) and ir.dtype_of(ir.cast_source(part)) is dtype


def _hoist(graph: fx.Graph, cast: fx.Node) -> None:
    join, dtype = ir.cast_source(cast), ir.cast_target(cast)
    parts = []
    for part in join.args[0]:  # type: ignore[union-attr]
        if _came_from(part, dtype):
            parts.append(ir.cast_source(part))
        else:
            parts.append(ir.add_cast(graph, part, dtype, before=join))
    join.update_arg(0, parts)
    join.meta["val"] = cast.meta["val"]
    join.meta["decision"] = ir.with_dtype(join.meta["decision"], dtype)
    cast.replace_all_uses_with(join)
    graph.erase_node(cast)
