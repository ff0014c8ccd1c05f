"""Every optimizer that TrainStep traces, exported before its first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpgraph.errors import ExportError
from mpgraph.onnx.first_state import with_state

from .step_models import CASES
from .step_pairs import Pair, errors, in_torch_state

optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, foreach=False),
    "momentum, decay": lambda p: optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=False
    ),
    "adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=1e-5, foreach=False),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, foreach=False),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01, lr_decay=0.01, foreach=False),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0, foreach=False),
    "adamax": lambda p: optim.Adamax(p, lr=0.01, foreach=False),
    "nadam": lambda p: optim.NAdam(p, lr=0.01, foreach=False),
    "radam": lambda p: optim.RAdam(p, lr=0.01, foreach=False),
    "asgd": lambda p: optim.ASGD(p, lr=0.01, foreach=False),
    "rprop": lambda p: optim.Rprop(p, lr=0.01, foreach=False),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
}
QUICK = ("sgd", "momentum, decay", "adamw")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OPTIMIZERS],
)
def test_steps_from_a_fresh_optimizer_equal_torch(name: str, tmp_path: Path) -> None:
    """The first step, which makes the state in torch, and those after it."""
    case = CASES["mlp"]
    pair = Pair(case, "fp32", tmp_path, OPTIMIZERS[name])
    for _ in range(7):  # RAdam is another at its sixth step
        batch = case.batch(4)
        pair.step(*batch)
        pair.trainer.step(**pair.named(batch))
        expected = in_torch_state(pair)
        found = errors(pair.trainer.state_dict(), expected)
        # Adam's kind divides small gradients by themselves, centered RMSprop by a difference.
        assert max(found.values()) <= 1e-4, found
        pair.trainer._buffers.put({name: value.numpy() for name, value in expected.items()})


def test_an_update_in_bf16_is_that_of_torch_within_its_units(tmp_path: Path) -> None:
    """Muon's, of matrices: sums in another order move a rounding of what it adds now and then."""
    case = CASES["mlp"]

    def make(parameters: Any) -> optim.Optimizer:
        return optim.Muon([p for p in parameters if p.dim() == 2], lr=0.02)

    pair = Pair(case, "fp32", tmp_path, make)
    for _ in range(4):
        batch, before = case.batch(4), pair.trainer.state_dict()
        pair.step(*batch)
        pair.trainer.step(**pair.named(batch))
        found, expected = pair.trainer.state_dict(), in_torch_state(pair)
        for name, value in expected.items():
            moved = np.abs(value.numpy() - before[name]).max()
            limit = (
                2 * 2.0**-8 * moved if name.endswith("weight") else 1e-5 * float(value.abs().max())
            )
            assert np.abs(found[name] - value.numpy()).max() <= limit, name
        pair.trainer._buffers.put({name: value.numpy() for name, value in expected.items()})


def test_a_small_eps_and_a_small_decay_stay(tmp_path: Path) -> None:
    """torch.onnx's optimizer would delete both: an eps of 1e-12, a decay of 1e-7."""
    case = CASES["mlp"]

    def make(parameters: Any) -> optim.Optimizer:
        return optim.AdamW(parameters, lr=0.01, eps=1e-12, weight_decay=1e-5, foreach=False)

    pair = Pair(case, "fp32", tmp_path, make)
    x, y = case.batch(4)
    for group in (pair.step.optimizer.param_groups[0],):
        group["lr"] = 0.02
    pair.trainer.lr = 0.02
    x[:, 3] = 0.0  # a gradient of 0: eps alone is below the fraction
    pair.step(x, y)
    pair.trainer.step(**pair.named((x, y)))
    state, expected = pair.trainer.state_dict(), in_torch_state(pair)
    column = torch.from_numpy(state["0.weight"][:, 3])
    assert column.isfinite().all()
    torch.testing.assert_close(column, expected["0.weight"][:, 3], rtol=0, atol=0)


def test_momentum_starts_where_the_first_gradient_is_taken_whole() -> None:
    """SGD's first momentum is the gradient: from 0, an ordinary step gives the same."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
    state = with_state(optimizer).state[parameter]
    assert torch.equal(state["momentum_buffer"], torch.zeros(3))
    assert not optimizer.state


def test_a_first_step_unlike_others_is_refused() -> None:
    """With dampening, no momentum leads to SGD's first step."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([parameter], lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(ExportError, match="Take one step in torch"):
        with_state(optimizer)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(with_state(optimizer).state[parameter]["momentum_buffer"], torch.ones(3))
