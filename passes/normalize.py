"""Bring a captured graph into mpgraph's flat form."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassContext, graph_pass

_ASSERTIONS = frozenset(
    {
        # Checks of the dtypes that the capture saw; the rewrite changes dtypes on purpose.
        torch.ops.aten._assert_tensor_metadata.default,
    }
)
_REGIONS = frozenset(
    {
        torch.ops.higher_order.wrap_with_set_grad_enabled,
        torch.ops.higher_order.wrap_with_autocast,
    }
)
_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast


@graph_pass(numerics="exact", whole=True)
def normalize(graph: fx.Graph, context: PassContext) -> int:
    """Inline the model's own no_grad and autocast regions; drop checks of captured dtypes.

    ``with torch.no_grad(): y = f(x)``, captured as a sub-graph, becomes the nodes of ``f``
    between two gradient-mode switches. An autocast region leaves no node behind: every node
    inside it carries the region in ``meta["region"]``, which ``assign_dtypes`` honours. Other
    sub-graphs (``cond``, ``while_loop``) stay sub-graphs, and are normalized too.
    """
    owner = graph.owning_module
    assert owner is not None
    for body in ir.all_graphs(owner):
        _register_users(body.graph)
    return _normalize(graph, context, context.grad)


def _register_users(graph: fx.Graph) -> None:
    # What torch.export moves into a sub-graph may be missing among the users of what it reads,
    # and would then be taken for dead.
    for node in graph.nodes:
        for source in node.all_input_nodes:
            source.users.setdefault(node)


def _normalize(graph: fx.Graph, context: PassContext, grad: bool) -> int:
    edits = 0
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
            edits += 1
        elif node.target in _REGIONS:
            edits += 1 + _inline(graph, node, context, grad)
        elif ir.is_higher_order(node):
            for argument in node.args:
                if (body := _body_of(graph, argument)) is not None:
                    edits += _normalize(body.graph, context, grad)
    return edits + _erase_entered_regions(graph, context)


def _erase_entered_regions(graph: fx.Graph, context: PassContext) -> int:
    """Treat a region that torch.export left as two calls, because there is a ``cond`` inside."""
    entered: list[ir.Region | None] = [None]
    calls = []
    for node in graph.nodes:
        if node.target is _ENTER:
            device, dtype, enabled = node.args[:3]
            entered.append(_region(device, dtype, enabled, entered[-1], context))
        elif node.target is _EXIT:
            entered.pop()
        elif entered[-1] is not None:
            node.meta.setdefault("region", entered[-1])
            for body, _ in ir.body_calls(graph, node):
                _mark_bodies(body, {"region": entered[-1]})
        if node.target in (_ENTER, _EXIT):
            calls.append(node)
    for node in reversed(calls):
        graph.erase_node(node)
    return len(calls)


def _region(
    device: Any, dtype: Any, enabled: Any, around: ir.Region | None, context: PassContext
) -> ir.Region | None:
    if device != context.device:
        return around  # a region for another device changes nothing on this one
    return ir.Region(bool(enabled), dtype if isinstance(dtype, torch.dtype) else None)


def _body_of(graph: fx.Graph, argument: Any) -> fx.GraphModule | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        body = getattr(graph.owning_module, str(argument.target), None)
        return body if isinstance(body, fx.GraphModule) else None
    return None


def _inline(graph: fx.Graph, node: fx.Node, context: PassContext, grad: bool) -> int:
    body_node, operands, marks = _take_apart(node, context)
    body = _body_of(graph, body_node)
    assert body is not None
    inner_grad = bool(marks.get("grad", grad))
    edits = _normalize(body.graph, context, inner_grad)
    _switch(graph, node, inner_grad, grad)
    results = _copy_body(graph, node, body, operands, marks)
    _switch(graph, node, grad, inner_grad)
    _replace_results(graph, node, results)
    graph.erase_node(node)
    if not body_node.users:
        graph.erase_node(body_node)
    return edits


def _take_apart(
    node: fx.Node, context: PassContext
) -> tuple[fx.Node, tuple[Any, ...], dict[str, Any]]:
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        enabled, body, *operands = node.args
        return body, tuple(operands), {"grad": enabled}  # type: ignore[return-value]
    device, dtype, enabled, _, body, *operands = node.args
    region = _region(device, dtype, enabled, None, context)
    return body, tuple(operands), {} if region is None else {"region": region}  # type: ignore[return-value]


def _switch(graph: fx.Graph, before: fx.Node, to: bool, was: bool) -> None:
    if to == was:
        return
    with graph.inserting_before(before):
        switch = graph.call_function(ir.SET_GRAD, (to,))
    switch.meta = {"val": None, "captured": None, "module_path": ir.module_path(before)}


def _copy_body(
    graph: fx.Graph,
    node: fx.Node,
    body: fx.GraphModule,
    operands: tuple[Any, ...],
    marks: dict[str, Any],
) -> Any:
    values: dict[fx.Node, Any] = dict(
        zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)
    )
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                values[inner] = _move_attribute(graph, body, inner)
                _mark_bodies(getattr(body, str(inner.target)), marks)
            elif inner.op == "output":
                return fx.map_arg(inner.args[0], lambda n: values[n])
            elif inner.op != "placeholder":
                values[inner] = graph.node_copy(inner, lambda n: values[n])
                # The innermost region wins: marks already on the node came from inside.
                values[inner].meta = {**marks, **inner.meta}
    raise AssertionError("a graph without an output")


def _mark_bodies(value: Any, marks: dict[str, Any]) -> None:
    """What is inside a ``cond`` inside a region is inside the region."""
    for body in ir.all_graphs(value) if isinstance(value, fx.GraphModule) else ():
        for node in body.graph.nodes:
            node.meta = {**marks, **node.meta}


def _move_attribute(graph: fx.Graph, body: fx.GraphModule, inner: fx.Node) -> fx.Node:
    owner = graph.owning_module
    name = str(inner.target)
    while hasattr(owner, name):
        name = f"{name}_"
    setattr(owner, name, getattr(body, str(inner.target)))
    moved = graph.get_attr(name)
    moved.meta = dict(inner.meta)
    return moved


def _replace_results(graph: fx.Graph, node: fx.Node, results: Any) -> None:
    for user in list(node.users):
        assert ir.is_getitem(user), user
        value = results[user.args[1]]
        if isinstance(value, fx.Node):
            user.replace_all_uses_with(value)
        else:
            _replace_with_constant(user, value)
        graph.erase_node(user)


def _replace_with_constant(node: fx.Node, value: Any) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
