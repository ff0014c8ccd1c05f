"""What the compiled halves of a TrainStep do with memory, and for batches of other sizes."""

from __future__ import annotations

import types

import pytest
import torch
import torch._inductor.config
from torch import fx, nn

import mpgraph
from mpgraph.step import compiled, counters
from mpgraph.step.optimizer_places import equal_counters
from mpgraph.step.program import Launch, with_fused_update
from mpgraph.step.replay import _memory
from mpgraph.step.slots import StepSlot
from tests.peak import peak_bytes


def _exponential_step():
    model = nn.Linear(8, 1024)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    step = mpgraph.TrainStep(
        model, optimizer, lambda model, x: model(x).exp().square().mean(), precision="fp32"
    )
    x = torch.randn(1024, 8)
    for _ in range(2):
        step(x)
    return lambda: step(x)


def test_the_backward_half_writes_to_memory_that_was_kept_for_it(monkeypatch):
    kept = 1024 * 1024 * 4  # the exponential
    with torch._inductor.config.patch(force_disable_caches=True):
        assert peak_bytes(_exponential_step()) < 1.5 * kept
        monkeypatch.setattr(compiled, "_given_away", lambda *halves: [])
        assert peak_bytes(_exponential_step()) > 1.9 * kept


def test_a_replay_takes_batches_with_gaps_and_overlaps():
    for value in (torch.arange(24.0).view(4, 6)[:, 1:], torch.ones(3, 1).expand(3, 5)):
        memory = _memory(value).clone()
        place = memory.as_strided(value.shape, value.stride())
        memory.zero_()
        _memory(place).copy_(_memory(value))
        assert place.stride() == value.stride()
        assert torch.equal(place, value)


def test_counters_are_looked_at_once_and_not_at_every_step(monkeypatch):
    looks = []

    def look(*args):
        looks.append(1)
        return equal_counters(*args)

    monkeypatch.setattr(counters, "equal_counters", look)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.RAdam(model.parameters())
    step = mpgraph.TrainStep(model, optimizer, lambda model, x: model(x).mean(), precision="fp32")
    for _ in range(3):
        step(torch.ones(2, 4))
    seen = len(looks)
    for _ in range(3):
        step(torch.ones(2, 4))
    assert len(looks) == seen
    optimizer.state[model[0].weight]["step"].add_(1)  # somebody else's doing
    step(torch.ones(2, 4))
    assert len(looks) == seen + 1


@pytest.mark.parametrize("size", [1, 3])
def test_fused_kernels_get_gradients_laid_out_as_parameters_are(size):
    plain = torch.randn(6, 4, size, size)
    gradient = plain.to(memory_format=torch.channels_last)
    assert gradient.stride() != plain.stride()
    graph = fx.Graph()
    graph.placeholder("gradient").meta = {"slot": StepSlot("gradient", "w"), "val": plain}
    graph.output({})
    seen = []
    update = fx.GraphModule({}, graph)
    update.forward = lambda value: seen.append(value) or {}
    first = Launch(lambda: [gradient], [], ["w"])
    with_fused_update(first, types.SimpleNamespace(graph_module=update)).run()
    assert seen[0].stride() == plain.stride()
    assert torch.equal(seen[0], plain)
    # Another order of dimensions of size 1 is no other order in memory.
    assert (seen[0].data_ptr() == gradient.data_ptr()) is (size == 1)


class _Masked(nn.Module):
    """The mean of weights that dropout takes some of: their gradient is the mask."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64, 64))

    def forward(self, x):
        return (nn.functional.dropout(self.weight.exp().log(), 0.25) * x).sum()


def test_dropout_has_one_mask_in_forward_and_backward_and_another_at_every_step():
    torch.manual_seed(0)
    model = _Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = mpgraph.TrainStep(model, optimizer, lambda model, x: model(x), precision="fp32")
    masks = []
    for _ in range(3):
        before = model.weight.detach().clone()
        loss = step(torch.ones(()))
        gradient = before - model.weight.detach()
        torch.testing.assert_close(loss, (before * gradient).sum(), rtol=1e-4, atol=1e-4)
        masks.append(gradient.abs() > 0.5)
        assert 0.2 < 1 - masks[-1].float().mean() < 0.3
    assert not torch.equal(masks[1], masks[2])


class _Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        return mixed.float().square().mean()


def _losses(kind, x, compile):
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(
        model, optimizer, lambda model, x: model(x), precision="fp32", compile=compile
    )
    torch.manual_seed(1)
    return [step(x).item() for _ in range(4)]


@pytest.mark.parametrize("fallback_random", [False, True])
def test_attention_with_dropout_trains_when_compiled(fallback_random):
    """Inductor alone fuses the product with the mask into a kernel before the mask is drawn."""
    x = torch.randn(4, 6, 8)
    with torch._inductor.config.patch(fallback_random=fallback_random):
        eager, compiled = (_losses(_Attends, x, compile) for compile in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-5 if fallback_random else 0.2)


class _Caches(nn.Module):
    """Keys behind an empty cache, as transformers has them at the first call."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Linear(8, 8)

    def forward(self, x):
        heads = self.keys(x).unflatten(-1, (2, 4)).transpose(1, 2)
        keys = torch.cat([torch.tensor([]), heads], dim=-2)
        return (heads @ (keys.transpose(-1, -2) * 0.5)).square().mean()


def test_values_that_inductor_lays_out_in_another_way_are_reshaped():
    x = torch.randn(3, 6, 8)
    eager, compiled = (_losses(_Caches, x, compile) for compile in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-5)
