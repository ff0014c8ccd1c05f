"""Add up the gradients of several batches that make one step."""

from __future__ import annotations

import torch
from torch import fx

from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import (
    StepContext,
    append,
    gradients_of,
    outputs_of,
    set_outputs,
    slot_node,
)


@graph_pass(numerics="exact")
def sum_grads(graph: fx.Graph, context: StepContext) -> int:
    """Write gradients to their sums; the last batch takes the sums and leaves zeros."""
    gradients = gradients_of(graph)
    if not context.sums or not gradients:
        return 0
    sums = [slot_node(graph, context.sums[name], gradients[name].meta["val"]) for name in gradients]
    count = len(sums)

    def add(*values: torch.Tensor) -> list[torch.Tensor]:
        return [a + b for a, b in zip(values[:count], values[count:], strict=True)]

    totals = dict(
        zip(gradients, append(graph, add, [*sums, *gradients.values()], "sum"), strict=True)
    )
    names = [context.sums[name].name for name in gradients]
    outputs = outputs_of(graph)
    if context.is_last:
        zeros = append(graph, _zeros, sums, "sum")
        written = dict(zip(names, zeros, strict=True))
        set_outputs(graph, {**outputs, "gradients": totals, "kept": written})
    else:
        written = dict(zip(names, totals.values(), strict=True))
        set_outputs(graph, {"results": outputs["results"], "kept": written})
    return count


def _zeros(*sums: torch.Tensor) -> list[torch.Tensor]:
    return [torch.zeros_like(value) for value in sums]
