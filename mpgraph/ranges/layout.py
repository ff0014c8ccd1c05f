"""What a range report says, as lines and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mpgraph.ranges.records import FP16_MAX, Finding, NodeRange, Spread
from mpgraph.report.layout import count, operator_text
from mpgraph.report.render import Column, Line, Part, Row, Table

if TYPE_CHECKING:
    from mpgraph.ranges.report import RangeReport

_MOST = 12
_LINE = 70  # what fits beside the label
_FEW = 3


def headline(report: RangeReport) -> str:
    """The model, how it ran, and what came of it, in one line."""
    scale = f"loss scale {number(report.scale)}" if report.scale else ""
    loss = "" if report.loss is None else f"loss {report.loss:.4g}"
    parts = (report.model, report.precision, f"policy {report.policy}", scale, loss)
    return " · ".join(part for part in parts if part)


def finding_lines(report: RangeReport) -> Iterator[Part]:
    """What left the range first, and what to do."""
    finding = report.finding
    yield Line("")
    if finding is None:
        yield Line(f"The step is finite.{_fit(report)}")
        return
    yield Line(_SAID[finding.kind](finding), heading=True)
    for label, text in _facts(finding, report):
        yield Line(f"{label:<9}{text}", indent=2)


def _fit(report: RangeReport) -> str:
    if report.precision.startswith("fp16"):
        return ""
    if report.would_fit_fp16:
        return " Every value and gradient would fit fp16."
    return " Not every value and gradient would fit fp16: see below."


def _node(finding: Finding) -> str:
    """``linear_3 (linear, fp16) of blocks.0.mlp``."""
    facts = ", ".join(filter(None, (operator_text(finding.operator), finding.dtype)))
    module = f" of {finding.module}" if finding.module else ""
    return f"%{finding.name} ({facts}){module}" if facts else f"%{finding.name}{module}"


_SAID: dict[str, Callable[[Finding], str]] = {
    "forward": lambda f: f"Forward: {_node(f)} left the range of {f.dtype}.",
    "backward": lambda f: f"Backward: the gradient of {_node(f)} left the range of {f.dtype}.",
    "loss": lambda f: (
        "The loss is not finite, though the model's results are: what computes it from them, "
        "outside of the model, made it so."
    ),
    "input": lambda f: f"The input {f.name!r} is not finite: it was given so.",
    "parameter": lambda f: f"The parameter {f.name!r} is not finite: an earlier step made it so.",
    "fp32": lambda f: f"{_node(f)} is not finite in fp32 either: no precision is to blame.",
    "between": lambda f: (
        "A value left its range in what Dynamo leaves to Python, between two graphs"
        + (f": it arrives as {_node(f)}." if f.name else ".")
    ),
}


def said(finding: Finding) -> str:
    """The finding in one paragraph: what, where, and what to do."""
    texts = [_SAID[finding.kind](finding)]
    if finding.line:
        texts.append(f"It is at {finding.line}.")
    if finding.scale is not None:
        texts.append(f"Cure: mpgraph.guard(..., scale={number(finding.scale)}).")
    elif finding.overrides:
        texts.append(f'Cure: policy="{finding.policy}".')
    return " ".join(texts)


def _facts(finding: Finding, report: RangeReport) -> Iterator[tuple[str, str]]:
    if finding.line:
        yield "at", finding.line
    if finding.source:
        yield "from", f"{finding.source}, cast to {finding.dtype}"
    if finding.bad:
        share = f"{finding.bad} of {count(finding.count, 'value')} infinite or NaN"
        yield "values", share + _largest(finding, report)
    yield from _cures(finding)


def _largest(finding: Finding, report: RangeReport) -> str:
    if finding.largest is None:
        return ""
    if finding.kind == "backward" and report.scale:
        scaled = finding.largest * report.scale
        return (
            f"; the true gradient reaches {number(finding.largest)}, times the scale "
            f"{number(scaled)}; fp16 ends at 65504"
        )
    return f"; in fp32 they reach {number(finding.largest)}; fp16 ends at 65504"


def _cures(finding: Finding) -> Iterator[tuple[str, str]]:
    if finding.kind not in ("forward", "backward"):
        return
    if finding.tried is False and finding.overrides:
        yield from _policy("cure", "none found: still not finite with ", finding)
        return
    if finding.scale is not None:
        yield "cure", f"a lower loss scale: mpgraph.guard(…, scale={number(finding.scale)})"
        yield "", "(guard gets there by itself, one skipped step for each factor of two)"
    if finding.scale is None and finding.overrides:
        yield from _policy("cure", "", finding)
    elif 0 < len(finding.overrides) <= _FEW:
        yield from _policy("or pin", "", finding)
    if finding.scale is None and not finding.overrides:
        yield "cure", "none found: make the values themselves smaller"
    if finding.tried:
        yield "tried", "with it the step is finite"


def _policy(label: str, said: str, finding: Finding) -> Iterator[tuple[str, str]]:
    """The policy to paste; where a line would break inside its quotes, its name and its pins."""
    if len(said) + len(finding.policy) <= _LINE:
        yield label, f'{said}policy="{finding.policy}"'
        return
    yield label, f"{said}policy=report.finding.policy, with these pins:"
    for override in finding.overrides:
        yield "", str(override)


def summary(report: RangeReport) -> Iterator[Part]:
    """How near each layer comes to fp16's ends; the nearest ones."""
    rows = list(_layers(report))
    if not rows:
        return
    yield Line("")
    yield Line(_scale_line(report))
    yield Line("")
    ordered = sorted(rows, key=lambda row: -row.urgency)[:_MOST]
    shown = [row for row in rows if row in ordered]
    more = f", the {len(shown)} nearest to its ends" if len(shown) < len(rows) else ""
    yield Line(f"{count(len(rows), 'layer')} next to fp16{more}", heading=True)
    yield _layer_table(shown, report.scale)


def _scale_line(report: RangeReport) -> str:
    gradients = [n.true_gradient for n in _held(report.nodes) if n.true_gradient is not None]
    if not gradients:
        return "No gradients were seen."
    scale = report.scale or report.suggested_scale or 1.0
    total = sum(e for g in gradients for _, e in g.exponents)
    gone = sum(g.vanishing(scale) * sum(n for _, n in g.exponents) for g in gradients)
    lost = percent(gone / total if total else 0.0)
    best = number(report.suggested_scale) if report.suggested_scale else "none in its limits"
    return (
        f"Gradients: the largest is {number(max(g.largest for g in gradients))}; at scale "
        f"{number(scale)}, {lost} of them vanish in fp16. A loss scale to start with: {best}."
    )


class _Layer:
    """The 16-bit values of one module, together."""

    def __init__(self, module: str, nodes: Sequence[NodeRange], scale: float) -> None:
        self.module = module
        self.dtypes = "/".join(dict.fromkeys(n.dtype for n in nodes))
        self.forward = _together(n.true_forward or n.forward for n in nodes)
        self.gradient = _together(n.true_gradient for n in nodes)
        high = [s.largest * f for s, f in ((self.forward, 1.0), (self.gradient, scale)) if s]
        self.lost = max((n.true_gradient.lost(scale) for n in nodes if n.true_gradient), default=0)
        self.urgency = max([math.log2(max(h, 1e-30) / FP16_MAX) for h in high], default=-99.0)
        self.urgency = max(self.urgency, math.log2(self.lost) if self.lost else -99.0)


def _together(spreads: Iterable[Spread | None]) -> Spread | None:
    merged: Spread | None = None
    for spread in spreads:
        if spread is not None:
            merged = spread.merged(merged)
    return merged


def _held(nodes: Sequence[NodeRange]) -> list[NodeRange]:
    """What fp16 holds, or would hold: the 16-bit values; where there is none, all."""
    floating = [n for n in nodes if n.role in ("operator", "cast", "weight")]
    return [n for n in floating if n.dtype in ("fp16", "bf16")] or floating


def _layers(report: RangeReport) -> Iterator[_Layer]:
    groups: dict[str, list[NodeRange]] = {}
    for node in _held(report.nodes):
        groups.setdefault(node.module, []).append(node)
    scale = report.scale or report.suggested_scale or 1.0
    for module, nodes in groups.items():
        yield _Layer(module, nodes, scale)


def _layer_table(layers: Sequence[_Layer], scale: float | None) -> Table:
    columns = (
        Column("module", least=20, keep_end=True),
        Column("dtype"),
        Column("largest value", right=True),
        Column("true gradient", right=True),
        Column("times scale", right=True),
        Column("vanish", right=True),
    )
    return Table(
        columns,
        [
            Row(
                (
                    layer.module or "(the model)",
                    layer.dtypes,
                    _marked(layer.forward, 1.0),
                    number(layer.gradient.largest) if layer.gradient else "–",
                    _marked(layer.gradient, scale),
                    percent(layer.gradient.vanishing(scale or 1.0)) if layer.gradient else "–",
                ),
                "fp64" if _is_out(layer, scale) else "",
            )
            for layer in layers
        ],
    )


def _is_out(layer: _Layer, scale: float | None) -> bool:
    pairs = ((layer.forward, 1.0), (layer.gradient, scale or 1.0))
    return any(spread.overflows(factor) for spread, factor in pairs if spread is not None)


def _marked(spread: Spread | None, scale: float | None) -> str:
    if spread is None or scale is None:
        return "–"
    return number(spread.largest * scale) + (" !" if spread.overflows(scale) else "")


def node_table(nodes: Sequence[NodeRange], scale: float | None) -> Table:
    """One row for every value."""
    columns = (
        Column("node", least=16),
        Column("module", least=14, keep_end=True),
        Column("dtype"),
        Column("largest value", right=True),
        Column("bad", right=True),
        Column("true gradient", right=True),
        Column("times scale", right=True),
        Column("vanish", right=True),
        Column("subnormal", right=True),
    )
    return Table(columns, [_node_row(node, scale) for node in nodes])


def _node_row(node: NodeRange, scale: float | None) -> Row:
    value, gradient = node.true_forward or node.forward, node.true_gradient
    half = node.dtype == "fp16"
    cells = (
        node.name,
        node.module,
        node.dtype,
        _marked(value, 1.0) if half else (number(value.largest) if value else "–"),
        str(node.forward.bad if node.forward else 0),
        number(gradient.largest) if gradient else "–",
        _marked(gradient, scale) if half else "–",
        percent(gradient.vanishing(scale or 1.0)) if gradient and half else "–",
        percent(gradient.subnormal(scale or 1.0)) if gradient and half else "–",
    )
    return Row(cells, node.dtype)


def number(value: float | None) -> str:
    """Three digits; whole numbers up to a million as they are."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value == int(value) and 1 <= value < 1e6 else f"{value:.3g}"


def percent(share: float) -> str:
    """``0 %``, ``<0.1 %``, ``12.3 %``."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{share * 100:.1f} %" if share else "0 %"
