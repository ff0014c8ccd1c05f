"""What ``forward`` leaves behind on the modules while it is traced."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mpgraph.capture.attribute_reads import Reads, attribute_reads
from mpgraph.capture.detect import NeedsDynamo
from mpgraph.capture.held import Held, held_by, held_by_code
from mpgraph.capture.miscounts import refuse_miscounted
from mpgraph.code_state import CodeState
from mpgraph.frozen import key_of, stored
from mpgraph.pipeline import size_hint
from mpgraph.plain import BOOKKEEPING, MODULE_STATE, tables_of
from mpgraph.structure import flatten, opaque_values

_MISSING = object()


@dataclasses.dataclass
class Traces:
    """What a run of ``forward`` leaves on the modules, and what it has read of them.

    Attributes:
        assigned: Values by the module's path, the name, and whether it is a buffer.
        reads: The attributes that decide what it does.
        reads_mode: Whether it has asked a module if it is in training.
    """

    assigned: dict[tuple[str, str, bool], Any] = dataclasses.field(default_factory=dict)
    reads: Reads = dataclasses.field(default_factory=dict)
    reads_mode: bool = False


@contextlib.contextmanager
def attribute_changes(model: nn.Module, set_once: list[str]) -> Iterator[Traces]:
    """Collect what the block reads of modules and assigns to them; put all back as it was.

    Yields:
        What is complete at the end of the block.

    Args:
        model: The root of the modules.
        set_once: Gets the paths of plain values that were set in objects which the modules hold:
            those stay as they are.

    Raises:
        NeedsDynamo: What has changed is not a tensor.
    """
    before = {path: _state(module) for path, module in model.named_modules()}
    code = CodeState(list(model.modules()))
    code_held, values = held_by_code(code), code.values()
    held = [*held_by(model), *code_held]
    traces = Traces()
    with attribute_reads(model, code) as record:
        yield traces
        traces.reads, traces.reads_mode = record.reads, record.of_mode
    for path, module in model.named_modules():
        old_buffers, old_attributes = before.get(path, ({}, {}))
        traces.assigned |= _restore(path, tables_of(module).buffers, old_buffers, True)
        traces.assigned |= _restore(path, vars(module), old_attributes, False)
    known = {id(item.container) for item in held}
    _refuse_deep_changes([item for item in record.held if id(item.container) not in known])
    for item in held:
        if item.has_other_plain_values():
            set_once.append(item.path)
        elif item.has_changed():
            if item in code_held:
                refuse_miscounted(item.path)
            raise NeedsDynamo(changes_what_is_held(item.path))
    for name in code.changed_since(values):
        raise NeedsDynamo(f"forward changes {name}, which a graph would freeze")


def _refuse_deep_changes(held: list[Held]) -> None:
    """Nothing else puts back what is deeper than what :func:`held_by` looks at."""
    if changed := [item.path for item in held if item.has_changed()]:
        for item in held:
            item.restore()
        raise NeedsDynamo(changes_what_is_held(changed[0]))


def changes_what_is_held(path: str) -> str:
    """The reason for the other engine."""
    return f"forward changes what is held by {path!r}"


def moves(model: nn.Module, reads: Reads, path: str, name: str, value: Any) -> str:
    """What of an assignment makes another call need another graph; "" if nothing does.

    Graphs are specialised to the size of a tensor in an attribute or buffer, such as a cache that
    grows, and to the tensors in a list.
    """
    module = model.get_submodule(path)
    earlier = tables_of(module).buffers.get(name)
    if earlier is None:
        earlier = stored(module, name)
        if key_of(module) not in reads or name not in reads[key_of(module)].names:
            return ""
    owner = f"{path}.{name}" if path else name
    if isinstance(earlier, torch.Tensor) and isinstance(value, torch.Tensor):
        same = [*map(size_hint, value.shape)] == [*earlier.shape]
        return "" if same else f"forward changes the size of {owner!r}, which it reads"
    if isinstance(earlier, torch.Tensor) or flatten(earlier)[0]:
        return f"forward replaces the tensors in {owner!r}, which it reads"
    return ""


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    attributes = {k: v for k, v in vars(module).items() if k not in MODULE_STATE}
    return dict(tables_of(module).buffers), attributes


# transformers installs its output hooks at the first call, and notes that here.
_KEPT = frozenset({"_output_capturing_hooks_installed"})


def _restore(
    path: str, current: dict[str, Any], old: dict[str, Any], is_buffer: bool
) -> dict[tuple[str, str, bool], Any]:
    changed = {}
    for name in list(current):
        if not is_buffer and name in MODULE_STATE:
            continue
        value, earlier = current[name], old.get(name, _MISSING)
        if value is earlier or _is_same_plain(value, earlier) or name in _KEPT:
            continue
        if name not in BOOKKEEPING:
            _refuse_plain(path, name, value)
            changed[path, name, is_buffer] = value
        if earlier is _MISSING:
            del current[name]
        else:
            current[name] = earlier
    return changed


def _is_same_plain(value: Any, earlier: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(earlier, torch.Tensor):
        return False
    try:
        return type(value) is type(earlier) and bool(value == earlier)
    except Exception:
        return False


def _refuse_plain(path: str, name: str, value: Any) -> None:
    leaves, spec = flatten(value)
    if not leaves or any(True for _ in opaque_values(spec)):
        owner = f"{path}.{name}" if path else name
        raise NeedsDynamo(f"forward changes the attribute {owner!r}, which a graph would freeze")
