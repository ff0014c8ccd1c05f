"""A step that counts its batches updates at the last of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from mpgraph.passes.check_grads import check_grads
from mpgraph.passes.gate_update import gate_update
from mpgraph.passes.sum_grads import sum_grads
from mpgraph.passes.update_masters import update_masters
from mpgraph.step.joint import gradients_of, outputs_of, set_outputs
from mpgraph.step.slots import StepSlot

from .steps import NAMES, SHAPE, context, gradients_graph, placed, run

SLOTS = {name: StepSlot("sum", f"sum_{name}") for name in NAMES}
MASTER = StepSlot("parameter", "master")


def gated(batches: int, *, check_finite: bool = False) -> tuple[fx.Graph, int]:
    """The master becomes the sum of the gradients of a; how many edits that took."""
    graph = gradients_graph()
    placed(graph, MASTER)
    known = context(sums=SLOTS if batches > 1 else {}, batches=batches, check_finite=check_finite)
    sum_grads(graph, known)
    check_grads(graph, known)
    outputs = outputs_of(graph)
    set_outputs(graph, {**outputs, "new": {MASTER.name: gradients_of(graph)["a"]}})
    update_masters(graph, known)
    return graph, gate_update(graph, known)


def state_of(graph: fx.Graph) -> dict[str, Any]:
    state = {MASTER.name: torch.full(SHAPE, 7.0), "batches": torch.tensor(0)}
    state.update({slot.name: torch.zeros(SHAPE) for slot in SLOTS.values()})
    return state


def take(graph: fx.Graph, state: dict[str, Any], gradient: torch.Tensor) -> dict[str, Any]:
    values = {**state, "loss": torch.ones(()), "grad_a": gradient, "grad_b": gradient}
    names = [node.meta["slot"].name for node in graph.find_nodes(op="placeholder")]
    return run(graph, *[values[name] for name in names])


def test_a_step_of_one_batch_stays() -> None:
    assert gated(1)[1] == 0


@pytest.mark.parametrize("batches", [2, 3])
def test_the_master_changes_at_the_last_batch_alone_and_sums_begin_anew(batches: int) -> None:
    graph, edits = gated(batches)
    assert edits == 4  # the master, two sums, the count
    state, expected = state_of(graph), torch.full(SHAPE, 7.0)
    for _ in range(2):
        gradients = [torch.randn(SHAPE) for _ in range(batches)]
        for index, gradient in enumerate(gradients):
            take(graph, state, gradient)
            is_last = index + 1 == batches
            if is_last:
                expected = torch.stack(gradients).cumsum(0)[-1]
            torch.testing.assert_close(state[MASTER.name], expected)
            assert state["batches"].item() == (index + 1) % batches
            assert bool((state["sum_a"] == 0).all()) == is_last


def test_an_overflow_is_told_at_the_last_batch_and_leaves_the_master() -> None:
    graph, _ = gated(2, check_finite=True)
    state = state_of(graph)
    bad = torch.full(SHAPE, float("inf"))
    assert take(graph, state, bad)["found_inf"].item() == 0
    assert take(graph, state, torch.ones(SHAPE))["found_inf"].item() == 1
    assert torch.equal(state[MASTER.name], torch.full(SHAPE, 7.0))
    assert torch.equal(state["sum_a"], torch.zeros(SHAPE))
