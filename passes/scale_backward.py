"""Make gradients enter the fp16 region scaled, and leave it unscaled."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import fx

from mpgraph import ir, ops
from mpgraph.capture.captured import Slot
from mpgraph.capture.kept import KEPT_FUNCTION, KEPT_HOOK
from mpgraph.gradient_flow import (
    OUT_OF_PLACE,
    carrying,
    dtypes,
    is_floating,
    is_half,
    promotes,
)
from mpgraph.infer import fake_mode_of
from mpgraph.pipeline import PassContext, graph_pass

_COPY = torch.ops.aten.copy_.default


@graph_pass(numerics="exact", whole=True)
def scale_backward(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite ``to(x, fp16)`` to ``lower(x, fp16, scale)``, and ``to(h, fp32)`` to ``widen``.

    After it, the gradient of a value is scaled if and only if the value is in fp16. So every
    place counts at which gradients pass from one kind to the other: casts, the model's own too;
    ``add(h: fp16, x: fp32)``, which widens ``h`` itself and now gets ``widen(h)``; other operators
    of mixed dtypes (``addcmul`` multiplies its factors' gradients in their own dtype), which
    compute with scaled gradients inside copies that let them out (``lower`` and ``widen`` to the
    dtype that they have); and results: what leaves the graph in
    fp16 leaves in fp32, since a true gradient may be too small for fp16 (what one of Dynamo's
    graphs hands to the next stays as it is: capture/crossing.py). Values without gradients keep
    their plain casts. Kept calls (checkpoints, branches) compute with scaled gradients
    throughout; bodies are not entered.
    """
    owner = graph.owning_module
    assert owner is not None
    if not context.scaled or owner.meta.get("body"):
        return 0
    return _Scaler(graph, context).run()


class _Scaler:
    def __init__(self, graph: fx.Graph, context: PassContext) -> None:
        self.graph = graph
        self.carrying = carrying(graph, context.grad)
        self.scale: fx.Node | None = None
        self.edits = 0

    def run(self) -> int:
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                self._mark(node)
            elif node.op == "output":
                self._widen_results(node)
            elif ir.is_cast(node):
                self._scale_cast(node)
            elif node.op == "call_function" and not ir.is_getitem(node):
                self._treat(node)
        return self.edits

    def _mark(self, node: fx.Node) -> None:
        """Have the caller pass an fp16 input through a border of its own, and a scaled copy."""
        if is_half(node) and node in self.carrying:
            node.meta["slot"] = dataclasses.replace(node.meta["slot"], scaled=True)

    def _scale_cast(self, node: fx.Node) -> None:
        source, dtype = ir.cast_source(node), ir.cast_target(node)
        half = is_half(source)
        if node not in self.carrying or half == (dtype is torch.float16):
            return
        node.target = ops.WIDEN if half else ops.LOWER
        node.args = (source, dtype, self._scale())
        self.edits += 1

    def _treat(self, node: fx.Node) -> None:
        sources = [s for s in dict.fromkeys(node.all_input_nodes) if s in self.carrying]
        if not sources or not (node in self.carrying or ir.is_mutating(node)):
            return
        if node.target is KEPT_HOOK:
            self._show_true_gradients(node, sources)
        elif not self._touches_half(node, sources):
            return
        elif torch.float16 in dtypes(node):
            self._surround(node, sources)
        elif node.target in OUT_OF_PLACE:
            self._surround(self._computed_first(node), sources)
        elif promotes(node) or ir.is_mutating(node):
            for source in filter(is_half, sources):
                widened = self._before(node, source, ops.WIDEN, torch.float32)
                widened.meta["for_scale_alone"] = promotes(node)
                node.replace_input_with(source, widened)
        else:
            self._surround(node, sources)

    def _touches_half(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        if torch.float16 in dtypes(node) or any(is_half(source) for source in sources):
            return True
        # A custom Function says itself what its gradients are; every other body computes them.
        return ir.is_higher_order(node) and node.target is not KEPT_FUNCTION

    def _surround(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Let gradients be scaled inside one operator only."""
        for source in sources:
            dtype = ir.dtype_of(source)
            if dtype is not None and dtype is not torch.float16:
                node.replace_input_with(source, self._before(node, source, ops.LOWER, dtype))
        results = [user for user in node.users if ir.is_getitem(user)] or [node]
        for result in results:
            dtype = ir.dtype_of(result)
            if is_floating(result) and dtype is not None and dtype is not torch.float16:
                self._after(result, ops.WIDEN, dtype)

    def _computed_first(self, node: fx.Node) -> fx.Node:
        """Rewrite ``y.addcmul_(h, k)`` to ``y.copy_(addcmul(y, h, k))``; return the new node."""
        name = node.name.rstrip("_0123456789")
        with self.graph.inserting_before(node):
            new = self.graph.create_node(
                "call_function", OUT_OF_PLACE[node.target], node.args, node.kwargs, name
            )
        new.meta = dict(node.meta)
        with torch.no_grad():  # values with memory of their own
            new.meta.update((key, node.meta[key].clone()) for key in ("val", "captured"))
        node.target, node.args, node.kwargs = _COPY, (node.args[0], new), {}
        self.carrying.add(new)
        self.edits += 1
        return new

    def _show_true_gradients(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Rewrite ``hook(h)`` to ``lower(hook(widen(h)))``: the user's hook sees no scale."""
        value = cast(fx.Node, node.args[0])
        if value not in sources or not is_half(value):
            return
        node.replace_input_with(value, self._before(node, value, ops.WIDEN, torch.float32))
        node.meta["val"] = ir.retype(node.meta["val"], torch.float32)
        self._after(node, ops.LOWER, torch.float16)

    def _widen_results(self, output: fx.Node) -> None:
        returned = output.args[0]
        leaves = returned if isinstance(returned, (list, tuple)) else (returned,)
        owner = self.graph.owning_module
        assert owner is not None
        if ir.crosses_graphs(self.graph):
            return
        results = [
            leaf for leaf in leaves[: owner.meta.get("results")] if isinstance(leaf, fx.Node)
        ]
        for value in dict.fromkeys(ir.argument_nodes(output)):
            if not is_half(value):
                continue
            if value in self.carrying:
                widened = self._before(output, value, ops.WIDEN, torch.float32)
            elif value in results and value.op != "placeholder":
                widened = ir.add_cast(self.graph, value, torch.float32, before=output)
                self.edits += 1
            else:
                continue
            output.replace_input_with(value, widened)

    def _before(self, node: fx.Node, source: fx.Node, target: Any, dtype: torch.dtype) -> fx.Node:
        new = ir.add_cast(self.graph, source, dtype, before=node)
        new.target, new.args = target, (source, dtype, self._scale())
        self.carrying.add(new)
        self.edits += 1
        return new

    def _after(self, node: fx.Node, target: Any, dtype: torch.dtype) -> None:
        new = self._before(node.next, node, target, dtype)
        # The place of the operator itself, not of what comes next.
        new.meta = ir.cast_meta(node, dtype, node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def _scale(self) -> fx.Node:
        if self.scale is None:
            self.scale = _add_scale(self.graph)
        return self.scale


def _add_scale(graph: fx.Graph) -> fx.Node:
    inputs = graph.find_nodes(op="placeholder")
    example = next(n.meta["val"] for n in inputs if isinstance(n.meta.get("val"), torch.Tensor))
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder("loss_scale")
    with fake_mode_of(example):
        value = torch.empty((), device=example.device)
    slot = Slot("scale", "loss_scale")
    node.meta = {"slot": slot, "val": value, "captured": value, "differentiable": False}
    return node
