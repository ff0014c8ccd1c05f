"""fp16 values between two of Dynamo's graphs: eager autocast's dtypes and bits, true gradients."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph.module import state_of

SCALE = 2.0**12
SMALL = 2.0**-20


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cut() -> None:
    torch._dynamo.graph_break()


class Base(nn.Module):
    """Two layers, and a note of what Python sees between graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.seen: list[Any] = []


class Chain(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        cut()
        h = self.norm(h * 1.1 + h)
        cut()
        h = self.b(h) * 0.3
        cut()
        return h + h.sin()


class BranchOnDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        cut()
        self.seen.append((h.dtype, h.requires_grad))
        h = h * 1.001 if h.dtype is torch.float16 else h * 3
        if h.sum() > 1e9:
            h = h * 2
        return self.b(h)


class Eager(Base):
    """An operator on the fp16 value that Dynamo never sees."""

    @torch.compiler.disable
    def middle(self, h: Tensor) -> Tensor:
        self.seen.append(h.dtype)
        return (h * 1.003).sin()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(self.middle(h)) + h


class Aliases(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.a(x)
        flat, (left, right) = h.view(-1), h.chunk(2, -1)
        cut()
        return self.b(h), flat * 1.1, left * right, h


class WritesInGraph(Base):
    """What one graph writes, Python and the next graph read, through the tensor and its view."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        flat = h.view(-1)
        cut()
        h *= 1.1
        h.clamp_(-2, 0.9)
        cut()
        flat[:8].add_(0.25)
        cut()
        self.seen.append(h.detach().sum().item())
        return self.b(h) + flat.view_as(h)


class Activates(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        cut()
        y = F.relu(h, inplace=True)
        cut()
        self.seen.append(y is h)
        return self.b(h) + y * 1.1


class WritesInPython(Base):
    @torch.compiler.disable
    def write(self, h: Tensor) -> None:
        h.mul_(1.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.write(h)
        h = self.b(h)
        self.write(h)
        return h * h


class BothWrite(WritesInPython):
    """Python to one tensor, the next graph to another."""

    def forward(self, x: Tensor) -> Tensor:
        h, k = self.a(x), self.b(x)
        self.write(h)
        k += 1
        cut()
        return h * k


class GraphWritesToPythons(Base):
    """Python makes the fp16 tensor, and a graph writes to it."""

    @torch.compiler.disable
    def make(self, h: Tensor) -> Tensor:
        return h * 1.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.make(self.a(x))
        F.relu(h, inplace=True)
        cut()
        return self.b(h) * h


class Checkpointed(Base):
    def inner(self, h: Tensor) -> Tensor:
        return F.softmax(self.b(h).relu(), -1) @ h.t()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        cut()
        h = checkpoint(self.inner, h, use_reentrant=False)
        cut()
        return h * 1.1 + h


class CheckpointedBreak(Base):
    """The break is inside the checkpoint, which then runs in eager mode."""

    def inner(self, h: Tensor) -> Tensor:
        h = self.b(h)
        cut()
        return self.b(h.relu())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, self.a(x), use_reentrant=False) * 1.1


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mask = self.a(x)
            cut()
            mask = mask.relu() * 1.1
        cut()
        return self.b(x) * mask + mask


@dataclasses.dataclass
class Output:
    value: Tensor
    parts: list[Tensor]


class Structured(Base):
    def forward(self, x: Tensor) -> Output:
        h = self.a(x)
        cut()
        return Output(self.b(h), [h, h, h.detach(), h.argmax(-1)])


class Loop(Base):
    """The loop and the first layer run in Python, each turn in graphs."""

    def turn(self, h: Tensor, first: Tensor) -> Tensor:
        h = self.b(h)
        cut()
        return h.tanh() + first

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.a(x)
        for _ in range(3):
            h = self.turn(h, first)
        return h


MODELS = [
    *(Chain, BranchOnDtype, Eager, Aliases, WritesInGraph, Activates),
    *(WritesInPython, BothWrite, GraphWritesToPythons),
    *(Checkpointed, CheckpointedBreak, NoGrad, Structured, Loop),
]


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Output):
        result = [result.value, *result.parts]
    return [result] if isinstance(result, Tensor) else list(result)


def loss_of(results: list[Tensor]) -> Tensor:
    floating = [r for r in results if r.is_floating_point()]
    return torch.stack([(r.float().sin() * 0.37).square().mean() for r in floating]).sum()


def convert(model: nn.Module, **options: Any) -> nn.Module:
    options = {"policy": "autocast-cpu", "capture": "dynamo", **options}
    converted = mpgraph.convert(copy.deepcopy(model), "fp16", **options)
    state_of(converted).scale.replace(mpgraph.LossScale(init_scale=SCALE))
    return converted


def assert_bits(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("make", MODELS)
def test_what_python_sees_between_graphs_is_autocasts(make: Callable[[], Base]):
    model = make()
    converted = convert(model)
    for step in range(3):
        x = torch.randn(4 + step % 2, 8)
        y, z = (x.clone().requires_grad_() for _ in range(2))
        with torch.autocast("cpu", torch.float16):
            want = tensors(model(y))
        got = tensors(converted(z))
        assert all(r.dtype is not torch.float16 for r in got)
        for one, other in zip(got, want, strict=True):
            assert_bits(one, other.float() if other.is_floating_point() else other)
        (loss_of(want) * SCALE).backward()
        loss_of(got).backward()
        assert_gradients(converted, z, model, y, make in ROUNDED)
    assert converted.seen == model.seen


# Python computes with true gradients in fp16, or adds up those of two paths: other roundings.
ROUNDED = (Eager, WritesInPython, BothWrite, GraphWritesToPythons, CheckpointedBreak, Loop)


def assert_gradients(got: Any, x: Tensor, want: Any, y: Tensor, rounded: bool) -> None:
    pairs = [(x.grad, y.grad), *((a.grad, b.grad) for a, b in _parameters(got, want))]
    for one, other in pairs:
        if other is None:
            assert one is None
            continue
        other = other / SCALE
        error = (one - other).abs().max()
        assert error <= (2e-2 * other.abs().max() if rounded else 0.0)
    got.zero_grad()
    want.zero_grad()


def _parameters(got: nn.Module, want: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(got.parameters(), want.parameters(), strict=True)


@pytest.mark.parametrize("make", MODELS)
def test_evaluation_without_gradients_is_autocasts(make: Callable[[], Base]):
    model = make().eval()
    converted = convert(model)
    x = torch.randn(4, 8)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            with torch.autocast("cpu", torch.float16):
                want = tensors(model(x))
            for one, other in zip(tensors(converted(x)), want, strict=True):
                assert one.dtype is not torch.float16
                assert_bits(one, other.float() if other.is_floating_point() else other)
    assert not state_of(converted).scale.was_read


SCALED = [Chain, BranchOnDtype, Aliases, WritesInGraph, Activates, Checkpointed]


@pytest.mark.parametrize("make", SCALED)
def test_no_gradient_vanishes_between_graphs(make: Callable[[], Base]):
    torch.manual_seed(0)
    model = make()
    exact, converted = copy.deepcopy(model).double(), convert(model)
    state_of(converted).scale.replace(mpgraph.LossScale())
    x = torch.randn(4, 8)
    if make is BranchOnDtype:
        exact.forward = lambda x: exact.b(exact.a(x) * 1.001)
    (loss_of(tensors(exact(x.double()))).double() * SMALL).backward()
    (loss_of(tensors(converted(x))) * SMALL).backward()
    for one, other in _parameters(converted, exact):
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= 2e-2 * other.grad.abs().max()


class Hooks(Base):
    kind = ""

    @torch.compiler.disable
    def attach(self, h: Tensor) -> None:
        if self.kind == "retain":
            h.retain_grad()
            self.seen.append(h)
            return
        handle = h.register_hook(lambda g: self.seen.append(g.clone()))
        if self.kind == "removed":
            handle.remove()
        if self.kind == "changed":
            h.register_hook(lambda g: g * 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.attach(h)
        y = self.b(h)
        cut()
        return y + h.sin()


@pytest.mark.parametrize("kind", ["plain", "removed", "changed", "retain"])
def test_hooks_on_a_value_between_graphs_see_its_true_gradient_once(kind):
    model = Hooks()
    exact, converted = copy.deepcopy(model).double(), convert(model)
    exact.kind = converted.kind = kind
    x = torch.randn(4, 8)
    exact(x.double()).square().mean().backward()
    converted(x).square().mean().backward()
    seen = [[s.grad if kind == "retain" else s for s in m.seen] for m in (converted, exact)]
    assert len(seen[0]) == len(seen[1]) == (0 if kind == "removed" else 1)
    pairs = [
        *zip(*seen, strict=True),
        *((a.grad, b.grad) for a, b in _parameters(converted, exact)),
    ]
    for one, other in [*pairs, *zip(*seen, strict=True)]:
        if other is not None:
            assert (one.double() - other).abs().max() <= 2e-2 * other.abs().max()


class Torn(Base):
    @torch.compiler.disable
    def write(self, h: Tensor) -> None:
        h.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        flat = h.view(-1)
        cut()
        self.write(h)
        return self.b(h).sum() + flat.sum()


def test_a_write_whose_gradient_would_be_lost_is_refused():
    with pytest.raises(mpgraph.CaptureError, match=r"share memory across a graph break.*Clone one"):
        convert(Torn())(torch.randn(4, 8))


class Given(Base):
    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x)
        cut()
        return h, self.b(y + h), y


def test_a_result_that_is_returned_twice_is_one_tensor():
    result = convert(Structured())(torch.randn(4, 8))
    assert result.parts[0] is result.parts[1]


def test_the_callers_own_fp16_tensors_stay_what_they_are():
    h = torch.randn(4, 8, dtype=torch.float16, requires_grad=True)
    converted = convert(Given())
    given, *others = converted(h, torch.randn(4, 8))
    assert given is h
    assert [o.dtype for o in others] == [torch.float32] * 2
    others[0].sum().backward()
    assert h.grad.dtype is torch.float16


def test_values_that_a_model_keeps_are_not_taken_for_those_of_another_call():
    class Keeps(Base):
        kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            cut()
            if self.kept is not None:
                h = h + self.kept
            self.kept = h
            cut()
            return self.b(h)

    model = Keeps()
    converted, exact = convert(model), model.double()
    x = torch.randn(4, 8)
    losses = []
    for m, value in ((exact, x.double()), (converted, x)):
        first = m(value).square().mean()
        if m is converted:
            state_of(m).scale.replace(mpgraph.LossScale(init_scale=2.0))
        losses.append(first + m(value).square().mean())
        losses[-1].backward()
    for one, other in _parameters(converted, exact):
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= 2e-2 * other.grad.abs().max()


def test_no_other_precision_is_touched():
    model = Chain()
    converted = mpgraph.convert(
        copy.deepcopy(model), "bf16", capture="dynamo", policy="autocast-cpu"
    )
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        want = model(torch.ones(4, 8))
    assert_bits(converted(torch.ones(4, 8)), want)
