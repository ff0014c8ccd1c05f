"""What ``forward`` takes out of a tensor into Python while it is exported: a graph would freeze it.

Of arguments, parameters and buffers there is nothing to take while they are traced, as torch.export
itself says. A tensor in a plain attribute, a list or a global is real.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from mpgraph.capture.detect import NeedsDynamo, user_line
from mpgraph.capture.replaced import replaced
from mpgraph.places import is_users

_TAKING = (
    "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__",
    "__index__", "__contains__",
)  # fmt: skip


@contextlib.contextmanager
def taken_values_refused() -> Iterator[None]:
    """Raise :class:`NeedsDynamo` where the block takes a number out of a real tensor."""
    with contextlib.ExitStack() as stack:
        for name in _TAKING:
            refusing = _refusing(getattr(torch.Tensor, name))
            stack.enter_context(replaced(torch.Tensor, name, refusing))
        yield


def _refusing(take: Callable[..., Any]) -> Callable[..., Any]:
    capturing = threading.get_ident()

    def refuse(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_real = not isinstance(tensor, FakeTensor) and threading.get_ident() == capturing
        if is_real and is_users(sys._getframe(1).f_code.co_filename):
            raise NeedsDynamo("forward reads the value of a tensor", user_line())
        return take(tensor, *args, **kwargs)

    return refuse
