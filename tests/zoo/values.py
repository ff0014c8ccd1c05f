"""Walk over whatever a model returns: containers, model outputs, caches, distributions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_NAMED = (torch.dtype, torch.device, torch.layout, torch.Size)


def leaves(value: Any, path: str = "", _open: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every tensor and plain value, and each container's class name.

    Objects that are no container are walked by their attributes; modules and functions in them,
    and an object inside itself, are passed over.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, np.ndarray | np.generic):
        yield path, torch.as_tensor(np.asarray(value))
    elif isinstance(value, _PLAIN):
        yield path, value
    elif isinstance(value, _NAMED):
        yield path, str(value)
    elif not (isinstance(value, nn.Module | type) or callable(value) or id(value) in _open):
        yield f"{path}<class>", type(value).__qualname__
        for key, child in _children(value):
            yield from leaves(child, f"{path}{key}", (*_open, id(value)))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f".{key}", child) for key, child in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{key}", getattr(value, key)) for key in value._fields)
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", child) for i, child in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from ((f"[{i}]", child) for i, child in enumerate(sorted(value, key=repr)))
    elif dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        yield from ((f".{name}", getattr(value, name)) for name in names)
    else:
        yield from ((f".{key}", child) for key, child in getattr(value, "__dict__", {}).items())


def tensors(value: Any) -> list[Tensor]:
    """Return the distinct tensors in a value, in the order they are met."""
    found = {id(leaf): leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)}
    return list(found.values())


def float_tensors(value: Any) -> list[Tensor]:
    """Return the distinct real floating-point tensors in a value."""
    return [t for t in tensors(value) if t.is_floating_point()]
