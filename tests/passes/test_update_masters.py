"""New values are written where gradients are finite, and the old ones stay where not."""

from __future__ import annotations

import pytest
import torch

from mpgraph.loss_scale import LossScale
from mpgraph.passes.check_grads import check_grads
from mpgraph.passes.update_masters import update_masters
from mpgraph.step.joint import gradients_of, outputs_of, set_outputs
from mpgraph.step.slots import StepSlot

from .steps import SHAPE, context, gradients_graph, placed, run

MASTER = StepSlot("parameter", "master")


def graph_with_update():
    """The new value of a parameter is the gradient of a."""
    graph = gradients_graph()
    placed(graph, MASTER)
    outputs = outputs_of(graph)
    set_outputs(graph, {**outputs, "new": {MASTER.name: gradients_of(graph)["a"]}})
    return graph


def test_new_values_are_written() -> None:
    graph = graph_with_update()
    assert update_masters(graph, context()) == 1
    master, gradient = torch.zeros(SHAPE), torch.randn(SHAPE)
    run(graph, master, torch.ones(()), gradient, gradient)
    assert torch.equal(master, gradient)


@pytest.mark.parametrize("bad", [False, True])
def test_a_step_that_is_not_finite_leaves_everything_but_the_scale(bad: bool) -> None:
    graph = graph_with_update()
    scale = LossScale(growth_interval=1)
    fields = ("scale", "growth_tracker", "hysteresis_tracker")
    slots = tuple(StepSlot("scale", f, lambda f=f: getattr(scale, f)) for f in fields)
    known = context(check_finite=True, scales=((scale.moved, slots),))
    check_grads(graph, known)
    assert update_masters(graph, known) == 4
    master, gradient = torch.zeros(SHAPE), torch.randn(SHAPE)
    if bad:
        gradient[0, 0] = float("inf")
    state = {f: getattr(scale, f).clone() for f in fields}
    inputs = {"master": master, "loss": torch.ones(()), "grad_a": gradient, "grad_b": gradient}
    places = [n.meta["slot"].name for n in graph.find_nodes(op="placeholder")]
    run(graph, *[{**inputs, **state}[name] for name in places])
    expected = scale.next(torch.tensor(float(bad)))
    assert torch.equal(master, torch.zeros(SHAPE) if bad else gradient)
    assert state["scale"] == expected.scale == (2.0**15 if bad else 2.0**17)
    for field in fields:
        assert torch.equal(state[field], getattr(expected, field))


def test_sums_are_written_though_the_step_is_skipped() -> None:
    graph = graph_with_update()
    placed(graph, StepSlot("sum", "total"))
    outputs = outputs_of(graph)
    set_outputs(graph, {**outputs, "kept": {"total": gradients_of(graph)["b"]}})
    known = context(check_finite=True)
    check_grads(graph, known)
    update_masters(graph, known)
    master, total = torch.zeros(SHAPE), torch.zeros(SHAPE)
    bad, good = torch.full(SHAPE, float("nan")), torch.ones(SHAPE)
    run(graph, total, master, torch.ones(()), bad, good)
    assert torch.equal(master, torch.zeros(SHAPE))
    assert torch.equal(total, good)
