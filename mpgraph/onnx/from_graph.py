"""From a graph of ATen operators to an ONNX model with named inputs and outputs.

The exporter of ``torch.onnx`` translates. What it would do afterwards to "optimize" is not exact:
it deletes ``+ eps`` for an eps up to 1e-8, and factors within 1e-5 of 1. So only passes that change
no value run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.onnx.functional import drop_copies
from mpgraph.onnx.lower import lower
from mpgraph.onnx.program import quiet
from mpgraph.onnx.translate import FOLDED_ELEMENTS


def translate(
    gm: fx.GraphModule,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    opset: int = 18,
    dims: Mapping[str, str] | None = None,
) -> Any:
    """An ``onnx_ir.Model`` that computes what a graph computes, in standard operators.

    Args:
        gm: A graph without writes, of ATen operators on fake values of one mode, which returns a
            flat tuple. It stays as it is.
        inputs: A name for every placeholder.
        outputs: A name for every result.
        opset: The version of the ai.onnx operators, from 18 to 23.
        dims: New names for symbolic sizes.

    Raises:
        ExportError: An operator has no translation; names it, its node and the user's line.
    """
    lowered = lower(gm, opset)
    _refuse_unknown(lowered, opset)
    with quiet():  # of what onnx's reference evaluator cannot fold, too
        try:
            model = _translated(lowered, opset)
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(_untranslated(error)) from error
        _tell_origins(model)
        clean(model)
    _rename(model, inputs, outputs, dims or {})
    return model


def _translated(gm: fx.GraphModule, opset: int) -> Any:
    """What ``torch.onnx.export`` does once it has decomposed a program.

    From its parts, because it would decompose a second time: that takes as long as all the rest,
    and knows nothing of mpgraph's rows.
    """
    from torch.onnx._internal.exporter import _core

    from mpgraph.onnx.registry import registry

    drop_copies(gm.graph)
    _keep_outputs_apart(gm.graph)
    program = _core._exported_program_to_onnx_program(as_program(gm), registry=registry(opset))
    return vars(_core)["onnxscript_apis"].convert_version(program.model, opset)


def as_program(gm: fx.GraphModule) -> ExportedProgram:
    """An exported program around a graph, whose inputs and outputs are all the user's."""
    graph = gm.graph
    taken: list[Any] = [TensorArgument(n.name) for n in graph.find_nodes(op="placeholder")]
    returned: Any = graph.output_node().args[0]
    given: list[Any] = [TensorArgument(node.name) for node in returned]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, argument, None) for argument in taken],
        [OutputSpec(OutputKind.USER_OUTPUT, argument, None) for argument in given],
    )
    constants = _lift(gm, signature)
    in_spec, out_spec = (pytree.tree_flatten(v)[1] for v in ((tuple(taken), {}), tuple(given)))
    call = ModuleCallEntry("", ModuleCallSignature(taken, given, in_spec, out_spec))
    return ExportedProgram(
        root=gm, graph=graph, graph_signature=signature, state_dict={}, range_constraints={},
        module_call_graph=[call], constants=constants,
    )  # fmt: skip


def _lift(gm: fx.GraphModule, signature: ExportGraphSignature) -> dict[str, Any]:
    """Make inputs of the tensors that a graph holds; by name, their values."""
    constants: dict[str, Any] = {}
    first = next(iter(gm.graph.nodes))
    for node in list(gm.graph.find_nodes(op="get_attr")):
        name = str(node.target)
        tensor = getattr(gm, name)
        if name not in constants:
            with gm.graph.inserting_before(first):
                place = gm.graph.placeholder(name)
            place.meta = dict(node.meta)
            place.meta.setdefault("val", tensor)
            spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(place.name), name)
            signature.input_specs.insert(len(constants), spec)
            constants[name] = tensor
        place = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.target == name)
        node.replace_all_uses_with(place)
        gm.graph.erase_node(node)
    return constants


def _keep_outputs_apart(graph: fx.Graph) -> None:
    """A copy of every result that is an input, or that is returned twice: ONNX names each once."""
    output = graph.output_node()
    seen: set[fx.Node] = set()
    results: list[Any] = []
    for node in output.args[0]:  # type: ignore[union-attr]
        assert isinstance(node, fx.Node)
        if node.op != "call_function" or node in seen:
            with graph.inserting_before(output):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta = dict(node.meta)
            node = copy
        seen.add(node)
        results.append(node)
    output.args = (tuple(results),)


def _refuse_unknown(gm: fx.GraphModule, opset: int) -> None:
    from mpgraph.onnx.registry import registry

    known = registry(opset)
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and not known.is_registered(node.target):
            raise ExportError(
                f"there is no translation of {node.target} (node {node.name}"
                f"{_place(node)}) to ONNX. Write it in other operators, or keep it out of the step."
            )


def _place(node: fx.Node) -> str:
    path, trace = node.meta.get("module_path"), str(node.meta.get("stack_trace") or "").strip()
    where = f", of {path}" if path else ""
    return f"{where}, from\n{trace}\n" if trace else where


def _untranslated(error: Exception) -> str:
    reason = error
    while reason.__cause__ is not None:
        reason = reason.__cause__  # type: ignore[assignment]
    first = str(error).strip().splitlines()
    text = str(reason).strip().splitlines()
    return f"torch.onnx cannot translate the graph: {' '.join(text[:3] or first[:1])}"


def _tell_origins(model: Any) -> None:
    """Say of each node which module and line it comes from, instead of what torch.onnx says."""
    for node in model.graph:
        origin = node.meta.get("node")
        node.metadata_props.clear()
        if origin is not None:
            told = {"part": origin.meta.get("part"), "module": origin.meta.get("module_path")}
            node.metadata_props.update({k: str(v) for k, v in told.items() if v})
            if line := ir.source_line(origin):
                node.metadata_props["line"] = line
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()


def clean(model: Any) -> None:
    """Make a model smaller by passes that change no value."""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants_ir

    common: Any = passes
    common.InlinePass()(model)
    fold_constants_ir(model, output_size_limit=FOLDED_ELEMENTS)
    for clean_up in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        clean_up(model)


def _rename(
    model: Any, inputs: Sequence[str], outputs: Sequence[str], dims: Mapping[str, str]
) -> None:
    from torch.onnx._internal.exporter import _ir_passes

    _keep_names_apart(model)
    taken = {*inputs, *outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_inside"
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = f"{value.name}_port"
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
            value.metadata_props.clear()
    if dims:
        renamed: dict[Any, str] = {**dims}
        _ir_passes.rename_axis(model, renamed)
    model.graph.metadata_props.clear()


def _keep_names_apart(model: Any) -> None:
    """A copy of each result that is also another result: one value has one name."""
    import onnx_ir

    seen = set(model.graph.inputs)
    for index, value in enumerate(model.graph.outputs):
        if value in seen:
            node = onnx_ir.node("Identity", [value])
            model.graph.append(node)
            (copy,) = node.outputs
            copy.shape, copy.type = value.shape, value.type
            copy.name = f"{value.name}_again_{index}"
            model.graph.outputs[index] = copy
        seen.add(value)
