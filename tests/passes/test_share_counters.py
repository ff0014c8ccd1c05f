"""Counters that are equal are read once; nothing else is merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mpgraph.passes.share_counters import share_counters
from mpgraph.policy import Policy
from mpgraph.step.joint import StepContext
from mpgraph.step.slots import StepSlot

aten = torch.ops.aten


def graph_of(increments: tuple[float, float]) -> tuple[fx.Graph, list[fx.Node]]:
    """Two counters that are incremented, read and written; and two random numbers."""
    graph, mode = fx.Graph(), FakeTensorMode()
    with mode:
        number = torch.zeros(())

    def add(target: Any, *args: Any, part: str = "update", **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        node.meta = {"val": number, "part": part}
        return node

    counters = []
    for name in ("step of a", "step of b"):
        counters.append(graph.placeholder(name.replace(" ", "_")))
        counters[-1].meta = {"slot": StepSlot("state", name), "val": number}
    draws = [add(aten.rand.default, [], part="forward") for _ in range(2)]
    new = [add(aten.add.Tensor, c, i) for c, i in zip(counters, increments, strict=True)]
    powers = [add(aten.pow.Scalar, 0.9, n) for n in new]
    for counter, value in zip(counters, new, strict=True):
        add(aten.copy_.default, counter, value, part="write")
    graph.output((*draws, *powers))
    return graph, [*draws, *powers]


CONTEXT = StepContext(policy=Policy(), compute=None, equal=(frozenset({"step of a", "step of b"}),))


def test_reads_one_of_two_that_change_alike() -> None:
    """Both are still written."""
    graph, (*draws, first, _) = graph_of((1.0, 1.0))
    assert share_counters(graph, CONTEXT) > 0
    assert graph.output_node().args[0] == (*draws, first, first)
    assert len(list(graph.find_nodes(op="call_function", target=aten.copy_.default))) == 2


def test_two_random_numbers_stay_two() -> None:
    """They have equal arguments, and are no counters."""
    graph, (one, other, *_) = graph_of((1.0, 1.0))
    share_counters(graph, CONTEXT)
    assert graph.output_node().args[0][:2] == (one, other)  # type: ignore[index]


def test_counters_that_change_differently_stay_apart() -> None:
    """Equal now is not enough."""
    graph, results = graph_of((1.0, 2.0))
    assert share_counters(graph, CONTEXT) == 0
    assert graph.output_node().args[0] == tuple(results)


def test_a_zero_below_zero_is_another_number() -> None:
    """Though the two are equal."""
    graph, results = graph_of((0.0, -0.0))
    assert share_counters(graph, CONTEXT) == 0
    assert graph.output_node().args[0] == tuple(results)
