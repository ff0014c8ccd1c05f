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
from mpgraph.capture.captured import Assignment, Captured, Slot
from mpgraph.capture.detect import NeedsDynamo, watch
from mpgraph.capture.held import Held, held_by, held_by_code, held_in
from mpgraph.capture.miscounts import refuse_miscounted
from mpgraph.capture.modes import Marks
from mpgraph.capture.threads import other_threads_untraced
from mpgraph.capture.transforms import refuse_transforms
from mpgraph.capture.writes import writes_taken_back
from mpgraph.code_state import CodeState
from mpgraph.plain import MODULE_STATE, tables_of
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
_MISSING = object()


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
    """

    leaves: Sequence[torch.Tensor]
    spec: Spec
    names: Sequence[str]
    dynamic: Sequence[frozenset[int]]
    says_compiling: bool = False
    forward_only: bool = False

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
        with _attribute_changes(plan) as changes, compiling(plan.call.says_compiling):
            value = plan.forward(plan.model, *args, **kwargs)
        _refuse_changed_arguments(args, kwargs, leaves, plan.call.spec, held)
        outputs, plan.output = flatten(value)
        _refuse_opaque(plan.output)
        assignments = []
        for (path, name, is_buffer), changed in changes.items():
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
    accepts = _guards(program)
    _drop_unused_placeholders(gm)
    seconds = time.perf_counter() - started
    return Captured(gm, constants, plan.output, plan.assignments, accepts, seconds)


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
        with autocast, plan.marks.made(), other_threads_untraced():
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
    again = dataclasses.replace(plan, marks=Marks(plan.marks.device), set_once=[])
    repeated = _trace(again, autocast)
    if again.set_once or str(repeated.graph) != str(program.graph):
        raise NeedsDynamo(_changes(plan.set_once[0]))
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
    return torch.export.export(
        wrapper, tuple(call.leaves), {}, strict=False, dynamic_shapes={"leaves": shapes}
    )


@contextlib.contextmanager
def _attribute_changes(plan: _Plan) -> Iterator[dict[tuple[str, str, bool], Any]]:
    """Collect what the block assigns to modules, and put everything back as it was.

    But for plain values in objects that the modules hold: those are noted in the plan.
    """
    model = plan.model
    before = {path: _state(module) for path, module in model.named_modules()}
    code = CodeState(list(model.modules()))
    code_held, values = held_by_code(code), code.values()
    held = [*held_by(model), *code_held]
    changes: dict[tuple[str, str, bool], Any] = {}
    yield changes
    for path, module in model.named_modules():
        old_buffers, old_attributes = before.get(path, ({}, {}))
        changes.update(_restore(path, tables_of(module).buffers, old_buffers, True))
        changes.update(_restore(path, vars(module), old_attributes, False))
    for item in held:
        if item.has_other_plain_values():
            plan.set_once.append(item.path)
        elif item.has_changed():
            if item in code_held:
                refuse_miscounted(item.path)
            raise NeedsDynamo(_changes(item.path))
    for name in code.changed_since(values):
        raise NeedsDynamo(f"forward changes {name}, which a graph would freeze")


def _changes(path: str) -> str:
    return f"forward changes what is held by {path!r}"


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    attributes = {k: v for k, v in vars(module).items() if k not in MODULE_STATE}
    return dict(tables_of(module).buffers), attributes


# What torch.nn.RNNBase remembers of its parameters; it renews this at every call.
_BOOKKEEPING = frozenset({"_flat_weights", "_flat_weight_refs"})
# transformers installs its output hooks at the first call, and notes that here.
_KEPT = frozenset({"_output_capturing_hooks_installed"})


def _restore(
    path: str, current: dict[str, Any], old: dict[str, Any], is_buffer: bool
) -> dict[tuple[str, str, bool], Any]:
    changed = {}
    for name in list(current):
        if not is_buffer and name in MODULE_STATE:
            continue
        value, earlier = current[name], old.get(name, _MISSING)
        if value is earlier or _is_same_plain(value, earlier) or name in _KEPT:
            continue
        if name not in _BOOKKEEPING:
            _refuse_plain(path, name, value)
            changed[path, name, is_buffer] = value
        if earlier is _MISSING:
            del current[name]
        else:
            current[name] = earlier
    return changed


def _is_same_plain(value: Any, earlier: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(earlier, torch.Tensor):
        return False
    try:
        return type(value) is type(earlier) and bool(value == earlier)
    except Exception:
        return False


def _refuse_plain(path: str, name: str, value: Any) -> None:
    leaves, spec = flatten(value)
    if not leaves or any(True for _ in opaque_values(spec)):
        owner = f"{path}.{name}" if path else name
        raise NeedsDynamo(f"forward changes the attribute {owner!r}, which a graph would freeze")


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


def _guards(program: torch.export.ExportedProgram) -> Callable[[Sequence[Any]], bool]:
    """A check of the sizes of the input leaves against what the graph was traced for."""
    conditions = list(program._guards_code)
    first: dict[Any, str] = {}
    values = [
        node.meta["captured"]
        for node, spec in zip(
            program.graph.find_nodes(op="placeholder"),
            program.graph_signature.input_specs,
            strict=True,
        )
        if spec.kind is InputKind.USER_INPUT
    ]
    for index, value in enumerate(values):
        for dim, size in enumerate(value.shape):
            text = f"L['leaves'][{index}].size()[{dim}]"
            conditions.extend(_size_condition(text, size, first, program.range_constraints))
    source = " and ".join(f"({c})" for c in conditions) or "True"
    return _compile_guards(source)


def _size_condition(
    text: str, size: Any, first: dict[Any, str], ranges: dict[Any, Any]
) -> Iterator[str]:
    if isinstance(size, int):
        yield f"{text} == {size}"
        return
    expression = size.node.expr
    if expression in first:
        yield f"{text} == {first[expression]}"
        return
    first[expression] = text
    limits = ranges.get(expression)
    if limits is not None:
        yield f"{text} >= {max(int(limits.lower), 2)}"
        if limits.upper.is_finite and limits.upper < 2**31:
            yield f"{text} <= {int(limits.upper)}"
    elif len(expression.free_symbols) != 1 or expression not in expression.free_symbols:
        # A size such as 2*s0: tied to what s0 is elsewhere; the hint is the only sure value.
        yield f"{text} == {size.node.hint}"


def _compile_guards(source: str) -> Callable[[Sequence[Any]], bool]:
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    check = eval(f"lambda L: {source}", {**SYMPY_INTERP})

    def accepts(leaves: Sequence[Any]) -> bool:
        return bool(check({"leaves": leaves}))

    accepts.source = source  # type: ignore[attr-defined]
    return accepts
