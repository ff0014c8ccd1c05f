"""What the source of a model's classes reads besides its instances: class attributes, globals.

A flag on the class (``Block.fast = False``), a constant of the file and a default argument that is
a list are part of a graph like any attribute: written into it when it is captured.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from mpgraph.frozen import Globals, cells, has_attributes, is_namespace
from mpgraph.plain import FORWARD_HOOKS, GLOBAL_HOOKS, PLAIN

_CONTAINERS = (list, dict, set)
_WRAPPERS = {
    classmethod: "__func__", staticmethod: "__func__", property: "fget",
    functools.cached_property: "func",
}  # fmt: skip


class CodeState:
    """The places outside of the instances that the classes' own functions name."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.classes = list(
            dict.fromkeys(c for m in modules for c in type(m).__mro__ if _is_own(c))
        )
        self.tables = [vars(c) for c in self.classes]
        functions = [*_hooks(modules), *(f for c in self.classes for f in _functions(c))]
        names = {name for f in functions for name in names_in(f.__code__)}
        # A table and a name in it; for a class, the class to set it on.
        self.places: list[tuple[Any, str, type | None]] = []
        self.containers: list[tuple[str, Any]] = []
        # Objects in such places, which are listened to: a path, the owner, and the name in it.
        self.objects: list[tuple[str, Any, str]] = []
        self._seen: set[tuple[int, str]] = set()
        for owner, table in zip(self.classes, self.tables, strict=True):
            self._take(table, owner, names, f"{owner.__name__}.")
            if isinstance(table.get("forward"), types.FunctionType):
                self.places.append((table, "forward", owner))
        for function in functions:
            self._take(function.__globals__, None, set(names_in(function.__code__)), "")
            defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            where = f"a default argument of {function.__qualname__}"
            self.containers += [(where, v) for v in defaults if isinstance(v, _CONTAINERS)]
            self.containers += list(_enclosed(function))

    def _take(self, table: Any, owner: type | None, names: set[str], prefix: str) -> None:
        for name in sorted(names & table.keys()):
            value = table[name]
            place = id(table if owner is None else owner), name
            if name.startswith("__") or place in self._seen:
                continue
            self._seen.add(place)
            if isinstance(value, PLAIN):
                self.places.append((table, name, owner))
            elif isinstance(value, _CONTAINERS):
                self.containers.append((prefix + name, value))
            elif isinstance(value, (type, types.ModuleType)) and is_namespace(value):
                inner = value if isinstance(value, type) else None
                self._take(vars(value), inner, names, f"{prefix}{name}.")
            elif is_namespace(type(value)) and has_attributes(value):
                self.objects.append((prefix.rstrip("."), owner or Globals(table), name))

    def values(self) -> list[Any]:
        """What stands in every place now."""
        return [table.get(name) for table, name, _ in self.places]

    def changed_since(self, before: list[Any]) -> Iterator[str]:
        """The names of the places that hold something else than before."""
        for (_, name, owner), then, now in zip(self.places, before, self.values(), strict=True):
            if now is not then and (type(now) is not type(then) or now != then):
                yield f"{owner.__name__}.{name}" if owner else name

    def restore(self, before: list[Any]) -> None:
        """Put back what stood in every place."""
        for (table, name, owner), then in zip(self.places, before, strict=True):
            if table.get(name) is not then:
                if owner is not None:
                    setattr(owner, name, then)
                else:
                    table[name] = then


def _hooks(modules: list[nn.Module]) -> Iterator[types.FunctionType]:
    """The functions that are hooked into the modules, and so a part of their forward."""
    tables = [vars(m)[name] for m in modules for name in FORWARD_HOOKS]
    for table in (*tables, *GLOBAL_HOOKS):
        for hook in table.values():
            function = inspect.unwrap(getattr(hook, "__func__", hook))
            if isinstance(function, types.FunctionType):
                yield function


def _enclosed(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The containers that a function has in its closure."""
    where = f"the closure of {function.__name__!r}"
    yield from ((where, v) for v in cells(function).values() if isinstance(v, _CONTAINERS))


def _is_own(cls: type) -> bool:
    return cls is not object and not cls.__module__.startswith(("torch.", "mpgraph."))


def _functions(cls: type) -> Iterator[types.FunctionType]:
    for name, value in list(vars(cls).items()):
        if name in ("__init__", "__init_subclass__", "__new__"):
            continue
        for kind, attribute in _WRAPPERS.items():
            value = getattr(value, attribute) if isinstance(value, kind) else value
        function = inspect.unwrap(value) if callable(value) else value
        if isinstance(function, types.FunctionType):
            yield function


def names_in(code: types.CodeType) -> Iterator[str]:
    """The globals and attributes that a function names, with those of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)
