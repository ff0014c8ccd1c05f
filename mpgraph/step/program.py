"""A step's graph, ready to run on the tensors that there are now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mpgraph.notes import add_place
from mpgraph.pipeline import PassReport
from mpgraph.step.slots import StepSlot, step_slots
from mpgraph.step.trace_gradients import Gradients


@dataclasses.dataclass
class Program:
    """One way to run one kind of batch.

    Attributes:
        gradients: The traced loss that the graph is made of.
        graph_module: The graph, for people and for a backend.
        names: What the graph returns.
        reports: What each pass over the whole step did.
        run: Takes one value per input.
        writes: Whether the graph updates parameters: only then do they change.
    """

    gradients: Gradients
    graph_module: fx.GraphModule
    names: list[str]
    reports: list[PassReport]
    run: Callable[..., Sequence[Any]]
    writes: bool

    def __post_init__(self) -> None:
        self.slots = step_slots(self.graph_module.graph)
        self._written = [
            i for i, slot in enumerate(self.slots) if self.writes and slot.kind == "parameter"
        ]

    def __call__(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """Run it; what it returns, by name: "results" is a list."""
        values = values_of(self.slots, leaves)
        try:
            with torch.no_grad():
                returned = self.run(*values)
        except Exception as error:
            add_place(error, self.graph_module)
            raise
        if self._written:
            torch.autograd.graph.increment_version([values[i] for i in self._written])
        found: dict[str, Any] = {"results": []}
        for name, value in zip(self.names, returned, strict=True):
            if name == "results":
                found["results"].append(value)
            else:
                found[name] = value
        return found


def values_of(slots: Sequence[StepSlot], leaves: Sequence[Any]) -> list[Any]:
    """The value of every input of a step's graph, now."""
    return [leaves[slot.index] if slot.read is None else slot.read() for slot in slots]
