"""One graph from Dynamo, rewritten and ready to run; and what the graphs of one call share."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._guards import tracing

from mpgraph import ir
from mpgraph.capture.ambient import Ambient, ambient_now
from mpgraph.capture.breaks import Break, breaks_inside
from mpgraph.capture.captured import Slot, slots_of
from mpgraph.capture.crossing import Crossings
from mpgraph.capture.keep import CannotLower
from mpgraph.capture.lower import Graphs, lower
from mpgraph.direct_calls import directly
from mpgraph.group_copies import copy_all
from mpgraph.loss_scale import CurrentScale
from mpgraph.ops import enter
from mpgraph.pipeline import NeedsStaticShapes, PassContext
from mpgraph.precision import logger
from mpgraph.weight_groups import weight_groups
from mpgraph.weights import WeightCopies


@dataclasses.dataclass
class CompiledGraph:
    """One of Dynamo's graphs, rewritten.

    Attributes:
        graphs: The rewritten graph, last, after the bodies inside it, each with what the
            passes did. Empty where the whole graph runs under ``torch.autocast``.
        breaks: Why parts of it were left to ``torch.autocast``.
        run: Takes what Dynamo passes.
    """

    graphs: Graphs
    breaks: list[Break]
    run: Callable[..., Any]


class CallCopies:
    """16-bit copies of parameters, and of other leaves, for one call.

    All its graphs share them, as in torch.autocast.
    """

    def __init__(self, kept: WeightCopies) -> None:
        self._kept = kept
        self._made: dict[tuple[Any, ...], Any] = {}

    def get_all(
        self,
        parameters: Sequence[torch.Tensor],
        dtype: torch.dtype,
        scale: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """The call's copy of each parameter; those that are missing are made in one go."""
        now = (dtype, torch.is_grad_enabled(), scale is None)
        keys = [(id(parameter), parameter._version, *now) for parameter in parameters]
        missing = {
            key: parameter
            for key, parameter in zip(keys, parameters, strict=True)
            if key not in self._made
        }
        # Copies of parameters last for longer than this call.
        for are_kept in (True, False):
            alike = {k: p for k, p in missing.items() if isinstance(p, nn.Parameter) is are_kept}
            if alike:
                make = self._kept.get_all if are_kept or self._kept.masters else copy_all
                made = make([*alike.values()], dtype, scale)
                for (key, parameter), copy in zip(alike.items(), made, strict=True):
                    # The parameter goes in as well, so that its id stays its own.
                    self._made[key] = copy, parameter
        return [self._made[key][0] for key in keys]


class Call:
    """A call that is under way: what its graphs share, and which of them have run."""

    def __init__(self, weights: WeightCopies, scale: CurrentScale) -> None:
        self.copies = CallCopies(weights)
        self._scale = scale
        self.crossings = calls.crossings or Crossings(lambda: self.scale)
        self.ran: dict[int, CompiledGraph] = {}

    @functools.cached_property
    def scale(self) -> torch.Tensor:
        """The loss scale of the call: one for all its graphs."""
        return self._scale.read()


class _Calls(threading.local):
    now: Call | None = None
    # What runs a rewritten graph instead: see mpgraph.ranges.
    watch: Callable[[fx.GraphModule], Callable[..., Any]] | None = None
    crossings: Crossings | None = None  # of a replay in fp32


calls = _Calls()


def rewritten(gm: fx.GraphModule, context: PassContext) -> CompiledGraph:
    """The rewritten graph, or, where that cannot be, Dynamo's own under ``torch.autocast``."""
    ambient = ambient_now(context)
    gm.meta["crossing"] = True
    try:
        # Dynamo keeps a second fake mode at hand for backends; its own values are of the first.
        with tracing(None), torch.autocast(context.device, enabled=False):
            graphs = _lower(gm, context, ambient)
    except CannotLower as error:
        logger.debug("a graph runs under torch.autocast: %s", error)
        return CompiledGraph([], [Break(error.reason, error.line)], gm.forward)
    breaks = [b for lowered, _ in graphs for b in breaks_inside(lowered)]
    return CompiledGraph(graphs, breaks, _runner(graphs[-1][0], context))


def _lower(gm: fx.GraphModule, context: PassContext, ambient: Ambient) -> Graphs:
    graphs: Graphs = []
    try:
        lower(gm, context, ambient, graphs)
    except NeedsStaticShapes as error:
        logger.debug("a graph is made for fixed sizes: %s", error)
        for node in gm.graph.find_nodes(op="placeholder"):
            if isinstance(size := node.meta.get("example_value"), torch.SymInt):
                int(size)  # Dynamo then compiles again for another size
        graphs = []
        lower(gm, context, ambient, graphs)
    return graphs


def _runner(gm: fx.GraphModule, context: PassContext) -> Callable[..., Any]:
    """Run a rewritten graph on what Dynamo passes, with autocast off inside it."""
    slots = slots_of(gm)
    run = directly(gm)
    device = context.device
    writes = _writes_to_halves(gm)
    groups = weight_groups(gm)

    def run_graph(*values: Any) -> Any:
        call = _current()
        before = torch.is_grad_enabled()
        try:
            with torch.autocast(device, enabled=False):
                taken = [_value(slot, values, call) for slot in slots]
                for places in groups:
                    _fill_copies(places, slots[places[0]], taken, call)
                if writes:
                    call.crossings.settle()
                chosen = run if calls.watch is None else calls.watch(gm)
                results = chosen(*taken)
        finally:
            torch._C._set_grad_enabled(before)
        if not context.scaled:
            return results
        if writes:
            call.crossings.follow()
        return tuple([call.crossings.outer(result) for result in results])

    return run_graph


def _writes_to_halves(gm: fx.GraphModule) -> bool:
    """Whether a graph writes to an fp16 tensor that it is given, with a gradient to come."""
    writes = ir.Writes(gm.graph)
    placeholders = gm.graph.find_nodes(op="placeholder")
    return any(node.meta["slot"].scaled and writes.anywhere(node) for node in placeholders)


def _value(slot: Slot, values: Sequence[Any], call: Call) -> Any:
    if slot.kind == "scale":
        return call.scale
    value = values[slot.index]
    if slot.dtype is not None:
        return value  # a parameter, of which a copy is made
    if slot.scaled and value.dtype is not torch.float16 and not call.crossings.takes_all:
        return enter(value, call.scale)
    return call.crossings.inner(value) if slot.scaled or call.crossings.takes_all else value


def _fill_copies(places: list[int], slot: Slot, taken: list[Any], call: Call) -> None:
    """Put copies in the places of the parameters; the slots of a group are alike."""
    assert slot.dtype is not None
    parameters = [taken[place] for place in places]
    made = call.copies.get_all(parameters, slot.dtype, call.scale if slot.scaled else None)
    for place, copy in zip(places, made, strict=True):
        taken[place] = copy


def runner(compiled: CompiledGraph) -> Callable[..., Any]:
    """What Dynamo calls. Nothing else holds on to the graph: it lives as long as Dynamo's code."""

    def run(*values: Any) -> Any:
        _current().ran[id(compiled)] = compiled
        return compiled.run(*values)

    return run


def _current() -> Call:
    assert calls.now is not None
    return calls.now
