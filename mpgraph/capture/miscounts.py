"""What Dynamo gets wrong without a word in releases of torch before 2.13."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from mpgraph.capture.held import held_by_code
from mpgraph.code_state import CodeState
from mpgraph.errors import CaptureError

MISCOUNTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


@contextlib.contextmanager
def refuse_miscounts(model: nn.Module) -> Iterator[None]:
    """Raise ``CaptureError`` if a call changes a class attribute.

    Seen in torch 2.11: Dynamo reads it at the first call, and never again. 2.13 counts right;
    2.12 is not known to.
    """
    if not MISCOUNTS:
        yield
        return
    code = CodeState(list(model.modules()))
    values, containers = code.values(), held_by_code(code)
    yield
    for name in (*code.changed_since(values), *(c.path for c in containers if c.has_changed())):
        refuse_miscounted(name)


def refuse_miscounted(name: str) -> None:
    """Raise ``CaptureError`` if what forward changes is not a global, which is counted."""
    if MISCOUNTS and "." in name:
        raise CaptureError(
            f"forward changes {name}, and Dynamo in torch {torch.__version__} reads it once and "
            "never again. Keep it on the module (self.calls = 0 in __init__), or use torch 2.13."
        )
