"""What counts as a plain value, and which attributes of a module are not the user's."""

from __future__ import annotations

from torch import nn

STATE = "_mpgraph"  # the attribute of a converted module that holds mpgraph's own state
PLAIN = (type(None), bool, int, float, complex, str, bytes)
MODULE_STATE = frozenset(vars(nn.Module())) | {STATE}
