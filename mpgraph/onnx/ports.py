"""What the inputs and outputs of an exported step are, and their names."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx

from mpgraph.onnx.functional import Functional
from mpgraph.onnx.targets import HALVES
from mpgraph.step.slots import StepSlot
from mpgraph.structure import Node, Spec, leaf_names

Role = Literal["batch", "state", "hyperparameter", "frozen"]


@dataclasses.dataclass(frozen=True)
class Port:
    """One input of an exported graph.

    Attributes:
        name: Its name in the file.
        role: A tensor of the batch; state, which is an output too; a number that is set from
            outside; or a tensor that never changes.
        kind: For state: "parameter", "buffer", "optimizer", "scale", "sum", "random".
        value: A fake value of its shape and dtype.
        read: Gives the value that it has now; None for the batch.
        same: For a counter: the names of others, which are equal and stay so.
    """

    name: str
    role: Role
    kind: str
    value: torch.Tensor
    read: Callable[[], Any] | None = None
    same: tuple[str, ...] = ()


# Constants up to so many elements are written into the graph; larger ones are inputs.
SMALL = 1024
_KINDS = {"state": "optimizer", "hyperparameter": "number"}


def widen_ports(gm: fx.GraphModule) -> None:
    """Take and return fp32 instead of 16 bit, which JavaScript and numpy have no arrays of.

    Nothing is lost: both casts are exact.
    """
    graph = gm.graph
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and value.dtype in HALVES:
            with graph.inserting_after(_last_place(graph)):
                cast = graph.call_function(_TO, (node,), {"dtype": value.dtype})
            cast.meta = {**node.meta, "part": "forward"}
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, new=cast: user is not new)
            node.meta["val"] = value.to(torch.float32)
    output = graph.output_node()
    output.args = (tuple(_widened(graph, node) for node in output.args[0]),)  # type: ignore[union-attr]
    gm.recompile()


_TO: Any = torch.ops.aten._to_copy.default


def _last_place(graph: fx.Graph) -> fx.Node:
    places: list[fx.Node] = [*graph.find_nodes(op="placeholder")]
    return places[-1]


def _widened(graph: fx.Graph, node: Any) -> Any:
    value = node.meta["val"]
    if value.dtype not in HALVES:
        return node
    with graph.inserting_before(graph.output_node()):
        cast = graph.call_function(_TO, (node,), {"dtype": torch.float32})
    cast.meta = {**node.meta, "val": value.to(torch.float32)}
    return cast


def ports_of(
    made: Functional, batch: Sequence[str], groups: int, state: frozenset[str] = frozenset()
) -> list[Port]:
    """What the placeholders of a step without writes stand for.

    Those that nothing reads or writes go, so do counters that only follow another one, and small
    constants become part of the graph. The next values among the results then come in the order
    of the ports.

    Args:
        made: The step.
        batch: The names of the batch's tensors.
        groups: How many parameter groups the optimizer has.
        state: Names of what another graph writes: it is no constant.
    """
    graph = made.graph_module.graph
    nodes = list(graph.find_nodes(op="placeholder"))
    following = _following(graph, [nodes[i] for i in made.written])
    same = _followers(following)
    names = dict(zip(nodes, port_names(nodes, batch, groups), strict=True))
    for node in nodes:
        if node in same:
            del following[node]
        if not node.users and node not in following and node.meta["slot"].kind != "input":
            graph.erase_node(node)
        elif node not in following and names[node] not in state and _is_small(node):
            _write_into(made.graph_module, node)
    left = list(graph.find_nodes(op="placeholder"))
    output = graph.output_node()
    results = list(output.args[0])[: -len(made.written) or None]  # type: ignore[arg-type]
    output.args = ((*results, *(following[p] for p in left if p in following)),)
    made.graph_module.recompile()
    return [
        _port(p, names[p], p in following, [names[f] for f, first in same.items() if first is p])
        for p in left
    ]


def _following(graph: fx.Graph, written: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    """The next value of each written input."""
    values = list(graph.output_node().args[0])  # type: ignore[arg-type]
    return dict(zip(written, values[len(values) - len(written) :], strict=True))


def _followers(following: Mapping[fx.Node, Any]) -> dict[fx.Node, fx.Node]:
    """Counters that nothing reads, each with the one that is read and has the same next value."""
    read = {value: place for place, value in following.items() if place.users}
    return {
        place: read[value]
        for place, value in following.items()
        if not place.users and value in read and _is_equal(place, read[value])
    }


def _is_equal(a: fx.Node, b: fx.Node) -> bool:
    return bool(torch.equal(a.meta["slot"].read(), b.meta["slot"].read()))


def _port(node: fx.Node, name: str, is_written: bool, same: Sequence[str]) -> Port:
    slot: StepSlot = node.meta["slot"]
    role: Role = "state" if is_written else "frozen"
    if slot.kind in ("input", "hyperparameter"):
        role = "batch" if slot.kind == "input" else "hyperparameter"
    kind = _KINDS.get(slot.kind, slot.kind)
    return Port(name, role, kind, node.meta["val"], slot.read, tuple(same))


def _is_small(node: fx.Node) -> bool:
    slot: StepSlot = node.meta["slot"]
    value = node.meta["val"]
    return slot.kind in ("buffer", "constant", "scale") and value.numel() <= SMALL


def _write_into(gm: fx.GraphModule, node: fx.Node) -> None:
    """Make a constant of an input."""
    name = f"constant_{node.name}"
    slot: StepSlot = node.meta["slot"]
    assert slot.read is not None
    gm.register_buffer(name, slot.read().detach().clone())
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    gm.graph.erase_node(node)


def port_names(nodes: Sequence[fx.Node], batch: Sequence[str], groups: int) -> list[str]:
    """A name for each slot, all different: ``layer.weight``, ``layer.weight.exp_avg``, ``lr``."""
    found: list[str] = []
    for node in nodes:
        slot: StepSlot = node.meta["slot"]
        name = batch[slot.index] if slot.kind == "input" else _name(slot, groups)
        found.append(unique(name, found))
    return found


def _name(slot: StepSlot, groups: int) -> str:
    key, _, of = slot.name.partition(" of ")
    if slot.kind == "state":
        return f"{of}.{key}"
    if slot.kind == "hyperparameter":
        return key if groups == 1 else f"{key}.{of.replace(' ', '_')}"
    if slot.kind == "scale":
        index = of.rpartition(" ")[2]
        return f"loss_scale{'.' + index if index.isdigit() else ''}.{key}"
    if slot.kind == "sum":
        return f"{slot.name.removeprefix('sum of gradient ')}.sum"
    return slot.name.replace(" ", "_")


def unique(name: str, taken: Iterable[str]) -> str:
    """The name itself, or with a number where it is taken."""
    known, candidate, count = set(taken), name, 1
    while candidate in known:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def batch_names(function: Callable[..., Any], spec: Spec, *, skip: int) -> list[str]:
    """The names of a call's tensors: as the function's parameters are called.

    Args:
        function: What was called.
        spec: How its ``(args, kwargs)`` are put together.
        skip: How many parameters come before ``args``, such as the model.
    """
    assert isinstance(spec, Node)
    args, kwargs = spec.children
    assert isinstance(args, Node)
    names = _positional(function, skip, len(args.children))
    pairs = [*zip(names, args.children, strict=True)]
    if isinstance(kwargs, Node):
        pairs += zip(kwargs.names, kwargs.children, strict=True)
    found: list[str] = []
    for prefix, child in pairs:
        for name in leaf_names(child, prefix):
            found.append(unique(name.replace(" ", "_"), found))
    return found


def _positional(function: Callable[..., Any], skip: int, count: int) -> list[str]:
    try:
        parameters = [*inspect.signature(function).parameters.values()][skip:]
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    names += [f"input_{i}" for i in range(len(names), count)]
    return names[:count]


def result_names(spec: Spec) -> list[str]:
    """Names for what a loss function returned: the loss is ``loss``."""
    names = [name or "loss" for name in leaf_names(spec)]
    if "loss" not in names:
        names[0] = "loss"
    return [_spelled(name) for name in names]


def output_names(spec: Spec) -> list[str]:
    """Names for what a model returned."""
    return [_spelled(name or "output") for name in leaf_names(spec)]


def _spelled(name: str) -> str:
    return f"output_{name}" if name[:1].isdigit() else name
