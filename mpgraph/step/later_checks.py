"""Functions of torch that look at values only to refuse them: in a step, once it runs.

A trace has no values. torch's own code runs, with another answer to its question; what it would
have refused stops the step instead, as an assertion. An ONNX file makes no assertions.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class _Torch:
    """``torch``, whose ``any`` says no, and asserts it."""

    def __init__(self, asking: str) -> None:
        self.asking = asking

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def any(self, refused: torch.Tensor) -> bool:
        torch._assert_async(~torch.any(refused), f"{self.asking} refuses the values it was given")
        return False


def _checking_later(function: Any) -> Callable[..., Any]:
    names = {
        **function.__globals__,
        "torch": _Torch(function.__name__),
        "has_torch_function_variadic": lambda *_: False,  # a mode would run the function itself
    }
    defaults = function.__defaults__
    return types.FunctionType(function.__code__, names, function.__name__, defaults)


LATER: dict[Any, Callable[..., Any]] = {
    F.gaussian_nll_loss: _checking_later(F.gaussian_nll_loss),
}
"""By function: what to call instead in a trace."""
