"""fp16 training equals torch.autocast with torch.amp.GradScaler, bit for bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph.module import state_of

HALF = torch.float16
inf, nan = float("inf"), float("nan")
Batch = tuple[Tensor, Tensor]


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh(),
            nn.Dropout(0.1), nn.Linear(32, 4),
        )  # fmt: skip


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 1, 2, 4)
        x = F.relu(self.norm(self.one(x)))
        x = F.relu(x + self.norm2(self.two(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Transformer(nn.Module):
    """Pre-norm blocks with an fp32 residual stream; attention by hand and fused."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(8, 16) * 0.1)
        self.embed = nn.Linear(1, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unsqueeze(-1)) + self.place
        for index in range(2):
            q, k, v = (
                t.unflatten(-1, (2, 8)).transpose(1, 2)
                for t in self.qkv[index](self.norms[2 * index](x)).chunk(3, -1)
            )
            if index:
                mixed = F.scaled_dot_product_attention(q, k, v)
            else:
                mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
            x = x + self.out[index](mixed.transpose(1, 2).flatten(2))
            x = x + self.down(F.gelu(self.up(self.norms[2 * index + 1](x))))
        return self.head(x.mean(1))


class Checkpointed(nn.Module):
    """A transformer whose blocks are recomputed: norms, softmax and their parameters in fp32."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.use_reentrant, self.checkpointed = use_reentrant, True
        self.embed, self.head = nn.Linear(1, 16), nn.Linear(16, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(16))

    def block(self, x: Tensor, index: int) -> Tensor:
        q, k, v = self.qkv[index](self.norms[2 * index](x)).chunk(3, -1)
        x = x + (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        return x + F.gelu(self.mlp[index](self.norms[2 * index + 1](x))) * self.gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unsqueeze(-1))
        for index in range(2):
            if self.checkpointed:
                x = checkpoint(self.block, x, index, use_reentrant=self.use_reentrant)
            else:
                x = self.block(x, index)
        return self.head(x.mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Perceptron,
    "conv_net": ConvNet,
    "transformer": Transformer,
}
CHECKPOINTED: dict[str, Callable[[], nn.Module]] = {
    "checkpointed": Checkpointed,
    "reentrant": functools.partial(Checkpointed, use_reentrant=True),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-single": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
}
RULE: dict[str, Any] = {"init_scale": 2.0**14, "growth_interval": 7}


def batches(count: int, spoiled: dict[int, float]) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for step in range(count):
        x = torch.randn(6, 8, generator=generator)
        target = x[:, :4].argmax(1)
        if step in spoiled:
            x[1, 2] = spoiled[step]
        made.append((x, target))
    return made


Record = list[Any]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [v.clone() for s in optimizer.state.values() for v in s.values() if v is not None]
    return [*(t.detach().clone() for t in (*model.parameters(), *model.buffers())), *state]


def train_amp(model, optimizer, data: Sequence[Batch], accumulate: int = 1) -> Record:
    scaler = torch.amp.GradScaler("cpu", **RULE)
    record: Record = []
    for step, (x, target) in enumerate(data):
        torch.manual_seed(step)
        with torch.autocast("cpu", HALF):
            loss = F.cross_entropy(model(x), target) / accumulate
        scaler.scale(loss).backward()
        record.append(loss.detach())
        if (step + 1) % accumulate == 0:
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            record.append((scaler.get_scale() < before, scaler.get_scale()))
            record.extend(snapshot(model, optimizer))
    return record


def train_mpgraph(model, optimizer, data: Sequence[Batch], accumulate: int = 1) -> Record:
    mpgraph.guard(optimizer, model, scale=mpgraph.LossScale(**RULE))
    record: Record = []
    for step, (x, target) in enumerate(data):
        torch.manual_seed(step)
        loss = F.cross_entropy(model(x), target) / accumulate
        loss.backward()
        record.append(loss.detach())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            scale = state_of(model).scale.value.scale.item()
            record.append((bool(optimizer.last_step_skipped), scale))
            record.extend(snapshot(model, optimizer))
    return record


def assert_same_training(
    model: str,
    optimizer: str,
    steps: int,
    spoiled: dict[int, float],
    accumulate: int = 1,
    capture: str = "auto",
) -> Record:
    torch.manual_seed(0)
    reference = {**MODELS, **CHECKPOINTED}[model]()
    converted = mpgraph.convert(
        copy.deepcopy(reference), "fp16", policy="autocast-cpu", capture=capture
    )
    data = batches(steps, spoiled)
    make = OPTIMIZERS[optimizer]
    want = train_amp(reference, make(reference.parameters()), data, accumulate)
    got = train_mpgraph(converted, make(converted.parameters()), data, accumulate)
    assert len(got) == len(want)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if isinstance(other, Tensor):
            torch.testing.assert_close(
                one, other, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=index: f"entry {i}: {m}"
            )
        else:
            assert one == other, f"entry {index}: skipped, scale = {one}, torch.amp {other}"
    return [entry for entry in got if isinstance(entry, tuple)]


SPOILED = {3: 1e5, 9: inf, 10: nan, 30: 1e5}


@pytest.mark.parametrize("optimizer", ["adamw-fused", "sgd-momentum"])
@pytest.mark.parametrize("model", MODELS)
def test_training_is_torch_amps(model, optimizer):
    decisions = assert_same_training(model, optimizer, 25, SPOILED)
    assert any(skipped for skipped, _ in decisions)
    assert not all(skipped for skipped, _ in decisions)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_skips_and_steps_as_under_torch_amp(optimizer):
    assert_same_training("mlp", optimizer, 12, SPOILED)


@pytest.mark.parametrize("optimizer", ["adamw-fused", "sgd-momentum"])
@pytest.mark.parametrize("model", CHECKPOINTED)
def test_checkpointed_blocks_train_as_under_torch_amp(model, optimizer):
    decisions = assert_same_training(model, optimizer, 12, SPOILED, capture="dynamo")
    assert any(skipped for skipped, _ in decisions)


def gradients(model: nn.Module, policy: str) -> list[Tensor]:
    converted = mpgraph.convert(model, "fp16", policy=policy, capture="dynamo")
    state_of(converted).scale.replace(mpgraph.LossScale(**RULE))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    converted(x).square().mean().backward()
    graphs = [gm for gm, _ in state_of(converted).specialisations()[0].graphs]
    kept = sum("mpgraph_checkpoint" in str(n.target) for gm in graphs for n in gm.graph.nodes)
    assert kept == (2 if model.checkpointed else 0)
    return [p.grad for p in converted.parameters()]


@pytest.mark.parametrize("policy", ["default", "autocast-cuda"])
@pytest.mark.parametrize("model", CHECKPOINTED)
def test_a_checkpoint_changes_no_gradient_of_what_is_in_it(model, policy):
    with_checkpoints = CHECKPOINTED[model]()
    without = copy.deepcopy(with_checkpoints)
    without.checkpointed = False
    for got, want in zip(
        gradients(with_checkpoints, policy), gradients(without, policy), strict=True
    ):
        assert want.isfinite().all()
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_four_micro_batches_are_torch_amps(model):
    decisions = assert_same_training(model, "adamw-foreach", 40, {14: inf}, accumulate=4)
    assert [skipped for skipped, _ in decisions].count(True) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_two_hundred_steps_are_torch_amps(model, optimizer):
    spoiled = {**SPOILED, 77: -1e5, 120: nan, 121: nan, 160: -inf}
    decisions = assert_same_training(model, optimizer, 200, spoiled)
    scales = {scale for _, scale in decisions}
    assert max(scales) > RULE["init_scale"] > min(scales)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_hundred_micro_batches_are_torch_amps(model):
    assert_same_training(model, "adamw-fused", 200, {14: inf, 90: 1e5, 91: nan}, accumulate=4)
