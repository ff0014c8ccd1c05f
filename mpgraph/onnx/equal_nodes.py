"""Nodes that compute the same: one is enough."""

from __future__ import annotations

from typing import Any

from mpgraph.onnx.extra import library


def share_equal_nodes(model: Any) -> None:
    """Let one node compute what several do.

    onnx_ir's pass compares the numbers that nodes hold by equality: ``LeakyRelu(alpha=-0.0)`` would
    become ``LeakyRelu(alpha=0.0)``. So nodes say while it runs which zeros they hold.

    Args:
        model: An ``onnx_ir.Model`` whose functions are inlined; it is changed.
    """
    told = {node: zeros for node in model.graph if (zeros := _zeros(node))}
    for node, zeros in told.items():
        node.overload = zeros
    library("onnx_ir.passes.common").CommonSubexpressionEliminationPass()(model)
    for node in told:
        node.overload = ""


def _zeros(node: Any) -> str:
    """The numbers of a node that has a zero among them; nothing for all others."""
    import onnx_ir

    kinds = (onnx_ir.AttributeType.FLOAT, onnx_ir.AttributeType.FLOATS)
    held = [(name, a.value) for name, a in node.attributes.items() if a.type in kinds]
    numbers = [n for _, value in held for n in (value if isinstance(value, tuple) else (value,))]
    return repr(sorted(held)) if 0.0 in numbers else ""
