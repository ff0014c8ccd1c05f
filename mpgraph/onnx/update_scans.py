"""An update of some tensors as one Scan over pieces of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpgraph.onnx.update_regions import leaves

Pieces = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Update:
    """Nodes that become one Scan.

    Attributes:
        nodes: They, in the graph's order.
        written: The results of the graph among what they compute.
        places: For each of these, the input that holds its old value.
        pieces: How many pieces each has, and of how many elements.
        before: What has to be computed before, because it is computed from old values.
    """

    nodes: Sequence[Any]
    written: Sequence[Any]
    places: Sequence[Any]
    pieces: Pieces
    before: Sequence[Any] = ()


def replace_by_scan(graph: Any, update: Update) -> Any:
    """Put a Scan in the place of an update; what has to be there before is a state of it."""
    import onnx_ir

    read = leaves(update.nodes)
    place = update.places[0].name
    carried = [_first_number(graph, value, place) for value in update.before]
    taken = [
        value
        if value in update.places
        else reshaped(graph, value, update.pieces, f"{value.name}.for.{place}")
        for value in read
    ]
    scan = onnx_ir.node(
        "Scan", [*carried, *taken],
        {"body": _body(update, read, carried), "num_scan_inputs": len(taken)},
        num_outputs=len(carried) + len(update.written),
    )  # fmt: skip
    graph.append(scan)
    kept, made = scan.outputs[: len(carried)], scan.outputs[len(carried) :]
    for value, after in zip(carried, kept, strict=True):
        _describe(after, f"{value.name}.after", value, value.shape)
    for old, new in zip(update.written, made, strict=True):
        _describe(new, old.name, old, update.pieces)
        graph.outputs[graph.outputs.index(old)] = new
        old.name = f"{old.name}.whole"
    graph.remove([*update.nodes], safe=True)
    return scan


def _body(update: Update, read: Sequence[Any], carried: Sequence[Any]) -> Any:
    """The same nodes for one piece; numbers are read from the graph outside."""
    import onnx_ir

    place = update.places[0].name
    kept = [_inner(value, place, value.shape) for value in carried]
    nodes = [onnx_ir.node("Identity", [value]) for value in kept]
    passed = [node.outputs[0] for node in nodes]
    for value, same in zip(kept, passed, strict=True):
        _describe(same, f"{value.name}.kept", value, value.shape)
    values = {value: _inner(value, place, update.pieces[1:]) for value in read}
    for node in update.nodes:
        inputs = [values.get(value, value) for value in node.inputs]
        value = node.outputs[0]
        values[value] = _inner(value, place, update.pieces[1:])
        nodes.append(_copy(node, inputs, values[value]))
    taken, made = ([values[value] for value in part] for part in (read, update.written))
    return onnx_ir.Graph([*kept, *taken], [*passed, *made], nodes=nodes, name=f"update.{place}")


def _copy(node: Any, inputs: Sequence[Any], output: Any) -> Any:
    import onnx_ir

    return onnx_ir.Node(
        "", node.op_type, inputs, node.attributes.values(), outputs=[output],
        metadata_props=dict(node.metadata_props),
    )  # fmt: skip


def _inner(value: Any, place: str, shape: Any) -> Any:
    import onnx_ir

    name = f"{value.name}.piece.{place}"
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=value.type)


def _describe(value: Any, name: str, like: Any, shape: Any) -> None:
    import onnx_ir

    value.name, value.type, value.shape = name, like.type, onnx_ir.Shape(shape)


def _first_number(graph: Any, value: Any, place: str) -> Any:
    """The first element of a value in all its dimensions, computed at the end of a graph."""
    import onnx_ir

    rank = len(value.shape)
    bounds = [_sizes([bound] * rank) for bound in (0, 1)]
    cut = onnx_ir.node("Slice", [value, *(node.outputs[0] for node in bounds)])
    graph.extend([*bounds, cut])
    _describe(cut.outputs[0], f"{value.name}.before.{place}", value, [None] * rank)
    return cut.outputs[0]


def reshaped(graph: Any, value: Any, shape: Sequence[int], name: str, before: Any = None) -> Any:
    """A view of a value, computed at the end of a graph or before one of its nodes."""
    import onnx_ir

    sizes = _sizes(shape)
    view = onnx_ir.node("Reshape", [value, sizes.outputs[0]])
    if before is None:
        graph.extend([sizes, view])
    else:
        graph.insert_before(before, [sizes, view])
    _describe(view.outputs[0], name, value, shape)
    return view.outputs[0]


def _sizes(values: Sequence[int]) -> Any:
    import onnx_ir

    return onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(np.array(values, dtype=np.int64))})
