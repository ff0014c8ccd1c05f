"""From rewritten graphs to the records of a report, reading only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassReport, cast_bytes
from mpgraph.report.islands import find_islands
from mpgraph.report.records import Break, Cast, Graph, Node, Pass


@dataclasses.dataclass(frozen=True)
class Source:
    """One graph to report on, and what is known besides it."""

    label: str
    graph_module: fx.GraphModule
    passes: Sequence[PassReport] = ()
    engine: str = ""
    reason: str = ""
    seconds: float = 0.0
    compute: torch.dtype | None = None
    breaks: tuple[Break, ...] = ()


def sources_of(entry: Any) -> Iterator[Source]:
    """The graphs of a specialisation, whichever engine captured it.

    One of the export engine has one graph (``captured``, ``reports``); one of Dynamo has
    ``graphs``, pairs of a graph and its reports, and ``breaks`` between them.
    """
    captured = getattr(entry, "captured", None)
    parts = getattr(entry, "graphs", None)
    if parts is None:
        parts = [(entry.graph_module, getattr(entry, "reports", ()))]
    whole = Source(
        label=str(getattr(entry, "label", "")),
        # A call of which no part could be captured still has breaks that say why.
        graph_module=fx.GraphModule({}, fx.Graph()),
        engine=str(getattr(entry, "engine", "")),
        reason=str(getattr(entry, "reason", "")),
        seconds=float(getattr(captured or entry, "seconds", 0.0)),
        compute=getattr(getattr(entry, "context", None), "compute", None),
        breaks=tuple(map(_break, getattr(entry, "breaks", None) or ())),
    )
    if not parts:
        yield whole
    for index, (gm, passes) in enumerate(parts):
        part = dataclasses.replace(whole, graph_module=gm, passes=passes)
        if len(parts) > 1:
            part = dataclasses.replace(
                part, label=f"{part.label}, part {index + 1} of {len(parts)}"
            )
        yield part if index == 0 else dataclasses.replace(part, reason="", seconds=0.0, breaks=())


def _break(value: Any) -> Break:
    """Engines may describe a break as text, as a pair, or as an object with these attributes."""
    if isinstance(value, (tuple, list)):
        return Break(*map(str, value[:2]))
    reason = getattr(value, "reason", value)
    return Break(str(reason), str(getattr(value, "line", "") or getattr(value, "where", "")))


def build_graph(source: Source) -> Graph:
    """The record of one graph; the graph is left as it is."""
    builder = _Builder(source.compute)
    nodes = tuple(builder.nodes(source.graph_module))
    return Graph(
        label=source.label,
        engine=source.engine,
        reason=source.reason,
        seconds=round(source.seconds, 3),
        dynamic=tuple(_dynamic_sizes(source.graph_module)),
        passes=tuple(
            Pass(p.name, p.numerics, p.edits, p.casts, p.cast_bytes) for p in source.passes
        ),
        nodes=nodes,
        islands=tuple(find_islands(source.graph_module, {n.name: n for n in nodes if not n.body})),
        breaks=source.breaks,
    )


def _dynamic_sizes(gm: fx.GraphModule) -> Iterator[str]:
    for node in gm.graph.find_nodes(op="placeholder"):
        slot, value = node.meta.get("slot"), node.meta.get("val")
        if isinstance(value, torch.Tensor) and (slot is None or slot.kind == "input"):
            name = node.name if slot is None else slot.target
            for dim, size in enumerate(value.shape):
                if not isinstance(size, int):
                    yield f"{name}[{dim}]"


class _Builder:
    def __init__(self, compute: torch.dtype | None) -> None:
        self.compute = compute
        self.lines: dict[str, str] = {}
        self.dtypes: dict[fx.Node, tuple[str, ...]] = {}

    def nodes(self, gm: fx.GraphModule, body: str = "") -> Iterator[Node]:
        """Operators and casts in order; a sub-graph's right before the node that calls it."""
        bodies = dict(ir.call_graphs(gm))
        for node in gm.graph.nodes:
            if node.op == "get_attr" and str(node.target) in bodies:
                name = f"{body}.{node.target}" if body else str(node.target)
                yield from self.nodes(bodies[str(node.target)], name)
            elif node.op == "placeholder":
                if getattr(node.meta.get("slot"), "kind", "") == "cast":
                    yield self._weight_cast(node)
            elif (ir.is_operator(node) or ir.is_higher_order(node)) and self._dtypes(node):
                # What yields no tensor is left out: size arithmetic, mode switches, checks.
                yield self._node(node, body)

    def _node(self, node: fx.Node, body: str) -> Node:
        decision: ir.Decision | None = node.meta.get("decision")
        inserted = ir.is_inserted(node)
        made = _cast(node) if inserted or ir.is_cast(node) else None
        return Node(
            name=node.name,
            operator=str(node.target),
            module=ir.module_path(node),
            takes=tuple(d for n in node.all_input_nodes for d in self._dtypes(n)),
            gives=self._dtypes(node),
            runs_in=_runs_in(node, decision),
            rule=decision.rule.value if decision else "",
            reason="inserted by mpgraph" if inserted else decision.reason if decision else "",
            source=decision.source if decision else "",
            line=self._line(node),
            region=_region(node),
            body=body,
            cast=made if made is not None and (inserted or made.source != made.target) else None,
        )

    def _dtypes(self, node: fx.Node) -> tuple[str, ...]:
        """The dtypes of the tensors that a node yields."""
        found = self.dtypes.get(node)
        if found is None:
            values = [v for v in _values(node) if isinstance(v, torch.Tensor)]
            found = self.dtypes[node] = tuple(ir.short_name(v.dtype) for v in values)
        return found

    def _line(self, node: fx.Node) -> str:
        # Traces are long and shared by many nodes; taking one apart costs more than the rest.
        trace = str(node.meta.get("stack_trace") or "")
        if trace not in self.lines:
            self.lines[trace] = ir.source_line(node)
        return self.lines[trace]

    def _weight_cast(self, node: fx.Node) -> Node:
        slot, value = node.meta["slot"], node.meta["val"]
        wide = slot.dtype is torch.float32 and self.compute is not None
        source = cast(torch.dtype, self.compute) if wide else torch.float32
        size = value.numel() * (source.itemsize + value.element_size())
        names = (ir.short_name(source), ir.short_name(slot.dtype))
        return Node(
            name=node.name,
            operator=str(ir.CAST),
            module=ir.module_path(node),
            takes=names[:1],
            gives=names[1:],
            runs_in=names[1],
            reason="cast once per change of the parameter",
            cast=Cast("weight", slot.target, *names, int(size), _readers(node)),
        )


def _cast(node: fx.Node) -> Cast:
    source = ir.cast_source(node)
    dtype = ir.dtype_of(source)
    return Cast(
        kind="inserted" if ir.is_inserted(node) else "model",
        value=source.name,
        source=ir.short_name(dtype) if dtype else "",
        target=ir.short_name(ir.cast_target(node)),
        bytes=cast_bytes(node),
        readers=_readers(node),
    )


def _readers(node: fx.Node) -> tuple[str, ...]:
    return tuple(user.name for user in node.users)


def _values(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _runs_in(node: fx.Node, decision: ir.Decision | None) -> str:
    """What a node computes in: what was decided, or what torch makes of what arrives."""
    if decision is not None and (decided := decision.argument or decision.dtype):
        return ir.short_name(decided)
    floats = [d for n in node.all_input_nodes if (d := _floating(n)) is not None]
    if not floats or any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        result = _floating(node)
        return ir.short_name(result) if result is not None else ""
    widest = floats[0]
    for dtype in floats[1:]:
        widest = torch.promote_types(widest, dtype)
    return ir.short_name(widest)


def _floating(node: fx.Node) -> torch.dtype | None:
    for item in _values(node):
        if isinstance(item, torch.Tensor) and (item.is_floating_point() or item.is_complex()):
            return item.dtype
    return None


def _region(node: fx.Node) -> str:
    marks = []
    region = ir.region_of(node)
    if region is not None:
        dtype = f" {ir.short_name(region.dtype)}" if region.dtype else ""
        marks.append(f"autocast{dtype}" if region.enabled else "autocast off")
    if node.meta.get("grad") is False:
        marks.append("no_grad")
    return ", ".join(marks)
