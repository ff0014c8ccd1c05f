"""What a Python value is at one moment, as something that can be kept and compared.

Numbers, strings, lists, dicts, partial functions and closures are compared by what they hold;
tensors and objects that nobody has looked into by identity; objects whose attributes were read by
those attributes.
"""

from __future__ import annotations

import array
import collections
import contextlib
import datetime
import decimal
import fractions
import functools
import pathlib
import sys
import types
import uuid
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mpgraph.places import is_own_file
from mpgraph.plain import PLAIN
from mpgraph.structure import PLAIN_TYPES, Opaque

# What was read inside of a value: steps, each with the steps that go on from there. A string is an
# attribute, a tuple holds the key of a dict or the position in a sequence; EVERY is all attributes.
Names = dict[Any, "Names"]
EVERY = "*"
MISSING = Opaque(types.SimpleNamespace())
# Of a larger array only the identity is kept: its bytes would be compared at every call.
_BYTES_OF_AN_ARRAY = 1 << 20
# Compared by what they are worth; some keep what they have once computed in themselves.
VALUES = (
    *PLAIN, *(kind for kind in PLAIN_TYPES if kind is not type), pathlib.PurePath, decimal.Decimal,
    fractions.Fraction, datetime.date, datetime.time, datetime.timedelta, uuid.UUID,
)  # fmt: skip
# What no code of the user's can change, or what is looked after in another way.
_CLOSED = (
    *VALUES, torch.Tensor, nn.Module, type, types.ModuleType, types.BuiltinFunctionType,
    types.CodeType, set, frozenset,
)  # fmt: skip


def freeze(value: Any, names: Names | None = None) -> Any:
    """Something that is equal as long as ``value`` is what it is now.

    Args:
        value: Anything.
        names: What was read inside of it.
    """
    return _frozen(value, names or {}, frozenset())


def is_settled(value: Any) -> bool:
    """Whether a value that is the same object is the same value."""
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return all(map(is_settled, value))
    if isinstance(value, types.FunctionType):
        return not is_own(value) or not (
            value.__closure__ or value.__defaults__ or value.__kwdefaults__
        )
    if isinstance(value, (type, types.ModuleType)):
        return not is_namespace(value)
    kinds = (*VALUES, torch.Tensor, nn.Module, types.BuiltinFunctionType, types.CodeType)
    return isinstance(value, kinds)


def is_own(function: types.FunctionType) -> bool:
    """Whether a function is of the user's project: what a library's has closed over is its own."""
    return is_own_file(function.__code__.co_filename)


def parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a container, a partial function, a method or a closure holds, by key or position.

    Of a subclass no method is called: transformers' ``ACT2FN`` makes a module of every value that
    is looked up.
    """
    if isinstance(value, collections.OrderedDict):
        yield from collections.OrderedDict.items(value)
    elif isinstance(value, dict):
        yield from dict.items(value)
    elif isinstance(value, (list, tuple, collections.deque)):
        yield from enumerate(_base(value).__iter__(value))
    elif isinstance(value, types.MappingProxyType):
        yield from value.items()
    elif isinstance(value, functools.partial):
        yield from enumerate((value.func, value.args, value.keywords))
    elif isinstance(value, slice):
        yield from enumerate((value.start, value.stop, value.step))
    elif isinstance(value, weakref.ref):
        yield 0, value()
    elif isinstance(value, types.MethodType):
        yield from enumerate((value.__func__, value.__self__))
    elif isinstance(value, types.FunctionType):
        yield from enumerate(_of_function(value))


def contents(value: Any) -> list[Any] | None:
    """The keys and items of a container, in order; None of what is none. Without Python's loops."""
    if isinstance(value, dict):
        base = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
        return [*base.keys(value), *base.values(value)]
    if isinstance(value, set):
        return [*set.__iter__(value)]
    if isinstance(value, frozenset):
        return [*frozenset.__iter__(value)]
    if isinstance(value, (list, tuple, collections.deque)):
        return [*_base(value).__iter__(value)]
    return [item for _, item in parts(value)] if is_container(value) else None


def _base(value: Any) -> Any:
    bases = (list, tuple, collections.deque)
    return next(kind for kind in bases if isinstance(value, kind))


def is_container(value: Any) -> bool:
    """Whether :func:`parts` says what a value is, but for attributes of its own."""
    kinds = (
        dict, list, tuple, collections.deque, types.MappingProxyType, functools.partial,
        types.MethodType, types.FunctionType, slice, weakref.ref,
    )  # fmt: skip
    return isinstance(value, kinds)


def has_attributes(value: Any) -> bool:
    """Whether it is an object with attributes that somebody may set."""
    closed = (*_CLOSED, functools.partial, types.MethodType, types.FunctionType)
    return not isinstance(value, closed) and (
        table_of(value) is not None or any(True for _ in _slots(type(value)))
    )


def table_of(value: Any) -> Mapping[str, Any] | None:
    """Where an object keeps its attributes."""
    if isinstance(value, type):
        return vars(value)
    try:
        table = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return table if isinstance(table, dict) else None


def key_of(owner: Any) -> int:
    """The identity of a module's table of attributes, which stand-ins for it share; of a class."""
    return id(owner if isinstance(owner, type) else table_of(owner))


class Globals:
    """The globals of a file, as attributes of an object."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.__dict__ = table


def stored(value: Any, name: str) -> Any:
    """What stands under an attribute's name, in the object or its class; runs no code for it."""
    table = table_of(value)
    if table is not None and name in table:
        return table[name]
    for cls in type(value).__mro__:
        if name in vars(cls):
            return _held(value, vars(cls)[name])
    return MISSING


def attribute_names(value: Any) -> list[str]:
    """The names of everything that an object itself stores."""
    return [*(table_of(value) or ()), *_slots(type(value))]


def is_all_in_table(value: Any) -> bool:
    """Whether an object stores nothing but in its table of attributes, as in slots."""
    table = table_of(value)
    return table is not None and len(attribute_names(value)) == len(table)


def _frozen(value: Any, names: Names, around: frozenset[int]) -> Any:
    if isinstance(value, VALUES):
        # 1, True and 1.0 are equal, and so are 0.0 and -0.0.
        return type(value), repr(value) if isinstance(value, (float, complex)) else value
    if isinstance(value, (torch.Tensor, nn.Module)) or id(value) in around:
        return Opaque(value)
    if isinstance(value, (type, types.ModuleType)):
        return Opaque(value), _of_namespace(value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset([_frozen(item, {}, around) for item in value])
    if isinstance(value, types.FunctionType) and not is_own(value):
        return Opaque(value)
    if (content := _content(value)) is not None:
        return type(value), content
    around |= {id(value)}
    attributes = _attributes(value, names, around)
    if not attributes and not is_container(value):
        return Opaque(value)
    held = [
        (_frozen(key, {}, around), _frozen(item, names.get((key,), {}), around))
        for key, item in parts(value)
    ]
    return type(value), tuple(held), attributes


def _attributes(value: Any, names: Names, around: frozenset[int]) -> tuple[Any, ...]:
    if not has_attributes(value):
        return ()
    read = [name for name in names if isinstance(name, str) and name != EVERY]
    if EVERY in names or _is_of_c(value):
        read = [*attribute_names(value), *(n for n in read if stored(value, n) is MISSING)]
    return tuple([(n, _frozen(stored(value, n), names.get(n, {}), around)) for n in read])


def _is_of_c(value: Any) -> bool:
    """Whether nobody can say what is read of it, as of a ``types.SimpleNamespace``."""
    return not is_heap_type(type(value))


def is_heap_type(cls: type) -> bool:
    """Whether a class was made at run time, as classes written in Python are."""
    return bool(cls.__flags__ & 1 << 9)  # Py_TPFLAGS_HEAPTYPE


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    """Its code, its defaults, and what it has closed over."""
    yield function.__code__
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    held = cells(function)
    yield from map(held.get, function.__code__.co_freevars)  # an empty cell has its place


def cells(function: types.FunctionType) -> dict[str, Any]:
    """What a function has closed over, by name; nothing of empty cells."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # empty
            found[name] = cell.cell_contents
    return found


def _content(value: Any) -> Any:
    """The numbers of a small array."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        if value.dtype.hasobject or value.nbytes > _BYTES_OF_AN_ARRAY:
            return None
        return value.dtype.str, value.shape, value.tobytes()
    return bytes(value) if isinstance(value, (bytearray, array.array)) else None


def _held(value: Any, found: Any) -> Any:
    if isinstance(found, types.MemberDescriptorType):
        try:
            return found.__get__(value)
        except AttributeError:
            return MISSING
    return found


def _slots(cls: type) -> Iterator[str]:
    for each in cls.__mro__:
        if is_heap_type(each):
            for name, found in vars(each).items():
                if isinstance(found, types.MemberDescriptorType):
                    yield name


def is_namespace(value: Any) -> bool:
    """Whether a class or module is the user's own, so that its attributes may be settings."""
    name = value.__module__ if isinstance(value, type) else value.__name__
    module = sys.modules.get(name)
    if module is None or name == "__main__":  # made by hand, or typed in
        return is_own_file(getattr(module, "__file__", None) or "<typed in>")
    file = getattr(module, "__file__", None)  # what is built in has none
    return file is not None and is_own_file(file)


def _of_namespace(value: Any) -> tuple[Any, ...]:
    if not is_namespace(value):
        return ()
    plain = [(k, v) for k, v in list(vars(value).items()) if isinstance(v, PLAIN)]
    return tuple([(k, freeze(v)) for k, v in plain if not k.startswith("__")])
