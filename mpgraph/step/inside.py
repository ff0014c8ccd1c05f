"""Converted models while a step is traced: they run their rewritten graphs, node by node."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from mpgraph import recurrent
from mpgraph.capture.captured import Assignment, Slot
from mpgraph.capture.detect import user_line
from mpgraph.capture.region import TRACEABLE, bordered, untraced
from mpgraph.errors import CaptureError
from mpgraph.gather import home_of
from mpgraph.module import State
from mpgraph.pipeline import size_hint
from mpgraph.places import is_users
from mpgraph.specialisation import Specialisation
from mpgraph.step.later_checks import LATER
from mpgraph.step.loss import needs_a_value
from mpgraph.step.other_kernels import has_other_kernel
from mpgraph.step.taken_numbers import TAKING
from mpgraph.structure import Spec, count_leaves, flatten, unflatten
from mpgraph.tracing import tracing_step

# What a node of the step inherits from the node of a rewritten graph that it comes from.
_INHERITED = ("module_path", "stack_trace", "decision", "nn_module_stack", "inserted")


class ModelCall(NamedTuple):
    """One call of a converted model.

    Attributes:
        model: The model.
        leaves: Its arguments, taken apart.
        spec: How they become ``(args, kwargs)``.
        places: Which tensor of the batch each of them is; None for another tensor.
    """

    model: nn.Module
    leaves: list[Any]
    spec: Spec
    places: tuple[int | None, ...]


@dataclasses.dataclass
class Assigned:
    """A tensor that a model's forward assigns to one of its modules."""

    module: nn.Module
    assignment: Assignment
    leaves: Sequence[Any]


class Inside:
    """Runs converted models for a trace, and notes which node of the step comes from where.

    Attributes:
        states: The states of the models that were called.
        assigned: What their forward assigns to their modules.
        calls: What was called, and how.
        ran: For each call, the graph that was run.
        taken: The tensors that the loss function has taken a number out of.
        outputs: For each call, what the model returned, taken apart.
    """

    def __init__(self, graph: fx.Graph, batch: Sequence[Any]) -> None:
        self.graph = graph
        self._places = {id(leaf): index for index, leaf in enumerate(batch)}
        self.states: list[State] = []
        self.assigned: list[Assigned] = []
        self.calls: list[ModelCall] = []
        self.ran: list[Specialisation] = []
        self.taken: list[torch.Tensor] = []
        self.outputs: list[list[Any]] = []
        self._of_calls: set[fx.Node] = set()
        self._made: dict[Any, dict[str, Any]] = {}
        self._last = _last_node(graph)
        self._in_model = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While this is active, a call of a converted model arrives at :meth:`call`."""
        with tracing_step(self.call), _Lines(self):
            yield

    def call(
        self, state: State, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call of a converted model, in operators that autograd and the trace can see."""
        leaves, spec = flatten(state.bind(model, args, kwargs))
        places = tuple(self._places.get(id(leaf)) for leaf in leaves)
        self.calls.append(ModelCall(model, leaves, spec, places))
        with untraced():
            entry = state.find(model, [_stand_in(leaf) for leaf in leaves], spec)
        if not isinstance(entry, Specialisation):
            raise CaptureError(_carried_by_dynamo(state, entry))
        self.ran.append(entry)
        if state not in self.states:
            self.states.append(state)
        gm = entry.captured.graph_module
        values = [_value(model, entry, node.meta["slot"], leaves, state) for node in _inputs(gm)]
        self.note({})
        before = self._last
        self._in_model = True
        try:
            outputs = _Running(gm, self).run(*values)
        finally:
            self._in_model = False
        self._of_calls.update(_between(before, self._last))
        self.outputs.append(list(outputs[: count_leaves(entry.captured.output)]))
        self._note_assignments(model, entry, outputs)
        return unflatten(entry.captured.output, outputs)

    def _note_assignments(
        self, model: nn.Module, entry: Specialisation, outputs: Sequence[Any]
    ) -> None:
        start = count_leaves(entry.captured.output)
        for assignment in entry.captured.assignments:
            count = count_leaves(assignment.spec)
            module = model.get_submodule(assignment.module)
            self.assigned.append(Assigned(module, assignment, outputs[start : start + count]))
            start += count

    def acts_outside(self) -> bool:
        """Whether anything outside of the calls writes to memory or draws random numbers."""
        return any(
            node.op == "call_function" and node.is_impure()
            for node in self.graph.nodes
            if node not in self._of_calls
        )

    def note(self, meta: dict[str, Any], result: Any = None) -> None:
        """Give every node made since the last note this meta, and what autograd made for it."""
        for node in self.new_nodes():
            for key, value in meta.items():
                node.meta.setdefault(key, value)
        for grad_fn in _grad_fns(result, self._made):
            self._made[grad_fn] = meta

    def new_nodes(self) -> list[fx.Node]:
        """The nodes that were recorded since this was asked last."""
        found = []
        node = self._last.next
        while node.op != "root":
            found.append(node)
            self._last = node
            node = node.next
        return found

    def watch_backward(self) -> None:
        """From now on, nodes inherit from the forward node whose gradient they compute."""
        for grad_fn, meta in filter(_is_in_graph, self._made.items()):
            grad_fn.register_prehook(_Noting(self, {}))
            grad_fn.register_hook(_Noting(self, meta))


class _Noting:
    """A hook of one of autograd's nodes, before or after it runs."""

    def __init__(self, inside: Inside, meta: dict[str, Any]) -> None:
        self.inside, self.meta = inside, meta

    def __call__(self, *_: Any) -> None:
        self.inside.note(self.meta)


class _Running(fx.Interpreter):
    """Runs a rewritten graph on values that are traced."""

    def __init__(self, gm: fx.GraphModule, inside: Inside) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.inside = inside

    def run_node(self, n: fx.Node) -> Any:
        """As always; then say where the new nodes come from."""
        result = super().run_node(n)
        meta = {key: n.meta[key] for key in _INHERITED if key in n.meta}
        self.inside.note(meta, result)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Scaled casts by operators that a backend can fuse."""
        return super().call_function(TRACEABLE.get(target, target), args, kwargs)


# Printing and numpy, which fake tensors answer without a value, or with an error of their own.
_LOOKS = frozenset(
    {
        torch.Tensor.__repr__, torch.Tensor.__format__, torch.Tensor.numpy,
        torch.Tensor.__array__, torch.Tensor.tolist,
    }
)  # fmt: skip


class _Lines(TorchFunctionMode):
    """Notes the user's line for what runs outside of converted models, and picks kernels."""

    def __init__(self, inside: Inside) -> None:
        super().__init__()
        self.inside = inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS and not self.inside._in_model:
            raise CaptureError(needs_a_value(user_line()))
        if func in TAKING and not isinstance(args[0], FakeTensor):
            self.inside.taken.append(args[0])
        if has_other_kernel(func, args, kwargs):
            with enable_python_dispatcher():
                result = func(*args, **kwargs)
        else:
            result = recurrent.run(LATER.get(func, func), args, kwargs)
        if not self.inside._in_model:
            self.inside.note({"module_path": "loss", "stack_trace": _users_line()}, result)
        return result


def _users_line() -> str:
    frame = sys._getframe(2)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    return "".join(traceback.format_list(traceback.extract_stack(frame, limit=1)))


def _last_node(graph: fx.Graph) -> fx.Node:
    return graph._root.prev


def _between(before: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes after one, up to another."""
    while before is not last:
        before = before.next
        yield before


def _grad_fns(result: Any, known: dict[Any, Any]) -> list[Any]:
    """What autograd recorded to make this result, and is not known yet."""
    results = result if isinstance(result, (tuple, list)) else [result]
    waiting = [r.grad_fn for r in results if isinstance(r, torch.Tensor)]
    found: dict[Any, None] = {}
    while waiting:
        grad_fn = waiting.pop()
        if grad_fn is None or grad_fn in known or grad_fn in found:
            continue
        found[grad_fn] = None
        waiting.extend(earlier for earlier, _ in grad_fn.next_functions)
    return [*found]


def _is_in_graph(made: tuple[Any, Any]) -> bool:
    """Whether autograd still has a node: a custom Function's object outlives its own."""
    try:
        return made[0].next_functions is not None
    except RuntimeError:
        return False


def _inputs(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _value(
    model: nn.Module, entry: Specialisation, slot: Slot, leaves: Sequence[Any], state: State
) -> Any:
    """What one input of a rewritten graph gets, borders of the fp16 region included."""
    if slot.kind == "scale":
        return state.scale.value.scale
    if slot.kind == "input":
        value = leaves[slot.index]
    elif slot.kind == "constant":
        value = entry.captured.constants[slot.target]
    else:
        table, name = home_of(model, slot)
        value = table[name]
    return bordered(slot, value, state.scale.value.scale)


def _stand_in(leaf: Any) -> Any:
    """A real tensor of the same kind: capture looks at kinds, not at values."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape, stride = [size_hint(n) for n in leaf.shape], [size_hint(n) for n in leaf.stride()]
    made = torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device).zero_()
    if leaf.requires_grad:
        made.requires_grad_()
        if not leaf.is_leaf:
            with torch.enable_grad():
                made = made.view_as(made)
    return made


def _carried_by_dynamo(state: State, entry: Any) -> str:
    reason = getattr(entry, "reason", "") or "capture='dynamo' was asked for"
    return (
        f"{state.original.__name__} cannot be captured as one graph: {reason}. TrainStep needs "
        "one. Change the model at that place, or train it with mpgraph.convert and "
        "mpgraph.guard, where a model may be carried by several graphs."
    )
