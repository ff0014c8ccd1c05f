"""Nested values taken apart into tensors and a hashable description, and put together again.

``torch.utils._pytree`` refuses dataclasses and mappings that nobody registered, and its
descriptions compare slowly. A model's arguments and results need neither refusal, so mpgraph
has its own: whatever is a container is entered, whatever is a tensor is a leaf, and the rest is
part of the description.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mpgraph.plain import PLAIN

LEAF_TYPES = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
PLAIN_TYPES = (
    *PLAIN, type, range, torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a tensor stood."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """A value that is compared and kept: ``1``, ``True`` and ``1.0`` are three values.

    So are ``0.0`` and ``-0.0``, while ``nan`` is one: numbers are compared by their text.
    """

    type: type
    value: Any = dataclasses.field(compare=False)
    key: Any


class Opaque:
    """An object that mpgraph does not enter; equal only to itself."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclasses.dataclass(frozen=True)
class Node:
    """A container: how to build it again, the names of its parts, and the parts."""

    type: type
    context: Any
    names: tuple[str, ...]
    children: tuple[Spec, ...]
    build: Callable[[Any, list[Any]], Any] = dataclasses.field(compare=False, hash=False)


Spec = Leaf | Plain | Opaque | Node
_LEAF = Leaf()


def flatten(value: object) -> tuple[list[Any], Spec]:
    """Take ``value`` apart: its tensors (and symbolic sizes) in order, and the rest."""
    leaves: list[Any] = []
    return leaves, _flatten(value, leaves)


def unflatten(spec: Spec, leaves: Iterable[Any]) -> Any:
    """Put a value together again from its description and its tensors."""
    return _unflatten(spec, iter(leaves))


def same_leaves(leaves: Iterable[Any]) -> tuple[int, ...]:
    """For every leaf the position of the first one that is the same object; () if all differ."""
    first: dict[int, int] = {}
    positions = [first.setdefault(id(leaf), index) for index, leaf in enumerate(leaves)]
    return tuple(positions) if len(first) < len(positions) else ()


def named_parts(spec: Spec, prefix: str = "") -> Iterator[tuple[str, Spec]]:
    """Everything that is no container, with a name built from keys, field names and positions."""
    if isinstance(spec, Node):
        for name, child in zip(spec.names, spec.children, strict=True):
            yield from named_parts(child, f"{prefix}_{name}" if prefix else name)
    else:
        yield prefix, spec


def leaf_names(spec: Spec, prefix: str = "") -> Iterator[str]:
    """A readable name for every leaf."""
    return (name for name, part in named_parts(spec, prefix) if isinstance(part, Leaf))


def count_leaves(spec: Spec) -> int:
    """How many leaves a description has."""
    return sum(1 for _ in leaf_names(spec))


def opaque_values(spec: Spec) -> Iterator[object]:
    """Every object in the description that mpgraph could not enter."""
    if isinstance(spec, Opaque):
        yield spec.value
    elif isinstance(spec, Node):
        for child in spec.children:
            yield from opaque_values(child)


def _flatten(value: object, leaves: list[Any]) -> Spec:
    if isinstance(value, LEAF_TYPES):
        leaves.append(value)
        return _LEAF
    if isinstance(value, PLAIN_TYPES):
        return plain(value)
    parts = _take_apart(value)
    if parts is None:
        return Opaque(value)
    context, names, children, build = parts
    specs = tuple(_flatten(child, leaves) for child in children)
    return Node(type(value), context, names, specs, build)


def plain(value: Any) -> Plain:
    """The description of a value that is no container and no tensor."""
    return Plain(type(value), value, repr(value) if isinstance(value, (float, complex)) else value)


def _unflatten(spec: Spec, leaves: Iterator[Any]) -> Any:
    if isinstance(spec, Leaf):
        return next(leaves)
    if isinstance(spec, Node):
        return spec.build(spec.context, [_unflatten(child, leaves) for child in spec.children])
    return spec.value


_Parts = tuple[Any, tuple[str, ...], Iterable[Any], Callable[[Any, list[Any]], Any]]


def _take_apart(value: Any) -> _Parts | None:
    kind = type(value)
    if kind is tuple or kind is list or kind is torch.Size:
        return None, _positions(value), value, lambda _, parts, kind=kind: kind(parts)
    if kind in (dict, collections.OrderedDict):
        return tuple(value), _keys(value), value.values(), _build_mapping(kind)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return None, value._fields, value, lambda _, parts, kind=kind: kind(*parts)
    if kind in pytree.SUPPORTED_NODES:
        return _take_apart_registered(value)
    if dataclasses.is_dataclass(value):
        return _take_apart_dataclass(value)
    return _take_apart_object(value)


def _positions(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(index) for index, _ in enumerate(values))


def _keys(value: Mapping[Any, Any]) -> tuple[str, ...]:
    return tuple(str(key) for key in value)


def _build_mapping(kind: type) -> Callable[[Any, list[Any]], Any]:
    return lambda keys, parts: kind(zip(keys, parts, strict=True))


def _take_apart_registered(value: Any) -> _Parts:
    node = pytree.SUPPORTED_NODES[type(value)]
    children, context = node.flatten_fn(value)

    def build(wrapped: Any, parts: list[Any]) -> Any:
        return node.unflatten_fn(parts, wrapped.value)

    # What Hugging Face's models return is a mapping, too.
    is_mapping = isinstance(value, Mapping) and len(value) == len(children)
    names = _keys(value) if is_mapping else _positions(children)
    return _Context(context), names, children, build


def _take_apart_dataclass(value: Any) -> _Parts:
    names = tuple(field.name for field in dataclasses.fields(value))

    def build(_: Any, parts: list[Any]) -> Any:
        # Not through __init__, which may check, convert or have side effects.
        made = object.__new__(type(value))
        for name, part in zip(names, parts, strict=True):
            object.__setattr__(made, name, part)
        return made

    return None, names, [getattr(value, name) for name in names], build


_CLOSED = (nn.Module, types.ModuleType, types.FunctionType, types.MethodType, type)


def _take_apart_object(value: Any) -> _Parts | None:
    """A plain object that holds tensors somewhere, such as a key-value cache."""
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(value, _CLOSED):
        return None
    if not _holds_tensors(value, set()):
        return None
    names = tuple(attributes)

    def build(_: Any, parts: list[Any]) -> Any:
        made = object.__new__(type(value))
        vars(made).update(zip(names, parts, strict=True))
        return made

    return names, names, list(attributes.values()), build


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    if isinstance(value, LEAF_TYPES):
        return True
    if id(value) in seen or isinstance(value, (*PLAIN_TYPES, *_CLOSED)):
        return False
    seen.add(id(value))
    if isinstance(value, dict):
        return any(_holds_tensors(item, seen) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item, seen) for item in value)
    attributes = getattr(value, "__dict__", None)
    return isinstance(attributes, dict) and _holds_tensors(attributes, seen)


class _Context:
    """A pytree context, which need not be hashable: compared by value, hashed by its text."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))
