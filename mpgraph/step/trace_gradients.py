"""From a user's model and loss to a graph that computes the loss and the gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)

from mpgraph import recurrent
from mpgraph.capture.attribute_reads import Reads, attribute_reads
from mpgraph.capture.breaks import first_line, line_of_error
from mpgraph.capture.detect import NeedsDynamo, watch_step
from mpgraph.capture.held import held_in_places
from mpgraph.capture.writes import writes_taken_back
from mpgraph.errors import CaptureError, MPGraphError
from mpgraph.lru_caches import no_traced_values_cached
from mpgraph.module import State
from mpgraph.step.inside import Assigned, Inside, ModelCall
from mpgraph.step.joint import copied_as, fresh, mark
from mpgraph.step.loss import (
    LossFunction,
    loss_of,
    needs_a_size,
    needs_a_value,
    needs_fixed_sizes,
)
from mpgraph.step.reads import LossReads
from mpgraph.step.sizes import SizeGuards
from mpgraph.step.slots import Homes, StepSlot, place_name
from mpgraph.structure import Spec, flatten, opaque_values, unflatten
from mpgraph.uncompiled import uncompiled

Tensors = Sequence[torch.Tensor]


class NeedsFixedSizes(CaptureError):
    """A loss is not to be traced with symbolic sizes, though perhaps with those of one batch."""


@dataclasses.dataclass
class Gradients:
    """A traced loss with its gradients.

    Attributes:
        graph_module: Returns a dict: "results", the leaves of what the loss function returned,
            then of every assignment; "gradients", one per parameter that has one, by name; and
            "model", what the model itself returned, if that was asked for.
        result: How the leaves of the result are put together.
        assigned: What the model's forward assigns to its modules.
        states: The converted models that took part.
        calls: The calls of converted models.
        output: How the leaves of what the model returned are put together, if the graph returns
            them.
        mode: The fake mode of every value in the graph.
        sizes: For which sizes of a batch it holds, where some are symbolic.
        reads: The attributes of modules that the loss function has read by itself.
        taken: The tensors that it has taken a number out of.
        reads_mode: Whether it, or the model, has asked a module if it is in training.
    """

    graph_module: fx.GraphModule
    result: Spec
    assigned: list[Assigned]
    states: list[State]
    calls: list[ModelCall]
    mode: FakeTensorMode
    sizes: SizeGuards
    reads: Reads
    taken: list[torch.Tensor]
    reads_mode: bool
    output: Spec | None = None


def trace_gradients(
    model: nn.Module,
    loss_fn: LossFunction,
    parameters: Mapping[str, torch.Tensor],
    leaves: Tensors,
    spec: Spec,
    divisor: int = 1,
    zeros: frozenset[str] = frozenset(),
    dynamic: Sequence[frozenset[int]] = (),
    keeps_output: bool = False,
) -> Gradients:
    """Trace ``loss_fn(model, *args, **kwargs)`` and its gradients.

    Args:
        model: A converted model.
        loss_fn: Takes the model and a batch; see :func:`mpgraph.step.loss.loss_of`.
        parameters: What to differentiate by, by name.
        leaves: The tensors of one batch.
        spec: How they become ``(args, kwargs)``.
        divisor: What the loss is divided by before it is differentiated.
        zeros: Parameters whose gradient is zero where there is none: an earlier batch had one.
        dynamic: Per leaf, the dimensions whose size stays symbolic. Equal sizes share a symbol.
        keeps_output: Whether to return what the model itself returned, as :func:`trace_results`.

    Raises:
        CaptureError: The loss cannot be traced; says why, where, and what to do.
        NeedsFixedSizes: It cannot with ``dynamic`` sizes.
    """
    trace = _Trace(model, loss_fn, parameters, spec, divisor, zeros, keeps_output)
    with torch.enable_grad():
        return _run_trace(trace, leaves, dynamic)


def trace_results(
    model: nn.Module,
    function: Callable[..., Any],
    leaves: Tensors,
    spec: Spec,
    dynamic: Sequence[frozenset[int]] = (),
) -> Gradients:
    """Trace ``function(model, *args, **kwargs)`` alone, without gradients.

    What the model itself returned is returned as well, if it was called once and all that is
    written to memory or drawn at random is inside of that call.

    Args:
        model: A converted model, in the mode that is to be traced.
        function: Takes the model and a batch.
        leaves: The tensors of one batch.
        spec: How they become ``(args, kwargs)``.
        dynamic: As for :func:`trace_gradients`.

    Raises:
        CaptureError: It cannot be traced; says why, where, and what to do.
    """
    # Not under no_grad: a model's own no_grad blocks would then leave no trace.
    with torch.enable_grad():
        return _run_trace(
            _Trace(model, function, None, spec, 1, frozenset(), True), leaves, dynamic
        )


def _run_trace(trace: _Trace, leaves: Tensors, dynamic: Sequence[frozenset[int]]) -> Gradients:
    try:
        with recurrent.kept_whole(True):
            return _run_once(trace, leaves, dynamic)
    except recurrent.TwiceDifferentiated:
        with recurrent.kept_whole(False):
            return _run_once(trace, leaves, dynamic)


def _run_once(trace: _Trace, leaves: Tensors, dynamic: Sequence[frozenset[int]]) -> Gradients:
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    reads = LossReads(trace.loss_fn, trace.model)
    modules = nn.ModuleList([trace.model, *reads.modules()])
    with (
        _refusing(reads), writes_taken_back(), no_traced_values_cached(),
        uncompiled(trace.model), mode, _unheard(),
    ):  # fmt: skip
        varying = dynamic or [frozenset[int]()] * len(leaves)
        fakes = [_fake_leaf(mode, *pair) for pair in zip(leaves, varying, strict=True)]
        with attribute_reads(modules) as record:
            gm = _traced(trace, fakes)
    graph = gm.graph
    _name_results(graph, trace)
    _lift(gm, Homes(*modules), trace, mode)
    assert trace.result is not None
    assert trace.inside is not None
    inside = trace.inside
    models = [(e.accepts, c.leaves) for e, c in zip(inside.ran, inside.calls, strict=True)]
    guards = SizeGuards(fakes if any(dynamic) else (), models)
    return Gradients(
        gm, trace.result, inside.assigned, inside.states, inside.calls, mode, guards, record.reads,
        inside.taken,
        record.of_mode or any(entry.captured.reads_mode for entry in inside.ran), trace.output,
    )  # fmt: skip


class _Trace:
    """The function that is traced, and what it notices."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        parameters: Mapping[str, torch.Tensor] | None,
        spec: Spec,
        divisor: int,
        zeros: frozenset[str],
        keeps_output: bool,
    ) -> None:
        self.model, self.loss_fn, self.spec, self.divisor = model, loss_fn, spec, divisor
        self.parameters, self.zeros = parameters or {}, zeros
        self.differentiates, self.keeps_output = parameters is not None, keeps_output
        self.inside: Inside | None = None
        self.result: Spec | None = None
        self.output: Spec | None = None
        self.count = 0
        self.named: list[str] = []
        self.has_symbols = False

    def __call__(self, *leaves: Any) -> list[Any]:
        self.has_symbols = any(isinstance(n, torch.SymInt) for leaf in leaves for n in leaf.shape)
        mode = get_proxy_mode()
        assert mode is not None
        inside = self.inside = Inside(cast(Any, mode).tracer.graph, leaves)
        args, kwargs = unflatten(self.spec, leaves)
        with inside.active():
            value = self.loss_fn(self.model, *args, **kwargs)
        self._refuse_opaque(value)
        of_model = self._output(inside) if self.keeps_output else []
        gradients = self._gradients(inside, value) if self.differentiates else []
        outputs, self.result = flatten(value)
        for assigned in inside.assigned:
            outputs.extend(assigned.leaves)
        if any(not isinstance(output, torch.Tensor) for output in outputs):
            raise CaptureError(needs_a_value(""))
        self.count = len(outputs)
        returned = [*(o.detach() for o in [*outputs, *of_model]), *gradients]
        mark(inside.graph, "forward")
        return returned

    def _output(self, inside: Inside) -> list[torch.Tensor]:
        self.output = None
        if len(inside.calls) != 1 or inside.acts_outside():
            return []
        (outputs,) = inside.outputs
        if any(not isinstance(output, torch.Tensor) for output in outputs):
            return []
        self.output = inside.ran[0].captured.output
        return outputs

    def _gradients(self, inside: Inside, value: Any) -> list[torch.Tensor]:
        loss = loss_of(value, self.loss_fn)
        if self.divisor > 1:
            loss = loss / self.divisor
        mark(inside.graph, "forward")
        inside.watch_backward()
        with _padding_kernels(self.has_symbols):
            gradients = torch.autograd.grad(loss, [*self.parameters.values()], allow_unused=True)
        laid_out = [
            fresh(parameter).zero_() if gradient is None and name in self.zeros
            else _laid_out(gradient, parameter)
            for gradient, (name, parameter) in zip(gradients, self.parameters.items(), strict=True)
        ]  # fmt: skip
        inside.note({})
        mark(inside.graph, "backward")
        self.named = [n for n, g in zip(self.parameters, laid_out, strict=True) if g is not None]
        return [g for g in laid_out if g is not None]

    def _refuse_opaque(self, value: Any) -> None:
        for found in opaque_values(flatten(value)[1]):
            raise CaptureError(
                f"the loss function returns an object of type {type(found).__name__}, which cannot "
                "be taken apart into tensors. Return tensors, numbers, and containers of them."
            )


def _padding_kernels(has_symbols: bool) -> contextlib.AbstractContextManager[Any]:
    """The gradient of padding is padding, whose kernel asks for the numbers of symbolic sizes."""
    return enable_python_dispatcher() if has_symbols else contextlib.nullcontext()


def _laid_out(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient in the memory layout of its parameter, as autograd leaves it in ``.grad``.

    (torch/csrc/autograd/functions/accumulate_grad.h: fused kernels rely on it.)
    """
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    if gradient.layout is not torch.strided:
        return gradient
    return copied_as(gradient, parameter.stride())


def _traced(trace: _Trace, fakes: Sequence[Any]) -> fx.GraphModule:
    try:
        return make_fx(trace, _allow_non_fake_inputs=True)(*fakes)
    except MPGraphError:
        raise
    except (
        GuardOnDataDependentSymNode,
        DataDependentOutputException,
    ) as error:
        raise CaptureError(needs_a_value(line_of_error(error))) from error
    except DynamicOutputShapeException as error:
        raise CaptureError(needs_a_size(error.func, line_of_error(error))) from error
    except (RuntimeError, TypeError) as error:
        if trace.has_symbols and _REFUSES_SYMBOLS.search(str(error)):
            told = needs_fixed_sizes(first_line(error), line_of_error(error))
            raise NeedsFixedSizes(told) from error
        raise


# "Cannot call sizes() on tensor with symbolic sizes/strides", "expected int …, but got: SymInt".
_REFUSES_SYMBOLS = re.compile(r"symbolic sizes|\bSymInt\b|INTERNAL ASSERT")


@contextlib.contextmanager
def _refusing(reads: LossReads) -> Iterator[None]:
    """Refuse a loss function that does what a step which is captured once would not do again."""
    before, held = reads.state(), held_in_places(reads.items())
    try:
        with watch_step():
            yield
    except BaseException as error:
        for item in held:
            item.restore()
        if isinstance(error, NeedsDynamo):
            raise CaptureError(_not_again(error.reason, error.where)) from None
        raise
    if reads.state() != before:
        names = [item.path for item in held if item.has_changed()]
        for item in held:
            item.restore()
        raise CaptureError(_not_again(f"it changes {', '.join(names) or 'a number in Python'}"))


def _not_again(reason: str, where: str = "") -> str:
    reason = reason.replace("forward ", "it ", 1) if reason.startswith("forward ") else reason
    return (
        f"the loss function cannot be captured: {reason}{f' at {where}' if where else ''}. A step "
        "that is captured once does so once, not at every call. Do it around the step and pass "
        "what comes of it in the batch (random numbers as tensors), or train with mpgraph.convert "
        "and mpgraph.guard."
    )


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _name_results(graph: fx.Graph, trace: _Trace) -> None:
    output = graph.output_node()
    returned = cast(Sequence[Any], output.args[0])
    end = len(returned) - len(trace.named)
    gradients = dict(zip(trace.named, returned[end:], strict=True))
    found: dict[str, Any] = {"results": list(returned[: trace.count]), "gradients": gradients}
    if trace.output is not None:
        found["model"] = list(returned[trace.count : end])
    output.args = (found,)
    output.meta["part"] = "output"


def _lift(gm: fx.GraphModule, homes: Homes, trace: _Trace, mode: FakeTensorMode) -> None:
    """Make inputs of the tensors that the trace has met outside of the batch."""
    graph = gm.graph
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        node.meta["slot"] = StepSlot("input", node.name, index=index)
    first: fx.Node = next(iter(graph.nodes))
    lifted: dict[int, fx.Node] = {}
    for node in list(graph.find_nodes(op="get_attr")):
        tensor = getattr(gm, str(node.target))
        if not isinstance(tensor, torch.Tensor):
            continue
        if id(tensor) not in lifted:
            slot = _slot(tensor, homes, trace, len(lifted))
            with graph.inserting_before(first):
                lifted[id(tensor)] = graph.placeholder(place_name(slot))
            lifted[id(tensor)].meta = {"slot": slot, "val": _fake(mode, tensor)}
        node.replace_all_uses_with(lifted[id(tensor)])
        graph.erase_node(node)
    _drop_attributes(gm)
    gm.recompile()


def _fake_leaf(mode: FakeTensorMode, leaf: torch.Tensor, dynamic: frozenset[int]) -> torch.Tensor:
    if not dynamic:
        return mode.from_tensor(leaf, static_shapes=True)
    # DUCK: what has the same size in the example batch is the same symbol.
    kinds = [DimDynamic.DUCK if i in dynamic else DimDynamic.STATIC for i in range(leaf.dim())]
    context: Any = StatelessSymbolicContext(kinds, constraint_sizes=[None] * leaf.dim())
    return mode.from_tensor(leaf, static_shapes=False, symbolic_context=context)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    return mode.from_tensor(tensor.detach(), static_shapes=True)


def _slot(tensor: torch.Tensor, homes: Homes, trace: _Trace, count: int) -> StepSlot:
    for index, state in enumerate(trace.inside.states if trace.inside else ()):
        if tensor is state.scale.value.scale:
            return scale_slot(state, index, "scale")
    name = next((n for n, p in trace.parameters.items() if p is tensor), "")
    found = homes.slot_of(tensor)
    if found is not None:
        return dataclasses.replace(found, name=name or found.name)
    kind: Any = "parameter" if name else "constant"
    return StepSlot(kind, name or f"constant_{count}", lambda: tensor)


def scale_slot(state: State, index: int, field: str) -> StepSlot:
    """The slot of a tensor of the loss scale of a model, the ``index``-th that took part."""
    name = state.original.__name__ + (f" {index}" if index else "")
    return StepSlot("scale", f"{field} of {name}", _field(state, field))


def _field(state: State, field: str) -> Callable[[], Any]:
    return lambda: getattr(state.scale.value, field)


def _drop_attributes(gm: fx.GraphModule) -> None:
    used = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for table in (gm._parameters, gm._buffers, vars(gm)):
        for name in [n for n in table if n.startswith(("_param_constant", "_tensor_constant"))]:
            if name not in used:
                del table[name]
