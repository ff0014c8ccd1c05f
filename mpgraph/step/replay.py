"""A step as a CUDA graph: recorded once, replayed with one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpgraph.errors import CaptureError

Run = Callable[..., Sequence[Any]]


class Replayed:
    """Records a function's launches at its second call, and replays them from then on.

    A replay reads and writes the memory of the recording: batches are copied to where it reads
    them, results are copied out, and parameters and state are where they are. When one of those
    lies elsewhere (another state was loaded), or a number among the arguments is another, the next
    call records anew.

    Args:
        run: Takes CUDA tensors and numbers, and returns tensors; it waits for nothing.
        batch: Which of its arguments are another tensor at every call.
    """

    def __init__(self, run: Run, batch: Sequence[int]) -> None:
        self.run, self.batch = run, batch
        self._is_warm = False
        self._graph: Any = None
        self._addresses: list[Any] = []
        self._inputs: list[torch.Tensor] = []
        self._outputs: Sequence[Any] = ()

    def __call__(self, *values: Any) -> Sequence[Any]:
        """One run, with these values."""
        if not self._is_warm:
            self._is_warm = True  # kernels are loaded, and nothing may be while recording
            return self.run(*values)
        batch = [values[i] for i in self.batch]
        addresses = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
        for i in self.batch:
            addresses[i] = 0
        if self._graph is None or addresses != self._addresses:
            self._record(values, batch)
            self._addresses = addresses
        for place, value in zip(self._inputs, batch, strict=True):
            _memory(place).copy_(_memory(value), non_blocking=True)
        self._graph.replay()
        return [v.clone() if isinstance(v, torch.Tensor) else v for v in self._outputs]

    def _record(self, values: Sequence[Any], batch: Sequence[torch.Tensor]) -> None:
        on_host = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and not v.is_cuda]
        if on_host:
            raise CaptureError(
                f"{len(on_host)} tensors of the step are on the CPU, so its launches cannot be "
                "replayed as a CUDA graph. Move the batch and the optimizer's state to the GPU, or "
                "use compile=True."
            )
        self._graph = None  # its memory can be used again
        self._inputs = [_memory(v).clone().as_strided(v.shape, v.stride()) for v in batch]
        static = list(values)
        for i, place in zip(self.batch, self._inputs, strict=True):
            static[i] = place
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = self.run(*static)
        self._graph = graph


def _memory(value: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor from its first element to its last, gaps and overlaps included."""
    if value.numel() == 0:
        return value.flatten()
    last = sum(
        (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    return value.as_strided((last + 1,), (1,))
