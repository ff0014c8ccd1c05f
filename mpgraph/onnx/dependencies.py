"""What in an ONNX graph depends on what, in whatever order a runtime runs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Who reads the result may read the input itself: a view returns its memory, and onnxruntime folds
# transposes and casts into the matrix products behind them.
VIEWS = frozenset(
    {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Transpose", "Cast", "Expand"}
)


class Dependencies:
    """The ancestors of every node, and the readers of a value's memory.

    Args:
        graph: An ``onnx_ir.Graph`` in topological order. What the graphs inside of its nodes read
            of it, those nodes read.
    """

    def __init__(self, graph: Any) -> None:
        self._order = {node: index for index, node in enumerate(graph)}
        self._owner = {inner: node for node in graph for inner in _inside(node)}
        self._ancestors: dict[Any, int] = {}
        for node, index in self._order.items():
            self._ancestors[node] = 1 << index | self._of_inputs(node)

    def _of_inputs(self, node: Any) -> int:
        bits = 0
        for reader in (node, *_inside(node)):
            for value in reader.inputs:
                producer = value.producer() if value is not None else None
                bits |= self._ancestors.get(producer, 0)
        return bits

    def needs(self, nodes: Iterable[Any], other: Any) -> bool:
        """Whether one of the nodes is another one, or depends on it."""
        return any(self._ancestors[node] >> self._order[other] & 1 for node in nodes)

    def latest(self, nodes: Iterable[Any], others: Iterable[Any]) -> dict[Any, int]:
        """For each node, where the last of some others is that it depends on; -1 for none."""
        among = sum(1 << self._order[other] for other in others)
        return {node: (self._ancestors[node] & among).bit_length() - 1 for node in nodes}

    def readers(self, place: Any) -> list[tuple[Any, bool]]:
        """Every node that reads the memory of a value, and whether it does through a view of it.

        A node whose inner graph reads the value is said to read a view.
        """
        found: list[tuple[Any, bool]] = []
        waiting = [(place, False)]
        while waiting:
            value, is_view = waiting.pop()
            for user, _ in value.uses():
                node = self._owner.get(user, user)
                found.append((node, is_view or node is not user))
                if node.op_type in VIEWS:
                    waiting += [(output, True) for output in node.outputs]
        return found


def _inside(node: Any) -> list[Any]:
    """The nodes of the graphs that a node has as attributes."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type.name == "GRAPH"]
    return [inner for graph in graphs for inner in graph.all_nodes()]
