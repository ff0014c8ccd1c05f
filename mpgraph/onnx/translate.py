"""From a graph of ATen operators to an ONNX model with named inputs and outputs.

The exporter of ``torch.onnx`` translates. What it would do afterwards to "optimize" is not exact:
it deletes ``+ eps`` for an eps up to 1e-8, and factors within 1e-5 of 1. So only passes that change
no value run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.onnx.equal_nodes import share_equal_nodes
from mpgraph.onnx.extra import library
from mpgraph.onnx.functional import drop_copies
from mpgraph.onnx.lower import lower
from mpgraph.onnx.program import NO_STATE, State, as_program, describe_node, quiet
from mpgraph.onnx.registry import registry
from mpgraph.onnx.repeated import RepeatedTranslations

# Larger constants stay computed: folding would write what depends on example sizes into the file.
FOLDED_ELEMENTS = 1024
# What a node says of where it comes from.
PART, MODULE, LINE = "part", "module", "line"


def translate(
    gm: fx.GraphModule,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    opset: int = 18,
    state: State = NO_STATE,
) -> Any:
    """An ``onnx_ir.Model`` that computes what a graph computes, in standard operators.

    Every node says where it comes from: see :data:`PART`, :data:`MODULE` and :data:`LINE`.

    Args:
        gm: A graph without writes, of ATen operators on fake values of one mode, which returns a
            flat tuple. It stays as it is.
        inputs: A name for every placeholder that is an input.
        outputs: A name for every result.
        opset: The version of the ai.onnx operators, from 18 to 23.
        state: For every other placeholder, by its name: the name and the value in the model.

    Raises:
        ExportError: An operator has no translation; names it, its node and the user's line.
    """
    lowered = lower(gm, opset)
    for body in ir.all_graphs(lowered):
        _refuse_untranslated(body.graph, opset)
    with quiet():  # of what onnx's reference evaluator cannot fold, too
        model = _translated(lowered, state, opset)
        clean(model, {name for name, _ in state.values()})
    _check_opsets(model, opset)
    _rename(model, inputs, outputs)
    return model


def _refuse_untranslated(graph: fx.Graph, opset: int) -> None:
    known = registry(opset)
    lacking = [n for n in graph.nodes if ir.is_operator(n) and not known.is_registered(n.target)]
    if lacking:
        raise ExportError(
            "there is no translation to ONNX of:\n"
            + "\n".join(dict.fromkeys(map(describe_node, lacking)))
            + "\nWrite that part in other operators, or export the model without it."
        )


def _translated(gm: fx.GraphModule, state: State, opset: int) -> Any:
    """What ``torch.onnx.export`` does once it has decomposed a program.

    From its parts, because it would decompose a second time: that takes as long as all the rest,
    and knows nothing of mpgraph's rows.
    """
    from torch.onnx._internal.exporter import _core

    drop_copies(gm.graph)
    _keep_outputs_apart(gm.graph)
    described = {node.name: describe_node(node) for node in gm.graph.nodes}
    program = as_program(gm, state)
    known: Any = RepeatedTranslations(registry(opset))
    try:
        made = _core._exported_program_to_onnx_program(program, registry=known)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_why(described, error)) from error
    _tell_origins(made.model)  # first: the nodes of another version know it from these
    if made.model.opset_imports.get("") == opset:
        return made.model
    return vars(_core)["onnxscript_apis"].convert_version(made.model, opset)


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


def _why(described: Mapping[str, str], error: BaseException) -> str:
    match = re.search(r"Error when translating node %(\w+)", _all_messages(error))
    if match is None or match[1] not in described:
        return f"torch.onnx cannot translate the graph: {_first_cause(error)}"
    return f"torch.onnx cannot translate:\n{described[match[1]]}\n{_first_cause(error)}"


def _all_messages(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "\n".join(texts)


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _tell_origins(model: Any) -> None:
    """Say of each node which module and line it comes from, instead of what torch.onnx says."""
    for node in model.graph:
        origin = node.meta.get("node")
        node.metadata_props.clear()
        if origin is not None:
            told = {
                PART: origin.meta.get("part"),
                MODULE: ir.module_path(origin),
                LINE: ir.source_line(origin),
            }
            node.metadata_props.update({k: str(v) for k, v in told.items() if v})


def clean(model: Any, weights: Set[str]) -> None:
    """Make a model smaller by passes that change no value.

    Weights, given by their names, stay as they are stored.
    """
    passes, optimizer = library("onnx_ir.passes.common"), library("onnxscript.optimizer")

    def should_fold(node: Any) -> bool | None:
        return None if weights.isdisjoint(v.name for v in node.inputs if v is not None) else False

    passes.InlinePass()(model)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=FOLDED_ELEMENTS,
        output_size_limit=FOLDED_ELEMENTS,
        should_fold=should_fold,
    )
    for clean_up in (
        passes.RemoveUnusedNodesPass(),
        share_equal_nodes,
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
    ):
        clean_up(model)


def _check_opsets(model: Any, opset: int) -> None:
    found = dict(model.graph.opset_imports) or dict(model.opset_imports)
    if found != {"": opset}:
        raise ExportError(
            f"the model came out with operators of {found} instead of ai.onnx opset {opset}: "
            "torch.onnx translates to opset 18 and could not convert that. Try opset=18."
        )


def _rename(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
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
    for value in all_values(model):
        value.metadata_props.clear()
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


def all_values(model: Any) -> Any:
    """Every value of a model: inputs, initializers, what nodes yield."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs
