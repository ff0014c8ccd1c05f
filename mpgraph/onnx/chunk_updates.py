"""The optimizer's update piece by piece, so that what it computes in between stays in the cache.

In standard operators an update is ten to twenty element-wise nodes, and each of them goes over all
of a parameter in memory. As the body of a Scan over pieces of it, the same nodes compute the same
bits, from what the cache still holds, and their temporary values are as large as a piece.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mpgraph.onnx.dependencies import Dependencies
from mpgraph.onnx.update_regions import infer_types, leaves, regions, shape_of
from mpgraph.onnx.update_scans import Pieces, Update, replace_by_scan, reshaped

# A Scan of less costs more than it gains. What stays in the cache anyway gains memory: it may need
# two buffers otherwise, if a gradient could be computed from it after its update.
ELEMENTS = 32 * 1024
# One node reads and writes its values once, in pieces or whole.
NODES = 2
# Of what every runtime can take one element.
_SLICED = frozenset({"FLOAT", "DOUBLE", "INT32", "INT64", "BOOL"})


def chunk_updates(model: Any, state: Mapping[str, str], size: int) -> dict[str, Pieces]:
    """Make one Scan of each large update that is element-wise.

    ``h = Mul(g, lr)  next.w = Sub(w, h)`` → ``next.w = Scan(w, Reshape(g))`` with the same two
    nodes as its body. A tensor that the Scan writes is an input and an output in pieces, two
    dimensions instead of its own, and a Reshape at its other readers: so a runtime can have the
    Scan write it piece by piece where it lies. An update with a norm between its element-wise
    operators stays as it is up to the last of them that is not.

    Args:
        model: An ``onnx_ir.Model`` of a step; it is changed.
        state: By input name, the output that holds the next value.
        size: How many elements a piece has at most.

    Returns:
        By input name, the shape in pieces.
    """
    graph = model.graph
    places = _large(graph, state)
    if not places:
        return {}
    infer_types(graph)
    parts = regions(graph, places)
    found = [update for nodes in parts if (update := _update(nodes, places, size))]
    computed = {node for update in found for node in update.nodes}
    dependencies = Dependencies(graph)
    before = [_read_before(update, dependencies, computed) for update in found]
    scans = {
        replace_by_scan(graph, dataclasses.replace(update, before=values))
        for update, values in zip(found, before, strict=True)
    }
    for update in found:
        for place in update.places:
            _fold(graph, place, update.pieces, scans)
    return {place.name: update.pieces for update in found for place in update.places}


def _large(graph: Any, state: Mapping[str, str]) -> dict[Any, Any]:
    """By next value, the input that holds the value now, of tensors that are worth it."""
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    pairs = {outputs[following]: inputs[name] for name, following in state.items()}
    return {
        value: place
        for value, place in pairs.items()
        if (shape := shape_of(place)) is not None
        and math.prod(shape) >= ELEMENTS
        and shape_of(value) == shape
    }


def _update(nodes: Sequence[Any], places: Mapping[Any, Any], size: int) -> Update | None:
    """How to compute a region in pieces; None where that gains nothing, or there are none."""
    written = [node.outputs[0] for node in nodes if node.outputs[0] in places]
    shape = shape_of(written[0])
    assert shape is not None
    pieces = pieces_of(math.prod(shape), size)
    if len(nodes) < NODES or pieces is None or any(v.type is None for v in leaves(nodes)):
        return None
    return Update(nodes, written, [places[value] for value in written], pieces)


def pieces_of(elements: int, size: int) -> Pieces | None:
    """Equal pieces of at most ``size`` elements and over a quarter of it: how many, how large."""
    fewest = -(-elements // size)
    for count in range(max(fewest, 2), 4 * fewest):
        if elements % count == 0:
            return count, elements // count
    return None


def _read_before(
    update: Update, dependencies: Dependencies, computed: Collection[Any]
) -> list[Any]:
    """What is computed from the old values of an update, and not needed for the new ones.

    It has to be there before the Scan runs, if that is to write over the old values: the gradient
    of a layer's input, say, for which the layer's weight is read.
    """
    readers = {reader for place in update.places for reader, _ in dependencies.readers(place)}
    late = [node for node in readers if not dependencies.needs(update.nodes, node)]
    last = [
        node
        for node in late
        if not any(other is not node and dependencies.needs([other], node) for other in late)
    ]
    values = [node.outputs[0] for node in last if node not in computed]
    return [v for v in values if v.shape is not None and v.dtype and v.dtype.name in _SLICED]


def _fold(graph: Any, place: Any, pieces: Pieces, scans: Collection[Any]) -> None:
    """Take an input in pieces, and give it back its shape for all readers but some Scans."""
    import onnx_ir

    shape = shape_of(place)
    assert shape is not None
    others = [use for use in place.uses() if use.node not in scans]
    place.shape = onnx_ir.Shape(pieces)
    if others:
        whole = reshaped(graph, place, shape, f"{place.name}.whole", before=graph[0])
        for node, index in others:
            node.replace_input_with(index, whole)
