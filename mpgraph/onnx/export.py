"""A converted model as an ONNX inference file."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import mpgraph
from mpgraph.conversion import convert
from mpgraph.errors import ExportError
from mpgraph.finding import converted_modules
from mpgraph.module import MixedPrecision, State, state_of
from mpgraph.onnx import files, self_check
from mpgraph.onnx.extra import has_runtime, require_onnx
from mpgraph.onnx.inference import DynamicShapes, Inference, capture_inference, set_io_dtypes
from mpgraph.onnx.naming import axis_names, name_axes, name_nodes
from mpgraph.onnx.program import as_program, make_functional
from mpgraph.onnx.random_numbers import refuse_random
from mpgraph.onnx.report import Check, ExportReport, count_nodes
from mpgraph.onnx.targets import HALVES, Target, TargetContext, target_of
from mpgraph.onnx.translate import translate
from mpgraph.passes.legalize import legalize
from mpgraph.pipeline import run_passes
from mpgraph.policy import Policy
from mpgraph.runtime.providers import with_options
from mpgraph.warn import warn

_FP32 = frozenset({torch.float32})


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: torch.Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    target: str = "cpu",
    opset: int | None = None,
    io_dtype: str = "fp32",
    weights: str = "16-bit",
    dynamic: DynamicShapes = True,
    verify: bool = True,
    external_data: bool | None = None,
    precision: str | torch.dtype | None = None,
    policy: Policy | str | Mapping[str, Any] | os.PathLike[str] = "default",
) -> ExportReport:
    """Write ``model`` as an ONNX inference file that computes in its mixed precision.

    The file holds the nodes of the rewritten graph, in eval mode, as standard ONNX operators that
    a stock runtime loads: 16-bit where the policy says so, rounding and overflowing node by node
    as it does, even where the runtime lacks 16-bit arithmetic. Its inputs are named like the
    arguments of ``forward``, its outputs like the fields of the result. It is there whole or not
    at all.

    Args:
        model: A model from :func:`mpgraph.convert`, or any module together with ``precision``.
        path: The file to write; its folder must exist.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        target: "cpu", "cuda", "portable" (any runtime with casts) or "web".
        opset: The version of the ai.onnx operators, 18 to 23; the target's own by default.
        io_dtype: "fp32" for float32 inputs and outputs; "native" for those of the graph.
        weights: "16-bit" stores a parameter that is only read through a cast in 16 bit; "fp32"
            stores it in float32, and the file casts it.
        dynamic: Whether batch and sequence sizes may vary; or names of dimensions by input, such
            as ``{"x": {0: "batch"}}``; all others are fixed.
        verify: Run the file in onnxruntime, if it is installed, and compare it with torch.
        external_data: Keep the weights in ``<path>.data``; by default beyond 1.9 GB only.
        precision: For a model that is not converted: as in :func:`mpgraph.convert`.
        policy: Likewise.

    Returns:
        What was written, and how close it is; print it.

    Raises:
        ExportError: The call cannot be one graph; an operator has no translation (names it, its
            node, module and line); the file is wrong; an option is unknown; or the onnx extra is
            not installed.
    """
    require_onnx()
    where, file = target_of(target, opset), files.target_path(path)
    _choice("io_dtype", io_dtype, ("fp32", "native"))
    _choice("weights", weights, ("16-bit", "fp32"))
    model, state = _converted(model, precision, policy)
    args, kwargs = _call(example_inputs)
    notes = _notes(model)
    graph = capture_inference(model, state, args, kwargs, dynamic, weights)
    set_io_dtypes(graph.gm, _FP32 if io_dtype == "fp32" else where.io, graph.inputs)
    converted = _run(graph.gm, graph.state, graph.examples) if verify else []
    graph.move_to_cpu()
    exported, values, model_file = _lower(graph, where, state)
    _describe(model_file, state, where)
    with files.unfinished(file) as unfinished:
        size = files.save(model_file, unfinished, external_data)
        files.check(unfinished)
        check, notes = None, [*notes, *graph.notes]
        if verify and not has_runtime():
            notes.append("not checked: onnxruntime is not installed")
        elif verify:
            check = _check(unfinished, graph, (exported, values), converted, state, where, notes)
    return _report(file, state, where, model_file, size, check, notes)


def _choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ExportError(f"{name} must be {' or '.join(map(repr, known))}, found {value!r}")


def _converted(model: Any, precision: Any, policy: Any) -> tuple[nn.Module, State]:
    if isinstance(model, MixedPrecision):
        if precision is not None:
            raise ExportError(
                "the model is already converted; precision= is for one that is not. Convert the "
                "original again to export it in another precision."
            )
        return model, state_of(model)  # type: ignore[return-value]
    if precision is not None:
        converted: Any = convert(model, precision, policy=policy)
        return converted, state_of(converted)
    paths = [path for path in converted_modules(model) if path]
    raise ExportError(
        f"{type(model).__name__} is not converted, only its part {paths[0]!r} is. Export that "
        f"part, model.get_submodule({paths[0]!r}), or convert the whole model."
    )


def _call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _notes(model: nn.Module) -> list[str]:
    if not model.training:
        return []
    warn(
        "the model is in training mode; the file holds its inference (eval mode). The model "
        "itself stays in training mode."
    )
    return ["the model was in training mode; the file holds its eval mode"]


def _lower(graph: Inference, target: Target, state: State) -> tuple[fx.GraphModule, Any, Any]:
    """The functional graph that the target can run, its state, and the ONNX model made of it."""
    program = as_program(graph.gm, graph.state, functional=False)
    half_products = any(target.runs("Gemm", dtype) for dtype in HALVES)
    gm, values = make_functional(program, target.opset, half_products=half_products)
    refuse_random(gm.graph)
    graph.notes += [f"the file does not do what forward writes to {n}" for n in gm.meta["writes"]]
    settings = state.settings
    context = TargetContext(settings.policy, settings.precision.compute, target=target)
    run_passes(gm, [legalize], context)
    made = translate(gm, graph.inputs, graph.outputs, opset=target.opset, state=values)
    graph.notes += graph.fixed_sizes()
    name_axes(made, axis_names(gm, graph.inputs, graph.axes, values))
    name_nodes(made)
    return gm, values, made


def _run(gm: fx.GraphModule, state: Any, examples: Sequence[Any]) -> list[torch.Tensor]:
    """What the graph yields in torch."""
    inputs = iter(examples)
    values = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = state[node.name][1] if node.name in state else next(inputs)
        values.append(value.to(node.meta["val"].dtype).clone())
    with torch.no_grad():
        return list(gm(*values))


def _check(
    file: Path,
    graph: Inference,
    exported: tuple[fx.GraphModule, Any],
    converted: Sequence[torch.Tensor],
    state: State,
    target: Target,
    notes: list[str],
) -> Check | None:
    inputs = [node for node in exported[0].graph.find_nodes(op="placeholder")]
    dtypes = [n.meta["val"].dtype for n in inputs if n.name not in exported[1]]
    values = [v.to(dtype) for v, dtype in zip(graph.examples, dtypes, strict=True)]
    try:
        provider = with_options(target.provider, state.settings.precision.name)
        found = self_check.run_file(file, graph.inputs, values, provider)
    except self_check.Unavailable:
        notes.append(f"not checked: {target.provider} does not run here")
        return None
    compute = state.settings.precision.compute
    check = self_check.compare(found, _run(*exported, graph.examples), converted, compute)
    self_check.demand(check, compute, target)
    return check


def _describe(model: Any, state: State, target: Target) -> None:
    """Say in the file what it is, and what made it."""
    facts = {
        "mpgraph.version": mpgraph.__version__,
        "mpgraph.precision": state.settings.precision.name,
        "mpgraph.policy": str(state.settings.policy),
        "mpgraph.target": target.name,
        "mpgraph.opset": str(target.opset),
        "mpgraph.torch": torch.__version__,
        "mpgraph.python": platform.python_version(),
    }
    model.producer_name, model.producer_version = "mpgraph", mpgraph.__version__
    model.graph.name = state.original.__name__
    model.metadata_props.update(facts)
    model.graph.doc_string = ", ".join(
        f"{name.removeprefix('mpgraph.')} {value}" for name, value in facts.items()
    )


def _report(
    file: Path, state: State, target: Target, model: Any, size: int, check: Check | None,
    notes: Sequence[str],
) -> ExportReport:  # fmt: skip
    nodes, half, casts = count_nodes(model)
    return ExportReport(
        str(file), target.name, target.opset, state.settings.precision.name, nodes, half, casts,
        size, _shapes(model.graph.inputs), _shapes(model.graph.outputs), check, tuple(notes),
    )  # fmt: skip


def _shapes(values: Any) -> tuple[str, ...]:
    return tuple(
        f"{value.name}: {_DTYPES.get(value.dtype.name, value.dtype.name.lower())}"
        f"[{', '.join(str(getattr(dim, 'value', dim)) for dim in value.shape)}]"
        for value in values
    )


_DTYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}
_DTYPES |= {"INT64": "i64", "INT32": "i32", "BOOL": "bool", "UINT8": "u8", "INT8": "i8"}
