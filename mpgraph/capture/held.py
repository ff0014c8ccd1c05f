"""The Python state that hangs on a model's modules: lists, dicts, sets and plain objects."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mpgraph.code_state import CodeState
from mpgraph.frozen import (
    MISSING,
    attribute_names,
    has_attributes,
    is_all_in_table,
    parts,
    stored,
    table_of,
)
from mpgraph.plain import MODULE_STATE, PLAIN, global_hooks

# How far into plain objects one looks: a config, and the configs inside it; a cache of caches.
_DEPTH_OF_MODULES = 2
_DEPTH_OF_ARGUMENTS = 6
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
        now = snapshot(self.container)
        if isinstance(now, set):
            return bool(now != self.before)
        if isinstance(now, dict):
            if now.keys() != self.before.keys():
                return True
            pairs = [(now[key], then) for key, then in self.before.items()]
        else:
            if len(now) != len(self.before):
                return True
            pairs = list(zip(now, self.before, strict=True))
        return any(value is not then and not _is_equal_plain(value, then) for value, then in pairs)

    def has_other_plain_values(self) -> bool:
        """Whether all that has changed is plain values under the same keys."""
        now = snapshot(self.container)
        if not isinstance(now, dict) or now.keys() != self.before.keys():
            return False
        pairs = [(now[key], then) for key, then in self.before.items()]
        changed = [(v, then) for v, then in pairs if v is not then and not _is_equal_plain(v, then)]
        return bool(changed) and all(isinstance(v, PLAIN) for pair in changed for v in pair)

    def restore(self) -> None:
        """Put back what it held, if it holds something else."""
        put_back(self.container, self.before)


def snapshot(container: Any) -> Any:
    """A plain copy of a list, deque, dict or set, or of what an object has in slots.

    Of a subclass no method is called: transformers' ``ACT2FN`` makes a module of every value that
    is looked up.
    """
    if isinstance(container, dict):
        return dict(parts(container))
    if isinstance(container, set):
        return set(set.__iter__(container))
    if isinstance(container, (list, collections.deque)):
        return [item for _, item in parts(container)]
    return {name: stored(container, name) for name in attribute_names(container)}


def put_back(container: Any, before: Any) -> None:
    """Let a container hold what its snapshot holds; one that does so already is not touched."""
    if _is_same(snapshot(container), before):
        return
    if isinstance(container, dict):
        base = collections.OrderedDict if isinstance(container, collections.OrderedDict) else dict
        base.clear(container)
        for key, value in before.items():
            base.__setitem__(container, key, value)
    elif isinstance(container, set):
        set.clear(container)
        set.update(container, before)
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), before)
    elif isinstance(container, collections.deque):
        collections.deque.clear(container)
        collections.deque.extend(container, before)
    else:
        for name, value in before.items():
            if value is not MISSING:
                object.__setattr__(container, name, value)
            elif stored(container, name) is not MISSING:
                object.__delattr__(container, name)


def _is_same(now: Any, before: Any) -> bool:
    if isinstance(now, set):
        return bool(now == before)
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        pairs = zip(now.items(), before.items(), strict=True)
        return all(a == b and v is w for (a, v), (b, w) in pairs)
    return all(v is w for v, w in zip(now, before, strict=True))


def _is_equal_plain(now: Any, then: Any) -> bool:
    return isinstance(now, PLAIN) and type(now) is type(then) and bool(now == then)


def held_by(model: nn.Module) -> list[Held]:
    """Everything that the modules hold, but not the modules' own tables."""
    attributes = (
        (f"{path}.{name}".lstrip("."), value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in MODULE_STATE
    )
    return _held_in(attributes, _DEPTH_OF_MODULES)


def held_by_code(code: CodeState) -> list[Held]:
    """The containers among globals, class attributes and default arguments."""
    return _held_in(code.containers, 0)


def held_in(values: Iterable[object]) -> list[Held]:
    """What the caller's arguments hold: they themselves, and what is inside them."""
    return _held_in((("", value) for value in values), _DEPTH_OF_ARGUMENTS)


def held_at(path: str, value: Any) -> Iterator[Held]:
    """What may change in one value: its items if it is a container, and its attributes."""
    if isinstance(value, (list, dict, set, collections.deque)):
        yield Held(path, value, snapshot(value))
    if has_attributes(value):
        container = table_of(value) if is_all_in_table(value) else value
        yield Held(path, container, snapshot(container))


def held_in_places(places: Iterable[tuple[str, object]]) -> list[Held]:
    """What stands in places with a name, and what is inside it."""
    return _held_in(places, _DEPTH_OF_MODULES)


def held_by_global_hooks() -> list[Held]:
    """What the objects hold whose methods are hooks on every module, as a FLOP counter's."""
    owners = [getattr(hook, "__self__", None) for hook in global_hooks()]
    return _held_in((("", owner) for owner in owners), _DEPTH_OF_MODULES)


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
            found.append(Held(path, container, snapshot(container)))
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
        for key, item in snapshot(container).items():
            yield f".{key}" if container is not value else f"[{key!r}]", item
    else:
        for index, item in enumerate(container):
            yield f"[{index}]", item
