"""What a captured step does, for people and as data."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from mpgraph import ir
from mpgraph.graph_text import format_graph, target_name

PARTS = ("forward", "backward", "sum", "clip", "check", "update", "scale", "write")
_CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


@dataclasses.dataclass(frozen=True)
class StepNode:
    """One node of a step.

    Attributes:
        part: "forward", "backward", "sum" (of gradients over batches), "clip", "check", "update",
            "scale" or "write".
        name: Its name in the graph.
        operator: What it calls.
        dtype: In short, the dtype of its result; "" where it has none.
        is_cast: Whether it only changes the dtype.
        module: The path of the module that it comes from; of a backward node, that of the forward
            node whose gradient it computes; "loss" outside of the model.
        reason: Why it runs in its dtype, where a rule of the policy says so.
        line: The user's line.
    """

    part: str
    name: str
    operator: str
    dtype: str
    is_cast: bool
    module: str
    reason: str
    line: str


class StepReport:
    """Every node of a step's graph, part by part; printed as a table."""

    def __init__(self, graphs: Sequence[tuple[fx.GraphModule, str]]) -> None:
        self.graphs = [gm for gm, _ in graphs]
        self.nodes = [node for gm, part in graphs for node in _nodes(gm.graph, part)]

    def count(self, part: str, *, casts: bool = False) -> int:
        """How many nodes, or casts, a part of the step has."""
        return sum(n.part == part and (n.is_cast or not casts) for n in self.nodes)

    def to_dict(self) -> list[dict[str, Any]]:
        """Every node as plain data."""
        return [dataclasses.asdict(node) for node in self.nodes]

    def text(self) -> str:
        """The graphs themselves."""
        return "\n\n".join(format_graph(gm.graph) for gm in self.graphs)

    def __str__(self) -> str:
        """A table: what each part does, in which dtypes."""
        table = Table("part", "nodes", "casts", "dtypes of the results", title="one training step")
        for part in PARTS:
            dtypes: dict[str, int] = {}
            for node in self.nodes:
                if node.part == part and node.dtype:
                    dtypes[node.dtype] = dtypes.get(node.dtype, 0) + 1
            if self.count(part):
                order = sorted(dtypes.items(), key=lambda item: -item[1])
                shown = ", ".join(f"{count} {dtype}" for dtype, count in order)
                casts = str(self.count(part, casts=True))
                table.add_row(part, str(self.count(part)), casts, shown)
        stream = io.StringIO()
        Console(file=stream, width=100).print(table)
        return stream.getvalue().rstrip()


def _nodes(graph: fx.Graph, part: str) -> Iterator[StepNode]:
    for node in graph.nodes:
        if node.op != "call_function" or ir.is_getitem(node):
            continue
        decision = node.meta.get("decision")
        dtype = ir.dtype_of(node)
        yield StepNode(
            part=str(node.meta.get("part", part)),
            name=node.name,
            operator=target_name(node),
            dtype="" if dtype is None else ir.short_name(dtype),
            is_cast=node.target in _CASTS,
            module=ir.module_path(node),
            reason=decision.reason if isinstance(decision, ir.Decision) else "",
            line=ir.source_line(node),
        )
