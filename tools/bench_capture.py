"""Time what happens before the first step: capture, passes, and Inductor's compilation beside them.

    python tools/bench_capture.py [--blocks 5 50] [--device cuda] [--json FILE]

A chain of transformer blocks is converted and run once, then put into a TrainStep with AdamW; the
seconds of each part are those of one run, by the clock. The last column is ``torch.compile`` of the
same model under ``torch.autocast``: Dynamo, AOTAutograd and Inductor for forward and backward, to
the end of its first step. Caches are off.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_eager import machine, write
from bench_passes import Block
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import mpgraph
from mpgraph.step import compiled, train_step

COLUMNS = ("nodes", "convert", "nodes of the step", "trace", "update", "passes", "Inductor", "peer")


class Clock:
    """Adds up the seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block is a part of that name."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are a part of that name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def chain(blocks: int, device: str) -> nn.Module:
    """Blocks in a row, each with parameters of its own."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).to(device)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Something to differentiate."""
    return model(x).float().square().mean()


def measure(blocks: int, device: str) -> dict[str, Any]:
    """The seconds of every part, for one size."""
    torch._dynamo.reset()
    x, clock = torch.randn(2, 8, 16, device=device), Clock()
    model = mpgraph.convert(chain(blocks, device), "bf16", capture="export")
    with clock.part("convert"):
        model(x)
    report = mpgraph.explain(model)
    step = _first_steps(chain(blocks, device), x, clock)
    _peer(chain(blocks, device), x, device, clock)
    return {
        "blocks": blocks,
        "nodes": len(report.nodes),
        "nodes of the step": len(step.explain().nodes),
        **clock.seconds,
    }


def _first_steps(model: nn.Module, x: Tensor, clock: Clock) -> mpgraph.TrainStep:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = mpgraph.TrainStep(model, optimizer, loss_of, precision="bf16")
    parts = {
        (train_step, "trace_gradients"): "trace",
        (train_step, "trace_update"): "update",
        (train_step, "trace_fused_update"): "update",
        (train_step, "assemble"): "passes",
        (compiled, "run_passes"): "passes",
        (compiled, "cut"): "passes",
        (compiled, "Halves"): "Inductor",
    }
    patches = [
        mock.patch.object(owner, name, clock.timed(part, getattr(owner, name)))
        for (owner, name), part in parts.items()
    ]
    for patch in patches:
        patch.start()
    step(x), step(x)
    mock.patch.stopall()
    return step


def _peer(model: nn.Module, x: Tensor, device: str, clock: Clock) -> None:
    call = torch.compile(model)
    with clock.part("peer"):
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(call, x)
        loss.backward()
        float(loss)


def main() -> None:
    """Measure every size, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    measure(1, options.device)  # warm-up
    rows = []
    for blocks in track(options.blocks, "first steps"):
        rows.append(measure(blocks, options.device))
        if options.json:
            write(options.json, {"machine": machine(options.device), "rows": rows})
    table = Table("blocks", *COLUMNS)
    for row in rows:
        table.add_row(str(row["blocks"]), *(_text(row[name]) for name in COLUMNS))
    Console(width=120).print(table)


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f} s"


if __name__ == "__main__":
    main()
