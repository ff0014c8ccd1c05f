"""Constants in what is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def constant(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that becomes a constant of the graph: it is made out of sight of the trace."""
    with _disable_current_modes():
        return torch.tensor(values, dtype=dtype)
