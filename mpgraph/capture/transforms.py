"""Function transforms (``vmap``, ``jvp``, forward-mode AD) in a graph: opened and closed by calls.

Between the two calls operators work on wrapped tensors. Passes cannot compute on those, so a cast
may not be put there.
"""

from __future__ import annotations

import torch
from torch import fx

from mpgraph import ir
from mpgraph.capture.detect import NeedsDynamo

_OPENING = ("increment_nesting", "enter_dual_level")
_DUAL = (torch.ops.aten._make_dual.default, torch.ops.aten._unpack_dual.default)
_CLOSING = ("decrement_nesting", "exit_dual_level")


def opens(node: fx.Node) -> bool:
    """Whether a function transform begins here."""
    return getattr(node.target, "__name__", "").endswith(_OPENING)


def closes(node: fx.Node) -> bool:
    """Whether a function transform ends here."""
    return getattr(node.target, "__name__", "").endswith(_CLOSING)


def refuse_transforms(gm: fx.GraphModule) -> None:
    """Raise :class:`NeedsDynamo` for a transform of a function that computes in floating point.

    Transforms over integers and booleans, with which attention masks are made, may stay.
    """
    for body in ir.all_graphs(gm):
        depth = 0
        for node in body.graph.nodes:
            depth += opens(node) - closes(node)
            # Where nothing uses them, export drops the calls that open and close a level.
            is_inside = depth > 0 or node.target in _DUAL
            if is_inside and ir.is_operator(node) and _is_floating(node):
                line = ir.source_line(node)
                raise NeedsDynamo("a function transform such as vmap around operators", line)


def _is_floating(node: fx.Node) -> bool:
    return any(ir.is_floating(n) for n in (node, *ir.argument_nodes(node)))
