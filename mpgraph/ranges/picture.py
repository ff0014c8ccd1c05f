"""The picture of a range report: where each layer's values lie between the limits of fp16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpgraph.errors import MPGraphError
from mpgraph.op_table import MOVES_DATA
from mpgraph.ranges.layout import number
from mpgraph.ranges.records import FP16_MAX, FP16_MIN_NORMAL, FP16_MIN_SUBNORMAL, NodeRange, Spread
from mpgraph.whole_files import write_whole

if TYPE_CHECKING:
    from mpgraph.ranges.report import RangeReport

_FORWARD, _BACKWARD, _OUT, _WIDE = "#0072B2", "#009E73", "#D55E00", "0.6"
_LIMITS = (
    (FP16_MAX, "largest, 65504", "-"),
    (FP16_MIN_NORMAL, "smallest normal, 6.1e-5", "--"),
    (FP16_MIN_SUBNORMAL, "smallest subnormal, 6e-8", ":"),
)
_ABOVE: dict[str, Any] = {
    "ha": "right", "va": "bottom", "xytext": (0, 1), "textcoords": "offset points",
}  # fmt: skip
_ROOM = 1e-12
_LEGEND = "Up to the largest, from the smallest 1 %; tick: median. Orange overflows; grey is fp32."


def draw(report: RangeReport, path: Path) -> None:
    """Write the picture; see :meth:`RangeReport.plot`."""
    figure_class, canvas_class = _matplotlib()
    layers = _layers(report.nodes)
    figure = figure_class(figsize=(max(7.0, 2.5 + 0.22 * len(layers)), 8.0), layout="constrained")
    canvas_class(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    scale = report.scale or 1.0
    is_half = [n.dtype in ("fp16", "bf16") for n in layers]
    _draw_side(above, [(n.true_forward or n.forward, 1.0) for n in layers], is_half, _FORWARD)
    gradients = [n.true_gradient or n.gradient for n in layers]
    factors = [scale if node.dtype == "fp16" else 1.0 for node in layers]
    _draw_side(below, list(zip(gradients, factors, strict=True)), is_half, _BACKWARD)
    above.set_title(f"{report.model}, {report.precision}: magnitudes next to the limits of fp16")
    above.set_ylabel("values")
    below.set_ylabel("gradients as they are computed")
    times = f"Gradients in fp16 are times the loss scale, {number(scale)}." if report.scale else ""
    below.set_xlabel(f"{_LEGEND}\n{times}", fontsize=8)
    below.set_xticks(range(len(layers)), [_label(node) for node in layers], rotation=90, fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, dpi=150))


def _matplotlib() -> tuple[Any, Any]:
    try:
        # Not pyplot: it would choose a window system, and keep every figure.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MPGraphError(
            "the picture needs matplotlib, which is not installed: pip install matplotlib, or "
            "install mpgraph with its extra 'demo'. The report itself needs none: print(report)."
        ) from error
    return Figure, FigureCanvasAgg


def _layers(nodes: Sequence[NodeRange]) -> list[NodeRange]:
    """The operators, in order; casts and views of a value would only repeat it."""
    made = (n for n in nodes if n.role == "operator" and n.operator.startswith("aten."))
    return [n for n in made if n.operator not in MOVES_DATA]


def _label(node: NodeRange) -> str:
    return f"{node.module}  {node.name}" if node.module else node.name


def _draw_side(
    axes: Any, spreads: Sequence[tuple[Spread | None, float]], is_half: list[bool], colour: str
) -> None:
    for place, (spread, factor) in enumerate(spreads):
        if spread is None or not spread.largest:
            continue
        high = spread.largest * factor
        low = max(spread.quantile(0.01) * factor, _ROOM) if spread.exponents else high
        middle = max(spread.quantile(0.5) * factor, _ROOM) if spread.exponents else high
        shade = (_OUT if spread.overflows(factor) else colour) if is_half[place] else _WIDE
        axes.plot([place, place], [low, high], color=shade, linewidth=3, alpha=0.5)
        axes.plot([place], [high], "^", color=shade, markersize=4)
        axes.plot([place], [middle], "_", color=shade, markersize=7)
    for limit, name, style in _LIMITS:
        axes.axhline(limit, color="0.3", linewidth=1, linestyle=style)
        axes.annotate(name, (1, limit), xycoords=("axes fraction", "data"), fontsize=7, **_ABOVE)
    axes.set_yscale("log")
    axes.grid(alpha=0.2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
