"""What a TrainStep refuses: what would happen once, or get lost."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph import CaptureError
from tests.twins import Twins, batch, loss_fn

history: list[Any] = []


def draws_python(model: nn.Module, x: Any, y: Any) -> Any:
    return loss_fn(model, x, y) * random.random()


def draws_numpy(model: nn.Module, x: Any, y: Any) -> Any:
    return loss_fn(model, x, y) * float(np.random.rand())


def seeds(model: nn.Module, x: Any, y: Any) -> Any:
    torch.manual_seed(0)
    return loss_fn(model, x, y)


def appends(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    history.append(loss.detach())
    return loss


def prints(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    print(loss)
    return loss


def formats(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    f"{loss:.3f}"
    return loss


def goes_to_numpy(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    return loss * float(loss.detach().numpy())


def branches(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    return loss * 2 if loss > 1 else loss


def aligns(model: nn.Module, x: Any, y: Any) -> Any:
    scores = model(x).float().log_softmax(-1).unsqueeze(1)
    return F.ctc_loss(scores, y[:1].unsqueeze(0), torch.tensor([len(y)]), torch.tensor([1]))


def goes_backward(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    loss.backward(retain_graph=True)
    return loss


def checkpoints(model: nn.Module, x: Any, y: Any) -> Any:
    return F.cross_entropy(checkpoint(model, x, use_reentrant=False).float(), y)


REFUSED = (
    (draws_python, "it draws numbers from Python's random module"),
    (draws_numpy, r"it draws numbers from numpy\.random"),
    (seeds, "it seeds or sets torch's random numbers"),
    (appends, "it changes history"),
    (prints, "needs the value of a tensor at .*print"),
    (formats, 'needs the value of a tensor at .*f"'),
    (goes_to_numpy, "needs the value of a tensor at .*numpy"),
    (branches, "needs the value of a tensor at .*if loss > 1"),
    (aligns, r"the size of what aten\._ctc_loss.* returns at .*F\.ctc_loss"),
    (goes_backward, "a backward pass inside the loss function leaves no trace"),
    (checkpoints, "a checkpoint, whose memory a graph would not save"),
)


@pytest.mark.parametrize(("loss", "reason"), REFUSED)
def test_what_happens_once_and_not_at_every_step_is_refused(loss: Any, reason: str) -> None:
    twins = Twins(loss)
    history.clear()
    before = copy.deepcopy(twins.step.model.state_dict()), random.getstate()
    for _ in range(2):
        with pytest.raises(CaptureError, match=reason):
            twins.step(*batch(0))
    assert not history
    assert random.getstate() == before[1]
    assert all(p.grad is None for p in twins.step.model.parameters())
    for name, value in twins.step.model.state_dict().items():
        assert torch.equal(value, before[0][name])


@pytest.fixture
def handles_to_remove() -> Iterator[list[Any]]:
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["optimizer", "every optimizer", "parameter"])
def test_hooks_that_come_later_are_refused_too(kind: str, handles_to_remove: list[Any]) -> None:
    twins = Twins()
    twins.agree()
    register, reason = {
        "optimizer": (twins.optimizers[0].register_step_post_hook, "the optimizer has step hooks"),
        "every optimizer": (register_optimizer_step_post_hook, "on the steps of every optimizer"),
        "parameter": (
            twins.step.model.first.weight.register_post_accumulate_grad_hook,  # type: ignore[union-attr]
            r"first\.weight has a post-accumulate-grad hook",
        ),
    }[kind]
    handles_to_remove.append(register(lambda *_: None))
    with pytest.raises(CaptureError, match=reason):
        twins.step(*batch(0))


def test_gradients_that_would_get_lost_in_the_batch_are_refused() -> None:
    twins = Twins(lambda model, x, y, w: loss_fn(model, x, y) + w.pow(2).sum())
    weight: Any = twins.step.model.first.weight  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match=r"the batch holds parameter first\.weight"):
        twins.step(*batch(0), weight)
    with pytest.raises(CaptureError, match=r"computed from others .*\(MulBackward0\)"):
        twins.step(*batch(0), weight * 2)
    with pytest.warns(UserWarning, match=r"so its \.grad stays as it is"):
        twins.step(*batch(0), torch.ones(2, requires_grad=True))


def test_sparse_gradients_are_refused() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x)

    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    twins = Twins(model=Sparse, make=sgd)
    with pytest.raises(CaptureError, match=r"the gradient of table\.weight is sparse"):
        twins.step(torch.arange(5), batch(0)[1])


def test_a_number_in_what_the_loss_function_returns_is_refused():
    def loss_fn(model, x):
        loss = model(x).float().square().mean()
        return loss, loss.item()

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="bf16", compile=False)
    with pytest.raises(mpgraph.CaptureError, match="needs the value of a tensor"):
        step(torch.ones(1, 2))


def test_a_policy_for_a_model_that_has_one_is_refused():
    model = mpgraph.convert(nn.Linear(2, 2), "bf16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mpgraph.PolicyError, match="is converted already"):
        mpgraph.TrainStep(model, optimizer, lambda model, x: model(x).mean(), policy="lean")
