"""Which ATen operators are taken apart before torch.onnx translates a graph."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


@functools.cache
def _registry() -> Any:
    from torch.onnx._internal.exporter import _registration

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    return _registration.ONNXRegistry.from_torchlib()


@functools.cache
def _table() -> dict[Any, Callable[..., Any]]:
    from torch.onnx._internal.exporter import _decomp

    known = set(_decomp.get_onnx_implemented_overloads(_registry()))
    table = dict(_decomp.create_onnx_friendly_decomposition_table(known))
    with contextlib.suppress(KeyError):
        for target in _TAKEN_APART:
            table[target] = torch._decomp.decomposition_table[target]
    return table


# torch.onnx has translations for these that are right for inference statistics alone.
_TAKEN_APART: tuple[Any, ...] = ()


def decompositions() -> dict[Any, Callable[..., Any]]:
    """torch.onnx's own table: what it has no translation for."""
    return dict(_table())


def has_translation(target: Any) -> bool:
    """Whether torch.onnx translates an operator, or has a decomposition for it."""
    return bool(_registry().is_registered(target)) or target in _table() or _is_check(target)


def _is_check(target: Any) -> bool:
    """Checks that yield nothing, which torch.onnx leaves out."""
    return "assert" in str(target) or "constrain_range" in str(target)
