"""What a graph was captured from, besides its arguments: the modules and their Python state."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mpgraph import ir
from mpgraph.code_state import CodeState
from mpgraph.errors import PrecisionError
from mpgraph.frozen import freeze
from mpgraph.plain import GLOBAL_HOOKS, HOOKS, tables_of
from mpgraph.read_guard import ReadVersions, tensor_kind
from mpgraph.structure import Opaque

_HALVES = frozenset({torch.bfloat16, torch.float16})
_VALUES = operator.methodcaller("values")
_CHAIN = itertools.chain.from_iterable
_NOT_OWN: tuple[dict[str, Any], str, int] = {}, "", -1


class ModuleTree:
    """The modules below a model at one moment: structure, modes, and what ``forward`` may read.

    A graph has what forward read at capture written into it: a dropout rate, a layer to skip, a
    field of a config. When the user changes one, the graph no longer holds.

    Args:
        model: The root.
        has_masters: Its parameters are to stay what they are: in 16 bit, updates would be lost.
    """

    def __init__(self, model: nn.Module, *, has_masters: bool = False) -> None:
        self._has_masters = has_masters
        self.modules = list(model.modules())
        tables = {m: tables_of(m) for m in self.modules}
        self._child_tables = [tables[m].modules for m in self.modules]
        self._parameters = [
            (tables[m].parameters, name, path)
            for path, m in model.named_modules()
            for name in tables[m].parameters
        ]
        self._state = [
            table for m in self.modules for table in (tables[m].parameters, tables[m].buffers)
        ]
        self._children, self._entries = self._children_now(), self._entries_now()
        self._ties = list(_ties(self._state))
        self.note_tensors()
        # The root's own hooks run around the graph, not in it.
        self._hooks = [vars(m)[name] for m in self.modules[1:] for name in HOOKS]
        self._hooks += GLOBAL_HOOKS
        self._look_at_code()
        self._objects: list[Any] = []
        self._tensor_kinds: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._number = -1
        self.reads = ReadVersions()

    def is_current(self, model: nn.Module) -> bool:
        """Whether this is the tree of ``model`` still: nothing in it has come, gone or changed."""
        return (
            model is self.modules[0]
            and self._children_now() == self._children
            and self._entries_now() == self._entries
            and all(table.get(name) is other.get(alias) for table, name, other, alias in self._ties)
        )

    # Every call asks for these: no loop of Python's.
    def _children_now(self) -> tuple[list[int], list[Any]]:
        tables = self._child_tables
        return [*map(len, tables)], [*_CHAIN(map(_VALUES, filter(None, tables)))]

    def _entries_now(self) -> tuple[list[int], list[str], list[bool]]:
        """The names of parameters and buffers, and which of them are None."""
        absent = map(operator.is_, self._tensors(), itertools.repeat(None))
        return [*map(len, self._state)], [*_CHAIN(filter(None, self._state))], [*absent]

    def _tensors(self) -> list[Any]:
        return [*_CHAIN(map(_VALUES, filter(None, self._state)))]

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

    def version(self) -> tuple[int, int]:
        """Two numbers that stand for what graphs depend on besides arguments, as it is now.

        One is for hooks, the kinds of parameters and buffers, class attributes and globals, the
        other for the attributes that forward was seen to read.

        Raises:
            PrecisionError: A parameter has lost its float32 master.
        """
        named, hooks, kinds = self._named(), self._hooks_now(), self._kinds()
        objects = [*named, *hooks]
        same = len(objects) == len(self._objects) and all(map(operator.is_, objects, self._objects))
        if not same or kinds != self._tensor_kinds:
            self.check_dtypes()
            self._objects, self._tensor_kinds = objects, kinds
            sizes = tuple(map(len, self._hooks))
            key = tuple(map(freeze, named)), tuple(map(Opaque, hooks)), sizes, tuple(kinds)
            self._number = self._numbers.setdefault(key, len(self._numbers))
        return self._number, self.reads.number()

    def _named(self) -> list[Any]:
        """What the code of the classes names."""
        if [*map(len, self.code.tables)] != self._class_sizes:
            self._look_at_code()
        return self.code.values()

    def _look_at_code(self) -> None:
        self.code = CodeState(self.modules)
        self._class_sizes = [*map(len, self.code.tables)]

    def _hooks_now(self) -> list[Any]:
        return [*_CHAIN(map(_VALUES, filter(None, self._hooks)))]

    def _kinds(self) -> list[Any]:
        """What graphs are specialised to of parameters and buffers."""
        tensors = self._tensors()
        try:
            return [None if t is None else (t.dtype, t.shape, t.requires_grad) for t in tensors]
        except RuntimeError:  # some are lazy, and have no shape yet
            return [None if t is None or is_lazy(t) else tensor_kind(t) for t in tensors]

    def check_dtypes(self) -> None:
        """Refuse parameters that lost their float32 masters after conversion."""
        if not self._has_masters:
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
