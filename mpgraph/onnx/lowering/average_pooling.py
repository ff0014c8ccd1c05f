"""Average pooling, as one product per axis with a constant matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row
from mpgraph.onnx.lowering.windows import Windows, adaptive_windows, pool_windows

aten = torch.ops.aten
Function = Callable[..., Tensor]


def _sum_windows(x: Tensor, axes: Sequence[Windows], divided: bool = True) -> Tensor:
    """Add up every window, axis by axis."""
    for axis, windows in enumerate(reversed(axes), 1):
        matrix = windows.matrix(x, divided=divided).T
        x = (x.transpose(-1, -axis) @ matrix).transpose(-1, -axis)
    return x


def _spread_windows(grad: Tensor, axes: Sequence[Windows], divided: bool = True) -> Tensor:
    """Give every input its share of the gradients of the windows that it is in."""
    for axis, windows in enumerate(reversed(axes), 1):
        matrix = windows.matrix(grad, divided=divided)
        grad = (grad.transpose(-1, -axis) @ matrix).transpose(-1, -axis)
    return grad


def _axes(
    sizes: Sequence[int], outputs: Sequence[int], kernel: Any, stride: Any, padding: Any, pad: bool
) -> list[Windows]:
    rank = len(sizes)
    kernels = _per_axis(kernel, rank)
    strides = _per_axis(stride, rank) if stride else kernels
    given = zip(sizes, outputs, kernels, strides, _per_axis(padding, rank), strict=True)
    return [pool_windows(*numbers, pad) for numbers in given]


def _per_axis(values: Any, rank: int) -> list[int]:
    if isinstance(values, int):
        return [values] * rank
    return [*values] * rank if len(values) == 1 else [*values]


def _average(target: Any, rank: int) -> Function:
    def avg_pool(
        x: Tensor,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        if not ceil_mode and divisor_override is None:
            return NotImplemented  # ONNX has it
        sizes = x.shape[-rank:]
        given = [_per_axis(v, rank) for v in (kernel, stride or kernel, padding)]
        outputs, floor = (
            [*map(_outputs, sizes, *given, [mode] * rank)] for mode in (ceil_mode, False)
        )
        if divisor_override is None and outputs == floor:
            return target(x, kernel, stride, padding, False, count_include_pad)
        axes = _axes(sizes, outputs, kernel, stride, padding, count_include_pad)
        if divisor_override is not None:
            return _sum_windows(x, axes, divided=False) / divisor_override
        return _sum_windows(x, axes)

    return avg_pool


def _outputs(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows there are (aten/src/ATen/native/Pool.h, pooling_output_shape)."""
    span = size + 2 * padding - kernel
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # the last window would lie in the padding
    return count


def _average_backward(rank: int) -> Function:
    def avg_pool_backward(
        grad: Tensor,
        x: Tensor,
        kernel: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        sizes, outputs = x.shape[-rank:], grad.shape[-rank:]
        axes = _axes(sizes, outputs, kernel, stride, padding, count_include_pad)
        if divisor_override is not None:
            return _spread_windows(grad / divisor_override, axes, divided=False)
        return _spread_windows(grad, axes)

    return avg_pool_backward


def _adaptive(x: Tensor, output_size: Sequence[int]) -> Tensor:
    sizes = x.shape[-len(output_size) :]
    return _sum_windows(x, [*map(adaptive_windows, sizes, output_size)])


def _adaptive_backward(rank: int) -> Function:
    def adaptive_backward(grad: Tensor, x: Tensor) -> Tensor:
        return _spread_windows(grad, [*map(adaptive_windows, x.shape[-rank:], grad.shape[-rank:])])

    return adaptive_backward


_FORMULA = "one matrix product per axis with the constant matrix [o, i] = 1 / count in the window"
_WINDOWS = "aten/src/ATen/native/cpu/AvgPoolKernel.cpp: window and divisor are products over axes"
_ADAPTIVE = (
    "aten/src/ATen/native/AdaptivePooling.h: start = floor(o I / O), end = ceil((o + 1) I / O)"
)

ROWS = (
    Row((aten.avg_pool2d.default,), _average(aten.avg_pool2d, 2), _FORMULA, _WINDOWS),
    Row((aten.avg_pool3d.default,), _average(aten.avg_pool3d, 3), _FORMULA, _WINDOWS),
    Row((aten.avg_pool2d_backward.default,), _average_backward(2), _FORMULA, _WINDOWS),
    Row((aten.avg_pool3d_backward.default,), _average_backward(3), _FORMULA, _WINDOWS),
    Row(
        (aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default),
        _adaptive, _FORMULA, _ADAPTIVE,
    ),
    Row((aten._adaptive_avg_pool2d_backward.default,), _adaptive_backward(2), _FORMULA, _ADAPTIVE),
    Row((aten._adaptive_avg_pool3d_backward.default,), _adaptive_backward(3), _FORMULA, _ADAPTIVE),
)  # fmt: skip
