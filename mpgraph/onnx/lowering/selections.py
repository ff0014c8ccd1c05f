"""Backward of taking one place of an axis: zeros around the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def _select_backward(grad: Tensor, sizes: Sequence[int], dim: int, index: int) -> Any:
    dim = dim % len(sizes)
    size = sizes[dim]
    if not isinstance(size, int) or not isinstance(index, int):
        return NotImplemented
    before = index % size
    inner = [0, 0] * (len(sizes) - 1 - dim)
    return aten.constant_pad_nd(grad.unsqueeze(dim), [*inner, before, size - 1 - before])


ROWS = (
    Row(
        (aten.select_backward.default,), _select_backward, "grad, padded with zeros",
        "aten/src/ATen/native/TensorShape.cpp; a scatter, as torch decomposes it, goes by element",
    ),
)  # fmt: skip
