"""The demo's picture: loss curves, and how far each run is from the fp32 one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Curve = tuple[Sequence[float], Sequence[tuple[int, float]]]  # train losses, (step, validation)

# Blue, vermilion and bluish green: told apart by readers with any common colour blindness. The
# curves lie on each other, so the first is broad and pale and the next ones lie thinner on top.
STYLES = (
    {"color": "#0072B2", "linewidth": 5.0, "alpha": 0.35},
    {"color": "#D55E00", "linewidth": 2.2, "linestyle": "-"},
    {"color": "#009E73", "linewidth": 1.4, "linestyle": (0, (4, 2))},
)


def draw_losses(path: Path, curves: Mapping[str, Curve], baseline: str) -> None:
    """Write a PNG: losses above, differences from ``baseline`` on the same batches below."""
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 7), height_ratios=(2, 1), layout="constrained"
    )
    base, _ = curves[baseline]
    for (name, (losses, validation)), style in zip(curves.items(), STYLES, strict=True):
        steps, smooth = smoothed(losses)
        above.plot(steps, smooth, label=name, **style)
        above.plot(
            *zip(*validation, strict=True), "o", color=style["color"], alpha=0.8, ms=5, mfc="none"
        )
        if name != baseline:
            apart = [loss - reference for loss, reference in zip(losses, base, strict=True)]
            below.plot(*smoothed(apart), label=name, **style)
    above.plot([], [], "o", color="0.3", mfc="none", ms=5, label="validation")
    _label(above, "cross-entropy, nats per byte")
    above.set_title(
        "A small GPT, same weights and batches, three precisions\n(training: means of 10 steps)"
    )
    below.axhline(0, color=STYLES[0]["color"], linewidth=1)
    _label(below, f"training loss − {baseline}'s")
    below.set_xlabel("optimizer step")
    below.ticklabel_format(axis="y", scilimits=(-3, 3))
    figure.align_ylabels()
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)
    os.replace(partial, path)


def smoothed(values: Sequence[float], width: int = 10) -> tuple[list[int], list[float]]:
    """Running means over ``width`` steps, each at the last of its steps."""
    width = min(width, len(values))
    steps = range(width, len(values) + 1)
    return list(steps), [sum(values[step - width : step]) / width for step in steps]


def _label(axes: Axes, text: str) -> None:
    axes.set_ylabel(text)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
