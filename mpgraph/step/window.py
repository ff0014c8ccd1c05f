"""The batches that make one update, and the sums of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpgraph.step.joint import gradients_of
from mpgraph.step.slots import StepSlot
from mpgraph.step.trace_gradients import Gradients


class Window:
    """How far one has come with the batches of an update.

    Attributes:
        size: How many batches make one update.
        batches: How many there have been since the last one.
        sums: What their gradients add up to, by the parameter's name.
        waiting: The parameters that one of these batches had a gradient of.
    """

    def __init__(self, size: int) -> None:
        self.size, self.batches = size, 0
        self.sums: dict[str, torch.Tensor] = {}
        self.waiting: frozenset[str] = frozenset()

    @property
    def ends(self) -> bool:
        """Whether the next batch is its last."""
        return self.batches + 1 == self.size

    def note(self, found: frozenset[str]) -> None:
        """A batch has had gradients of these parameters."""
        is_last = self.ends
        self.batches = 0 if is_last else self.batches + 1
        self.waiting = frozenset() if is_last else self.waiting | found

    def slots(self, gradients: Gradients) -> dict[str, StepSlot]:
        """The place of each gradient's sum; none where every batch is an update."""
        if self.size == 1:
            return {}
        slots = {}
        for name, node in gradients_of(gradients.graph_module.graph).items():
            value = node.meta["val"]
            if name not in self.sums or self.sums[name].shape != value.shape:
                self.sums[name] = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            slots[name] = StepSlot("sum", f"sum of gradient {name}", self._reader(name))
        return slots

    def _reader(self, name: str) -> Callable[[], torch.Tensor]:
        return lambda: self.sums[name]

    def state_dict(self) -> dict[str, Any]:
        """All of it, to be saved."""
        return {
            "batches": self.batches,
            "sums": dict(self.sums),
            "waiting": sorted(self.waiting),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: str) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.batches = state["batches"]
        self.waiting = frozenset(state.get("waiting", state["sums"] if self.batches else ()))
        self.sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}
