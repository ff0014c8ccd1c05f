"""Hooks on saved tensors that are around a call, as those of a checkpoint around the model."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def hidden_from_saved_tensors_hooks() -> contextlib.AbstractContextManager[Any]:
    """Hide what tracing saves for a backward pass: a checkpoint counts what is saved in it."""
    if _top is None or _top(False) is None:
        return contextlib.nullcontext()  # function transforms refuse to run inside any hook
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
