"""What has been so far along an axis: products, logarithms of sums, extremes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpgraph.errors import ExportError
from mpgraph.onnx.lowering.constants import FIX_SIZES
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def running(values: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``combine`` of everything up to each place of the last axis, whose size is fixed.

    In rounds, of which each doubles how much is seen: ``combine`` must be associative, and gets
    what comes first first.
    """
    step, size = 1, values.shape[-1]
    while step < size:
        later = combine(values[..., :-step], values[..., step:])
        values = torch.cat([values[..., :step], later], -1)
        step *= 2
    return values


def _triangle(x: Tensor, fill: float) -> Tensor:
    """``[..., place, seen]``: a row for each place, with ``fill`` for what comes later."""
    size = x.shape[-1]
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    return torch.where(seen, x.unsqueeze(-2), fill)


def _cumprod(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    if not x.dim():
        return x.clone()
    moved = x.transpose(dim, -1)
    if isinstance(moved.shape[-1], int):
        found = running(moved, torch.mul)
    else:
        found = _triangle(moved, 1.0).to(x.dtype).prod(-1)
    return found.transpose(dim, -1)


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    if not x.dim():
        return x.clone()
    moved = x.transpose(dim, -1)
    if isinstance(moved.shape[-1], int):
        found = running(moved, _log_of_sum)
    else:
        found = _triangle(moved, -torch.inf).logsumexp(-1)
    return found.transpose(dim, -1)


def _log_of_sum(a: Tensor, b: Tensor) -> Tensor:
    large, small = torch.maximum(a, b), torch.minimum(a, b)
    # Two equal infinities have no difference.
    apart = torch.where(large == small, 0.0, small - large)
    return large + apart.exp().log1p()


def _extreme(wins: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The largest so far, or the smallest, and the last place where it was."""

    def extreme(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        values = x.transpose(dim, -1) if x.dim() else x.view(1)
        size = values.shape[-1]
        if not isinstance(size, int):
            raise ExportError(
                "a running extreme is translated for a fixed number of elements. Let it work on "
                f"another dimension, or {FIX_SIZES}."
            )
        places, step = torch.arange(size).expand(values.shape), 1
        while step < size:
            before, now = values[..., :-step], values[..., step:]
            stays = wins(now, before) | now.isnan() if x.is_floating_point() else wins(now, before)
            place = torch.where(stays, places[..., step:], places[..., :-step])
            values = torch.cat([values[..., :step], torch.where(stays, now, before)], -1)
            places = torch.cat([places[..., :step], place], -1)
            step *= 2
        if not x.dim():
            return values.view([]), places.view([])
        return values.transpose(dim, -1), places.transpose(dim, -1)

    return extreme


_ROUNDS = "in log2(n) rounds, each of neighbours twice as far apart"
_HILLIS = "Hillis and Steele, Data parallel algorithms, Communications of the ACM 29 (1986)"
_EXTREMES = "aten/src/ATen/native/ReduceOps.cpp, cummax_helper_cpu and cummin_helper_cpu"

ROWS = (
    Row((aten.cumprod.default,), _cumprod, f"products {_ROUNDS}", _HILLIS),
    Row(
        (aten.logcumsumexp.default,), _logcumsumexp,
        f"max + log(1 + exp(min - max)) {_ROUNDS}",
        f"{_HILLIS}; torchlib takes the maximum of all, which makes zeros of the first",
    ),
    Row(
        (aten.cummax.default,), _extreme(torch.ge),
        f"the larger, and of equals the later, {_ROUNDS}", f"{_HILLIS}; {_EXTREMES}",
    ),
    Row(
        (aten.cummin.default,), _extreme(torch.le),
        f"the smaller, and of equals the later, {_ROUNDS}", f"{_HILLIS}; {_EXTREMES}",
    ),
)  # fmt: skip
