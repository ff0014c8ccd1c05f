"""Constants in what is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from mpgraph.errors import ExportError

FIX_SIZES = "export with fixed sizes (dynamic=False; for a step, dynamic_batch=False)"


def constant(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that becomes a constant of the graph: it is made out of sight of the trace.

    Raises:
        ExportError: A value depends on a symbolic size; the constant would hold for one size alone.
    """
    if any(isinstance(value, SymInt) for value in pytree.tree_leaves(values)):
        raise ExportError(
            "an operator is translated with constants that depend on the size of the batch, or of "
            f"another dimension that varies. Let it work on other dimensions, or {FIX_SIZES}."
        )
    with _disable_current_modes():
        return torch.tensor(values, dtype=dtype)
