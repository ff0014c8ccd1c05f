"""What the zoo knows of the package under test: how to convert, and what it says it did."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Convert = Callable[[nn.Module], nn.Module]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ENGINES = ("auto", "export", "dynamo")
# Stands in for mpgraph to prove the harness: the model itself, run under torch.autocast.
REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What ``mpgraph.explain`` says of a converted model; None where it does not say."""

    engine: str | None = None
    # Graphs of all calls so far; nodes and casts are of those that serve the first call.
    graphs: int | None = None
    nodes: int | None = None
    casts: int | None = None
    capture_seconds: float | None = None


def under_autocast(model: nn.Module, precision: str = "bf16", device: str = "cpu") -> nn.Module:
    """Make the model's own forward run under ``torch.autocast``; return the model."""
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, DTYPES[precision]):
            return plain(*args, **kwargs)

    model.forward = forward
    return model


def converter(engine: str, precision: str, policy: str, device: str = "cpu") -> Convert:
    """Return the conversion under test."""
    if engine == REFERENCE:
        return functools.partial(under_autocast, precision=precision, device=device)
    import mpgraph

    return functools.partial(mpgraph.convert, precision=precision, policy=policy, capture=engine)


def facts_of(converted: nn.Module) -> Facts:
    """Read engine, graphs, nodes, casts and capture time from ``mpgraph.explain``."""
    try:
        import mpgraph

        report = mpgraph.explain(converted)
        # The parts of one call, where the graph breaks, are numbered at the end of its label.
        calls = [graph.label.partition(", part ")[0] for graph in report.graphs]
        first = [g for g, call in zip(report.graphs, calls, strict=True) if call == calls[0]]
        return Facts(
            engine="+".join(sorted({graph.engine for graph in report.graphs})) or None,
            graphs=len(report.graphs),
            nodes=sum(len(graph.nodes) for graph in first),
            casts=sum(len(graph.casts) for graph in first),
            capture_seconds=round(sum(graph.seconds for graph in first), 3) or None,
        )
    except Exception:  # not an mpgraph model, or explain cannot: the comparison does not need it
        return Facts()


class CastCounter(TorchDispatchMode):
    """Counts copies from one floating dtype to another, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it if it is a cast."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            source = args[0].dtype
            is_cast = source is not out.dtype and source.is_floating_point
            self.count += is_cast and out.is_floating_point()
        return out
