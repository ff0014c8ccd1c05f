"""What puts gradients back to where values came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.constants import constant
from mpgraph.onnx.lowering.copies import dense_order, places_of
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
    start, order = offset or 0, dense_order(size, stride)
    if start == 0 and order is not None and x.numel() == math.prod(size):
        return source.permute(order).reshape(x.shape)
    places = constant(places_of(x, size, stride, start))
    return x.reshape(-1).scatter(0, places, source.reshape(-1)).view(x.shape)


def _diagonal_scatter(
    x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Tensor:
    put = _diagonal_backward(source, x.shape, offset, dim1, dim2)
    is_put = _diagonal_backward(torch.ones_like(source), x.shape, offset, dim1, dim2)
    return torch.where(is_put != 0, put, x)


def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    size = x.numel()
    places = torch.where(index < 0, index + size, index).reshape(-1)
    flat, given = x.reshape(-1), source.reshape(-1)
    found = flat.scatter_add(0, places, given) if accumulate else flat.scatter(0, places, given)
    return found.view(x.shape)


def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    if reduce != "mean":
        return NotImplemented
    given = source[tuple(slice(n) for n in index.shape)]
    counts = torch.zeros_like(x).scatter_add(dim, index, torch.ones_like(given))
    start = x if include_self else torch.where(counts == 0, x, 0.0)
    total = start.scatter_add(dim, index, given)
    return total / (counts + 1 if include_self else counts.clamp(min=1))


def _index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    shape = [1] * source.dim()
    shape[dim] = -1
    places = index.view(shape).expand(source.shape)
    return x.scatter_reduce(dim, places, source, reduce, include_self=include_self)


def _index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, *_: Any
) -> Any:
    """Sums: onnxruntime's ScatterND adds on several threads, and loses some where places repeat."""
    given = {dim: index for dim, index in enumerate(indices) if index is not None}
    if not accumulate or any(index.dtype is torch.bool for index in given.values()):
        return NotImplemented
    sizes = [x.shape[dim] for dim in given]
    rest = [dim for dim in range(x.dim()) if dim not in given]
    wrapped = [torch.where(i < 0, i + n, i) for i, n in zip(given.values(), sizes, strict=True)]
    broadcast: Any = torch.broadcast_tensors
    place, *others = broadcast(*wrapped)
    for index, size in zip(others, sizes[1:], strict=True):
        place = place * size + index
    moved = x.permute(*given, *rest)
    shape = [*place.shape, *moved.shape[len(given) :]]
    flat = moved.reshape(math.prod(sizes), -1)
    updates = _as_updates(values, [*given], place.dim(), shape).reshape(-1, flat.shape[1])
    places = place.reshape(-1, 1).expand(updates.shape)
    found = flat.scatter_add(0, places, updates).reshape(moved.shape)
    order = [*given, *rest]
    return found.permute([order.index(dim) for dim in range(x.dim())])


def _as_updates(values: Tensor, dims: Sequence[int], rank: int, shape: Sequence[int]) -> Tensor:
    """What is put there, indexed dimensions first: so they are unless they were side by side."""
    if dims[-1] - dims[0] + 1 == len(dims) and dims[0]:
        before, first = dims[0], len(shape)
        laid_out = [*shape[rank : rank + before], *shape[:rank], *shape[rank + before :]]
        order = [*range(before, before + rank), *range(before), *range(before + rank, first)]
        return values.expand(laid_out).permute(order)
    return values.expand(list(shape))


_REDUCTIONS = {"add": "sum", "multiply": "prod"}


def _scatter(x: Tensor, dim: int, index: Tensor, source: Any, *, reduce: str) -> Tensor:
    if not isinstance(source, Tensor):
        source = torch.full_like(index, source, dtype=x.dtype)
    return x.scatter_reduce(dim, index, source, _REDUCTIONS[reduce])


def _searchsorted(
    rows: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    if sorter is not None:
        rows = rows.gather(-1, sorter)
    rows, wide = rows.unsqueeze(-2), values.unsqueeze(-1)
    before = rows <= wide if right or side == "right" else rows < wide
    return before.to(torch.int64).sum(-1).to(torch.int32 if out_int32 else torch.int64)


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
    Row(
        (aten.diagonal_scatter.default,), _diagonal_scatter,
        "what is put there, and x elsewhere", "torch.diagonal_scatter",
    ),
    Row(
        (aten.put.default,), _put, "scatter or scatter-add to the flattened tensor", "torch.put",
    ),
    Row(
        (aten.scatter_reduce.two,), _scatter_reduce, "mean: scatter-add, / scatter-add of ones",
        "torch.scatter_reduce; torchlib translates mean to a scatter without a reduction",
    ),
    Row(
        (aten.scatter.reduce, aten.scatter.value_reduce), _scatter, "scatter_reduce",
        "torch.Tensor.scatter_",
    ),
    Row(
        (aten.index_reduce.default,), _index_reduce, "scatter_reduce", "torch.index_reduce",
    ),
    Row(
        (aten.index_put.default, aten._unsafe_index_put.default), _index_put,
        "sums: scatter-add to sum(index * stride)", "aten/src/ATen/native/IndexingUtils.h",
    ),
    Row(
        (aten.searchsorted.Tensor,), _searchsorted, "how many of the row are smaller",
        "torch.searchsorted",
    ),
)  # fmt: skip
