"""A graph no longer holds when the user changes what forward reads in Python."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph.module import state_of


class Switched(nn.Module):
    """Reads Python state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.phase = 0
        self.skip: list[int] = []
        self.config = types.SimpleNamespace(gain=1.0, inner=types.SimpleNamespace(negate=False))
        self.activation: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.drop(self.layer(x))) * self.config.gain
        if self.phase == 1:
            y = y + 1
        if 0 in self.skip:
            y = x
        if getattr(self, "late", False):
            y = y * 3
        return -y if self.config.inner.negate else y


def set_phase(model: Any) -> None:
    model.phase = 1


def set_dropout(model: Any) -> None:
    model.drop.p = 0.1


def set_list(model: Any) -> None:
    model.skip.append(0)


def set_config(model: Any) -> None:
    model.config.gain = 2.0


def set_inner_config(model: Any) -> None:
    model.config.inner.negate = True


def set_new_attribute(model: Any) -> None:
    model.late = True


def set_function(model: Any) -> None:
    model.activation = torch.tanh


def set_hook(model: Any) -> None:
    model.layer.register_forward_hook(lambda module, args, output: output * 5)


def set_forward(model: Any) -> None:
    layer = model.layer
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) + 7


CHANGES = [
    set_phase, set_dropout, set_list, set_config, set_inner_config, set_new_attribute,
    set_function, set_hook, set_forward,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_python_state_is_seen_by_the_next_call(change: Callable[[Any], None]):
    model = Switched()
    converted = mpgraph.convert(copy.deepcopy(model), "bf16", policy="autocast-cpu")
    x = torch.randn(4, 8)
    for subject in (model, converted):
        subject(x)
        change(subject)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
    torch.manual_seed(1)
    assert torch.equal(converted(x), want)


def test_going_back_finds_the_earlier_graph():
    converted = mpgraph.convert(Switched(), "bf16")
    x = torch.randn(4, 8)
    for phase in (0, 1, 0, 1):
        converted.phase = phase
        converted(x)
    assert len(state_of(converted).specialisations()) == 2


def test_attributes_that_forward_never_changes_cost_one_graph():
    converted = mpgraph.convert(Switched(), "bf16")
    for size in (4, 5, 6):
        converted(torch.randn(size, 8))
    assert len(state_of(converted).specialisations()) == 1


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:mpgraph")
def test_a_counter_that_forward_keeps_does_not_make_a_graph_per_call():
    converted = mpgraph.convert(Counts(), "bf16", max_graphs=4)
    for _ in range(8):
        converted(torch.randn(2, 4))
    assert converted.calls == 8
    assert len(state_of(converted).specialisations()) == 1


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last * 2


def test_a_tensor_that_forward_leaves_on_a_module_does_not_make_another_graph():
    converted = mpgraph.convert(Keeps(), "bf16")
    for _ in range(3):
        out = converted(torch.randn(2, 4))
        assert torch.equal(converted.last * 2, out)
    assert len(state_of(converted).specialisations()) == 1
