"""fp16 values on their way from one of Dynamo's graphs to the next.

Between two graphs the model's Python holds, of each, an *outer* tensor: fp16, as under
``torch.autocast``, with a true gradient. Graphs take and yield *inner* ones, whose gradients are
scaled. The two share their memory, and what one graph yields the next one takes as it was: no
gradient that passes between graphs is ever true in fp16, where it might vanish.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mpgraph import ops
from mpgraph.errors import CaptureError
from mpgraph.structure import flatten, unflatten


@dataclasses.dataclass
class _Pair:
    """An outer tensor's inner one; the version is theirs, of when they were made."""

    inner: torch.Tensor
    version: int
    hooked: bool = False


class Crossings:
    """The fp16 values with gradients that are under way in one call."""

    takes_all = False  # whether graphs take inner tensors for values without gradients too

    def __init__(self, scale: Callable[[], torch.Tensor]) -> None:
        self._scale = scale  # asked for only where a gradient needs it
        self._pairs: Any = WeakTensorKeyDictionary()
        self._outer: Any = WeakTensorKeyDictionary()

    def inner(self, outer: torch.Tensor) -> torch.Tensor:
        """What a graph takes, for a tensor that Python gives it."""
        if not (torch.is_grad_enabled() and outer.requires_grad):
            return outer
        pair = self._pairs.get(outer)
        if pair is None or not self._is_current(outer):
            if pair is not None:
                self._refuse_torn(outer)
            return self._paired(outer, ops.enter(outer, self._scale(), writable=True)).inner
        return self._with_hooks(outer, pair)

    def _with_hooks(self, outer: torch.Tensor, pair: _Pair) -> torch.Tensor:
        if not pair.hooked and (hooks := _hooks(outer)):
            pair.inner, pair.hooked = ops.hooked(pair.inner, self._scale(), hooks), True
            self._outer[pair.inner] = weakref.ref(outer)
        return pair.inner

    def outer(self, inner: torch.Tensor) -> torch.Tensor:
        """What Python gets, for a tensor that a graph has yielded."""
        if not _crosses(inner):
            return inner
        known = self._outer.get(inner, lambda: None)()
        if known is not None and self._is_current(known):
            return known  # type: ignore[no-any-return]
        outer = ops.leave(inner, self._scale())
        self._paired(outer, inner)
        return outer

    def settle(self) -> None:
        """Before a graph that writes: of what Python has written to, the outer tensor holds."""
        for outer in self._written():
            self._refuse_torn(outer)
            del self._pairs[outer]

    def follow(self) -> None:
        """After a graph that writes to what it takes: outer tensors have a new history."""
        written = [(outer, self._pairs[outer]) for outer in self._written()]
        for outer, pair in written:
            for other, its in written:
                if _memory(other) == _memory(outer) and not _is_kin(its.inner, pair.inner):
                    raise _torn()
        for outer, pair in written:
            ops.follow(outer, pair.inner, self._scale())
            pair.version = outer._version

    def finish(self, result: Any, given: Callable[[], Iterable[Any]]) -> Any:
        """The result of the whole call: what leaves the model in fp16 leaves in fp32.

        What the caller has ``given`` stays as it is.
        """
        self.settle()
        leaves, spec = flatten(result)
        halves = {id(leaf): leaf for leaf in leaves if _is_half(leaf)}
        if halves:
            for leaf in given():
                halves.pop(id(leaf), None)
        if not halves:
            return result
        wide = {key: self._wide(leaf) for key, leaf in halves.items()}
        return unflatten(spec, [wide.get(id(leaf), leaf) for leaf in leaves])

    def _wide(self, value: torch.Tensor) -> torch.Tensor:
        if not _crosses(value):
            return value.float()
        return ops.widen(self.inner(value), torch.float32, self._scale())

    def _written(self) -> list[torch.Tensor]:
        return [outer for outer in list(self._pairs.keys()) if not self._is_current(outer)]

    def _is_current(self, outer: torch.Tensor) -> bool:
        pair = self._pairs.get(outer)
        return pair is not None and pair.version == outer._version

    def _paired(self, outer: torch.Tensor, inner: torch.Tensor) -> _Pair:
        pair = self._pairs[outer] = _Pair(inner, outer._version)
        self._outer[inner] = weakref.ref(outer)
        return pair

    def _refuse_torn(self, written: torch.Tensor) -> None:
        """Python has written to ``written``: nothing else may share its memory unknown to torch."""
        for other in list(self._pairs.keys()):
            if _memory(other) == _memory(written) and not _is_kin(other, written):
                raise _torn()


class WideCrossings(Crossings):
    """The same in a replay in fp32: the inner tensors are fp32, and gradients true throughout."""

    takes_all = True

    def __init__(self) -> None:
        super().__init__(lambda: torch.ones(()))

    def narrowed(self, inner: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The outer tensor of an fp32 value, in the dtype that Python expects."""
        outer = inner.to(dtype)
        self._paired(outer, inner)
        return outer

    def inner(self, outer: torch.Tensor) -> torch.Tensor:
        """What a graph takes: what Python itself has computed or written to is not widened."""
        is_paired = isinstance(outer, torch.Tensor) and self._is_current(outer)
        return self._with_hooks(outer, self._pairs[outer]) if is_paired else outer

    def outer(self, inner: torch.Tensor) -> torch.Tensor:
        """What Python gets: a graph's results have been narrowed already."""
        return inner

    def settle(self) -> None:
        """Nothing: see :meth:`inner`."""

    def follow(self) -> None:
        """After a graph that writes to what it takes: Python sees what was written."""
        for outer, pair in list(self._pairs.items()):
            if self._is_current(outer):
                outer.data.copy_(pair.inner)

    def _wide(self, value: torch.Tensor) -> torch.Tensor:
        return self.inner(value).float()


def _hooks(outer: Any) -> ops.Hooks:
    """The hooks of a tensor, as they will be in the backward pass."""
    keep: dict[int, Any] = {}
    if outer.retains_grad:
        keep[0] = functools.partial(_retain, weakref.ref(outer))
    return [hooks for hooks in (keep, outer._backward_hooks) if hooks]


def _retain(outer: Any, gradient: torch.Tensor) -> None:
    if (tensor := outer()) is not None:
        tensor.grad = gradient.detach().to(tensor.dtype)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.float16


def _crosses(value: Any) -> bool:
    return _is_half(value) and bool(value.requires_grad)


def _memory(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _is_kin(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether torch knows them for views of one tensor: a write to one then shows in the other."""
    return _root(one) is _root(other)


def _root(value: torch.Tensor) -> torch.Tensor:
    return value if value._base is None else value._base


def _torn() -> CaptureError:
    return CaptureError(
        "two fp16 tensors of this model share memory across a graph break, and one of them is "
        "written to in place, where the gradient of the other would be lost. Clone one of them "
        "before the write, or write out of place (x = x + y instead of x += y)."
    )
