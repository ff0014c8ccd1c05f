"""Which engine captures a call, and what happens between capture and the first run."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from mpgraph import ir
from mpgraph.capture.breaks import refusal
from mpgraph.capture.captured import Captured
from mpgraph.capture.detect import NeedsDynamo
from mpgraph.capture.dynamo import DynamoEntry, is_carried, make_entry
from mpgraph.capture.export import Call, capture_export
from mpgraph.capture.overrides import called
from mpgraph.capture.own_error import raise_own_error
from mpgraph.capture.reasons import plain_reason
from mpgraph.capture.undo import undone_on_failure
from mpgraph.errors import MPGraphError
from mpgraph.infer import forget_real_tensors
from mpgraph.module import State, is_transformed
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.pipeline import PassContext, PassReport, run_passes
from mpgraph.precision import logger
from mpgraph.specialisation import Specialisation, make_specialisation
from mpgraph.structure import Leaf, Plain, Spec, leaf_names, named_parts, opaque_values
from mpgraph.tracing import capturing
from mpgraph.unguarded import watch
from mpgraph.verify import verify_scaling

_VALUES_IN_LABEL = 8


def capture_call(
    state: State, model: nn.Module, leaves: list[Any], spec: Spec, earlier: list[Any]
) -> Specialisation | DynamoEntry:
    """Capture one call, rewrite the graph, and make it ready to run.

    Raises:
        CaptureError: No engine can carry the call; says why, and what to do.
    """
    if state.settings.scaled and not state.scale.is_guarded:
        watch(model)
    context = state.context()
    names = argument_names(spec)
    label = _label(model, leaves, spec)
    shapes = [leaf.shape for leaf in leaves]
    earlier[:] = [entry for entry in earlier if not getattr(entry, "failed", False)]
    failure: BaseException
    if is_transformed():
        failure = NeedsDynamo("a function transform such as torch.func.vmap is around the call")
        if state.settings.capture == "export":
            raise refusal(failure)
        return make_entry(state, model, context, label, shapes, failure)
    if state.settings.capture == "dynamo" or is_carried(state, model):
        return make_entry(state, model, context, label, shapes)
    try:
        captured, reports = _capture_export(state, model, leaves, spec, names, earlier, context)
    except MPGraphError:
        raise
    except (NeedsDynamo, Exception) as error:
        failure = error
    else:
        forget_real_tensors(captured.graph_module)
        check_overrides(state, model, captured.graph_module)
        return make_specialisation(model, state, captured, reports, context, label, shapes)
    # Not inside the handler: torch's error would be printed as the cause of the model's own.
    if not isinstance(failure, NeedsDynamo) and not plain_reason(failure):
        raise_own_error(state, model, leaves, spec, context)
    if state.settings.capture == "export":
        raise refusal(failure) from failure
    return make_entry(state, model, context, label, shapes, failure)


def check_overrides(state: State, model: nn.Module, *graphs: fx.GraphModule) -> None:
    """Refuse a policy with an override that selects nothing in the first graphs captured.

    Later ones may well lack a module (dropout in eval mode) that an override names.
    """
    if not state.specialisations():
        bodies = (body for gm in graphs for body in ir.all_graphs(gm))
        modules = [path for path, _ in model.named_modules()]
        state.settings.policy.check_overrides(called(bodies), modules)


def argument_names(spec: Spec) -> list[str]:
    """A readable name for every tensor among the arguments of a call."""
    # The description is of (args, kwargs): "0_0" is args[0], "1_x" is kwargs["x"].
    return [_argument_name(name) for name in leaf_names(spec)]


def _argument_name(name: str) -> str:
    group, _, rest = name.partition("_")
    return rest if group == "1" else f"arg_{rest}"


def _dynamic_dims(leaves: list[Any], earlier: list[Any]) -> list[frozenset[int]]:
    """Dimensions that may vary: batch and sequence at first, then whatever has varied."""
    dims = [likely_dynamic(leaf) for leaf in leaves]
    for entry in earlier:
        for index, shape in enumerate(entry.shapes):
            changed = {d for d, size in enumerate(shape) if leaves[index].shape[d] != size}
            dims[index] |= changed
    return dims


def likely_dynamic(leaf: torch.Tensor) -> frozenset[int]:
    """The batch; and the second dimension of token ids and of (batch, sequence, features)."""
    if leaf.dim() == 0:
        return frozenset()
    is_sequence = leaf.dim() == 3 or (leaf.dim() == 2 and not leaf.is_floating_point())
    return frozenset({0, 1} if is_sequence else {0})


def _capture_export(
    state: State,
    model: nn.Module,
    leaves: list[Any],
    spec: Spec,
    names: list[str],
    earlier: list[Any],
    context: PassContext,
) -> tuple[Captured, list[PassReport]]:
    call = Call(
        leaves, spec, names, _dynamic_dims(leaves, earlier), known_moves=frozenset(state.moves)
    )
    return export_call(state, model, call, context)


def export_call(
    state: State, model: nn.Module, call: Call, context: PassContext
) -> tuple[Captured, list[PassReport]]:
    """Export with dynamic sizes on the path of eager mode, and otherwise where that cannot be."""
    forward = state.original_forward()
    failure: Exception | None = None
    # What a call may be inside of would answer for torch when it is asked for dtypes.
    with capturing(), torch.autocast(context.device, enabled=False):
        for attempt in _attempts(call):
            if isinstance(failure, GuardOnDataDependentSymNode) and not attempt.says_compiling:
                continue  # a value, not a size, is what the model needs to know
            try:
                with undone_on_failure(model, opaque_values(call.spec)):
                    captured = capture_export(
                        model, forward, attempt, context.autocast(), context.device
                    )
                reports = run_passes(captured.graph_module, DEFAULT_PASSES, context)
                if context.scaled:
                    verify_scaling(captured.graph_module, grad=context.grad)
                return captured, reports
            except (NeedsDynamo, MPGraphError):
                raise
            except Exception as error:
                logger.debug("capture with %s failed: %s", attempt.describe(), error)
                failure = error
    assert failure is not None
    raise failure


def _attempts(call: Call) -> list[Call]:
    """The ways to export one call, the most faithful and most general first.

    Models ask ``torch.compiler.is_compiling()`` to leave out what depends on data, and then
    compute the same thing another way, with other roundings: so they are first told that they
    run eagerly, which they do.
    """
    static = dataclasses.replace(call, dynamic=[frozenset()] * len(call.leaves))
    sizes = [call, static] if any(call.dynamic) else [static]
    return [dataclasses.replace(c, says_compiling=flag) for c in sizes for flag in (False, True)]


def _label(model: nn.Module, leaves: list[Any], spec: Spec) -> str:
    mode = "train" if model.training else "eval"
    grad = "" if torch.is_grad_enabled() else ", no_grad"
    return f"{type(model).__name__} {mode}{grad} ({', '.join(_described(leaves, spec))})"


def _described(leaves: list[Any], spec: Spec) -> Iterator[str]:
    """The arguments of a call: tensors by dtype and sizes, the first few other values as text."""
    rest, room = iter(leaves), _VALUES_IN_LABEL
    for name, part in named_parts(spec):
        if isinstance(part, Leaf):
            leaf = next(rest)
            if isinstance(leaf, torch.Tensor):
                yield ir.describe(_argument_name(name), leaf)
        elif isinstance(part, Plain) and part.value is not None and room:
            room -= 1
            yield f"{_argument_name(name)}={reprlib.repr(part.value)}" if room else "…"
