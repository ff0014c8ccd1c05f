"""Undo what an attempt to capture or to run a call has left on a model."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mpgraph.capture.held import (
    held_by,
    held_by_code,
    held_by_global_hooks,
    held_in,
    put_back,
    snapshot,
)
from mpgraph.capture.writes import Writes
from mpgraph.code_state import CodeState


@contextlib.contextmanager
def undone_on_failure(model: nn.Module, arguments: Iterable[Any] = ()) -> Iterator[None]:
    """If the block fails, put attributes, containers and random states back as they were.

    So too what ``arguments`` hold: objects that the caller passes in, such as an empty cache.

    A forward that is traced half and then fails has already counted its counters, appended to
    its lists and assigned traced tensors to its buffers; the engine that tries next runs it
    from the start.
    """
    before = Before(model, arguments)
    try:
        yield
    except BaseException:
        before.restore()
        raise


class Before:
    """A model's Python state at one moment, and Python's and numpy's random numbers."""

    def __init__(self, model: nn.Module, arguments: Iterable[Any]) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
        self._tables = [
            (table, snapshot(table))
            for own, _ in self._attributes
            for table in own.values()
            if _is_table(table)
        ]
        self._code = CodeState(list(model.modules()))
        self._values = self._code.values()
        self._held = [*held_by(model), *held_in(arguments), *held_by_code(self._code)]
        self._held += held_by_global_hooks()
        self._numpy: Any = sys.modules.get("numpy")
        self._state = random.getstate()
        self._numpy_state = self._numpy.random.get_state() if self._numpy else None

    def restore(self) -> None:
        """Put all of it back."""
        for current, before in self._attributes:
            current.clear()
            current.update(before)
        for table, before in self._tables:
            put_back(table, before)
        for item in self._held:
            item.restore()
        self._code.restore(self._values)
        random.setstate(self._state)
        if self._numpy:
            self._numpy.random.set_state(self._numpy_state)


class BeforeRun(Before):
    """The same, and what running changes besides: tensors, and torch's random numbers.

    Buffers are copied at once, because batch norm writes to them unseen; other tensors when they
    are first written to, inside ``with before.writes:``.
    """

    def __init__(self, model: nn.Module, arguments: Iterable[Any]) -> None:
        super().__init__(model, arguments)
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._random = [(device, torch.cuda.get_rng_state(device)) for device in devices]
        self._random_cpu = torch.get_rng_state()
        # torch.func.functional_call puts tensors that are no leaves in the places of parameters.
        leaves = (p for p in model.parameters() if p.is_leaf)
        self._trained = [(p, p.data, p.grad, p.requires_grad) for p in leaves]
        self.writes = Writes()

    def restore(self) -> None:
        """Put all of it back."""
        super().restore()
        with torch.no_grad():
            # Whatever their versions say: batch norm writes its statistics past them.
            for buffer, value in self._buffers:
                buffer.copy_(value)
        self.writes.restore()
        for parameter, data, grad, requires_grad in self._trained:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
        torch.set_rng_state(self._random_cpu)
        for device, state in self._random:
            torch.cuda.set_rng_state(state, device)


def _is_table(value: Any) -> bool:
    """One of a module's own tables: parameters, buffers, hooks."""
    return isinstance(value, (dict, set))
