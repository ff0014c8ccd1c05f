"""Decompose composite operators that hide operators with a rule of their own."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import fx
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.infer import fake_mode_of
from mpgraph.op_rows_autocast import OPENED
from mpgraph.op_table import Rule, rule_for
from mpgraph.pipeline import NeedsStaticShapes, PassContext, graph_pass

_IMPLICIT = DispatchKey.CompositeImplicitAutograd
_EXPLICIT = DispatchKey.CompositeExplicitAutograd
_DECIDING = frozenset({Rule.LOWER, Rule.WIDEN, Rule.PROMOTE, Rule.REFUSE})


@graph_pass(numerics="exact")
def open_composites(graph: fx.Graph, context: PassContext) -> int:
    """Replace ``einsum(…)`` by the ``permute``, ``bmm``, … that torch itself runs for it.

    torch.autocast sees through an operator that has no autocast kernel of its own and casts
    around the operators inside. So a composite without a row in the table is opened if anything
    inside has a deciding row. ``reshape``, which hides only views, stays as it is.
    """
    edits = 0
    for node in list(graph.nodes):
        if _may_hide_rules(node, context):
            edits += _open(graph, node, context)
    return edits


def _may_hide_rules(node: fx.Node, context: PassContext) -> bool:
    if not ir.is_operator(node) or not _yields_floats(node):
        return False
    target = cast(OpOverload, node.target)
    return (
        not target._schema.is_mutable
        and (target.has_kernel_for_dispatch_key(_IMPLICIT) or str(target) in OPENED)
        and _rule(node, context) is None
    )


def _yields_floats(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in leaves)


def _rule(node: fx.Node, context: PassContext) -> Rule | None:
    """The rule of the operator's row, or of an override that selects it; None without either."""
    operator = ir.operator_name(node)
    if context.policy.overrides:
        policy = dataclasses.replace(context.policy, on_unknown="follow")
        choice = policy.choose(operator, ir.module_path(node), node.name)
        if choice.source.startswith("override"):
            return choice.rule
    row = rule_for(context.policy.preset, operator)
    return row.rule if row else None


def _open(graph: fx.Graph, node: fx.Node, context: PassContext) -> int:
    body = trace_composite(node, context)
    inner = [n for n in body.graph.nodes if n.op == "call_function"]
    hidden = [n for n in inner if _may_hide_rules(n, context)]
    if not hidden and not any(_rule(n, context) in _DECIDING for n in inner):
        return 0
    copies = _inline(graph, node, body)
    edits = 1 + sum(_open(graph, n, context) for n in copies if _may_hide_rules(n, context))
    return edits


def trace_composite(node: fx.Node, context: PassContext) -> fx.GraphModule:
    """The operators that torch runs for a composite one, as a pre-dispatch graph."""
    target = cast(OpOverload, node.target)
    nodes: list[fx.Node] = []
    map_arg((node.args, node.kwargs), lambda n: nodes.append(n) or n)  # type: ignore[func-returns-value]
    values = [n.meta["captured"] for n in nodes]
    positions = {n: i for i, n in enumerate(nodes)}
    key = _EXPLICIT if str(target) in OPENED else _IMPLICIT

    def run(*leaves: Any) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: leaves[positions[n]])
        with torch._C.DisableTorchFunction():
            return target._op_dk(key, *args, **kwargs)

    try:
        with fake_mode_of(values), context.autocast(ir.region_of(node)):
            body = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    except Exception as error:
        raise NeedsStaticShapes(node, error) from error
    body.meta["nodes"] = nodes
    return body


def _inline(graph: fx.Graph, node: fx.Node, body: fx.GraphModule) -> list[fx.Node]:
    values: dict[fx.Node, Any] = dict(
        zip(body.graph.find_nodes(op="placeholder"), body.meta["nodes"], strict=True)
    )
    copies = []
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                copy = values[inner] = graph.node_copy(inner, lambda n: values[n])
                copy.meta = _place(node, inner)
                copies.append(copy)
            elif inner.op == "output":
                _replace(graph, node, fx.map_arg(inner.args[0], lambda n: values[n]))
    graph.erase_node(node)
    return copies


def _place(node: fx.Node, inner: fx.Node) -> dict[str, Any]:
    keep = ("module_path", "stack_trace", "nn_module_stack", "region", "grad")
    place = {key: node.meta[key] for key in keep if key in node.meta}
    value = inner.meta.get("val")
    return {**place, "val": value, "captured": value, "opened": ir.operator_name(node)}


def _replace(graph: fx.Graph, node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        return
    for user in list(node.users):
        user.replace_all_uses_with(result[user.args[1]])
        graph.erase_node(user)
