"""What ``forward`` leaves behind on the modules while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mpgraph.capture.detect import NeedsDynamo
from mpgraph.capture.held import held_by, held_by_code
from mpgraph.capture.miscounts import refuse_miscounted
from mpgraph.code_state import CodeState
from mpgraph.plain import MODULE_STATE, tables_of
from mpgraph.structure import flatten, opaque_values

_MISSING = object()


@contextlib.contextmanager
def attribute_changes(
    model: nn.Module, set_once: list[str]
) -> Iterator[dict[tuple[str, str, bool], Any]]:
    """Collect what the block assigns to modules, and put everything back as it was.

    Yields:
        Values by the module's path, the name, and whether it is a buffer; filled at the end.

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
    changes: dict[tuple[str, str, bool], Any] = {}
    yield changes
    for path, module in model.named_modules():
        old_buffers, old_attributes = before.get(path, ({}, {}))
        changes.update(_restore(path, tables_of(module).buffers, old_buffers, True))
        changes.update(_restore(path, vars(module), old_attributes, False))
    for item in held:
        if item.has_other_plain_values():
            set_once.append(item.path)
        elif item.has_changed():
            if item in code_held:
                refuse_miscounted(item.path)
            raise NeedsDynamo(changes_what_is_held(item.path))
    for name in code.changed_since(values):
        raise NeedsDynamo(f"forward changes {name}, which a graph would freeze")


def changes_what_is_held(path: str) -> str:
    """The reason for the other engine."""
    return f"forward changes what is held by {path!r}"


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    attributes = {k: v for k, v in vars(module).items() if k not in MODULE_STATE}
    return dict(tables_of(module).buffers), attributes


# What torch.nn.RNNBase remembers of its parameters; it renews this at every call.
_BOOKKEEPING = frozenset({"_flat_weights", "_flat_weight_refs"})
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
        if name not in _BOOKKEEPING:
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
