"""TrainStep while model and optimizer change between its calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mpgraph import PrecisionError
from mpgraph.module import state_of
from tests.twins import Twins, batch


def replace_parameter(twins: Twins) -> None:
    weight = torch.randn(8, 6)
    for model in twins.models:
        model.first.weight = nn.Parameter(weight.clone())


def add_group(twins: Twins) -> None:
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
        torch.manual_seed(7)
        model.last = nn.Linear(8, 3)
        optimizer.add_param_group({"params": [*model.last.parameters()]})


def remove_parameter(twins: Twins) -> None:
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["params"].pop()


def set_group(key: str, value: Any) -> Callable[[Twins], None]:
    def change(twins: Twins) -> None:
        for optimizer in twins.optimizers:
            optimizer.param_groups[0][key] = copy.deepcopy(value)

    return change


def evaluate(twins: Twins) -> None:
    for model in twins.models:
        model.eval()


def freeze(twins: Twins) -> None:
    for model in twins.models:
        model.first.weight.requires_grad_(False)


def load(twins: Twins) -> None:
    state = {name: value * 2 for name, value in twins.loop.state_dict().items()}
    moments = copy.deepcopy(twins.optimizers[1].state_dict())
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
        model.load_state_dict(state)
        optimizer.load_state_dict(copy.deepcopy(moments))


def hook_gradient(twins: Twins) -> None:
    for model in twins.models:
        model.first.weight.register_hook(lambda g: g * 2)


def hook_model(twins: Twins) -> None:
    for model in twins.models:
        model.register_forward_hook(lambda module, args, out: out * 2)


def spoil_state(twins: Twins) -> None:
    twins.equal_nan = True
    for optimizer in twins.optimizers:
        optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"][0, 0] = float("nan")


@pytest.mark.parametrize(
    "change",
    [
        replace_parameter, add_group, remove_parameter, evaluate, freeze, load, hook_gradient,
        hook_model, spoil_state, set_group("lr", torch.tensor(3e-2)), set_group("lr", 1),
        set_group("weight_decay", 0.0), set_group("betas", (0.5, 0.9)), set_group("maximize", True),
    ],
)  # fmt: skip
def test_what_changes_between_steps_is_seen(change: Callable[[Twins], None]) -> None:
    twins = Twins()
    twins.agree()
    change(twins)
    twins.agree()


def test_the_loss_scale_goes_on_where_it_is_when_a_group_is_added() -> None:
    """Its first step is one that the optimizer takes itself, as that of the others was."""
    twins = Twins(precision="fp16")
    twins.agree(3)
    add_group(twins)
    twins.agree(2)
    ours, theirs = (state_of(model).scale.value for model in twins.models)
    assert ours.growth_tracker == theirs.growth_tracker == 5
    assert ours.scale == theirs.scale


def test_a_frozen_parameter_is_trained_once_it_is_free() -> None:
    twins = Twins()
    freeze(twins)
    twins.agree()
    for model in twins.models:
        model.first.weight.requires_grad_(True)
    twins.agree()


def test_a_tensor_learning_rate_is_read_at_every_step() -> None:
    twins = Twins()
    set_group("lr", torch.tensor(3e-2))(twins)
    twins.agree(3)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["lr"].fill_(1e-3)
    twins.agree()
    set_group("lr", 1e-2)(twins)
    twins.agree()


def test_a_model_that_was_made_half_is_refused() -> None:
    twins = Twins()
    twins.agree()
    twins.step.model.half()
    with pytest.raises(PrecisionError, match=r"'first\.weight' is now fp16"):
        twins.step(*batch(0))


def test_an_optimizer_that_has_lost_the_model_is_refused() -> None:
    twins = Twins()
    twins.agree()
    state = copy.deepcopy(twins.step.model.state_dict())
    twins.step.model.load_state_dict(state, assign=True)
    with pytest.raises(PrecisionError, match="holds none of the parameters of Net"):
        twins.step(*batch(0))
