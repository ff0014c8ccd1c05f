"""Which values of a graph carry gradients, and which of those are scaled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from mpgraph import ir, ops

_aten = torch.ops.aten
_CUTS = frozenset({_aten.detach.default, _aten.detach_copy.default})
# These read nothing of what they are given but its shape.
_SHAPE_ONLY = frozenset(
    {
        *(_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
        *(_aten.empty_like.default, _aten.rand_like.default, _aten.randn_like.default),
        *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
        _aten.new_empty.default,
    }
)


def carrying(graph: fx.Graph, grad: bool) -> set[fx.Node]:
    """Every node whose value may carry a gradient: rather one too many than one too few.

    Besides what is computed from such values, that is what shares memory with something that they
    were written to: ``buffer`` after ``buffer[0].copy_(x)``, however it was made.
    """
    written: set[int] = set()
    while True:
        found, count = _carrying(graph, grad, written), len(written)
        written.update(_written_with_gradients(graph, found))
        if len(written) == count:
            return found


def _carrying(graph: fx.Graph, grad: bool, written: set[int]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if grad and is_floating(node) and requires_grad(node):
                found.add(node)
        elif ir.storage_of(node) in written and is_floating(node):
            found.add(node)
        elif node.meta.get("grad", grad) and node.target not in _CUTS | _SHAPE_ONLY:
            if is_floating(node) and any(source in found for source in node.all_input_nodes):
                found.add(node)
    return found


def _written_with_gradients(graph: fx.Graph, found: set[fx.Node]) -> Iterator[int]:
    for node in graph.nodes:
        if ir.is_mutating(node) and any(source in found for source in node.all_input_nodes):
            for written in ir.written_arguments(node):
                if (storage := ir.storage_of(written)) is not None:
                    yield storage


def requires_grad(placeholder: fx.Node) -> bool:
    """Whether the caller wants a gradient of this input; yes, if nobody has said."""
    meta = placeholder.meta
    return bool(meta.get("requires_grad", meta.get("differentiable", True)))


def is_floating(node: fx.Node) -> bool:
    """Whether a node yields a floating-point tensor, alone or among others."""
    return any(dtype.is_floating_point for dtype in dtypes(node))


def dtypes(node: fx.Node) -> list[torch.dtype]:
    """The dtypes of the tensors that a node yields."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return [leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)]


def is_half(node: fx.Node) -> bool:
    """Whether a node yields one fp16 tensor: the gradients of those are scaled."""
    return ir.dtype_of(node) is torch.float16


def scale_input(graph: fx.Graph) -> fx.Node | None:
    """The graph's input for the loss scale, if it has one."""
    for node in graph.find_nodes(op="placeholder"):
        if getattr(node.meta.get("slot"), "kind", "") == "scale":
            return cast(fx.Node, node)
    return None


def broken_borders(graph: fx.Graph, grad: bool) -> Iterator[tuple[fx.Node, str]]:
    """Where a scaled gradient would meet a true one, with what is wrong there.

    Found by following the scale through the graph: it comes in at ``lower``, which must take what
    is true, and goes at ``widen``, which must take what is scaled. Everything else must take
    gradients of one kind, and yields that kind.
    """
    scaled = scaled_values(graph, grad)
    for node in graph.nodes:
        sources = [source for source in dict.fromkeys(node.all_input_nodes) if source in scaled]
        yield from ((node, problem) for problem in _problems(node, sources, scaled))


def scaled_values(graph: fx.Graph, grad: bool) -> dict[fx.Node, bool]:
    """Whether the gradient is scaled, of every value that carries one."""
    found = carrying(graph, grad)
    scaled: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node in found:
            sources = [source for source in node.all_input_nodes if source in scaled]
            scaled[node] = _yields_scaled(node, sources, scaled)
    return scaled


def _yields_scaled(node: fx.Node, sources: list[fx.Node], scaled: dict[fx.Node, bool]) -> bool:
    if node.op == "placeholder":
        return bool(getattr(node.meta.get("slot"), "scaled", False))
    if node.target in (ops.LOWER, ops.WIDEN):
        return node.target is ops.LOWER
    return any(scaled[source] for source in sources) if sources else is_half(node)


def _problems(node: fx.Node, sources: list[fx.Node], scaled: dict[fx.Node, bool]) -> Iterator[str]:
    kinds = {scaled[source] for source in sources}
    if node.target is ops.LOWER and kinds - {False}:
        yield "lowers a value whose gradient is scaled already"
    elif node.target is ops.WIDEN and kinds - {True}:
        yield "widens a value whose gradient is not scaled"
    elif node.op == "output":
        # Between Dynamo's graphs, fp16 stays scaled.
        crossing = cast(fx.GraphModule, node.graph.owning_module).meta.get("crossing")
        wrong = [s for s in sources if scaled[s] != bool(crossing and is_half(s))]
        if wrong:
            names = ", ".join(f"%{source.name}" for source in wrong)
            yield f"returns {names}, whose gradient is {'' if scaled[wrong[0]] else 'not '}scaled"
    elif len(kinds) > 1 and (node in scaled or ir.is_mutating(node)):
        yield "takes values with scaled and with true gradients"
    elif node in scaled and is_half(node) and not scaled[node]:
        yield "yields fp16, but its gradient is not scaled"


def promotes(node: fx.Node) -> bool:
    """Whether the operator widens its inputs first, in its backward pass too.

    Then a cast before it changes no bit of its value, nor of its gradients.
    """
    if not ir.is_operator(node):
        return False
    target = cast(OpOverload, node.target)
    name: Any = target._schema.name.removeprefix("aten::").removesuffix("_")
    return name in _PROMOTING


# tests/test_gradient_flow.py holds each of them to it.
_PROMOTING = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "true_divide", "where", "maximum", "minimum"),
        *("fmax", "fmin", "hypot", "remainder", "fmod", "copysign", "xlogy", "logaddexp"),
    }
)
# In place, with backward passes that round before they widen: the gradient of ``h * h`` in
# addcmul_(y, h, h), say, is in fp16.
OUT_OF_PLACE: dict[Any, OpOverload] = {
    _aten.addcdiv_.default: _aten.addcdiv.default,
    _aten.addcmul_.default: _aten.addcmul.default,
    _aten.atan2_.default: _aten.atan2.default,
    _aten.pow_.Tensor: _aten.pow.Tensor_Tensor,
}
