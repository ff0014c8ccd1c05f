"""One captured and rewritten graph, tied to the module whose parameters it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpgraph import ir
from mpgraph.capture.captured import Assignment, Captured
from mpgraph.direct_calls import directly
from mpgraph.gather import gatherer
from mpgraph.notes import add_place
from mpgraph.pipeline import PassContext, PassReport
from mpgraph.structure import count_leaves, unflatten
from mpgraph.tracing import lock

if TYPE_CHECKING:
    from mpgraph.module import State


@dataclasses.dataclass
class Specialisation:
    """One captured and rewritten graph, ready to run.

    Attributes:
        label: For people: mode and argument shapes.
        shapes: The sizes of the arguments at capture.
        captured: The graph and what its inputs and outputs stand for.
        reports: What each pass did.
        context: What the passes knew.
    """

    label: str
    shapes: list[torch.Size]
    captured: Captured
    reports: list[PassReport]
    context: PassContext
    engine: str
    run: Callable[..., Any]
    gather: Callable[[Sequence[Any]], list[Any]]
    assign: Callable[[list[Any]], None] | None

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The rewritten graph."""
        return self.captured.graph_module

    def accepts(self, leaves: Sequence[Any]) -> bool:
        """Whether the graph holds for these arguments' sizes."""
        return self.captured.accepts(leaves)

    def run_call(
        self, model: nn.Module, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call, given taken apart and whole: this engine needs the former."""
        return self(leaves)

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run the graph on the flattened arguments; give the model's result."""
        with lock:
            values = self.gather(leaves)
        try:
            outputs = self.run(*values)
        except Exception as error:
            add_place(error, self.graph_module)
            raise
        result = unflatten(self.captured.output, outputs)
        if self.assign is not None:
            self.assign(outputs)
        return result


def make_specialisation(
    model: nn.Module,
    state: State,
    captured: Captured,
    reports: list[PassReport],
    context: PassContext,
    label: str,
    shapes: list[torch.Size],
) -> Specialisation:
    """Tie a rewritten graph to the module whose parameters it reads."""
    gm = captured.graph_module
    run = directly(gm)
    if any(node.target is ir.SET_GRAD for node in gm.graph.nodes):
        run = _restoring_grad_mode(run)
    return Specialisation(
        label, shapes, captured, reports, context, "export", run,
        gather=gatherer(model, captured, state.weights, state.scale),
        assign=_assigner(model, captured),
    )  # fmt: skip


def _restoring_grad_mode(run: Callable[..., Any]) -> Callable[..., Any]:
    def run_and_restore(*values: Any) -> Any:
        before = torch.is_grad_enabled()
        try:
            return run(*values)
        finally:
            torch._C._set_grad_enabled(before)

    return run_and_restore


def _assigner(model: nn.Module, captured: Captured) -> Callable[[list[Any]], None] | None:
    if not captured.assignments:
        return None
    start = count_leaves(captured.output)
    plan = []
    for assignment in captured.assignments:
        count = count_leaves(assignment.spec)
        module = model.get_submodule(assignment.module)
        plan.append((module, assignment, start, start + count))
        start += count

    def assign(outputs: list[Any]) -> None:
        for module, assignment, first, last in plan:
            make_assignment(module, assignment, outputs[first:last])

    return assign


def make_assignment(module: nn.Module, assignment: Assignment, leaves: Sequence[Any]) -> None:
    """Assign what ``forward`` assigns, from the leaves of its value."""
    table = module._buffers if assignment.is_buffer else vars(module)
    table[assignment.name] = unflatten(assignment.spec, leaves)
