"""``explain``: in which dtype every operator of a model runs, why, and what the casts cost."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mpgraph.errors import MPGraphError, PolicyError
from mpgraph.report.details import details
from mpgraph.report.layout import count, header
from mpgraph.report.records import Graph, Node, from_plain, to_plain
from mpgraph.report.render import Line, Page, Part, to_text
from mpgraph.report.select import check_selection, select
from mpgraph.report.summary import summary
from mpgraph.whole_files import load_json, to_json

if TYPE_CHECKING:
    from mpgraph.report.diff import ReportDiff

SCHEMA = 1


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """In which dtype every operator of a model runs, and why. A value: plain text and numbers.

    ``print(report)`` shows a summary; ``print(report.text(module="blocks.0"))`` every node of a
    module, ``report.print()`` either in colour. ``report.nodes`` holds the same as data.

    Attributes:
        model: The name of the model's class.
        precision: As given to ``mpgraph.convert``; "" for a bare graph.
        policy: The policy in one line; "" for a bare graph.
        graphs: One record per captured graph: see :class:`mpgraph.report.records.Graph`.
        selection: What ``filter`` selected; "" for everything.
    """

    model: str
    precision: str = ""
    policy: str = ""
    graphs: tuple[Graph, ...] = ()
    selection: str = ""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The model's own operators, of all graphs, in order."""
        return tuple(node for graph in self.graphs for node in graph.operators)

    @property
    def casts(self) -> tuple[Node, ...]:
        """Every cast, of all graphs; ``node.cast.kind`` tells whose it is."""
        return tuple(n for graph in self.graphs for n in graph.nodes if n.cast is not None)

    def filter(
        self,
        *,
        module: str | None = None,
        op: str | None = None,
        rule: str | None = None,
        dtype: str | None = None,
        graph: int | None = None,
    ) -> Report:
        """A report on some of the nodes.

        Args:
            module: A glob over module paths, as in a policy: ``"blocks.*.mlp"``.
            op: A glob over operators: ``"softmax"``, ``"aten.sum.*"``.
            rule: "lower", "widen", "promote", "follow" or "keep".
            dtype: The dtype that a node runs in: "bf16", "fp16", "fp32", …
            graph: The number of a graph, from 1, as the summary prints it.

        Raises:
            PolicyError: The model has no such module, operator, rule, dtype or graph.

        Example:
            >>> import mpgraph, torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
            >>> model = mpgraph.convert(model, "bf16", example_inputs=(torch.ones(2, 4),))
            >>> [node.name for node in mpgraph.explain(model).filter(rule="widen").nodes]
            ['layer_norm']
        """
        report = self if graph is None else self._only(graph)
        wanted = {"module": module, "op": op, "rule": rule, "dtype": dtype}
        given = {key: value for key, value in wanted.items() if value is not None}
        check_selection(report.model, report.graphs, given)
        if not given:
            return report
        graphs = tuple(select(graph, given) for graph in report.graphs)
        asked = [f"{key}={value}" for key, value in given.items()]
        selection = ", ".join([report.selection] * bool(report.selection) + asked)
        return dataclasses.replace(report, graphs=graphs, selection=selection)

    def _only(self, number: int) -> Report:
        if not 1 <= number <= len(self.graphs):
            raise PolicyError(
                f"{self.model} has no graph {number}: it has {len(self.graphs)}, counted from 1"
            )
        return dataclasses.replace(self, graphs=(self.graphs[number - 1],))

    def text(
        self,
        module: str | None = None,
        *,
        op: str | None = None,
        rule: str | None = None,
        dtype: str | None = None,
        graph: int | None = None,
        verbose: bool = False,
        width: int = 100,
    ) -> str:
        """The report as plain text: a summary, or every node of a selection.

        Args:
            module: Show the nodes of these modules; see :meth:`filter` for this and the others.
            op: Show the nodes of these operators.
            rule: Show the nodes with this rule.
            dtype: Show the nodes that run in this dtype.
            graph: Describe this graph alone.
            verbose: Show every node after the summary.
            width: The longest line.
        """
        shown = self.filter(module=module, op=op, rule=rule, dtype=dtype, graph=graph)
        return to_text(list(shown._parts(verbose)), width)

    def __repr__(self) -> str:
        return f"<Report on {self.model}, {len(self.graphs)} graphs: print() shows it>"

    def __str__(self) -> str:
        """The summary, or the selected nodes."""
        return self.text()

    def table(self, *, verbose: bool = False, **selection: Any) -> Page:
        """The same as :meth:`text`, for rich: coloured by dtype, as wide as the terminal."""
        return Page(list(self.filter(**selection)._parts(verbose)))

    def __rich__(self) -> Page:
        return self.table()

    def print(self, *, verbose: bool = False, **selection: Any) -> None:
        """Print :meth:`table` to the terminal."""
        from rich.console import Console

        Console().print(self.table(verbose=verbose, **selection))

    def _parts(self, verbose: bool) -> Iterator[Part]:
        if not self.selection:
            yield from summary(self)
        else:
            counts = f"{count(len(self.nodes), 'operator')}, {count(len(self.casts), 'cast')}"
            yield Line(header(self), heading=True)
            yield Line(f"showing {self.selection}: {counts}")
        if verbose or self.selection:
            yield from details(self, rules=bool(self.selection))

    def diff(self, other: Report) -> ReportDiff:
        """What changes from this report to ``other``: another policy, or a later version.

        Example:
            >>> import mpgraph, torch
            >>> model, x = torch.nn.Linear(4, 2), torch.ones(3, 4)
            >>> before = mpgraph.explain(mpgraph.convert(model, "bf16", example_inputs=(x,)))
            >>> after = mpgraph.explain(mpgraph.convert(model, "fp32", example_inputs=(x,)))
            >>> [(c.name, c.before, c.after) for c in before.diff(after).changed]
            [('linear', 'bf16', 'fp32')]
        """
        from mpgraph.report.diff import compare

        return compare(self, other)

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, text and numbers; what is empty is left out.

        ``{"schema": 1, "model", "precision", "policy", "graphs": [{"label", "engine",
        "reason", "seconds", "dynamic", "passes": [{"name", "numerics", "edits", "casts",
        "cast_bytes"}], "nodes": [{"name", "operator", "module", "takes", "gives", "runs_in",
        "rule", "reason", "source", "line", "region", "body", "cast": {"kind", "value",
        "source", "target", "bytes", "readers"}}], "islands": [{"block", "nodes",
        "operators", "why"}], "breaks": [{"reason", "line"}]}], "selection"}``.

        The attributes of :class:`Report` and of the classes in :mod:`mpgraph.report.records` say
        what each is. A later mpgraph may add keys; one that changes their meaning has another
        ``schema``.
        """
        values = {"schema": SCHEMA, "model": self.model, "precision": self.precision}
        graphs = [to_plain(graph) for graph in self.graphs]
        return {**values, "policy": self.policy, "graphs": graphs, "selection": self.selection}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """:meth:`to_dict` as JSON text; with a path, also written there, whole or not at all."""
        return to_json(self.to_dict(), path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`."""
        if values.get("schema") != SCHEMA:
            raise MPGraphError(
                f"expected a report with schema {SCHEMA}, found {values.get('schema')!r}. "
                "Write it again with the mpgraph that reads it: mpgraph.explain(model).to_json(…)"
            )
        known = ("model", "precision", "policy", "selection")
        fields = {key: values[key] for key in known if key in values}
        try:
            return cls(**fields, graphs=tuple(from_plain(Graph, g) for g in values["graphs"]))
        except (KeyError, TypeError) as error:
            raise MPGraphError(f"not a report as to_dict gives it: {error!r}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report that :meth:`to_json` wrote."""
        return cls.from_dict(load_json(path))


def explain(model: Any) -> Report:
    """Say in which dtype every operator of a converted model runs, why, and what casts cost.

    Looks only: the model and its graphs stay as they are.

    Args:
        model: A module from ``mpgraph.convert`` that has run or was given ``example_inputs``;
            or a model or wrapper with one such module in it; or a model that
            ``torch.compile(model, backend="mpgraph")`` has compiled; or one of its
            specialisations, or an ``fx.GraphModule``.

    Raises:
        MPGraphError: The module was not converted, or has not been captured yet; or there are
            several in the model.

    Example:
        >>> import mpgraph, torch
        >>> x = torch.ones(3, 4)
        >>> model = mpgraph.convert(torch.nn.Linear(4, 2), "bf16", example_inputs=(x,))
        >>> report = mpgraph.explain(model)
        >>> [(node.name, node.runs_in, node.reason) for node in report.nodes]
        [('linear', 'bf16', 'matrix units take 16-bit inputs and add in float32')]
    """
    from torch import fx, nn

    from mpgraph.plain import STATE

    if isinstance(model, Report):
        return model
    if isinstance(model, fx.GraphModule) and STATE not in vars(model):
        return _of_graph(model)
    is_entry = hasattr(model, "graph_module") or hasattr(model, "graphs")
    return _of_entry(model) if is_entry and not isinstance(model, nn.Module) else _of_model(model)


def _of_graph(gm: Any) -> Report:
    from mpgraph.report.build import Source, build_graph

    return Report(type(gm).__name__, graphs=(build_graph(Source("", gm)),))


def _of_entry(entry: Any) -> Report:
    from mpgraph.ir import short_name
    from mpgraph.report.build import build_graph, sources_of

    graphs = tuple(build_graph(source) for source in sources_of(entry))
    name = graphs[0].label.partition(" ")[0] if graphs else ""
    context = getattr(entry, "context", None)
    if context is None:
        return Report(name, graphs=graphs)
    precision = short_name(context.compute) if context.compute else "fp32"
    return Report(name, precision, str(context.policy), graphs)


def _of_backend(model: Any) -> list[Any]:
    """The graphs of a plain model that ``torch.compile(model, backend="mpgraph")`` has made."""
    from mpgraph.module import MixedPrecision

    module = sys.modules.get("mpgraph.backend")
    if module is None or any(isinstance(m, MixedPrecision) for m in model.modules()):
        return []
    return [entry for entry in module.entries if entry.belongs_to(model)]


def _of_model(model: Any) -> Report:
    from mpgraph.finding import captured_state
    from mpgraph.report.build import build_graph, sources_of

    if entries := _of_backend(model):
        reports = [_of_entry(entry) for entry in entries]
        graphs = tuple(graph for report in reports for graph in report.graphs)
        name = type(getattr(model, "_orig_mod", model)).__name__
        return dataclasses.replace(reports[-1], model=name, graphs=graphs)
    state = captured_state(model)
    entries = state.specialisations()
    return Report(
        model=state.original.__name__,
        precision=state.settings.precision.name,
        policy=str(state.settings.policy),
        graphs=tuple(build_graph(source) for entry in entries for source in sources_of(entry)),
    )
