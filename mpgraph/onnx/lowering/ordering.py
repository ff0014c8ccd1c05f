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


def _median_of_numbers(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    count = (~x.isnan()).to(torch.int64).sum(dim, keepdim=True)
    values, places = torch.where(x.isnan(), torch.inf, x).sort(dim)
    middle = ((count - 1) // 2).clamp(min=0)
    found = torch.where(count == 0, torch.nan, values.gather(dim, middle))
    place = places.gather(dim, middle)
    return (found, place) if keepdim else (found.squeeze(dim), place.squeeze(dim))


def _stable(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return x.sort(dim, descending)


def _mode(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    moved = x.transpose(dim, -1)
    same = moved.unsqueeze(-1) == moved.unsqueeze(-2)
    count = same.to(torch.int64).sum(-1)
    is_frequent = count == count.amax(-1, keepdim=True)
    value = torch.where(is_frequent, moved, torch.inf).amin(-1, keepdim=True)
    place = torch.where(moved == value, torch.arange(moved.shape[-1]), -1).amax(-1, keepdim=True)
    found = value.to(x.dtype).transpose(dim, -1), place.transpose(dim, -1)
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


def _extreme(choose: Any) -> Any:
    """The larger, or smaller, of two; of a number and NaN, the number."""

    def extreme(x: Tensor, y: Tensor) -> Tensor:
        found = torch.where(x.isnan(), y, choose(x, y))
        return torch.where(y.isnan(), x, found)

    return extreme


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
    Row(
        (aten.sort.stable,), _stable, "sort",
        "ONNX, TopK: of equal elements, the one with the lower index comes first",
    ),
    Row((aten.nanmedian.dim,), _median_of_numbers, "the middle of those before the NaNs", _SORT),
    Row(
        (aten.nanmedian.default,), lambda x: _median_of_numbers(x.flatten(), 0)[0],
        "the middle of those before the NaNs", _SORT,
    ),
    Row(
        (aten.mode.default,), _mode, "the smallest of those that equal most others; quadratic",
        "aten/src/ATen/native/ReduceOps.cpp and cpu/SortingKernel.cpp; the last of its places",
    ),
    Row((aten.fmax.default,), _extreme(torch.maximum), "maximum, but for NaN", "torch.fmax"),
    Row((aten.fmin.default,), _extreme(torch.minimum), "minimum, but for NaN", "torch.fmin"),
)  # fmt: skip
