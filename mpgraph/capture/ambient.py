"""What is in force around the nodes of a graph from Dynamo: autocast regions, gradient mode."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.pipeline import PassContext

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast


@dataclasses.dataclass(frozen=True)
class Ambient:
    """What is in force around a node: the model's own autocast region, and gradient mode."""

    region: ir.Region | None
    grad: bool

    @contextlib.contextmanager
    def active(self, context: PassContext) -> Iterator[None]:
        """Make it so."""
        with context.autocast(self.region), torch.set_grad_enabled(self.grad):
            yield


def ambient_now(context: PassContext) -> Ambient:
    """The state at this moment, as the difference from the conversion's own autocast."""
    device = context.device
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if enabled else None
    same = enabled == (context.compute is not None) and dtype == context.compute
    return Ambient(None if same else ir.Region(enabled, dtype), torch.is_grad_enabled())


def with_ambient(
    graph: fx.Graph, start: Ambient, context: PassContext
) -> Iterator[tuple[fx.Node, Ambient]]:
    """Every node with what is in force when it runs."""
    now = start
    regions: list[ir.Region | None] = []
    for node in graph.nodes:
        if node.target is ENTER_AUTOCAST:
            regions.append(now.region)
            now = dataclasses.replace(now, region=_entered(node, now, context))
        elif node.target is EXIT_AUTOCAST:
            now = dataclasses.replace(now, region=regions.pop())
        elif node.target is ir.SET_GRAD:
            now = dataclasses.replace(now, grad=bool(node.args[0]))
        yield node, now


def _entered(node: fx.Node, now: Ambient, context: PassContext) -> ir.Region | None:
    device, dtype, enabled = _first_three(node.args)
    if device != context.device:
        return now.region
    if not enabled:
        return ir.Region(False, None)
    if dtype is None:  # whatever is set, as torch.autocast does
        dtype = context.compute if now.region is None else now.region.dtype
    return ir.Region(True, dtype or torch.get_autocast_dtype(context.device))


def _first_three(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args, None, None)[:3]


def mark(gm: fx.GraphModule, context: PassContext, ambient: Ambient) -> None:
    """Write region and gradient mode beside every node, and erase the regions' own nodes."""
    grad = ambient.grad
    for node, around in list(with_ambient(gm.graph, ambient, context)):
        if around.region is not None:
            node.meta["region"] = around.region
        if around.grad is not grad and node.target is not ir.SET_GRAD:
            node.meta["grad"] = around.grad
    for target in (EXIT_AUTOCAST, ENTER_AUTOCAST):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            gm.graph.erase_node(node)
