"""The graphs beside a step: the loss and the model's results, in evaluation mode."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from mpgraph.onnx.functional import functional, in_plain_operators
from mpgraph.onnx.one_device import put_on
from mpgraph.onnx.ports import batch_names, output_names, ports_of, result_names, widen_ports
from mpgraph.onnx.step_trace import StepGraph, batch_dims, symbol_of
from mpgraph.onnx.targets import Target, TargetContext
from mpgraph.passes.legalize import legalize
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.pipeline import run_passes, size_hint
from mpgraph.plain import FORWARD_HOOKS, global_hooks
from mpgraph.runtime import manifest as files
from mpgraph.step.assemble import copied, flat_outputs
from mpgraph.step.joint import outputs_of, set_outputs
from mpgraph.step.loss import models_own_loss
from mpgraph.step.trace_gradients import Gradients, trace_results
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
        places: Which tensor of the batch each of them is; None for another tensor.
        dynamic: Per leaf, the dimensions whose size stays symbolic.
    """

    function: Callable[..., Any]
    names: list[str]
    results: Callable[[Spec], list[str]]
    leaves: Sequence[Any]
    spec: Spec
    places: tuple[int | None, ...]
    dynamic: list[frozenset[int]]


def evaluation(step: TrainStep, leaves: Sequence[Any], spec: Spec, dynamic: bool) -> Question:
    """What the loss function returns."""
    function = step.loss_fn
    if function is models_own_loss:
        function = step.settings.state.original_forward()
    names = batch_names(function, spec, skip=1)
    dims = batch_dims(leaves) if dynamic else [frozenset[int]()] * len(leaves)
    places = tuple(range(len(leaves)))
    return Question(step.loss_fn, names, result_names, leaves, spec, places, dims)


def model_results(step: TrainStep, graph: StepGraph) -> Question | None:
    """What the model returns, called as in the step; None if the step does not call it."""
    call = next((call for call in graph.traced.calls if call.model is step.model), None)
    if call is None:
        return None
    examples = [_example(leaf) for leaf in call.leaves]
    dims = [
        frozenset(i for i, n in enumerate(leaf.shape) if isinstance(n, torch.SymInt))
        for leaf in call.leaves
    ]
    names = batch_names(step.settings.state.original_forward(), call.spec, skip=1)
    return Question(_call, names, output_names, examples, call.spec, call.places, dims)


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _example(leaf: torch.Tensor) -> torch.Tensor:
    """Laid out alike as well: then the model's capture is the one of the evaluation."""
    shape, stride = [size_hint(n) for n in leaf.shape], [size_hint(n) for n in leaf.stride()]
    return torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device).zero_()


def answers(
    step: TrainStep, train: StepGraph, question: Question, target: Target
) -> dict[str, StepGraph]:
    """The loss in evaluation, and what the model returns, for export.

    Parameters and statistics are their inputs, as they are state. As little is traced as will do:
    the loss if it is another one than in training, the model if it is not in the loss as it is.

    Raises:
        CaptureError: One cannot be traced.
        ExportError: One cannot be exported; says why.
    """
    state = frozenset(port.name for port in train.state())
    traced = as_in_training(step.model, train.traced, question) or _traced(step, question)
    found = {files.EVALUATE: _answer(step, question, traced, target, state)}
    if (of_model := model_results(step, train)) is not None:
        alone = model_alone(step.model, traced, of_model) or _traced(step, of_model)
        found[files.INFER] = _answer(step, of_model, alone, target, state)
    return found


def _traced(step: TrainStep, question: Question) -> Gradients:
    with evaluating(step.model), in_plain_operators(), enable_python_dispatcher():
        return trace_results(
            step.model, question.function, question.leaves, question.spec, question.dynamic
        )


def as_in_training(model: nn.Module, traced: Gradients, question: Question) -> Gradients | None:
    """A trace of the loss and its gradients, without these: it is the one of evaluation too.

    None where something has asked whether it is training, or may have been told by ``train()``; or
    where the size of the batch is fixed, which it need not be in evaluation.
    """
    if traced.reads_mode or _is_fixed(traced, question):
        return None
    if any(map(_is_told, model.modules())):
        return None
    gm = copied(traced.graph_module)
    outputs = outputs_of(gm.graph)
    del outputs["gradients"]
    set_outputs(gm.graph, outputs)
    gm.graph.eliminate_dead_code()
    return dataclasses.replace(traced, graph_module=gm)


def _is_told(module: nn.Module) -> bool:
    """Whether a module does something when its mode is set, or may ask for it out of sight."""
    own = [getattr(getattr(module, name), "__func__", None) for name in ("train", "eval")]
    is_script = isinstance(module, torch.jit.ScriptModule)
    return is_script or own != [nn.Module.train, nn.Module.eval]


def _is_fixed(traced: Gradients, question: Question) -> bool:
    return any(question.dynamic) and not symbol_of(traced)


def model_alone(model: nn.Module, traced: Gradients, question: Question) -> Gradients | None:
    """What the model returned while a loss was traced, as a trace of its own.

    None where the model was not called as in the question, or hooks are around the call; or where
    the loss has fixed the size of the batch.
    """
    if traced.output is None or hooks_around(model):
        return None
    (call,) = traced.calls
    if (call.model, call.spec, call.places) != (model, question.spec, question.places):
        return None
    if _is_fixed(traced, question) or None in call.places or len({*call.places}) < len(call.places):
        return None
    gm = copied(traced.graph_module)
    set_outputs(gm.graph, {"results": outputs_of(gm.graph)["model"]})
    gm.graph.eliminate_dead_code()
    if not _take(gm.graph, call.places):
        return None
    return dataclasses.replace(traced, graph_module=gm, result=traced.output, output=None)


def hooks_around(model: nn.Module) -> bool:
    """Whether calling the model is more than its ``forward``."""
    return any(vars(model)[table] for table in FORWARD_HOOKS) or bool(global_hooks())


def _take(graph: fx.Graph, places: Sequence[int | None]) -> bool:
    """Take these tensors of the batch alone, in this order; False if others are read too."""
    inputs = {
        n.meta["slot"].index: n
        for n in graph.find_nodes(op="placeholder")
        if n.meta["slot"].kind == "input"
    }
    taken = [inputs.pop(place) for place in places]
    if any(node.users for node in inputs.values()):
        return False
    for node in inputs.values():
        graph.erase_node(node)
    for index, node in enumerate(taken):
        node.meta["slot"] = dataclasses.replace(node.meta["slot"], index=index)
        graph.find_nodes(op="placeholder")[-1].append(node)
    return True


def _answer(
    step: TrainStep, question: Question, traced: Gradients, target: Target, state: frozenset[str]
) -> StepGraph:
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
    return StepGraph(made.graph_module, ports, names, symbol_of(traced), traced)


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
