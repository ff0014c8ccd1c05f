"""How a step's graph runs: node by node, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mpgraph.errors import PrecisionError
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.passes.share_counters import share_counters
from mpgraph.passes.tensor_numbers import tensor_numbers
from mpgraph.pipeline import GraphPass, run_passes
from mpgraph.step.joint import StepContext
from mpgraph.step.program import values_of
from mpgraph.step.slots import step_slots

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
Run = Callable[..., Sequence[Any]]
Compile = Callable[[fx.GraphModule, StepContext, Sequence[Any]], Run]

COMPILED_PASSES: tuple[GraphPass, ...] = (
    tensor_numbers,
    share_counters,  # after tensor_numbers, which makes counters of what was .item()
    remove_dead,
)


def compiler_for(compile: bool | str) -> Compile:
    """From ``TrainStep(compile=...)`` to what makes a graph runnable."""
    if compile is False:
        return _node_by_node
    mode = "default" if compile is True else compile
    if mode not in MODES:
        raise PrecisionError(
            f"compile must be True, False or a mode of torch.compile ({', '.join(MODES)}), found "
            f"{compile!r}"
        )
    return _inductor


def _node_by_node(gm: fx.GraphModule, context: StepContext, leaves: Sequence[Any]) -> Run:
    run: Run = gm.forward
    return run


def _inductor(gm: fx.GraphModule, context: StepContext, leaves: Sequence[Any]) -> Run:
    run_passes(gm, COMPILED_PASSES, context)
    slots = step_slots(gm.graph)
    numbers = [i for i, slot in enumerate(slots) if slot.kind == "hyperparameter"]
    held = _Numbers(numbers, context.device)
    values = held.put(values_of(slots, leaves))
    with torch.no_grad():
        compiled: Any = torch._inductor.compile(_bare(gm), values)

    def run(*given: Any) -> Sequence[Any]:
        return compiled(*held.put(list(given)))  # type: ignore[no-any-return]

    return run


def _bare(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy without what the trace has noted at its nodes: a backend traces anew."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node in graph.nodes:
        node.meta = {}
    return fx.GraphModule(gm, graph)


class _Numbers:
    """Hyperparameters as tensors on the device, written only when they change."""

    def __init__(self, places: Sequence[int], device: str) -> None:
        self._places, self._device = places, device
        self._tensors: dict[int, torch.Tensor] = {}
        self._values: dict[int, float] = {}

    def put(self, values: list[Any]) -> list[Any]:
        """Put tensors in the place of the numbers."""
        for place in self._places:
            value = values[place]
            if isinstance(value, torch.Tensor):
                continue
            if place not in self._tensors:
                self._tensors[place] = torch.tensor(
                    value, dtype=torch.float64, device=self._device
                )
                self._values[place] = value
            elif self._values[place] != value:
                self._tensors[place].fill_(value)
                self._values[place] = value
            values[place] = self._tensors[place]
        return values
