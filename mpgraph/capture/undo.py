"""Undo what a failed attempt to capture has left on a model."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block fails, put attributes, containers and random states back as they were.

    A forward that is traced half and then fails has already counted its counters, appended to
    its lists and assigned traced tensors to its buffers; the engine that tries next runs it
    from the start.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers = [(value, value.copy()) for value in _containers(model)]
    numpy: Any = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
    except BaseException:
        for current, before in attributes:
            current.clear()
            current.update(before)
        for container, before in containers:
            _refill(container, before)
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
        raise


def _containers(model: nn.Module) -> Iterator[Any]:
    """Every plain list, dict and set that hangs on a module, its own tables included."""
    seen: set[int] = set()
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, (list, dict, set)) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        waiting.extend(value.values() if isinstance(value, dict) else value)


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        container.update(before)
