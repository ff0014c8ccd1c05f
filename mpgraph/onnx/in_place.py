"""Which state a runtime may overwrite where it lies, proved from an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Element by element, each from the same place of its inputs: writing over an input is safe.
_ELEMENTWISE = frozenset({"Where", "Add", "Sub", "Mul", "Div", "Min", "Max", "Clip"})
# Who reads the result may read the input itself: a view returns its memory, and onnxruntime folds
# transposes and casts into the matrix products behind them.
_VIEWS = frozenset(
    {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Transpose", "Cast", "Expand"}
)


def in_place(model: Any, state: Mapping[str, str]) -> frozenset[str]:
    """The state tensors that every reader has read before their next value is written.

    That holds in whatever order a runtime runs the nodes: each reader is an ancestor of the node
    that computes the next value, or that node itself, which works element by element.

    Args:
        model: An ``onnx_ir.Model`` of a step.
        state: By input name, the output that holds the next value.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    order = {node: index for index, node in enumerate(model.graph)}
    ancestors = _ancestors(order)
    return frozenset(
        name
        for name, following in state.items()
        if _is_safe(inputs[name], outputs[following], order, ancestors)
    )


def _ancestors(order: Mapping[Any, int]) -> dict[Any, int]:
    """For each node, a bit for every node that it depends on, and for itself."""
    found: dict[Any, int] = {}
    for node, index in order.items():
        bits = 1 << index
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None:
                bits |= found[producer]
        found[node] = bits
    return found


def _is_safe(
    place: Any, value: Any, order: Mapping[Any, int], ancestors: Mapping[Any, int]
) -> bool:
    writer = value.producer()
    if writer is None or writer.op_type not in _ELEMENTWISE:
        return False
    for reader, through_view in _readers(place):
        if reader is writer:
            if through_view or _is_broadcast(place, value):
                return False
        elif not ancestors[writer] >> order[reader] & 1:
            return False
    return True


def _readers(place: Any) -> list[tuple[Any, bool]]:
    """Every node that reads the memory of a value, and whether it does through a view of it."""
    found: list[tuple[Any, bool]] = []
    waiting = [(place, False)]
    while waiting:
        value, is_view = waiting.pop()
        for node, _ in value.uses():
            found.append((node, is_view))
            if node.op_type in _VIEWS:
                waiting += [(output, True) for output in node.outputs]
    return found


def _is_broadcast(place: Any, value: Any) -> bool:
    return place.shape is None or value.shape is None or list(place.shape) != list(value.shape)
