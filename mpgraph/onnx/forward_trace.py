"""The graphs beside a step: the loss and the model's results, in evaluation mode."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher

from mpgraph.onnx.functional import functional, in_plain_operators
from mpgraph.onnx.one_device import put_on
from mpgraph.onnx.ports import batch_names, output_names, ports_of, result_names, widen_ports
from mpgraph.onnx.step_trace import StepGraph, batch_dims, symbol_of
from mpgraph.onnx.targets import Target, TargetContext
from mpgraph.passes.legalize import legalize
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.pipeline import run_passes, size_hint
from mpgraph.step.assemble import copied, flat_outputs
from mpgraph.step.joint import outputs_of, set_outputs
from mpgraph.step.loss import models_own_loss
from mpgraph.step.trace_gradients import trace_results
from mpgraph.structure import Spec

if TYPE_CHECKING:
    from mpgraph.step.train_step import TrainStep


@dataclasses.dataclass(frozen=True)
class Question:
    """Something to compute from a model in evaluation mode.

    Attributes:
        function: Takes the model and its arguments.
        names: The names of the tensors among them.
        results: Names what it returns, by how that is put together.
        leaves: Example arguments.
        spec: How they become ``(args, kwargs)``.
        dynamic: Per leaf, the dimensions whose size stays symbolic.
    """

    function: Callable[..., Any]
    names: list[str]
    results: Callable[[Spec], list[str]]
    leaves: Sequence[Any]
    spec: Spec
    dynamic: list[frozenset[int]]


def evaluation(step: TrainStep, leaves: Sequence[Any], spec: Spec, dynamic: bool) -> Question:
    """What the loss function returns."""
    function = step.loss_fn
    if function is models_own_loss:
        function = step.settings.state.original_forward()
    names = batch_names(function, spec, skip=1)
    dims = batch_dims(leaves) if dynamic else [frozenset[int]()] * len(leaves)
    return Question(step.loss_fn, names, result_names, leaves, spec, dims)


def model_results(step: TrainStep, graph: StepGraph) -> Question | None:
    """What the model returns, called as in the step; None if the step does not call it."""
    calls = [call for call in graph.calls if call[0] is step.model]
    if not calls:
        return None
    _, leaves, spec = calls[0]
    examples = [_example(leaf) for leaf in leaves]
    dims = [
        frozenset(i for i, n in enumerate(leaf.shape) if isinstance(n, torch.SymInt))
        for leaf in leaves
    ]
    names = batch_names(step.settings.state.original_forward(), spec, skip=1)
    return Question(_call, names, output_names, examples, spec, dims)


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _example(leaf: torch.Tensor) -> torch.Tensor:
    """Laid out alike as well: then the model's capture is the one of the evaluation."""
    shape, stride = [size_hint(n) for n in leaf.shape], [size_hint(n) for n in leaf.stride()]
    return torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device).zero_()


def trace_question(
    step: TrainStep, question: Question, target: Target, state: frozenset[str]
) -> StepGraph:
    """Trace a question for export; parameters and statistics are its inputs, as they are state.

    Raises:
        CaptureError: It cannot be traced.
        ExportError: It cannot be exported; says why.
    """
    with evaluating(step.model), in_plain_operators(), enable_python_dispatcher():
        traced = trace_results(
            step.model, question.function, question.leaves, question.spec, question.dynamic
        )
    gm = copied(traced.graph_module)
    count = len(question.results(traced.result))
    outputs = outputs_of(gm.graph)
    set_outputs(gm.graph, {"results": outputs["results"][:count]})
    flat_outputs(gm)
    put_on(gm, "cpu")
    made = functional(gm)
    widen_ports(made.graph_module)
    ports = ports_of(made, question.names, 1, state)
    context = TargetContext(**vars(step.settings.state.context()), target=target)
    run_passes(made.graph_module, (legalize, remove_dead), context)
    names = question.results(traced.result)
    return StepGraph(made.graph_module, ports, names, symbol_of(traced), traced.calls)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
