"""A whole training step as a folder that onnxruntime trains from, without torch."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from mpgraph.onnx.chunk_updates import chunk_updates
from mpgraph.onnx.extra import library
from mpgraph.onnx.files import check
from mpgraph.onnx.forward_trace import answers, evaluation
from mpgraph.onnx.in_place import in_place
from mpgraph.onnx.naming import name_axes
from mpgraph.onnx.one_device import put_on
from mpgraph.onnx.result_order import order_results
from mpgraph.onnx.rounding import IR_VERSION, write_rounding
from mpgraph.onnx.size_arithmetic import sizes_computed_once
from mpgraph.onnx.step_check import check_step, given_of, in_torch, reference
from mpgraph.onnx.step_files import (
    dtype_name,
    next_name,
    state_of_ports,
    tensor_of,
    value_of,
    write_tensors,
)
from mpgraph.onnx.step_report import ExportedStep
from mpgraph.onnx.step_trace import StepGraph, trace_step
from mpgraph.onnx.targets import Target, target_of
from mpgraph.onnx.translate import translate
from mpgraph.onnx.uncollected import uncollected
from mpgraph.passes.counter_dropout import SEED
from mpgraph.runtime import manifest as files
from mpgraph.runtime.providers import with_options
from mpgraph.structure import Spec

if TYPE_CHECKING:
    from mpgraph.step.train_step import TrainStep


_NEEDED = ("onnx", "onnxruntime", "onnxscript", "safetensors")


def export_step(
    step: TrainStep,
    folder: Any,
    leaves: Sequence[Any],
    spec: Spec,
    *,
    target: str = "cpu",
    opset: int | None = None,
    verify: bool = True,
    dynamic: bool = True,
    seed: int = 0,
    inference: bool = True,
) -> ExportedStep:
    """Write the folder of a step; see :meth:`mpgraph.TrainStep.export_onnx`."""
    for name in _NEEDED:
        library(name)
    # Most of the graphs on the way are never run, and need no code.
    with uncollected(), sizes_computed_once(), _use_lazy_graph_module(True):
        return _export(
            step, Path(folder), leaves, spec, target_of(target, opset), verify, dynamic, seed,
            inference,
        )  # fmt: skip


def _export(
    step: TrainStep,
    path: Path,
    leaves: Sequence[Any],
    spec: Spec,
    goal: Target,
    verify: bool,
    dynamic: bool,
    seed: int,
    inference: bool,
) -> ExportedStep:
    graph = trace_step(step, leaves, spec, goal, dynamic=dynamic)
    graphs = {files.TRAIN: graph}
    if inference:
        graphs |= answers(step, graph, evaluation(step, leaves, spec, dynamic), goal)
    models = {name: translated(part, goal) for name, part in graphs.items()}
    pieces = _in_pieces(models[files.TRAIN], graph, goal)
    order_results(models[files.TRAIN].graph)
    put_on(graph.graph_module, step.settings.state.settings.device)  # where torch runs it
    values = _values(graphs.values(), seed)
    manifest = _manifest(step, graphs, models[files.TRAIN], goal, values, pieces)
    path.mkdir(parents=True, exist_ok=True)
    # Beside where it belongs: a step that fails its check leaves what was there.
    with tempfile.TemporaryDirectory(dir=path, prefix=".partial-") as partial:
        made = Path(partial)
        written = _write(made, models, graphs, values, goal)
        error = None
        if verify:
            given = given_of(graph, values, leaves)
            first = in_torch(graph, given)
            provider = with_options(goal.provider, manifest.precision)
            error = check_step(made, graph, given, first, pieces, provider)
            write_tensors(made / files.REFERENCE, reference(graph, given, first))
            written.append(files.REFERENCE)
        sums = {name: files.checksum(made / name) for name in written}
        manifest = dataclasses.replace(manifest, files=sums)
        manifest.write(made)
        for name in (*written, files.MANIFEST):
            (made / name).replace(path / name)
    sizes = {name: (path / name).stat().st_size for name in (*written, files.MANIFEST)}
    return ExportedStep(path, manifest, error, sizes)


def _values(graphs: Iterable[StepGraph], seed: int) -> dict[str, torch.Tensor]:
    """What every input but the batch starts with."""
    found = {p.name: p for graph in graphs for p in graph.ports if p.role != "batch"}
    values = {name: value_of(port) for name, port in found.items()}
    if SEED.name in values:
        values[SEED.name] = torch.tensor(seed)
    return values


def translated(graph: StepGraph, target: Target) -> Any:
    """The step as an ``onnx_ir.Model``."""
    outputs = [*graph.results, *(next_name(port.name) for port in graph.state())]
    inputs = [port.name for port in graph.ports]
    model = translate(graph.graph_module, inputs, outputs, opset=target.opset)
    name_axes(model, {graph.symbol: "batch"} if graph.symbol else {})
    return model


def _in_pieces(model: Any, graph: StepGraph, target: Target) -> dict[str, tuple[int, int]]:
    """Compute large updates in pieces where that helps; by name, the shapes of their state."""
    if not target.piece:
        return {}
    return chunk_updates(model, _following(graph), target.piece)


def _following(graph: StepGraph) -> dict[str, str]:
    return {port.name: next_name(port.name) for port in graph.state()}


def _write(
    path: Path,
    models: Mapping[str, Any],
    graphs: Mapping[str, StepGraph],
    values: Mapping[str, torch.Tensor],
    target: Target,
) -> list[str]:
    """Write every file but the manifest; their names."""
    import onnx_ir

    for name, model in models.items():
        model.ir_version = IR_VERSION
        onnx_ir.save(model, str(path / name))
        check(path / name)
    write_rounding(path / files.ROUNDING, target.opset)
    state, frozen = _names(graphs)
    write_tensors(path / files.STATE, {name: values[name] for name in state})
    written = [*models, files.ROUNDING, files.STATE]
    if frozen:
        write_tensors(path / files.FROZEN, {name: values[name] for name in frozen})
        written.append(files.FROZEN)
    return written


def _names(graphs: Mapping[str, StepGraph]) -> tuple[list[str], list[str]]:
    """The names of what a step writes, and of what nothing does."""
    state = [port.name for port in graphs[files.TRAIN].state()]
    ports = [port for graph in graphs.values() for port in graph.ports]
    frozen = dict.fromkeys(p.name for p in ports if p.role == "frozen" and p.name not in state)
    return state, [*frozen]


def _manifest(
    step: TrainStep,
    graphs: Mapping[str, StepGraph],
    model: Any,
    target: Target,
    values: Mapping[str, torch.Tensor],
    pieces: Mapping[str, tuple[int, int]],
) -> files.Manifest:
    import onnx

    import mpgraph

    train = graphs[files.TRAIN]
    ports = {port.name: port for graph in graphs.values() for port in graph.ports}
    safe = in_place(model, _following(train))
    _, frozen = _names(graphs)
    return files.Manifest(
        precision=step.settings.state.settings.precision.name,
        target=target.name,
        provider=target.provider,
        opset=target.opset,
        accumulation_steps=step.accumulation_steps,
        batch_size="batch" if train.symbol else _batch_size(train),
        state=state_of_ports(train.state(), safe, pieces),
        frozen=tuple(tensor_of(name, ports[name].value, "") for name in frozen),
        numbers=tuple(
            files.Number(p.name, dtype_name(p.value.dtype), float(values[p.name]))
            for p in train.ports
            if p.role == "hyperparameter"
        ),
        graphs={name: _graph(graph) for name, graph in graphs.items()},
        files={},
        versions={
            "mpgraph": mpgraph.__version__, "torch": torch.__version__, "onnx": onnx.__version__,
        },
    )  # fmt: skip


def _graph(graph: StepGraph) -> files.Graph:
    returned: Any = graph.graph_module.graph.output_node().args[0]
    values = [node.meta["val"] for node in returned]
    return files.Graph(
        tuple(tensor_of(p.name, p.value, graph.symbol) for p in graph.ports if p.role == "batch"),
        tuple(map(tensor_of, graph.results, values, [graph.symbol] * len(graph.results))),
        tuple(p.name for p in graph.ports if p.role in ("state", "frozen")),
    )


def _batch_size(graph: StepGraph) -> int:
    ports = [port for port in graph.ports if port.role == "batch"]
    sizes = [int(port.value.shape[0]) for port in ports if port.value.dim()]
    return sizes[0] if sizes else 1
