"""A whole training step as a folder that onnxruntime trains from, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpgraph.errors import ExportError
from mpgraph.onnx.in_place import in_place
from mpgraph.onnx.ports import Port
from mpgraph.onnx.step_check import check_step
from mpgraph.onnx.step_files import (
    dtype_name,
    next_name,
    state_of_ports,
    tensor_of,
    value_of,
    write_tensors,
)
from mpgraph.onnx.step_trace import StepGraph, trace_step
from mpgraph.onnx.targets import Target, target_of
from mpgraph.onnx.translate import translate
from mpgraph.runtime import manifest as files
from mpgraph.structure import Spec, flatten

if TYPE_CHECKING:
    from mpgraph.step.train_step import TrainStep


@dataclasses.dataclass(frozen=True)
class ExportedStep:
    """What :meth:`mpgraph.TrainStep.export_onnx` has written.

    Attributes:
        folder: Where.
        manifest: What is in it.
        error: The largest difference between onnxruntime and torch over one step from the same
            state, relative to the largest element of each tensor; None where it was not checked.
    """

    folder: Path
    manifest: files.Manifest
    error: float | None


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
) -> ExportedStep:
    """Write the folder of a step; see :meth:`mpgraph.TrainStep.export_onnx`."""
    _need_onnx()
    goal = target_of(target, opset)
    graph = trace_step(step, leaves, spec, goal, dynamic=dynamic)
    model = translated(graph, goal)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    values = {port.name: value_of(port) for port in graph.ports if port.role != "batch"}
    if "random.seed" in values:
        values["random.seed"] = torch.tensor(seed)
    _save(model, path / files.TRAIN)
    written = _write_values(path, graph, values)
    manifest = _manifest(step, graph, model, goal, values)
    sums = {name: files.checksum(path / name) for name in (files.TRAIN, *written)}
    manifest = dataclasses.replace(manifest, files=sums)
    manifest.write(path)
    error = check_step(path, graph, values, leaves) if verify else None
    return ExportedStep(path, manifest, error)


def translated(graph: StepGraph, target: Target) -> Any:
    """The step as an ``onnx_ir.Model``."""
    outputs = [*graph.results, *(next_name(port.name) for port in graph.state())]
    dims = {graph.symbol: "batch"} if graph.symbol else {}
    inputs = [port.name for port in graph.ports]
    return translate(graph.graph_module, inputs, outputs, opset=target.opset, dims=dims)


def _save(model: Any, path: Path) -> None:
    import onnx
    import onnx_ir

    onnx_ir.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _write_values(path: Path, graph: StepGraph, values: Mapping[str, torch.Tensor]) -> list[str]:
    written = []
    for name, role in ((files.STATE, "state"), (files.FROZEN, "frozen")):
        tensors = {p.name: values[p.name] for p in graph.ports if p.role == role}
        if tensors or name == files.STATE:
            write_tensors(path / name, tensors)
            written.append(name)
    return written


def _manifest(
    step: TrainStep, graph: StepGraph, model: Any, target: Target, values: Mapping[str, Any]
) -> files.Manifest:
    import onnx

    import mpgraph

    roles: dict[str, list[Port]] = {"batch": [], "state": [], "frozen": [], "hyperparameter": []}
    for port in graph.ports:
        roles[port.role].append(port)
    safe = in_place(model, {port.name: next_name(port.name) for port in roles["state"]})
    reads = tuple(port.name for port in (*roles["state"], *roles["frozen"]))
    train = files.Graph(
        tuple(tensor_of(p.name, p.value, graph.symbol) for p in roles["batch"]),
        _outputs(graph),
        reads,
    )
    return files.Manifest(
        precision=step._state.settings.precision.name,
        target=target.name,
        provider=target.provider,
        opset=target.opset,
        accumulation_steps=step.accumulation_steps,
        batch_size="batch" if graph.symbol else _batch_size(roles["batch"]),
        state=state_of_ports(roles["state"], safe),
        frozen=tuple(tensor_of(p.name, p.value, graph.symbol) for p in roles["frozen"]),
        numbers=tuple(
            files.Number(p.name, dtype_name(p.value.dtype), float(values[p.name]))
            for p in roles["hyperparameter"]
        ),
        graphs={files.TRAIN: train},
        files={},
        versions={
            "mpgraph": mpgraph.__version__, "torch": torch.__version__, "onnx": onnx.__version__,
        },
    )  # fmt: skip


def _outputs(graph: StepGraph) -> tuple[files.Tensor, ...]:
    returned: Any = graph.graph_module.graph.output_node().args[0]
    pairs = zip(graph.results, returned, strict=False)
    return tuple(tensor_of(name, node.meta["val"], graph.symbol) for name, node in pairs)


def _batch_size(ports: Sequence[Port]) -> int:
    sizes = [int(port.value.shape[0]) for port in ports if port.value.dim()]
    return sizes[0] if sizes else 1


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"exporting needs {error.name}, which is not installed. pip install 'mpgraph[onnx]' "
            "installs what is missing."
        ) from error


def example_of(args: Any, kwargs: Any) -> tuple[list[Any], Spec]:
    """The tensors of an example batch, and how they are put together."""
    return flatten((tuple(args), dict(kwargs)))
