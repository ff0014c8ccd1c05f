"""One value for every placeholder of a graph: arguments, parameters, copies, the loss scale."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mpgraph.capture.captured import Captured, Slot, slots_of
from mpgraph.loss_scale import CurrentScale
from mpgraph.ops import enter
from mpgraph.weights import WeightCopies

Getter = Callable[[Sequence[Any]], Any]


def gatherer(
    model: nn.Module, captured: Captured, copies: WeightCopies, scale: CurrentScale
) -> Callable[[Sequence[Any]], list[Any]]:
    """A function from input leaves to one value per placeholder.

    What takes part in the fp16 region has its border here: the 16-bit copy of a parameter, and an
    fp16 tensor that requires a gradient.
    """
    getters = [
        _getter(model, captured, slot, copies, scale) for slot in slots_of(captured.graph_module)
    ]
    return lambda leaves: [get(leaves) for get in getters]


def _getter(
    model: nn.Module, captured: Captured, slot: Slot, copies: WeightCopies, scale: CurrentScale
) -> Getter:
    if slot.kind == "scale":
        return functools.partial(_read_scale, scale=scale)
    if slot.kind == "cast":
        table, name = _home(model, slot)
        used = scale if slot.scaled else None
        return functools.partial(
            _weight, table=table, name=name, dtype=slot.dtype, copies=copies, scale=used
        )
    get = _plain_getter(model, captured, slot)
    return functools.partial(_entering, get=get, scale=scale) if slot.scaled else get


def _plain_getter(model: nn.Module, captured: Captured, slot: Slot) -> Getter:
    if slot.kind == "input":
        return functools.partial(_leaf, index=slot.index)
    if slot.kind == "constant":
        return functools.partial(_constant, value=captured.constants[slot.target])
    table, name = _home(model, slot)
    return functools.partial(_entry, table=table, name=name)


def _home(model: nn.Module, slot: Slot) -> tuple[dict[str, Any], str]:
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


def _weight(
    leaves: Sequence[Any],
    table: dict[str, Any],
    name: str,
    dtype: torch.dtype | None,
    copies: WeightCopies,
    scale: CurrentScale | None,
) -> Any:
    assert dtype is not None
    return copies.get(table[name], dtype, None if scale is None else scale.read())


def _read_scale(leaves: Sequence[Any], scale: CurrentScale) -> Any:
    return scale.read()


def _entering(leaves: Sequence[Any], get: Getter, scale: CurrentScale) -> Any:
    return enter(get(leaves), scale.read())
