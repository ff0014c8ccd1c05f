"""A step's graph as a whole: what it returns by name, and how parts are put into it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

from mpgraph.infer import fake_mode_of
from mpgraph.pipeline import PassContext
from mpgraph.step.slots import StepSlot, place_name


@dataclasses.dataclass(frozen=True)
class StepContext(PassContext):
    """What the passes over a whole step may know.

    Attributes:
        max_grad_norm: What gradients are clipped to.
        check_finite: Whether a step with non-finite gradients is skipped.
        sums: Where several batches make one step: for each gradient, the slot of its sum.
        is_last: Whether this batch completes the step.
        batches: In an exported step, which counts them itself: how many batches make one step.
        scales: For each loss scale: how it moves by its three tensors and the flag, and their
            slots.
        equal: Names of tensors without dimensions that hold equal numbers.
        loss_rows: How many rows of a final linear layer and its cross-entropy are computed at a
            time; None: all.
    """

    max_grad_norm: float | None = None
    check_finite: bool = False
    sums: dict[str, StepSlot] = dataclasses.field(default_factory=dict)
    is_last: bool = True
    batches: int = 1
    scales: tuple[tuple[Callable[..., Any], tuple[StepSlot, ...]], ...] = ()
    equal: tuple[frozenset[str], ...] = ()
    loss_rows: int | None = None


def outputs_of(graph: fx.Graph) -> dict[str, Any]:
    """What a step's graph returns, by name, to be changed and given to :func:`set_outputs`.

    "results": what the loss function returned; "gradients": by the parameter's name;
    "found_inf", "norm": as guard has them; "new": by slot name, what is to be written.
    """
    return dict(cast("dict[str, Any]", graph.output_node().args[0]))


def set_outputs(graph: fx.Graph, outputs: dict[str, Any]) -> None:
    """Return these."""
    graph.output_node().args = (outputs,)


def gradients_of(graph: fx.Graph) -> dict[str, fx.Node]:
    """The gradients that a step's graph computes, by the parameter's name."""
    return dict(cast("dict[str, fx.Node]", outputs_of(graph).get("gradients", {})))


def slot_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """Every placeholder, by what it stands for."""
    return {node.meta["slot"].name: node for node in graph.find_nodes(op="placeholder")}


def slot_node(graph: fx.Graph, slot: StepSlot, value: Any) -> fx.Node:
    """The placeholder of a slot, made if there is none: ``value`` is its fake value."""
    found = slot_nodes(graph).get(slot.name)
    if found is not None:
        return found
    first: fx.Node = next(iter(graph.nodes))
    with graph.inserting_before(first):
        made = graph.placeholder(place_name(slot))
    made.meta = {"slot": slot, "val": value}
    return made


def fresh(value: torch.Tensor) -> torch.Tensor:
    """Another value of the same kind: what is traced is told apart by its values."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def copied_as(value: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """A copy with these strides."""
    place = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device)
    return place.copy_(value)


def memory_of(value: Any) -> Any:
    """What tensors that share memory have in common."""
    if not isinstance(value, torch.Tensor):
        return None
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]


def _fresh(value: Any) -> Any:
    return fresh(value) if isinstance(value, torch.Tensor) else value


def mark(graph: fx.Graph, part: str) -> None:
    """Every node that belongs to no part of the step yet belongs to this one."""
    for node in graph.nodes:
        node.meta.setdefault("part", part)


def append(
    graph: fx.Graph,
    function: Callable[..., Any],
    inputs: Sequence[fx.Node],
    part: str,
    before: fx.Node | None = None,
) -> list[fx.Node]:
    """Trace a function of tensors on the values of some nodes, and put what it does at the end.

    Args:
        graph: A step's graph.
        function: Takes one tensor per input and returns a list of tensors.
        inputs: Nodes of the graph.
        part: What the new nodes belong to: "check", "clip", "update", "scale".
        before: Put it before this node instead.

    Returns:
        The node of each result.
    """
    values = [node.meta["val"] for node in inputs]
    with fake_mode_of(values), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.func.functionalize(lambda *v: function(*v), remove="mutations")
        gm = make_fx(traced, _allow_non_fake_inputs=True)(*map(_fresh, values))
    return inline(graph, gm, inputs, part, before)


def inline(
    graph: fx.Graph,
    other: fx.GraphModule,
    inputs: Sequence[fx.Node],
    part: str,
    before: fx.Node | None = None,
) -> list[Any]:
    """Copy another graph into this one, at its end or before a node; what it returns."""
    copies = dict(zip(other.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(before or graph.output_node()):
        returned = graph.graph_copy(other.graph, copies)
    owner: Any = graph.owning_module
    for node in other.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copies[node].meta = {**node.meta, "part": part}
        if node.op == "get_attr":  # a constant that the traced function has made
            name = f"{part}_{node.target}"
            setattr(owner, name, getattr(other, str(node.target)))
            copies[node].target = name
    graph.lint()
    return cast("list[Any]", returned)
