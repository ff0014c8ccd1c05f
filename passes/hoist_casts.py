"""Move narrowing casts towards the inputs, where narrow values would be widened for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

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
    and backward. Not moved: a cast of a join that something else reads, and one of a join that
    reads a value twice, whose gradients would be added in another order. Where torch.autocast's
    gradients are to be kept to the bit, no join with a gradient: without the casts its parts get
    slices for gradients, in whose strides a later reduction may add in another order.
    """
    ordered = ir.differentiable(graph, context.grad) if context.strict else set()
    edits = 0
    for node in list(graph.nodes):
        if node in ordered:
            continue
        if ir.is_cast(node) and ir.is_inserted(node) and _is_worth_it(node):
            _hoist(graph, node)
            edits += 1
    return edits


def _is_worth_it(outer: fx.Node) -> bool:
    join = ir.cast_source(outer)
    if join.target not in _JOIN or len(join.users) != 1:
        return False
    parts, dtype = _parts(join), ir.cast_target(outer)
    sources = [ir.cast_source(part) if _came_from(part, dtype) else part for part in parts]
    if len(set(sources)) < len(sources) or not all(ir.is_eligible(p) for p in parts):
        return False
    return sources != parts


def _parts(join: fx.Node) -> list[fx.Node]:
    return list(cast("Sequence[fx.Node]", join.args[0]))


def _came_from(part: fx.Node, dtype: torch.dtype) -> bool:
    return ir.is_cast(part) and ir.is_inserted(part) and ir.dtype_of(ir.cast_source(part)) is dtype


def _hoist(graph: fx.Graph, outer: fx.Node) -> None:
    join, dtype = ir.cast_source(outer), ir.cast_target(outer)
    parts = []
    for part in _parts(join):
        if _came_from(part, dtype):
            parts.append(ir.cast_source(part))
        else:
            parts.append(ir.add_cast(graph, part, dtype, before=join))
    join.update_arg(0, parts)
    join.meta["val"] = outer.meta["val"]
    join.meta["decision"] = ir.with_dtype(join.meta["decision"], dtype)
    outer.replace_all_uses_with(join)
    graph.erase_node(outer)
