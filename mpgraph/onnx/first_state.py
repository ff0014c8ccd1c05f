"""The state that an optimizer has before its first step."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from mpgraph.errors import ExportError
from mpgraph.onnx.alike_update import LOOPS

State = dict[str, Any]


def with_state(optimizer: Optimizer) -> Optimizer:
    """An optimizer like this one, with the state that it would make; this one stays as it is.

    Optimizers make state in their first step, so a first step may be another one than those that
    follow: SGD takes its first gradient for its momentum. A state is only accepted if an ordinary
    step from it is the first step.

    Raises:
        ExportError: There is no such state.
    """
    new = [p for p in _parameters(optimizer) if p.requires_grad and not _is_made(optimizer, p)]
    like: Any = object.__new__(type(optimizer))
    vars(like).update(vars(optimizer))
    like.state = collections.defaultdict(dict, optimizer.state)
    like.state.update(_first_states(optimizer, new) if new else {})
    return like  # type: ignore[no-any-return]


def _first_states(optimizer: Optimizer, parameters: Sequence[Any]) -> dict[Any, State]:
    recorded = _recorded(optimizer, parameters)
    expected = _stepped(optimizer, parameters, {})
    for make in (lambda value: value, torch.zeros_like):
        states = {p: _copied(state, make) for p, state in recorded.items()}
        found = _stepped(optimizer, parameters, states)
        if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            return states
    raise ExportError(
        f"the first step of {type(optimizer).__name__}, which makes its state, is another one than "
        "those that follow, and no state leads from one to the other (SGD with dampening is an "
        "example). Take one step in torch, then export."
    )


def _recorded(optimizer: Optimizer, parameters: Sequence[Any]) -> dict[Any, State]:
    """What a step puts into the state, as it is when it is put there."""
    stand_ins = _stand_ins(parameters, torch.zeros_like)
    shadow = _shadow(optimizer, stand_ins, collections.defaultdict(_Recording))
    _step(shadow)
    return {
        p: getattr(shadow.state.get(s, {}), "first", {})
        for p, s in zip(parameters, stand_ins.values(), strict=True)
    }


def _stepped(
    optimizer: Optimizer, parameters: Sequence[Any], states: Mapping[Any, State]
) -> list[torch.Tensor]:
    """What a step from these states makes of the parameters, and of the state that it leaves.

    Of their first elements, where the optimizer treats every element alike.
    """
    part = _first if type(optimizer) in LOOPS else torch.clone
    generator = torch.Generator().manual_seed(0)

    def gradient(p: torch.Tensor) -> torch.Tensor:
        return torch.randn(p.shape, generator=generator).to(p.device, p.dtype)

    stand_ins = _stand_ins(parameters, gradient, part)
    given: dict[Any, State] = collections.defaultdict(dict)
    for p, stand_in in stand_ins.items():
        if states.get(p):
            given[stand_in] = _copied(states[p], part)
    shadow = _shadow(optimizer, stand_ins, given)
    _step(shadow)
    left = [shadow.state.get(s, {}) for s in stand_ins.values()]
    tensors = [v for state in left for _, v in sorted(state.items()) if isinstance(v, torch.Tensor)]
    return [*(s.detach() for s in stand_ins.values()), *tensors]


def _stand_ins(
    parameters: Sequence[Any],
    gradient: Callable[[torch.Tensor], torch.Tensor],
    part: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> dict[Any, torch.nn.Parameter]:
    found: dict[Any, torch.nn.Parameter] = {}
    for p in parameters:
        found[p] = torch.nn.Parameter(part(p.detach()))
        found[p].grad = gradient(found[p].detach())
    return found


def _first(value: torch.Tensor) -> torch.Tensor:
    """A copy of the first elements; a number stays one."""
    return value.flatten()[:64].clone() if value.dim() else value.clone()


def _shadow(optimizer: Optimizer, stand_ins: Mapping[Any, Any], state: Any) -> Any:
    shadow: Any = object.__new__(type(optimizer))
    vars(shadow).update(vars(optimizer))
    shadow.state, shadow.param_groups = state, []
    for group in optimizer.param_groups:
        new: dict[str, Any] = dict(group)
        new.update((k, False) for k in ("foreach", "fused", "capturable") if k in group)
        new["params"] = [stand_ins[p] for p in group["params"] if p in stand_ins]
        shadow.param_groups.append(new)
    return shadow


def _step(shadow: Any) -> None:
    step = inspect.unwrap(type(shadow).step)
    with torch.no_grad():
        step(shadow)


class _Recording(dict[str, Any]):
    """The state of one parameter, which keeps a copy of what is put into it first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: State = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = value.clone() if isinstance(value, torch.Tensor) else value
        super().__setitem__(key, value)


def _copied(state: State, make: Callable[[torch.Tensor], torch.Tensor]) -> State:
    return {k: make(v.clone()) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _parameters(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _is_made(optimizer: Optimizer, parameter: Any) -> bool:
    state = optimizer.state.get(parameter, {})
    return any(isinstance(value, torch.Tensor) for value in state.values())
