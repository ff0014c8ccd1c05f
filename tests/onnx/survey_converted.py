"""A call of the survey as a converted model makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpgraph.capture.captured import slots_of
from mpgraph.capture.export import Call, capture_export
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.pipeline import PassContext, run_passes
from mpgraph.policy import Policy
from mpgraph.structure import flatten, unflatten


class _Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def as_converted(
    function: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype
) -> Callable[..., Any]:
    """The call captured as a model's and rewritten by every pass: what the policy widens is wide."""
    context = PassContext(Policy(), dtype)
    leaves, spec = flatten((tuple(inputs), {}))
    names = [f"x{i}" for i in range(len(leaves))]
    call = Call(leaves, spec, names, [frozenset()] * len(leaves))
    captured = capture_export(_Model(function), _Model.forward, call, context.autocast())
    gm = captured.graph_module
    run_passes(gm, DEFAULT_PASSES, context)

    def run(*given: Tensor) -> Any:
        values = [
            given[slot.index] if slot.kind == "input" else captured.constants[slot.target]
            for slot in slots_of(gm)
        ]
        return unflatten(captured.output, gm(*values))

    return run
