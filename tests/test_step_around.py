"""What is around the call of a TrainStep, and gradients inside of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph import CaptureError
from tests.twins import Twins, batch, loss_fn


def test_no_grad_and_autocast_around_a_step_change_nothing() -> None:
    twins = Twins(precision="fp16")
    step = twins.step

    def inside(*given: Any) -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return step(*given)

    twins.step = inside  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"a torch\.autocast region around a TrainStep"):
        twins.agree(3)


def penalty_of_inputs(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    scores = model(x).float()
    (g,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return F.cross_entropy(scores, y) + (g.norm(dim=1) - 1).pow(2).mean()


def penalty_of_weights(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = loss_fn(model, x, y)
    gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
    return loss + sum(g.pow(2).sum() for g in gradients)  # type: ignore[return-value]


@pytest.mark.parametrize("loss", [penalty_of_inputs, penalty_of_weights])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_of_gradients(loss: Any, precision: str) -> None:
    twins = Twins(loss, precision)
    # In fp16 the first scale, 2**16, is out of range: the penalty is NaN, and the step skipped.
    twins.equal_nan = precision == "fp16"
    twins.agree(4)
    assert not twins.step.last_step_skipped


def test_a_model_that_was_compiled_in_place_is_captured_as_it_is():
    model = mpgraph.convert(nn.Linear(2, 2), "bf16")
    model.compile(backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, optimizer, lambda m, x: m(x).float().mean(), compile=False)
    assert step(torch.ones(1, 2)) > step(torch.ones(1, 2))


def test_inference_mode_around_a_step_is_refused() -> None:
    twins = Twins()
    with torch.inference_mode(), pytest.raises(CaptureError, match="inference_mode"):
        twins.step(*batch(0))


class LeavesUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b(torch.tanh(self.a(x)))
        return self.a(x)


def test_a_result_that_nobody_wants_is_left_out() -> None:
    """torch 2.11 lets go of autograd's node for it, and keeps the object of its custom Function."""
    model = LeavesUnused()
    plain = mpgraph.convert(copy.deepcopy(model), "fp16")

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model(x * 2)
        return model(x).float().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="fp16", compile=False)
    x = torch.randn(2, 4)
    assert step(x) == loss_fn(plain, x)
    assert not torch.equal(model.a.weight, plain.a.weight)
    assert torch.equal(model.b.weight, plain.b.weight)
