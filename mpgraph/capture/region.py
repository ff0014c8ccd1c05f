"""A converted model inside a graph of the user's own ``torch.compile``.

Dynamo traces the model's own forward as the body of a higher-order operator, with the guards, the
dynamic sizes and the gradients that it would have by itself. When a backend traces or runs that
operator, the body is rewritten by mpgraph's passes, and what runs is plain ATen: nothing of
mpgraph is left in the compiled code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch._dynamo.variables import higher_order_ops
from torch._guards import tracing
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from mpgraph import ir, ops
from mpgraph.capture.ambient import ENTER_AUTOCAST, EXIT_AUTOCAST, Ambient
from mpgraph.capture.breaks import Break, breaks_inside
from mpgraph.capture.captured import Slot, slots_of
from mpgraph.capture.keep import CannotLower
from mpgraph.capture.kept import repair_checkpoints
from mpgraph.capture.lower import Graphs, lower
from mpgraph.capture.overrides import say_what_matched_nothing
from mpgraph.capture.paths import relocated
from mpgraph.capture.saved import hidden_from_tracers_function_modes
from mpgraph.errors import PrecisionError
from mpgraph.module import MixedPrecision, Settings, State
from mpgraph.pipeline import PassContext
from mpgraph.precision import logger
from mpgraph.unguarded import watch

_HALF = (torch.float16, torch.bfloat16)


def run_region(state: State, model: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
    """What ``forward`` is while Dynamo traces it; Dynamo traces this function, too."""
    if not state.settings.scaled:
        return REGION(state.rewriter, state.body, model, *args, **kwargs)
    scale = state.scale.read()
    return REGION(state.rewriter, state.body, scale, model, *args, **kwargs)[1]


class _Region(HigherOrderOperator):
    """``REGION(rewriter, body, *args)`` runs ``rewriter(body)(*args)``."""

    def __init__(self) -> None:
        cast(Any, super()).__init__("mpgraph_region")

    def __call__(self, rewriter: Any, body: Any, /, *args: Any, **kwargs: Any) -> Any:
        # Dynamo keeps the function beside the body's graph, under this key.
        if isinstance(rewriter, str):
            rewriter = body.meta[rewriter]
        disable: Any = torch._dynamo.disable
        return disable(rewriter(body))(*args, **kwargs)


REGION: Any = _Region()
_Wrapper: Any = higher_order_ops.DynamoBypassingWrapperHigherOrderVariable


class _RegionVariable(_Wrapper):  # type: ignore[misc]
    """Dynamo's view of a region: a body that may change the model, as any forward may."""

    _HOP_NAME = "mpgraph's region of a converted model"
    allow_side_effects = True

    def create_wrapped_node(self, *args: Any, **kwargs: Any) -> Any:
        made = super().create_wrapped_node(*args, **kwargs)
        self._body = made[4]
        return made

    def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        result = super()._call_function(tx, args, kwargs)
        calls = tx.output.graph.find_nodes(op="call_function", target=self.value)
        self._body.meta[_CALL] = list(calls)[-1]
        return result


_CALL = "mpgraph_call"
_classes: dict[str, Any] = cast(Any, higher_order_ops)._hop_name_to_variable_class
_classes["mpgraph_region"] = _RegionVariable


def body_of(forward: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """The user's forward, as the body of a region: under ``torch.autocast``, as capture needs it.

    With a loss scale, the body takes it first and hands it through: so it is one of its inputs.
    """
    device, compute = settings.device, settings.precision.compute
    dtype, enabled = compute or torch.bfloat16, compute is not None

    def body(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype, enabled=enabled):
            return forward(model, *args, **kwargs)

    def scaled_body(scale: torch.Tensor, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype, enabled=enabled):
            result = forward(model, *args, **kwargs)
        # The rewritten graph returns no fp16; Python is to see the dtype that it will have.
        return scale, pytree.tree_map_only(torch.Tensor, _widened, result)

    return scaled_body if settings.scaled else body


def _widened(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype is torch.float16 else value


def rewriter_of(state: State) -> Callable[[fx.GraphModule], Callable[..., Any]]:
    """What makes a runnable function of a body, for one converted model."""
    of_state = weakref.ref(state)

    def rewriter(body: Any) -> Callable[..., Any]:
        held = of_state()
        assert held is not None
        if not isinstance(body, fx.GraphModule):
            # Dynamo gave up on the body, and Python runs what is written in run_region.
            return functools.partial(_run_eagerly, held)

        def run(*operands: Any) -> Any:
            if _KEY not in body.meta:
                body.meta[_KEY] = _rewritten(held, body)
            return body.meta[_KEY](*operands)

        return run

    return rewriter


def _run_eagerly(state: State, *args: Any, **kwargs: Any) -> Any:
    scale, model, *given = args if state.settings.scaled else (None, *args)
    result = state.call(model, tuple(given), kwargs)
    return result if scale is None else (scale, result)


_KEY = "mpgraph_region"


@dataclasses.dataclass
class RegionEntry:
    """One body, rewritten: for those who look on."""

    label: str
    context: PassContext
    graphs: Graphs
    breaks: list[Break]
    engine: str = "compile"
    reason: str = ""


def _rewritten(state: State, body: fx.GraphModule) -> Callable[..., Any]:
    context = state.context()
    _without_own_autocast(body)
    placeholders = body.graph.find_nodes(op="placeholder")
    _label(state, body, placeholders)
    scale = _scale_position(state.settings, body)
    label = _describe(state, [n for i, n in enumerate(placeholders) if i != scale])
    graphs: Graphs = []
    breaks: list[Break] = []
    run: Callable[..., Any] = functools.partial(_under_autocast, context, body)
    _drop_unused_results(body)
    repair_checkpoints(body)
    try:
        # Whatever traces the region is not to trace the rewriting of it.
        with untraced(), torch.autocast(context.device, enabled=False):
            gm = lower(body, context, Ambient(None, context.grad), graphs)
        breaks += (b for lowered, _ in graphs for b in breaks_inside(lowered))
        run = _runner(gm, scale, context.device)
    except CannotLower as error:
        logger.debug("a graph runs under torch.autocast: %s", error)
        graphs, breaks = [], [Break(error.reason, error.line)]
    if (model := state.model()) is not None:
        if context.scaled and not state.scale.is_guarded:
            watch(model)
        if graphs and not state.compiled:
            modules = [path for path, _ in model.named_modules()]
            rewritten = [lowered for lowered, _ in graphs]
            say_what_matched_nothing(state, rewritten, modules, "in the compiled graph")
    state.compiled = [*state.compiled, RegionEntry(label, context, graphs, breaks)]
    del state.compiled[: -state.settings.max_graphs]
    return run


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Whatever traces what is around this block does not trace the block."""
    with _disable_current_modes(), hidden_from_tracers_function_modes():
        with torch._C._DisablePythonDispatcher(), tracing(None):
            yield


def _without_own_autocast(body: fx.GraphModule) -> None:
    """Take out the region of :func:`body_of`: entered as a node, an error would never leave it."""
    entered = body.graph.find_nodes(op="call_function", target=ENTER_AUTOCAST)
    left = body.graph.find_nodes(op="call_function", target=EXIT_AUTOCAST)
    for first in list(entered)[:1]:
        for node in (*(n for n in left if n.args[0] is first), first):
            body.graph.erase_node(node)
        body.recompile()


def _under_autocast(context: PassContext, body: fx.GraphModule, *operands: Any) -> Any:
    with context.autocast():
        return body(*operands)


def _label(state: State, body: fx.GraphModule, placeholders: Sequence[fx.Node]) -> None:
    """Say which inputs are parameters, which may carry gradients, and how to call them."""
    names = _names(state.model())
    arguments = list(inspect.signature(state.original_forward()).parameters)[1:]
    for index, node in enumerate(placeholders):
        example: Any = node.meta.get("example_value")
        is_parameter = isinstance(example, nn.Parameter)
        name = _name(node, names, arguments)
        if is_parameter and example.dtype in _HALF and not state.settings.precision.pure:
            raise PrecisionError(
                f"parameter {name} is {example.dtype}: it was float32 when the model was "
                "converted. Convert it again for training in 16 bit ('bf16-true', 'fp16-true'), or "
                "leave it in float32."
            )
        node.meta["slot"] = Slot("parameter" if is_parameter else "input", name, index)
        carries = isinstance(example, torch.Tensor) and example.requires_grad
        node.meta["leaf"] = carries and example.is_leaf
        node.meta["differentiable"] = carries
        node.meta["readable_name"] = re.sub(r"\W", "_", f"p_{name}" if is_parameter else name)
    body.meta["relocate"] = relocated(_root(body))


def _names(model: nn.Module | None) -> Mapping[str, str]:
    """By the end of the name that Dynamo gives it, the path of a parameter or buffer."""
    names = {}
    for kind, found in _tensors_of(model):
        *modules, last = found.split(".")
        steps = [*(f"modules_{m}" for m in modules), f"{kind}_{last}_"]
        names[re.sub(r"\W", "_", "_".join(steps))] = found
    return names


def _tensors_of(model: nn.Module | None) -> Iterator[tuple[str, str]]:
    if model is not None:
        yield from (("parameters", n) for n, _ in model.named_parameters(remove_duplicate=False))
        yield from (("buffers", n) for n, _ in model.named_buffers(remove_duplicate=False))


def _name(node: fx.Node, names: Mapping[str, str], arguments: Sequence[str]) -> str:
    ends = [end for end in names if node.name.endswith(end)]
    if ends:
        return names[max(ends, key=len)]
    name = re.sub(r"^l_(kwargs_)?", "", node.name).strip("_")
    index, _, rest = name.removeprefix("args_").partition("_")
    if name.startswith("args_") and index.isdecimal() and int(index) < len(arguments):
        return "_".join(filter(None, (arguments[int(index)], rest)))
    return name


def _root(body: fx.GraphModule) -> str:
    """Where in the compiled function's own words the converted model is."""
    for node in body.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if isinstance(kind, type) and issubclass(kind, MixedPrecision):
                return str(path)
    return ""


def _describe(state: State, placeholders: Sequence[fx.Node]) -> str:
    model = state.model()
    mode = "eval" if model is not None and not model.training else "train"
    held = {path for _, path in _tensors_of(model)}
    inputs = (n for n in placeholders if n.meta["slot"].target not in held)
    tensors = ((n, n.meta.get("example_value")) for n in inputs)
    shapes = (
        ir.describe(n.meta["readable_name"], v) for n, v in tensors if isinstance(v, torch.Tensor)
    )
    grad = "" if torch.is_grad_enabled() else ", no_grad"
    return f"{state.original.__name__} {mode}{grad} ({', '.join(shapes)})"


def _drop_unused_results(body: fx.GraphModule) -> None:
    """Return only what the graph around the body uses.

    Where a body may have side effects, Dynamo has it return every value that it computes.
    """
    call: fx.Node | None = body.meta.get(_CALL)
    if call is None:
        return
    used = {user.args[1] for user in call.users if ir.is_getitem(user) and user.users}
    output = body.graph.output_node()
    returned = cast(Sequence[Any], output.args[0])
    output.args = (tuple(v if i in used else None for i, v in enumerate(returned)),)
    body.recompile()


def _scale_position(settings: Settings, body: fx.GraphModule) -> int:
    """Which input is the loss scale: the one that the body hands through, first."""
    if not settings.scaled:
        return -1
    returned = cast(Sequence[fx.Node], body.graph.output_node().args[0])
    return body.graph.find_nodes(op="placeholder").index(returned[0])


def _runner(gm: fx.GraphModule, scale: int, device: str) -> Callable[..., Any]:
    """Run a rewritten graph on the operands of its body, with scaled casts that can be traced."""
    for node in gm.graph.nodes:
        if node.target in TRACEABLE:
            node.target = TRACEABLE[node.target]
    gm.recompile()
    slots = slots_of(gm)

    def run(*operands: Any) -> Any:
        used = operands[scale] if scale >= 0 else None
        with torch.autocast(device, enabled=False):
            return gm(*[_value(slot, operands, used) for slot in slots])

    return run


def _value(slot: Slot, operands: Sequence[Any], scale: torch.Tensor | None) -> Any:
    if slot.kind == "scale":
        return scale
    return bordered(slot, operands[slot.index], scale)


def bordered(slot: Slot, value: Any, scale: torch.Tensor | None) -> Any:
    """A value as a rewritten graph takes it: cast, and at the border of the fp16 region, scaled."""
    if slot.scaled and scale is not None:
        return traceable_lower(value, slot.dtype or value.dtype, scale)
    return value if slot.dtype is None else value.to(slot.dtype)


class _Cast(torch.autograd.Function):
    """What both have in common: the cast, and the scale of this very forward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = x.dtype
        return x.view_as(x) if x.dtype is dtype else x.to(dtype)


class _Lower(_Cast):
    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (scale,) = ctx.saved_tensors
        return cast(Any, _Unscale).apply(gradients[0], ctx.dtype, scale), None, None


class _Widen(_Cast):
    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (scale,) = ctx.saved_tensors
        return cast(Any, _Scale).apply(gradients[0], ctx.dtype, scale), None, None


class _Unscale(torch.autograd.Function):
    """A gradient of a gradient obeys the rule of mpgraph.ops: the backward of it is ``lower``."""

    @staticmethod
    def forward(ctx: Any, g: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = g.dtype
        return (g.float() / scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (scale,) = ctx.saved_tensors
        return traceable_lower(gradients[0], ctx.dtype, scale), None, None


class _Scale(torch.autograd.Function):
    """The backward of it is ``widen``."""

    @staticmethod
    def forward(ctx: Any, g: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = g.dtype
        return (g * scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (scale,) = ctx.saved_tensors
        return traceable_widen(gradients[0], ctx.dtype, scale), None, None


def traceable_lower(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """``lower``, in operators that any backend can fuse with what is around them."""
    return cast(torch.Tensor, cast(Any, _Lower).apply(x, dtype, scale))


def traceable_widen(h: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """``widen``, likewise."""
    return cast(torch.Tensor, cast(Any, _Widen).apply(h, dtype, scale))


TRACEABLE: dict[Any, Any] = {ops.LOWER: traceable_lower, ops.WIDEN: traceable_widen}
