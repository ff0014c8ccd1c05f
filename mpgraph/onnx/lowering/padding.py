"""Backward of padding by copies, as one product per axis with a constant matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpgraph.onnx.lowering.constants import constant
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def _replication_backward(grad: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """Every element takes the gradients of its copies."""
    for axis in range(len(padding) // 2):
        size, before = x.shape[-1 - axis], padding[2 * axis]
        width = grad.shape[-1 - axis]
        copied = [min(max(i - before, 0), size - 1) for i in range(width)]
        matrix = constant([[float(j == i) for i in range(size)] for j in copied], grad.dtype)
        grad = (grad.transpose(-1, -1 - axis) @ matrix).transpose(-1, -1 - axis)
    return grad


ROWS = (
    Row(
        (
            aten.replication_pad1d_backward.default,
            aten.replication_pad2d_backward.default,
            aten.replication_pad3d_backward.default,
        ),
        _replication_backward,
        "one matrix product per axis with the constant matrix [o, i] = 1 where o is a copy of i",
        "aten/src/ATen/native/cpu/PaddingKernel.cpp: i = clamp(o - before, 0, size - 1)",
    ),
)
