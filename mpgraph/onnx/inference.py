"""A model's inference as one graph: captured in eval mode, ready to be made functional."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from mpgraph import ir, ops
from mpgraph.capture.captured import Captured, Slot
from mpgraph.capture.detect import NeedsDynamo
from mpgraph.capture.engines import argument_names, export_call, likely_dynamic
from mpgraph.capture.export import Call
from mpgraph.errors import ExportError, MPGraphError
from mpgraph.gather import home_of
from mpgraph.module import State
from mpgraph.onnx.one_device import put_on
from mpgraph.onnx.whole_operators import whole_operators
from mpgraph.structure import Node as Container
from mpgraph.structure import Plain, Spec, count_leaves, flatten, leaf_names

DynamicShapes = bool | Mapping[str, Mapping[int, str]]


@dataclasses.dataclass
class Inference:
    """One call of a model in eval mode, without gradients.

    Attributes:
        gm: The rewritten graph; its placeholders are the inputs in order, and the state.
        state: For each placeholder that is no input: the name in the file, and the value.
        examples: A value per input of the graph.
        inputs: The name of each input.
        outputs: The name of each output.
        axes: For each input, the names of dimensions that may vary, as the caller gave them.
        notes: What the file does not hold, for people.
        dims: Per argument of the call, the dimensions that are to vary.
    """

    gm: fx.GraphModule
    state: dict[str, tuple[str, torch.Tensor]]
    examples: list[torch.Tensor]
    inputs: list[str]
    outputs: list[str]
    axes: Mapping[str, Mapping[int, str]]
    notes: list[str]
    dims: Sequence[frozenset[int]]

    def fixed_sizes(self) -> list[str]:
        """Sizes that were to vary, and do not: capture has fixed them, or a pass after it."""
        return [*_fixed_sizes(self.gm, self.dims)]

    def move_to_cpu(self) -> None:
        """Let the graph and everything that it reads lie on the CPU: a file has no devices."""
        put_on(self.gm, "cpu")
        self.state = {key: (name, value.cpu()) for key, (name, value) in self.state.items()}
        self.examples = [value.cpu() for value in self.examples]


def capture_inference(
    model: nn.Module,
    state: State,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: DynamicShapes,
    weights: str,
) -> Inference:
    """Capture one call in eval mode; the model's own mode is restored.

    Raises:
        ExportError: The call cannot be one graph, or its results are not tensors.
    """
    leaves, spec = flatten(state.bind(model, args, kwargs))
    names = argument_names(spec)
    dims, axes = _dynamic(dynamic, leaves, names)
    with _in_eval_mode(model), torch.no_grad(), whole_operators:
        call = Call(leaves, spec, names, dims, forward_only=True)
        captured = _capture(state, model, call)
        outputs = output_names(captured.output)
        values = state_values(model, captured, weights)
    notes = [
        f"the file does not do what forward assigns to {_path(a)}" for a in captured.assignments
    ]
    gm = captured.graph_module
    outputs, left_out = _keep_tensors(gm, outputs, captured.output)
    notes += left_out
    _drop_gradients(gm)
    _cast_in_file(gm, values)
    slots = [n.meta["slot"] for n in gm.graph.find_nodes(op="placeholder")]
    places = [slot.index for slot in slots if slot.kind == "input"]
    state_of_graph = {
        node.name: values[node.meta["slot"]]
        for node in gm.graph.find_nodes(op="placeholder")
        if node.meta["slot"].kind != "input"
    }
    return Inference(
        gm, state_of_graph, [leaves[i] for i in places], [names[i] for i in places], outputs,
        axes, notes, dims,
    )  # fmt: skip


def _fixed_sizes(gm: fx.GraphModule, dims: Sequence[frozenset[int]]) -> Iterator[str]:
    for node in gm.graph.find_nodes(op="placeholder"):
        slot = node.meta["slot"]
        for dim in sorted(dims[slot.index]) if slot.kind == "input" else ():
            size = node.meta["val"].shape[dim]
            if isinstance(size, int) or size.node.expr.is_number:
                why = (
                    "give an example with a larger one"
                    if size == 1
                    else ("the model computes with it as a number")
                )
                yield f"{slot.target}: the size {size} of dimension {dim} is fixed; {why}"


def _path(assignment: Any) -> str:
    return f"{assignment.module}.{assignment.name}".strip(".")


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _capture(state: State, model: nn.Module, call: Call) -> Captured:
    if state.settings.capture == "dynamo":
        raise ExportError(
            "the model was converted with capture='dynamo', which splits it into several graphs; "
            "an ONNX file is one. Convert it with capture='auto' or 'export'."
        )
    failure: BaseException
    try:
        return export_call(state, model, call, state.context())[0]
    except MPGraphError:
        raise
    except (NeedsDynamo, Exception) as error:
        failure = error
    where = getattr(failure, "where", "")
    reason = getattr(failure, "reason", None) or (str(failure) or repr(failure)).splitlines()[0]
    raise ExportError(
        f"{type(model).__name__} cannot be one graph, and an ONNX file is one: {reason}."
        + (f"\n  from: {where}" if where else "")
        + "\nWhere that part is not needed for inference, skip it in eval mode "
        "(if self.training: ...)."
    ) from failure


def _dynamic(
    dynamic: DynamicShapes, leaves: Sequence[Any], names: Sequence[str]
) -> tuple[list[frozenset[int]], Mapping[str, Mapping[int, str]]]:
    if dynamic is True:
        return [likely_dynamic(leaf) for leaf in leaves], {}
    if dynamic is False:
        return [frozenset()] * len(leaves), {}
    unknown = sorted(set(dynamic) - set(names))
    if unknown:
        raise ExportError(
            f"dynamic names {', '.join(map(repr, unknown))}, but the inputs are "
            f"{', '.join(map(repr, names))}"
        )
    return [frozenset(dynamic.get(name, {})) for name in names], dynamic


def output_names(spec: Spec) -> list[str]:
    """A name for every tensor in a model's result: ``logits``, ``output``, ``output_0``.

    Raises:
        ExportError: The result holds numbers, which a file cannot return.
    """
    _refuse_numbers(spec)
    return [_output_name(name) for name in leaf_names(spec)]


def _output_name(name: str) -> str:
    if not name:
        return "output"
    return f"output_{name}" if name[0].isdigit() else name


def _refuse_numbers(spec: Spec) -> None:
    parts = [("", spec)]
    if isinstance(spec, Container):
        parts = list(zip(spec.names, spec.children, strict=True))
    for name, part in parts:
        if isinstance(part, Plain) and isinstance(part.value, (int, float, str)):
            where = f" as output {name!r}" if name else ""
            raise ExportError(
                f"forward returns {part.value!r}{where}, which is no tensor: an ONNX file returns "
                "tensors alone. Return it as a tensor, or leave it out in eval mode."
            )


def state_values(
    model: nn.Module, captured: Captured, weights: str
) -> dict[Slot, tuple[str, torch.Tensor]]:
    """For every parameter, buffer and constant that the graph reads, its name and value.

    With ``weights="16-bit"``, a parameter that is read through a cast is stored as that cast
    yields it, which is exact.
    """
    found: dict[Slot, tuple[str, torch.Tensor]] = {}
    taken: set[str] = set()
    for node in captured.graph_module.graph.find_nodes(op="placeholder"):
        slot: Slot = node.meta["slot"]
        if slot.kind == "input":
            taken.add(slot.target)
            continue
        if slot.kind == "scale":
            continue
        name = slot.target
        while name in taken:
            name = f"{name}_{ir.short_name(slot.dtype)}" if slot.dtype else f"{name}_"
        taken.add(name)
        found[slot] = (name, _value(model, captured, slot, weights))
    return found


def _value(model: nn.Module, captured: Captured, slot: Slot, weights: str) -> torch.Tensor:
    if slot.kind == "constant":
        return cast(torch.Tensor, captured.constants[slot.target]).detach()
    table, name = home_of(model, slot)
    value: torch.Tensor = table[name].detach()
    # An fp32 copy of a 16-bit parameter is made in the file: it holds no more than the parameter.
    narrower = slot.dtype is not None and slot.dtype.itemsize < value.dtype.itemsize
    return value.to(slot.dtype) if narrower and weights == "16-bit" else value


def _keep_tensors(
    gm: fx.GraphModule, names: Sequence[str], spec: Spec
) -> tuple[list[str], list[str]]:
    """Return the model's tensors alone: their names, and notes of what is left out.

    What forward assigns to modules is left out, and so are sizes deep inside of a result, such as
    the length that a key-value cache counts. A size that is a result itself is refused.
    """
    output = gm.graph.output_node()
    results = cast("tuple[Any, ...]", output.args[0])[: len(names)]
    kept = [(n, r) for n, r in zip(names, results, strict=True) if _is_tensor(r)]
    others = [n for n, r in zip(names, results, strict=True) if not _is_tensor(r)]
    shallow = {"output", *(_output_name(name) for name in getattr(spec, "names", ()))}
    if refused := [name for name in others if name in shallow]:
        raise ExportError(
            f"forward returns a size or a number ({refused[0]}); an ONNX file returns tensors "
            "alone. Return it as a tensor, or leave it out in eval mode."
        )
    output.args = (tuple(result for _, result in kept),)
    return [name for name, _ in kept], [
        f"{name} is a number; the file leaves it out" for name in others
    ]


def _is_tensor(result: Any) -> bool:
    return isinstance(result, fx.Node) and ir.is_tensor(result.meta.get("val"))


def _drop_gradients(gm: fx.GraphModule) -> None:
    """Casts without their backward; no gradient-mode switches."""
    for body in ir.all_graphs(gm):
        for node in list(body.graph.nodes):
            if node.target in (ops.LOWER, ops.WIDEN):
                node.target, node.args = ir.CAST, node.args[:2]
            elif node.target is ir.SET_GRAD:
                body.graph.erase_node(node)
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.meta["slot"].kind == "scale":
            gm.graph.erase_node(node)
    gm.recompile()


def _cast_in_file(gm: fx.GraphModule, values: Mapping[Slot, tuple[str, torch.Tensor]]) -> None:
    """Where a parameter is stored in another dtype than the copy that the graph takes, cast it."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    first = placeholders[-1].next
    masters = {n.meta["slot"].target: n for n in placeholders if n.meta["slot"].kind == "parameter"}
    for node in placeholders:
        slot: Slot = node.meta["slot"]
        stored = values[slot][1].dtype if slot in values else slot.dtype
        if slot.kind != "cast" or slot.dtype is None or stored is None or stored is slot.dtype:
            continue
        readers = list(node.users)
        node.meta["val"] = ir.retype(node.meta["val"], stored)
        master = masters.setdefault(slot.target, node)
        made = ir.add_cast(gm.graph, master, slot.dtype, before=first)
        for reader in readers:
            reader.replace_input_with(node, made)
        if master is not node:
            gm.graph.erase_node(node)
    gm.recompile()


def set_io_dtypes(gm: fx.GraphModule, io: frozenset[torch.dtype], inputs: Sequence[str]) -> None:
    """Make inputs and outputs fp32 where their 16-bit dtype is not among ``io``."""
    graph = gm.graph
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        dtype = ir.dtype_of(node)
        if dtype is None or node.meta["slot"].kind != "input":
            continue
        if dtype in ir.ELIGIBLE and dtype not in io:
            readers = list(node.users)
            node.meta["val"] = ir.retype(node.meta["val"], torch.float32)
            made = ir.add_cast(graph, node, dtype, before=first)
            for reader in readers:
                reader.replace_input_with(node, made)
    output = graph.output_node()
    results = [_fit(graph, node, io) for node in cast("tuple[fx.Node, ...]", output.args[0])]
    output.args = (tuple(_apart(graph, results)),)
    gm.recompile()


def _fit(graph: fx.Graph, node: fx.Node, io: frozenset[torch.dtype]) -> fx.Node:
    if ir.dtype_of(node) in io or ir.dtype_of(node) not in ir.ELIGIBLE:
        return node
    return ir.add_cast(graph, node, torch.float32, before=graph.output_node())


def _apart(graph: fx.Graph, results: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """One node per output, none of them an input: each has a name of its own in the file."""
    seen: set[fx.Node] = set()
    for node in results:
        if node in seen or node.op == "placeholder":
            with graph.inserting_before(graph.output_node()):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta = {**node.meta, "captured": node.meta["val"]}
            node = copy
        seen.add(node)
        yield node


__all__ = ["Inference", "capture_inference", "count_leaves", "output_names", "set_io_dtypes"]
