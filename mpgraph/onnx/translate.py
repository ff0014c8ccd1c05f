"""From a functional graph to an ONNX model, by torch.onnx and exact clean-up alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.onnx.extra import library
from mpgraph.onnx.program import describe_node, quiet
from mpgraph.onnx.targets import Target

# Larger constants stay computed: folding would write what depends on example sizes into the file.
FOLDED_ELEMENTS = 1024


def translate(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], target: Target
) -> Any:
    """The program as an ``onnx_ir.Model`` of standard operators at the target's opset.

    ``torch.onnx.export(optimize=True)`` would delete additions of small constants and products
    with constants near one; it is off, and what is cleaned up is exact.

    Raises:
        ExportError: torch.onnx cannot translate a node; names it.
    """
    described = {node.name: describe_node(node) for node in program.graph.nodes}
    for node in program.graph.nodes:
        # torch.onnx writes it into the file, for every node: the user's line is enough.
        node.meta["stack_trace"] = ir.source_line(node)
    try:
        with quiet():
            made: Any = torch.onnx.export(
                program, (), dynamo=True, optimize=False, verbose=False,
                input_names=list(inputs), output_names=list(outputs), opset_version=target.opset,
            )  # fmt: skip
    except Exception as error:
        raise ExportError(_why(described, error)) from error
    model = made.model
    with quiet():  # of what onnx's reference evaluator cannot fold
        clean(model)
    _check_opsets(model, target)
    return model


def _why(described: Mapping[str, str], error: BaseException) -> str:
    match = re.search(r"Error when translating node %(\w+)", _all_messages(error))
    if match is None or match[1] not in described:
        return f"torch.onnx cannot export the graph: {_first_cause(error)}"
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


def clean(model: Any) -> None:
    """Inline functions, fold small constants, merge equal nodes, drop dead ones: exactly."""
    passes, optimizer = library("onnx_ir.passes.common"), library("onnxscript.optimizer")

    passes.InlinePass()(model)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=FOLDED_ELEMENTS,
        output_size_limit=FOLDED_ELEMENTS,
        should_fold=_reads_no_weight,
    )
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)


def _reads_no_weight(node: Any) -> bool | None:
    """Weights stay as they are stored, and keep their names."""
    if any(value is not None and value.is_initializer() for value in node.inputs):
        return False
    return None


def _check_opsets(model: Any, target: Target) -> None:
    found = dict(model.graph.opset_imports) or dict(model.opset_imports)
    if found != {"": target.opset}:
        raise ExportError(
            f"the model came out with operators of {found} instead of ai.onnx opset "
            f"{target.opset}: torch.onnx translates to opset 18 and could not convert that. Try "
            "opset=18."
        )


def name_axes(model: Any, names: Mapping[str, str]) -> None:
    """Give symbolic dimensions readable names, in expressions too: ``2*batch``."""
    onnx_ir = library("onnx_ir")

    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(size: Any) -> Any:
        # An unknown size stays unknown: as a name, "None" would say that all of them are equal.
        text = getattr(size, "value", None)
        return pattern.sub(lambda m: names[m[1]], text) if isinstance(text, str) else size

    for value in _values(model):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(map(renamed, value.shape))


def _values(model: Any) -> Any:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def axis_names(
    gm: fx.GraphModule, inputs: Sequence[str], given: Mapping[str, Mapping[int, str]], state: Any
) -> dict[str, str]:
    """For each symbol in an input's shape, a name: the caller's, or batch, sequence and so on."""
    names: dict[str, str] = {}
    nodes = [n for n in gm.graph.find_nodes(op="placeholder") if n.name not in state]
    for node, name in zip(nodes, inputs, strict=True):
        value = node.meta["val"]
        for dim, size in enumerate(value.shape):
            symbol = "" if isinstance(size, int) else str(size.node.expr)
            if symbol.isidentifier() and symbol not in names:
                wanted = given.get(name, {}).get(dim) or _usual_name(value, dim, name)
                taken = wanted in names.values()
                names[symbol] = f"{wanted}_{name}" if taken else wanted
    return names


def _usual_name(value: torch.Tensor, dim: int, name: str) -> str:
    if dim == 0:
        return "batch"
    is_sequence = value.dim() == 3 or (value.dim() == 2 and not value.is_floating_point())
    return "sequence" if dim == 1 and is_sequence else f"{name}_dim_{dim}"


def describe_nodes(model: Any) -> None:
    """Name every node by its module and operator, and say where in the user's code it is from."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        module, line = _origin(node)
        base = f"{module}/{node.op_type}" if module else str(node.op_type)
        number = counts[base] = counts.get(base, -1) + 1
        node.name = f"{base}_{number}" if number else base
        node.metadata_props.clear()
        node.doc_string = None
        if module:
            node.metadata_props["mpgraph.module"] = module
        if line:
            node.metadata_props["mpgraph.line"] = line
    for value in _values(model):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _origin(node: Any) -> tuple[str, str]:
    """The module path and the user's line, from what torch.onnx wrote down."""
    spaces = [part.partition(": ")[0] for part in _namespace(node).split("/")]
    path = spaces[-2] if len(spaces) > 1 else ""
    line = str(node.metadata_props.get("pkg.torch.onnx.stack_trace", ""))
    return path.removeprefix("model").removeprefix("."), line


def _namespace(node: Any) -> str:
    return str(node.metadata_props.get("namespace", ""))
