"""A step's graph cut in two, so that what is cheap is computed again instead of kept."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.compile_fx import partition_fn
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mpgraph import ir
from mpgraph.step.joint import fresh, memory_of
from mpgraph.step.random import decompositions

_COPY = torch.ops.aten.copy_.default
# By this name AOTAutograd's partitioner knows where the backward half begins.
_SEED = "tangents_1"

Source = tuple[str, Any]
SEED: Source = ("seed", None)


@dataclasses.dataclass
class Half:
    """The forward or the backward half of a step.

    Attributes:
        graph_module: Takes one value per source; writes to some of them.
        sources: Where each input comes from: ("input", i) of the whole, ("size", (i, dim)) of one
            of these, ("kept", name) by the forward half, or ("seed", None), the gradient of the
            loss.
        results: What each output is: ("output", i) of the whole, or ("kept", name).
    """

    graph_module: fx.GraphModule
    sources: list[Source]
    results: list[Source]

    @property
    def values(self) -> list[Any]:
        """A fake value per input."""
        return [n.meta["val"] for n in self.graph_module.graph.find_nodes(op="placeholder")]

    @property
    def returned(self) -> list[Any]:
        """A fake value per output."""
        return [node.meta["val"] for node in _outputs(self.graph_module)]


def cut(gm: fx.GraphModule, mode: FakeTensorMode, static: Sequence[int]) -> tuple[Half, Half]:
    """Cut a step's graph, flat and with writes, into forward and backward.

    What lies between is chosen by a minimal cut, as AOTAutograd does it
    (torch/_functorch/partitioners.py): values that are cheap to compute, casts among them, are
    computed again in the backward half where that saves memory.

    Args:
        gm: A step's graph with flat outputs.
        mode: The fake mode of its values.
        static: Which inputs are there anyway: everything but the batch.
    """
    whole = _functional(gm, mode)
    graph = whole.graph
    inputs = list(graph.find_nodes(op="placeholder"))[:-1]
    written = _take_out_writes(graph)
    returned = list(cast(Sequence[Any], graph.output_node().args[0]))
    names: list[Source] = [("output", i) for i in range(len(returned))]
    names += [("write", place.name) for place, _ in written]
    values = [*returned, *(value for _, value in written)]
    after = _after_seed(graph)
    # Writes come last of all: values that the backward half computes again read what was there.
    is_late = [kind == "write" or v in after for (kind, _), v in zip(names, values, strict=True)]
    order = sorted(range(len(values)), key=lambda i: is_late[i])
    count = is_late.count(False)
    graph.output_node().args = (tuple(values[i] for i in order),)
    whole.recompile()
    examples = [node.meta["val"] for node in inputs]
    with mode, V.set_fake_mode(mode):  # passes over random numbers look for it there
        first, second = partition_fn(
            whole,
            [*examples, examples[0]],
            num_fwd_outputs=count,
            static_lifetime_input_indices=list(static),
        )
    places = {node.name: (i, node.meta["val"]) for i, node in enumerate(inputs)}
    kept = [("kept", _name(n)) for n in _outputs(first)[count:]]
    forward = _half(first, [*(names[i] for i in order[:count]), *kept], places)
    backward = _half(second, [names[i] for i in order[count:]], places)
    _only_needed(forward, backward)
    for half in (forward, backward):
        _take_sizes(half, examples)
    return forward, backward


def _functional(gm: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    """The graph in core operators, with writes at its end, and an input for the loss's gradient."""
    seeded = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = seeded.graph_copy(gm.graph, copies)
    seeded.output(output)
    loss = next(n for n in gm.graph.nodes if _is_seed(n))
    seed = copies[loss]
    last = list(seeded.find_nodes(op="placeholder"))[-1]
    with seeded.inserting_after(last):
        placeholder = seeded.placeholder(_SEED)
    seed.replace_all_uses_with(placeholder)
    seeded.erase_node(seed)
    _let_views_copy(seeded)
    slots = gm.graph.find_nodes(op="placeholder")
    with mode, torch.no_grad(), warnings.catch_warnings(), enable_python_dispatcher():
        warnings.simplefilter("ignore")
        values = [fresh(node.meta["val"]) for node in (*slots, loss)]
        traced: Any = torch.func.functionalize(fx.GraphModule(gm, seeded), remove="mutations")
        whole = make_fx(traced, decomposition_table=decompositions(), _allow_non_fake_inputs=True)(
            *values
        )
    for node in list(whole.graph.nodes):
        if node.target is torch.ops.aten.detach.default:  # autograd's, which is over
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
    whole.graph.eliminate_dead_code()
    placeholders = list(whole.graph.find_nodes(op="placeholder"))
    for index, node in enumerate(placeholders[:-1]):
        node.target = node.name = f"primals_{index + 1}"
    placeholders[-1].target = placeholders[-1].name = _SEED
    return whole


def _let_views_copy(graph: fx.Graph) -> None:
    """Views become reshapes where nothing is written through them.

    Inductor's decompositions lay some values out otherwise than eager mode does (``cat`` with an
    empty tensor), and then what was a view cannot be one.
    """
    written = {
        memory_of(value.meta.get("val"))
        for node in graph.nodes
        for value in ir.written_arguments(node)
    }
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        if memory_of(node.meta.get("val")) not in written:
            node.target = torch.ops.aten.reshape.default


def _is_seed(node: fx.Node) -> bool:
    is_ones = node.target is torch.ops.aten.ones_like.default
    return is_ones and node.meta.get("part") == "backward"


def _take_out_writes(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """The inputs that are written at the end, and their new values."""
    found = []
    for node in list(graph.nodes):
        if node.target is _COPY and cast(fx.Node, node.args[0]).op == "placeholder":
            found.append((cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])))
            node.replace_all_uses_with(cast(fx.Node, node.args[1]))
            graph.erase_node(node)
    return found


def _after_seed(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the gradient of the loss."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name == _SEED or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _outputs(gm: fx.GraphModule) -> list[Any]:
    return list(cast(Sequence[Any], gm.graph.output_node().args[0]))


def _name(node: Any) -> str:
    return str(node.name)


def _half(gm: fx.GraphModule, results: list[Source], places: dict[str, Any]) -> Half:
    """Write what is to be written, and say where the inputs come from."""
    graph = gm.graph
    here = {node.name: node for node in graph.find_nodes(op="placeholder")}
    left: list[tuple[Source, Any]] = []
    with graph.inserting_before(graph.output_node()):
        for (kind, name), value in zip(results, _outputs(gm), strict=True):
            if kind != "write":
                left.append(((kind, name), value))
                continue
            node = graph.call_function(_COPY, (_input(graph, here, places, name), value))
            node.meta["val"] = value.meta["val"]
    graph.output_node().args = (tuple(value for _, value in left),)
    gm.recompile()
    sources: list[Source] = []
    for node in graph.find_nodes(op="placeholder"):
        if node.name == _SEED:
            sources.append(SEED)
        else:
            known = node.name in places
            sources.append(("input", places[node.name][0]) if known else ("kept", node.name))
    return Half(gm, sources, [source for source, _ in left])


def _input(graph: fx.Graph, here: dict[str, fx.Node], places: dict[str, Any], name: str) -> fx.Node:
    """The input of this name; made if this half does not read it."""
    if name not in here:
        last = list(here.values())[-1]
        with graph.inserting_after(last):
            here[name] = graph.placeholder(name)
        here[name].meta["val"] = places[name][1]
    return here[name]


def _only_needed(forward: Half, backward: Half) -> None:
    """Let the forward half return what the backward half takes from it, and no inputs."""
    needed = {name for kind, name in backward.sources if kind == "kept"}
    output = forward.graph_module.graph.output_node()
    pairs = [
        (source, value)
        for source, value in zip(forward.results, _outputs(forward.graph_module), strict=True)
        if source[0] == "output" or source[1] in needed
    ]
    forward.results = [source for source, _ in pairs]
    output.args = (tuple(value for _, value in pairs),)
    forward.graph_module.recompile()


def _take_sizes(half: Half, examples: Sequence[Any]) -> None:
    """Let a half take the symbolic sizes that it computes with, as AOTAutograd's do.

    By these inputs Inductor's cache on disk finds and checks what a half holds for.
    """
    graph = half.graph_module.graph
    symbols = set().union(*map(_symbols, half.values))
    symbols.difference_update(_expression(value) for value in half.values)
    first, sources = next(iter(graph.nodes)), []
    for (index, dim), size in _sizes(examples):
        if _expression(size) in symbols:
            symbols.remove(_expression(size))
            with graph.inserting_before(first):
                graph.placeholder(f"size_{index}_{dim}").meta["val"] = size
            sources.append(("size", (index, dim)))
    half.sources[:0] = sources
    half.graph_module.recompile()


def _sizes(values: Sequence[Any]) -> Iterator[tuple[tuple[int, int], Any]]:
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            yield from (((index, dim), size) for dim, size in enumerate(value.shape))


def _symbols(value: Any) -> set[Any]:
    parts = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    return {s for n in parts if isinstance(n, torch.SymInt) for s in n.node.expr.free_symbols}


def _expression(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else None
