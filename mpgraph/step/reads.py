"""What a loss function reads besides the model and the batch: what the graph of a step holds for.

A captured step has the numbers, flags and strings written into it that the loss function found in
its closure, in globals, default arguments and attributes. Where one is another now, the step is
captured anew.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mpgraph.code_state import names_in
from mpgraph.frozen import cells
from mpgraph.module import MixedPrecision, state_of
from mpgraph.places import is_foreign, is_own_file
from mpgraph.plain import PLAIN, STATE
from mpgraph.read_guard import ReadVersions
from mpgraph.step.taken_numbers import TakenNumbers

# How far into containers and objects one looks.
_DEPTH = 4


class LossReads:
    """The places that a loss function names, in all the functions of the user's that it calls."""

    def __init__(self, loss_fn: Callable[..., Any], model: nn.Module) -> None:
        self._model = model  # the step's own, which it looks after by itself
        self._functions: dict[types.FunctionType, None] = {}
        self._owners: list[Any] = []
        self._constants: list[Any] = []
        self.names: set[str] = set()
        # What it was seen to read of modules while it was traced.
        self.attributes = ReadVersions()
        self.taken = TakenNumbers()
        self._enter(loss_fn)

    def items(self) -> list[tuple[str, Any]]:
        """What stands in every place now, each with a name for people."""
        found = [(type(value).__name__, value) for value in (*self._owners, *self._constants)]
        for function in self._functions:
            found += cells(function).items()
            table = function.__globals__
            found += [(name, table[name]) for name in names_in(function.__code__) if name in table]
            defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            found += [(f"a default of {function.__name__}", value) for value in defaults]
        return found

    def values(self) -> list[Any]:
        """What stands in every place now."""
        return [value for _, value in self.items()]

    def modules(self) -> list[nn.Module]:
        """The modules among them; the model of the step, which it gets, is none of them."""
        found = [value for value in self.values() if isinstance(value, nn.Module)]
        for owner in self._owners:
            if not isinstance(owner, nn.Module):
                found += [v for v in _attributes(owner) if isinstance(v, nn.Module)]
        return list(dict.fromkeys(found))

    def state(self) -> tuple[Any, ...]:
        """Something that is equal as long as all of it is what it was."""
        found = [self._state_of(value, 0) for value in self.values()]
        return *found, self.attributes.number(), self.taken.number()

    def _enter(self, value: Any) -> None:
        """Note a function, or what is called like one, and the user's functions that it names."""
        if isinstance(value, functools.partial):
            self._constants += [*value.args, *value.keywords.values()]
            value = value.func
        if isinstance(value, types.MethodType):
            self._own(value.__self__)
            value = value.__func__
        function = inspect.unwrap(value)
        if not isinstance(function, types.FunctionType):
            self._own(value)
            function = _function_of(value)
        if not isinstance(function, types.FunctionType) or function in self._functions:
            return
        if not (_is_library(function) if self._functions else is_foreign(_file(function))):
            self._functions[function] = None
            named = [*names_in(function.__code__)]
            self.names.update(named)
            for other in self._named_functions(function, named):
                self._enter(other)

    def _own(self, owner: Any) -> None:
        if not any(owner is known for known in self._owners):
            self._owners.append(owner)

    def _named_functions(self, function: Any, names: list[str]) -> Iterator[Any]:
        around = [function.__globals__[name] for name in names if name in function.__globals__]
        yield from filter(_is_entered, (*around, *cells(function).values()))
        for owner in list(self._owners):
            table = getattr(owner, "__dict__", {})
            yield from filter(_is_entered, [table[name] for name in names if name in table])
            methods = [getattr(type(owner), name, None) for name in names]
            yield from (m for m in methods if isinstance(m, types.FunctionType))
            if (call := _function_of(owner)) is not None:
                yield call

    def _state_of(self, value: Any, depth: int) -> Any:
        if isinstance(value, PLAIN):
            # 1, True and 1.0 are equal, and so are 0.0 and -0.0.
            return type(value), repr(value) if isinstance(value, (float, complex)) else value
        if isinstance(value, torch.Tensor):
            return id(value), value.dtype, value.requires_grad
        if isinstance(value, types.FunctionType):
            return id(value.__code__)
        if isinstance(value, nn.Module):
            return self._state_of_module(value)
        if depth == _DEPTH or isinstance(value, (type, types.ModuleType)):
            return self._state_of_names(value, depth)
        if isinstance(value, dict):
            return tuple([(k, self._state_of(v, depth + 1)) for k, v in list(value.items())])
        if isinstance(value, (list, tuple)):
            return tuple([self._state_of(item, depth + 1) for item in value])
        if isinstance(value, (set, frozenset)):
            return frozenset(item for item in value if isinstance(item, PLAIN))
        return self._state_of_names(value, depth)

    def _state_of_names(self, value: Any, depth: int) -> Any:
        """Of the attributes, those that the functions name."""
        table = getattr(value, "__dict__", None)
        if table is None or depth == _DEPTH or _is_library_module(value):
            return None
        named = [name for name in self.names if name in table]
        return tuple([(name, self._state_of(table[name], depth + 1)) for name in sorted(named)])

    def _state_of_module(self, module: nn.Module) -> Any:
        if module is self._model:
            return id(module)
        if isinstance(module, MixedPrecision) and STATE in vars(module):
            tree = state_of(module).tree(module)
            return id(module), tree.training(), tree.version()
        found = []
        for part in module.modules():
            hooks = (part._forward_hooks, part._forward_pre_hooks)
            found.append((part.training, *(tuple(map(id, h.values())) for h in hooks)))
        return id(module), tuple(found)


def _is_entered(value: Any) -> bool:
    """Whether calling it runs a function that the user has written."""
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return True
    return not isinstance(value, (type, MixedPrecision)) and _function_of(value) is not None


def _function_of(value: Any) -> types.FunctionType | None:
    """The user's function that runs where an object is called."""
    for name in ("forward", "__call__"):
        function = getattr(type(value), name, None)
        if isinstance(function, types.FunctionType):
            return None if is_foreign(_file(function)) else function
    return None


def _attributes(owner: Any) -> list[Any]:
    table = getattr(owner, "__dict__", None)
    return [*table.values()] if isinstance(table, dict) else []


def _file(function: types.FunctionType) -> str:
    return function.__code__.co_filename


def _is_library(function: types.FunctionType) -> bool:
    """Whether it is none of the user's own: what libraries name goes too far to look after."""
    return not is_own_file(_file(function))


def _is_library_module(value: Any) -> bool:
    if not isinstance(value, types.ModuleType):
        return False
    file = getattr(value, "__file__", None) or "<builtin>"
    return file.startswith("<") or not is_own_file(file)
