"""A step in torch and the same step, exported, in onnxruntime: side by side, from one state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mpgraph
from mpgraph.onnx.one_device import put_on
from mpgraph.onnx.ports import Port
from mpgraph.onnx.step_report import ExportedStep
from mpgraph.onnx.step_trace import StepGraph, trace_step
from mpgraph.onnx.targets import target_of
from mpgraph.runtime import OnnxTrainer
from mpgraph.structure import flatten

from .step_models import Case

Make = Callable[[Any], torch.optim.Optimizer]


def momentum(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer whose state is the gradient, after its first step."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=False)


class Pair:
    """A step and what was exported from it.

    Args:
        case: The model.
        precision: As for ``TrainStep``.
        folder: Where to export it to.
        make: Makes the optimizer.
        target: What the step is exported for; the model lies on that device.
        options: More for ``TrainStep``.
    """

    def __init__(
        self,
        case: Case,
        precision: str,
        folder: Path,
        make: Make = momentum,
        target: str = "cpu",
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.case, self.target = case, target
        model = case.model().to(target)
        self.optimizer = make(model.parameters())
        self.step = mpgraph.TrainStep(
            model, self.optimizer, case.loss, precision=precision, compile=False, **options
        )
        self.example = tuple(value.to(target) for value in case.batch(4))
        self.exported: ExportedStep = self.step.export_onnx(
            folder,
            example_inputs=self.example,
            target=target,
            verify=False,
            seed=7,
            inference=False,
        )
        self.trainer = OnnxTrainer(folder, threads=1, verify=False)

    def named(self, batch: Any) -> dict[str, np.ndarray[Any, Any]]:
        """A batch as the trainer takes it."""
        return {n: v.numpy() for n, v in zip(self.trainer.inputs, batch, strict=True)}

    def graph(self) -> StepGraph:
        """The graph that was exported, which torch can run."""
        leaves, spec = flatten((self.example, {}))
        return trace_step(self.step, leaves, spec, target_of(self.target))


class InTorch:
    """The exported graph, run by torch from a trainer's state."""

    def __init__(self, pair: Pair) -> None:
        self.trainer, self.traced, self.device = pair.trainer, pair.graph(), pair.target
        put_on(self.traced.graph_module, self.device)

    def step(self, batch: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The results and the next state."""
        state = {k: torch.from_numpy(v.copy()) for k, v in self.trainer.state_dict().items()}
        values = [
            self._value(port, state, given).to(self.device)
            for port, given in _with_batch(self.traced, batch)
        ]
        with torch.no_grad():
            returned = [value.cpu() for value in self.traced.graph_module(*values)]
        count = len(self.traced.results)
        names = [port.name for port in self.traced.state()]
        return (
            dict(zip(self.traced.results, returned[:count], strict=True)),
            dict(zip(names, returned[count:], strict=True)),
        )

    def _value(self, port: Port, state: dict[str, torch.Tensor], given: Any) -> torch.Tensor:
        if port.role == "batch":
            return given
        if port.role == "state":
            return state[port.name]
        if port.role == "hyperparameter":
            return torch.tensor(self.trainer.numbers[port.name], dtype=port.value.dtype)
        assert port.read is not None
        return port.read().detach()


def _with_batch(graph: StepGraph, batch: Any) -> Iterator[tuple[Port, Any]]:
    rest = iter(batch)
    for port in graph.ports:
        yield port, next(rest) if port.role == "batch" else None


def in_torch_state(pair: Pair) -> dict[str, torch.Tensor]:
    """What the step in torch has in the place of each tensor of the trainer's state."""
    step, names = pair.step, dict(pair.step.model.named_parameters())
    found = {**names, **dict(step.model.named_buffers())}
    for name, parameter in names.items():
        for key, value in step.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    scale = step.settings.state.scale.value
    for field in ("scale", "growth_tracker", "hysteresis_tracker"):
        found[f"loss_scale.{field}"] = getattr(scale, field)
    found |= {f"{name}.sum": value for name, value in step.window.sums.items()}
    known = pair.trainer.state_dict()
    return {k: v.detach().clone() for k, v in found.items() if k in known and v is not None}


def errors(found: Any, expected: Any, zero: Sequence[str] = ()) -> dict[str, float]:
    """The largest difference of each tensor, relative to its largest element.

    Where the true gradient is 0, there is nothing but rounding noise, which has to stay small: it
    is compared with the largest element of all tensors.
    """
    peak = max(float(np.abs(_array(v)).max(initial=0)) for v in expected.values())
    result = {}
    for name, value in expected.items():
        a, b = _array(found[name]), _array(value)
        is_noise = name.startswith(tuple(zero)) if zero else False
        scale = peak if is_noise else float(np.abs(b).max(initial=0))
        result[name] = float(np.abs(a - b).max(initial=0)) / scale if scale else 0.0
    return result


def _array(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value).astype(np.float64)
