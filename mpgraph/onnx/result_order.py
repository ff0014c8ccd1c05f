"""An order of the nodes in which onnxruntime needs less memory."""

from __future__ import annotations

from typing import Any

from mpgraph.onnx.dependencies import Dependencies

# Where a node comes from, as its metadata says; the rest is the update.
_PASSES = frozenset({"forward", "backward"})


def order_results(graph: Any) -> None:
    """Move the nodes that make nothing but results to the end: what can be made first comes last.

    onnxruntime takes them from the last one on, and runs what each of them needs. So a parameter is
    updated as soon as its gradient is there, which then is given back.

    Args:
        graph: An ``onnx_ir.Graph`` in topological order, which stays one.
    """
    dependencies = Dependencies(graph)
    passes = [node for node in graph if node.metadata_props.get("part") in _PASSES]
    last = [node for node in graph if not any(value.uses() for value in node.outputs)]
    last.sort(key=dependencies.latest(last, passes).__getitem__, reverse=True)
    for node in last:
        graph.remove(node)
        graph.append(node)
