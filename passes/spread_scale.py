"""Let gradients stay scaled in fp32 parts of a graph that lie within the fp16 region."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import fx

from mpgraph import ir, ops
from mpgraph.gradient_flow import carrying, scale_input
from mpgraph.pipeline import PassContext, graph_pass

# What a border costs, in scaled casts: a parameter's is one of a group's.
_PARAMETER, _INPUT, _RESULT = 1 / 8, 1, 4


@graph_pass(numerics="exact", whole=True)
def spread_scale(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite ``lower(norm(widen(h), p), fp16)`` to ``to(norm(to(h, fp32), p'), fp16)``.

    A power of two in a gradient changes no digit of it in fp32 either; so a part of the graph in
    fp32 computes with scaled gradients where that saves scaled casts, as it does under
    ``torch.amp.GradScaler``. Its border moves to its edges: the caller takes the scale out of the
    gradients of its parameters ``p'``, all at once, and of its inputs; a result passes a
    ``widen``, which changes its gradient alone. Left as it is: a part with a hook, a custom
    Function, a sub-graph or an operator that is not torch's own, whose authors expect true
    gradients, and one that writes to what the graph is given.
    """
    owner = graph.owning_module
    assert owner is not None
    if not context.scaled or owner.meta.get("body"):
        return 0
    writes = ir.Writes(graph)
    edits = 0
    for part in _parts(graph, carrying(graph, context.grad)):
        if part.is_worth_it() and not any(_expects_true_gradients(n, writes) for n in part.nodes):
            edits += _spread(graph, part)
    scale = scale_input(graph)
    if edits and scale is not None and not scale.users:
        graph.erase_node(scale)
    return edits


@dataclasses.dataclass
class _Part:
    """Values with true gradients that are connected, and the borders around them."""

    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    borders: list[fx.Node] = dataclasses.field(default_factory=list)
    results: list[fx.Node] = dataclasses.field(default_factory=list)

    def is_worth_it(self) -> bool:
        """Whether there are fewer borders afterwards, and results may be copied."""
        given = [node for node in self.nodes if node.op == "placeholder"]
        shown = [s for node in self.results if (s := ir.storage_of(node)) is not None]
        if len(set(shown)) < len(shown) or any(ir.storage_of(node) in shown for node in given):
            return False
        parameters = sum(node.meta["slot"].kind == "parameter" for node in given)
        inputs = len(given) - parameters
        after = _PARAMETER * parameters + _INPUT * inputs + _RESULT * len(self.results)
        return bool(len(self.borders) > after)


def _parts(graph: fx.Graph, found: set[fx.Node]) -> Iterator[_Part]:
    """The parts with true gradients, each with its borders."""
    union: dict[fx.Node, fx.Node] = {node: node for node in graph.nodes if node in found}

    def root(node: fx.Node) -> fx.Node:
        while union[node] is not node:
            union[node] = node = union[union[node]]
        return node

    scaled: set[fx.Node] = set()
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source in found]
        if node.target is ops.LOWER:
            scaled.add(node)
        elif node.target is ops.WIDEN:
            scaled.update(sources)
        elif node in found or ir.is_mutating(node):
            joined = [*sources, node] if node in found else sources
            for one, other in itertools.pairwise(joined):
                union[root(one)] = root(other)
        if node in found and _is_scaled_already(node):
            scaled.add(node)
    inside = {root(node) for node in scaled}
    parts: dict[fx.Node, _Part] = collections.defaultdict(_Part)
    for node in graph.nodes:
        if node not in found:
            continue
        if root(node) not in inside:
            parts[root(node)].nodes.append(node)
            if node.target is ops.WIDEN:
                parts[root(node)].borders.append(node)
        if node.target is ops.LOWER and root(ir.cast_source(node)) not in inside:
            parts[root(ir.cast_source(node))].borders.append(node)
    for node in graph.output_node().all_input_nodes:
        if node in found and root(node) not in inside:
            parts[root(node)].results.append(node)
    yield from parts.values()


def _is_scaled_already(node: fx.Node) -> bool:
    return ir.dtype_of(node) is torch.float16 or bool(
        node.op == "placeholder" and node.meta["slot"].scaled
    )


def _expects_true_gradients(node: fx.Node, writes: ir.Writes) -> bool:
    if node.op == "placeholder":
        kind = node.meta["slot"].kind
        return kind not in ("parameter", "input") or writes.anywhere(node)
    if ir.is_getitem(node) or node.target is ops.WIDEN:
        return False
    # What has no source is memory that the model writes to.
    return not (ir.operator_name(node).startswith("aten.") and node.all_input_nodes)


def _spread(graph: fx.Graph, part: _Part) -> int:
    for node in part.nodes:
        if node.op == "placeholder":
            slot = node.meta["slot"]
            dtype = ir.dtype_of(node) if slot.kind == "parameter" else None
            node.meta["slot"] = dataclasses.replace(slot, dtype=dtype, scaled=True)
    output = graph.output_node()
    for result in part.results:
        value = ir.cast_source(result) if result.target is ops.WIDEN else result
        dtype = result.meta["val"].dtype
        border = ir.add_cast(graph, value, dtype, before=output)
        border.target, border.args = ops.WIDEN, (value, dtype, scale_input(graph))
        output.replace_input_with(result, border)
    for border in part.borders:
        source, dtype = ir.cast_source(border), ir.cast_target(border)
        if border.meta.get("for_scale_alone") or ir.dtype_of(source) is dtype or not border.users:
            border.replace_all_uses_with(source)
            graph.erase_node(border)
        else:
            border.target, border.args = ir.CAST, (source, dtype)
    return len(part.borders) + len(part.results)
