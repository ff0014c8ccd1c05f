"""Gradients and update, put together into one graph, by passes over the whole step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module

from mpgraph.module import State
from mpgraph.passes.check_grads import check_grads
from mpgraph.passes.chunk_loss_head import chunk_loss_head
from mpgraph.passes.clip_grads import clip_grads
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.passes.sum_grads import sum_grads
from mpgraph.passes.update_masters import update_masters
from mpgraph.pipeline import GraphPass, PassReport, run_passes
from mpgraph.step.joint import (
    StepContext,
    gradients_of,
    inline,
    outputs_of,
    set_outputs,
    slot_node,
    slot_nodes,
)
from mpgraph.step.slots import StepSlot
from mpgraph.step.trace_gradients import scale_slot
from mpgraph.step.trace_update import Update

LOSS: tuple[GraphPass, ...] = (chunk_loss_head,)
BEFORE_UPDATE: tuple[GraphPass, ...] = (
    sum_grads,
    clip_grads,  # after sum_grads: the sum is what is clipped
    check_grads,  # after clip_grads, whose norm tells
)
AFTER_UPDATE: tuple[GraphPass, ...] = (update_masters, remove_dead)


def assemble(
    gradients: fx.GraphModule,
    update: Update | None,
    context: StepContext,
    *,
    checked: bool = True,
) -> tuple[fx.GraphModule, list[PassReport]]:
    """One graph for one batch: all of a step, or what there is to do before the update.

    Args:
        gradients: What :func:`trace_gradients` has made; it stays as it is.
        update: The optimizer's update; None where the optimizer makes it itself, or where more
            batches follow.
        context: What the passes know.
        checked: Whether to clip and check gradients; False where the optimizer's guard does.
    """
    gm = copied(gradients)
    before = BEFORE_UPDATE if checked and context.is_last else BEFORE_UPDATE[:1]
    reports = run_passes(gm, (*LOSS, *before), context)
    if update is not None:
        _append_update(gm.graph, update)
    reports += run_passes(gm, AFTER_UPDATE, context)
    return gm, reports


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes can be changed; values and slots are shared."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, copies))
    for old, new in copies.items():
        new.meta = copy.copy(old.meta)
    output.meta = copy.copy(gm.graph.output_node().meta)
    return _make_graph_module(gm, graph)


def _append_update(graph: fx.Graph, update: Update) -> None:
    """Run the optimizer's update on the gradients."""
    gradients, places = gradients_of(graph), slot_nodes(graph)
    inputs = []
    for node in update.graph_module.graph.find_nodes(op="placeholder"):
        slot: StepSlot = node.meta["slot"]
        if slot.kind == "gradient":
            inputs.append(gradients[slot.name])
        else:
            found = places.get(slot.name)
            inputs.append(found or slot_node(graph, slot, node.meta["val"]))
    new: Any = inline(graph, update.graph_module, inputs, "update")
    outputs = outputs_of(graph)
    del outputs["gradients"]
    set_outputs(graph, {**outputs, "new": new})


def flat_outputs(gm: fx.GraphModule) -> list[str]:
    """Return a flat tuple from now on; the name of each of its values."""
    names: list[str] = []
    values: list[Any] = []
    for name, value in outputs_of(gm.graph).items():
        parts = value.items() if isinstance(value, dict) else _numbered(name, value)
        for part, node in parts:
            names.append(part)
            values.append(node)
    gm.graph.output_node().args = (tuple(values),)
    gm.recompile()
    return names


def _numbered(name: str, value: Any) -> Sequence[tuple[str, Any]]:
    if isinstance(value, list):
        return [(name, item) for item in value]
    return [(name, value)]


def moving_scales(states: Sequence[State]) -> tuple[Any, ...]:
    """How the loss scale of each fp16 model moves, and where its tensors are."""
    fields = ("scale", "growth_tracker", "hysteresis_tracker")
    return tuple(
        (state.scale.value.moved, tuple(scale_slot(state, i, field) for field in fields))
        for i, state in enumerate(states)
        if state.settings.scaled and state.scale.value.dynamic
    )
