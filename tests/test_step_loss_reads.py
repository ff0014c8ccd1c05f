"""What a TrainStep's loss function reads may change between its calls."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph.step.reads import LossReads
from tests.twins import Net, Twins, batch, loss_fn

factor = 1.0


def by_global() -> tuple[Callable[..., Any], Callable[[], None]]:
    globals()["factor"] = 1.0

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * factor

    return loss, lambda: globals().update(factor=3.0)


def by_closure() -> tuple[Callable[..., Any], Callable[[], None]]:
    weight = 1.0

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * weight

    def change() -> None:
        nonlocal weight
        weight = 3.0

    return loss, change


def by_dict() -> tuple[Callable[..., Any], Callable[[], None]]:
    weights = {"main": [1.0]}

    def scaled(value: Any) -> Any:
        return value * weights["main"][0]

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return scaled(loss_fn(model, x, y))

    return loss, lambda: weights.update(main=[3.0])


def by_default() -> tuple[Callable[..., Any], Callable[[], None]]:
    def loss(model: nn.Module, x: Any, y: Any, weight: float = 1.0) -> Any:
        return loss_fn(model, x, y) * weight

    return loss, lambda: setattr(loss, "__defaults__", (3.0,))


def by_tensor() -> tuple[Callable[..., Any], Callable[[], None]]:
    weight = torch.tensor(1.0)

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * weight

    def change() -> None:
        nonlocal weight
        weight = torch.tensor(3.0)

    return loss, change


class Weighted:
    """A loss with a number of its own, in an object that has others."""

    def __init__(self) -> None:
        self.weight, self.calls = 1.0, 0

    def __call__(self, model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * self.weight

    def method(self, model: nn.Module, x: Any, y: Any) -> Any:
        return self(model, x, y)

    def change(self) -> None:
        self.weight = 3.0


def by_object() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Weighted()
    return made, made.change


def by_method() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Weighted()
    return made.method, made.change


def by_partial() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Weighted()
    return functools.partial(_weighted, made), made.change


def _weighted(made: Weighted, model: nn.Module, x: Any, y: Any) -> Any:
    return loss_fn(model, x, y) * made.weight


class Smoothed(nn.Module):
    """A loss that is a module, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.entropy = nn.Dropout(0.5), nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, model: nn.Module, x: Any, y: Any) -> Any:
        """The loss."""
        return self.entropy(self.drop(model(x).float()), y)


def by_mode() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Smoothed()
    return made, lambda: made.train(False) and None


def by_part() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Smoothed()
    return made, lambda: setattr(made.entropy, "label_smoothing", 0.5)


def by_converted_teacher() -> tuple[Callable[..., Any], Callable[[], None]]:
    teacher: Any = mpgraph.convert(Net(), "bf16", policy="autocast-cpu")

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return F.mse_loss(model(x).float(), teacher(x).float().detach())

    return loss, lambda: teacher.train(False) and None


def by_teacher() -> tuple[Callable[..., Any], Callable[[], None]]:
    teacher = Net()  # with the names of the model's own parameters

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return F.mse_loss(model(x).float(), teacher(x).detach())

    return loss, lambda: teacher.train(False) and None


def _by_number(take: Callable[[torch.Tensor], Any]) -> Any:
    weights = {"main": torch.tensor(1.0)}

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * take(weights["main"])

    return loss, lambda: weights["main"].data.fill_(3.0)


def by_item() -> tuple[Callable[..., Any], Callable[[], None]]:
    return _by_number(torch.Tensor.item)


def by_float() -> tuple[Callable[..., Any], Callable[[], None]]:
    return _by_number(float)


def by_int() -> tuple[Callable[..., Any], Callable[[], None]]:
    return _by_number(int)


@pytest.mark.parametrize(
    "make",
    [
        by_global, by_closure, by_dict, by_default, by_tensor, by_object, by_method, by_partial,
        by_mode, by_part, by_teacher, by_converted_teacher, by_item, by_float, by_int,
    ],
)  # fmt: skip
def test_what_a_loss_function_reads_may_change(make: Any) -> None:
    torch.manual_seed(3)
    loss, change = make()
    twins = Twins(loss)
    twins.agree()
    change()
    twins.agree()


def test_what_a_loss_function_does_not_read_may_change_without_a_capture() -> None:
    made = Weighted()
    twins = Twins(made.method)
    twins.agree()
    captured = len(twins.step._captures.gradients)
    for _ in range(2):
        made.calls += 1
        twins.agree(1)
    assert len(twins.step._captures.gradients) == captured


def test_a_number_taken_out_of_a_tensor_captures_once_for_each_value() -> None:
    weight = torch.tensor(1.0, dtype=torch.bfloat16)
    twins = Twins(lambda model, x, y: loss_fn(model, x, y) * weight.item())
    twins.agree(3)
    assert len(twins.step._captures.gradients) == 1
    for value in (2.0, float("nan"), 1.0, 2.0, float("nan")):
        weight.fill_(value)
        twins.step(*batch(0))
    assert len(twins.step._captures.gradients) == 3


def test_functions_of_libraries_are_not_looked_into() -> None:
    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, torch.from_numpy(np.stack(list(map(copy.deepcopy, x)))), y)

    reads = LossReads(loss, nn.Linear(1, 1))
    assert {function.__name__ for function in reads._functions} == {"loss", "loss_fn"}
