"""Windows of pooling along one axis, as constants: which inputs each output takes."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from mpgraph.onnx.lowering.constants import constant


@dataclasses.dataclass(frozen=True)
class Windows:
    """For each output, its window ``[start, end)``, cut to the input, and its divisor."""

    size: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    counts: tuple[int, ...]

    def matrix(self, like: Tensor, *, divided: bool = True) -> Tensor:
        """``[output, input]``: 1 / count in the window, 0 elsewhere."""
        rows = []
        for start, end, count in zip(self.starts, self.ends, self.counts, strict=True):
            weight = 1 / count if divided else 1.0
            rows.append([weight if start <= i < end else 0.0 for i in range(self.size)])
        return constant(rows, like.dtype)

    def table(self) -> list[list[int]]:
        """``[output, longest window]``: the inputs of each window, its last one repeated."""
        longest = max(end - start for start, end in zip(self.starts, self.ends, strict=True))
        return [
            [min(start + i, end - 1) for i in range(longest)]
            for start, end in zip(self.starts, self.ends, strict=True)
        ]


def pool_windows(
    size: int, outputs: int, kernel: int, stride: int, padding: int, include_pad: bool
) -> Windows:
    """Windows of average pooling (aten/src/ATen/native/cpu/AvgPoolKernel.cpp)."""
    found = []
    for output in range(outputs):
        start = output * stride - padding
        end = min(start + kernel, size + padding)
        cut = max(start, 0), min(end, size)
        found.append((*cut, end - start if include_pad else cut[1] - cut[0]))
    starts, ends, counts = zip(*found, strict=True)
    return Windows(size, starts, ends, counts)


def adaptive_windows(size: int, outputs: int) -> Windows:
    """Windows of adaptive pooling (aten/src/ATen/native/AdaptivePooling.h)."""
    starts = tuple(output * size // outputs for output in range(outputs))
    ends = tuple(-(-(output + 1) * size // outputs) for output in range(outputs))
    return Windows(size, starts, ends, tuple(e - s for s, e in zip(starts, ends, strict=True)))
