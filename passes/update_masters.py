"""Write what a step has computed: parameters, optimizer state, loss scale; or leave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import (
    StepContext,
    append,
    outputs_of,
    set_outputs,
    slot_node,
    slot_nodes,
)


@graph_pass(numerics="exact")
def update_masters(graph: fx.Graph, context: StepContext) -> int:
    """Turn new values into writes; where a gradient is not finite, the old ones stay.

    The loss scale moves by its own rule, and sums of gradients are written in any case.
    """
    outputs = outputs_of(graph)
    new, kept = dict(outputs.pop("new", {})), dict(outputs.pop("kept", {}))
    found = outputs.get("found_inf")
    places = slot_nodes(graph)
    if found is not None and new:
        olds = [places[name] for name in new]
        selected = append(graph, _select, [found, *olds, *new.values()], "update")
        new = dict(zip(new, selected, strict=True))
    if found is not None:
        for move, slots in context.scales:
            kept.update(_moved(graph, move, slots, found))
            places = slot_nodes(graph)
    written = {**new, **kept}
    with graph.inserting_before(graph.output_node()):
        for name, value in written.items():
            _write(graph, places[name], value)
    set_outputs(graph, outputs)
    return len(written)


def _select(found: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """Half of the values are those of before, the other half the new ones."""
    count = len(values) // 2
    skip = found > 0
    return [
        torch.where(skip.to(old.device), old, new)
        for old, new in zip(values[:count], values[count:], strict=True)
    ]


def _moved(
    graph: fx.Graph, move: Callable[..., Any], slots: Sequence[Any], found: fx.Node
) -> dict[str, Any]:
    mode = found.meta["val"].fake_mode
    nodes = [slot_node(graph, slot, mode.from_tensor(slot.read())) for slot in slots]
    moved = append(graph, move, [found, *nodes], "scale")
    return {slot.name: value for slot, value in zip(slots, moved, strict=True)}


def _write(graph: fx.Graph, place: fx.Node, value: Any) -> None:
    node = graph.call_function(torch.ops.aten.copy_.default, (place, value))
    node.meta = {"val": place.meta["val"], "part": "write"}
