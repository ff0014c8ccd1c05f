"""A final linear layer and its cross-entropy in chunks: the same numbers, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph import CaptureError, PrecisionError
from mpgraph.step.assemble import assemble
from mpgraph.step.joint import gradients_of
from tests.peak import peak_bytes

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], Any]


class Model(nn.Module):
    """Scores of 50 classes for every token."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids).tanh())


def mean(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), target.flatten())


def summed(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), target.flatten(), reduction="sum")


def with_more(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    penalty = sum(p.square().sum() for p in model.parameters())
    return 0.5 * mean(model, ids, target) + 1e-3 * penalty


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (4, 9))
    target = torch.randint(0, 50, (4, 9))
    target[0, :3] = -100
    return ids, target


def gradients(model: nn.Module, loss: Loss, precision: str, rows: int | None) -> list[Any]:
    """The loss, and 1.5 times the gradients: the momentum of two steps at rate 0."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    step = mpgraph.TrainStep(
        model, optimizer, loss, precision=precision, compile=False, chunk_loss_head=rows,
        scale=2.0**8 if precision == "fp16" else None,
    )  # fmt: skip
    step(*batch_of_test)
    found = step(*batch_of_test)
    return [found, *(optimizer.state[p]["momentum_buffer"] for p in model.parameters())]


batch_of_test = batch()
# A gradient is added up in another order, in float32. On a CPU the product of each chunk is rounded
# to 16 bit before that.
ROUNDING = {"fp32": 1e-6, "bf16": 2**-8, "fp16": 2**-11}


@pytest.mark.parametrize("loss", [mean, summed, with_more])
@pytest.mark.parametrize("precision", list(ROUNDING))
@pytest.mark.parametrize(("bias", "rows"), [(False, 10), (True, 10), (True, 36), (True, 100)])
def test_the_loss_and_every_gradient_stay(
    loss: Loss, precision: str, bias: bool, rows: int
) -> None:
    model = Model(bias)
    whole = gradients(model, loss, precision, None)
    for found, expected in zip(gradients(model, loss, precision, rows), whole, strict=True):
        bound = ROUNDING[precision] * -(-36 // rows) * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_scores_of_all_rows_are_never_held() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4096, bias=False))
    ids = torch.randint(0, 10, (1, 1024))
    peaks = []
    for rows in (None, 64):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = mpgraph.TrainStep(
            model, optimizer, mean, precision="fp32", compile=False, chunk_loss_head=rows
        )
        step(ids, ids)
        peaks.append(peak_bytes(lambda step=step: step(ids, ids)))
    scores = 1024 * 4096 * 4
    assert peaks[0] > 2 * scores
    assert peaks[1] < 0.5 * scores


def test_micro_batches_add_up_as_before() -> None:
    results = []
    for rows in (None, 7):
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step = mpgraph.TrainStep(
            model, optimizer, mean, precision="fp16", compile=False, chunk_loss_head=rows,
            accumulation_steps=2,
        )  # fmt: skip
        for _ in range(4):
            step(*batch_of_test)
        results.append([p.detach() for p in model.parameters()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def scores_too(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> Any:
    scores = model(ids).flatten(0, 1)
    return F.cross_entropy(scores, target.flatten()), scores


def squared(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return mean(model, ids, target).square()


def smoothed(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), target.flatten(), label_smoothing=0.1)


def weighted(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), target.flatten(), weight=torch.ones(50))


def bounded(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(30 * torch.tanh(model(ids) / 30).flatten(0, 1), target.flatten())


def no_entropy(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return model(ids).square().mean()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (scores_too, "the scores are also read by"),
        (squared, "the gradient of the loss depends on the loss"),
        (smoothed, "the scores are also read by"),
        (weighted, "the cross-entropy has class weights"),
        (bounded, "not a linear layer's scores"),
        (no_entropy, "computes no cross-entropy"),
    ],
)
def test_what_cannot_be_done_in_chunks_is_refused(loss: Loss, reason: str) -> None:
    with pytest.raises(CaptureError, match=f"(?s)chunk_loss_head.*{reason}.*leave"):
        gradients(Model(), loss, "bf16", 8)


@pytest.mark.parametrize("rows", [0, -1, 1.5, True])
def test_the_number_of_rows_is_a_number_of_rows(rows: Any) -> None:
    with pytest.raises(PrecisionError, match="chunk_loss_head must be a number of rows"):
        gradients(Model(), mean, "bf16", rows)


def test_gradients_lie_in_memory_as_their_parameters_do() -> None:
    """Fused optimizers on a GPU read them side by side."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(
        model, optimizer, mean, precision="bf16", compile=False, chunk_loss_head=9
    )
    step(*batch_of_test)
    graph = next(iter(step._captures.gradients.values())).graph_module
    context = step._captures.context(next(iter(step._captures.gradients.values())), True)
    gm, _ = assemble(graph, None, context, checked=False)
    found = gradients_of(gm.graph)
    layouts = {name: p.stride() for name, p in model.named_parameters()}
    assert {name: node.meta["val"].stride() for name, node in found.items()} == layouts
    assert not [n for n in gm.graph.nodes if "copy_" in str(n.target) and n.name.startswith("copy")]
