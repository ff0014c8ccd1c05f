"""One value for every placeholder of a graph: arguments, parameters, copies, the loss scale."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from mpgraph.capture.captured import Captured, Slot, slots_of
from mpgraph.loss_scale import CurrentScale
from mpgraph.ops import enter
from mpgraph.weight_groups import weight_groups
from mpgraph.weights import WeightCopies

Getter = Callable[[Sequence[Any]], Any]


def gatherer(
    model: nn.Module, captured: Captured, copies: WeightCopies, scale: CurrentScale
) -> Callable[[Sequence[Any]], list[Any]]:
    """A function from input leaves to one value per placeholder.

    What takes part in the fp16 region has its border here: the 16-bit copy of a parameter, and a
    parameter or input whose gradient arrives scaled.
    """
    slots = slots_of(captured.graph_module)
    getters = [_getter(model, captured, slot, scale, copies) for slot in slots]
    groups = [
        (places, [home_of(model, slots[place]) for place in places], slots[places[0]])
        for places in weight_groups(captured.graph_module)
    ]

    def gather(leaves: Sequence[Any]) -> list[Any]:
        values = [get(leaves) for get in getters]
        for places, homes, slot in groups:
            parameters = [table[name] for table, name in homes]
            used = scale.read() if slot.scaled else None
            made = copies.get_all(parameters, cast(torch.dtype, slot.dtype), used)
            for place, copy in zip(places, made, strict=True):
                values[place] = copy
        return values

    return gather


def _getter(
    model: nn.Module, captured: Captured, slot: Slot, scale: CurrentScale, copies: WeightCopies
) -> Getter:
    if slot.dtype is not None:
        return _later
    if slot.kind == "scale":
        return functools.partial(_read_scale, scale=scale)
    get = _plain_getter(model, captured, slot)
    if not slot.scaled:
        return get
    return functools.partial(_entering, get=get, scale=scale, copies=copies)


def _plain_getter(model: nn.Module, captured: Captured, slot: Slot) -> Getter:
    if slot.kind == "input":
        return functools.partial(_leaf, index=slot.index)
    if slot.kind == "constant":
        return functools.partial(_constant, value=captured.constants[slot.target])
    table, name = home_of(model, slot)
    return functools.partial(_entry, table=table, name=name)


def home_of(model: nn.Module, slot: Slot) -> tuple[dict[str, Any], str]:
    """Where the model keeps what the slot stands for."""
    path, _, name = slot.target.rpartition(".")
    owner = model.get_submodule(path)
    tables: dict[str, Any] = {"buffer": owner._buffers, "attribute": vars(owner)}
    return tables.get(slot.kind, owner._parameters), name


def _leaf(leaves: Sequence[Any], index: int) -> Any:
    return leaves[index]


def _constant(leaves: Sequence[Any], value: Any) -> Any:
    return value


def _entry(leaves: Sequence[Any], table: dict[str, Any], name: str) -> Any:
    return table[name]


def _later(leaves: Sequence[Any]) -> Any:
    """Of a copy, which is made with others."""


def _read_scale(leaves: Sequence[Any], scale: CurrentScale) -> Any:
    return scale.read()


def _entering(leaves: Sequence[Any], get: Getter, scale: CurrentScale, copies: WeightCopies) -> Any:
    return get(leaves) if copies.masters else enter(get(leaves), scale.read())
