"""TrainStep on batches of many kinds."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from tests.twins import Twins, batch, loss_fn


def by_kind(model: nn.Module, given: Any, flag: Any = None, name: str = "x") -> torch.Tensor:
    loss = loss_fn(model, given["x"], given["y"]) * (flag or 1)
    return loss * 2 if name == "y" else loss


def test_batches_of_many_kinds() -> None:
    kinds = [(None, "x"), (2, "x"), (3, "x"), (0.5, "y"), (True, "x"), (None, "x")]

    def given(index: int) -> tuple[Any, ...]:
        x, y = batch(index)
        flag, name = kinds[index % len(kinds)]
        return {"x": x if index % 2 else x.t().contiguous().t(), "y": y}, flag, name

    Twins(by_kind).agree(12, given)


def test_an_empty_batch() -> None:
    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return F.cross_entropy(model(x).float(), y, reduction="sum")

    twins = Twins(loss)
    twins.agree()
    twins.agree(2, lambda _: (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)))


def test_a_batch_that_fails_leaves_the_step_as_it_was() -> None:
    twins = Twins()
    twins.agree()
    with pytest.raises(IndexError, match="Target 99 is out of bounds"):
        twins.step(batch(0)[0], torch.full((5,), 99))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        twins.step(torch.randn(5, 7), batch(0)[1])
    twins.agree()


def test_many_kinds_of_batch_are_said() -> None:
    torch.manual_seed(0)
    model = mpgraph.convert(nn.Linear(4, 2), "bf16", max_graphs=4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, sgd, lambda m, x, w: m(x).float().mean() * w, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weight in (1.0, 2.0):
            step(torch.ones(2, 4), weight)
    with pytest.warns(UserWarning, match="has been captured 2 times"):
        step(torch.ones(2, 4), 3.0)
