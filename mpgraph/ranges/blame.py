"""``blame``: replay a step, and name the first value that left the range of fp16."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from mpgraph import ir
from mpgraph.finding import converted_modules
from mpgraph.loss_scale import CurrentScale, LossScale
from mpgraph.module import State, state_of
from mpgraph.op_table import MOVES_DATA
from mpgraph.plain import STATE
from mpgraph.policy import Override, Policy
from mpgraph.precision import logger
from mpgraph.ranges.cure import best_scale, is_too_low, pins, with_pins
from mpgraph.ranges.records import Finding, Kind, NodeRange, Spread
from mpgraph.ranges.replay import (
    Step,
    Trace,
    loss_seeds,
    replay,
    unwrapped,
)
from mpgraph.ranges.report import RangeReport
from mpgraph.ranges.trail import Origin, Spot, find_origin, given_wrong, is_half
from mpgraph.ranges.watch import Run

_ROUNDS = 8


def blame(
    model: nn.Module,
    *args: Any,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    try_cure: bool = True,
    **kwargs: Any,
) -> RangeReport:
    """Replay one training step, and report the range of every value and gradient in it.

    The step runs twice, node by node: as it is, and in fp32, for the true values under the same
    names. If its loss or a gradient is not finite, ``report.finding`` names the first value that
    left the range of fp16 and led to it, forward or backward, with its module, the line of the
    model's source, its true magnitude, and what to pin or which loss scale to take. Models in
    other precisions are reported on too: would they fit fp16?

    Nothing is changed: parameters, ``.grad``, buffers, attributes, random states and the loss
    scale are as they were before.

    Args:
        model: A converted model, or an ordinary one (or DistributedDataParallel) with converted
            models in it; in the mode, train or eval, in which it is to run.
        args: What to call it with.
        loss_fn: Takes the model's result, returns a tensor with one element. Without it, the
            result itself or its ``loss`` is taken; if neither is one number, only the forward
            pass is replayed.
        try_cure: Run the step again with what is suggested, capturing it anew, and suggest more
            where that does not suffice.
        kwargs: What to call it with, by name.

    Raises:
        MPGraphError: The model was not converted, or ``loss_fn`` gives no single number. What the
            model itself raises, comes through.

    Example:
        >>> import mpgraph, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> _ = torch.nn.init.constant_(model[0].weight, 6e4)
        >>> model = mpgraph.convert(model, "fp16")
        >>> report = mpgraph.blame(model, torch.ones(3, 4), loss_fn=lambda y: y.mean())
        >>> report.finding.kind, report.finding.module, report.finding.overrides
        ('forward', '0', ('module=0 run=fp32', 'module=1 run=fp32'))
    """
    inner = unwrapped(model)
    step = Step(inner, lambda: inner(*args, **kwargs), loss_seeds(loss_fn), (args, kwargs))
    return blame_step(step, try_cure=try_cure)


def blame_step(step: Step, *, try_cure: bool = True) -> RangeReport:
    """The same for a step that says itself how it runs."""
    case = _Case(step)
    report = case.report()
    if report.finding is None or not try_cure:
        return report
    return dataclasses.replace(report, finding=_tried(case, report.finding))


class _Case:
    """One step, as it is and in fp32."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.models = list(converted_modules(step.model, "fp16").values())
        # As it is first: what the model raises by itself should come from there.
        self.trace = replay(step)
        self.true, self.missing = _true(step)
        self.by_state = {id(state_of(model)): model for model in self.models}
        self.blamed: nn.Module = self.models[0]

    def report(self) -> RangeReport:
        """Everything that was seen, and what it comes down to."""
        state = state_of(self.models[0])
        gradients = [spread for _, _, spread in self.true_gradients()]
        return RangeReport(
            model=type(self.step.model).__name__,
            precision=state.settings.precision.name,
            policy=str(state.settings.policy),
            scale=self.scale(),
            loss=self.trace.loss,
            nodes=tuple(self._nodes()),
            finding=self._finding(),
            suggested_scale=best_scale(gradients),
            notes=tuple(self._notes()),
        )

    def scale(self) -> float | None:
        """The loss scale; None if there is none."""
        scaled = [state_of(m) for m in self.models if state_of(m).settings.scaled]
        return float(scaled[0].scale.value.scale) if scaled else None

    def true_of(self, run: Run) -> Run | None:
        """The same run in fp32."""
        index = self.trace.runs.index(run)
        known = self.true is not None and index < len(self.true.runs)
        return self.true.runs[index] if self.true is not None and known else None

    def true_gradients(self) -> Iterator[tuple[Run, fx.Node, Spread]]:
        """The true gradients of what fp16 would hold: 16-bit values, or, without any, all."""
        every = not any(is_half(n) for run in self.trace.runs for n in run.forward)
        for run in self.trace.runs:
            true = self.true_of(run)
            for node, spread in (true.gradient if true is not None else {}).items():
                if every or is_half(node):
                    yield run, node, spread

    def _nodes(self) -> Iterator[NodeRange]:
        for number, run in enumerate(self.trace.runs, start=1):
            true = self.true_of(run)
            for node, forward in run.forward.items():
                yield dataclasses.replace(
                    _place(node),
                    graph=number,
                    forward=forward,
                    gradient=run.gradient.get(node),
                    true_forward=true.forward.get(node) if true else None,
                    true_gradient=true.gradient.get(node) if true else None,
                )

    def _notes(self) -> Iterator[str]:
        if not self.trace.has_backward and not self.trace.bad_loss:
            yield (
                "There is no loss, so no backward pass was replayed: pass loss_fn, which takes "
                "the model's result."
            )
        if self.missing:
            yield f"The step could not run in fp32 for comparison: {self.missing}"
        breaks = [b for entry in self.trace.entries for b in getattr(entry, "breaks", ())]
        if breaks:
            lines = ", ".join(dict.fromkeys(b.line for b in breaks if b.line))
            yield (
                "What Dynamo leaves to Python, between graphs and in some calls, is not seen here"
                f"{': ' + lines if lines else ''}. mpgraph.explain(model) says why."
            )

    # --- what went wrong ------------------------------------------------------------------

    def _finding(self) -> Finding | None:
        if self._is_harmless():
            return None
        if self.true is not None and not self._is_true_finite():
            return self._beyond_fp32(self.true)
        origin = find_origin(self.trace, self.true)
        if origin is None:
            return self._outside()
        return self._of_origin(origin)

    def _is_harmless(self) -> bool:
        if self.trace.has_backward or self.trace.bad_loss:
            return self.trace.is_finite
        # Without a loss only results tell; some may be meant to be infinite.
        return self.trace.bad_results <= (self.true.bad_results if self.true is not None else 0)

    def _is_true_finite(self) -> bool:
        assert self.true is not None
        return self.true.is_finite or not (self.trace.has_backward or self.trace.bad_loss)

    def _beyond_fp32(self, true: Trace) -> Finding:
        """Not fp16's doing."""
        for run, node in given_wrong(true):
            kind: Kind = "input" if node.meta["slot"].kind == "input" else "parameter"
            if _is_from_python(run, node, true):
                kind = "between"
            return _finding(kind, node, run.forward[node], name=node.meta["slot"].target)
        origin = find_origin(true, None)
        if origin is None:
            return Finding("loss", largest=_magnitude(self.trace.loss))
        if _is_whole(origin):
            # A body that ran in 16 bit in either replay: what fp32 would do is not known.
            own = find_origin(self.trace, None)
            return self._of_origin(own) if own is not None else Finding("between")
        spread = (origin.run.forward if origin.side == "forward" else origin.run.gradient)[
            origin.node
        ]
        return _finding("fp32", origin.node, spread, spread)

    def _outside(self) -> Finding:
        if self.trace.bad_loss and not self.trace.bad_results:
            return Finding("loss", largest=_magnitude(self.trace.loss))
        return Finding("between")

    def _of_origin(self, origin: Origin) -> Finding:
        run, node = origin.run, origin.node
        true = self.true_of(run)
        forward = origin.side == "forward"
        if forward and node.op == "placeholder" and run.parent is None and self._is_between(node):
            return _finding("between", node, run.forward[node])
        known = (true.forward if forward else true.gradient).get(node) if true else None
        spread = run.forward[node] if forward else run.gradient[node]
        finding = _finding("forward" if forward else "backward", node, spread, known)
        if forward and true is not None and node.op != "placeholder" and ir.is_inserted(node):
            finding = dataclasses.replace(finding, source=_grown_in(ir.cast_source(node), true))
        return self._with_cure(finding, origin)

    def _is_between(self, node: fx.Node) -> bool:
        """Whether an input of a graph was right in fp32, and no 16-bit copy made by mpgraph."""
        slot = node.meta.get("slot")
        return getattr(slot, "kind", "") == "input" and getattr(slot, "dtype", None) is None

    def _with_cure(self, finding: Finding, origin: Origin) -> Finding:
        self.blamed = model = self.by_state[id(origin.run.owner)]
        policy = state_of(model).settings.policy
        overrides = pins(self._too_large(origin), model, policy)
        if finding.kind == "backward":
            finding = dataclasses.replace(finding, scale=self._scale_that_fits())
        return with_overrides(finding, policy, overrides)

    def _scale_that_fits(self) -> float | None:
        gradients = [spread for _, _, spread in self.true_gradients()]
        scale, now = best_scale(gradients), self.scale()
        if scale is None or now is None or scale >= now or is_too_low(scale, gradients):
            return None
        return scale

    def _too_large(self, origin: Origin) -> list[Spot]:
        """The first value that went wrong, and every other that fp16 cannot hold either."""
        scale = self.scale() or 1.0
        found: list[Spot] = [(origin.run, origin.node)]
        spots: Sequence[Spot] = origin.trail
        if origin.side == "backward":
            spots = [(run, node) for run, node, _ in self.true_gradients()]
        for run, node in spots:
            true = self.true_of(run)
            if true is None or not is_half(node) or run.owner is not origin.run.owner:
                continue
            known = true.forward if origin.side == "forward" else true.gradient
            factor = 1.0 if origin.side == "forward" else scale
            if node in known and known[node].overflows(factor):
                found.append((run, node))
        return found


def _true(step: Step) -> tuple[Trace | None, str]:
    """The step in fp32; or why it cannot run so."""
    try:
        return replay(step, true=True), ""
    except Exception as error:
        logger.debug("no replay in fp32: %r", error)
        return None, str(error).splitlines()[0] if str(error) else repr(error)


def _is_from_python(run: Run, node: fx.Node, trace: Trace) -> bool:
    """Whether an input of one of Dynamo's later graphs has been computed in the step itself."""
    is_later = any(r.owner is run.owner for r in trace.runs[: trace.runs.index(run)])
    is_computed = node.meta.get("differentiable") and not node.meta.get("leaf")
    return bool(run.graph_module.meta.get("crossing") and is_later and is_computed)


def _is_whole(origin: Origin) -> bool:
    """Whether a value, or a gradient, comes right out of a body that runs as a whole."""
    node = origin.node
    near = [node, *node.all_input_nodes] if origin.side == "forward" else node.users
    return any(ir.is_higher_order(n) and n not in origin.run.inner for n in near)


def _place(node: fx.Node) -> NodeRange:
    slot = node.meta.get("slot")
    reader = next(iter(node.users), node) if node.op == "placeholder" else node
    dtype = ir.dtype_of(node)
    return NodeRange(
        name=node.name,
        operator=str(node.target) if node.op == "call_function" else "",
        module=ir.module_path(reader),
        line=ir.source_line(reader),
        dtype=ir.short_name(dtype) if dtype is not None else "",
        role=_role(node, getattr(slot, "kind", "")),
    )


def _role(node: fx.Node, kind: str) -> str:
    if node.op == "call_function":
        return "cast" if ir.is_inserted(node) else "operator"
    return {"cast": "weight", "parameter": "parameter", "input": "input"}.get(kind, "other")


def _finding(
    kind: Kind, node: fx.Node, spread: Spread, true: Spread | None = None, name: str = ""
) -> Finding:
    place = _place(node)
    return Finding(
        kind,
        name or place.name,
        place.operator,
        place.module,
        place.line,
        place.dtype,
        source=_source(node),
        largest=true.largest if true is not None else None,
        bad=spread.bad,
        count=spread.count,
    )


def _source(node: fx.Node) -> str:
    """What a cast casts, or a weight's copy copies."""
    if node.op == "placeholder":
        return _name(node)
    if not ir.is_inserted(node):
        return ""
    source = ir.cast_source(node)
    while source.op == "call_function" and (ir.is_inserted(source) or _is_view(source)):
        source = source.all_input_nodes[0]
    return _name(source)


def _grown_in(node: fx.Node, true: Run) -> str:
    """Where a value first grew beyond fp16's end, on its way through fp32."""
    while True:
        large = (s for s in node.all_input_nodes if not is_half(s) and s in true.forward)
        source = next((s for s in large if true.forward[s].overflows()), None)
        if source is None:
            return _name(node)
        node = source


def _name(node: fx.Node) -> str:
    """The input or parameter that a node stands for, else its module, else itself."""
    slot = node.meta.get("slot")
    return str(slot.target) if slot is not None else ir.module_path(node) or node.name


def _is_view(node: fx.Node) -> bool:
    return ir.operator_name(node) in MOVES_DATA and bool(node.all_input_nodes)


def _magnitude(loss: float | None) -> float | None:
    return None if loss is None or loss != loss or abs(loss) == float("inf") else abs(loss)


def with_overrides(finding: Finding, policy: Policy, overrides: Sequence[Override]) -> Finding:
    """The finding with what to pin, as lines and as a policy."""
    if not overrides:
        return finding
    lines = tuple(str(override) for override in overrides)
    return dataclasses.replace(
        finding, overrides=lines, policy=str(with_pins(policy, list(overrides)))
    )


# --- trying the cure ------------------------------------------------------------------------


def _tried(case: _Case, finding: Finding) -> Finding:
    """The finding with a cure that has been tried; more pins where the first do not suffice."""
    if finding.scale is not None:
        with _scale_of(case.blamed, finding.scale):
            if replay(case.step).is_finite:
                return dataclasses.replace(finding, tried=True)
        finding = dataclasses.replace(finding, scale=None)
    if not finding.overrides:
        return finding
    for _ in range(_ROUNDS):
        with _policy_of(case.blamed, Policy.parse(finding.policy)):
            more = _Case(case.step)._finding()
        if more is None:
            return dataclasses.replace(finding, tried=True)
        added = [line for line in more.overrides if line not in finding.overrides]
        if not added:
            break
        finding = dataclasses.replace(
            finding, overrides=(*finding.overrides, *added), policy=more.policy
        )
    return dataclasses.replace(finding, tried=False)


@contextlib.contextmanager
def _scale_of(model: nn.Module, scale: float) -> Iterator[None]:
    """The model with another loss scale, for a while."""
    current = state_of(model).scale
    before = dict(vars(current))
    current.replace(LossScale(init_scale=scale))
    try:
        yield
    finally:
        vars(current).update(before)


@contextlib.contextmanager
def _policy_of(model: nn.Module, policy: Policy) -> Iterator[None]:
    """The model as if converted with another policy, for a while."""
    state = state_of(model)
    settings = dataclasses.replace(state.settings, policy=policy)
    other = State(settings, state.original, state.instance_forward)
    other.scale = CurrentScale(state.scale.value)
    other.scale.is_guarded = True
    vars(model)[STATE] = other
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        vars(model)[STATE] = state
