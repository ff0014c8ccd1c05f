"""The state of a trainer as onnxruntime's own tensors, written where it lies or in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from mpgraph.runtime.batch import Arrays
from mpgraph.runtime.manifest import StateTensor


class Buffers:
    """Every state tensor, in one buffer where a step may write over it, else in two.

    Args:
        state: What the manifest says of each.
        values: The first values.
        device: "cpu" or "cuda".
        in_place: Whether to use one buffer where the graph allows it.
    """

    def __init__(
        self, state: Sequence[StateTensor], values: Arrays, device: str, in_place: bool
    ) -> None:
        self.state, self.device = state, device
        self.turn = 0
        self._pairs: dict[str, tuple[Any, Any]] = {}
        for tensor in state:
            first = _ort_value(values[tensor.name], device)
            is_one = in_place and tensor.in_place
            second = first if is_one else _ort_value(np.empty_like(values[tensor.name]), device)
            self._pairs[tensor.name] = first, second

    def now(self, name: str) -> Any:
        """Where the value of a tensor is now."""
        return self._pairs[name][self.turn]

    def bind(self, binding: Any, turn: int) -> None:
        """Read every tensor from where it is at this turn, and write it to where it then is."""
        for tensor in self.state:
            pair = self._pairs[tensor.name]
            if tensor.pieces:
                self._bind_pieces(binding, tensor, pair[turn], pair[1 - turn])
                continue
            binding.bind_ortvalue_input(tensor.name, pair[turn])
            binding.bind_ortvalue_output(tensor.output, pair[1 - turn])

    def _bind_pieces(self, binding: Any, tensor: StateTensor, read: Any, written: Any) -> None:
        """The same memory in another shape."""
        how = self.device, 0, np.dtype(tensor.dtype), tensor.pieces
        binding.bind_input(tensor.name, *how, read.data_ptr())
        binding.bind_output(tensor.output, *how, written.data_ptr())

    def swap(self) -> None:
        """A step has run: its results are the state."""
        self.turn = 1 - self.turn

    def values(self) -> Arrays:
        """A copy of the state."""
        return {t.name: np.array(self.now(t.name).numpy(), copy=True) for t in self.state}

    def put(self, values: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write other values over the state."""
        for name, value in values.items():
            self.now(name).update_inplace(np.ascontiguousarray(value).reshape(value.shape))


def _ort_value(value: np.ndarray[Any, Any], device: str) -> Any:
    # A copy of its own: onnxruntime writes to it.
    own = np.array(value, copy=True, order="C")
    return ort.OrtValue.ortvalue_from_numpy(own, device, 0)
