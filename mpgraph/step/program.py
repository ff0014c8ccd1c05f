"""A step's graph, ready to run on the tensors that there are now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mpgraph.notes import add_place
from mpgraph.pipeline import PassReport
from mpgraph.step.joint import copied_as, outputs_of
from mpgraph.step.replay import Replayed
from mpgraph.step.slots import StepSlot, step_slots
from mpgraph.step.trace_gradients import Gradients
from mpgraph.step.trace_update import Update

Run = Callable[..., Sequence[Any]]


@dataclasses.dataclass
class Program:
    """One way to run one kind of batch.

    Attributes:
        gradients: The traced loss that the graph is made of.
        graph_module: The graph, for people and for a backend.
        reports: What each pass over the whole step did.
        update: The optimizer's update, in the graph or after it; None where the graph has none.
        launch: What is run: the graph, and maybe the optimizer's fused kernels after it.
        replayed: Whether to replay it as a CUDA graph.
    """

    gradients: Gradients
    graph_module: fx.GraphModule
    reports: list[PassReport]
    update: Update | None
    launch: Launch
    replayed: bool = False

    def __post_init__(self) -> None:
        slots = self.launch.slots
        self._written = [i for i, slot in enumerate(slots) if slot.kind == "parameter"]
        self._tensors = Numbers(slots)
        self._run: Run = self.launch.run
        if self.replayed:
            batch = [i for i, slot in enumerate(slots) if slot.read is None]
            self._run = Replayed(self._run, batch)

    def __call__(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """Run it; what it returns, by name: "results" is a list."""
        values = [
            leaves[slot.index] if slot.read is None else slot.read() for slot in self.launch.slots
        ]
        try:
            with torch.no_grad():
                returned = self._run(*self._tensors.put(values))
        except Exception as error:
            add_place(error, self.graph_module)
            raise
        if self.update is not None:
            torch.autograd.graph.increment_version([values[i] for i in self._written])
        found: dict[str, Any] = {"results": []}
        for name, value in zip(self.launch.names, returned, strict=True):
            if name == "results":
                found["results"].append(value)
            else:
                found[name] = value
        return found


@dataclasses.dataclass
class Launch:
    """Something to run: what its arguments stand for, and what it returns."""

    run: Run
    slots: list[StepSlot]
    names: list[str]


def with_fused_update(first: Launch, update: Update) -> Launch:
    """Run a graph that returns gradients, then an optimizer's fused kernels on them."""
    taken = step_slots(update.graph_module.graph)
    others = [slot for slot in taken if slot.kind != "gradient"]
    count = len(first.slots)
    place = {slot.name: count + i for i, slot in enumerate(others)}
    from_first = {name: i for i, name in enumerate(first.names)}
    sources = [
        (slot.kind == "gradient", (from_first if slot.kind == "gradient" else place)[slot.name])
        for slot in taken
    ]
    places = update.graph_module.graph.find_nodes(op="placeholder")
    strides = [
        node.meta["val"].stride() if is_gradient else None
        for node, (is_gradient, _) in zip(places, sources, strict=True)
    ]
    kept = [i for i, name in enumerate(first.names) if name == "results"]
    names = list(outputs_of(update.graph_module.graph))
    apply = update.graph_module.forward

    def run(*values: Any) -> Sequence[Any]:
        outputs = first.run(*values[:count])
        found = apply(
            *[
                values[i] if stride is None else laid_out(outputs[i], stride)
                for (_, i), stride in zip(sources, strides, strict=True)
            ]
        )
        return [*(outputs[i] for i in kept), *found.values()]

    return Launch(run, [*first.slots, *others], [*(first.names[i] for i in kept), *names])


def laid_out(value: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """The same numbers with these strides: fused kernels read all their tensors in one order.

    They compare strides to the number (aten/src/ATen/native/ForeachUtils.h), while Inductor takes
    those of dimensions of size 1 for what it likes: such a value keeps its memory.
    """
    now = value.stride()
    if now == stride:
        return value
    if all(size == 1 or a == b for size, a, b in zip(value.shape, now, stride, strict=True)):
        return value.as_strided(value.shape, stride)
    return copied_as(value, stride)


class Numbers:
    """Hyperparameters that a graph takes as tensors, written only when they change."""

    def __init__(self, slots: Sequence[StepSlot]) -> None:
        self._tensors = {
            i: torch.zeros_like(slot.like) for i, slot in enumerate(slots) if slot.like is not None
        }
        self._values: dict[int, float] = {}

    def put(self, values: list[Any]) -> list[Any]:
        """Put tensors in the place of numbers."""
        for place, tensor in self._tensors.items():
            value = values[place]
            if not isinstance(value, torch.Tensor):
                if self._values.get(place) != value:
                    tensor.fill_(value)
                    self._values[place] = value
                values[place] = tensor
        return values
