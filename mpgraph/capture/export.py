"""The export engine: one ``torch.export`` of one call, as a flat graph.

The model is exported through a wrapper whose arguments and results are flat lists of tensors, so
that containers, dataclasses and ``None`` are mpgraph's own affair. The wrapper also notices what
``forward`` leaves behind on the modules: tensors that it assigns to attributes or buffers become
further results, to be assigned after every run; anything else that changes (a counter, a list)
is a reason to take the other engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.export.graph_signature import ConstantArgument, InputKind

from mpgraph import ir
from mpgraph.capture.attribute_changes import (
    attribute_changes,
    changes_what_is_held,
    moves,
)
from mpgraph.capture.attribute_reads import Reads
from mpgraph.capture.captured import Assignment, Captured, Slot
from mpgraph.capture.detect import NeedsDynamo, watch
from mpgraph.capture.held import Held, held_in
from mpgraph.capture.modes import Marks
from mpgraph.capture.size_guards import size_guards
from mpgraph.capture.taken_values import taken_values_refused
from mpgraph.capture.threads import other_threads_untraced
from mpgraph.capture.transforms import refuse_transforms
from mpgraph.capture.writes import writes_taken_back
from mpgraph.lru_caches import no_traced_values_cached
from mpgraph.plain import MODULE_STATE
from mpgraph.recurrent import looked_at
from mpgraph.refused_in_16_bit import looked_at_in_fp32
from mpgraph.structure import (
    Spec,
    count_leaves,
    flatten,
    opaque_values,
    same_leaves,
    unflatten,
)
from mpgraph.weights import is_trainable_leaf

Forward = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a model, its tensors apart from the rest.

    Attributes:
        leaves: The tensors among the arguments, in order.
        spec: How ``(args, kwargs)`` are put together again.
        names: A readable name per leaf.
        dynamic: Per leaf, the dimensions whose size may vary.
        says_compiling: What ``torch.compiler.is_compiling()`` answers inside the model.
        forward_only: The graph is never asked for gradients: what acts on them alone (a custom
            backward, hooks, checkpoints) need not be carried.
        known_moves: What earlier calls have done to the model's state that made their graphs hold
            only once: see :func:`mpgraph.capture.attribute_changes.moves`.
    """

    leaves: Sequence[torch.Tensor]
    spec: Spec
    names: Sequence[str]
    dynamic: Sequence[frozenset[int]]
    says_compiling: bool = False
    forward_only: bool = False
    known_moves: frozenset[str] = frozenset()

    def describe(self) -> str:
        """The attempt in a few words, for the log."""
        sizes = "dynamic" if any(self.dynamic) else "fixed"
        return f"{sizes} sizes, is_compiling() {self.says_compiling}"


@dataclasses.dataclass
class _Plan:
    """What the wrapper calls, and what it noticed while it was traced.

    An object of its own: export copies the plain attributes of the modules that it traces.
    """

    model: nn.Module
    forward: Forward
    call: Call
    marks: Marks
    output: Spec | None = None
    assignments: tuple[Assignment, ...] = ()
    set_once: list[str] = dataclasses.field(default_factory=list)
    reads: Reads = dataclasses.field(default_factory=dict)
    reads_mode: bool = False
    moves: set[str] = dataclasses.field(default_factory=set)

    def note_move(self, move: str) -> None:
        """Accept a change of state that calls for another graph the first time, no more."""
        if move in self.call.known_moves:
            raise NeedsDynamo(move)
        if move:
            self.moves.add(move)


class _FlatModule(nn.Module):
    """Calls ``forward(model, *args, **kwargs)`` from flat leaves and returns flat leaves."""

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self.model = plan.model
        self.plan = plan
        # Not train(): that would reset modules that the user has frozen in eval mode.
        self.training = plan.model.training

    def forward(self, *leaves: torch.Tensor) -> list[Any]:
        plan = self.plan
        plan.marks.begin(plan.model.parameters())
        # Models ask `key is query`: what was one tensor for the caller is one here.
        if same := same_leaves(plan.call.leaves):
            leaves = tuple(leaves[index] for index in same)
        args, kwargs = unflatten(plan.call.spec, leaves)
        held = held_in(opaque_values(plan.call.spec))
        noted = attribute_changes(plan.model, plan.set_once)
        with noted as traces, compiling(plan.call.says_compiling), taken_values_refused():
            value = plan.forward(plan.model, *args, **kwargs)
        plan.reads, plan.reads_mode = traces.reads, traces.reads_mode
        _refuse_changed_arguments(args, kwargs, leaves, plan.call.spec, held)
        outputs, plan.output = flatten(value)
        _refuse_opaque(plan.output)
        assignments = []
        for (path, name, is_buffer), changed in traces.assigned.items():
            plan.note_move(moves(plan.model, plan.reads, path, name, changed))
            parts, part_spec = flatten(changed)
            outputs.extend(parts)
            assignments.append(Assignment(path, name, is_buffer, part_spec))
        plan.assignments = tuple(assignments)
        return outputs


@contextlib.contextmanager
def compiling(says: bool) -> Iterator[None]:
    """What ``torch.compiler.is_compiling()`` answers in the block."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = [getattr(torch.compiler, flag) for flag in flags]
    for flag in flags:
        setattr(torch.compiler, flag, says)
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            setattr(torch.compiler, flag, value)


def _refuse_changed_arguments(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Sequence[Any],
    spec: Spec,
    held: Sequence[Held],
) -> None:
    """A container or object that the caller passed in must not differ after the call."""
    after, spec_after = flatten((args, kwargs))
    is_same = spec_after == spec and all(a is b for a, b in zip(after, leaves, strict=True))
    if not is_same or any(item.has_changed() for item in held):
        raise NeedsDynamo("forward changes a container or an object among its arguments")


def _refuse_opaque(output: Spec) -> None:
    for value in opaque_values(output):
        raise NeedsDynamo(
            f"forward returns an object of type {type(value).__name__!r}, which cannot be taken "
            "apart into tensors"
        )


def capture_export(
    model: nn.Module,
    forward: Forward,
    call: Call,
    autocast: contextlib.AbstractContextManager[Any],
    device: str = "cpu",
) -> Captured:
    """Export one call of ``forward(model, …)``, traced inside ``autocast`` of ``device``.

    Raises:
        NeedsDynamo: Exporting would drop something; the other engine can carry it.
        Exception: Whatever torch.export or the model raises.
    """
    started = time.perf_counter()
    plan = _Plan(model, forward, call, Marks(device))
    program = _trace(plan, autocast)
    if plan.set_once:
        plan, program = _settled(plan, program, autocast)
    assert plan.output is not None
    gm, marks = program.graph_module, plan.marks
    marks.check(gm)
    refuse_transforms(gm)
    _refuse_generators(gm)
    slots, constants = _slots(program, call, model)
    live = _live(gm)
    for node, slot in zip(gm.graph.find_nodes(op="placeholder"), slots, strict=True):
        if node in live:
            marks.refuse_stray(constants.get(slot.target))
    _annotate(gm, slots, call)
    _say_what_requires_grad(gm, call, model, constants)
    gm.meta["results"] = count_leaves(plan.output)
    accepts = size_guards(program)
    _drop_unused_placeholders(gm)
    seconds = time.perf_counter() - started
    return Captured(
        gm, constants, plan.output, plan.assignments, accepts, seconds, plan.reads, plan.moves,
        plan.reads_mode,
    )  # fmt: skip


def _trace(
    plan: _Plan, autocast: contextlib.AbstractContextManager[Any]
) -> torch.export.ExportedProgram:
    with (
        writes_taken_back(),
        _quiet(),
        torch.random.fork_rng(devices=[]),
        watch(forward_only=plan.call.forward_only),
        _same_containers(plan.model),
    ):
        with autocast, plan.marks.made(), other_threads_untraced(), looked_at, looked_at_in_fp32:
            return _export(_FlatModule(plan), plan.call)


def _settled(
    plan: _Plan,
    program: torch.export.ExportedProgram,
    autocast: contextlib.AbstractContextManager[Any],
) -> tuple[_Plan, torch.export.ExportedProgram]:
    """Trace again what has set a plain value in an object, such as a config's default.

    A value that the first call sets and no later one does is carried, if both calls compute the
    same: it stays set, as after a call in eager mode. A counter is not.
    """
    again = dataclasses.replace(plan, marks=Marks(plan.marks.device), set_once=[], moves=set())
    repeated = _trace(again, autocast)
    if again.set_once or str(repeated.graph) != str(program.graph):
        raise NeedsDynamo(changes_what_is_held(plan.set_once[0]))
    return again, repeated


def _live(gm: fx.GraphModule) -> set[fx.Node]:
    """What the results depend on. torch.nn.LSTM looks at its real parameters, to no effect."""
    live: set[fx.Node] = set()
    waiting = [gm.graph.output_node()]
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting.extend(node.all_input_nodes)
    return live


@contextlib.contextmanager
def _same_containers(model: nn.Module) -> Iterator[None]:
    """Give every module its own lists and dicts back: torch.export leaves copies in their place."""
    before = [(vars(m), dict(vars(m))) for m in model.modules()]
    try:
        yield
    finally:
        for table, old in before:
            for name, value in old.items():
                if isinstance(value, (list, dict, set)) and name not in MODULE_STATE:
                    table[name] = value


def _refuse_generators(gm: fx.GraphModule) -> None:
    for body in ir.all_graphs(gm):
        for node in body.graph.nodes:
            if node.kwargs.get("generator") is not None:
                line = ir.source_line(node)
                raise NeedsDynamo("a random generator made in forward would be frozen", line)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's own notices and dumps of half-traced graphs from the user."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    disabled = [logger.disabled for logger in loggers]
    # torch.export prints the half-traced graph of a failed attempt to stderr.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, before in zip(loggers, disabled, strict=True):
                logger.disabled = before


_LOGGERS = (
    "torch.export",
    "torch._export",
    "torch._export.non_strict_utils",
    "torch.export._trace",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.proxy_tensor",
)


def _export(wrapper: _FlatModule, call: Call) -> torch.export.ExportedProgram:
    shapes = tuple({dim: Dim.AUTO for dim in sorted(dims)} for dims in call.dynamic)
    with no_traced_values_cached():
        return torch.export.export(
            wrapper, tuple(call.leaves), {}, strict=False, dynamic_shapes={"leaves": shapes}
        )


_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.CUSTOM_OBJ: "constant",
}


def _slots(
    program: torch.export.ExportedProgram, call: Call, model: nn.Module
) -> tuple[list[Slot], dict[str, Any]]:
    slots: list[Slot] = []
    constants: dict[str, Any] = {}
    inputs = 0
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            assert not isinstance(spec.arg, ConstantArgument)
            slots.append(Slot("input", call.names[inputs], inputs))
            inputs += 1
            continue
        target = str(spec.target)
        kind, path = _KINDS[spec.kind], target.removeprefix("model.")
        if kind == "constant":
            constants[path] = program.constants[target]
            if target.startswith("model.") and _has_attribute(model, path):
                kind = "attribute"
        elif not target.startswith("model."):
            raise NeedsDynamo(f"the state {target!r} does not belong to the model")
        slots.append(Slot(kind, path))  # type: ignore[arg-type]
    return slots, constants


def _has_attribute(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return isinstance(getattr(model.get_submodule(owner), name), torch.Tensor)
    except AttributeError:
        return False


def _annotate(gm: fx.GraphModule, slots: list[Slot], call: Call) -> None:
    for node, slot in zip(gm.graph.find_nodes(op="placeholder"), slots, strict=True):
        name = f"{_PREFIX[slot.kind]}{slot.target}"
        node._rename(re.sub(r"\W", "_", name))
        node.target = node.name
        node.meta["slot"] = slot
        node.meta["leaf"] = slot.kind == "parameter" or (
            slot.kind == "input" and is_trainable_leaf(call.leaves[slot.index])
        )
        node.meta["differentiable"] = slot.kind in ("parameter", "input")
    for body in ir.all_graphs(gm):
        for node in body.graph.nodes:
            node.meta["module_path"] = _module_path(node)
            node.meta["captured"] = node.meta.get("val")


def _say_what_requires_grad(
    gm: fx.GraphModule, call: Call, model: nn.Module, constants: dict[str, Any]
) -> None:
    for node in gm.graph.find_nodes(op="placeholder"):
        slot = node.meta["slot"]
        if slot.kind == "input":
            value = call.leaves[slot.index]
        elif slot.kind == "constant":
            value = constants[slot.target]
        else:
            owner, _, name = slot.target.rpartition(".")
            value = getattr(model.get_submodule(owner), name)
        node.meta["requires_grad"] = isinstance(value, torch.Tensor) and value.requires_grad


_PREFIX = {"parameter": "p_", "buffer": "b_", "constant": "c_", "attribute": "a_", "input": ""}


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    if path == "model" or not path.startswith("model."):
        return ""
    return re.sub(r"@\d+", "", path.removeprefix("model."))


def _drop_unused_placeholders(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.find_nodes(op="placeholder")):
        if not node.users:
            gm.graph.erase_node(node)
