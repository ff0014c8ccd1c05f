"""Copies of a TrainStep, and two of them on one model."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import mpgraph
from mpgraph.module import state_of
from tests.twins import Net, Twins, assert_same, batch, loss_fn


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_copy_of_a_step_goes_on_by_itself(copied: Any, precision: str) -> None:
    twins = Twins(precision=precision)
    twins.agree(3)
    other = copied(twins.step)
    before = copy.deepcopy(twins.step.model.state_dict())
    torch.manual_seed(9)
    loss = other(*batch(9))
    for name, value in twins.step.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert_same(
        state_of(other.model).scale.value.scale, state_of(twins.step.model).scale.value.scale
    )
    torch.manual_seed(9)
    assert_same(loss, twins.step(*batch(9)))
    pairs = zip(other.model.parameters(), twins.step.model.parameters(), strict=True)
    assert all(torch.equal(p, q) and p is not q for p, q in pairs)


def test_two_steps_share_a_model() -> None:
    def negative(model: nn.Module, x: Any, y: Any) -> Any:
        return -loss_fn(model, x, y)

    torch.manual_seed(0)
    first = Net()
    models: Any = [mpgraph.convert(m, "fp16") for m in (first, copy.deepcopy(first))]
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False)
    optimizers = [(sgd(m.first.parameters()), sgd(m.last.parameters())) for m in models]
    losses = (loss_fn, negative)
    steps = [
        mpgraph.TrainStep(models[0], optimizer, loss, compile=False)
        for optimizer, loss in zip(optimizers[0], losses, strict=True)
    ]
    for optimizer in optimizers[1]:
        mpgraph.guard(optimizer, models[1])
    for index in range(5):
        torch.manual_seed(index)
        for step in steps:
            step(*batch(index))
        torch.manual_seed(index)
        for optimizer, loss in zip(optimizers[1], losses, strict=True):
            loss(models[1], *batch(index)).backward()
            optimizer.step()
            models[1].zero_grad()
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
