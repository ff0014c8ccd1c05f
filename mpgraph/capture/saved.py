"""What is around a call and is to see the call, not what capturing it takes.

Hooks on saved tensors, as those of a checkpoint around the model; and dispatch modes, as one that
counts operators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

_overrides: Any = torch.overrides
_top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def hidden_from_saved_tensors_hooks() -> contextlib.AbstractContextManager[Any]:
    """Hide what tracing saves for a backward pass: a checkpoint counts what is saved in it."""
    if _top is None or _top(False) is None:
        return contextlib.nullcontext()  # function transforms refuse to run inside any hook
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@contextlib.contextmanager
def hidden_from_dispatch_modes() -> Iterator[None]:
    """Hide what tracing runs on tensors without values; torch's own modes see it all the same."""
    stack = _get_current_dispatch_mode_stack()
    hidden = [mode for mode in stack if getattr(mode, "_mode_key", None) is None]
    for _ in hidden:
        _pop_mode()
    try:
        yield
    finally:
        for mode in hidden:
            _push_mode(mode)


@contextlib.contextmanager
def hidden_from_tracers_function_modes() -> Iterator[None]:
    """Hide function modes of what traces around the block; the user's own see it all the same.

    Not ``DisableTorchFunction``: torch.export notes by a mode of its own where ``torch.no_grad``
    begins and ends.
    """
    stack = _overrides._get_current_function_mode_stack()
    for _ in stack:
        _overrides._pop_mode()
    for mode in stack:
        if not _is_tracers(mode):
            _overrides._push_mode(mode)
    try:
        yield
    finally:
        for _ in _overrides._get_current_function_mode_stack():
            _overrides._pop_mode()
        for mode in stack:
            _overrides._push_mode(mode)


def _is_tracers(mode: Any) -> bool:
    return type(mode).__module__.startswith(("mpgraph.", "torch.fx."))
