"""The k-th of a row, medians, modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row
from mpgraph.onnx.lowering.running import running

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
    is_fixed = isinstance(moved.shape[-1], int)
    value = _most_frequent(moved) if is_fixed else _most_frequent_of_any_number(moved)
    place = torch.where(moved == value, torch.arange(moved.shape[-1]), -1).amax(-1, keepdim=True)
    found = value.transpose(dim, -1), place.transpose(dim, -1)
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


def _most_frequent(rows: Tensor) -> Tensor:
    """Of sorted rows, the first of the values with the longest run."""
    values, places = rows.sort(-1)[0], torch.arange(rows.shape[-1])
    starts = torch.where(values[..., 1:] != values[..., :-1], places[1:], 0)
    starts = torch.cat([torch.zeros_like(values[..., :1], dtype=torch.int64), starts], -1)
    length = places - running(starts, torch.maximum)
    return values.gather(-1, length.argmax(-1, keepdim=True))


def _most_frequent_of_any_number(rows: Tensor) -> Tensor:
    count = (rows.unsqueeze(-1) == rows.unsqueeze(-2)).to(torch.int64).sum(-1)
    is_frequent = count == count.amax(-1, keepdim=True)
    return torch.where(is_frequent, rows, torch.inf).amin(-1, keepdim=True).to(rows.dtype)


def _permutation(count: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.rand(count).argsort().to(dtype or torch.int64)


def _extreme(choose: Any) -> Any:
    """The larger, or smaller, of two; of a number and NaN, the number."""

    def extreme(x: Tensor, y: Tensor) -> Tensor:
        found = torch.where(x.isnan(), y, choose(x, y))
        return torch.where(y.isnan(), x, found)

    return extreme


def _over_all(extreme: Callable[..., Any]) -> Callable[..., Any]:
    """Of all axes, where none is named: torchlib takes that for a missing argument."""

    def over(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        if not x.dim():
            return x.clone()
        return NotImplemented if len(dim) else extreme(x, [*range(x.dim())], keepdim)

    return over


_ALL_AXES = "of all axes, where none is named"
_TOP = "the last of the k smallest"
_SORT = "aten/src/ATen/native/Sorting.cpp; of several equal values, any one may be meant"

ROWS = (
    Row((aten.max.dim,), _largest, "of integers, for truth values", "ONNX has no ArgMax of bool"),
    Row((aten.amax.default,), _over_all(aten.amax), _ALL_AXES, "torch.amax"),
    Row((aten.amin.default,), _over_all(aten.amin), _ALL_AXES, "torch.amin"),
    Row((aten.kthvalue.default,), _kthvalue, _TOP, _SORT),
    Row((aten.median.dim,), _median, _TOP + ", k = (n + 1) // 2", _SORT),
    Row((aten.median.default,), _median_of_all, _TOP + ", k = (n + 1) // 2", _SORT),
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
        (aten.mode.default,), _mode, "of the sorted row, the first of the longest run",
        "aten/src/ATen/native/ReduceOps.cpp and cpu/SortingKernel.cpp; the last of its places",
    ),
    Row(
        (aten.randperm.default,), _permutation, "the order of random numbers",
        "a step's own are drawn from its counter; these, in evaluation, by the runtime",
    ),
    Row((aten.fmax.default,), _extreme(torch.maximum), "maximum, but for NaN", "torch.fmax"),
    Row((aten.fmin.default,), _extreme(torch.minimum), "minimum, but for NaN", "torch.fmin"),
)  # fmt: skip
