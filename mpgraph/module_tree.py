"""What a graph was captured from, besides its arguments: the modules and their Python state."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mpgraph import ir
from mpgraph.code_state import CodeState
from mpgraph.errors import PrecisionError
from mpgraph.plain import GLOBAL_HOOKS, MODULE_STATE, PLAIN, tables_of
from mpgraph.structure import Opaque

_READ = (
    *PLAIN, torch.dtype, torch.device,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial,
)  # fmt: skip
_OPEN = (nn.Module, torch.Tensor, type, types.ModuleType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HALVES = frozenset({torch.bfloat16, torch.float16})
_VALUES = operator.methodcaller("values")
# How far into plain objects (a model's config, and the configs inside it) attributes are read.
_DEPTH = 2
_Path = tuple[Any, ...]  # the position of a module, and keys from there on
_NOT_OWN: tuple[dict[str, Any], str, int] = {}, "", -1


class ModuleTree:
    """The modules below a model at one moment: structure, modes, and what ``forward`` may read.

    A graph has the numbers, flags and strings of the capture written into it (a dropout rate, a
    layer to skip, a field of a config). When the user changes one, the graph no longer holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        tables = {m: tables_of(m) for m in self.modules}
        self._child_tables = [tables[m].modules for m in self.modules]
        self._children = self._child_lists()
        self._parameters = [
            (tables[m].parameters, name, path)
            for path, m in model.named_modules()
            for name in tables[m].parameters
        ]
        self._state = [
            table for m in self.modules for table in (tables[m].parameters, tables[m].buffers)
        ]
        self._present, self._entries = self._presence(), self._entries_now()
        self._ties = list(_ties(self._state))
        self.note_tensors()
        self._versions: dict[Any, int] = {}
        self._values: list[Any] = []
        self._kinds: list[type] = []
        self._version = -1
        self.code = CodeState(self.modules)
        self._collect()
        # Not those that forward adds later: it is the one to write them.
        self._tensors = list(_places(self._tables, lambda v: isinstance(v, torch.Tensor)))

    def is_current(self, model: nn.Module) -> bool:
        """Whether this is the tree of ``model`` still: nothing in it has come, gone or changed."""
        if model is not self.modules[0] or self._child_lists() != self._children:
            return False
        entries = self._entries_now()
        if entries != self._entries:
            if self._presence() != self._present:
                return False
            self._entries = entries
        return all(table.get(name) is other.get(alias) for table, name, other, alias in self._ties)

    def _child_lists(self) -> list[list[Any]]:
        return [*map(list, map(_VALUES, self._child_tables))]

    def _entries_now(self) -> tuple[list[Any], list[bool]]:
        """What presence follows from, at a tenth of its time: every call asks."""
        nones = [value is None for table in self._state if table for value in table.values()]
        return [*map(tuple, self._state)], nones

    def _presence(self) -> list[list[str]]:
        return [[n for n, v in table.items() if v is not None] for table in self._state]

    def note_tensors(self) -> None:
        """Note which parameters and buffers there are now."""
        self._own = {
            id(value): (table, name, index)
            for index, table in enumerate(self._state)
            for name, value in table.items()
        }

    def among(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Which of the arguments are the model's own tensors, as far as noted; () if none is.

        A graph that was captured with one of them reads both from one place.
        """
        found = []
        for position, leaf in enumerate(leaves):
            table, name, index = self._own.get(id(leaf), _NOT_OWN)
            if table.get(name) is leaf:
                found.append((position, index, name))
        return tuple(found)

    def parameters(self) -> list[int]:
        """The identities of the parameters that are in their places now."""
        return [id(table.get(name)) for table, name, _ in self._parameters]

    def training(self) -> tuple[bool, ...]:
        """The training flag of every module."""
        return tuple([module.training for module in self.modules])

    def version(self) -> int:
        """A number that stands for the plain attributes and hooks as they are now."""
        if [*map(len, self._tables)] != self._sizes or self._entered_now() != self._entered:
            self._collect()
        if [*map(len, self.code.tables)] != self._class_sizes:
            self.code = CodeState(self.modules)
            self._collect()
        values = self._attributes()
        if values != self._values[: len(values)] and not self._are_as_found():
            self._collect()  # what was None, say, is a list now
            values = self._attributes()
        values += [isinstance(table.get(key), torch.Tensor) for table, key in self._tensors]
        values += [Opaque(hook) for table in self._hooks for hook in table.values()]
        values += map(len, self._hooks)
        values += [
            (parameter := table.get(name)) is not None and parameter.requires_grad
            for table, name, _ in self._parameters
        ]
        kinds = [*map(type, values)]  # 1, True and 1.0 are equal
        if values != self._values or kinds != self._kinds:
            self._values, self._kinds = values, kinds
            # Names of places belong to it: attributes may come and go.
            paths = self._paths
            places = tuple(
                (paths.get(id(table), id(table)), key)
                for table, key in (*self._plain, *self._lists)
            )
            state = (places, self._classes(), tuple(map(_hashable, values)))
            self._version = self._versions.setdefault(state, len(self._versions))
        return self._version

    def _attributes(self) -> list[Any]:
        values = [table.get(key) for table, key in self._plain]
        return values + [_frozen(table.get(key)) for table, key in self._lists]

    def _are_as_found(self) -> bool:
        own = self._plain[: len(self._plain) - len(self.code.places)]
        return all(isinstance(table.get(key), _READ) for table, key in own) and all(
            _is_plain_list(table.get(key)) for table, key in self._lists
        )

    def _entered_now(self) -> list[int]:
        """Which objects and dicts are in the places of those whose attributes are read."""
        return [id(table.get(key)) for table, key in self._ways]

    def _classes(self) -> tuple[type, ...]:
        """What code they bring along."""
        return tuple([type(table.get(key)) for table, key in self._ways])

    def _collect(self) -> None:
        found = list(_tables_of(self.modules))
        owners = [table for table, _, _ in found]
        self._tables = owners
        self._paths = {id(table): path for table, path, _ in found}
        self._ways = [way for _, _, ways in found for way in ways]
        self._entered = self._entered_now()
        self._sizes = [*map(len, owners)]
        self._class_sizes = [*map(len, self.code.tables)]
        self._plain = list(_places(owners, lambda v: isinstance(v, _READ)))
        self._plain += [(table, name) for table, name, _ in self.code.places]
        self._lists = list(_places(owners, _is_plain_list))
        # The root's own hooks run around the graph, not in it.
        self._hooks = [vars(m)[name] for m in self.modules[1:] for name in _HOOKS]
        self._hooks += GLOBAL_HOOKS
        self._values, self._version = [], -1

    def check_dtypes(self) -> None:
        """Refuse parameters that lost their float32 masters after conversion."""
        present = [p for o, name, _ in self._parameters if (p := o.get(name)) is not None]
        if _HALVES.isdisjoint([parameter.dtype for parameter in present]):
            return
        for owner, name, path in self._parameters:
            parameter = owner.get(name)
            if parameter is not None and parameter.dtype in _HALVES:
                full = f"{path}.{name}" if path else name
                raise PrecisionError(
                    f"parameter {full!r} is now {ir.short_name(parameter.dtype)}, but this model "
                    "was converted with float32 masters: updates would be rounded away. Load or "
                    "move the model without changing its dtype (load_state_dict without "
                    "assign=True keeps float32)."
                )


def _ties(tables: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, Any, str]]:
    """The places that hold what an earlier one holds: tied weights, which a graph reads once."""
    first: dict[int, tuple[dict[str, Any], str]] = {}
    for table in tables:
        for name, value in table.items():
            if value is not None and id(value) in first:
                yield table, name, *first[id(value)]
            first.setdefault(id(value), (table, name))


def _tables_of(
    modules: list[nn.Module],
) -> Iterator[tuple[dict[str, Any], _Path, list[tuple[dict[str, Any], str]]]]:
    """The attribute tables of the modules, and of the plain objects and dicts that they hold.

    Each with the way to it from a module, and with the places in it that lead further.
    """
    seen: set[int] = set()
    todo: list[tuple[Any, _Path]] = [(module, (i,)) for i, module in enumerate(modules)]
    while todo:
        owner, path = todo.pop()
        table = _table(owner)
        if table is None or id(table) in seen:
            continue
        seen.add(id(table))
        inner = [k for k, v in list(table.items()) if k not in MODULE_STATE and _is_open(v)]
        inner = inner if len(path) <= _DEPTH else []
        yield table, path, [(table, key) for key in inner]
        todo += [(table[key], (*path, key)) for key in inner]


def _table(owner: Any) -> dict[str, Any] | None:
    table = owner if isinstance(owner, dict) else getattr(owner, "__dict__", None)
    return table if isinstance(table, dict) else None


def _is_open(value: Any) -> bool:
    return not isinstance(value, (*_READ, *_OPEN)) and _table(value) is not None


def _places(
    tables: list[dict[str, Any]], wanted: Callable[[Any], bool]
) -> Iterator[tuple[dict[str, Any], str]]:
    for table in tables:
        for key, value in table.items():
            if key not in MODULE_STATE and wanted(value):
                yield table, key


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(
        isinstance(item, (*_READ, torch.Tensor)) for item in value
    )


def _frozen(value: Any) -> Any:
    if not isinstance(value, (list, tuple, set, frozenset)):
        return value
    return tuple([id(item) if isinstance(item, torch.Tensor) else item for item in value])


def _hashable(value: Any) -> Any:
    # 1, True and 1.0 are equal, and so are 0.0 and -0.0.
    return type(value), repr(value) if isinstance(value, (float, complex, tuple)) else value
