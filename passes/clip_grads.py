"""Clip the gradients of a whole step to a norm."""

from __future__ import annotations

import torch
from torch import fx

from mpgraph.finite import clip_to_norm
from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import StepContext, append, gradients_of, outputs_of, set_outputs


@graph_pass(numerics="rounds")
def clip_grads(graph: fx.Graph, context: StepContext) -> int:
    """Scale all gradients down where their total norm is above ``context.max_grad_norm``.

    The arithmetic is that of ``torch.nn.utils.clip_grad_norm_``.
    """
    gradients = gradients_of(graph)
    if context.max_grad_norm is None or not gradients:
        return 0
    max_norm = context.max_grad_norm

    def clip(*values: torch.Tensor) -> list[torch.Tensor]:
        return [clip_to_norm(values, max_norm, foreach=False), *values]

    norm, *clipped = append(graph, clip, [*gradients.values()], "clip")
    gradients = dict(zip(gradients, clipped, strict=True))
    set_outputs(graph, {**outputs_of(graph), "norm": norm, "gradients": gradients})
    return len(clipped)
