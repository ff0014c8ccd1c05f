"""Time the passes on graphs of growing size: seconds per node should stay flat.

    python tools/bench_passes.py [--nodes 1000 10000 100000] [--json FILE]

The graphs are chains of one transformer-like block, captured once and copied, so that capture
time stays apart. Prints a table and, with --json, keeps the raw figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_eager import write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, fx, nn

from mpgraph.capture.export import Call, capture_export
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.pipeline import PassContext, run_passes
from mpgraph.policy import Policy
from mpgraph.structure import flatten


class Block(nn.Module):
    """Attention and a feed-forward layer, each with its norm and residual."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """One block on (batch, positions, width)."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.out(weights @ v)
        return x + self.down(torch.relu(self.up(self.norm(x))))


def chain(nodes: int, context: PassContext) -> fx.GraphModule:
    """A graph of about ``nodes`` nodes: blocks in a row, each with parameters of its own."""
    model = Block()
    leaves, spec = flatten(((torch.randn(2, 8, 16),), {}))
    call = Call(leaves, spec, ["x"], [frozenset()])
    block = capture_export(model, Block.forward, call, context.autocast()).graph_module
    graph = fx.Graph()
    value: fx.Node | None = None
    while len(graph.nodes) < nodes:
        value = _append(graph, block.graph, value)
    graph.output((value,))
    return fx.GraphModule({}, graph)


def _append(graph: fx.Graph, block: fx.Graph, value: fx.Node | None) -> fx.Node:
    copies: dict[fx.Node, fx.Node] = {}
    for node in block.nodes:
        if node.op == "output":
            return copies[node.args[0][0]]  # type: ignore[index]
        if node.op == "placeholder" and node.name == "x" and value is not None:
            copies[node] = value
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if node.op == "placeholder":
                copies[node].target = copies[node].name
    raise AssertionError("a graph without an output")


def measure(nodes: int, repeats: int) -> dict[str, Any]:
    """Seconds for all passes on one size, repeated on fresh graphs."""
    context = PassContext(Policy(), torch.bfloat16)
    seconds = []
    for _ in range(repeats):
        gm = chain(nodes, context)
        count = len(gm.graph.nodes)
        started = time.perf_counter()
        run_passes(gm, DEFAULT_PASSES, context)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "nodes": count,
        "seconds": seconds,
        "median_seconds": median,
        "microseconds_per_node": median / count * 1e6,
    }


def main() -> None:
    """Measure every size, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measure(200, 1)  # warm-up
    rows = [measure(n, options.repeats) for n in track(options.nodes, "passes")]
    table = Table("nodes", "median s", "spread s", "µs per node")
    for row in rows:
        spread = f"{min(row['seconds']):.2f} - {max(row['seconds']):.2f}"
        per_node = f"{row['microseconds_per_node']:.0f}"
        table.add_row(f"{row['nodes']:,}", f"{row['median_seconds']:.2f}", spread, per_node)
    Console().print(table)
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__,
                   "processor": platform.machine(), "cores": os.cpu_count()}  # fmt: skip
        write(options.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
