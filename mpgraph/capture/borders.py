"""Passes for graphs with kept nodes: what crosses the border of a body."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.capture import kept
from mpgraph.pipeline import GraphPass, PassContext, graph_pass


@graph_pass(numerics="rounds", whole=True)
def settle_borders(graph: fx.Graph, context: PassContext) -> int:
    """Give every body the dtypes that it was traced with, and let it return those.

    ``checkpoint(body, h: fp32)``, traced while ``h`` was bf16, becomes
    ``checkpoint(body, to(h, bf16))``; a body that now yields fp32 where it yielded bf16 casts
    its result. What reads a result of the whole graph reads whatever dtype the policy gives.
    """
    edits = 0
    for node in list(graph.nodes):
        is_body = node.op == "output" and _owner(graph).meta.get("body")
        if is_body or (ir.is_higher_order(node) and isinstance(node.target, kept.Kept)):
            edits += _cast_changed(graph, node)
    return edits


def _owner(graph: fx.Graph) -> fx.GraphModule:
    owner = graph.owning_module
    assert owner is not None
    return owner


def _cast_changed(graph: fx.Graph, node: fx.Node) -> int:
    edits = 0

    def as_captured(source: fx.Node) -> fx.Node:
        nonlocal edits
        captured = source.meta.get("captured")
        if not ir.is_eligible(source) or not isinstance(captured, torch.Tensor):
            return source
        if captured.dtype is ir.dtype_of(source):
            return source
        edits += 1
        return ir.add_cast(graph, source, captured.dtype, before=node)

    node.args = fx.map_arg(node.args, as_captured)
    return edits


@graph_pass(numerics="exact", whole=True)
def lift_parameter_casts(graph: fx.Graph, context: PassContext) -> int:
    """Move the cast of a parameter out of a checkpoint: ``checkpoint(body, w, to(w, bf16))``.

    torch.autocast keeps one copy of a parameter for the whole forward pass, inside and outside
    of checkpoints; so gradients of every use meet in that copy. Left alone: a reentrant
    checkpoint, which recomputes under an autocast of its own, and a cast inside ``no_grad``.
    """
    edits = 0
    for node in graph.find_nodes(op="call_function", target=kept.KEPT_CHECKPOINT):
        if not node.kwargs.get("use_reentrant", True):
            body = kept.bodies(node, _owner(graph))[0]
            edits += _lift(graph, node, body, context)
    return edits


def _lift(graph: fx.Graph, node: fx.Node, body: fx.GraphModule, context: PassContext) -> int:
    lifted = list(_liftable(body, node.args[1:]))
    for operand, inner in lifted:
        last = body.graph.find_nodes(op="placeholder")[-1]
        with body.graph.inserting_after(last):
            copy = body.graph.placeholder(inner.name)
        copy.meta = {**inner.meta, "captured": inner.meta["val"], "differentiable": True}
        inner.replace_all_uses_with(copy)
        body.graph.erase_node(inner)
        cast = ir.add_cast(graph, operand, ir.cast_target(inner), before=node)
        node.args = (*node.args, cast)
    if lifted:
        _drop_unused(node, body)
    return len(lifted)


def _drop_unused(node: fx.Node, body: fx.GraphModule) -> None:
    placeholders = body.graph.find_nodes(op="placeholder")
    used = [argument for p, argument in zip(placeholders, node.args[1:], strict=True) if p.users]
    for placeholder in placeholders:
        if not placeholder.users:
            body.graph.erase_node(placeholder)
    body.recompile()
    node.args = (node.args[0], *used)
    node.meta["written"] = kept.written_positions(node, body)


def _liftable(body: fx.GraphModule, operands: Sequence[Any]) -> Iterator[tuple[fx.Node, fx.Node]]:
    writes = ir.Writes(body.graph)
    for inner, outer in zip(body.graph.find_nodes(op="placeholder"), operands, strict=True):
        if not isinstance(outer, fx.Node) or not ir.is_parameter(outer) or writes.anywhere(inner):
            continue
        for user in inner.users:
            if ir.is_cast(user) and ir.is_inserted(user) and "grad" not in user.meta:
                yield outer, user


def with_borders(passes: Sequence[GraphPass]) -> tuple[GraphPass, ...]:
    """The passes with those of this file where they belong: right after insert_casts."""
    names = [p.name for p in passes]
    after = names.index("insert_casts") + 1
    return (*passes[:after], settle_borders, lift_parameter_casts, *passes[after:])
