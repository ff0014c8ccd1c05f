"""Move casts to where fewer values pass through them, towards the results."""

from __future__ import annotations

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassContext, element_count, graph_pass

_aten = torch.ops.aten
# Operators that pick values and change none; their first tensor argument is what they pick from.
_PICK = frozenset({_aten.slice.Tensor, _aten.select.int, _aten.narrow.default})
# These may pick a value more than once, and then add up its gradients.
_GATHER = frozenset({_aten.embedding.default, _aten.index_select.default, _aten.gather.default})


@graph_pass(numerics="exact")
def sink_casts(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite ``embedding(to(w, bf16), i)`` to ``to(embedding(w, i), bf16)``.

    The forward bits are the same; only the rows that are read get cast, and the gradients of a
    row that is read often are added in float32. Not moved: a cast with other uses, one that
    would get more work, and, where torch.autocast's gradients are to be kept to the bit, a cast
    before an operator that adds gradients.
    """
    allowed = _PICK if context.strict else _PICK | _GATHER
    edits = 0
    for node in list(graph.nodes):
        if node.target in allowed and _is_worth_it(node):
            _sink(graph, node)
            edits += 1
    return edits


def _is_worth_it(node: fx.Node) -> bool:
    cast = node.args[0]
    if not isinstance(cast, fx.Node) or not ir.is_cast(cast) or not ir.is_inserted(cast):
        return False
    only_use = len(cast.users) == 1
    return only_use and element_count(node.meta["val"]) <= element_count(cast.meta["val"])


def _sink(graph: fx.Graph, node: fx.Node) -> None:
    cast = node.args[0]
    assert isinstance(cast, fx.Node)
    source = ir.cast_source(cast)
    node.update_arg(0, source)
    narrow = ir.cast_target(cast)
    node.meta["val"] = ir.retype(node.meta["val"], source.meta["val"].dtype)
    node.meta["decision"] = ir.without_dtype(node.meta["decision"], "cast after the lookup")
    users = list(node.users)
    moved = ir.add_cast(graph, node, narrow, before=node.next)
    moved.meta = ir.cast_meta(node, narrow, node)
    for user in users:
        user.replace_input_with(node, moved)
    graph.erase_node(cast)
