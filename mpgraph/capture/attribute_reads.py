"""Which attributes of modules, and of what hangs on them, a model's forward reads."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.callback import CallbackArgs
from torch._dynamo.callback import callback_handler as dynamo

from mpgraph.capture.detect import NeedsDynamo
from mpgraph.capture.held import Held, held_at
from mpgraph.code_state import CodeState
from mpgraph.errors import CaptureError
from mpgraph.frozen import (
    EVERY,
    MISSING,
    VALUES,
    Names,
    attribute_names,
    has_attributes,
    is_heap_type,
    is_own,
    key_of,
    parts,
    stored,
)
from mpgraph.places import is_foreign, is_mpgraphs
from mpgraph.plain import BOOKKEEPING, FORWARD_HOOKS, MODULE_STATE

# What torch's machinery reads of a module, and not forward.
_MACHINERY = frozenset(vars(nn.Module)) - {"forward", "__dict__"}
# What the tree of modules knows of those that are in it.
_KNOWN = MODULE_STATE | BOOKKEEPING | _MACHINERY
_STATE = ("_parameters", "_buffers", "_modules")
# Comparing what is deeper would exceed the depth of Python's own calls.
_DEEPEST = 100
Steps = tuple[Any, ...]


class Root(NamedTuple):
    """A module, a class or the globals of a file, and which of their names were read."""

    owner: Any
    names: Names


Reads = dict[int, Root]  # by the identity of the module's table of attributes, or of the class


@dataclasses.dataclass
class Record:
    """What was read, and what the objects and containers held that were found on the way.

    ``of_mode`` says whether a module was asked if it is in training: many keys hold that apart.
    """

    reads: Reads = dataclasses.field(default_factory=dict)
    of_mode: bool = False
    held: list[Held] = dataclasses.field(default_factory=list)


class _Recorder:
    """Notes attributes as they are read, by the thread that has made it.

    Classes have another ``__getattribute__`` meanwhile: ``nn.Module``, and the class of every
    object that is found on a module. What torch puts in a module's place while it traces shares
    the module's table of attributes: that is what a module is known by.
    """

    def __init__(self, model: nn.Module, record: Record, code: CodeState | None) -> None:
        self._model = model
        self._record = record
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._thread = threading.get_ident()
        self._busy = self._listening = self._is_left = False
        self._at_start = {id(vars(m)): dict(vars(m)) for m in model.modules()}
        self._modules = {id(vars(m)): m for m in model.modules()}
        # Where an object was found: the module, class or file, and the steps from there.
        self._ways: dict[int, tuple[Any, Steps]] = {}
        self._random: list[tuple[str, random.Random, Any]] = []
        self._kept: list[Any] = []  # or an identity may come to mean another object
        self._classes: list[Any] = [nn.Module]
        self._note_hooks()
        for path, owner, name in code.objects if code else ():
            self._paths[id(owner)] = path
            self._enter(stored(owner, name), owner, (name,))

    def start(self) -> None:
        """Begin to listen, or go on."""
        if not self._listening:
            self._listening = True
            for cls in self._classes:
                _listen(cls, self.note)

    def stop(self) -> None:
        """Give the classes their own ``__getattribute__`` back."""
        if self._listening:
            self._listening = False
            for cls in self._classes:
                type.__delattr__(cls, "__getattribute__")

    def _note_hooks(self) -> None:
        """What hooks read is read by forward, but for those of the root: they run around it."""
        for module in [*self._model.modules()][1:]:
            for table in FORWARD_HOOKS:
                for key, hook in vars(module)[table].items():
                    self._names(module, (table,))
                    self._enter(hook, module, (table, (key,)))

    def leave_to_dynamo(self, _: CallbackArgs) -> None:
        """Dynamo compiles a part of the model, such as a branch of ``torch.cond``.

        It says not what it reads, and does not compile a class with a ``__getattribute__`` of its
        own.
        """
        if self._listening:
            self.stop()
            self._is_left = self._record.of_mode = True
            for module in self._model.modules():
                self._note_every(module, module, ())

    def resume(self, _: CallbackArgs) -> None:
        """Dynamo is done."""
        if self._is_left:
            self._is_left = False
            self.start()

    def note(self, owner: Any, name: str) -> None:
        """An attribute is about to be read."""
        if self._busy or threading.get_ident() != self._thread:
            return
        self._busy = True
        try:
            if isinstance(owner, nn.Module):
                self._note_of_module(owner, name)
            elif id(owner) in self._ways:
                self._note_of_object(owner, name)
        finally:
            self._busy = False

    def _note_of_module(self, owner: nn.Module, name: str) -> None:
        if name in _MACHINERY or (name.startswith("__") and name != "__dict__"):
            return
        table = object.__getattribute__(owner, "__dict__")
        module, at_start = self._modules.get(id(table)), self._at_start.get(id(table))
        if module is None:
            return
        if name == "training" and not is_mpgraphs(sys._getframe(3).f_code.co_filename):
            self._record.of_mode = True
        if name == "__dict__":
            if not is_foreign(sys._getframe(3).f_code.co_filename):
                self._note_every(module, module, ())
        elif at_start is None:  # in a list, say: no part of the model
            self._note(module, module, (), _state_with(table, name) or name)
        elif name not in _KNOWN and not _state_with(table, name):
            # What is not what it was has been put there by forward itself.
            if at_start.get(name, MISSING) is table.get(name, MISSING):
                self._note(module, module, (), name)

    def _note_of_object(self, owner: Any, name: str) -> None:
        root, steps = self._ways[id(owner)]
        if name == "__dict__":
            self._note_every(owner, root, steps)
        elif not name.startswith("__"):
            self._note(owner, root, steps, name)

    def _note(self, owner: Any, root: Any, steps: Steps, name: str) -> None:
        names = self._names(root, steps)
        if name not in names:
            names[name] = {}
            self._enter(stored(owner, name), root, (*steps, name))

    def _note_every(self, owner: Any, root: Any, steps: Steps) -> None:
        self._record.of_mode |= isinstance(owner, nn.Module)
        self._names(root, steps)[EVERY] = {}
        for name in attribute_names(owner):
            if steps or name not in _KNOWN:
                self._note(owner, root, steps, name)

    def _names(self, root: Any, steps: Steps) -> Names:
        names = self._record.reads.setdefault(key_of(root), Root(root, {})).names
        for step in steps:
            names = names.setdefault(step, {})
        return names

    def _enter(self, value: Any, root: Any, steps: Steps) -> None:
        """From now on what is read inside of a value is noted under these steps."""
        if isinstance(value, (*VALUES, torch.Tensor)) or id(value) in self._ways:
            return
        if isinstance(value, types.FunctionType) and not is_own(value):
            return
        if _goes_on(value):
            where, kind = self._path(root, steps), type(value).__name__
            raise NeedsDynamo(f"{where!r} is a {kind}, which goes on from call to call")
        if len(steps) > _DEEPEST:
            raise NeedsDynamo(f"forward reads what is {_DEEPEST} objects deep in its attributes")
        self._ways[id(value)] = root, steps
        self._kept.append(value)
        if isinstance(value, nn.Module):
            self._modules |= {id(vars(m)): m for m in value.modules()}
            return
        if isinstance(value, random.Random):
            self._random.append((self._path(root, steps), value, value.getstate()))
        self._record.held += held_at(self._path(root, steps), value)
        for key, item in parts(value):
            self._enter(item, root, (*steps, (key,)))
        if has_attributes(value) and not self._hears(type(value)):
            self._note_every(value, root, steps)

    def refuse_draws(self) -> None:
        """Refuse numbers that both engines would draw once: Dynamo (2.13) does, too.

        Raises:
            CaptureError: A ``random.Random`` on the model is not where it was.
        """
        for path, numbers, before in self._random:
            if numbers.getstate() != before:
                numbers.setstate(before)
                raise CaptureError(
                    f"forward draws from {path!r}, a random.Random of the model's own, and a "
                    "captured call would draw one number for all calls. Draw from torch "
                    "(torch.rand(())), from Python's random module or from numpy instead, or "
                    "before the call, and pass the number as a tensor."
                )

    def _path(self, root: Any, steps: Steps) -> str:
        path: str = self._paths.get(id(root), "")
        for step in steps:
            path += f".{step}" if isinstance(step, str) else f"[{step[0]!r}]"
        return path.lstrip(".")

    def _hears(self, cls: type) -> bool:
        """Listen to a class; False if that cannot be."""
        known = [c for c in cls.__mro__ if is_heap_type(c) and "__getattribute__" in vars(c)]
        if known or not is_heap_type(cls):
            return bool(known) and known[0] in self._classes
        if cls not in self._classes:
            try:
                _listen(cls, self.note)
            except TypeError:  # closed, although it was made at run time
                return False
            self._classes.append(cls)
            if not self._listening:
                type.__delattr__(cls, "__getattribute__")
        return True


def _goes_on(value: Any) -> bool:
    """Whether it is an iterator, or draws numpy's random numbers: C keeps where it has come to.

    Dynamo leaves these to Python. Of a ``random.Random`` see :meth:`_Recorder.refuse_draws`.
    """
    module = type(value).__module__
    is_iterator = isinstance(value, Iterator) and module in ("builtins", "itertools")
    return is_iterator or module.startswith("numpy.random")


def _state_with(table: dict[str, Any], name: str) -> str:
    """Which of a module's tables of parameters, buffers and modules has a name; "" if none has."""
    return next((state for state in _STATE if name in table.get(state, ())), "")


def _listen(cls: Any, note: Callable[[Any, str], None]) -> None:
    read = cls.__getattribute__

    def __getattribute__(self: Any, name: str) -> Any:
        note(self, name)
        return read(self, name)

    type.__setattr__(cls, "__getattribute__", __getattribute__)


@contextlib.contextmanager
def attribute_reads(model: nn.Module, code: CodeState | None = None) -> Iterator[Record]:
    """Collect which attributes the block reads, of the modules and of what they hold.

    With ``code``, also of the objects that it names. If the block fails, what it has changed in
    any of them is put back.
    """
    record = Record()
    recorder, outer = _Recorder(model, record, code), _listening[-1:]
    for other in outer:
        other.stop()
    _listening.append(recorder)
    recorder.start()
    dynamo.register_start_callback(recorder.leave_to_dynamo)
    dynamo.register_end_callback(recorder.resume)
    try:
        yield record
        recorder.refuse_draws()
    except BaseException:
        recorder.stop()
        for item in record.held:
            item.restore()
        raise
    finally:
        dynamo.remove_start_callback(recorder.leave_to_dynamo)
        dynamo.remove_end_callback(recorder.resume)
        recorder.stop()
        _listening.pop()
        for other in outer:
            other.start()


# One after the other: while a step is traced, the models in it are captured.
_listening: list[_Recorder] = []
