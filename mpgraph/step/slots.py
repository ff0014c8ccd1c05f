"""What the inputs of a step's graph stand for, and where their values are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx, nn

StepSlotKind = Literal[
    "input",
    "parameter",
    "buffer",
    "constant",
    "gradient",
    "state",
    "hyperparameter",
    "scale",
    "sum",
    "random",
    "count",
]
Read = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class StepSlot:
    """What one placeholder of a step's graph stands for.

    Attributes:
        kind: A tensor of the batch; a parameter or buffer of the model; another tensor that the
            loss reads; in an update by itself, a gradient; a tensor of the optimizer's state; a
            number in one of its parameter groups; a tensor of the loss scale; the sum of
            gradients so far, where one step takes several batches; or, in an exported step, the
            seed and the step of its random numbers, and the number of batches so far.
        name: For people: ``layer.weight``, ``exp_avg of layer.weight``, ``lr of group 0``.
        read: Gives the value that it has now; for an input, None.
        index: For an input: its position among the tensors of the batch.
        like: For a hyperparameter that the graph takes as a tensor: such a tensor.
    """

    kind: StepSlotKind
    name: str
    read: Read | None = None
    index: int = -1
    like: torch.Tensor | None = None


def step_slots(graph: fx.Graph) -> list[StepSlot]:
    """What the placeholders of a step's graph stand for, in order."""
    return [node.meta["slot"] for node in graph.find_nodes(op="placeholder")]


def place_name(slot: StepSlot) -> str:
    """A name for a placeholder, as Python can spell it."""
    prefixes = {"parameter": "p_", "buffer": "b_", "input": "", "constant": "c_"}
    words = "".join(c if c.isalnum() else "_" for c in slot.name.replace(" of ", "_"))
    return f"{prefixes.get(slot.kind, '')}{words}" or "value"


class Homes:
    """Where the tensors of some modules are kept, by identity: later, another may be there."""

    def __init__(self, *modules: nn.Module) -> None:
        self._slots: dict[int, StepSlot] = {}
        self._alive: list[Any] = []
        for index, module in enumerate(modules):
            # What the loss function brings along may well have parameters of the same names.
            root = f"{type(module).__name__} {index}" if index else ""
            for path, part in module.named_modules():
                full = ".".join(filter(None, (root, path)))
                self._note("parameter", full, part._parameters)
                self._note("buffer", full, part._buffers)

    def _note(self, kind: StepSlotKind, path: str, table: dict[str, Any]) -> None:
        for name, tensor in table.items():
            if tensor is not None and id(tensor) not in self._slots:
                full = f"{path}.{name}" if path else name
                self._slots[id(tensor)] = StepSlot(kind, full, _reader(table, name))
                self._alive.append(tensor)

    def slot_of(self, tensor: torch.Tensor) -> StepSlot | None:
        """The slot of a tensor that is in one of the modules."""
        return self._slots.get(id(tensor))


def _reader(table: dict[str, Any], name: str) -> Read:
    return lambda: table[name]
