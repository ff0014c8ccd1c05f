"""Undo what a failed attempt to capture has left on a model."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from mpgraph.capture.held import held_by, held_by_code, held_in, put_back, snapshot
from mpgraph.code_state import CodeState


@contextlib.contextmanager
def undone_on_failure(model: nn.Module, arguments: Iterable[Any] = ()) -> Iterator[None]:
    """If the block fails, put attributes, containers and random states back as they were.

    So too what ``arguments`` hold: objects that the caller passes in, such as an empty cache.

    A forward that is traced half and then fails has already counted its counters, appended to
    its lists and assigned traced tensors to its buffers; the engine that tries next runs it
    from the start.
    """
    restore = remember(model, arguments)
    try:
        yield
    except BaseException:
        restore()
        raise


def remember(model: nn.Module, arguments: Iterable[Any] = ()) -> Callable[[], None]:
    """Note attributes, containers and random states; return what puts them back."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    tables = [
        (table, snapshot(table))
        for own, _ in attributes
        for table in own.values()
        if _is_table(table)
    ]
    code = CodeState(list(model.modules()))
    values = code.values()
    held = [*held_by(model), *held_in(arguments), *held_by_code(code)]
    numpy: Any = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None

    def restore() -> None:
        for current, before in attributes:
            current.clear()
            current.update(before)
        for table, before in tables:
            put_back(table, before)
        for item in held:
            item.restore()
        code.restore(values)
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)

    return restore


def _is_table(value: Any) -> bool:
    """One of a module's own tables: parameters, buffers, hooks."""
    return isinstance(value, (dict, set))
