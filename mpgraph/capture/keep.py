"""Which calls of a graph from Dynamo must not be traced, and how each is kept."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.attention
from torch import fx

from mpgraph import ir
from mpgraph.capture import kept
from mpgraph.capture.ambient import Ambient, with_ambient
from mpgraph.capture.transforms import closes, opens
from mpgraph.errors import CaptureError
from mpgraph.infer import fake_mode_of
from mpgraph.pipeline import PassContext

# Rewrites the forward body of a kept node, given what is in force around the node.
Rewrite = Callable[[fx.GraphModule, Ambient], fx.GraphModule]


class CannotLower(Exception):
    """The graph holds something that would not survive the rewrite; says what and where."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        self.reason = reason
        self.line = ir.source_line(node) if node is not None else ""
        super().__init__(f"{reason} ({self.line})" if self.line else reason)


class LeavesNoTrace(CannotLower):
    """A call that does something out of sight of the trace; it can be kept by itself."""

    def __init__(self, node: fx.Node) -> None:
        self.name = node.name
        super().__init__(f"{describe(node)} leaves no trace", node)


def keep_calls(
    gm: fx.GraphModule,
    context: PassContext,
    ambient: Ambient,
    rewrite: Rewrite,
    untraceable: Collection[str] = (),
) -> None:
    """Turn calls that must not be traced into kept nodes, and rewrite their forward bodies.

    ``untraceable`` names calls that an earlier attempt has found out about.
    """
    _refuse_inference_mode(gm)
    segment: list[fx.Node] = []
    differentiated: set[fx.Node] = set()
    depth = 0
    for node, around in list(with_ambient(gm.graph, ambient, context)):
        depth += opens(node) - closes(node)
        if depth or segment:
            segment.append(node)
            # What vjp returns differentiates wrapped values later on.
            differentiated.update(u for u in node.users if u.target is _TRANSFORMS_GRAD)
            differentiated.discard(node)
            if not depth and not differentiated:
                _fold(gm, segment, context, around)
                segment = []
        elif node.target is _SET_ATTENTION:
            # With the names of the kernels, which are no tensors and cannot cross a border.
            _fold(gm, [*node.all_input_nodes, node], context, around)
        elif node.name in untraceable:
            _fold(gm, [node], context, around)
        else:
            _keep(gm, node, context, around, rewrite)
    if segment:
        raise CannotLower("a function transform is left open", segment[0])
    gm.graph.lint()


def _refuse_inference_mode(gm: fx.GraphModule) -> None:
    # Tracing would enter it, fail, and leave the whole process in it.
    for node in gm.graph.nodes:
        if node.target is _ENTER_INFERENCE_MODE:
            raise CannotLower("torch.inference_mode cannot be traced", node)


_ENTER_INFERENCE_MODE = torch.autograd.grad_mode._enter_inference_mode


def _keep(
    gm: fx.GraphModule, node: fx.Node, context: PassContext, ambient: Ambient, rewrite: Rewrite
) -> None:
    if node.target is kept.FUNCTION:
        _keep_with_forward(gm, node, kept.KEPT_FUNCTION, ambient, rewrite)
    elif node.target is kept.KEPT_CHECKPOINT:
        _keep_with_forward(gm, node, kept.KEPT_CHECKPOINT, ambient, rewrite)
    elif node.target is kept.HOOK:
        _hold(gm, node, 1, _checked(kept.bodies(node, gm)[1]))
        node.target = kept.KEPT_HOOK
        node.meta["written"] = ()
    elif ir.is_higher_order(node) or _acts_on_autograd(node):
        _fold(gm, [node], context, ambient)


def _keep_with_forward(
    gm: fx.GraphModule, node: fx.Node, target: kept.Kept, ambient: Ambient, rewrite: Rewrite
) -> None:
    forward, *backward = kept.bodies(node, gm).values()
    _describe_operands(forward, list(node.args[1 + len(backward) :]))
    forward.meta.update(body=True, relocate=gm.meta.get("relocate"))
    rewritten = rewrite(forward, ambient)
    _hold(gm, node, 0, rewritten)
    for index, body in enumerate(backward, start=1):
        _hold(gm, node, index, _checked(body))
    node.target = target
    node.meta["written"] = kept.written_positions(node, rewritten)


def _describe_operands(body: fx.GraphModule, operands: list[Any]) -> None:
    """Tell the body's placeholders what the caller passes. Some bodies have a context first."""
    placeholders = body.graph.find_nodes(op="placeholder")
    for inner, outer in zip(reversed(placeholders), reversed(operands), strict=False):
        if isinstance(outer, fx.Node):
            inner.meta.setdefault("example_value", outer.meta.get("example_value"))
            for mark in ("leaf", "differentiable"):
                inner.meta[mark] = outer.meta.get(mark, _requires_grad(outer))


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad and node.op == "placeholder"


def _checked(body: fx.GraphModule) -> fx.GraphModule:
    """A body that runs in the backward pass, where no autocast is in force.

    If Dynamo has traced it in other dtypes, then whatever the user's Python read from those may
    be wrong.
    """
    examples = [n.meta.get("example_value") for n in body.graph.find_nodes(op="placeholder")]
    check = _DtypeCheck(body)
    try:
        with fake_mode_of(examples), torch.no_grad():
            check.run(*examples)
    except Exception:
        return body  # fails in eager mode too, and there with a better message
    if check.differing:
        raise CaptureError(
            "a backward pass of the model's own was traced in other dtypes than it runs in, so "
            "what it decides from a dtype may be wrong. Decorate the function that uses it with "
            f"@torch.compiler.disable.\n  from: {check.differing[0]}"
        )
    return body


class _DtypeCheck(fx.Interpreter):
    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body)
        self.differing: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        seen = n.meta.get("example_value")
        if isinstance(value, torch.Tensor) and isinstance(seen, torch.Tensor):
            if value.dtype is not seen.dtype:
                self.differing.append(ir.source_line(n) or n.name)
        return value


def _hold(gm: fx.GraphModule, node: fx.Node, index: int, body: fx.GraphModule) -> None:
    name = _fresh_name(gm, "body")
    gm.add_module(name, kept.Body(body))
    with gm.graph.inserting_before(node):
        held = gm.graph.get_attr(name)
    node.update_arg(index, held)


def _fresh_name(gm: fx.GraphModule, name: str) -> str:
    while hasattr(gm, name):
        name += "_"
    return name


_SET_ATTENTION: Any = getattr(torch.nn.attention, "_sdpa_kernel", None)
_TRANSFORMS_GRAD: Any = getattr(torch._functorch.eager_transforms, "_autograd_grad", None)
_METHODS = frozenset({"requires_grad_", "retain_grad", "register_hook", "backward"})
_FUNCTIONS = frozenset({torch.autograd.grad, torch.autograd.backward})


def _acts_on_autograd(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and node.target in _FUNCTIONS


def _fold(gm: fx.GraphModule, nodes: list[fx.Node], context: PassContext, ambient: Ambient) -> None:
    """Move consecutive nodes into a body that runs under autocast."""
    inside = set(nodes)
    results = [n for n in nodes if any(user not in inside for user in n.users)]
    graph, inputs = _copied(nodes, results)
    body = fx.GraphModule(gm, graph)
    name = _fresh_name(gm, "kept")
    gm.add_module(name, kept.Body(body))
    enabled = context.compute is not None if ambient.region is None else ambient.region.enabled
    dtype = context.compute if ambient.region is None else ambient.region.dtype
    with gm.graph.inserting_after(nodes[-1]):
        call = gm.graph.call_function(kept.UNDER_AUTOCAST)
    with gm.graph.inserting_before(call):
        call.args = (gm.graph.get_attr(name), context.device, dtype, enabled, *inputs)
    call.meta = {**nodes[0].meta, "holds": describe(nodes[0])}
    call.meta["example_value"] = tuple(n.meta.get("example_value") for n in results)
    _take_results(gm.graph, call, results)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def describe(node: fx.Node) -> str:
    """What a node calls, for people."""
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def _copied(nodes: list[fx.Node], results: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    outside = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes)
    for node in outside:
        if node.op == "get_attr":
            values[node] = graph.node_copy(node)
        else:
            inputs.append(node)
            values[node] = graph.placeholder(node.name)
    for node in nodes:
        values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[n] for n in results))
    return graph, inputs


def _take_results(graph: fx.Graph, call: fx.Node, results: list[fx.Node]) -> None:
    with graph.inserting_after(call):
        for index, node in reversed(list(enumerate(results))):
            item = graph.call_function(operator.getitem, (call, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
