"""Notice a ``torch.amp.GradScaler`` around an fp16 model, whose gradients it would scale again."""

from __future__ import annotations

import sys
from types import FrameType

import torch

from mpgraph.errors import PrecisionError

_CODE = frozenset(
    {torch.amp.GradScaler.step.__code__, torch.amp.GradScaler._maybe_opt_step.__code__}
)


def refuse_grad_scaler(what: str) -> None:
    """Raise if an optimizer's step was called by a scaler that is enabled.

    Args:
        what: What the scaler does that it must not: "steps a guarded optimizer".

    Raises:
        PrecisionError: It was.
    """
    # The caller is the scaler, or a scheduler's wrapper or a hook whose caller is.
    frame: FrameType | None = sys._getframe(2)
    for _ in range(6):
        if frame is None:
            return
        if frame.f_code in _CODE and frame.f_locals["self"].is_enabled():
            raise PrecisionError(
                f"torch.amp.GradScaler {what}: gradients would be scaled twice. Leave the scaler "
                "out: call loss.backward() and optimizer.step() themselves, after "
                "mpgraph.guard(optimizer, model)."
            )
        frame = frame.f_back
