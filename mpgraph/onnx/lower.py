"""A graph in operators that have a translation: each kind of node is taken apart once.

What an operator becomes depends on its arguments alone: on dtypes, sizes and layouts of tensors,
and on the numbers beside them. So a model of many equal layers costs little more than one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.infer import fake_mode_of
from mpgraph.onnx.composites import stays_whole
from mpgraph.onnx.functional import CARRIED, retrace
from mpgraph.onnx.last_writes import is_number
from mpgraph.onnx.lowering import decompositions
from mpgraph.onnx.lowering.constants import FIX_SIZES
from mpgraph.onnx.program import describe_node

Kind = tuple[Any, ...]
_SIZE, _STRIDE = torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int


def lower(gm: fx.GraphModule, opset: int = 18) -> fx.GraphModule:
    """The same graph in operators that have a translation, every promotion of dtypes written out.

    Args:
        gm: A graph without writes, on fake values of one mode. It stays as it is.
        opset: The version of the ai.onnx operators.

    Raises:
        ExportError: A translation holds for one size of the batch alone.
    """
    symbolic = [size for size in _sizes(gm) if not size.node.expr.is_number]
    lowering = _Lowering(gm, opset)
    for node in gm.graph.nodes:
        if not _is_check(node):
            lowering.add(node)
    if any(size.node.expr.is_number for size in symbolic):
        raise ExportError(
            "an operator is translated for one size alone of the batch, or of another dimension "
            f"that varies: {FIX_SIZES}."
        )
    graph = lowering.graph
    for node in list(graph.nodes):
        if _is_check(node):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    return _make_graph_module(lowering.root, graph)


def _is_check(node: fx.Node) -> bool:
    """Whether a node is there for what it checks of values that a caller passes.

    Of a matrix, say, that it is not singular: without the check, what is solved is infinite or NaN.
    """
    return not node.users and (ir.only_checks(node) or "assert" in str(node.target))


def _sizes(gm: fx.GraphModule) -> list[torch.SymInt]:
    """The sizes of its inputs that are no numbers."""
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    sizes: list[Any] = [size for value in tensors for size in value.shape]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What one kind of node becomes: a graph from its inputs to the leaves of its result."""

    graph_module: fx.GraphModule
    result: pytree.TreeSpec


class _Lowering:
    """A new graph, node by node."""

    def __init__(self, gm: fx.GraphModule, opset: int) -> None:
        self.opset, self.graph = opset, fx.Graph()
        self.root = torch.nn.Module()
        self.old = gm
        # For each node of the old graph its value here: a node, or several where it has several.
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[Kind, _Parts | None] = {}
        self.kinds: dict[fx.Node, Any] = {}
        self.sizes: dict[Any, fx.Node] = {}
        self.attributes = 0

    def add(self, node: fx.Node) -> None:
        """Append what a node becomes."""
        if node.op == "get_attr":
            self.values[node] = self._held(getattr(self.old, str(node.target)), node.meta)
        elif _picks(node) and isinstance(self.values[node.args[0]], (tuple, list)):  # type: ignore
            self.values[node] = self.values[node.args[0]][node.args[1]]  # type: ignore
        elif isinstance(node.target, torch._ops.OpOverload) and (parts := self._parts(node)):
            self.values[node] = self._put(parts, node)
        else:
            self.values[node] = self._copied(node, self.values.__getitem__, dict(node.meta))

    def _parts(self, node: fx.Node) -> _Parts | None:
        inputs, kind = kind_of(node, self.kinds)
        if kind not in self.known:
            self.known[kind] = _taken_apart(node, inputs, self.opset)
        return self.known[kind]

    def _put(self, parts: _Parts, node: fx.Node) -> Any:
        """Copy the graph of a kind; the values that its result holds."""
        carried = {key: node.meta[key] for key in CARRIED if key in node.meta}
        inner = parts.graph_module
        inputs = (self.values[n] for n in node.all_input_nodes)
        here: dict[fx.Node, Any] = dict(
            zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True)
        )
        for part in inner.graph.nodes:
            if part.op == "placeholder":
                continue
            if part.op == "output":
                leaves = fx.map_arg(part.args[0], here.__getitem__)
                return pytree.tree_unflatten(list(leaves), parts.result)
            meta = {**part.meta, **carried}
            if part.op == "get_attr":
                here[part] = self._attribute(getattr(inner, str(part.target)), meta)
            else:
                here[part] = self._copied(part, here.__getitem__, meta)
        raise AssertionError("a graph ends in its output")

    def _copied(self, node: fx.Node, value_of: Any, meta: dict[str, Any]) -> fx.Node:
        """One node; a size that is there already is not computed again."""
        size = meta.get("val")
        expression = size.node.expr if isinstance(size, torch.SymInt) else None
        if expression in self.sizes:
            return self.sizes[expression]
        if node.target is _STRIDE and (product := self._product(expression)) is not None:
            return product
        copy = self.graph.node_copy(node, value_of)
        copy.meta = meta
        if expression is not None:
            self.sizes[expression] = copy
        return copy

    def _product(self, expression: Any) -> fx.Node | None:
        """A size as a product of sizes of inputs; None where it is none.

        A graph of ONNX has no strides; torch's traces take one for a size that it is equal to.
        """
        count, factors = expression.as_coeff_mul()
        found = [self._size(factor) for factor in factors]
        if not count.is_Integer or None in found:
            return None
        made: Any = int(count)
        for node in found:
            value = (made.meta["val"] if isinstance(made, fx.Node) else made) * node.meta["val"]  # type: ignore[union-attr]
            made = self.graph.call_function(operator.mul, (node, made))
            made.meta = {"val": value}
        self.sizes[expression] = made
        return made  # type: ignore[no-any-return]

    def _size(self, expression: Any) -> fx.Node | None:
        """A node that yields this size; None where no input has it."""
        if expression in self.sizes:
            return self.sizes[expression]
        for place in self.old.graph.find_nodes(op="placeholder"):
            for dim, size in enumerate(getattr(place.meta["val"], "shape", ())):
                if isinstance(size, torch.SymInt) and size.node.expr == expression:
                    made = self.graph.call_function(_SIZE, (self.values[place], dim))
                    made.meta = {"val": size}
                    self.sizes[expression] = made
                    return made
        return None

    def _held(self, value: Any, meta: Mapping[str, Any]) -> fx.Node:
        """A tensor, or the graph of a branch."""
        is_graph = isinstance(value, fx.GraphModule)
        return self._attribute(lower(value, self.opset) if is_graph else value, meta)

    def _attribute(self, value: Any, meta: Mapping[str, Any]) -> fx.Node:
        name = f"constant_{self.attributes}"
        self.attributes += 1
        setattr(self.root, name, value)
        made = self.graph.get_attr(name)
        made.meta = dict(meta)
        return made


def _picks(node: fx.Node) -> bool:
    return node.target is operator.getitem


def kind_of(node: fx.Node, known: dict[fx.Node, Any]) -> tuple[list[fx.Node], Kind]:
    """The nodes that a node reads, and what its result depends on beside their values.

    Args:
        node: Calls an operator.
        known: What was found of nodes that others read, to be looked up and added to.
    """
    inputs = node.all_input_nodes
    for read in inputs:
        if read not in known:
            known[read] = _value_kind(read.meta.get("val"))
    places = {read: index for index, read in enumerate(inputs)}

    def described(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "%", places[value]
        if isinstance(value, (tuple, list)):
            return tuple(map(described, value))
        if isinstance(value, slice):
            return "slice", *map(described, (value.start, value.stop, value.step))
        # 0.0 and -0.0 are equal, and not the same.
        return type(value), repr(value) if isinstance(value, (float, complex)) else value

    arguments = described(node.args), *((k, described(v)) for k, v in sorted(node.kwargs.items()))
    return inputs, (node.target, arguments, *(known[read] for read in inputs))


def _value_kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes = *map(_size_kind, value.shape), "|", *map(_size_kind, value.stride())
        return value.dtype, value.device, sizes, _size_kind(value.storage_offset())
    if isinstance(value, (tuple, list)):
        return tuple(map(_value_kind, value))
    return _size_kind(value)


def _size_kind(value: Any) -> Any:
    is_symbol = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return value.node.expr if is_symbol else (type(value), value)


def _taken_apart(node: fx.Node, inputs: list[fx.Node], opset: int) -> _Parts | None:
    """What a node becomes; None where it stays as it is."""
    from torch.onnx._internal.fx.passes.type_promotion import InsertTypePromotion

    table = decompositions(opset)
    opens = node.target in table or (_is_composite(node) and not stays_whole(node, opset))
    if not opens and not _may_promote(node):
        return None
    made = _alone(node, inputs)
    with fake_mode_of(node.meta["val"]):
        made = _opened(node, made, table) if opens else made
        before = _text(made)
        if any(map(_may_promote, made.graph.nodes)):
            InsertTypePromotion(made, _promotions()).run()
    result = pytree.tree_structure(node.meta["val"])
    return _Parts(made, result) if opens or _text(made) != before else None


def _opened(node: fx.Node, alone: fx.GraphModule, table: Any) -> fx.GraphModule:
    try:
        return retrace(alone, decompositions=table)
    except Exception as error:
        reason = str(error).partition("\n\nWhile executing")[0]
        if not isinstance(error, ExportError):  # a call that neither a row nor torch has met
            reason = f"an operator cannot be taken apart ({type(error).__name__}: {reason}):"
        raise ExportError(f"{reason}\n{describe_node(node)}") from error


def _is_composite(node: fx.Node) -> bool:
    return not is_number(node) and node.target._can_decompose()  # type: ignore[union-attr]


@functools.cache
def _promotions() -> Any:
    """torch.onnx's table of the dtypes that operators compute in; building it takes a while."""
    from torch.onnx._internal.fx.passes.type_promotion import TypePromotionTable

    return TypePromotionTable()


def _may_promote(node: fx.Node) -> bool:
    from torch.onnx._internal.fx.passes.type_promotion import get_type_promotion_rule

    return get_type_promotion_rule(node, _promotions()) is not None


def _text(gm: fx.GraphModule) -> list[Any]:
    return [(node.target, node.args, node.kwargs) for node in gm.graph.nodes]


def _alone(node: fx.Node, inputs: list[fx.Node]) -> fx.GraphModule:
    """A graph of one node, which returns the leaves of its result."""
    graph = fx.Graph()
    here = {}
    for index, read in enumerate(inputs):
        here[read] = graph.placeholder(f"input_{index}")
        here[read].meta["val"] = read.meta["val"]
    copy = graph.node_copy(node, here.__getitem__)
    if node.target in _OFFSETS:
        _count_from_input(copy, inputs[0].meta["val"])
    value = node.meta["val"]
    leaves: Any = (copy,)
    if isinstance(value, (tuple, list)):
        leaves = tuple(graph.call_function(operator.getitem, (copy, i)) for i in range(len(value)))
        for leaf, part in zip(leaves, value, strict=True):
            leaf.meta["val"] = part
    graph.output(leaves)
    return _make_graph_module({}, graph)


# The place of the offset, which counts from where the memory of the first argument starts.
_OFFSETS: dict[Any, int] = {
    torch.ops.aten.as_strided.default: 3,
    torch.ops.aten.as_strided_scatter.default: 4,
}


def _count_from_input(node: fx.Node, value: torch.Tensor) -> None:
    """Have an offset count from the first element of a tensor, which is alone in the new graph."""
    place = _OFFSETS[node.target]
    offset: Any = [*node.args[place:], node.kwargs.get("storage_offset")][0]
    if offset is not None:
        node.args = (*node.args[:place], offset - value.storage_offset())
        node.kwargs = {}
