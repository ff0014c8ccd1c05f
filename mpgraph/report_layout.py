"""What a report says, as lines and tables."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mpgraph.policy_glob import op_names
from mpgraph.report_islands import block_of, fold_islands, pattern_of, range_text
from mpgraph.report_records import SIXTEEN_BIT, Graph, Node, sum_bytes
from mpgraph.report_render import Column, Line, Part, Row, Table

if TYPE_CHECKING:
    from mpgraph.report import Report

_MOST_GRAPHS = 3  # more are listed instead of described
_MOST_MODULES = 12
_MOST_NAMES = 6
_DTYPES = ("bf16", "fp16", "fp32", "fp64")
_DECIDING = ("lower", "widen", "promote", "keep")
_FOLLOWS = "runs in what arrives"


def header(report: Report) -> str:
    """The model, and what was done to it, in one line."""
    engines = sorted({graph.engine for graph in report.graphs} - {""})
    seconds = sum(graph.seconds for graph in report.graphs)
    captured = f"captured by {' and '.join(engines)} in {seconds:.1f} s" if engines else ""
    policy = f"policy {report.policy}" if report.policy else ""
    parts = (report.model, report.precision, policy, captured, count(len(report.graphs), "graph"))
    return " · ".join(part for part in parts if part)


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


def details(report: Report, *, rules: bool) -> Iterator[Part]:
    """Every node, block by block; with ``rules``, after what the selected operators run in."""
    for number, graph in enumerate(report.graphs, start=1):
        if graph.nodes:
            yield Line("")
            if rules:
                yield Line(graph_title(report, number, graph), heading=True)
                yield _rule_table(graph.operators)
            yield from _node_tables(graph.nodes)


def graph_title(report: Report, number: int, graph: Graph) -> str:
    """``graph 1: train (x: fp32[4, 8]) · 79 operators · dynamic: x[0]``."""
    label = graph.label.removeprefix(f"{report.model} ")
    parts = [f"graph {number}: {label}" if label else f"graph {number}"]
    parts.append(count(len(graph.operators), "operator"))
    parts.append(f"dynamic: {', '.join(graph.dynamic)}" if graph.dynamic else "fixed sizes")
    return " · ".join(parts)


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
                f"{graph.engine} in {graph.seconds:.1f} s",
            )
        )
        for number, graph in enumerate(graphs, start=1)
    ]
    return Table(columns, rows)


def _graph_summary(graph: Graph) -> Iterator[Part]:
    yield _rule_table(graph.operators)
    yield from _unknown_lines(graph.operators)
    yield from _cast_parts(graph)
    yield from _island_parts(graph)
    yield from _module_parts(graph)
    for place in graph.breaks:
        line = f", from {place.line}" if place.line else ""
        yield Line(f"graph break: {place.reason}{line}", indent=2)


def _rule_table(nodes: Sequence[Node]) -> Table:
    """One row per dtype and reason; what merely follows its inputs is one row per dtype."""
    groups: dict[tuple[str, str, str], list[Node]] = {}
    for node in nodes:
        decided = node.rule in _DECIDING and node.runs_in
        rule, why = (node.rule, _why(node)) if decided else ("", _FOLLOWS if node.runs_in else "")
        groups.setdefault((node.runs_in, rule, why), []).append(node)
    ordered = sorted(groups.items(), key=lambda item: (_rank(item[0]), -len(item[1])))
    columns = (
        Column("runs in"),
        Column("count", right=True),
        Column("operators", least=24, wrap=True),
        Column("why", least=30, wrap=True),
    )
    return Table(
        columns,
        [
            Row((runs_in or "–", str(len(group)), name_counts(group), why or "no floats"), runs_in)
            for (runs_in, _, why), group in ordered
        ],
    )


def _rank(key: tuple[str, str, str]) -> tuple[int, int]:
    runs_in, rule, _ = key
    dtype = _DTYPES.index(runs_in) if runs_in in _DTYPES else len(_DTYPES) + (not runs_in)
    return dtype, _DECIDING.index(rule) if rule else len(_DECIDING)


def _why(node: Node) -> str:
    """The reason, with the override or the region that it comes from."""
    parts = [node.reason]
    if not node.source.startswith(_ORDINARY):
        parts.append(node.source)
    if node.region and node.region not in node.reason:
        parts.append(f"inside {node.region}")
    return "; ".join(filter(None, parts))


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
        Row((range_text([i.block or "model" for i in run]), names, "; ".join(run[0].why)), "fp32")
        for run in fold_islands(graph.islands)
        if (names := _counted(op_names(o)[-1] for o in run[0].operators))
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
    runs = list(_block_runs(graph.nodes))
    dtypes = [d for d in _DTYPES if any(n.runs_in == d for n in graph.operators)]
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


Block = tuple[str, tuple[Node, ...]]


def _module_row(run: Sequence[Block], dtypes: Sequence[str]) -> Row:
    nodes = run[0][1]
    operators = [node for node in nodes if not node.is_added]
    casts = tuple(n for n in nodes if n.cast is not None and n.cast.kind != "weight")
    counts = [sum(node.runs_in == dtype for node in operators) for dtype in dtypes]
    numbers = [str(number) if number else "–" for number in (*counts, len(casts))]
    moved = size_text(sum_bytes(casts)) if casts else "–"
    name = range_text([block or "model" for block, _ in run])
    main = dtypes[counts.index(max(counts))] if any(counts) else ""
    return Row((name, *numbers, moved, f"each of {len(run)}" if len(run) > 1 else ""), main)


def _blocks(nodes: Iterable[Node]) -> list[Block]:
    found: dict[str, list[Node]] = {}
    for node in nodes:
        found.setdefault(block_of(node.module), []).append(node)
    return [(block, tuple(members)) for block, members in found.items()]


def _block_runs(nodes: Iterable[Node]) -> Iterator[list[Block]]:
    """Blocks, with those that repeat the one before under another number."""

    def shape(block: Block) -> tuple[object, ...]:
        name, members = block
        same = [(_inside(m, name), m.operator, m.takes, m.runs_in, _why(m)) for m in members]
        return pattern_of(name), tuple(same)

    # Weights' copies stand at the head of the graph; the order of blocks is that of the rest.
    ordered = sorted(nodes, key=lambda n: n.cast is not None and n.cast.kind == "weight")
    for _, run in itertools.groupby(_blocks(ordered), key=shape):
        yield list(run)


def _inside(node: Node, block: str) -> str:
    return node.module.removeprefix(block)


def _node_tables(nodes: Sequence[Node]) -> Iterator[Part]:
    for run in _block_runs(nodes):
        block, members = run[0]
        weights = [n for n in members if n.cast is not None and n.cast.kind == "weight"]
        others = [n for n in members if n not in weights]
        yield Line("")
        yield Line(block or "outside any submodule", heading=True)
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
    columns = (
        Column("node", least=20),
        Column("module", least=12),
        Column("operator", least=16),
        Column("runs in"),
        Column("rule", least=16),
        Column("line", least=18),
    )
    rows = [
        Row((n.name, _inside(n, block), *_described(n), n.line), n.runs_in) for n in members
    ]
    if not any(row.cells[1] for row in rows):
        columns = (columns[0], *columns[2:])
        rows = [Row((row.cells[0], *row.cells[2:]), row.dtype) for row in rows]
    return Table(columns, rows)


def _described(node: Node) -> tuple[str, str, str]:
    """The operator, the dtypes and the rule of one node."""
    cast = node.cast
    if cast is not None:
        whose = f"for {', '.join(cast.readers)}" if cast.kind == "inserted" else "the model's own"
        return "cast", f"{cast.source} → {cast.target}", f"{whose}; {size_text(cast.bytes)}"
    others = [dtype for dtype in dict.fromkeys(node.gives) if dtype != node.runs_in]
    dtypes = " → ".join(filter(None, (node.runs_in, *others[:1])))
    return operator_text(node.operator), dtypes, _rule_text(node)


def _rule_text(node: Node) -> str:
    """``lower``; with the override, the missing row or the region where there is one."""
    source = "" if node.source.startswith(_ORDINARY) else node.source.partition(":")[0]
    return ", ".join(filter(None, (node.rule, source, node.region)))


_ORDINARY = ("preset ", "structure", "the model's own region")


def operator_text(operator: str) -> str:
    """``linear`` for ``aten.linear.default``, ``softmax.int`` where overloads differ."""
    return operator.removeprefix("aten.").removesuffix(".default")


def name_counts(nodes: Iterable[Node]) -> str:
    """``linear ×8, softmax ×2``: operators by how often they occur."""
    return _counted(op_names(node.operator)[-1] for node in nodes)


def _counted(names: Iterable[str]) -> str:
    found = collections.Counter(names).most_common()
    shown = [f"{name} ×{number}" if number > 1 else name for name, number in found[:_MOST_NAMES]]
    rest = len(found) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def count(number: int, noun: str) -> str:
    """``1 graph``, ``2 graphs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size_text(size: int) -> str:
    """``12.4 MB``, in powers of 1000."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def is_16_bit(node: Node) -> bool:
    """Whether a node computes in bf16 or fp16."""
    return node.runs_in in SIXTEEN_BIT
