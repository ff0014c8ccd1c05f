"""Take the casts of parameters out of the graph, to be made once per change of the parameter."""

from __future__ import annotations

import dataclasses
from typing import cast

from torch import fx
from torch._C import DispatchKey
from torch._ops import OpOverload

from mpgraph import ir
from mpgraph.gradient_flow import requires_grad
from mpgraph.pipeline import PassContext, graph_pass


@graph_pass(numerics="exact")
def hoist_weight_casts(graph: fx.Graph, context: PassContext) -> int:
    """Turn ``to(p_weight, bf16)`` into an input ``w_weight_bf16`` of the graph.

    The caller makes the 16-bit copy, with its way back to the parameter, and keeps it while the
    parameter is unchanged. In a graph from Dynamo the same goes for every leaf that it is given,
    whose copy the other graphs of the call use as well. Not hoisted: a parameter that the graph
    writes to, a cast inside ``no_grad``, and one of three or more ways back to the same parameter
    whose gradients would be added in another order.
    """
    writes = ir.Writes(graph)
    edits = 0
    for source in list(graph.find_nodes(op="placeholder")):
        if not _has_one_copy(source) or writes.anywhere(source):
            continue
        casts = [u for u in source.users if ir.is_cast(u) and ir.is_inserted(u)]
        if len(casts) == 1 and _keeps_order(casts[0]) and _same_grad(casts[0], context):
            _hoist(graph, source, casts[0])
            edits += 1
    return edits


def _has_one_copy(source: fx.Node) -> bool:
    """Whether torch.autocast would keep a copy for longer than this graph runs."""
    slot = source.meta.get("slot")
    if slot is None or slot.kind == "parameter":
        return slot is not None
    return ir.is_parameter(source) and ir.crosses_graphs(source.graph)


def _keeps_order(copy: fx.Node) -> bool:
    """Whether the gradients of the parameter add up as before.

    Autograd adds them in reverse order of use, and the copy is made before every use.
    """
    others = [user for user in ir.cast_source(copy).users if user is not copy]
    if not any(user < copy for user in others):
        return True
    return len(others) == 1 and _reads_once(others[0], ir.cast_source(copy))


def _reads_once(node: fx.Node, source: fx.Node) -> bool:
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: read.append(n) or n)  # type: ignore[func-returns-value]
    return read.count(source) == 1 and ir.is_operator(node) and not _is_composite(node)


def _is_composite(node: fx.Node) -> bool:
    target = cast(OpOverload, node.target)
    return target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


def _same_grad(node: fx.Node, context: PassContext) -> bool:
    return bool(node.meta.get("grad", context.grad)) == context.grad


def _hoist(graph: fx.Graph, source: fx.Node, node: fx.Node) -> None:
    dtype = ir.cast_target(node)
    slot = source.meta["slot"]
    name = f"w_{source.name.removeprefix('p_')}_{ir.short_name(dtype)}"
    with graph.inserting_after(source):
        copy = graph.placeholder(name)
    copy.meta = {
        **node.meta,
        "slot": dataclasses.replace(slot, kind="cast", dtype=dtype),
        "captured": node.meta["val"],
        "differentiable": True,
        "requires_grad": requires_grad(source),
    }
    node.replace_all_uses_with(copy)
    graph.erase_node(node)
    if not source.users:
        graph.erase_node(source)
