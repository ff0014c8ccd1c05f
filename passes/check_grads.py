"""One flag for a whole step: whether any gradient is infinite or NaN."""

from __future__ import annotations

import torch
from torch import fx

from mpgraph.finite import is_not_finite
from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import StepContext, append, gradients_of, outputs_of, set_outputs


@graph_pass(numerics="exact")
def check_grads(graph: fx.Graph, context: StepContext) -> int:
    """Compute ``found_inf``, 1.0 or 0.0; nobody waits for it.

    Where gradients are clipped, it comes from their norm, as in :func:`mpgraph.guard`.
    """
    outputs, gradients = outputs_of(graph), gradients_of(graph)
    if not context.check_finite or not gradients:
        return 0
    if "norm" in outputs:
        (found,) = append(graph, _from_norm, [outputs["norm"]], "check")
    else:
        (found,) = append(graph, _from_all, [*gradients.values()], "check")
    set_outputs(graph, {**outputs, "found_inf": found})
    return 1


def _from_norm(norm: torch.Tensor) -> list[torch.Tensor]:
    return [is_not_finite(norm)]


def _from_all(*gradients: torch.Tensor) -> list[torch.Tensor]:
    finite = torch.stack([gradient.isfinite().all() for gradient in gradients])
    return [finite.all().logical_not().to(torch.float32)]
