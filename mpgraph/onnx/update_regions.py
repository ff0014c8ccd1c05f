"""What of an ONNX graph computes the next state element by element."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

# One element of each full-sized input, and numbers, make one element of the result.
ELEMENTWISE = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sqrt", "Neg", "Abs", "Sign", "Exp", "Log",
        "Reciprocal", "Clip", "Identity", "Where", "Cast",
    }
)  # fmt: skip
# The same, whose result is true or false.
_TESTS = frozenset(
    {
        "IsNaN", "IsInf", "And", "Or", "Not", "Equal", "Less", "LessOrEqual", "Greater",
        "GreaterOrEqual",
    }
)  # fmt: skip
Shape = tuple[int, ...]


def regions(graph: Any, wanted: Collection[Any]) -> list[list[Any]]:
    """The nodes that compute results from inputs of their shape and numbers, element by element.

    Nothing outside of a region reads what it computes, ``wanted`` aside: so it can be replaced by
    one node behind everything that it reads.

    Args:
        graph: An ``onnx_ir.Graph`` in topological order.
        wanted: Results of it.

    Returns:
        Nodes in the graph's order; results that share a node are in one region.
    """
    shapes = {shape_of(value) for value in wanted}
    found: dict[Any, list[Any]] = {}
    for node in reversed(list(graph)):
        if not is_elementwise(node) or shape_of(node.outputs[0]) not in shapes:
            continue
        (value,) = node.outputs
        readers = [reader for reader, _ in value.uses()]
        if value.is_graph_output() != (value in wanted) or not (readers or value in wanted):
            continue
        if all(reader in found for reader in readers):
            _join(found, node, readers)
    order = {node: index for index, node in enumerate(graph)}
    unique = {id(region): region for region in found.values()}
    return [sorted(region, key=order.__getitem__) for region in unique.values()]


def _join(found: dict[Any, list[Any]], node: Any, readers: Sequence[Any]) -> None:
    """Add a node to its readers' regions, which become one."""
    region, *others = {id(found[reader]): found[reader] for reader in readers}.values() or [[]]
    region.append(node)
    for other in (node, *(other for part in others for other in part)):
        found[other] = region
    region += (other for part in others for other in part)


def is_elementwise(node: Any) -> bool:
    """Whether each input of a node is as large as its result, or one number."""
    if node.domain or node.op_type not in ELEMENTWISE | _TESTS:
        return False
    size = shape_of(node.outputs[0])
    return size is not None and all(
        value is not None and (shape_of(value) == size or is_number(value)) for value in node.inputs
    )


def infer_types(graph: Any) -> None:
    """Write down the types and shapes of element-wise results that the exporter left out.

    A number that is cast to the type that it has, so that another value is read for its type
    alone, is taken without the cast.
    """
    import onnx_ir

    for node in graph:
        if node.op_type == "CastLike" and not node.outputs[0].is_graph_output():
            _drop_same_cast(node)
        if node.domain or node.op_type not in ELEMENTWISE | _TESTS or None in node.inputs:
            continue
        (value,) = node.outputs
        shapes = [shape for given in node.inputs if (shape := shape_of(given)) is not None]
        if value.shape is None and len(shapes) == len(node.inputs):
            value.shape = onnx_ir.Shape(np.broadcast_shapes(*shapes))
        value.type = value.type or _type(node)


def _drop_same_cast(node: Any) -> None:
    given, like = node.inputs
    if given.type is not None and given.type == like.type:
        for reader, index in node.outputs[0].uses():
            reader.replace_input_with(index, given)
        node.graph.remove(node, safe=True)


def _type(node: Any) -> Any:
    import onnx_ir

    if node.op_type in _TESTS:
        return onnx_ir.TensorType(onnx_ir.DataType.BOOL)
    if node.op_type == "Cast":
        return onnx_ir.TensorType(onnx_ir.DataType(node.attributes["to"].as_int()))
    return node.inputs[node.op_type == "Where"].type


def is_number(value: Any) -> bool:
    """Whether a value is one element that gives no result more dimensions."""
    shape = shape_of(value)
    return shape is not None and len(shape) <= 1 and math.prod(shape) == 1


def shape_of(value: Any) -> Shape | None:
    """Its sizes, if all of them are known."""
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape)


def leaves(region: Sequence[Any]) -> list[Any]:
    """The full-sized values that a region reads and does not compute."""
    made = {node.outputs[0] for node in region}
    read = dict.fromkeys(value for node in region for value in node.inputs)
    return [value for value in read if value not in made and not is_number(value)]
