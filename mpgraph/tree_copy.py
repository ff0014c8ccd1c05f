"""A copy of a module tree that shares its tensors."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn


def copy_tree(model: nn.Module) -> nn.Module:
    """A copy of every module that shares every tensor: parameters, buffers and the rest.

    As ``torch.nn.parallel.replicate`` does it; attributes that point back into the tree (a
    stored submodule, a bound method) point into the copy.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            copies[id(module)] = object.__new__(type(module))
    for module in model.modules():
        if id(module) in copies:
            vars(copies[id(module)]).update(_copied_attributes(module, copies))
    return copies[id(model)]  # type: ignore[no-any-return]


def _copied_attributes(module: nn.Module, copies: dict[int, Any]) -> dict[str, Any]:
    attributes = {name: _redirect(value, copies) for name, value in vars(module).items()}
    attributes.pop("_compiled_call_impl", None)  # it runs the module that this is a copy of
    return attributes


def _redirect(value: Any, copies: dict[int, Any]) -> Any:
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) in (list, tuple):
        return type(value)(_redirect(item, copies) for item in value)
    if isinstance(value, dict):
        fresh = copy.copy(value)
        fresh.update((key, _redirect(item, copies)) for key, item in value.items())
        return fresh
    return copy.copy(value) if type(value) is set else value
