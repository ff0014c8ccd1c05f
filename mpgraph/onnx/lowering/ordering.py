"""The k-th of a row, medians, and running extremes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.constants import constant
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, places = x.topk(k, dim, largest=False)
    found = values.narrow(dim, k - 1, 1), places.narrow(dim, k - 1, 1)
    if keepdim:
        return found
    return found[0].squeeze(dim), found[1].squeeze(dim)


def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _median_of_all(x: Tensor) -> Tensor:
    return _median(x.flatten(), 0)[0]


def _running(x: Tensor, dim: int, sign: int) -> tuple[Tensor, Tensor]:
    """The largest so far, or the smallest, and the last place where it was."""
    moved = x.transpose(dim, -1) * sign
    size = moved.shape[-1]
    seen = constant([[j <= i for j in range(size)] for i in range(size)])
    rows = torch.where(seen, moved.unsqueeze(-2), -torch.inf)
    values = rows.amax(-1)
    places = constant([*range(size)])
    last = torch.where(rows == values.unsqueeze(-1), places, -1).amax(-1)
    return (values * sign).transpose(dim, -1), last.transpose(dim, -1)


def _largest(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    if x.dtype is not torch.bool:
        return NotImplemented
    values, places = x.to(torch.int64).max(dim, keepdim)
    return values.to(torch.bool), places


_TOP = "the last of the k smallest"
_SORT = "aten/src/ATen/native/Sorting.cpp; of several equal values, any one may be meant"

ROWS = (
    Row((aten.max.dim,), _largest, "of integers, for truth values", "ONNX has no ArgMax of bool"),
    Row((aten.kthvalue.default,), _kthvalue, _TOP, _SORT),
    Row((aten.median.dim,), _median, _TOP + ", k = (n + 1) // 2", _SORT),
    Row((aten.median.default,), _median_of_all, _TOP + ", k = (n + 1) // 2", _SORT),
    Row(
        (aten.cummax.default,), lambda x, dim: _running(x, dim, 1),
        "the maximum of every row of a lower triangle, and its last place",
        "aten/src/ATen/native/ReduceOps.cpp, cummax_helper_cpu",
    ),
    Row(
        (aten.cummin.default,), lambda x, dim: _running(x, dim, -1),
        "-cummax(-x)", "aten/src/ATen/native/ReduceOps.cpp, cummin_helper_cpu",
    ),
)  # fmt: skip
