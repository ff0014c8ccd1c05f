"""Modules that were compiled by their ``compile()`` method, called as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from mpgraph.capture.replaced import replaced


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module runs what ``module.compile()`` has made of it."""
    return getattr(module, "_compiled_call_impl", None) is not None


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Call the module and its parts themselves."""
    with contextlib.ExitStack() as stack:
        for module in filter(is_compiled, model.modules()):
            stack.enter_context(replaced(module, "_compiled_call_impl", None))
        yield
