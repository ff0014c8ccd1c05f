"""What puts gradients back to where values came from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpgraph.onnx.lowering.constants import constant
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def _masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    count = math.prod(sizes)
    flat = mask.expand(grad.shape).reshape(-1)
    places = torch.where(flat, flat.to(torch.int64).cumsum(0) - 1, count)  # one place too many
    found = torch.zeros(count + 1, dtype=grad.dtype)
    found = found.scatter_add(0, places, grad.reshape(-1) * flat)
    return found[:count].view(list(sizes))


def _diagonal_backward(
    grad: Tensor, sizes: Sequence[int], offset: int, dim1: int, dim2: int
) -> Tensor:
    dim1, dim2 = dim1 % len(sizes), dim2 % len(sizes)
    rows, columns = sizes[dim1], sizes[dim2]
    outer = [n for i, n in enumerate(sizes) if i not in (dim1, dim2)]
    first = max(-offset, 0) * columns + max(offset, 0)
    places = constant([first + i * (columns + 1) for i in range(grad.shape[-1])])
    flat = torch.zeros([*outer, rows * columns], dtype=grad.dtype)
    flat = flat.scatter(-1, places.expand(grad.shape), grad)
    return flat.view(*outer, rows, columns).movedim((-2, -1), (dim1, dim2))


def _unfold_backward(grad: Tensor, sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    dim = dim % max(len(sizes), 1)
    windows = grad.shape[dim]
    places = constant([w * step + i for w in range(windows) for i in range(size)])
    moved = grad.movedim(dim, -2).flatten(-2)  # [..., window * size]
    outer = [n for i, n in enumerate(sizes) if i != dim]
    found = torch.zeros([*outer, sizes[dim]], dtype=grad.dtype)
    return found.scatter_add(-1, places.expand(moved.shape), moved).movedim(-1, dim)


def _as_strided_scatter(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    places = [offset or 0]
    for n, step in zip(size, stride, strict=True):
        places = [base + i * step for base in places for i in range(n)]
    flat = x.reshape(-1).scatter(0, constant(places), source.reshape(-1))
    return flat.view(x.shape)


ROWS = (
    Row(
        (aten.masked_scatter_backward.default,), _masked_scatter_backward,
        "scatter-add to cumsum(mask) - 1", "aten/src/ATen/native/TensorAdvancedIndexing.cpp",
    ),
    Row(
        (aten.diagonal_backward.default,), _diagonal_backward,
        "scatter to constant places", "aten/src/ATen/native/TensorShape.cpp, diagonal_backward",
    ),
    Row(
        (aten.unfold_backward.default,), _unfold_backward,
        "scatter-add to constant places: window * step + i",
        "aten/src/ATen/native/cpu/UnfoldBackwardKernel.cpp",
    ),
    Row(
        (aten.as_strided_scatter.default,), _as_strided_scatter,
        "scatter to constant places: offset + sum(i * stride)", "torch.as_strided_scatter",
    ),
)  # fmt: skip
