"""The first step of an optimizer without state: it makes its update, and with it its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mpgraph.step.arguments import parameters_of
from mpgraph.step.program import Program, laid_out
from mpgraph.step.settings import StepSettings


def first_step(
    program: Program, settings: StepSettings, names: Mapping[int, str], leaves: list[Any]
) -> dict[str, Any]:
    """Run ``optimizer.step()`` with the gradients that a graph computes; what the graph returned.

    Args:
        program: Computes the gradients and updates nothing.
        settings: Of the step.
        names: By identity, the name of each of the optimizer's parameters.
        leaves: The tensors of the batch.
    """
    for state in program.gradients.states:
        state.scale.read()  # a forward pass of its own: the scale moves on from where it is
    outputs = program(leaves)
    parameters = {names[id(p)]: p for p in parameters_of(settings.optimizer)}
    before = {name: p.grad for name, p in parameters.items()}
    try:
        for name, parameter in parameters.items():
            gradient = outputs.get(name)
            if gradient is not None:
                gradient = laid_out(gradient, parameter.stride())
            parameter.grad = gradient
        if settings.max_grad_norm is not None and not settings.check_finite:
            nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        settings.optimizer.step()
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]
    return outputs
