"""blame finds an overflow wherever one is planted, and what it suggests cures it."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpgraph
from mpgraph import pipeline

LARGE = 1e7


class Plant(nn.Module):
    """Passes a value on; where something is planted, its value or its gradient becomes large."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "forward":
            return x * LARGE
        if self.kind == "backward":
            return (x * 2.0**-14) * 2.0**14
        return x


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scores, self.heads, self.out = Plant(), Plant(), Plant()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = self.scores(q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return self.out(self.proj(self.heads(scores.softmax(-1) @ v)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.normed, self.hidden, self.out, self.stream = Plant(), Plant(), Plant(), Plant()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.normed(self.norm1(x)))
        hidden = F.gelu(self.hidden(self.fc1(self.norm2(x))))
        return self.stream(x + self.out(self.fc2(hidden)))


class Transformer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.into = nn.Embedding(11, width), nn.Linear(width, width)
        self.start, self.logits, self.loss = Plant(), Plant(), Plant()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.start(self.into(self.embed(ids)))
        for block in self.blocks:
            x = block(x)
        logits = self.logits(self.head(self.norm(x)))
        return self.loss(F.cross_entropy(logits.flatten(0, 1), target.flatten()))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.first, self.normed, self.second, self.sum = Plant(), Plant(), Plant(), Plant()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.normed(self.bn1(self.first(self.conv1(x)))))
        return F.relu(self.sum(x + self.bn2(self.second(self.conv2(h)))))


class ResNet(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.stem = nn.Conv2d(3, width, 3, padding=1), Plant()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(2))
        self.fc, self.logits = nn.Linear(width, 5), Plant()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.stem(self.conv(x))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.logits(self.fc(x.mean((2, 3)))), target)


FORWARD = [
    (Transformer, "start"),
    (Transformer, "blocks.0.normed"),
    (Transformer, "blocks.0.attention.scores"),
    (Transformer, "blocks.0.attention.heads"),
    (Transformer, "blocks.1.attention.out"),
    (Transformer, "blocks.0.hidden"),
    (Transformer, "blocks.1.hidden"),
    (Transformer, "blocks.0.out"),
    (Transformer, "blocks.1.stream"),
    (Transformer, "logits"),
    (ResNet, "stem"),
    (ResNet, "blocks.0.first"),
    (ResNet, "blocks.0.normed"),
    (ResNet, "blocks.1.second"),
    (ResNet, "blocks.0.sum"),
    (ResNet, "logits"),
]
BACKWARD = [
    (Transformer, "start"),
    (Transformer, "blocks.0.attention.scores"),
    (Transformer, "blocks.1.attention.heads"),
    (Transformer, "blocks.0.attention.out"),
    (Transformer, "blocks.1.hidden"),
    (Transformer, "blocks.0.out"),
    (Transformer, "logits"),
    (ResNet, "stem"),
    (ResNet, "blocks.0.first"),
    (ResNet, "blocks.1.second"),
    (ResNet, "logits"),
]
PLACES = [("forward", *place) for place in FORWARD] + [("backward", *place) for place in BACKWARD]
# Each takes seconds, most of them torch.export's: a few always, all of them in the slow tests.
CASES = [pytest.param(*p, marks=[pytest.mark.slow] * (i % 5 > 0)) for i, p in enumerate(PLACES)]


def batch(kind: Any) -> tuple[Tensor, Tensor]:
    if kind is Transformer:
        return torch.randint(0, 11, (2, 6)), torch.randint(0, 11, (2, 6))
    return torch.randn(3, 3, 6, 6), torch.randint(0, 5, (3,))


def planted(kind: Any, place: str, side: str) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    model.get_submodule(place).kind = side
    return model


def is_step_finite(model: nn.Module, inputs: Any, factor: float, **options: Any) -> bool:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    mpgraph.guard(optimizer, model, **options)
    optimizer.zero_grad()  # converted models share their parameters
    (model(*inputs) * factor).backward()
    optimizer.step()
    return not optimizer.last_step_skipped


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred captures, of models that other tests verify."""
    monkeypatch.setattr(pipeline, "checks", [])


@functools.cache
def scale_without(kind: Any, factor: float) -> float:
    """A scale with which the step is finite where nothing is planted."""
    torch.manual_seed(0)
    model = mpgraph.convert(kind(), "fp16")
    report = mpgraph.blame(model, *batch(kind), loss_fn=lambda loss: loss * factor)
    assert report.finding is None
    return report.suggested_scale


@pytest.mark.parametrize(("side", "kind", "place"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_planted_overflow_is_found_and_cured(side, kind, place):
    model, inputs = planted(kind, place, side), batch(kind)
    factor = 1e-3 if side == "forward" else 1.0
    scale = 2.0**14 if side == "forward" else scale_without(kind, factor)
    converted = mpgraph.convert(model, "fp16")
    assert not is_step_finite(converted, inputs, factor, scale=scale)
    mpgraph.guard(torch.optim.SGD(converted.parameters()), converted, scale=scale)

    found = mpgraph.blame(converted, *inputs, loss_fn=lambda loss: loss * factor).finding

    assert found.kind == side
    assert place in (found.module, found.source)
    assert found.tried
    assert found.largest * (1 if side == "forward" else scale) > 65504
    if found.scale is not None:
        cured, scale = mpgraph.convert(model, "fp16"), found.scale
    else:
        cured = mpgraph.convert(model, "fp16", policy=found.policy)
    assert is_step_finite(cured, inputs, factor, scale=scale)
