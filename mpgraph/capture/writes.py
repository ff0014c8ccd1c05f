"""What is written to tensors while a block runs, to be taken back.

Tracing writes too: torch.export runs an operator for real that writes to a tensor which is no
parameter, buffer or input, such as a plain attribute or an item of a list.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mpgraph.capture.replaced import replaced


@contextlib.contextmanager
def writes_taken_back() -> Iterator[None]:
    """Leave every tensor that a trace writes to as it was before the block."""
    writes, tracing = Writes(), threading.get_ident()
    dispatch = FakeTensorMode._dispatch_impl

    def noting(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() == tracing:
            writes.note(func, args, kwargs)
        return dispatch(mode, func, types, args, kwargs)

    # No mode of our own around the trace: higher-order operators would go another way.
    try:
        with replaced(FakeTensorMode, "_dispatch_impl", noting):
            yield
    finally:
        writes.restore()


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies every tensor from before the block when an operator first writes to its memory."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: set[int] = set()  # memory that was made in the block, or has been copied
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at what the operator writes and makes, and run it."""
        kwargs = kwargs or {}
        given = {*_memories((args, kwargs))}
        self.note(func, args, kwargs)
        result = func(*args, **kwargs)
        self._known.update(memory for memory in _memories(result) if memory not in given)
        return result

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy what an operator is about to write to."""
        schema = getattr(func, "_schema", None)  # a higher-order operator has none
        if schema is not None and schema.is_mutable:
            for argument, value in zip(schema.arguments, args, strict=False):
                self._save(argument, value)
            for argument in schema.arguments:
                self._save(argument, kwargs.get(argument.name))

    def _save(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in pytree.tree_leaves(value):
            for memory in _memories(tensor):
                if memory not in self._known:
                    self._known.add(memory)
                    with _disable_current_modes():
                        whole = tensor.new_empty(0).set_(tensor.untyped_storage())
                        self._saved.append((whole, whole.clone()))

    def restore(self) -> None:
        """Put back what was written over."""
        with torch.no_grad():
            for whole, value in self._saved:
                whole.copy_(value)


def _memories(values: Any) -> Iterator[int]:
    for value in pytree.tree_leaves(values):
        # Meta tensors are the inside of fake ones.
        is_real = isinstance(value, torch.Tensor) and not value.is_meta
        is_plain = is_real and not isinstance(value, FakeTensor)
        if is_plain and value.layout is torch.strided:
            yield value.untyped_storage()._cdata
