"""A graph on another device than it was captured on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from mpgraph import ir


def put_on(gm: fx.GraphModule, device: str | torch.device) -> None:
    """Let everything in a graph, and in its sub-graphs, lie on one device.

    Values and constants move, and what an operator makes (``arange``, ``full``) is made there: a
    file has no devices, and what the lowering adds to a graph is made on the CPU.
    """
    place = torch.device(device)
    for body in ir.all_graphs(gm):
        for node in body.graph.nodes:
            _move(node, place)
        for name, value in [*vars(body).items(), *body._buffers.items()]:
            if isinstance(value, torch.Tensor):
                setattr(body, name, value.to(place))
        body.recompile()


def _move(node: fx.Node, device: torch.device) -> None:
    given = (*node.args, *node.kwargs.values())
    if any(isinstance(value, torch.device) and value != device for value in given):
        node.args = tuple(_moved(value, device) for value in node.args)
        node.kwargs = {key: _moved(value, device) for key, value in node.kwargs.items()}
    for key in ("val", "captured"):
        if key in node.meta:
            node.meta[key] = pytree.tree_map_only(
                torch.Tensor, lambda value: _fake_on(value, device), node.meta[key]
            )


def _moved(argument: Any, device: torch.device) -> Any:
    return device if isinstance(argument, torch.device) else argument


def _fake_on(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    if value.device == device or not isinstance(value, FakeTensor):
        return value
    with value.fake_mode, torch.no_grad():
        return value.to(device)
