"""The Dynamo engine: the user's own Python, with every run of operators in it rewritten.

The model's forward runs under ``torch.compile`` with a backend that rewrites each graph and
runs it in eager mode, inside ``torch.autocast``: what Dynamo leaves to Python between two
graphs (a branch on data, a random number, a counter) happens as under eager ``torch.autocast``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo_config
from torch._guards import tracing

from mpgraph.capture.ambient import Ambient, ambient_now
from mpgraph.capture.breaks import Break, Watch, breaks_inside, describe, explain_failure
from mpgraph.capture.captured import Slot, slots_of
from mpgraph.capture.keep import CannotLower
from mpgraph.capture.kept import repair_checkpoints
from mpgraph.capture.lower import Graphs, lower
from mpgraph.capture.paths import label_placeholders
from mpgraph.errors import CaptureError
from mpgraph.module import State, capturing
from mpgraph.pipeline import NeedsStaticShapes, PassContext, PassReport
from mpgraph.precision import logger
from mpgraph.weights import WeightCopies

_calls = threading.local()


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


@dataclasses.dataclass
class DynamoEntry:
    """One kind of call, carried by Dynamo.

    Attributes:
        label: For people: mode and argument shapes.
        shapes: The sizes of the arguments at the first call.
        context: What the passes knew.
        breaks: Where the model ran in eager mode under ``torch.autocast``, and why.
        reason: Why the export engine did not carry it; "" if it was not asked.
        notice: What to tell the user once the first call has run.
    """

    label: str
    shapes: list[torch.Size]
    context: PassContext
    owner: DynamoEngine
    reason: str = ""
    notice: str = ""
    breaks: list[Break] = dataclasses.field(default_factory=list)
    engine: str = "dynamo"
    _compiled: dict[int, CompiledGraph] = dataclasses.field(default_factory=dict)

    @property
    def graphs(self) -> Graphs:
        """Every rewritten graph that calls of this kind have run, with its passes' reports."""
        return [pair for compiled in self._compiled.values() for pair in compiled.graphs]

    @property
    def graph_module(self) -> fx.GraphModule:
        """The first rewritten graph."""
        return self.graphs[0][0] if self.graphs else fx.GraphModule({}, fx.Graph())

    @property
    def reports(self) -> list[PassReport]:
        """What the passes did to all of them."""
        return [report for _, reports in self.graphs for report in reports]

    def accepts(self, leaves: Sequence[Any]) -> bool:
        """Whether the entry can run a call of its kind: Dynamo checks for itself."""
        return True

    def run_call(
        self, model: nn.Module, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call with its own arguments."""
        result = self.owner.run(self, model, args, kwargs)
        if not self.owner.announced:
            self.owner.announce(self)
        return result

    def note(self, compiled: CompiledGraph) -> None:
        """A graph runs for this kind of call."""
        if id(compiled) not in self._compiled:
            self._compiled[id(compiled)] = compiled
            self.note_breaks(compiled.breaks)

    def note_breaks(self, breaks: list[Break]) -> None:
        """Parts of the model run in eager mode."""
        self.breaks.extend(b for b in breaks if b not in self.breaks)


class _CallCopies:
    """16-bit copies of parameters for one call: shared by all its graphs, as in torch.autocast."""

    def __init__(self, kept: WeightCopies) -> None:
        self._kept = kept
        self._made: dict[tuple[Any, ...], Any] = {}

    def get(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        key = (id(parameter), parameter._version, dtype, torch.is_grad_enabled())
        if key not in self._made:
            # The parameter goes in as well, so that its id stays its own.
            self._made[key] = self._kept.get(parameter, dtype), parameter
        return self._made[key][0]  # type: ignore[no-any-return]


@dataclasses.dataclass
class _Call:
    entry: DynamoEntry
    copies: _CallCopies


class DynamoEngine:
    """One converted model's way through Dynamo. Nothing in it is shared with another model."""

    def __init__(self, state: State, model: nn.Module, context: PassContext) -> None:
        self.state = state
        self.context = context
        self.paths = {id(p): path for path, p in model.named_parameters()}
        self.compiled: list[CompiledGraph] = []
        self.modes: set[Any] = set()
        self.announced = False
        entry_point = _entry_point(state.original_forward())
        self._run = torch.compile(entry_point, backend=self._compile)

    def run(
        self, entry: DynamoEntry, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call; compile what has not been compiled."""
        outer = getattr(_calls, "now", None)
        _calls.now = _Call(entry, _CallCopies(self.state.weights))
        watch = Watch()
        try:
            with capturing(), self._configured(), self.context.autocast():
                return self._run(model, args, kwargs)
        except Exception as error:
            raise self._translated(error, entry) from error
        finally:
            _calls.now = outer
            entry.note_breaks(watch.new())

    def announce(self, entry: DynamoEntry) -> None:
        """After the first call: say what export could not do, and what does not fit the graphs."""
        self.announced = True
        if entry.notice:
            self.state.say(entry.notice)
        if not entry.graphs:
            said = "; ".join(f"{b.reason} ({b.line})" for b in entry.breaks) or "it is disabled"
            self.state.say(
                "Dynamo compiled nothing of this call, so all of it ran in eager mode under "
                f"torch.autocast: {said}."
            )

    def _translated(self, error: Exception, entry: DynamoEntry) -> Exception:
        before = f"The export engine did not carry it: {entry.reason}." if entry.reason else ""
        return explain_failure(error, before)

    @contextlib.contextmanager
    def _configured(self) -> Iterator[None]:
        limit = self.state.settings.max_graphs
        with (
            dynamo_config.patch(
                suppress_errors=False,
                inline_inbuilt_nn_modules=True,
                # Dynamo would turn numpy into torch, and numpy's random numbers into torch's.
                trace_numpy=False,
                fail_on_recompile_limit_hit=True,
                # Graphs are counted per model in _compile; Dynamo counts per function of the
                # user's source, whichever model runs it.
                recompile_limit=16 * limit,
                accumulated_recompile_limit=64 * limit,
            ),
            _without_autocast_in_backward(self.context.device),
            _quiet(),
        ):
            yield

    def _compile(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        limit = self.state.settings.max_graphs
        if len(self.compiled) >= limit:
            raise CaptureError(
                f"Dynamo has split this model into {limit} graphs, or compiled it anew so often; "
                "the limit is max_graphs. mpgraph.explain(model) lists them. Pad inputs to fewer "
                "shapes, pass changing numbers as tensors, or raise max_graphs in mpgraph.convert."
            )
        label_placeholders(gm, examples, self.paths)
        repair_checkpoints(gm)
        compiled = _rewritten(gm, self.context)
        self.compiled.append(compiled)

        def run(*values: Any) -> Any:
            _calls.now.entry.note(compiled)
            return compiled.run(*values)

        return run


def make_entry(
    state: State,
    model: nn.Module,
    context: PassContext,
    label: str,
    shapes: list[torch.Size],
    error: BaseException | None = None,
) -> DynamoEntry:
    """An entry for one kind of call; ``error`` is what kept export from carrying it."""
    if state.dynamo is None:
        state.dynamo = DynamoEngine(state, model, context)
    engine: DynamoEngine = state.dynamo
    engine.modes.add(_mode(model))
    entry = DynamoEntry(label, shapes, context, engine)
    if error is not None:
        reason, line = describe(error)
        entry.reason = f"{reason} ({line})" if line else reason
        entry.notice = _notice(type(model), entry.reason)
    return entry


def is_carried(state: State, model: nn.Module) -> bool:
    """Whether Dynamo has already taken over calls in these modes: export is not asked again."""
    return state.dynamo is not None and _mode(model) in state.dynamo.modes


def _mode(model: nn.Module) -> Any:
    return tuple([m.training for m in model.modules()]), torch.is_grad_enabled()


def _notice(kind: type, reason: str) -> str:
    name = kind.__name__.removeprefix("MixedPrecision")
    return (
        f"torch.export cannot carry {name} faithfully: {reason}. Dynamo carries it instead: every "
        "graph is rewritten, and what lies between them runs in eager mode under torch.autocast; "
        "mpgraph.explain(model) lists both. With capture='dynamo' this is not said."
    )


def _entry_point(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a code object of its own, to which Dynamo ties what it compiles."""

    def call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(model, *args, **kwargs)

    code = call.__code__.replace(co_name="call")
    return types.FunctionType(code, call.__globals__, "call", None, call.__closure__)


def _rewritten(gm: fx.GraphModule, context: PassContext) -> CompiledGraph:
    """The rewritten graph, or, where that cannot be, Dynamo's own under ``torch.autocast``."""
    ambient = ambient_now(context)
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
    run = gm.forward
    device = context.device

    def run_graph(*values: Any) -> Any:
        copies = _calls.now.copies
        before = torch.is_grad_enabled()
        try:
            with torch.autocast(device, enabled=False):
                return run(*[_value(slot, values, copies) for slot in slots])
        finally:
            torch._C._set_grad_enabled(before)

    return run_graph


def _value(slot: Slot, values: Sequence[Any], copies: _CallCopies) -> Any:
    value = values[slot.index]
    return copies.get(value, slot.dtype) if slot.dtype is not None else value


@contextlib.contextmanager
def _without_autocast_in_backward(device: str) -> Iterator[None]:
    """Let Dynamo trace the backward of a custom Function as it runs: outside of autocast."""
    from torch._dynamo.variables import higher_order_ops

    owner = getattr(higher_order_ops, "AutogradFunctionApplyVariable", None)
    original = getattr(owner, "trace_backward_graph", None)
    if original is None:
        yield  # the dtypes are checked when the graph is lowered
        return

    def trace_backward_graph(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return original(*args, **kwargs)

    owner.trace_backward_graph = trace_backward_graph  # type: ignore[union-attr]
    try:
        yield
    finally:
        owner.trace_backward_graph = original  # type: ignore[union-attr]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Errors of the user's model are raised; torch prints a second account of them.
    noisy = logging.getLogger("torch._subclasses.fake_tensor")
    before, noisy.disabled = noisy.disabled, True
    try:
        yield
    finally:
        noisy.disabled = before
