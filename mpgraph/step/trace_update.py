"""From an optimizer to a graph of its own update."""

from __future__ import annotations

import builtins
import collections
import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
)
from torch.optim import Optimizer

from mpgraph.capture.breaks import line_of_error
from mpgraph.capture.export import compiling
from mpgraph.errors import CaptureError
from mpgraph.finite import find_non_finite
from mpgraph.precision import logger
from mpgraph.step.joint import StepContext, fresh, mark
from mpgraph.step.optimizer_places import (
    Place,
    hyperparameters,
    is_hyperparameter,
    state_tensors,
)
from mpgraph.step.slots import StepSlot, place_name


class NewState(Exception):
    """The update makes state that is not there yet: a first step is to be taken by itself."""


@dataclasses.dataclass
class Update:
    """A traced update.

    Attributes:
        graph_module: From gradients, parameters, state and hyperparameters to the new value of
            every parameter and state tensor, as a dict by slot name; nothing is written.
        hyperparameters: The numbers that it reads from the parameter groups.
        holds: Whether the graph holds for these values of them.
        is_fused: It calls the optimizer's fused kernels, which write parameters and state
            themselves; the graph returns nothing.
    """

    graph_module: fx.GraphModule
    hyperparameters: list[StepSlot]
    holds: Callable[[Sequence[float]], bool]
    is_fused: bool = False


def trace_update(
    optimizer: Optimizer,
    names: dict[int, str],
    gradients: dict[str, torch.Tensor],
    mode: FakeTensorMode,
) -> Update:
    """Trace ``optimizer.step()`` of the optimizer's own class.

    Args:
        optimizer: Any ``torch.optim.Optimizer`` that steps without a closure.
        names: By identity, the name of every parameter.
        gradients: A gradient per name; parameters without one are left alone, as always.
        mode: What the gradients' graph was traced in.

    Raises:
        NewState: The update would make state that is not there yet.
        CaptureError: The update cannot be traced; says why, and what to do.
    """
    failure: Exception | None = None
    for capturable in (False, True) if _may_be_capturable(optimizer) else (False,):
        try:
            return _Tracing(optimizer, names, gradients, mode, capturable).run()
        except (CaptureError, NewState):
            raise
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise CaptureError(_untraceable(optimizer, failure)) from failure


def trace_fused_update(
    optimizer: Optimizer,
    names: dict[int, str],
    gradients: dict[str, torch.Tensor],
    mode: FakeTensorMode,
    *,
    context: StepContext,
    lr: torch.Tensor,
) -> Update | None:
    """Trace ``optimizer.step()`` by the optimizer's own fused kernels; None if it has none here.

    The graph writes parameters and state itself. Where ``context`` asks for it, it clips and checks
    the gradients before, by one kernel for all of them, and moves the loss scales after; it then
    returns the flag "found_inf", by which the update leaves everything as it is. Learning rates
    are tensors like ``lr``.

    Raises:
        NewState: The update would make state that is not there yet.
    """
    if not has_fused_kernel(optimizer):
        return None
    try:
        return _Tracing(
            optimizer, names, gradients, mode, False, context=context, lr=lr,
        ).run()  # fmt: skip
    except (CaptureError, NewState):
        raise
    except Exception as error:
        logger.debug("no fused update: %s", error)
        return None


def has_fused_kernel(optimizer: Optimizer) -> bool:
    """Whether torch.optim has a fused kernel for such an optimizer and its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_known = type(optimizer).__module__.startswith("torch.optim")
    has_kernel = is_known and all("fused" in group for group in optimizer.param_groups)
    is_plain = all(p.layout is torch.strided and not p.is_complex() for p in parameters)
    return has_kernel and is_plain


def _may_be_capturable(optimizer: Optimizer) -> bool:
    return any("capturable" in group for group in optimizer.param_groups)


class _Tracing:
    """One attempt to trace an update."""

    def __init__(
        self,
        optimizer: Optimizer,
        names: dict[int, str],
        gradients: dict[str, torch.Tensor],
        mode: FakeTensorMode,
        capturable: bool,
        *,
        context: StepContext | None = None,
        lr: torch.Tensor | None = None,
    ) -> None:
        self.optimizer, self.names, self.capturable = optimizer, names, capturable
        # Given with fused kernels alone: elsewhere, passes over the whole step clip and check.
        self.context, self.lr, self.fused = context, lr, context is not None
        self.checked = context is not None and context.check_finite
        self.scales = context.scales if context is not None and self.checked else ()
        self.mode = mode
        self.shapes = cast(ShapeEnv, mode.shape_env)
        self.parameters = {
            names[id(p)]: p for group in optimizer.param_groups for p in group["params"]
        }
        self.states = state_tensors(optimizer, names)
        self.hyper = hyperparameters(optimizer)
        self.gradients = gradients
        self.results: list[str] = []
        self.found: torch.Tensor | None = None

    def run(self) -> Update:
        with self.mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            numbers = [self._number(place, i) for i, place in enumerate(self.hyper)]
            with compiling(self.capturable), _symbolic_builtins(type(self.optimizer)):
                gm = make_fx(self._step, _allow_non_fake_inputs=True)(*self._inputs(numbers))
            if not self.fused:
                # A second time: composite operators are not all opened where writes are taken out.
                traced: Any = torch.func.functionalize(gm, remove="mutations")
                gm = make_fx(traced, _allow_non_fake_inputs=True)(*self._inputs(numbers))
        self._refuse_own_tensors(gm)
        self._label(gm, numbers)
        return Update(gm, [place.slot for place in self.hyper], self._guards(numbers), self.fused)

    def _inputs(self, numbers: list[Any]) -> list[Any]:
        tensors = (
            *self.parameters.values(),
            *self.gradients.values(),
            *(place.value for _, _, place in self.states),
        )
        scales = [slot.read() for _, slots in self.scales for slot in slots if slot.read]
        return [*map(fresh, tensors), *numbers, *map(fresh, scales)]

    def _number(self, place: Place, index: int) -> Any:
        """A number that the graph takes as an input."""
        if isinstance(place.value, torch.Tensor):
            return fresh(place.value)
        if self.lr is not None and _is_learning_rate(place.slot):
            return torch.empty_like(self.lr)
        source = ConstantSource(f"hyperparameter_{index}")
        symbol = self.shapes.create_unspecified_symbol(
            place.value, source=source, dynamic_dim=DimDynamic.DYNAMIC
        )
        return self.shapes.create_symfloatnode(symbol, hint=place.value, source=source)

    def _step(self, *values: Any) -> Any:
        """One step of a copy of the optimizer that holds what is traced."""
        given = iter(values)
        fakes = {name: next(given) for name in self.parameters}
        gradients = [next(given) for _ in self.gradients]
        states = [next(given) for _ in self.states]
        numbers = [next(given) for _ in self.hyper]
        scales = [*given]
        for name, gradient in zip(self.gradients, gradients, strict=True):
            fakes[name].grad = gradient
        shadow = self._shadow(fakes, states, numbers)
        before = _plain_values(shadow)
        found = self._check(gradients)
        if self.checked:
            shadow.grad_scale, shadow.found_inf = None, found
        step = type(self.optimizer).step
        with torch.no_grad():
            getattr(step, "__wrapped__", step)(shadow)
            _tag("update")
            self._move_scales(found, scales)
        self._refuse_changed_numbers(before, _plain_values(shadow))
        new = {n: fakes[n] for n in self.gradients}
        for (parameter, key, place), old in zip(self.states, states, strict=True):
            name = self.names[id(parameter)]
            kept = shadow.state[fakes[name]].get(key)
            if kept is not old and isinstance(kept, torch.Tensor):
                old.copy_(kept)
            new[place.slot.name] = old
        if self.fused:
            new = {} if self.found is None else {"found_inf": self.found}
        self.results = list(new)
        return list(new.values())

    def _check(self, gradients: list[torch.Tensor]) -> torch.Tensor | None:
        """Clip and check, as :func:`mpgraph.guard` does."""
        if self.context is None or not (self.checked or self.context.max_grad_norm):
            return None
        with torch.no_grad():
            found = find_non_finite(gradients, self.context.max_grad_norm)
        _tag("check")
        return found if self.checked else None

    def _move_scales(self, found: torch.Tensor | None, scales: list[torch.Tensor]) -> None:
        for index, (move, _) in enumerate(self.scales):
            tensors = scales[3 * index : 3 * index + 3]
            for tensor, moved in zip(tensors, move(found, *tensors), strict=True):
                tensor.copy_(moved)
        _tag("scale")
        self.found = found

    def _shadow(self, fakes: dict[str, Any], states: Any, numbers: Any) -> Any:
        shadow: Any = object.__new__(type(self.optimizer))
        vars(shadow).update(vars(self.optimizer))
        of_group = iter(numbers)
        shadow.param_groups = [
            self._shadow_group(group, fakes, of_group) for group in self.optimizer.param_groups
        ]
        shadow.state = collections.defaultdict(dict)
        for name, parameter in self.parameters.items():
            shadow.state[fakes[name]] = _State(self.optimizer.state.get(parameter, {}), name)
        for (parameter, key, _), fake in zip(self.states, states, strict=True):
            dict.__setitem__(shadow.state[fakes[self.names[id(parameter)]]], key, fake)
        return shadow

    def _shadow_group(
        self, group: dict[str, Any], fakes: dict[str, Any], numbers: Iterator[Any]
    ) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for key, value in group.items():
            if key == "params":
                new[key] = [fakes[self.names[id(p)]] for p in value]
            elif isinstance(value, (tuple, list)):
                items = [next(numbers) if is_hyperparameter(v) else v for v in value]
                new[key] = type(value)(items)
            else:
                new[key] = next(numbers) if is_hyperparameter(value) else value
        flags = {"foreach": False, "fused": self.fused, "capturable": self.capturable}
        return {**new, **{key: flag for key, flag in flags.items() if key in new}}

    def _refuse_changed_numbers(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        for name, value in after.items():
            if name not in before or (value is not before[name] and value != before[name]):
                raise CaptureError(
                    f"{type(self.optimizer).__name__} keeps {name} as a Python number and changes "
                    "it at every step: in a graph it would never change. Keep it as a tensor "
                    "(state['step'] = torch.tensor(0.0), then step += 1), as torch.optim does, "
                    "or train with mpgraph.convert and mpgraph.guard."
                )

    def _refuse_own_tensors(self, gm: fx.GraphModule) -> None:
        own = {id(p) for p in self.parameters.values()}
        own |= {id(place.value) for _, _, place in self.states}
        for node in gm.graph.find_nodes(op="get_attr"):
            if id(getattr(gm, str(node.target), None)) in own:
                raise CaptureError(
                    f"{type(self.optimizer).__name__} reaches its parameters or its state by "
                    "another way than self.param_groups and self.state, so its update cannot be "
                    "traced. Train with mpgraph.convert and mpgraph.guard."
                )

    def _label(self, gm: fx.GraphModule, numbers: list[Any]) -> None:
        """Say what the inputs stand for and what the results are."""
        places = [
            *(StepSlot("parameter", n, _constant(p)) for n, p in self.parameters.items()),
            *(StepSlot("gradient", name) for name in self.gradients),
            *(place.slot for _, _, place in self.states),
            *(place.slot for place in self.hyper),
            *(slot for _, slots in self.scales for slot in slots),
        ]
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        for node, slot in zip(placeholders, places, strict=True):
            if self.lr is not None and _is_learning_rate(slot):
                slot = dataclasses.replace(slot, like=self.lr)
            node.meta["slot"] = slot
            node.name = place_name(slot)
        by_slot = dict(zip((place.slot.name for place in self.hyper), numbers, strict=True))
        for node in placeholders:
            if node.meta["slot"].kind == "hyperparameter":
                node.meta["val"] = by_slot[node.meta["slot"].name]
        output = gm.graph.output_node()
        returned = cast(Sequence[fx.Node], output.args[0])
        output.args = (dict(zip(self.results, returned, strict=True)),)
        for node in [] if self.fused else [*gm.graph.nodes]:
            if node.target is torch.ops.aten.copy_.default and not node.users:
                gm.graph.erase_node(node)
        gm.recompile()

    def _guards(self, numbers: list[Any]) -> Callable[[Sequence[float]], bool]:
        symbols = [n.node._expr if isinstance(n, torch.SymFloat) else None for n in numbers]
        # What torch took for a constant, as arguments of operators on lists, holds for one value.
        fixed = [
            place.value if isinstance(n, torch.SymFloat) and n.node.expr.is_number else None
            for n, place in zip(numbers, self.hyper, strict=True)
        ]
        known = {symbol for symbol in symbols if symbol is not None}
        guards = [g.expr for g in self.shapes.guards if g.expr.free_symbols <= known]

        last: dict[Any, float] = {}

        def holds(values: Sequence[float]) -> bool:
            now = {s: v for s, v in zip(symbols, values, strict=True) if s is not None}
            if any(f is not None and f != v for f, v in zip(fixed, values, strict=True)):
                return False
            # sympy is slow, and at most a learning rate changes from step to step.
            changed = {s for s, v in now.items() if last.get(s) != v}
            asked = [guard for guard in guards if not changed.isdisjoint(guard.free_symbols)]
            last.clear()
            if not all(bool(guard.subs(now)) for guard in asked):
                return False
            last.update(now)
            return True

        return holds


def _tag(part: str) -> None:
    """What was traced since the last part is this one."""
    mode: Any = get_proxy_mode()
    mark(mode.tracer.graph, part)


def _is_learning_rate(slot: StepSlot) -> bool:
    return slot.name.startswith("lr of ")


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


class _State(dict[str, Any]):
    """The state of one parameter; new entries are a finding."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        super().__init__(values)
        self.name = name

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(self.get(key), torch.Tensor):
            raise NewState(f"{key} of {self.name}")
        super().__setitem__(key, value)


def _plain_values(shadow: Any) -> dict[str, Any]:
    """The Python numbers in state and groups, by a name for people."""
    found: dict[str, Any] = {}
    for parameter_state in shadow.state.values():
        for key, value in parameter_state.items():
            if isinstance(value, (int, float)):
                found.setdefault(f"state[{key!r}] of {getattr(parameter_state, 'name', '')}", value)
    for group in shadow.param_groups:
        for key, value in group.items():
            if isinstance(value, int):
                found[f"param_groups[...][{key!r}]"] = value
    return found


@contextlib.contextmanager
def _symbolic_builtins(kind: type) -> Iterator[None]:
    """``max`` and ``min`` in the optimizer's module choose in the graph, not while it is traced."""
    module = inspect.unwrap(cast(Any, kind).step).__globals__
    names = {"max": torch.sym_max, "min": torch.sym_min}
    before = {name: module[name] for name in names if name in module}
    for name, choose in names.items():
        module[name] = _choosing(getattr(builtins, name), choose)
    try:
        yield
    finally:
        for name in names:
            del module[name]
        module.update(before)


def _choosing(plain: Callable[..., Any], choose: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def chosen(*values: Any, **options: Any) -> Any:
        is_symbolic = any(isinstance(v, (torch.SymFloat, torch.SymInt)) for v in values)
        if len(values) == 2 and is_symbolic and not options:
            return choose(*values)
        return plain(*values, **options)

    return chosen


def _untraceable(optimizer: Optimizer, error: Exception) -> str:
    name = type(optimizer).__name__
    line = line_of_error(error)
    where = f" ({line})" if line else ""
    needs_value = isinstance(error, (GuardOnDataDependentSymNode, DataDependentOutputException))
    reason = (
        "its step looks at the value of a tensor (.item() or an if)"
        if needs_value
        else f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    )
    return (
        f"the update of {name} cannot be traced: {reason}{where}. Train with mpgraph.convert and "
        "mpgraph.guard, which take any optimizer."
    )
