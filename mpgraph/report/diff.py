"""What differs between two reports: two policies, two precisions or two versions of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mpgraph.report.islands import pattern_of
from mpgraph.report.layout import count, name_counts, operator_text, size_text
from mpgraph.report.records import Graph, Node, sum_bytes, to_plain
from mpgraph.report.render import Column, Line, Page, Part, Row, Table, to_text

if TYPE_CHECKING:
    from mpgraph.report.report import Report

Key = tuple[str, str, str, int]  # sub-graph, module, operator, and which of several


@dataclasses.dataclass(frozen=True)
class Change:
    """An operator of both reports that runs in another dtype, or by another rule.

    Attributes:
        name: Its name in the second report.
        operator: Its operator.
        module: The dotted path of its module.
        before: The dtype that it ran in.
        after: The dtype that it runs in.
        rule_before: The rule in the first report.
        rule_after: The rule in the second.
        why: The reason in the second.
    """

    name: str
    operator: str
    module: str
    before: str
    after: str
    rule_before: str
    rule_after: str
    why: str


@dataclasses.dataclass(frozen=True)
class Totals:
    """What one report's casts come to, over all graphs."""

    casts: int
    cast_bytes: int
    weight_casts: int


@dataclasses.dataclass(frozen=True)
class ReportDiff:
    """What changes from one report to another; false if nothing does.

    Attributes:
        titles: The model, precision and policy of both.
        changed: Operators that run in another dtype or by another rule.
        removed: Operators of the first report alone.
        added: Operators of the second alone.
        casts: The casts of both.
    """

    titles: tuple[str, str]
    changed: tuple[Change, ...]
    removed: tuple[Node, ...]
    added: tuple[Node, ...]
    casts: tuple[Totals, Totals]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed or self.added or self.casts[0] != self.casts[1])

    def text(self, width: int = 100) -> str:
        """The differences as plain text; operators of repeated blocks share a line."""
        return to_text(list(self._parts()), width)

    def __str__(self) -> str:
        return self.text()

    def __rich__(self) -> Page:
        return Page(list(self._parts()))

    def to_dict(self) -> dict[str, Any]:
        """The differences as dictionaries, lists, text and numbers."""
        return {
            "titles": list(self.titles),
            "changed": [dataclasses.asdict(change) for change in self.changed],
            "removed": [to_plain(node) for node in self.removed],
            "added": [to_plain(node) for node in self.added],
            "casts": [dataclasses.asdict(totals) for totals in self.casts],
        }

    def _parts(self) -> Iterator[Part]:
        yield Line(f"- {self.titles[0]}", heading=True)
        yield Line(f"+ {self.titles[1]}", heading=True)
        if not self:
            yield Line("no difference")
            return
        if self.changed:
            yield Line(f"{count(len(self.changed), 'operator')} changed:")
            yield _change_table(self.changed)
        for nodes, where in ((self.removed, "first"), (self.added, "second")):
            if nodes:
                yield Line(f"{count(len(nodes), 'operator')} in the {where} alone:")
                yield _node_table(nodes)
        yield Line(_cast_text(*self.casts))


def compare(first: Report, second: Report) -> ReportDiff:
    """Match the operators of two reports by module, operator and order, and compare them.

    Names of nodes are not used: one more operator renumbers all that follow.
    """
    changed: list[Change] = []
    removed: list[Node] = []
    added: list[Node] = []
    for before, after in _pairs(first.graphs, second.graphs):
        old, new = _keyed(before), _keyed(after)
        both = [(node, new[key]) for key, node in old.items() if key in new]
        changed += [_change(a, b) for a, b in both if (a.runs_in, a.rule) != (b.runs_in, b.rule)]
        removed += [node for key, node in old.items() if key not in new]
        added += [node for key, node in new.items() if key not in old]
    return ReportDiff(
        titles=(_title(first), _title(second)),
        changed=tuple(changed),
        removed=tuple(removed),
        added=tuple(added),
        casts=(_totals(first), _totals(second)),
    )


def _title(report: Report) -> str:
    parts = (report.model, report.precision, f"policy {report.policy}" if report.policy else "")
    return " · ".join(filter(None, (*parts, report.selection)))


def _totals(report: Report) -> Totals:
    casts = tuple(node for graph in report.graphs for node in graph.casts)
    weights = sum(len(graph.weight_casts) for graph in report.graphs)
    return Totals(len(casts), sum_bytes(casts), weights)


_NO_GRAPH = Graph()


def _pairs(first: Sequence[Graph], second: Sequence[Graph]) -> Iterator[tuple[Graph, Graph]]:
    """Graphs for the same kind of call; what is left, in order."""
    left, right = list(first), list(second)
    for graph in first:
        match = next((other for other in right if other.label == graph.label), None)
        if match is not None:
            left.remove(graph)
            right.remove(match)
            yield graph, match
    for index in range(max(len(left), len(right))):
        before = left[index] if index < len(left) else _NO_GRAPH
        yield before, right[index] if index < len(right) else _NO_GRAPH


def _keyed(graph: Graph) -> dict[Key, Node]:
    keyed: dict[Key, Node] = {}
    seen: dict[tuple[str, str, str], int] = {}
    for node in graph.operators:
        place = (node.body, node.module, node.operator)
        seen[place] = number = seen.get(place, -1) + 1
        keyed[(*place, number)] = node
    return keyed


def _change(before: Node, after: Node) -> Change:
    return Change(
        name=after.name,
        operator=after.operator,
        module=after.module,
        before=before.runs_in,
        after=after.runs_in,
        rule_before=before.rule,
        rule_after=after.rule,
        why=after.reason,
    )


def _arrow(before: str, after: str) -> str:
    return f"{before} → {after}" if before != after else before


def _change_table(changes: Sequence[Change]) -> Table:
    groups: dict[tuple[str, ...], list[Change]] = {}
    for c in changes:
        rules = _arrow(c.rule_before, c.rule_after)
        key = (pattern_of(c.module), c.operator, _arrow(c.before, c.after), rules, c.why)
        groups.setdefault(key, []).append(c)
    columns = (
        Column("module", least=14, keep_end=True),
        Column("operator", least=12),
        Column("count", right=True),
        Column("runs in"),
        Column("rule"),
        Column("why now", least=24, wrap=True),
    )
    rows = [
        Row((_place(group), operator_text(op), str(len(group)), dtypes, rules, why), group[0].after)
        for (_, op, dtypes, rules, why), group in groups.items()
    ]
    return Table(columns, rows)


def _place(nodes: Sequence[Change] | Sequence[Node]) -> str:
    """The module of all these nodes, or the pattern of their modules."""
    modules = {node.module for node in nodes}
    return (modules.pop() if len(modules) == 1 else pattern_of(modules.pop())) or "model itself"


def _node_table(nodes: Sequence[Node]) -> Table:
    groups: dict[tuple[str, str], list[Node]] = {}
    for node in nodes:
        groups.setdefault((pattern_of(node.module), node.runs_in), []).append(node)
    rows = [
        Row((_place(group), dtype or "–", str(len(group)), name_counts(group)), dtype)
        for (_, dtype), group in groups.items()
    ]
    columns = (
        Column("module", least=14, keep_end=True),
        Column("runs in"),
        Column("count", right=True),
        Column("operators", least=24, wrap=True),
    )
    return Table(columns, rows)


def _cast_text(before: Totals, after: Totals) -> str:
    sizes = _arrow(size_text(before.cast_bytes), size_text(after.cast_bytes))
    return (
        f"casts per call: {_arrow(str(before.casts), str(after.casts))}, {sizes}; "
        f"of weights: {_arrow(str(before.weight_casts), str(after.weight_casts))}"
    )
