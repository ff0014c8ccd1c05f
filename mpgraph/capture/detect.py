"""What torch.export would lose without a word, noticed while it traces.

Non-strict export runs the model's Python on fake tensors. Anything that acts on autograd rather
than on values leaves no node behind: a custom ``autograd.Function`` loses its backward, a tensor
hook is never called again, reentrant checkpointing detaches. The same goes for Python state: a
counter is frozen, a random number becomes a constant, a seed is set once and never again. Each of
these raises
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
from torch._dynamo import eval_frame
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as checkpoints
from torch.utils._python_dispatch import TorchDispatchMode

from mpgraph.capture.replaced import replaced
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
)
# Calls that compute gradients inside of forward.
_COMPUTING: tuple[tuple[Any, str, str], ...] = (
    (torch.Tensor, "backward", "a backward pass inside forward"),
    (torch.autograd, "grad", "torch.autograd.grad inside forward"),
    (torch.autograd, "backward", "a backward pass inside forward"),
)


@contextlib.contextmanager
def watch(*, forward_only: bool = False) -> Iterator[None]:
    """Raise :class:`NeedsDynamo` for what tracing would drop, while the block runs.

    With ``forward_only``, not for what acts on gradients alone: there will be none.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, what in _COMPUTING if forward_only else (*_HOOKED, *_COMPUTING):
            stack.enter_context(replaced(owner, name, _refusal(what, getattr(owner, name))))
        for script in (torch._C.ScriptFunction, torch._C.ScriptMethod):
            what = "what TorchScript casts and optimises by itself"
            stack.enter_context(replaced(script, "__call__", _refusal(what, script.__call__)))
        if not forward_only:
            stack.enter_context(_watch_functions())
            stack.enter_context(_watch_nodes())
            stack.enter_context(_watch_saved_tensors())
            stack.enter_context(_watch_checkpoints())
        stack.enter_context(_watch_dispatch_modes())
        stack.enter_context(_watch_random())
        stack.enter_context(_watch_generator())
        yield


_BACKWARD: tuple[tuple[Any, str, str], ...] = (
    (torch.autograd, "backward", "a backward pass inside the loss function"),
    (torch.Tensor, "retain_grad", "retain_grad() on an intermediate value"),
)


@contextlib.contextmanager
def watch_step() -> Iterator[None]:
    """The same for a loss function, which is traced along with its backward pass.

    Custom Functions, hooks on values and ``torch.autograd.grad`` are traced as they are.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, what in _BACKWARD:
            refusal = _refusal(what, getattr(owner, name), "a captured step")
            stack.enter_context(replaced(owner, name, refusal))
        stack.enter_context(_watch_dispatch_modes())
        stack.enter_context(_watch_checkpoints())
        stack.enter_context(_watch_random())
        stack.enter_context(_watch_generator())
        yield


@contextlib.contextmanager
def _watch_nodes() -> Iterator[None]:
    """Hooks on the nodes of autograd's own graph (``y.grad_fn.register_hook``) would be lost.

    Their classes are closed, so what is noticed is that the model's code reads ``grad_fn``.
    """
    capturing = threading.get_ident()
    base: Any = torch._C.TensorBase
    read = base.grad_fn.__get__

    def grad_fn(tensor: torch.Tensor) -> Any:
        reader = sys._getframe(1).f_code.co_filename
        if threading.get_ident() == capturing and is_users(reader):
            raise NeedsDynamo("what forward does with grad_fn leaves no trace", user_line())
        return read(tensor)

    with replaced(torch.Tensor, "grad_fn", property(grad_fn)):
        yield


def _refusal(
    what: str, original: Callable[..., Any], where: str = "an exported graph"
) -> Callable[..., Any]:
    capturing = threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != capturing:
            return original(*args, **kwargs)
        raise NeedsDynamo(f"{what} leaves no trace in {where}", user_line())

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

    with replaced(_SingleLevelFunction, "apply", classmethod(apply)):
        yield


@contextlib.contextmanager
def _watch_saved_tensors() -> Iterator[None]:
    capturing, enter = threading.get_ident(), saved_tensors_hooks.__enter__

    def refuse(self: saved_tensors_hooks) -> None:
        # A checkpoint's own hooks decide what is kept, not what comes out.
        own = type(self).__module__ == checkpoints.__name__
        if own or threading.get_ident() != capturing:
            return enter(self)
        raise NeedsDynamo(
            f"{type(self).__name__} acts on saved tensors, which an exported graph does not know",
            user_line(),
        )

    with replaced(saved_tensors_hooks, "__enter__", refuse):
        yield


@contextlib.contextmanager
def _watch_dispatch_modes() -> Iterator[None]:
    """A mode of the user's own that is entered in forward acts below what is traced."""
    capturing = threading.get_ident()
    enter: Any = TorchDispatchMode.__enter__

    def refuse(self: TorchDispatchMode) -> Any:
        own = type(self).__module__.startswith(("torch.", "mpgraph."))
        if own or threading.get_ident() != capturing:
            return enter(self)
        raise NeedsDynamo(f"the dispatch mode {type(self).__name__} is not traced", user_line())

    with replaced(TorchDispatchMode, "__enter__", refuse):
        yield


@contextlib.contextmanager
def _watch_checkpoints() -> Iterator[None]:
    """A graph would keep what a checkpoint throws away and computes again."""
    name = "_checkpoint_without_reentrant_generator"
    capturing, original = threading.get_ident(), getattr(checkpoints, name, None)

    def generator(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == capturing:
            raise NeedsDynamo("a checkpoint, whose memory a graph would not save", user_line())
        return original(*args, **kwargs)  # type: ignore[misc]

    with replaced(checkpoints, name, generator) if original else contextlib.nullcontext():
        yield


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


class _WatchedGenerator:
    """Stands in for torch's default generator, which forward must not seed or set back."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        # Reading the state is harmless, and checkpoints do; Dynamo sets it back as it was.
        is_change = name in ("manual_seed", "seed", "initial_seed", "set_state")
        if is_change and threading.get_ident() == self._thread and is_users(_caller()):
            raise NeedsDynamo("forward seeds or sets torch's random numbers", user_line())
        return getattr(self._generator, name)


def _caller() -> str:
    """The file of whatever called a function of torch.random, or left its context manager."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    return frame.f_code.co_filename


_BETWEEN = frozenset(
    {
        torch.random.__file__, contextlib.__file__,
        # torch.manual_seed is hidden from Dynamo
        torch._compile.__file__, eval_frame.__file__,
    }
)  # fmt: skip


@contextlib.contextmanager
def _watch_generator() -> Iterator[None]:
    watched = _WatchedGenerator(torch.default_generator)
    with (
        replaced(torch, "default_generator", watched),
        replaced(torch.random, "default_generator", watched),
    ):
        yield


def _position(state: Any) -> tuple[Any, ...]:
    _, key, *rest = state
    return key.tobytes(), *rest
