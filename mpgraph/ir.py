"""What mpgraph assumes about an fx graph, and the few edits it makes to one.

The intermediate form is the pre-dispatch ("training IR") ATen graph of ``torch.export``, flat:

* Placeholders are the model's parameters, buffers, constants and tensor inputs; the graph is a
  pure function of them, up to in-place operators that the model itself uses.
* Every ``call_function`` node is an ``OpOverload``, a higher-order operator whose bodies are
  sub-graphs, ``operator.getitem``, arithmetic on sizes, or a gradient-mode switch.
* ``node.meta["val"]`` holds a fake value (or tuple of them) with the shape, dtype and device
  that the node has at run time; ``meta["captured"]`` the one that it had when it was captured.
* ``node.meta["decision"]`` (:class:`Decision`) says in which dtype the node runs, and why.
* ``node.meta["region"]`` (:class:`Region`) is the user's own autocast region around the node.
* ``node.meta["grad"]`` is False inside the model's own ``torch.no_grad()`` blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from mpgraph import ops
from mpgraph.op_table import Rule
from mpgraph.places import is_users

CAST: OpOverload = torch.ops.aten.to.dtype
# With the number of their arguments: the value and the dtype come first.
_CASTS: dict[Any, int] = {CAST: 2, ops.LOWER: 3, ops.WIDEN: 3}
SET_GRAD: Callable[..., Any] = torch._C._set_grad_enabled

SHORT_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
LONG_NAMES: dict[str, torch.dtype] = {short: dtype for dtype, short in SHORT_NAMES.items()}

# The dtypes that a rule may move a tensor between. float64 and complex values are left alone,
# as torch.autocast does (aten/src/ATen/autocast_mode.h, is_autocast_eligible).
ELIGIBLE = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclasses.dataclass(frozen=True)
class Decision:
    """In which dtype a node runs, and why.

    Attributes:
        rule: What the policy's row or override says.
        dtype: Floating inputs are cast to it; None where the node runs in what arrives.
        reason: The row's reason, for people.
        source: Where the rule comes from: a preset, an override, or no row.
        argument: Set the operator's own ``dtype=`` argument to it instead of casting inputs.
        each: At the border of a sub-graph, where both sides must agree: a dtype, or None, for
            each node among the arguments, in order.
    """

    rule: Rule
    dtype: torch.dtype | None
    reason: str
    source: str
    argument: torch.dtype | None = None
    each: tuple[torch.dtype | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Region:
    """The user's own ``torch.autocast`` region around a node: its dtype, or off."""

    enabled: bool
    dtype: torch.dtype | None


def short_name(dtype: torch.dtype) -> str:
    """``bf16`` for ``torch.bfloat16``; torch's own name where there is no short one."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def describe(name: str, value: torch.Tensor) -> str:
    """``x: fp32[4, s0]``."""
    return f"{name}: {short_name(value.dtype)}[{', '.join(map(str, value.shape))}]"


def is_tensor(value: object) -> bool:
    """Whether a node's ``val`` is one tensor."""
    return isinstance(value, torch.Tensor)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node that yields one tensor, else None."""
    val = node.meta.get("val")
    return val.dtype if isinstance(val, torch.Tensor) else None


def is_eligible(node: object) -> bool:
    """Whether a rule may cast this argument: a tensor in float32, bfloat16 or float16."""
    return isinstance(node, fx.Node) and dtype_of(node) in ELIGIBLE


def eligible_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments that a rule may cast, in order, lists included.

    Running statistics are not among them: the operator writes to them, and would write to a copy.
    """
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        if is_eligible(argument):
            found.append(argument)
        return argument

    fx.map_arg((node.args, node.kwargs), note)
    statistics = running_statistics(node)
    return [argument for argument in found if argument not in statistics]


def argument_nodes(node: fx.Node) -> list[fx.Node]:
    """Every node among the arguments, in order, as often as it occurs."""
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        found.append(argument)
        return argument

    fx.map_arg((node.args, node.kwargs), note)
    return found


# Of the operators with running statistics among their arguments, the kinds that only read them.
_READS_STATISTICS = ("_functional", "_no_training", "_no_update", "_backward")


def running_statistics(node: fx.Node) -> list[fx.Node]:
    """The running mean and variance among the node's arguments; see :func:`updates_statistics`."""
    if not is_operator(node):
        return []
    positions = _statistics_positions(cast(OpOverload, node.target))
    arguments = [node.args[i] for i in positions if i < len(node.args)]
    return [argument for argument in arguments if isinstance(argument, fx.Node)]


def updates_statistics(target: OpOverload) -> bool:
    """Whether an operator writes to running statistics in training.

    Schemas do not say so: not those of aten::batch_norm and aten::instance_norm, nor those of the
    kernels behind them.
    """
    name = target._schema.name
    is_read = any(name.endswith(kind) for kind in _READS_STATISTICS)
    return bool(_statistics_positions(target)) and not is_read


@functools.cache
def _statistics_positions(target: OpOverload) -> tuple[int, ...]:
    names = [argument.name for argument in target._schema.arguments]
    return tuple(i for i, name in enumerate(names) if name in ("running_mean", "running_var"))


def is_operator(node: fx.Node) -> bool:
    """Whether the node calls an ATen (or custom) operator overload."""
    return node.op == "call_function" and isinstance(node.target, OpOverload)


def only_checks(node: fx.Node) -> bool:
    """Whether an operator yields nothing, so that it can only be there for what it checks."""
    return is_operator(node) and not cast(OpOverload, node.target)._schema.returns


def is_higher_order(node: fx.Node) -> bool:
    """Whether the node calls a higher-order operator such as ``cond``."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def is_cast(node: fx.Node) -> bool:
    """Whether the node is a dtype cast and no more, the user's own or an inserted one."""
    return (
        node.op == "call_function"
        and len(node.args) == _CASTS.get(node.target)
        and not node.kwargs
        and is_floating(node.args[0])
        and cast(torch.dtype, node.args[1]).is_floating_point
    )


def is_inserted(node: fx.Node) -> bool:
    """Whether mpgraph put this cast into the graph."""
    return bool(node.meta.get("inserted"))


def is_floating(node: object) -> bool:
    """Whether the node yields one real floating-point tensor."""
    return isinstance(node, fx.Node) and (d := dtype_of(node)) is not None and d.is_floating_point


def cast_source(node: fx.Node) -> fx.Node:
    """The value that a cast reads."""
    return cast(fx.Node, node.args[0])


def cast_target(node: fx.Node) -> torch.dtype:
    """The dtype that a cast yields."""
    return cast(torch.dtype, node.args[1])


def is_lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of ``source`` has an exact counterpart in ``target``."""
    return torch.promote_types(source, target) is target


_norm = torch.ops.aten.norm
_OVERLOAD_WITH_DTYPE: dict[Any, OpOverload] = {
    _norm.Scalar: _norm.ScalarOpt_dtype,
    _norm.ScalarOpt_dim: _norm.ScalarOpt_dim_dtype,
}


def call_with_dtype(node: fx.Node, dtype: torch.dtype) -> tuple[Any, tuple[Any, ...], Any]:
    """Target, arguments and keywords of the node with a ``dtype=`` argument.

    Where the operator takes none (``norm``), another overload does; its arguments have no
    defaults.
    """
    overload = _OVERLOAD_WITH_DTYPE.get(node.target)
    if overload is None:
        return node.target, node.args, {**node.kwargs, "dtype": dtype}
    declared = cast(OpOverload, node.target)._schema.arguments
    rest = [node.kwargs.get(a.name, a.default_value) for a in declared[len(node.args) :]]
    return overload, (*node.args, *rest), {"dtype": dtype}


def is_mutating(node: fx.Node) -> bool:
    """Whether the operator writes to one of its arguments."""
    return is_operator(node) and _is_mutable(cast(OpOverload, node.target))


@functools.cache
def _is_mutable(target: OpOverload) -> bool:
    return bool(target._schema.is_mutable)


def is_random(node: fx.Node) -> bool:
    """Whether the operator draws random numbers."""
    return is_operator(node) and (
        torch.Tag.nondeterministic_seeded in cast(OpOverload, node.target).tags
    )


def is_parameter(node: fx.Node) -> bool:
    """Whether the node is the placeholder of a leaf that autocast casts once per step."""
    return node.op == "placeholder" and bool(node.meta.get("leaf"))


def crosses_graphs(graph: fx.Graph) -> bool:
    """Whether this is one of several graphs of a call, which share what Python holds."""
    owner = graph.owning_module
    return owner is not None and bool(owner.meta.get("crossing"))


def operator_name(node: fx.Node) -> str:
    """The name by which the operator table knows the node: ``aten.linear.default``."""
    return str(node.target)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose ``forward`` recorded the node; "" for the root."""
    return str(node.meta.get("module_path", ""))


def region_of(node: fx.Node) -> Region | None:
    """The user's own autocast region around the node, if any."""
    return cast("Region | None", node.meta.get("region"))


def add_cast(graph: fx.Graph, source: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    """Insert ``to(source, dtype)`` right before a node, with a value and a readable name."""
    with graph.inserting_before(before):
        node = graph.create_node(
            "call_function", CAST, (source, dtype), name=f"{source.name}_{short_name(dtype)}"
        )
    node.meta = cast_meta(source, dtype, before)
    return node


def with_dtype(decision: Decision, dtype: torch.dtype) -> Decision:
    """The decision of a node that now runs in another dtype, because a cast moved over it."""
    return dataclasses.replace(decision, dtype=dtype)


def without_dtype(decision: Decision, reason: str) -> Decision:
    """The decision of a node that now runs in what arrives, because a cast moved over it."""
    return dataclasses.replace(decision, dtype=None, reason=f"{decision.reason}; {reason}")


def cast_meta(source: fx.Node, dtype: torch.dtype, user: fx.Node) -> dict[str, Any]:
    """The meta of an inserted cast: its value, and the place of the node that asked for it."""
    inherited = ("module_path", "stack_trace", "region", "grad", "nn_module_stack")
    meta = {key: user.meta[key] for key in inherited if key in user.meta}
    return {**meta, "val": retype(source.meta["val"], dtype), "inserted": True}


def retype(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor like ``value`` with another dtype.

    Values are only looked at, so equal ones are one object: making a fake tensor costs more than
    all else that a pass does to a node.
    """
    if value.dtype is dtype:
        return value
    made = _retyped.setdefault(getattr(value, "fake_mode", None) or _NO_MODE, {})
    key = (dtype, value.device, _expressions(value.shape), _expressions(value.stride()))
    if key not in made:
        with torch.no_grad():
            made[key] = value.to(dtype)
    return made[key]


class _NoMode:
    """Stands in for the fake mode of a real tensor."""


_NO_MODE = _NoMode()
_retyped: weakref.WeakKeyDictionary[Any, dict[Any, torch.Tensor]] = weakref.WeakKeyDictionary()


def _expressions(sizes: Iterable[Any]) -> tuple[Any, ...]:
    return tuple([size if isinstance(size, int) else size.node.expr for size in sizes])


def call_graphs(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """Every graph module below ``gm`` that a node of its graph reads, with its attribute name."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(node.target, str):
            body = getattr(gm, node.target, None)
            if isinstance(body, fx.GraphModule):
                yield node.target, body


def all_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``gm`` and every sub-graph below it, outermost first."""
    yield gm
    for _, body in call_graphs(gm):
        yield from all_graphs(body)


def body_calls(
    graph: fx.Graph, node: fx.Node
) -> Iterator[tuple[fx.GraphModule, tuple[Any, ...] | None]]:
    """The sub-graphs that a higher-order node runs, and the operands that each of them gets.

    None instead of operands: the body gets something else than what the node is given, such as
    one slice of it at a time.
    """
    for argument in node.args:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            body = getattr(graph.owning_module, str(argument.target), None)
            if isinstance(body, fx.GraphModule):
                yield body, _operands(node)


def _operands(node: fx.Node) -> tuple[Any, ...] | None:
    if node.target is torch.ops.higher_order.cond:
        return tuple(cast("tuple[Any, ...]", node.args[3]))
    if node.target is torch.ops.higher_order.while_loop:
        carried, others = cast("tuple[tuple[Any, ...], ...]", node.args[2:4])
        return (*carried, *others)
    return None


def source_line(node: fx.Node) -> str:
    """``file.py:12: code`` of the user's line that recorded the node; "" if unknown.

    The innermost frame outside torch and mpgraph, or, for a model made of torch.nn alone, of all.
    """
    frames = _frames(str(node.meta.get("stack_trace") or ""))
    user = [frame for frame in frames if is_users(frame[0])] or frames
    if not user:
        return ""
    path, line, code = user[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}: {code}"


def _frames(trace: str) -> list[tuple[str, str, str]]:
    lines = trace.splitlines()
    frames = []
    for index, text in enumerate(lines):
        text = text.strip()
        if text.startswith('File "'):
            path, _, rest = text[6:].partition('", line ')
            code = lines[index + 1].strip() if index + 1 < len(lines) else ""
            frames.append((path, rest.partition(",")[0].strip(), code))
    return frames


def is_getitem(node: fx.Node) -> bool:
    """Whether the node picks one result of an operator with several."""
    return node.op == "call_function" and node.target is operator.getitem


class Writes:
    """Where a graph writes to memory, so that no value is read on the wrong side of a write."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._writes: dict[int, list[int]] = {}
        for node, index in self.position.items():
            for written in written_arguments(node):
                if (storage := storage_of(written)) is not None:
                    self._writes.setdefault(storage, []).append(index)

    def between(self, value: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether the memory behind ``value`` is written between two nodes."""
        writes = self._writes.get(storage_of(value) or 0, ())
        start, stop = self.position[first], self.position[last]
        return any(start < index < stop for index in writes)

    def anywhere(self, value: fx.Node) -> bool:
        """Whether the memory behind ``value`` is written at all."""
        return storage_of(value) in self._writes


def storage_of(node: fx.Node) -> int | None:
    """An identity of the memory behind a node's captured value: views share it."""
    value = node.meta.get("captured")
    if not isinstance(value, torch.Tensor):
        return None
    return int(value.untyped_storage()._cdata)


def written_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """What a node writes to."""
    yield from running_statistics(node)
    if is_higher_order(node):
        yield from _written_operands(node)
    if not is_mutating(node):
        return
    schema = cast(OpOverload, node.target)._schema
    values = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    values.update(node.kwargs)
    for argument in schema.arguments:
        value = values.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _nodes_in(value)


def _written_operands(node: fx.Node) -> Iterator[fx.Node]:
    """What the bodies of a higher-order node write to: anything, unless meta["written"] says."""
    positions = node.meta.get("written")
    if positions is None:
        yield from node.all_input_nodes
    else:
        yield from _nodes_in([node.args[position] for position in positions])


def _nodes_in(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes_in(item)


def differentiable(graph: fx.Graph, grad: bool) -> set[fx.Node]:
    """Every node whose value may carry a gradient, given whether gradients are enabled."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if is_floating(node) and node.meta.get("differentiable", True) and grad:
                found.add(node)
        elif node.meta.get("grad", grad) and node.target not in _CUTS:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
    return found


_CUTS = frozenset({torch.ops.aten.detach.default, torch.ops.aten.detach_copy.default})
