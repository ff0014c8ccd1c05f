"""Undo what an attempt to capture or to run a call has left on a model."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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
        self._trained = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
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


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies every tensor from before the block when an operator first writes to its memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: set[int] = set()  # memory that was made in the block, or has been copied
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at what the operator writes and makes, and run it."""
        given = {*_memories((args, kwargs))}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._save(argument, value)
        for argument in func._schema.arguments:
            self._save(argument, (kwargs or {}).get(argument.name))
        result = func(*args, **(kwargs or {}))
        self._known.update(memory for memory in _memories(result) if memory not in given)
        return result

    def _save(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in pytree.tree_leaves(value):
            for memory in _memories(tensor):
                if memory not in self._known:
                    self._known.add(memory)
                    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
                    self._saved.append((whole, whole.clone()))

    def restore(self) -> None:
        """Put back what was written over."""
        for whole, value in self._saved:
            whole.copy_(value)


def _memories(values: Any) -> Iterator[int]:
    for value in pytree.tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            yield value.untyped_storage()._cdata


def _is_table(value: Any) -> bool:
    """One of a module's own tables: parameters, buffers, hooks."""
    return isinstance(value, (dict, set))
