"""Batches of other sizes: compiled twice, then never again, and right where a size decides."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph.step.sizes import Sizes, varying
from mpgraph.step.trace_gradients import trace_gradients
from mpgraph.structure import flatten


class Tokens(nn.Module):
    """Scores for every token, after mixing them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + F.scaled_dot_product_attention(x, self.mix(x), x)
        return self.head(self.norm(x))


class Decides(Tokens):
    """Does something else for large batches."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scores = super().forward(ids)
        return scores * 3 if ids.shape[0] > 8 else scores


def loss_fn(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1).float(), target.flatten())


def batches(*shapes: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = [torch.randint(0, 16, (batch, length + 1)) for batch, length in shapes]
    return [(row[:, :-1], row[:, 1:]) for row in ids]


def train(model: nn.Module, data: Any, **options: Any) -> tuple[Any, list[float]]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="bf16", **options)
    return step, [step(*batch).item() for batch in data]


def test_from_the_third_size_on_nothing_is_compiled() -> None:
    model = Tokens()
    data = batches((3, 5), (3, 5), (4, 6), (7, 2), (2, 9), (3, 5))
    step, losses = train(model, data)
    assert len(step._captures.gradients) == len(step._captures.programs) == 2
    _, expected = train(model, data, compile=False)
    assert losses == pytest.approx(expected, rel=2e-3)


def test_a_size_that_decides_what_the_model_does_is_seen() -> None:
    model = Decides()
    data = batches((3, 5), (3, 5), (4, 5), (12, 5), (6, 5))
    step, losses = train(model, data)
    assert len(step._captures.gradients) == 3  # 3; symbolic up to 8; and 12
    _, expected = train(model, data, compile=False)
    assert losses == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_equal_sizes_of_the_first_batch_need_not_stay_equal() -> None:
    model = Tokens()
    data = batches((3, 3), (3, 3), (5, 5), (4, 7))
    _, losses = train(model, data)
    _, expected = train(model, data, compile=False)
    assert losses == pytest.approx(expected, rel=2e-3)


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.empty(shape) for shape in shapes]


def test_a_size_is_fixed_until_it_changes() -> None:
    sizes = Sizes(None)
    assert sizes.patterns("kind", tensors((4, 8), (4,))) == [(4, 8), (4,)]
    assert sizes.patterns("kind", tensors((6, 8), (6,))) == [(None, 8), (None,)]
    assert sizes.patterns("kind", tensors((4, 8), (4,))) == [(None, 8), (None,)]
    assert sizes.patterns("other", tensors((4, 8), (4,))) == [(4, 8), (4,)]
    assert varying((None, 8)) == {0}


def test_sizes_of_0_and_1_are_another_kind() -> None:
    sizes = Sizes(None)
    sizes.patterns("kind", tensors((4, 8)))
    sizes.patterns("kind", tensors((6, 8)))
    assert sizes.patterns("kind", tensors((1, 8))) == [(1, 8)]
    assert sizes.patterns("kind", tensors((5, 8))) == [(None, 8)]


class Padded(nn.Linear):
    """Pads what it is given, what it computes, and the targets."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scores = F.pad(F.dropout(super().forward(F.pad(x, (0, 1)))), (0, 1))
        return F.cross_entropy(scores.mT, F.pad(target, (0, 3), value=-100))


def test_sizes_stay_symbolic_where_something_is_padded() -> None:
    """And dropout draws the numbers that it draws elsewhere."""
    model = mpgraph.convert(Padded(4, 4), "fp32")
    leaves, spec = flatten(((torch.ones(3, 5, 3), torch.zeros(3, 2, dtype=torch.long)), {}))
    parameters = dict(model.named_parameters())
    free = [frozenset({0})] * 2
    traced = trace_gradients(model, nn.Module.__call__, parameters, leaves, spec, dynamic=free)
    graph = traced.graph_module.graph
    sizes = [
        n.meta["val"].shape[0]
        for n in graph.find_nodes(op="placeholder")
        if n.meta["slot"].kind == "input"
    ]
    assert all(isinstance(size, torch.SymInt) for size in sizes)
    assert not any("native_dropout" in str(node.target) for node in graph.nodes)


class Products(nn.Module):
    """Kinds of products whose kernels ask for the numbers of sizes, in one version or another."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.pairs = nn.MultiheadAttention(4, 2), nn.Bilinear(4, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
        x, _ = self.attention(x, x, x, attn_mask=last)
        return (self.pairs(x, x) @ x.mT).mean()


def test_sizes_stay_symbolic_in_products() -> None:
    model = mpgraph.convert(Products(), "fp32")
    leaves, spec = flatten(((torch.randn(5, 3, 4),), {}))
    parameters = dict(model.named_parameters())
    traced = trace_gradients(
        model, nn.Module.__call__, parameters, leaves, spec, dynamic=[frozenset({1})]
    )
    assert traced.sizes.hold([torch.empty(5, 7, 4)])


def test_what_is_compiled_for_all_sizes_is_found_again_with_its_guards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor keeps it on disk; the next process takes it from there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    asked = []
    for _ in range(2):
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = mpgraph.TrainStep(
            model, optimizer, lambda m, x: m(x).square().mean(), precision="fp32", dynamic=True
        )
        step(torch.ones(3, 5, 4))
        (traced,) = step._captures.gradients.values()
        asked.append({str(guard.expr) for guard in traced.mode.shape_env.guards})
    assert asked[0] == asked[1]
    assert any("s" in guard.replace("zf", "") for guard in asked[0])


@pytest.mark.parametrize(("dynamic", "expected"), [(False, (4, 8)), (True, (None, None))])
def test_all_or_nothing_can_be_asked_for(dynamic: bool, expected: Any) -> None:
    assert Sizes(dynamic).patterns("kind", tensors((4, 8))) == [expected]


def test_an_operator_that_refuses_symbols_fixes_the_sizes() -> None:
    """As the weighted binary cross-entropy of torch 2.11 does."""

    def refuses(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        torch._C._infer_size(ids.shape, target.shape)  # type: ignore[attr-defined]
        return loss_fn(model, ids, target)

    data, losses = batches((3, 5), (3, 5), (4, 6), (7, 2)), []
    for dynamic in (None, False):
        torch.manual_seed(0)
        model = Tokens()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = mpgraph.TrainStep(model, optimizer, refuses, precision="bf16", dynamic=dynamic)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses.append([step(*batch).item() for batch in data])
        told = [str(w.message) for w in said if "batches of every size" in str(w.message)]
        assert len(told) == (dynamic is None)
        assert all("test_step_sizes.py" in message for message in told)
    assert losses[0] == losses[1]
    step = mpgraph.TrainStep(model, optimizer, refuses, dynamic=True)
    with pytest.raises(mpgraph.CaptureError, match="dynamic=False"):
        step(*data[0])
