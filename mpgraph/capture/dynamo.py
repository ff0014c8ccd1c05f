"""The Dynamo engine: the user's own Python, with every run of operators in it rewritten.

The model's forward runs under ``torch.compile`` with a backend that rewrites each graph and
runs it in eager mode, inside ``torch.autocast``: what Dynamo leaves to Python between two
graphs (a branch on data, a random number, a counter) happens as under eager ``torch.autocast``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from mpgraph.capture.breaks import DYNAMO_ERRORS, Break, Watch, describe, explain_failure
from mpgraph.capture.compiled import Call, CompiledGraph, calls, rewritten, runner
from mpgraph.capture.dynamo_settings import configured
from mpgraph.capture.kept import repair_checkpoints
from mpgraph.capture.lower import Graphs
from mpgraph.capture.miscounts import refuse_miscounts
from mpgraph.capture.overrides import say_what_matched_nothing
from mpgraph.capture.own_error import note_line, raise_own_error
from mpgraph.capture.paths import label_placeholders
from mpgraph.errors import CaptureError, MPGraphError
from mpgraph.infer import forget_real_tensors
from mpgraph.module import State, is_transformed
from mpgraph.pipeline import PassContext, PassReport
from mpgraph.plain import global_hooks
from mpgraph.structure import flatten
from mpgraph.tracing import capturing, lock

# One call of a vision-language model may well be forty graphs.
_PIECES = 8


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
        failed: No call has come through yet, and one has raised an error: the next one asks the
            export engine again.
    """

    label: str
    shapes: list[torch.Size]
    context: PassContext
    owner: DynamoEngine
    reason: str = ""
    notice: str = ""
    failed: bool = False
    breaks: list[Break] = dataclasses.field(default_factory=list)
    engine: str = "dynamo"
    # Weakly: what Dynamo has dropped and compiled again is not shown twice.
    _compiled: weakref.WeakValueDictionary[int, CompiledGraph] = dataclasses.field(
        default_factory=weakref.WeakValueDictionary
    )

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
        return not self.failed

    def run_call(
        self, model: nn.Module, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call with its own arguments."""
        return self.owner.run(self, model, args, kwargs)

    def note(self, call: Call, breaks: list[Break]) -> None:
        """What has run for a call of this kind, and what has been left to eager mode."""
        for key, compiled in call.ran.items():
            if key not in self._compiled:
                self._compiled[key] = compiled
                forget_real_tensors(*[gm for gm, _ in compiled.graphs])
                breaks = breaks + compiled.breaks
        self.breaks.extend(b for b in breaks if b not in self.breaks)


class DynamoEngine:
    """One converted model's way through Dynamo. Nothing in it is shared with another model."""

    def __init__(self, state: State, model: nn.Module, context: PassContext) -> None:
        self.state = state
        self.context = context
        self.modules = [path for path, _ in model.named_modules()]
        self.paths = {id(p): path for path, p in model.named_parameters()}
        self.modes: set[Any] = set()
        # Dynamo traces these along with the modules, and does not look whether they change.
        self.hooks = global_hooks()
        self._announced = False
        self._graphs_of_a_call = 1
        self._live: weakref.WeakSet[Any] = weakref.WeakSet()
        entry_point = _entry_point(state.original_forward())
        self._run = torch.compile(entry_point, backend=self._compile)

    def run(
        self, entry: DynamoEntry, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call; compile what has not been compiled."""
        call = Call(self.state.weights, self.state.scale)
        try:
            # Dynamo's settings are the whole process's, and its graphs read the model as they run.
            with lock:
                result = self._call(call, entry, model, args, kwargs)
        except Exception as error:
            _forgive(error)
            entry.failed = _mode(model) not in self.modes
            if not isinstance(error, DYNAMO_ERRORS):
                if not isinstance(error, MPGraphError):
                    note_line(error)
                raise
            failure = error
        else:
            if not is_transformed():
                self.modes.add(_mode(model))
            self._announce(entry, call)
            return result
        # Not inside the handler: Dynamo's error would be printed as the cause of the model's own.
        leaves, spec = flatten((args, kwargs))
        raise_own_error(self.state, model, leaves, spec, self.context)
        raise self._translated(failure, entry) from failure

    def _call(
        self,
        call: Call,
        entry: DynamoEntry,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        outer, calls.now = calls.now, call
        watch = Watch()
        try:
            with (
                self._watched(model),
                capturing(),
                self._configured(),
                self.context.autocast(),
            ):
                result = self._run(model, args, kwargs)
            if self.context.scaled:
                result = call.crossings.finish(result, lambda: _given(model, args, kwargs))
            return result
        finally:
            calls.now = outer
            entry.note(call, watch.new())
            self._graphs_of_a_call = min(max(self._graphs_of_a_call, len(call.ran)), _PIECES)

    def _configured(self) -> contextlib.AbstractContextManager[None]:
        # One kind of call has as many graphs as the model is split into.
        limit = self.state.settings.max_graphs * self._graphs_of_a_call
        return configured(self.context.device, limit, len(self._live))

    def _watched(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Look on at the first call of each mode."""
        is_known = _mode(model) in self.modes
        return contextlib.nullcontext() if is_known else refuse_miscounts(model)

    def _announce(self, entry: DynamoEntry, call: Call) -> None:
        """Say, once, what export could not do; and that a call went past every graph."""
        if not self._announced:
            self._announced = True
            graphs = [gm for gm, _ in entry.graphs]
            where = "in the graphs of the first call"
            say_what_matched_nothing(self.state, graphs, self.modules, where)
            if entry.notice:
                self.state.say(entry.notice)
        if not call.ran and not is_transformed():
            said = "; ".join(f"{b.reason} ({b.line})" for b in entry.breaks)
            self.state.say(
                "Dynamo compiled nothing of a call, so all of it ran in eager mode under "
                f"torch.autocast: {said or 'torch.compile is disabled'}."
            )

    def _translated(self, error: Exception, entry: DynamoEntry) -> Exception:
        before = f"The export engine did not carry it: {entry.reason}." if entry.reason else ""
        return explain_failure(error, before)

    def _compile(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        limit = _PIECES * self.state.settings.max_graphs
        if len(self._live) >= limit and (gc.collect(), len(self._live))[1] >= limit:
            raise CaptureError(
                f"Dynamo has split this model into {limit} graphs, or compiled it anew so often; "
                f"the limit is {_PIECES} times max_graphs. mpgraph.explain(model) lists them. Pad "
                "inputs to fewer shapes, pass changing numbers as tensors, or raise max_graphs in "
                "mpgraph.convert."
            )
        label_placeholders(gm, examples, self.paths)
        repair_checkpoints(gm)
        run = runner(rewritten(gm, self.context))
        self._live.add(run)
        return run


def _given(model: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """The tensors of a call that were there before it."""
    return [*flatten((args, kwargs))[0], *model.parameters(), *model.buffers()]


def _forgive(error: Exception) -> None:
    """Let Dynamo try again next time.

    It runs a function in eager mode for good once an exception has come out of it, though the
    next call, with a better argument, may well succeed.
    """
    frame = error.__traceback__
    while frame is not None:
        torch._C._dynamo.eval_frame.reset_code(frame.tb_frame.f_code)
        frame = frame.tb_next


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
    entry = DynamoEntry(label, shapes, context, state.dynamo)
    if error is not None:
        reason, line = describe(error)
        entry.reason = f"{reason} ({line})" if line else reason
        entry.notice = _notice(type(model), entry.reason)
        if is_transformed():
            entry.notice = f"{entry.reason}: such calls run in eager mode under torch.autocast."
    return entry


def is_carried(state: State, model: nn.Module) -> bool:
    """Whether Dynamo has already taken over calls in these modes: export is not asked again."""
    return state.dynamo is not None and _mode(model) in state.dynamo.modes


def _mode(model: nn.Module) -> Any:
    return tuple([m.training for m in model.modules()]), torch.is_grad_enabled()


def _notice(kind: type, reason: str) -> str:
    return (
        f"torch.export cannot carry {kind.__name__} faithfully: {reason}. Dynamo carries it "
        "instead: every graph is rewritten, and what lies between them runs in eager mode under "
        "torch.autocast; mpgraph.explain(model) lists both. With capture='dynamo' this is not said."
    )


def _entry_point(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a code object of its own, to which Dynamo ties what it compiles."""

    def call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(model, *args, **kwargs)

    code = call.__code__.replace(co_name="call")
    return types.FunctionType(code, call.__globals__, "call", None, call.__closure__)
