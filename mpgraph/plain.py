"""What counts as a plain value, and which attributes of a module are not the user's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

STATE = "_mpgraph"  # the attribute of a converted module that holds mpgraph's own state
PLAIN = (type(None), bool, int, float, complex, str, bytes)
MODULE_STATE = frozenset(vars(nn.Module())) | {STATE}
# What torch.nn.RNNBase remembers of its parameters; it renews this at every call.
BOOKKEEPING = frozenset({"_flat_weights", "_flat_weight_refs"})
# Where a module keeps the hooks around its forward, and all that a graph is captured with.
FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
# Hooks on every module there is: register_module_forward_hook and its like.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(
    getattr(nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward_pre", "forward", "backward_pre", "backward")
)


def global_hooks() -> list[Any]:
    """The hooks on every module there is, as they are now."""
    return [hook for table in GLOBAL_HOOKS for hook in table.values()]


class Tables(NamedTuple):
    """A module's own tables."""

    modules: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]


def tables_of(module: nn.Module) -> Tables:
    """The tables of a module; copies of those that TorchScript keeps for itself."""
    tables = Tables(module._modules, module._parameters, module._buffers)
    if isinstance(module, torch.jit.ScriptModule):
        return Tables(*[dict(table.items()) for table in tables])
    return tables
