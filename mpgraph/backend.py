"""The Dynamo backend: ``torch.compile(model, backend="mpgraph", options={...})``.

torch finds it by its entry point, ``torch_dynamo_backends``. Every graph of Dynamo's is rewritten
and handed to another backend, Inductor unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._guards import tracing

from mpgraph import ir
from mpgraph.capture.ambient import Ambient
from mpgraph.capture.breaks import Break, breaks_inside
from mpgraph.capture.captured import slots_of
from mpgraph.capture.keep import CannotLower
from mpgraph.capture.kept import repair_checkpoints
from mpgraph.capture.lower import Graphs, lower
from mpgraph.capture.paths import label_placeholders
from mpgraph.errors import PolicyError, PrecisionError
from mpgraph.pipeline import PassContext
from mpgraph.policy import Policy
from mpgraph.precision import allow_tf32, resolve_precision
from mpgraph.warn import warn

_OPTIONS = ("precision", "policy", "inner")
_MOST_ENTRIES = 256


@dataclasses.dataclass
class BackendEntry:
    """One graph of Dynamo's, rewritten: for those who look on.

    Attributes:
        parameters: Those that the graph reads, weakly: they tell whose graph it is.
    """

    label: str
    context: PassContext
    graphs: Graphs
    breaks: list[Break]
    parameters: list[weakref.ref[torch.Tensor]]
    engine: str = "backend"
    reason: str = ""

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether the graph reads a parameter of the model."""
        held = {id(p) for p in model.parameters()}
        return any(id(reference()) in held for reference in self.parameters)


entries: list[BackendEntry] = []


def backend(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite one graph of Dynamo's in mixed precision, and let another backend compile it.

    Called by ``torch.compile(model, backend="mpgraph", options=...)``; graph breaks are allowed.
    The model's Python sees the dtypes that it has without mpgraph: where it reads them
    (``x.to(y.dtype)``), or where the loss scale of fp16 is needed, convert the model and compile
    the result instead.

    Args:
        gm: What Dynamo has traced.
        examples: Its inputs, as Dynamo passes them to backends.
        options: ``precision`` ("bf16" unless given; "fp32", "tf32", "auto", or a dtype), ``policy``
            (a :class:`mpgraph.Policy` or the name of a preset), and ``inner``: the backend that
            compiles the rewritten graph, by name or as a function ("inductor" unless given).
        mode: The compile mode, for an inner backend that takes one.

    Raises:
        PrecisionError: The precision needs a loss scale, or parameters in 16 bit.
        PolicyError: The policy cannot be read, or an option is unknown.
    """
    given = _checked(dict(options or {}))
    device = _device(examples)
    precision = resolve_precision(given.get("precision", "bf16"), device)
    if precision.compute is torch.float16 or precision.pure:
        raise PrecisionError(
            f'backend="mpgraph" has no loss scale and changes no parameters, so it cannot train in '
            f"{precision.name}. Convert the model, then compile it: "
            f'torch.compile(mpgraph.convert(model, "{precision.name}"))'
        )
    if precision.name == "tf32":
        allow_tf32()
    policy = given.get("policy", "default")
    policy = policy if isinstance(policy, Policy) else Policy(policy)
    context = PassContext(
        policy=policy,
        compute=precision.compute,
        device=device,
        grad=torch.is_grad_enabled(),
        strict=policy.preset.startswith("autocast"),
    )
    rewritten = _rewritten(gm, examples, context)
    with torch.autocast(device, enabled=False):
        inner = _inner(given.get("inner", "inductor"), mode)
        compiled: Callable[..., Any] = inner(rewritten, list(examples))
    return compiled


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise PolicyError(
            f'backend="mpgraph" takes the options {", ".join(_OPTIONS)}; found {unknown[0]!r}'
        )
    return options


def _device(examples: Sequence[Any]) -> str:
    kinds = [v.device.type for v in examples if isinstance(v, torch.Tensor)]
    return "cuda" if "cuda" in kinds else "cpu"


def _inner(inner: Any, mode: str | None) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    if inner == "inductor" and mode is not None:
        return torch._TorchCompileInductorWrapper(mode, None, None)  # type: ignore[no-untyped-call]
    found: Any = lookup_backend(inner) if isinstance(inner, str) else inner
    return found  # type: ignore[no-any-return]


def _rewritten(gm: fx.GraphModule, examples: Sequence[Any], context: PassContext) -> fx.GraphModule:
    label_placeholders(gm, examples, {})
    repair_checkpoints(gm)
    ambient = Ambient(None, torch.is_grad_enabled())  # a region around the call changes nothing
    graphs: Graphs = []
    result = gm
    try:
        with tracing(None), torch.autocast(context.device, enabled=False):
            lowered = lower(gm, context, ambient, graphs)
        breaks = [b for rewritten, _ in graphs for b in breaks_inside(rewritten)]
        result = _with_casts(lowered, gm)
    except CannotLower as error:
        graphs, breaks = [], [Break(error.reason, error.line)]
        warn(
            f'backend="mpgraph" leaves a graph in the dtypes that it has: {error.reason} '
            f"({error.line}). mpgraph.explain lists it."
        )
    found = [v for v in examples if isinstance(v, nn.Parameter)]
    entries.append(
        BackendEntry(
            f"graph ({_shapes(gm)})", context, graphs, breaks, [weakref.ref(p) for p in found]
        )
    )
    del entries[:-_MOST_ENTRIES]
    return result


def _shapes(gm: fx.GraphModule) -> str:
    nodes = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["slot"].kind == "input"]
    values = [(n.meta["readable_name"], n.meta.get("example_value")) for n in nodes]
    return ", ".join(ir.describe(name, v) for name, v in values if isinstance(v, torch.Tensor))


def _with_casts(lowered: fx.GraphModule, gm: fx.GraphModule) -> fx.GraphModule:
    """The rewritten graph on Dynamo's own inputs: the casts of parameters are in it again."""
    graph = fx.Graph()
    inputs = []
    for node in gm.graph.find_nodes(op="placeholder"):
        inputs.append(graph.node_copy(node))
    places: dict[fx.Node, fx.Node] = {}
    placeholders = lowered.graph.find_nodes(op="placeholder")
    for node, slot in zip(placeholders, slots_of(lowered), strict=True):
        places[node] = inputs[slot.index]
        if slot.dtype is not None:
            places[node] = graph.call_function(ir.CAST, (inputs[slot.index], slot.dtype))
    graph.output(graph.graph_copy(lowered.graph, places))
    made = fx.GraphModule(lowered, graph)
    made.meta.update(gm.meta)
    return made
