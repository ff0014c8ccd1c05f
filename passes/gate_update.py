"""Update at the last of several batches that make one step, by a counter in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, fx

from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import StepContext, append, outputs_of, set_outputs, slot_node
from mpgraph.step.slots import StepSlot

aten = torch.ops.aten
BATCHES = StepSlot("count", "batches", lambda: torch.tensor(0))
_GATED = ("parameter", "state", "scale")


@graph_pass(numerics="exact")
def gate_update(graph: fx.Graph, context: StepContext) -> int:
    """Rewrite ``copy_(p, new)`` to ``copy_(p, where(is_last, new, p))``, and count the batches.

    For parameters, optimizer state and loss scales; sums of gradients are written as they grow,
    and become 0 at the last batch. A step is skipped at its last batch alone. Running statistics
    are written at every batch, as always. Left alone: a step of one batch.
    """
    writes = [node for node in graph.nodes if _is_gated(node)]
    if context.batches == 1 or not writes:
        return 0
    mode = writes[0].meta["val"].fake_mode
    count = slot_node(graph, BATCHES, mode.from_tensor(torch.tensor(0)))
    first = next(node for node in graph.nodes if node.op == "call_function")
    last, following = append(graph, _counting(context.batches), [count], "sum", first)
    for write in writes:
        place, value = cast("tuple[fx.Node, fx.Node]", write.args[:2])
        if place.meta["slot"].kind == "sum":
            # At once: clipping writes to the total itself.
            total = _total(place)
            (chosen,) = append(graph, _keep_unless, [last, total], "sum", total.next)
        else:
            (chosen,) = append(graph, _choose, [last, value, place], "update", write)
        write.args = (place, chosen)
    with graph.inserting_before(graph.output_node()):
        write = graph.call_function(aten.copy_.default, (count, following))
    write.meta = {"val": count.meta["val"], "part": "write"}
    _gate_flag(graph, last)
    return len(writes) + 1


def _is_gated(node: fx.Node) -> bool:
    if node.target is not aten.copy_.default or node.meta.get("part") != "write":
        return False
    slot = node.all_input_nodes[0].meta.get("slot")
    return slot is not None and slot.kind in (*_GATED, "sum")


def _total(place: fx.Node) -> fx.Node:
    """What a sum of gradients is with this batch."""
    return next(n for n in place.users if n.target is aten.add.Tensor and n.meta["part"] == "sum")


def _counting(batches: int) -> Callable[[Tensor], list[Tensor]]:
    def count(before: Tensor) -> list[Tensor]:
        following = before + 1
        return [following == batches, torch.where(following == batches, 0, following)]

    return count


def _choose(last: Tensor, value: Tensor, between: Tensor) -> list[Tensor]:
    return [torch.where(last, value, between)]


def _keep_unless(last: Tensor, total: Tensor) -> list[Tensor]:
    return [torch.where(last, 0.0, total)]


def _gate_flag(graph: fx.Graph, last: fx.Node) -> None:
    outputs = outputs_of(graph)
    if "found_inf" in outputs:
        flag = [outputs["found_inf"], last]
        (outputs["found_inf"],) = append(graph, _both, flag, "check")
        set_outputs(graph, outputs)


def _both(found: Tensor, last: Tensor) -> list[Tensor]:
    return [found * last]
