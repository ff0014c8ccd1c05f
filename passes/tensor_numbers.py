"""Replace the Python numbers of an update by tensors, so that nothing in it is for the host."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mpgraph import ir
from mpgraph.errors import CaptureError
from mpgraph.infer import run_on_values
from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import StepContext

aten = torch.ops.aten


@graph_pass(numerics="rounds")
def tensor_numbers(graph: fx.Graph, context: StepContext) -> int:
    """Compute with 0-dimensional float64 tensors where an update computes with Python numbers.

    A number that is an input (a learning rate) becomes an input tensor; ``.item()`` of a step
    counter becomes the counter; arithmetic stays in float64, as in Python. An operator that takes
    such a number takes the tensor instead, rounded once to the dtype that its kernel computes in.

    Raises:
        CaptureError: An operator takes a number where no tensor can stand.
    """
    edits = 0
    numbers: dict[fx.Node, fx.Node] = {}
    rounded: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder":
            if isinstance(node.meta["val"], torch.SymFloat):
                _make_input(node, context)
                numbers[node] = node
                edits += 1
            continue
        if node.op != "call_function" or not _is_concerned(node, numbers):
            continue
        editor = _Editor(graph, node, numbers, rounded)
        if node.target is aten._local_scalar_dense.default:
            numbers[node] = editor.call(aten._to_copy.default, node.args[0], dtype=torch.float64)
        elif node.target in _ARITHMETIC:
            numbers[node] = editor.arithmetic()
        else:
            node.replace_all_uses_with(editor.operator())
            graph.erase_node(node)
        edits += 1
    for node in reversed(list(graph.nodes)):
        if (
            node.op == "call_function"
            and not node.users
            and isinstance(node.meta.get("val"), (torch.SymFloat, float))
        ):
            graph.erase_node(node)
    return edits


def _make_input(node: fx.Node, context: StepContext) -> None:
    mode = next(
        n.meta["val"].fake_mode
        for n in node.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    )
    like = torch.zeros((), dtype=torch.float64, device=context.device)
    node.meta["slot"] = dataclasses.replace(node.meta["slot"], like=like)
    with mode:
        node.meta["val"] = torch.empty((), dtype=torch.float64, device=context.device)


def _is_concerned(node: fx.Node, numbers: dict[fx.Node, fx.Node]) -> bool:
    if node.target is aten._local_scalar_dense.default:
        return True
    return any(argument in numbers for argument in node.all_input_nodes)


_ARITHMETIC: dict[Any, OpOverload] = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.pow: aten.pow.Tensor_Tensor,
    operator.neg: aten.neg.default,
    torch.sym_max: aten.maximum.default,
    torch.sym_min: aten.minimum.default,
    torch.sym_float: aten.alias.default,
    vars(torch)["_sym_sqrt"]: aten.sqrt.default,
}


class _Editor:
    """Puts nodes before one that computes with numbers."""

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        numbers: dict[fx.Node, fx.Node],
        rounded: dict[Any, fx.Node],
    ) -> None:
        self.graph, self.node, self.numbers, self.rounded = graph, node, numbers, rounded

    def call(self, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node with its value."""
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {"part": self.node.meta["part"]}
        made.meta["val"] = run_on_values(made)
        return made

    def arithmetic(self) -> fx.Node:
        """The same arithmetic on tensors."""
        return self.call(_ARITHMETIC[self.node.target], *map(self._tensor, self.node.args))

    def _tensor(self, value: Any) -> fx.Node:
        """An argument of arithmetic, a plain number included, as a tensor."""
        if isinstance(value, fx.Node):
            return self.numbers[value]
        key = (float(value), torch.float64)
        if key not in self.rounded:
            like = next(iter(self.numbers.values())).meta["val"]
            options = {"dtype": like.dtype, "device": like.device}
            with self.graph.inserting_before(self.node):
                made = self.graph.call_function(aten.scalar_tensor.default, key[:1], options)
            made.meta = {"part": self.node.meta["part"], "val": like}
            self.rounded[key] = made
        return self.rounded[key]

    def number(self, value: Any) -> Any:
        """A number as the kernel of the node would take it: a tensor where it is one."""
        if not (isinstance(value, fx.Node) and value in self.numbers):
            return value
        dtype = self._computes_in()
        tensor = self.numbers[value]
        if (tensor, dtype) not in self.rounded:
            cast = self.call(aten._to_copy.default, tensor, dtype=dtype)
            # Read from memory, not computed anew for every element: Inductor realises it here.
            self.rounded[tensor, dtype] = self.call(aten.as_strided.default, cast, [], [])
        return self.rounded[tensor, dtype]

    def _computes_in(self) -> torch.dtype:
        dtypes = [
            d
            for n in self.node.all_input_nodes
            if (d := ir.dtype_of(n)) is not None and n not in self.numbers
        ]
        dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32
        return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def wide(self, value: Any) -> Any:
        """A number or a tensor; 16 bit as fp32, in which kernels compute what they round once."""
        if not isinstance(value, fx.Node) or value in self.numbers:
            return self.number(value)
        if ir.dtype_of(value) not in (torch.bfloat16, torch.float16):
            return value
        return self.call(aten._to_copy.default, value, dtype=torch.float32)

    def operator(self) -> fx.Node:
        """The operator with tensors in place of numbers."""
        rewrite = _REWRITES.get(self.node.target)
        if rewrite is None:
            raise CaptureError(
                f"the optimizer's update calls {ir.operator_name(self.node)} with a number that "
                "changes from step to step, and mpgraph knows no form of it that takes a tensor. "
                "TrainStep(..., compile=False) trains with it, but is not exported either; please "
                "report the optimizer."
            )
        made = rewrite(self, *self.node.args, **self.node.kwargs)
        value = self.node.meta["val"]
        if made.meta["val"].dtype is not value.dtype:
            made = self.call(aten._to_copy.default, made, dtype=value.dtype)
        return made


def _binary(target: OpOverload) -> Callable[..., fx.Node]:
    def rewrite(edit: _Editor, a: Any, b: Any) -> fx.Node:
        return edit.call(target, a, edit.number(b))

    return rewrite


def _sum(target: OpOverload) -> Callable[..., fx.Node]:
    def rewrite(edit: _Editor, a: Any, b: Any, alpha: Any = 1) -> fx.Node:
        alpha = edit.number(alpha)
        if isinstance(alpha, fx.Node):
            product = edit.call(aten.mul.Tensor, edit.wide(b), alpha)
            return edit.call(target, edit.wide(a), product)
        return edit.call(target, a, edit.number(b), alpha=alpha)

    return rewrite


def _fused(inner: OpOverload) -> Callable[..., fx.Node]:
    def rewrite(edit: _Editor, a: Any, b: Any, c: Any, value: Any = 1) -> fx.Node:
        product = edit.call(aten.mul.Tensor, edit.number(value), edit.wide(b))
        return edit.call(aten.add.Tensor, edit.wide(a), edit.call(inner, product, edit.wide(c)))

    return rewrite


def _product_sum(product: OpOverload) -> Callable[..., fx.Node]:
    """``beta * a + alpha * (b @ c)``: rounded once, at its end, as the kernel does in 16 bit."""

    def rewrite(edit: _Editor, a: Any, b: Any, c: Any, beta: Any = 1, alpha: Any = 1) -> fx.Node:
        found = edit.call(product, edit.wide(b), edit.wide(c))
        scaled = edit.call(aten.mul.Tensor, edit.wide(a), edit.number(beta))
        return edit.call(
            aten.add.Tensor, scaled, edit.call(aten.mul.Tensor, found, edit.number(alpha))
        )

    return rewrite


def _power(edit: _Editor, base: Any, exponent: Any) -> fx.Node:
    return edit.call(aten.pow.Tensor_Tensor, edit.number(base), exponent)


def _itself(edit: _Editor, value: Any, **_: Any) -> fx.Node:
    return edit.call(aten.alias.default, edit.numbers[value])


def _lerp(edit: _Editor, a: Any, b: Any, weight: Any) -> fx.Node:
    return edit.call(aten.lerp.Tensor, edit.wide(a), edit.wide(b), edit.number(weight))


def _clamp(edit: _Editor, a: fx.Node, low: Any = None, high: Any = None, **bounds: Any) -> fx.Node:
    low, high = bounds.get("min", low), bounds.get("max", high)
    for bound, choose in ((low, aten.maximum.default), (high, aten.minimum.default)):
        if isinstance(bound := edit.number(bound), fx.Node):
            a = edit.call(choose, a, bound)
        elif bound is not None:
            name = "min" if choose is aten.maximum.default else "max"
            a = edit.call(aten.clamp.default, a, **{name: bound})
    return a


def _reversed_sub(edit: _Editor, a: Any, b: Any, alpha: Any = 1) -> fx.Node:
    a = edit.wide(a)
    product = edit.call(aten.mul.Tensor, a, edit.number(alpha)) if alpha != 1 else a
    return edit.call(aten.sub.Tensor, edit.number(b), product)


_REWRITES: dict[Any, Callable[..., fx.Node]] = {
    aten.mul.Tensor: _binary(aten.mul.Tensor),
    aten.mul.Scalar: _binary(aten.mul.Tensor),
    aten.div.Tensor: _binary(aten.div.Tensor),
    aten.div.Scalar: _binary(aten.div.Tensor),
    aten.add.Tensor: _sum(aten.add.Tensor),
    aten.add.Scalar: _sum(aten.add.Tensor),
    aten.sub.Tensor: _sum(aten.sub.Tensor),
    aten.sub.Scalar: _sum(aten.sub.Tensor),
    aten.rsub.Scalar: _reversed_sub,
    aten.pow.Tensor_Scalar: _binary(aten.pow.Tensor_Tensor),
    aten.pow.Scalar: _power,
    aten.addcmul.default: _fused(aten.mul.Tensor),
    aten.addcdiv.default: _fused(aten.div.Tensor),
    aten.addmm.default: _product_sum(aten.mm.default),
    aten.baddbmm.default: _product_sum(aten.bmm.default),
    aten.scalar_tensor.default: _itself,
    aten.lerp.Scalar: _lerp,
    aten.clamp.default: _clamp,
    **{
        compare.Scalar: _binary(compare.Tensor)
        for compare in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)
    },
}
