"""A trace is of one thread: torch.fx watches module calls of the whole process meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.nn import Module

from mpgraph.capture.replaced import replaced


@contextlib.contextmanager
def other_threads_untraced() -> Iterator[None]:
    """Let modules that other threads call be themselves, and stay out of the trace's record."""
    tracing = threading.get_ident()
    owner: Any = _ModuleStackTracer
    call_traced, read_traced = owner.call_module, owner.getattr

    def call_module(
        tracer: Any, module: Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if threading.get_ident() != tracing:
            return forward(*args, **kwargs)
        return call_traced(tracer, module, forward, args, kwargs)

    def getattr_(tracer: Any, name: str, value: Any, cache: Any) -> Any:
        if threading.get_ident() != tracing:
            return value
        return read_traced(tracer, name, value, cache)

    with replaced(owner, "call_module", call_module), replaced(owner, "getattr", getattr_):
        yield
