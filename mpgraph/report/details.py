"""Every node of a report, block by block."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mpgraph.report.islands import range_text
from mpgraph.report.layout import (
    ORDINARY,
    block_runs,
    count,
    graph_title,
    inside,
    operator_text,
    rule_table,
    size_text,
)
from mpgraph.report.records import Node
from mpgraph.report.render import Column, Line, Part, Row, Table

if TYPE_CHECKING:
    from mpgraph.report.report import Report


def details(report: Report, *, rules: bool) -> Iterator[Part]:
    """Every node, block by block; with ``rules``, after what the selected operators run in."""
    for number, graph in enumerate(report.graphs, start=1):
        if graph.nodes:
            if rules or len(report.graphs) > 1:
                yield Line("")
                yield Line(graph_title(report, number, graph), heading=True)
            if rules:
                yield rule_table(graph.operators)
            yield from _node_tables(graph.nodes)


def _node_tables(nodes: Sequence[Node]) -> Iterator[Part]:
    for run in block_runs(nodes):
        block, members = run[0]
        weights = [n for n in members if n.cast is not None and n.cast.kind == "weight"]
        others = [n for n in members if n not in weights]
        yield Line("")
        yield Line(range_text([block]), heading=True)
        if others:
            yield _node_table(block, others)
        yield from _weight_lines(weights)
        if len(run) > 1:
            rest = range_text([name for name, _ in run[1:]])
            yield Line(f"{rest}: the same {count(len(members), 'node')}", heading=True)


def _weight_lines(weights: Sequence[Node]) -> Iterator[Line]:
    kinds = collections.Counter((n.cast.source, n.cast.target) for n in weights if n.cast)
    for (source, target), number in kinds.items():
        yield Line(
            f"and {count(number, 'weight')}, cast {source} → {target} once per optimizer step",
            indent=2,
        )


def _node_table(block: str, members: Sequence[Node]) -> Table:
    columns: tuple[Column, ...] = (
        Column("node", least=16),
        Column("module", least=14, keep_end=True),
        Column("operator", least=10),
        Column("runs in"),
        Column("rule", least=12),
        Column("line", least=24),
    )
    rows = [Row((n.name, inside(n, block), *_described(n), n.line), n.runs_in) for n in members]
    if not any(row.cells[1] for row in rows):
        columns = (columns[0], *columns[2:])
        rows = [Row((row.cells[0], *row.cells[2:]), row.dtype) for row in rows]
    return Table(columns, rows)


def _described(node: Node) -> tuple[str, str, str]:
    """The operator, the dtypes and the rule of one node."""
    cast = node.cast
    if cast is not None:
        whose = f"for {', '.join(cast.readers)}" if cast.kind == "inserted" else "(the model's own)"
        return "cast", f"{cast.source} → {cast.target}", f"{size_text(cast.bytes)} {whose}"
    others = [dtype for dtype in dict.fromkeys(node.gives) if dtype != node.runs_in]
    dtypes = " → ".join(filter(None, (node.runs_in, *others[:1])))
    return operator_text(node.operator), dtypes, _rule_text(node)


def _rule_text(node: Node) -> str:
    """``lower``; with the override, the missing row or the region where there is one."""
    source = "" if node.source.startswith(ORDINARY) else node.source.partition(":")[0]
    return ", ".join(filter(None, (node.rule, source, node.region)))
