"""The figures of tools/bench.py as a table in markdown and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

_HEADS = (
    "model",
    "way",
    "÷ peer",
    "quartiles",
    "ms",
    "peak MiB",
    "casts",
    "MiB cast",
    "first step, s",
)


def markdown(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """A table of every way, and what it was measured on."""
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines = [f"Measured on: {facts}.", "", line(_HEADS), line(["---"] * len(_HEADS))]
    for row in rows:
        lines += [line(_cells(row, way)) for way in row["ratios"]]
    for way in rows[0]["ratios"]:
        ratios = [row["ratios"][way]["median"] for row in rows if way in row["ratios"]]
        mean = statistics.geometric_mean(ratios)
        lines.append(line(["geometric mean", way, f"{mean:.3f}", *[""] * (len(_HEADS) - 3)]))
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], way: str) -> list[str]:
    ratio = row["ratios"][way]
    return [
        f"{row['model']} {row['precision']}",
        way,
        f"{ratio['median']:.3f}",
        f"{ratio['low']:.3f} – {ratio['high']:.3f}",
        f"{1e3 * statistics.median(row['seconds'][way]):.2f}",
        f"{row['peak_mebibytes'][way]:.1f}",
        str(row["casts"][way]),
        f"{row['cast_mebibytes'][way]:.1f}",
        f"{row['first_step_seconds'][way]:.1f}",
    ]


def line(cells: Any) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def plot(rows: list[dict[str, Any]], peer: str, path: Path) -> None:
    """Bars of the time of a step ÷ the peer's, for every model and way, with quartiles."""
    import matplotlib.pyplot as plt

    ways = [way for way in rows[0]["ratios"] if way != peer]
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(rows), 4), layout="constrained")
    width = 0.8 / len(ways)
    for index, way in enumerate(ways):
        found = [(i, row["ratios"][way]) for i, row in enumerate(rows) if way in row["ratios"]]
        middle = [r["median"] for _, r in found]
        below = [r["median"] - r["low"] for _, r in found]
        above = [r["high"] - r["median"] for _, r in found]
        places = [i + width * (index - (len(ways) - 1) / 2) for i, _ in found]
        axes.bar(places, middle, width, yerr=(below, above), label=way, error_kw={"lw": 0.8})
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(rows)), [f"{row['model']}\n{row['precision']}" for row in rows])
    axes.set_ylabel(f"time of a step ÷ {peer}")
    figure.legend(loc="outside upper center", fontsize="small", ncols=len(ways))
    figure.savefig(path, dpi=120)
    plt.close(figure)
