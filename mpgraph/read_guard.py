"""The attributes that graphs were captured with: whether all of them are what they were."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mpgraph.frozen import (
    EVERY,
    MISSING,
    Names,
    attribute_names,
    contents,
    freeze,
    has_attributes,
    is_all_in_table,
    is_heap_type,
    is_settled,
    parts,
    stored,
    table_of,
)
from mpgraph.plain import BOOKKEEPING, MODULE_STATE

_Table = Mapping[str, Any]
_NOTHING: Names = {}


class ReadGuard:
    """What forward has read, over one or more captures, and its values.

    Asked at every call, so most of the answer is whether each place, and each container, holds the
    same objects still. What they are worth is compared where that is not so.
    """

    def __init__(self) -> None:
        self._roots: dict[int, tuple[Any, Names]] = {}
        self._frozen: list[Any] = []
        self._values: list[Any] = []
        self._build()

    def add(self, reads: Mapping[int, tuple[Any, Names]]) -> None:
        """Hold for these reads too, with the values that they have now."""
        for key, (owner, names) in reads.items():
            _merge(self._roots.setdefault(key, (owner, {}))[1], names)
        self._build()
        self._frozen = self._freeze()

    def is_untouched(self) -> bool:
        """Whether the same objects, or equal numbers and strings, are in every place."""
        values = [table.get(name, MISSING) for table, name in self._places]
        return (
            (all(map(operator.is_, values, self._values)) or self._are_equal(values))
            and all(tensor_kind(t.get(n)) == kind for t, n, kind in self._tensors)
            and all(_is_same(contents(value), then) for value, then in self._contents)
            and all(freeze(value, names) == then for value, names, then in self._others)
            and all(attribute_names(owner) == then for owner, then in self._tables)
        )

    def _are_equal(self, values: list[Any]) -> bool:
        moved = ((a, b) for a, b in zip(values, self._values, strict=True) if a is not b)
        if not all(is_settled(a) and is_settled(b) and freeze(a) == freeze(b) for a, b in moved):
            return False
        self._values = values
        return True

    def is_equal(self) -> bool:
        """Whether every value is what it was when it was added, in whatever objects."""
        if self._freeze() != self._frozen:
            return False
        self._build()
        return True

    def _freeze(self) -> list[Any]:
        return [
            (name, _of_root(owner, name, names.get(name, {})))
            for owner, names in self._roots.values()
            for name in _read(owner, names)
        ]

    def _build(self) -> None:
        """Where to look, from what is there now."""
        self._places: list[tuple[_Table, str]] = []
        self._tensors: list[tuple[_Table, str, Any]] = []
        self._contents: list[tuple[Any, list[Any]]] = []
        self._others: list[tuple[Any, Names, Any]] = []
        self._tables: list[tuple[Any, list[str]]] = []
        self._seen: set[tuple[int, int]] = set()
        for owner, names in self._roots.values():
            self._add(owner, names)
        self._values = [table.get(name, MISSING) for table, name in self._places]

    def _add(self, owner: Any, names: Names) -> None:
        table = table_of(owner)
        assert table is not None
        if EVERY in names:
            self._tables.append((owner, attribute_names(owner)))
        for name in _read(owner, names):
            inner = names.get(name, _NOTHING)
            self._add_value(owner, table, name, inner)
            if name not in table:
                for cls in _classes_with(owner, name):
                    self._add_value(owner, vars(cls), name, inner)

    def _add_value(self, owner: Any, table: _Table, name: str, names: Names) -> None:
        value = table.get(name, MISSING)
        if isinstance(owner, nn.Module) and isinstance(value, torch.Tensor):
            self._tensors.append((table, name, tensor_kind(value)))
        else:
            self._places.append((table, name))
            if value is not MISSING:
                self._look_into(value, names)

    def _look_into(self, value: Any, names: Names) -> None:
        """Watch what may change inside of a value while it stays in its place.

        Containers are compared item by item, by identity: one of many thousand items is compared
        in the time that freezing a few of them takes.
        """
        if is_settled(value) or (id(value), id(names)) in self._seen:
            return
        self._seen.add((id(value), id(names)))
        if (taken := contents(value)) is not None:
            self._contents.append((value, taken))
        for key, item in parts(value):
            self._look_into(item, names.get((key,), _NOTHING))
        if has_attributes(value) and is_all_in_table(value):
            self._add(value, names if is_heap_type(type(value)) else {EVERY: {}, **names})
        elif has_attributes(value) or taken is None:
            self._others.append((value, names, freeze(value, names)))


class ReadVersions:
    """A number for what was read, as it is now: that of the graphs captured with the same."""

    def __init__(self) -> None:
        self._guards = [ReadGuard()]
        self._current = 0

    def number(self) -> int:
        """The number of what is there now; a new one if nothing was captured with it."""
        if not self._guards[self._current].is_untouched():
            # Freezing takes longer than to look into some guards.
            checks = (ReadGuard.is_untouched, ReadGuard.is_equal)
            holding = (i for holds in checks for i, g in enumerate(self._guards) if holds(g))
            self._current = next(holding, len(self._guards))
            if self._current == len(self._guards):
                self._guards.append(ReadGuard())
        return self._current

    def note(self, reads: Mapping[int, tuple[Any, Names]]) -> None:
        """A graph has just been captured that has read these attributes."""
        # What it was captured with may differ from before: forward may set a default.
        self._guards[self.number()].add(reads)


def tensor_kind(value: Any) -> Any:
    """What a graph is specialised to of a tensor that is looked up at every call."""
    if not isinstance(value, torch.Tensor):
        return value is None
    return value.dtype, value.shape, value.device, value.requires_grad


def _is_same(now: list[Any] | None, then: list[Any]) -> bool:
    return now is not None and len(now) == len(then) and all(map(operator.is_, now, then))


def _of_root(owner: Any, name: str, names: Names) -> Any:
    value = stored(owner, name)
    is_looked_up = isinstance(owner, nn.Module) and isinstance(value, torch.Tensor)
    return tensor_kind(value) if is_looked_up else freeze(value, names)


def _read(owner: Any, names: Names) -> Iterator[str]:
    """The names of what was read, or may have been."""
    found = {name: None for name in names if isinstance(name, str) and name != EVERY}
    if EVERY in names:
        known = MODULE_STATE | BOOKKEEPING if isinstance(owner, nn.Module) else ()
        found |= {name: None for name in attribute_names(owner) if name not in known}
    return iter(found)


def _classes_with(owner: Any, name: str) -> Iterator[type]:
    """The user's classes where a name is looked for, down to the one that has it."""
    for cls in type(owner).__mro__:
        if cls.__module__.startswith("torch.") or cls is object:
            return
        yield cls
        if name in vars(cls):
            return


def _merge(into: Names, names: Names) -> None:
    for step, inner in names.items():
        _merge(into.setdefault(step, {}), inner)
