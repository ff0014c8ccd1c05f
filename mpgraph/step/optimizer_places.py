"""What an optimizer keeps, and where: numbers in its groups, tensors in its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from mpgraph.step.slots import StepSlot


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an optimizer keeps one tensor or number."""

    slot: StepSlot
    value: Any


def is_hyperparameter(value: Any) -> bool:
    """Whether a graph takes it as an input: a number that schedules change, or a tensor."""
    return isinstance(value, (float, torch.Tensor))


def hyperparameters(optimizer: Optimizer) -> list[Place]:
    """Every floating-point number, and every tensor, in the parameter groups."""
    found = []
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key == "params":
                continue
            items = enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]
            for position, item in items:
                if is_hyperparameter(item):
                    name = key if position is None else f"{key}[{position}]"
                    read = _group_reader(optimizer, index, key, position)
                    slot = StepSlot("hyperparameter", f"{name} of group {index}", read)
                    found.append(Place(slot, item))
    return found


def _group_reader(
    optimizer: Optimizer, index: int, key: str, position: int | None
) -> Callable[[], Any]:
    if position is None:
        return lambda: optimizer.param_groups[index][key]
    return lambda: optimizer.param_groups[index][key][position]


def state_tensors(optimizer: Optimizer, names: dict[int, str]) -> list[tuple[Any, str, Place]]:
    """Every tensor of the optimizer's state: its parameter, its key, its place."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    read = _state_reader(optimizer, parameter, key)
                    slot = StepSlot("state", f"{key} of {names[id(parameter)]}", read)
                    found.append((parameter, key, Place(slot, value)))
    return found


def counters_to_device(optimizer: Optimizer) -> None:
    """Move state without dimensions, such as step counters, to where its parameter is.

    So that nothing in a step is for the host. ``capturable`` tells torch.optim about it.
    """
    for group in optimizer.param_groups:
        moved = False
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                is_counter = isinstance(value, torch.Tensor) and value.dim() == 0
                if is_counter and value.device != parameter.device:
                    optimizer.state[parameter][key] = value.to(parameter.device)
                    moved = True
        if moved and "capturable" in group:
            group["capturable"] = True


def counters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """State tensors without dimensions."""
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() == 0
    ]


def equal_counters(optimizer: Optimizer, names: dict[int, str]) -> tuple[frozenset[str], ...]:
    """The names of state tensors without dimensions that hold equal numbers, by key and value."""
    groups: dict[Any, set[str]] = {}
    for _, key, place in state_tensors(optimizer, names):
        value = place.value
        if value.dim() == 0 and value.is_floating_point():
            groups.setdefault((key, float(value), value.device), set()).add(place.slot.name)
    return tuple(frozenset(found) for found in groups.values() if len(found) > 1)


def split_counters(names: frozenset[str], updated: frozenset[str]) -> list[frozenset[str]]:
    """Counters of parameters that a step has updated, and the others."""
    changed = frozenset(name for name in names if name.partition(" of ")[2] in updated)
    return [changed, names - changed]


def _state_reader(optimizer: Optimizer, parameter: Any, key: str) -> Callable[[], Any]:
    return lambda: optimizer.state[parameter][key]
