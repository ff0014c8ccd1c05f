"""Run rewritten graphs node by node, and keep the range of every value and gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.capture import kept
from mpgraph.capture.compiled import calls
from mpgraph.capture.crossing import WideCrossings
from mpgraph.gradient_flow import is_half, scaled_values
from mpgraph.ranges.measure import measure
from mpgraph.ranges.records import Spread

_HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(eq=False)
class Run:
    """One run of one graph within a step.

    Attributes:
        graph_module: The rewritten graph, or the body of a checkpoint.
        owner: Which converted model it belongs to.
        forward: The range of every floating-point value, in the order in which they came.
        gradient: The range of their gradients, in the order in which those came; those in fp16 are
            times the loss scale.
        order: For both: a number that says which came first in the whole step.
        parent: For a body: the run and the node that it belongs to.
        inner: The bodies that have run as a part of it.
    """

    graph_module: fx.GraphModule
    owner: Any
    forward: dict[fx.Node, Spread] = dataclasses.field(default_factory=dict)
    gradient: dict[fx.Node, Spread] = dataclasses.field(default_factory=dict)
    order: dict[tuple[str, fx.Node], int] = dataclasses.field(default_factory=dict)
    parent: tuple[Run, fx.Node] | None = None
    inner: dict[fx.Node, Run] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def scaled_in_fp32(self) -> set[fx.Node]:
        """Values with scaled gradients that are not in fp16."""
        scaled = scaled_values(self.graph_module.graph, grad=True)
        return {node for node, is_scaled in scaled.items() if is_scaled and not is_half(node)}


class Watch:
    """Sees every graph of one step run, as it is or, with ``true``, in fp32 throughout.

    In fp32 the same graph runs, node for node, with masters instead of 16-bit copies and with
    casts that do nothing: so values and gradients come out under the names that they have in it.
    """

    def __init__(self, *, true: bool = False) -> None:
        self.true = true
        self.crossings = WideCrossings() if true else None
        self.runs: list[Run] = []
        self.entries: list[Any] = []
        self._owner: Any = None
        self._handles: list[Any] = []
        self._count = 0

    def see(self, state: Any, entry: Any, args: Any, kwargs: Any) -> Any:
        """The entry to run instead of the one that a converted model is about to run."""
        self._owner = state
        if not any(entry is known for known in self.entries):
            self.entries.append(entry)
        if entry.engine == "dynamo":
            return entry
        return dataclasses.replace(entry, run=self.runner(entry.graph_module))

    def runner(self, gm: fx.GraphModule) -> Callable[..., Any]:
        """What runs a graph, and keeps the ranges."""

        def run(*values: Any) -> Any:
            before = torch.is_grad_enabled()
            try:
                return self.run_graph(Run(gm, self._owner), values)
            finally:
                torch._C._set_grad_enabled(before)

        return run

    @contextlib.contextmanager
    def active(self, states: list[Any]) -> Iterator[Watch]:
        """Watch these converted models."""
        before = [(state, state.observer, state.weights.masters) for state in states]
        watching = calls.watch, calls.crossings
        calls.watch, calls.crossings = self.runner, self.crossings
        for state in states:
            state.observer, state.weights.masters = self, self.true
        try:
            yield self
        finally:
            calls.watch, calls.crossings = watching
            for state, observer, masters in before:
                state.observer, state.weights.masters = observer, masters
            for handle in self._handles:
                handle.remove()

    def run_graph(self, run: Run, values: Any) -> Any:
        """Run a graph as one of the step's runs."""
        self.runs.append(run)
        return (_InFloat32 if self.true else _AsItIs)(run, self).run(*values)

    def note(self, run: Run, node: fx.Node, value: Any) -> None:
        """Keep the range of a value now, and that of its gradient when it comes."""
        if not isinstance(value, torch.Tensor) or not is_floating(value):
            return
        run.forward[node] = measure(value, exponents=self.true)
        run.order["forward", node] = self._next()
        if value.requires_grad:
            hook = cast(Any, value).register_hook
            self._handles.append(hook(lambda gradient: self._note_gradient(run, node, gradient)))

    def _note_gradient(self, run: Run, node: fx.Node, gradient: torch.Tensor) -> None:
        if isinstance(gradient, torch.Tensor):
            if not self.true and node in run.scaled_in_fp32:
                gradient = gradient / self._owner.scale.value.scale
            spread = measure(gradient, exponents=self.true)
            run.gradient[node] = spread.merged(run.gradient.get(node))
            run.order.setdefault(("gradient", node), self._next())

    def _next(self) -> int:
        self._count += 1
        return self._count


def is_floating(value: torch.Tensor) -> bool:
    """Whether values have magnitudes: real or complex."""
    return value.is_floating_point() or value.is_complex()


class _AsItIs(fx.Interpreter):
    """Runs a graph as the model runs it."""

    def __init__(self, run: Run, watch: Watch) -> None:
        super().__init__(run.graph_module)
        self._run, self._watch = run, watch

    def run_node(self, n: fx.Node) -> Any:
        value = self._run_body(n) if self._is_opened(n) else self._plain(n)
        if n.op != "output":
            self._watch.note(self._run, n, value)
        return value

    def _plain(self, n: fx.Node) -> Any:
        return super().run_node(n)

    def _is_opened(self, n: fx.Node) -> bool:
        """Whether it is a checkpoint, which computes the same without one.

        A reentrant one gives parameters no gradient if no argument needs any.
        """
        if n.target is not kept.KEPT_CHECKPOINT:
            return False
        given = [self.env[a] for a in n.all_input_nodes if a.op != "get_attr"]
        needed = (v for v in given if isinstance(v, torch.Tensor) and v.requires_grad)
        others = any(not isinstance(v, nn.Parameter) for v in needed)
        return others or not n.kwargs.get("use_reentrant", True)

    def _run_body(self, n: fx.Node) -> Any:
        body = kept.bodies(n, self._run.graph_module)[0]
        args, _ = self.fetch_args_kwargs_from_env(n)
        inner = self._run.inner[n] = Run(body, self._run.owner, parent=(self._run, n))
        return self._watch.run_graph(inner, args[1:])


class _InFloat32(_AsItIs):
    """Runs a graph in fp32 throughout; what it returns has the dtypes that it promises."""

    def _plain(self, n: fx.Node) -> Any:
        if n.op == "output" and self._run.parent is None:
            return fx.map_arg(n.args[0], self._result)
        if n.op != "call_function":  # the output of a body as well
            return _widened(super()._plain(n))
        if ir.is_higher_order(n):
            return self._whole(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if ir.is_cast(n):
            return args[0].to(_wide(ir.cast_target(n)), copy=_copies(n))
        args, kwargs = pytree.tree_map_only(torch.dtype, _wide, (args, kwargs))
        return _widened(cast(Any, n.target)(*args, **kwargs))

    def _result(self, n: fx.Node) -> Any:
        value, dtype, crossings = self.env[n], ir.dtype_of(n), self._watch.crossings
        crosses = self._run.graph_module.meta.get("crossing") and dtype in _HALF
        if crosses and crossings is not None and isinstance(value, torch.Tensor):
            return crossings.narrowed(value, cast(torch.dtype, dtype))
        return _as_declared(n, value)

    def _whole(self, n: fx.Node) -> Any:
        """A body was traced with the dtypes of its operands, and gets them."""
        narrow = {a: _as_declared(a, self.env[a]) for a in n.all_input_nodes}
        args = fx.map_arg(n.args, lambda a: narrow[a])
        kwargs = fx.map_arg(n.kwargs, lambda a: narrow[a])
        return _widened(cast(Any, n.target)(*args, **kwargs))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _widened(value: Any) -> Any:
    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(_wide(tensor.dtype))

    return pytree.tree_map_only(torch.Tensor, widen, value)


def _as_declared(node: fx.Node, value: Any) -> Any:
    declared = node.meta.get("val")
    if isinstance(value, torch.Tensor) and isinstance(declared, torch.Tensor):
        return value.to(declared.dtype)
    return value


def _copies(cast_node: fx.Node) -> bool:
    """Whether a cast makes a new tensor, which the graph may write to without harm."""
    same = ir.dtype_of(ir.cast_source(cast_node)) is ir.cast_target(cast_node)
    return not (same and cast_node.target is ir.CAST)
