"""Make a graph legal for a runtime that lacks 16-bit operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.onnx.target_rows import BITWISE
from mpgraph.onnx.targets import HALVES, TargetContext, is_exact, short_operator
from mpgraph.pipeline import graph_pass

_TO: Any = torch.ops.aten._to_copy.default


@graph_pass(numerics="rounds")
def legalize(graph: fx.Graph, context: TargetContext) -> int:
    """Run what the target cannot run in 16 bit in fp32, between casts.

    ``y: bf16 = mul(a: bf16, b: bf16)`` becomes ``to(mul(to(a, fp32), to(b, fp32)), bf16)``: the
    node rounds and overflows as before, once, and its value is stored in 16 bit. One ATen node
    at a time: torch.onnx makes several ONNX operators of ``silu``, which rounds once. A value is
    cast up once, for all that read it. What is read after ``relu`` or ``split`` is their fp32
    result: it holds 16-bit values as it is.

    Left alone: nodes that the target runs in 16 bit, such as views and ``cat``; casts; nodes
    without 16-bit values; fp64. The graph must be functional ATen, with ``meta["val"]`` on every
    node; a forward graph or that of a whole step.

    Raises:
        ExportError: A node's result depends on the bits of its dtype, such as ``nextafter``.
    """
    wide: dict[fx.Node, fx.Node] = {}
    edits = 0
    for node in list(graph.nodes):
        if not context.target.takes(node):
            _refuse_bitwise(node, context)
            _widen(graph, node, wide)
            edits += 1
    for cast in reversed(list(graph.nodes)):
        if cast.target is _TO and ir.is_inserted(cast) and not cast.users:
            graph.erase_node(cast)
    return edits


def _refuse_bitwise(node: fx.Node, context: TargetContext) -> None:
    why = BITWISE.get(short_operator(node))
    if why is None and not ir.is_mutating(node):
        return
    line = ir.source_line(node)
    raise ExportError(
        f"%{node.name} ({node.target}) cannot run in 16 bit on target {context.target.name!r}, "
        f"nor in fp32 instead: {why or 'it writes to its argument'}. Pin its module to fp32 in "
        "the policy." + (f"\n  from: {line}" if line else "")
    )


def _widen(graph: fx.Graph, node: fx.Node, wide: dict[fx.Node, fx.Node]) -> None:
    """Run one node in fp32: its inputs cast up, its results cast back."""
    exact = is_exact(node)
    results = [(n, d) for n in _results(node) if (d := ir.dtype_of(n)) in HALVES]

    def widened(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return _wide(graph, value, node, wide) if ir.dtype_of(value) in HALVES else value
        return torch.float32 if value in HALVES else value

    adjusted = _ADJUSTED.get(short_operator(node))
    if adjusted is not None:
        adjusted(node)
    node.args = _map(widened, node.args)
    node.kwargs = _map(widened, node.kwargs)
    node.meta["val"] = _map(_in_fp32, node.meta["val"])
    for result, dtype in results:
        cast = _narrow(graph, result, dtype)
        if exact:
            wide[cast] = result


def _results(node: fx.Node) -> list[fx.Node]:
    """The node itself; or, where it yields several values, the nodes that pick one."""
    if isinstance(node.meta["val"], torch.Tensor):
        return [node]
    picks = list(node.users)
    assert all(map(ir.is_getitem, picks)), node
    return picks


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """The value with ``function`` applied to whatever is no container."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _in_fp32(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in HALVES:
        return ir.retype(value, torch.float32)
    return value


def _wide(graph: fx.Graph, source: fx.Node, user: fx.Node, wide: dict[fx.Node, fx.Node]) -> fx.Node:
    """The fp32 copy of a 16-bit value, right after it, for all that read it."""
    if source not in wide:
        wide[source] = _cast(graph, source, torch.float32, _next(graph, source), user)
    return wide[source]


def _next(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """Where a copy of ``source`` can stand: behind all placeholders, and all results of a node."""
    following = source.next
    while following.op == "placeholder" or ir.is_getitem(following):
        following = following.next
    return following


def _narrow(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Give what reads a result its 16-bit dtype back: the rounding of the node."""
    node.meta["val"] = _in_fp32(node.meta["val"])
    readers = list(node.users)
    cast = _cast(graph, node, dtype, _next(graph, node), node)
    for reader in readers:
        reader.replace_input_with(node, cast)
    return cast


_PLACE = ("module_path", "nn_module_stack", "stack_trace", "part", "region", "grad")


def _cast(
    graph: fx.Graph, source: fx.Node, dtype: torch.dtype, before: fx.Node, user: fx.Node
) -> fx.Node:
    name = f"{source.name}_{ir.short_name(dtype)}"
    with graph.inserting_before(before):
        node = graph.create_node("call_function", _TO, (source,), {"dtype": dtype}, name=name)
    place = {key: user.meta[key] for key in _PLACE if key in user.meta}
    node.meta = {**place, "val": ir.retype(source.meta["val"], dtype), "inserted": True}
    return node


def _keep_half(node: fx.Node) -> None:
    """``_softmax(x, dim, half_to_float=True)`` yields fp32 as it is, once x is fp32."""
    node.args = (*node.args[:2], False)


def _keep_limits(node: fx.Node) -> None:
    """``nan_to_num`` puts the largest number of its dtype in the place of infinity."""
    dtype = ir.dtype_of(node)
    assert dtype is not None
    limits = torch.finfo(dtype)
    nan, top, bottom = (*node.args[1:], None, None, None)[:3]
    named = {"nan": nan, "posinf": top, "neginf": bottom, **node.kwargs}
    largest = limits.max if named["posinf"] is None else named["posinf"]
    smallest = limits.min if named["neginf"] is None else named["neginf"]
    node.args = (node.args[0], named["nan"], largest, smallest)
    node.kwargs = {}


# Operators with an argument that says something else about 16-bit inputs.
_ADJUSTED: dict[str, Callable[[fx.Node], None]] = {
    "_softmax": _keep_half,
    "_log_softmax": _keep_half,
    "nan_to_num": _keep_limits,
}
