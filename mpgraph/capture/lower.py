"""A graph from Dynamo, brought into mpgraph's form.

Dynamo's graph calls torch's Python functions. The plain ones are traced into the pre-dispatch
ATen form. What acts on autograd is kept (:mod:`mpgraph.capture.kept`): a custom Function and a
checkpoint with a rewritten forward, a tensor hook as it is. What tracing would lose (function
transforms such as ``vmap``, control flow, autograd calls) is kept as well, and runs under
``torch.autocast``, exactly as in eager mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.capture import kept
from mpgraph.capture.borders import with_borders
from mpgraph.capture.breaks import Break
from mpgraph.errors import CaptureError
from mpgraph.infer import fake_mode_of
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.pipeline import PassContext, PassReport, run_passes

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
Graphs = list[tuple[fx.GraphModule, list[PassReport]]]
PASSES = with_borders(DEFAULT_PASSES)


class CannotLower(Exception):
    """The graph holds something that would not survive the rewrite; says what and where."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        self.reason = reason
        self.line = ir.source_line(node) if node is not None else ""
        super().__init__(f"{reason} ({self.line})" if self.line else reason)


@dataclasses.dataclass(frozen=True)
class Ambient:
    """What is in force around a node: the model's own autocast region, and gradient mode."""

    region: ir.Region | None
    grad: bool

    @contextlib.contextmanager
    def active(self, context: PassContext) -> Iterator[None]:
        """Make it so."""
        with context.autocast(self.region), torch.set_grad_enabled(self.grad):
            yield


def ambient_now(context: PassContext) -> Ambient:
    """The state at this moment, as the difference from the conversion's own autocast."""
    device = context.device
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if enabled else None
    same = enabled == (context.compute is not None) and dtype == context.compute
    return Ambient(None if same else ir.Region(enabled, dtype), torch.is_grad_enabled())


def lower(gm: fx.GraphModule, context: PassContext, ambient: Ambient, graphs: Graphs) -> fx.GraphModule:
    """Trace ``gm`` and its bodies, run every pass; rewritten graphs are added to ``graphs``.

    Raises:
        CannotLower: Something in the graph would be lost.
    """
    context = dataclasses.replace(context, grad=ambient.grad)
    gm = _copy(gm)  # should this fail, the caller's graph is still what Dynamo gave
    _keep_calls(gm, context, ambient, graphs)
    lowered = _trace(gm, context, ambient)
    graphs.append((lowered, run_passes(lowered, PASSES, context)))
    return lowered


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    return copy


def breaks_inside(gm: fx.GraphModule) -> list[Break]:
    """The parts of a rewritten graph that run under ``torch.autocast``, as they were kept."""
    nodes = gm.graph.find_nodes(op="call_function", target=kept.UNDER_AUTOCAST)
    return [Break(f"{node.meta['holds']} is kept whole", ir.source_line(node)) for node in nodes]


# --- What stays one node ---------------------------------------------------------------------


def _keep_calls(gm: fx.GraphModule, context: PassContext, ambient: Ambient, graphs: Graphs) -> None:
    """Turn calls that must not be traced into kept nodes, and rewrite their forward bodies."""
    segment: list[fx.Node] = []
    depth = 0
    for node, around in list(_with_ambient(gm.graph, ambient, context)):
        depth += _opens(node) - _closes(node)
        if depth or segment:
            segment.append(node)
            if not depth:
                _fold(gm, segment, context, around)
                segment = []
        elif node.target in _WITH_FORWARD:
            _keep_with_forward(gm, node, context, around, graphs)
        elif node.target is kept.HOOK:
            _hold(gm, node, 1, _checked(kept.bodies(node, gm)[1]))
            node.target = kept.KEPT_HOOK
            node.meta["written"] = ()
        elif ir.is_higher_order(node) or _acts_on_autograd(node):
            _fold(gm, [node], context, around)
    if segment:
        raise CannotLower("a function transform is left open")
    gm.graph.lint()


_WITH_FORWARD = {kept.FUNCTION: kept.KEPT_FUNCTION, kept.KEPT_CHECKPOINT: kept.KEPT_CHECKPOINT}


def _keep_with_forward(
    gm: fx.GraphModule, node: fx.Node, context: PassContext, ambient: Ambient, graphs: Graphs
) -> None:
    found = kept.bodies(node, gm)
    forward = found.pop(0)
    _describe_operands(forward, list(node.args[1 + len(found) :]))
    forward.meta.update(body=True, relocate=gm.meta.get("relocate"))
    lowered = lower(forward, context, ambient, graphs)
    _hold(gm, node, 0, lowered)
    for index, backward in found.items():
        _hold(gm, node, index, _checked(backward))
    node.target = _WITH_FORWARD[node.target]
    node.meta["written"] = kept.written_positions(node, lowered)


def _describe_operands(body: fx.GraphModule, operands: list[Any]) -> None:
    """Tell the body's placeholders what the caller passes. Some bodies have a context first."""
    placeholders = body.graph.find_nodes(op="placeholder")
    for inner, outer in zip(reversed(placeholders), reversed(operands), strict=False):
        if isinstance(outer, fx.Node):
            inner.meta.setdefault("example_value", outer.meta.get("example_value"))
            for mark in ("leaf", "differentiable"):
                inner.meta[mark] = outer.meta.get(mark, _requires_grad(outer))


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad and node.op == "placeholder"


def _checked(body: fx.GraphModule) -> fx.GraphModule:
    """A body that runs in the backward pass, where no autocast is in force.

    Dynamo traced it under autocast. If that gave any value another dtype, then whatever the
    user's Python read from that dtype may be wrong.
    """
    examples = [n.meta.get("example_value") for n in body.graph.find_nodes(op="placeholder")]
    differing: list[str] = []

    class Check(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            seen = n.meta.get("example_value")
            if isinstance(value, torch.Tensor) and isinstance(seen, torch.Tensor):
                if value.dtype is not seen.dtype:
                    differing.append(ir.source_line(n) or n.name)
            return value

    with fake_mode_of(examples), torch.autocast("cpu", enabled=False):
        Check(body).run(*examples)
    if differing:
        raise CaptureError(
            "a backward pass of the model's own was traced in other dtypes than it runs in, so "
            "what it decides from a dtype may be wrong. Decorate the function that uses it with "
            f"@torch.compiler.disable.\n  from: {differing[0]}"
        )
    return body


def _hold(gm: fx.GraphModule, node: fx.Node, index: int, body: fx.GraphModule) -> None:
    name = _fresh_name(gm, str(node.args[index].target))  # type: ignore[union-attr]
    gm.add_module(name, kept.Body(body))
    with gm.graph.inserting_before(node):
        held = gm.graph.get_attr(name)
    node.update_arg(index, held)


def _fresh_name(gm: fx.GraphModule, name: str) -> str:
    while hasattr(gm, name):
        name += "_"
    return name


_OPENING = ("increment_nesting", "enter_dual_level")
_CLOSING = ("decrement_nesting", "exit_dual_level")
_METHODS = frozenset({"requires_grad_", "retain_grad", "register_hook", "backward"})
_FUNCTIONS = frozenset({torch.autograd.grad, torch.autograd.backward})


def _opens(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "").endswith(_OPENING)


def _closes(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "").endswith(_CLOSING)


def _acts_on_autograd(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and node.target in _FUNCTIONS


def _fold(
    gm: fx.GraphModule, nodes: list[fx.Node], context: PassContext, ambient: Ambient
) -> None:
    """Move consecutive nodes into a body that runs under autocast."""
    inside = set(nodes)
    results = [n for n in nodes if any(user not in inside for user in n.users)]
    graph, inputs = _copied(nodes, results)
    body = fx.GraphModule(gm, graph)
    name = _fresh_name(gm, "kept")
    gm.add_module(name, kept.Body(body))
    enabled = context.compute is not None if ambient.region is None else ambient.region.enabled
    dtype = context.compute if ambient.region is None else ambient.region.dtype
    with gm.graph.inserting_after(nodes[-1]):
        call = gm.graph.call_function(kept.UNDER_AUTOCAST)
    with gm.graph.inserting_before(call):
        call.args = (gm.graph.get_attr(name), context.device, dtype, enabled, *inputs)
    call.meta = {**nodes[0].meta, "holds": _name(nodes[0])}
    call.meta["example_value"] = tuple(n.meta.get("example_value") for n in results)
    _take_results(gm.graph, call, results)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).strip("_")


def _copied(nodes: list[fx.Node], results: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    outside = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes)
    for node in outside:
        if node.op == "get_attr":
            values[node] = graph.node_copy(node)
        else:
            inputs.append(node)
            values[node] = graph.placeholder(node.name)
    for node in nodes:
        values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[n] for n in results))
    return graph, inputs


def _take_results(graph: fx.Graph, call: fx.Node, results: list[fx.Node]) -> None:
    with graph.inserting_after(call):
        for index, node in reversed(list(enumerate(results))):
            item = graph.call_function(operator.getitem, (call, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)


# --- Regions and gradient mode ---------------------------------------------------------------


def _with_ambient(
    graph: fx.Graph, start: Ambient, context: PassContext
) -> Iterator[tuple[fx.Node, Ambient]]:
    """Every node with what is in force when it runs."""
    now = start
    regions: list[ir.Region | None] = []
    for node in graph.nodes:
        if node.target is ENTER_AUTOCAST:
            regions.append(now.region)
            now = dataclasses.replace(now, region=_entered(node, now, context))
        elif node.target is EXIT_AUTOCAST:
            now = dataclasses.replace(now, region=regions.pop())
        elif node.target is ir.SET_GRAD:
            now = dataclasses.replace(now, grad=bool(node.args[0]))
        yield node, now


def _entered(node: fx.Node, now: Ambient, context: PassContext) -> ir.Region | None:
    device, dtype, enabled = (*node.args, None, None)[:3]
    if device != context.device:
        return now.region
    if not enabled:
        return ir.Region(False, None)
    if dtype is None:  # whatever is set, as torch.autocast does
        dtype = context.compute if now.region is None else now.region.dtype
    return ir.Region(True, dtype or torch.get_autocast_dtype(context.device))


def _mark(gm: fx.GraphModule, context: PassContext, ambient: Ambient) -> None:
    """Write region and gradient mode beside every node, and erase the regions' own nodes."""
    grad = ambient.grad
    for node, around in list(_with_ambient(gm.graph, ambient, context)):
        if around.region is not None:
            node.meta["region"] = around.region
        if around.grad is not grad and node.target is not ir.SET_GRAD:
            node.meta["grad"] = around.grad
    for target in (EXIT_AUTOCAST, ENTER_AUTOCAST):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            gm.graph.erase_node(node)


# --- Tracing ---------------------------------------------------------------------------------


def _trace(gm: fx.GraphModule, context: PassContext, ambient: Ambient) -> fx.GraphModule:
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta.get("example_value") for node in placeholders]
    tracer = _Tracer(gm, _fresh_examples(gm))
    with (
        ambient.active(context),
        fake_mode_of(examples),
        fx_traceback.preserve_node_meta(),
    ):
        trace = make_fx(
            lambda *args: tracer.run(*args),
            tracing_mode="symbolic",
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )
        lowered = trace(*examples)
    _refuse_lost_values(lowered)
    _mark(lowered, context, ambient)
    _annotate(lowered, gm)
    return lowered


def _fresh_examples(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """For every kept node, new fake values like those that Dynamo saw."""
    made = {}
    for node in gm.graph.nodes:
        if isinstance(node.target, kept.Kept):
            example = node.meta.get("example_value")
            with fake_mode_of(example), torch.no_grad():
                made[node] = pytree.tree_map_only(torch.Tensor, _like, example)
    return made


def _like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(
        value.size(), value.stride(), dtype=value.dtype, device=value.device
    )


class _Tracer(fx.Interpreter):
    """Runs Dynamo's graph while make_fx records, except for what is kept."""

    def __init__(self, gm: fx.GraphModule, examples: dict[fx.Node, Any]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.examples = examples

    def run_node(self, n: fx.Node) -> Any:
        if n in self.examples:
            with self._set_current_node(n):
                return self._record(n)
        graph = _proxy_tracer().graph
        last = next(iter(reversed(graph.nodes)), None)
        value = super().run_node(n)
        if not n.users and n.op.startswith("call") and n.target not in _SILENT:
            if next(iter(reversed(graph.nodes)), None) is last:
                raise CannotLower(f"{_name(n)} leaves no trace", n)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ENTER_AUTOCAST:
            return torch.autocast(*args).__enter__()
        if target is EXIT_AUTOCAST:
            return args[0].__exit__(None, None, None)
        if target is _DATA:
            return args[0].detach()
        return super().call_function(target, args, kwargs)

    def _record(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        tracer = _proxy_tracer()
        proxies = pytree.tree_map(functools.partial(_as_proxy, tracer), args)
        call = tracer.create_proxy("call_function", node.target, proxies, kwargs)
        keep = ("holds", "written")
        call.node.meta.update((key, node.meta[key]) for key in keep if key in node.meta)
        return track_tensor_tree(self.examples[node], call, constant=None, tracer=tracer)


_DATA = torch._C._autograd._get_data_attr
_SILENT = frozenset({torch._functorch.vmap.lazy_load_decompositions})


def _proxy_tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer


def _as_proxy(tracer: Any, value: Any) -> Any:
    if isinstance(value, kept.Body):
        name = tracer.get_fresh_qualname("body")
        tracer.root.add_module(name, value)
        return tracer.create_proxy("get_attr", name, (), {})
    return tracer.unwrap_proxy(value)


def _refuse_lost_values(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if isinstance(value, torch.Tensor) and _is_traced(value):
            user = next(iter(node.users), node)
            raise CannotLower("a value is computed out of sight of the trace", user)


def _annotate(lowered: fx.GraphModule, gm: fx.GraphModule) -> None:
    inputs = gm.graph.find_nodes(op="placeholder")
    for new, old in zip(lowered.graph.find_nodes(op="placeholder"), inputs, strict=True):
        marks = ("slot", "leaf", "differentiable")
        new.meta.update((key, old.meta[key]) for key in marks if key in old.meta)
        new._rename(old.meta.get("readable_name", old.name))
    lowered.meta.update(gm.meta)
    relocate: Callable[[str], str] = gm.meta.get("relocate") or str
    for node in lowered.graph.nodes:
        node.meta["module_path"] = relocate(_innermost(node))
        node.meta["captured"] = node.meta.setdefault("val", None)


def _innermost(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _is_traced(value: torch.Tensor) -> bool:
    return isinstance(value, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(value)
