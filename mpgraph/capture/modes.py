"""What was in force when each node was traced, and whether the exported graph still says so.

torch.export records ``torch.no_grad()`` and ``torch.autocast`` blocks as calls, and turns these
into sub-graphs afterwards. It drops a ``no_grad`` block that holds a higher-order operator
(``cond``, ``while_loop``, ``scan``, ``map``), so that gradients flow through all that the block
encloses; ``torch.inference_mode`` and switches such as ``sdpa_kernel`` it does not record at all.
So every node is marked as it is traced, and the marks are held against the finished graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import fx

from mpgraph import ir
from mpgraph.capture.ambient import ENTER_AUTOCAST, EXIT_AUTOCAST
from mpgraph.capture.detect import NeedsDynamo, user_line

_GRAD_BLOCK = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST_BLOCK = torch.ops.higher_order.wrap_with_autocast
_MARK = "traced in"


@dataclasses.dataclass(frozen=True)
class Modes:
    """What decides how an operator runs, besides its arguments."""

    grad: bool
    autocast: torch.dtype | None
    inference: bool
    switches: tuple[Any, ...]
    trained: int = 0

    def difference(self, other: Modes) -> str:
        """The first thing in which two differ, by its name in torch; "" if there is none."""
        for field, name in _NAMES.items():
            if getattr(self, field) != getattr(other, field):
                return name
        return ""


_NAMES = {
    "grad": "the gradient mode",
    "autocast": "the torch.autocast region",
    "inference": "torch.inference_mode",
    "trained": "what requires_grad of the parameters is",
    "switches": "a switch of torch's own (deterministic algorithms, attention or backend flags)",
}


def modes_now(device: str) -> Modes:
    """What is in force at this moment."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    switches = tuple([repr(read()) for read, _ in _SWITCHES])
    return Modes(torch.is_grad_enabled(), autocast, torch.is_inference_mode_enabled(), switches)


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


_C = torch._C
# How each is read, and how it is set.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (_deterministic, _set_deterministic),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_C._get_flash_sdp_enabled, _C._set_sdp_use_flash),
    (_C._get_mem_efficient_sdp_enabled, _C._set_sdp_use_mem_efficient),
    (_C._get_math_sdp_enabled, _C._set_sdp_use_math),
    (_C._get_cudnn_sdp_enabled, _C._set_sdp_use_cudnn),
    (_C._get_sdp_priority_order, _C._set_sdp_priority_order),
    (_C._get_cudnn_enabled, _C._set_cudnn_enabled),
    (_C._get_cudnn_deterministic, _C._set_cudnn_deterministic),
    (_C._get_mkldnn_enabled, _C._set_mkldnn_enabled),
)


@functools.cache
def settle_switches(device: str) -> None:
    """Let torch set what it sets by itself: the first attention on a GPU orders its kernels.

    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, ``priority_order``.) Otherwise a model
    that is the first to attend would seem to have changed a switch.
    """
    if device == "cuda":
        place = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.float16)
        torch._fused_sdp_choice(place, place, place)


@contextlib.contextmanager
def switches_kept() -> Iterator[None]:
    """Set torch's switches back as they were: a model that is traced half leaves them changed."""
    before = [read() for read, _ in _SWITCHES]
    try:
        yield
    finally:
        for (read, write), value in zip(_SWITCHES, before, strict=True):
            if read() != value:
                write(value)


class Marks:
    """The marks of one export: made while it traces, checked when the graph is finished."""

    def __init__(self, device: str) -> None:
        settle_switches(device)
        self.device = device
        self.outside = modes_now(device)
        self._strays: dict[int, str] = {}
        self._parameters: list[torch.Tensor] = []

    def begin(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        """Take what is in force now as what is in force around the whole graph."""
        self._parameters = list(parameters)
        self.outside = self._now()

    def _now(self) -> Modes:
        trained = hash(tuple([p.requires_grad for p in self._parameters]))
        return dataclasses.replace(modes_now(self.device), trained=trained)

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Mark every node that is traced while the block runs."""
        original = fx.Tracer.create_node

        def create_node(
            tracer: fx.Tracer, kind: str, target: Any, *args: Any, **kw: Any
        ) -> fx.Node:
            if isinstance(target, torch._ops.HigherOrderOperator) and _is_inside_block(
                tracer.graph
            ):
                raise NeedsDynamo(f"an exported graph loses no_grad around {target}", user_line())
            if kind == "get_attr" and str(target).startswith("_param_constant"):
                self._note_stray(getattr(tracer.root, str(target), None))
            node: fx.Node = original(tracer, kind, target, *args, **kw)
            node.meta[_MARK] = self._now()
            return node

        tracer_class: Any = fx.Tracer
        tracer_class.create_node = create_node
        try:
            yield
        finally:
            tracer_class.create_node = original

    def _note_stray(self, value: Any) -> None:
        """A parameter that is not the model's: from a list or a closure."""
        if isinstance(value, torch.Tensor) and value.requires_grad and value.numel():
            self._strays.setdefault(value.data_ptr(), user_line())

    def refuse_stray(self, constant: Any) -> None:
        """Refuse a constant of the finished graph that is a parameter: it has no gradient."""
        if isinstance(constant, torch.Tensor) and constant.layout is torch.strided:
            if (line := self._strays.get(constant.data_ptr())) is not None:
                what = "a parameter that is registered on no module would lose its gradient"
                raise NeedsDynamo(what, line)

    def check(self, gm: fx.GraphModule) -> None:
        """Refuse a graph in which a node would run in other modes than it was traced in.

        What is inside a ``cond`` and its like is not compared: their bodies are traced apart.
        """
        self._check(gm, self.outside)
        for body in ir.all_graphs(gm):
            for node in body.graph.nodes:
                node.meta.pop(_MARK, None)

    def _check(self, gm: fx.GraphModule, expected: Modes) -> None:
        entered: list[Modes] = []
        for node in gm.graph.nodes:
            if node.op != "call_function":
                continue
            # Where a block could not become a sub-graph, its own calls are left.
            if node.target is ENTER_AUTOCAST:
                entered.append(expected)
                expected = self._entered(expected, node)
            elif node.target is EXIT_AUTOCAST:
                expected = entered.pop()
            elif node.target is ir.SET_GRAD:
                expected = dataclasses.replace(expected, grad=bool(node.args[0]))
            elif node.target is _GRAD_BLOCK:
                self._check(
                    _body(gm, node, 1), dataclasses.replace(expected, grad=bool(node.args[0]))
                )
            elif node.target is _AUTOCAST_BLOCK:
                self._check(_body(gm, node, 4), self._entered(expected, node))
            elif (traced := node.meta.get(_MARK)) and not ir.is_getitem(node):
                if what := expected.difference(traced):
                    line = ir.source_line(node)
                    raise NeedsDynamo(f"{what} around {node.target} leaves no trace", line)

    def _entered(self, around: Modes, node: fx.Node) -> Modes:
        device, dtype, enabled = cast("tuple[Any, ...]", node.args[:3])
        if device != self.device:
            return around
        chosen = (dtype or torch.get_autocast_dtype(self.device)) if enabled else None
        return dataclasses.replace(around, autocast=chosen)


def _body(gm: fx.GraphModule, node: fx.Node, index: int) -> fx.GraphModule:
    body = node.args[index]
    assert isinstance(body, fx.Node)
    return getattr(gm, str(body.target))  # type: ignore[no-any-return]


def _is_inside_block(graph: fx.Graph) -> bool:
    """Whether a ``no_grad`` block of a graph that is being traced is still open."""
    calls = graph.find_nodes(op="call_function", target=ir.SET_GRAD)
    return bool(calls) and not calls[-1].args[0]
