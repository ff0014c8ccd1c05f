"""A graph without writes: what it writes to its inputs becomes a result."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from mpgraph.infer import fake_mode_of
from mpgraph.onnx.last_writes import writes_last
from mpgraph.onnx.whole_operators import whole_operators
from mpgraph.recurrent import kept_whole, unrolled_in_shape, without_cudnn, without_onednn
from mpgraph.step.assemble import copied
from mpgraph.step.joint import fresh

aten = torch.ops.aten
# What a retraced node inherits, under one key of torch's that survives tracing.
CARRIED = ("module_path", "part", "stack_trace", "decision", "inserted")


@dataclasses.dataclass
class Functional:
    """A graph that writes nothing.

    Attributes:
        graph_module: Takes what the original took; returns a flat tuple: what the original
            returned, then one new value per written input.
        written: The positions of the inputs that the original wrote to, in that order.
    """

    graph_module: fx.GraphModule
    written: list[int]


def functional(gm: fx.GraphModule) -> Functional:
    """Take every write out of a graph that returns a flat tuple.

    Running statistics are written by kernels whose schemas do not say so; the Python dispatcher
    has others in their place that do. A graph that writes its inputs at its end, and nothing else,
    is not traced again.
    """

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        functionalize: Any = torch.func.functionalize
        wrapped: Callable[..., Any] = functionalize(run, remove="mutations")
        return wrapped

    return _with_results(copied(gm) if writes_last(gm.graph) else retrace(gm, wrap=wrap))


def retrace(
    gm: fx.GraphModule,
    *,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """Trace a graph again, on fake values like those that it was traced on.

    Inputs keep their names and meta; other nodes inherit the module, part and line of the node
    that they come from.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    values = [node.meta["val"] for node in inputs]
    _pack(gm.graph)
    runner = wrap(lambda *given: fx.Interpreter(gm).run(*given))
    with tracing(values):
        fakes = [fresh(v) if isinstance(v, torch.Tensor) else v for v in values]
        traced = make_fx(
            runner, decomposition_table=dict(decompositions or {}), _allow_non_fake_inputs=True
        )(*fakes)
    _unpack(traced.graph)
    for new, old in zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True):
        new.meta = {**old.meta, "val": new.meta["val"]}
        new._rename(old.name)
        new.target = new.name
    traced.graph.output_node().meta.update(gm.graph.output_node().meta)
    traced.recompile()
    return traced


@contextlib.contextmanager
def tracing(values: Sequence[Any]) -> Iterator[None]:
    """What to trace under: no gradients, the fake mode of ``values``, meta that is kept."""
    with (
        fake_mode_of(values),
        torch.no_grad(),
        enable_python_dispatcher(),
        fx_traceback.preserve_node_meta(),
        in_plain_operators(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def in_plain_operators() -> Iterator[None]:
    """No fused attention and no fused recurrent layers: they and their gradients are opaque.

    What mpgraph has rows for stays whole.
    """
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, whole_operators, unrolled_in_shape():
        with kept_whole(False), without_onednn(), without_cudnn():
            yield


def _pack(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.meta["custom"] = {key: node.meta[key] for key in CARRIED if key in node.meta}


def _unpack(graph: fx.Graph) -> None:
    for node in graph.nodes:
        for key, value in (node.meta.pop("custom", None) or {}).items():
            node.meta[key] = value


def _with_results(gm: fx.GraphModule) -> Functional:
    graph = gm.graph
    inputs = list(graph.find_nodes(op="placeholder"))
    new: dict[fx.Node, Any] = {}
    for node in list(graph.find_nodes(op="call_function", target=aten.copy_.default)):
        place, value = node.args[:2]
        assert place in inputs, "functionalize writes to inputs alone"
        new[place] = value
        graph.erase_node(node)
    output = graph.output_node()
    returned = output.args[0]
    output.args = ((*returned, *new.values()),)  # type: ignore[misc]
    drop_copies(graph, laid_out=True)
    gm.recompile()
    return Functional(gm, [inputs.index(place) for place in new])


_COPIES = frozenset(
    {
        aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default,
        aten.copy.default, aten._to_copy.default, aten.contiguous.default,
    }
)  # fmt: skip


def drop_copies(graph: fx.Graph, *, laid_out: bool = False) -> int:
    """Use values instead of their copies: in a graph without writes, both stay equal.

    With ``laid_out``, only where both lie in memory alike: views of a copy may not be views of the
    original.
    """
    edits = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _COPIES:
            source = node.args[1 if node.target is aten.copy.default else 0]
            if isinstance(source, fx.Node) and _is_alike(source, node, laid_out):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                edits += 1
    graph.eliminate_dead_code()
    return edits


def _is_alike(source: fx.Node, copy: fx.Node, laid_out: bool) -> bool:
    a, b = source.meta["val"], copy.meta["val"]
    if not isinstance(a, torch.Tensor) or a.dtype is not b.dtype:
        return False
    is_alike = tuple(a.shape) == tuple(b.shape)
    return is_alike and (not laid_out or tuple(a.stride()) == tuple(b.stride()))
