"""Gradients of several batches add up; the last batch takes the sums and leaves zeros."""

from __future__ import annotations

import torch

from mpgraph.passes.sum_grads import sum_grads
from mpgraph.step.joint import outputs_of
from mpgraph.step.slots import StepSlot

from .steps import NAMES, SHAPE, context, gradients_graph, run

SLOTS = {name: StepSlot("sum", f"sum of gradient {name}") for name in NAMES}


def values() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    return (
        [torch.randn(SHAPE) for _ in NAMES],
        [torch.randn(SHAPE) for _ in NAMES],
        torch.ones(()),
    )


def test_one_batch_has_nothing_to_add() -> None:
    graph = gradients_graph()
    before = str(graph)
    assert sum_grads(graph, context()) == 0
    assert str(graph) == before


def test_an_early_batch_returns_sums_to_be_written_and_no_gradients() -> None:
    graph = gradients_graph()
    assert sum_grads(graph, context(sums=SLOTS, is_last=False)) == 2
    assert "gradients" not in outputs_of(graph)
    gradients, sums, loss = values()
    # Inputs for sums are put before the others, the latest first.
    kept = run(graph, *reversed(sums), loss, *gradients)["kept"]
    for name, gradient, total in zip(NAMES, gradients, sums, strict=True):
        assert torch.equal(kept[SLOTS[name].name], total + gradient)


def test_the_last_batch_has_the_sums_as_gradients_and_leaves_zeros() -> None:
    graph = gradients_graph()
    assert sum_grads(graph, context(sums=SLOTS)) == 2
    gradients, sums, loss = values()
    found = run(graph, *reversed(sums), loss, *gradients)
    for name, gradient, total in zip(NAMES, gradients, sums, strict=True):
        assert torch.equal(found["gradients"][name], total + gradient)
        assert torch.equal(found["kept"][SLOTS[name].name], torch.zeros(SHAPE))
