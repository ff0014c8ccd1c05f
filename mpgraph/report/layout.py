"""What a report says, as lines and tables."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mpgraph.policy_glob import op_names
from mpgraph.report.islands import block_of, pattern_of
from mpgraph.report.records import Graph, Node
from mpgraph.report.render import Column, Row, Table

if TYPE_CHECKING:
    from mpgraph.report.report import Report

_MOST_NAMES = 6
DTYPES = ("bf16", "fp16", "fp32", "fp64")
_DECIDING = ("lower", "widen", "promote", "keep")
_FOLLOWS = "runs in what arrives"


ORDINARY = ("preset ", "structure", "the model's own region")


def header(report: Report) -> str:
    """The model, and what was done to it, in one line."""
    engines = sorted({graph.engine for graph in report.graphs} - {""})
    seconds = sum(graph.seconds for graph in report.graphs)
    duration = f" in {seconds:.1f} s" if seconds else ""
    captured = f"captured by {' and '.join(engines)}{duration}" if engines else ""
    policy = f"policy {report.policy}" if report.policy else ""
    parts = (report.model, report.precision, policy, captured, count(len(report.graphs), "graph"))
    return " · ".join(part for part in parts if part)


def graph_title(report: Report, number: int, graph: Graph) -> str:
    """``graph 1: train (x: fp32[4, 8]) · 79 operators · dynamic: x[0]``."""
    label = graph.label.removeprefix(f"{report.model} ")
    parts = [f"graph {number}: {label}" if label else f"graph {number}"]
    parts.append(count(len(graph.operators), "operator"))
    parts.append(f"dynamic: {', '.join(graph.dynamic)}" if graph.dynamic else "fixed sizes")
    return " · ".join(parts)


def rule_table(nodes: Sequence[Node]) -> Table:
    """One row per dtype and reason; what merely follows its inputs is one row per dtype."""
    groups: dict[tuple[str, str, str], list[Node]] = {}
    for node in nodes:
        if node.rule in _DECIDING and node.runs_in:
            key = (node.runs_in, node.rule, why_text(node))
        else:
            key = (node.runs_in, "", _FOLLOWS if node.runs_in else "no floats")
        groups.setdefault(key, []).append(node)
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
            Row((runs_in or "–", str(len(group)), name_counts(group), why), runs_in)
            for (runs_in, _, why), group in ordered
        ],
    )


def _rank(key: tuple[str, str, str]) -> tuple[int, int]:
    runs_in, rule, _ = key
    dtype = DTYPES.index(runs_in) if runs_in in DTYPES else len(DTYPES) + (not runs_in)
    return dtype, _DECIDING.index(rule) if rule else len(_DECIDING)


def why_text(node: Node) -> str:
    """The reason, with the override or the region that it comes from."""
    parts = [node.reason]
    if not node.source.startswith(ORDINARY):
        parts.append(node.source)
    if node.region and node.region not in node.reason:
        parts.append(f"inside {node.region}")
    return "; ".join(filter(None, parts))


Block = tuple[str, tuple[Node, ...]]


def _blocks(nodes: Iterable[Node]) -> list[Block]:
    found: dict[str, list[Node]] = {}
    for node in nodes:
        found.setdefault(block_of(node.module), []).append(node)
    return [(block, tuple(members)) for block, members in found.items()]


def block_runs(nodes: Iterable[Node]) -> Iterator[list[Block]]:
    """Blocks, with those that repeat the one before under another number."""

    def shape(block: Block) -> tuple[object, ...]:
        name, members = block
        same = [(inside(m, name), m.operator, m.takes, m.runs_in, why_text(m)) for m in members]
        return pattern_of(name), tuple(same)

    # Weights' copies stand at the head of the graph; the order of blocks is that of the rest.
    ordered = sorted(nodes, key=lambda n: n.cast is not None and n.cast.kind == "weight")
    for _, run in itertools.groupby(_blocks(ordered), key=shape):
        yield list(run)


def inside(node: Node, block: str) -> str:
    """The node's module as seen from its block: ``.mlp.fc1``."""
    return node.module.removeprefix(block)


def operator_text(operator: str) -> str:
    """``linear`` for ``aten.linear.default``, ``softmax.int`` where overloads differ."""
    return operator.removeprefix("aten.").removesuffix(".default")


def name_counts(nodes: Iterable[Node]) -> str:
    """``linear ×8, softmax ×2``: operators by how often they occur."""
    return counted(op_names(node.operator)[-1] for node in nodes)


def counted(names: Iterable[str]) -> str:
    """``linear ×8, softmax``: the most frequent names first."""
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
