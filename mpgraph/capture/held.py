"""The Python state that hangs on a model's modules: lists, dicts, sets and plain objects."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mpgraph.code_state import CodeState

# How far into plain objects one looks: a config, and the configs inside it; a cache of caches.
_DEPTH_OF_MODULES = 2
_DEPTH_OF_ARGUMENTS = 6
_MODULE_STATE = frozenset(vars(nn.Module())) | {"_mpgraph"}
_CLOSED = (
    nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType,
)  # fmt: skip


@dataclasses.dataclass
class Held:
    """One container, or the attributes of one object, as they were at one moment."""

    path: str
    container: Any
    before: Any

    def has_changed(self) -> bool:
        """Whether it holds something else now. Equal plain values are the same."""
        if isinstance(self.container, set):
            return bool(self.container != self.before)
        if len(self.container) != len(self.before):
            return True
        if isinstance(self.container, list):
            pairs = list(zip(self.container, self.before, strict=True))
        else:
            if self.container.keys() != self.before.keys():
                return True
            pairs = [(self.container[key], value) for key, value in self.before.items()]
        return any(now is not then and not _is_equal_plain(now, then) for now, then in pairs)

    def has_other_plain_values(self) -> bool:
        """Whether all that has changed is plain values under the same keys."""
        if not isinstance(self.container, dict) or self.container.keys() != self.before.keys():
            return False
        changed = [
            (self.container[key], then)
            for key, then in self.before.items()
            if self.container[key] is not then and not _is_equal_plain(self.container[key], then)
        ]
        return bool(changed) and all(isinstance(v, _PLAIN) for pair in changed for v in pair)

    def restore(self) -> None:
        """Put back what it held."""
        if isinstance(self.container, list):
            self.container[:] = self.before
        else:
            self.container.clear()
            self.container.update(self.before)


_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def _is_equal_plain(now: Any, then: Any) -> bool:
    return isinstance(now, _PLAIN) and type(now) is type(then) and bool(now == then)


def held_by(model: nn.Module) -> list[Held]:
    """Everything that the modules hold, but not the modules' own tables."""
    attributes = (
        (f"{path}.{name}".lstrip("."), value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _MODULE_STATE
    )
    return _held_in(attributes, _DEPTH_OF_MODULES)


def held_by_code(code: CodeState) -> list[Held]:
    """The containers among globals, class attributes and default arguments."""
    return _held_in(code.containers, 0)


def held_in(values: Iterable[object]) -> list[Held]:
    """What the caller's arguments hold: they themselves, and what is inside them."""
    return _held_in((("", value) for value in values), _DEPTH_OF_ARGUMENTS)


def _held_in(values: Iterable[tuple[str, Any]], limit: int) -> list[Held]:
    found: list[Held] = []
    seen: set[int] = set()
    waiting = [(path, value, 0) for path, value in values]
    while waiting:
        path, value, depth = waiting.pop()
        container = _opened(value, depth < limit)
        if container is None or id(container) in seen:
            continue
        seen.add(id(container))
        if not isinstance(container, tuple):
            found.append(Held(path, container, container.copy()))
        inner = depth + (container is not value)
        waiting.extend((f"{path}{name}", item, inner) for name, item in _items(value, container))
    return found


def _opened(value: Any, enter_objects: bool) -> Any:
    if isinstance(value, (list, dict, set, tuple)):
        return value
    if isinstance(value, _CLOSED) or not enter_objects:
        return None
    table = getattr(value, "__dict__", None)
    return table if isinstance(table, dict) else None


def _items(value: Any, container: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(container, dict):
        for key, item in list(container.items()):
            yield f".{key}" if container is not value else f"[{key!r}]", item
    else:
        for index, item in enumerate(container):
            yield f"[{index}]", item
