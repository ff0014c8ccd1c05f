"""What of an ONNX graph computes the next state element by element."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

# One element of each full-sized input, and numbers, make one element of the result.
ELEMENTWISE = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sqrt", "Neg", "Abs", "Sign", "Exp", "Log",
        "Reciprocal", "Clip", "Where", "Cast", "Identity", "IsNaN", "IsInf", "And", "Or", "Not",
        "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
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
    if node.domain or node.op_type not in ELEMENTWISE or len(node.outputs) != 1:
        return False
    size = shape_of(node.outputs[0])
    return size is not None and all(
        value is not None and (shape_of(value) == size or is_number(value)) for value in node.inputs
    )


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
