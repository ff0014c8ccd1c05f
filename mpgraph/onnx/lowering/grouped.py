"""Products with one matrix for each group of rows, as a mixture of experts computes them.

ONNX has none whose sizes depend on values, so every matrix is multiplied with all rows, and each
row takes its own: as many times the work as there are groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row


def _in_group(ends: Tensor, rows: Any) -> Tensor:
    """``[group, row, 1]``: whether a row is in a group, which ends before the row ``ends``."""
    places = torch.arange(rows, dtype=ends.dtype)
    starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    return ((places >= starts[:, None]) & (places < ends[:, None]))[..., None]


def _of_rows(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """``x[row] @ matrices[group of the row]``; 0 in rows of no group."""
    return torch.where(_in_group(ends, x.shape[0]), x[None] @ matrices, 0.0).sum(0)


def _over_rows(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """For each group, the sum of ``x[:, row] * y[row]`` over its rows."""
    return x[None] @ torch.where(_in_group(ends, y.shape[0]), y, 0.0)


def _backward(x: Tensor, matrices: Tensor, ends: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _of_rows(grad, matrices.mT, ends), _over_rows(x.mT, grad, ends)


_SOURCE = "transformers/integrations/moe.py"
_BY_NAME: dict[str, tuple[Callable[..., Any], str]] = {
    "grouped_mm_fallback": (_of_rows, "sum(where(row in group, x @ matrices, 0))"),
    "grouped_mm_fallback_backward": (
        _backward, "grad @ matrices.T, and x.T @ where(row in group, grad, 0)",
    ),
}  # fmt: skip


def rows_of_libraries() -> tuple[Row, ...]:
    """Rows of operators that transformers defines, once it is imported."""
    known: Any = torch.ops.transformers
    return tuple(
        Row((getattr(known, name).default,), function, formula, _SOURCE)
        for name, (function, formula) in _BY_NAME.items()
        if hasattr(known, name)
    )
