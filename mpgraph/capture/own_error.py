"""A call that cannot be captured may fail in eager mode as well: an error of the model's own.

Tracing meets such an error on fake tensors, in other words and as another type. What the user is
to see is what eager torch raises.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mpgraph.capture.breaks import line_of
from mpgraph.capture.undo import BeforeRun
from mpgraph.module import State
from mpgraph.notes import add_note
from mpgraph.pipeline import PassContext
from mpgraph.structure import Spec, opaque_values, unflatten
from mpgraph.tracing import capturing


def raise_own_error(
    state: State, model: nn.Module, leaves: Sequence[Any], spec: Spec, context: PassContext
) -> None:
    """Raise what the call raises in eager mode under ``torch.autocast``, if it raises something.

    What the call has done until then stays done, as in eager mode. If it raises nothing, it leaves
    nothing behind: the model is put back, and its arguments are copies.
    """
    before = BeforeRun(model, opaque_values(spec))
    try:
        with before.writes:
            _run(state, model, leaves, spec, context)
    except Exception:
        # Once more, with nothing looking on: torch.cond, which compiles, minds that.
        before.restore()
    else:
        before.restore()
        return
    try:
        _run(state, model, leaves, spec, context)
    except Exception as error:
        note_line(error)
        raise
    before.restore()


def _run(
    state: State, model: nn.Module, leaves: Sequence[Any], spec: Spec, context: PassContext
) -> None:
    # What was one tensor for the caller is one here.
    copies = {id(leaf): _copy(leaf) for leaf in leaves}
    args, kwargs = unflatten(spec, [copies[id(leaf)] for leaf in leaves])
    with capturing(), context.autocast():
        state.original_forward()(model, *args, **kwargs)


def note_line(error: Exception) -> None:
    """Note on an error of the model's own which of the user's lines it is from."""
    line = line_of(traceback.extract_tb(error.__traceback__))
    add_note(error, f"mpgraph: the model's own error, from {line}")


def _copy(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)
