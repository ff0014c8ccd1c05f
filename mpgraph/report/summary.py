"""The summary of a report: what runs in which dtype, and what that costs in casts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mpgraph.policy_glob import op_names
from mpgraph.report.islands import fold_islands, range_text
from mpgraph.report.layout import (
    DTYPES,
    Block,
    block_runs,
    count,
    counted,
    graph_title,
    header,
    name_counts,
    rule_table,
    size_text,
)
from mpgraph.report.records import Graph, Node, sum_bytes
from mpgraph.report.render import Column, Line, Part, Row, Table

if TYPE_CHECKING:
    from mpgraph.report.report import Report

_MOST_GRAPHS = 3  # more are listed instead of described
_MOST_MODULES = 12


def summary(report: Report) -> Iterator[Part]:
    """The default text: what runs in which dtype, and what that costs in casts."""
    yield Line(header(report), heading=True)
    if len(report.graphs) > _MOST_GRAPHS:
        yield _graph_table(report.graphs)
        yield Line("More about one of them: report.filter(graph=1).", indent=2)
        return
    for number, graph in enumerate(report.graphs, start=1):
        yield Line("")
        yield Line(graph_title(report, number, graph), heading=True)
        yield from _graph_summary(graph)


def _graph_table(graphs: Sequence[Graph]) -> Table:
    columns = (
        Column("graph", right=True),
        Column("call", least=30),
        Column("operators", right=True),
        Column("casts", right=True),
        Column("breaks", right=True),
        Column("captured by"),
    )
    rows = [
        Row(
            (
                str(number),
                graph.label,
                str(len(graph.operators)),
                str(len(graph.casts)),
                str(len(graph.breaks)),
                f"{graph.engine} in {graph.seconds:.1f} s" if graph.seconds else graph.engine,
            )
        )
        for number, graph in enumerate(graphs, start=1)
    ]
    return Table(columns, rows)


def _graph_summary(graph: Graph) -> Iterator[Part]:
    if graph.reason:
        yield Line(f"not captured by export: {graph.reason}", indent=2)
    for place in graph.breaks:
        line = f", from {place.line}" if place.line else ""
        yield Line(f"graph break: {place.reason}{line}", indent=2)
    if graph.nodes:
        yield rule_table(graph.operators)
        yield from _unknown_lines(graph.operators)
        yield from _cast_parts(graph)
        yield from _island_parts(graph)
        yield from _module_parts(graph)


def _unknown_lines(nodes: Sequence[Node]) -> Iterator[Line]:
    unknown = [node for node in nodes if node.is_unknown]
    if unknown:
        yield Line(
            f"no row in the operator table: {name_counts(unknown)}. Say how they run with "
            "policy.pin(op=…, run='fp32' or 'compute').",
            indent=2,
        )


def _cast_parts(graph: Graph) -> Iterator[Part]:
    yield Line("")
    kinds: dict[tuple[str, str, str], list[Node]] = {}
    for node in (*graph.casts, *graph.weight_casts):
        assert node.cast is not None
        key = (node.cast.kind, node.cast.source, node.cast.target)
        kinds.setdefault(key, []).append(node)
    if not kinds:
        yield Line("casts: none")
        return
    yield Line(f"casts: {cast_history(graph)}")
    columns = (Column("cast"), Column("count", right=True), Column("moves", right=True), Column(""))
    rows = [
        Row((f"{a} → {b}", str(len(group)), size_text(sum_bytes(tuple(group))), _KINDS[kind]), b)
        for (kind, a, b), group in kinds.items()
    ]
    yield Table(columns, rows)


_KINDS = {
    "inserted": "at every call",
    "model": "at every call, written in the model itself",
    "weight": "of weights, once per optimizer step",
}


def cast_history(graph: Graph) -> str:
    """``20 inserted → 18 after share_casts; 12.4 MB per call``: passes that changed the number."""
    parts: list[str] = []
    before = 0
    for done in graph.passes:
        if done.name == "insert_casts":
            own = f", {before} in the model" if before else ""
            parts.append(f"{done.edits} inserted{own}")
        elif parts and done.casts != before:
            parts.append(f"{done.casts} after {done.name}")
        before = done.casts
    return f"{' → '.join(parts) or len(graph.casts)}; {size_text(graph.cast_bytes)} per call"


def _island_parts(graph: Graph) -> Iterator[Part]:
    if not graph.islands:
        return
    yield Line("")
    yield Line("back to fp32 between 16-bit operators:")
    rows = [
        Row((range_text([i.block for i in run]), names, "; ".join(run[0].why)), "fp32")
        for run in fold_islands(graph.islands)
        if (names := counted(op_names(o)[-1] for o in run[0].operators))
    ]
    columns = (
        Column("where", least=16, wrap=True),
        Column("operators in each", least=20, wrap=True),
        Column("why", least=30, wrap=True),
    )
    shown = rows[:_MOST_MODULES]
    yield Table(columns, shown)
    yield from _more(len(rows) - len(shown), "such place")


def _module_parts(graph: Graph) -> Iterator[Part]:
    runs = list(block_runs(graph.nodes))
    dtypes = [d for d in DTYPES if any(n.runs_in == d for n in graph.operators)]
    columns = (
        Column("module", least=20),
        *(Column(name, right=True) for name in (*dtypes, "casts", "moves")),
        Column(""),
    )
    rows = [_module_row(run, dtypes) for run in runs]
    yield Line("")
    shown = rows[:_MOST_MODULES]
    yield Table(columns, shown)
    yield from _more(len(rows) - len(shown), "module")


def _more(rest: int, what: str) -> Iterator[Line]:
    if rest > 0:
        yield Line(f"and {count(rest, f'more {what}')}", indent=2)


def _module_row(run: Sequence[Block], dtypes: Sequence[str]) -> Row:
    nodes = run[0][1]
    operators = [node for node in nodes if not node.is_added]
    casts = tuple(n for n in nodes if n.cast is not None and n.cast.kind != "weight")
    counts = [sum(node.runs_in == dtype for node in operators) for dtype in dtypes]
    numbers = [str(number) if number else "–" for number in (*counts, len(casts))]
    moved = size_text(sum_bytes(casts)) if casts else "–"
    name = range_text([block for block, _ in run])
    main = dtypes[counts.index(max(counts))] if any(counts) else ""
    return Row((name, *numbers, moved, f"each of {len(run)}" if len(run) > 1 else ""), main)
