"""Which thread traces what, and for whom."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

local = threading.local()
# The same, as Dynamo can read it: whether it traces for mpgraph, or for the user.
tracing = types.SimpleNamespace(is_capture=False)
# Tracing changes state of the whole process, and puts traced values in the place of a model's
# parameters: meanwhile no other thread may read them.
lock = threading.RLock()


class capturing:
    """While this is active, converted modules run the user's own forward."""

    def __enter__(self) -> None:
        self._before = getattr(local, "capturing", False), tracing.is_capture
        local.capturing = tracing.is_capture = True

    def __exit__(self, *_: object) -> None:
        local.capturing, tracing.is_capture = self._before


@contextlib.contextmanager
def tracing_step(call: Callable[..., Any]) -> Iterator[None]:
    """While this is active, ``call(state, model, args, kwargs)`` runs the calls of this thread."""
    before, local.step = getattr(local, "step", None), call
    try:
        yield
    finally:
        local.step = before
