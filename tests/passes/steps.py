"""Small graphs of a training step: parameters, gradients, and what is to be written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mpgraph.policy import Policy
from mpgraph.step.joint import StepContext
from mpgraph.step.slots import StepSlot

SHAPE = (2, 3)
NAMES = ("a", "b")


def context(**more: Any) -> StepContext:
    """What passes know about such a step."""
    return StepContext(policy=Policy(), compute=None, **more)


def gradients_graph() -> fx.Graph:
    """Returns the gradients of two parameters, which are inputs here, and a loss."""
    graph, mode = fx.Graph(), FakeTensorMode()
    with mode:
        value, number = torch.empty(SHAPE), torch.empty(())
    nodes = []
    for name in ("loss", *(f"grad_{name}" for name in NAMES)):
        node = graph.placeholder(name)
        kept = number if name == "loss" else value
        node.meta = {"val": kept, "slot": StepSlot("input", name, index=len(nodes))}
        nodes.append(node)
    graph.output({"results": nodes[:1], "gradients": dict(zip(NAMES, nodes[1:], strict=True))})
    graph.output_node().meta["part"] = "output"
    return graph


def placed(graph: fx.Graph, slot: StepSlot) -> fx.Node:
    """An input for a parameter or a tensor of the optimizer's state."""
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        node = graph.placeholder(slot.name)
    node.meta = {"val": first.meta["val"].new_empty(SHAPE), "slot": slot}
    return node


def run(graph: fx.Graph, *values: torch.Tensor) -> dict[str, Any]:
    """What the graph returns, by name, on values for its inputs in order."""
    graph.lint()
    return fx.GraphModule(graph.owning_module or {}, graph)(*values)
