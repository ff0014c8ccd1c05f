"""A graph from Dynamo, brought into mpgraph's form.

Dynamo's graph calls torch's Python functions. The plain ones are traced into the pre-dispatch
ATen form. What acts on autograd is kept (:mod:`mpgraph.capture.kept`): a custom Function and a
checkpoint with a rewritten forward, a tensor hook as it is. What tracing would lose (function
transforms such as ``vmap``, control flow, autograd calls) is kept as well, and runs under
``torch.autocast``, exactly as in eager mode.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
from torch.utils import _pytree as pytree

from mpgraph.capture import kept
from mpgraph.capture.ambient import ENTER_AUTOCAST, EXIT_AUTOCAST, Ambient, mark
from mpgraph.capture.borders import with_borders
from mpgraph.capture.keep import CannotLower, LeavesNoTrace, Rewrite, keep_calls
from mpgraph.capture.modes import switches_kept
from mpgraph.infer import fake_mode_of
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.pipeline import PassContext, PassReport, run_passes
from mpgraph.refused_in_16_bit import looked_at_in_fp32
from mpgraph.verify import verify_scaling

Graphs = list[tuple[fx.GraphModule, list[PassReport]]]
PASSES = with_borders(DEFAULT_PASSES)


def lower(
    gm: fx.GraphModule, context: PassContext, ambient: Ambient, graphs: Graphs
) -> fx.GraphModule:
    """Trace ``gm`` and its bodies, run every pass; rewritten graphs are added to ``graphs``.

    Raises:
        CannotLower: Something in the graph would be lost.
    """
    context = dataclasses.replace(context, grad=ambient.grad)
    untraceable: set[str] = set()
    while True:
        inner: Graphs = []
        # A copy: should this fail, the caller's graph is still what Dynamo gave.
        prepared = _copy(gm)
        keep_calls(prepared, context, ambient, _rewriter(context, inner), untraceable)
        try:
            lowered = _trace(prepared, context, ambient)
        except LeavesNoTrace as error:
            if error.name in untraceable:
                raise
            untraceable.add(error.name)
            continue
        graphs += [*inner, (lowered, run_passes(lowered, PASSES, context))]
        if context.scaled and not lowered.meta.get("body"):
            verify_scaling(lowered, grad=context.grad)
        return lowered


def _rewriter(context: PassContext, graphs: Graphs) -> Rewrite:
    return lambda body, around: lower(body, context, around, graphs)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    return copy


def _trace(gm: fx.GraphModule, context: PassContext, ambient: Ambient) -> fx.GraphModule:
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta.get("example_value") for node in placeholders]
    tracer = _Tracer(gm, _fresh_examples(gm))
    with (
        ambient.active(context),
        switches_kept(),
        looked_at_in_fp32,
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
    mark(lowered, context, ambient)
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
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


class _Tracer(fx.Interpreter):
    """Runs Dynamo's graph while make_fx records, except for what is kept."""

    def __init__(self, gm: fx.GraphModule, examples: dict[fx.Node, Any]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.examples = examples

    def run_node(self, n: fx.Node) -> Any:
        if n in self.examples:
            with self._set_current_node(n):
                return self._record(n)
        if n.target == "item" and isinstance(n.meta.get("example_value"), torch.SymFloat):
            return self._read(n)
        graph = _proxy_tracer().graph
        last = next(iter(reversed(graph.nodes)), None)
        value = super().run_node(n)
        if not n.users and n.op.startswith("call") and not _is_silent(n):
            if next(iter(reversed(graph.nodes)), None) is last:
                raise LeavesNoTrace(n)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ENTER_AUTOCAST:
            return torch.autocast(*args).__enter__()  # type: ignore[no-untyped-call]
        if target is EXIT_AUTOCAST:
            return args[0].__exit__(None, None, None)
        if target is _DATA:
            return args[0].detach()
        return super().call_function(target, args, kwargs)

    def _read(self, node: fx.Node) -> Any:
        """A float that has varied: Dynamo passes it as a tensor, whose value tracing lacks."""
        args, _ = self.fetch_args_kwargs_from_env(node)
        tracer = _proxy_tracer()
        source = tracer.unwrap_proxy(args[0])
        call = tracer.create_proxy("call_function", _ITEM, (source,), {})
        return track_tensor_tree(node.meta["example_value"], call, constant=None, tracer=tracer)

    def _record(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        tracer = _proxy_tracer()
        proxies = pytree.tree_map(functools.partial(_as_proxy, tracer), args)
        options = {name: _plain(value) for name, value in kwargs.items()}
        call = tracer.create_proxy("call_function", node.target, proxies, options)
        keep = ("holds", "written")
        call.node.meta.update((key, node.meta[key]) for key in keep if key in node.meta)
        return track_tensor_tree(self.examples[node], call, constant=None, tracer=tracer)


def _plain(value: Any) -> Any:
    """An option as a number: Dynamo then compiles again where it is another one."""
    if isinstance(value, torch.SymBool):
        return bool(value)
    return int(value) if isinstance(value, torch.SymInt) else value


def _is_silent(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in _SILENT


_ITEM = torch.ops.aten._local_scalar_dense.default
_DATA: Any = getattr(torch._C._autograd, "_get_data_attr", None)
# Calls that need leave nothing behind: two prepare or observe torch itself, two are marks.
_SILENT = frozenset(
    {"lazy_load_decompositions", "_log_api_usage_once", "_enter_autocast", "_exit_autocast"}
)


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
