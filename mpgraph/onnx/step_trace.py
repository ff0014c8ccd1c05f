"""A training step traced for export: symbolic batch, random numbers from a counter, no writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.optim import Optimizer

from mpgraph.errors import ExportError
from mpgraph.onnx.alike_update import trace_alike_update
from mpgraph.onnx.first_state import with_state
from mpgraph.onnx.functional import functional, in_plain_operators
from mpgraph.onnx.one_device import put_on
from mpgraph.onnx.ports import (
    Port,
    batch_names,
    ports_of,
    result_names,
    unique,
    widen_ports,
)
from mpgraph.onnx.targets import Target, TargetContext
from mpgraph.passes.counter_dropout import counter_dropout
from mpgraph.passes.gate_update import gate_update
from mpgraph.passes.legalize import legalize
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.passes.share_counters import share_counters
from mpgraph.passes.tensor_numbers import tensor_numbers
from mpgraph.pipeline import GraphPass, run_passes
from mpgraph.step.arguments import parameter_names, trained_by
from mpgraph.step.assemble import assemble, flat_outputs, moving_scales
from mpgraph.step.joint import StepContext, gradients_of, outputs_of, set_outputs, slot_nodes
from mpgraph.step.loss import models_own_loss
from mpgraph.step.optimizer_places import equal_counters
from mpgraph.step.slots import StepSlot
from mpgraph.step.trace_gradients import Gradients, trace_gradients
from mpgraph.structure import Spec, count_leaves

if TYPE_CHECKING:
    from mpgraph.step.train_step import TrainStep

EXPORT_PASSES: tuple[GraphPass, ...] = (
    tensor_numbers,
    share_counters,  # after tensor_numbers, which makes counters of what was .item()
    counter_dropout,
    gate_update,
    remove_dead,
)


@dataclasses.dataclass
class StepGraph:
    """A whole step without writes, ready to be translated.

    Attributes:
        graph_module: One placeholder per port; returns a flat tuple: the results, then the next
            value of each port that is state, in the order of the ports.
        ports: What the placeholders stand for.
        results: The names of the results.
        symbol: The symbolic batch size; "" where it is fixed.
        traced: What it was made of.
    """

    graph_module: fx.GraphModule
    ports: list[Port]
    results: list[str]
    symbol: str
    traced: Gradients

    def state(self) -> list[Port]:
        """The ports that have a next value."""
        return [port for port in self.ports if port.role == "state"]


def trace_step(
    step: TrainStep, leaves: Sequence[Any], spec: Spec, target: Target, *, dynamic: bool = True
) -> StepGraph:
    """Trace one step for export; the step itself stays as it is.

    Args:
        step: The step.
        leaves: The tensors of an example batch.
        spec: How they become ``(args, kwargs)``.
        target: Where the exported step is to run.
        dynamic: Whether the batch size stays symbolic.

    Raises:
        CaptureError: It cannot be traced.
        ExportError: It cannot be exported; says why.
    """
    optimizer = with_state(step.optimizer)
    known = parameter_names(step.model, step.optimizer)
    gradients = _gradients(step, known, leaves, spec, dynamic)
    nodes = gradients_of(gradients.graph_module.graph)
    values = {name: node.meta["val"] for name, node in nodes.items()}
    context = _context(step, optimizer, known, gradients)
    update = trace_alike_update(optimizer, known, values, gradients.mode, context)
    gm, _ = assemble(gradients.graph_module, update, context)
    _write_assigned(gm.graph, gradients)
    put_on(gm, "cpu")
    run_passes(gm, EXPORT_PASSES, dataclasses.replace(context, device="cpu"))
    results = flat_outputs(gm)
    made = functional(gm)
    widen_ports(made.graph_module)
    function = step.loss_fn
    if function is models_own_loss:
        function = step.settings.state.original_forward()
    names = batch_names(function, spec, skip=1)
    ports = ports_of(made, names, len(optimizer.param_groups))
    kept = _named_results(results, gradients)
    run_passes(made.graph_module, (legalize,), _target_context(step, target))
    return StepGraph(made.graph_module, ports, kept, symbol_of(gradients), gradients)


def _gradients(
    step: TrainStep, names: dict[int, str], leaves: Sequence[Any], spec: Spec, dynamic: bool
) -> Gradients:
    trained = dict(trained_by(step.optimizer, names))
    # The Python dispatcher has the kernels that keep sizes symbolic, of interpolation for one.
    with in_plain_operators(), enable_python_dispatcher():
        return trace_gradients(
            step.model, step.loss_fn, trained, leaves, spec, step.accumulation_steps,
            dynamic=batch_dims(leaves) if dynamic else (), keeps_output=True,
        )  # fmt: skip


def batch_dims(leaves: Sequence[torch.Tensor]) -> list[frozenset[int]]:
    """Per tensor, the dimensions that are the batch: the first, where it is the first one's."""
    sizes = [leaf.shape[0] for leaf in leaves if leaf.dim()]
    first = sizes[0] if sizes and sizes[0] > 1 else None  # a size of 1 broadcasts: no symbol
    return [frozenset({0} if leaf.dim() and leaf.shape[0] == first else ()) for leaf in leaves]


def _context(
    step: TrainStep, optimizer: Optimizer, names: dict[int, str], gradients: Gradients
) -> StepContext:
    sums = {}
    if step.accumulation_steps > 1:
        for name, node in gradients_of(gradients.graph_module.graph).items():
            sums[name] = StepSlot("sum", f"sum of gradient {name}", _sum_reader(step, name, node))
    return StepContext(
        **vars(step.settings.state.context()),
        max_grad_norm=step.settings.max_grad_norm,
        check_finite=step.settings.check_finite,
        sums=sums,
        batches=step.accumulation_steps,
        scales=moving_scales(gradients.states),
        equal=equal_counters(optimizer, names),
    )


def _sum_reader(step: TrainStep, name: str, node: fx.Node) -> Any:
    value = node.meta["val"]

    def read() -> torch.Tensor:
        known = step.window.sums.get(name)
        return torch.zeros(value.shape, dtype=value.dtype) if known is None else known

    return read


def _target_context(step: TrainStep, target: Target) -> TargetContext:
    return TargetContext(**vars(step.settings.state.context()), target=target)


def _write_assigned(graph: fx.Graph, gradients: Gradients) -> None:
    """Write the buffers that the model's forward assigns; return what the loss function did."""
    outputs, places = outputs_of(graph), slot_nodes(graph)
    start = count_leaves(gradients.result)
    values = iter(outputs["results"][start:])
    for assigned in gradients.assigned:
        given = [next(values) for _ in assigned.leaves]
        path, name = assigned.assignment.module, assigned.assignment.name
        place = places.get(f"{path}.{name}" if path else name)
        if not assigned.assignment.is_buffer:
            continue
        if place is None or len(given) != 1:
            raise ExportError(
                f"forward assigns buffer {name} of {path or 'the model'}, which no operator of "
                "the step reads, so an exported step has no place for it. Write it in place: "
                f"self.{name}.copy_(...)."
            )
        with graph.inserting_before(graph.output_node()):
            write = graph.call_function(torch.ops.aten.copy_.default, (place, given[0]))
        write.meta = {"val": place.meta["val"], "part": "forward"}
    outputs.pop("model", None)
    set_outputs(graph, {**outputs, "results": outputs["results"][:start]})


def _named_results(names: Sequence[str], gradients: Gradients) -> list[str]:
    """Names for what the step returns."""
    given = iter(result_names(gradients.result))
    found: list[str] = []
    for name in names:
        new = next(given) if name == "results" else _RESULTS.get(name, name)
        found.append(unique(new, found))
    return found


_RESULTS = {"found_inf": "skipped", "norm": "grad_norm"}


def symbol_of(gradients: Gradients) -> str:
    """The name of the symbol that stands for the batch size, if tracing has left it one."""
    for node in gradients.graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if node.meta["slot"].kind == "input" and value.dim():
            if isinstance(value.shape[0], torch.SymInt) and not value.shape[0].node.expr.is_number:
                return str(value.shape[0].node.expr)
    return ""
