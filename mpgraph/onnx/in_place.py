"""Which state a runtime may overwrite where it lies, proved from an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpgraph.onnx.dependencies import VIEWS, Dependencies

# Element by element, each from the same place of its inputs: writing over an input is safe.
_ELEMENTWISE = frozenset({"Where", "Add", "Sub", "Mul", "Div", "Min", "Max", "Clip"})
# Of a Scan that takes and makes the pieces of the first dimension in their order.
_FORWARD = frozenset({"body", "num_scan_inputs"})


def in_place(model: Any, state: Mapping[str, str]) -> frozenset[str]:
    """The state tensors that every reader has read before their next value is written.

    That holds in whatever order a runtime runs the nodes: each reader is an ancestor of the node
    that computes the next value, or that node itself, which works element by element. A Scan that
    takes the tensor in pieces and makes the pieces of its next value is such a node, if the same
    holds of one piece in its body: it reads a piece in one round only.

    Args:
        model: An ``onnx_ir.Model`` of a step.
        state: By input name, the output that holds the next value.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    dependencies = Dependencies(model.graph)
    return frozenset(
        name
        for name, following in state.items()
        if _is_safe(inputs[name], outputs[following], dependencies)
    )


def _is_safe(place: Any, value: Any, dependencies: Dependencies) -> bool:
    writer = value.producer()
    if writer is None or not _keeps_places(writer, place, value):
        return False
    for reader, through_view in dependencies.readers(place):
        if reader is writer:
            if through_view or _is_broadcast(place, value):
                return False
        elif not dependencies.needs([writer], reader) or _is_returned_view(reader):
            return False
    return True


def _keeps_places(writer: Any, place: Any, value: Any) -> bool:
    """Whether a node reads of ``place``, if at all, only what it then writes over."""
    if writer.op_type != "Scan" or writer.domain:
        return writer.op_type in _ELEMENTWISE
    taken = [index for index, given in enumerate(writer.inputs) if given is place]
    body = writer.attributes["body"].as_graph()
    carried = len(writer.inputs) - writer.attributes["num_scan_inputs"].as_int()
    made = writer.outputs.index(value)
    if len(taken) > 1 or min([*taken, made]) < carried or not writer.attributes.keys() <= _FORWARD:
        return False
    return not taken or _is_safe(body.inputs[taken[0]], body.outputs[made], Dependencies(body))


def _is_returned_view(node: Any) -> bool:
    return node.op_type in VIEWS and any(value.is_graph_output() for value in node.outputs)


def _is_broadcast(place: Any, value: Any) -> bool:
    return place.shape is None or value.shape is None or list(place.shape) != list(value.shape)
