"""What torch.export would lose without a word, noticed while it traces.

Non-strict export runs the model's Python on fake tensors. Anything that acts on autograd rather
than on values leaves no node behind: a custom ``autograd.Function`` loses its backward, a tensor
hook is never called again, reentrant checkpointing detaches. The same goes for Python state: a
counter is frozen, a random number becomes a constant. Each of these raises
:class:`NeedsDynamo` here, so that the other engine carries the model, or the user is told.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction

from mpgraph.places import is_users


class NeedsDynamo(BaseException):
    """Export cannot carry this model faithfully; says why and where.

    Not an ``Exception``: models catch those.
    """

    def __init__(self, reason: str, where: str = "") -> None:
        self.reason = reason
        self.where = where
        super().__init__(f"{reason} ({where})" if where else reason)


def user_line() -> str:
    """The innermost frame of the call stack that is neither torch's nor mpgraph's."""
    for frame in reversed(traceback.extract_stack()):
        if is_users(frame.filename):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return ""


_HOOKED: tuple[tuple[Any, str, str], ...] = (
    (torch.Tensor, "register_hook", "a tensor hook"),
    (torch.Tensor, "register_post_accumulate_grad_hook", "a gradient hook"),
    (torch.Tensor, "retain_grad", "retain_grad() on an intermediate value"),
    (torch.Tensor, "backward", "a backward pass inside forward"),
    (torch.autograd, "grad", "torch.autograd.grad inside forward"),
    (torch.autograd, "backward", "a backward pass inside forward"),
)


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Raise :class:`NeedsDynamo` for what tracing would drop, while the block runs."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_watch_functions())
        for owner, name, what in _HOOKED:
            stack.enter_context(_replaced(owner, name, _refusal(what, getattr(owner, name))))
        stack.enter_context(_watch_random())
        yield


def _refusal(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
    capturing = threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != capturing:
            return original(*args, **kwargs)
        raise NeedsDynamo(f"{what} leaves no trace in an exported graph", user_line())

    return refuse


@contextlib.contextmanager
def _watch_functions() -> Iterator[None]:
    # Function.apply ends in super().apply, which this class is the first to answer; patching
    # Function.apply itself would miss every `f = MyFunction.apply` taken earlier.
    capturing = threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != capturing or cls.__module__.startswith("torch._library"):
            # Another thread's business, or the derivative of a registered custom operator: the
            # graph holds the operator.
            return super(_SingleLevelFunction, cls).apply(*args, **kwargs)  # type: ignore[misc]
        raise NeedsDynamo(
            f"the backward of the custom autograd.Function {cls.__name__!r} would be lost",
            user_line(),
        )

    with _replaced(_SingleLevelFunction, "apply", classmethod(apply)):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    inherited = name not in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def _watch_random() -> Iterator[None]:
    """Python's and numpy's random numbers would become constants of the graph."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    yield
    if random.getstate() != python_state:
        random.setstate(python_state)
        raise NeedsDynamo("forward draws numbers from Python's random module")
    if numpy and _position(numpy.random.get_state()) != _position(numpy_state):
        numpy.random.set_state(numpy_state)
        raise NeedsDynamo("forward draws numbers from numpy.random")


def _position(state: Any) -> tuple[Any, ...]:
    _, key, *rest = state
    return key.tobytes(), *rest
