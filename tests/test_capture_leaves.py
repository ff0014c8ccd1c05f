"""Leaves that the user passes to a model: torch.autocast casts each of them once per call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import mpgraph
from mpgraph.module import state_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Prompted(nn.Module):
    """Reads its prompt on both sides of what may be a graph break."""

    def __init__(self, *, breaks: bool) -> None:
        super().__init__()
        self.first, self.last, self.breaks = nn.Linear(8, 8), nn.Linear(8, 8), breaks

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        h = self.first(x) + torch.mm(x, prompt)
        if self.breaks:
            torch._dynamo.graph_break()
        h = self.last(h) + torch.mm(h, prompt)
        return h.float().mean() + torch.mm(x, prompt).float().pow(2).mean()


def a_leaf() -> tuple[torch.Tensor, torch.Tensor]:
    leaf = torch.randn(8, 8, requires_grad=True)
    return leaf, leaf


def no_leaf() -> tuple[torch.Tensor, torch.Tensor]:
    leaf = torch.randn(8, 8, requires_grad=True)
    return leaf, leaf * 1


def a_view() -> tuple[torch.Tensor, torch.Tensor]:
    leaf = torch.randn(9, 8).detach()[1:].requires_grad_()
    assert leaf.is_leaf
    return leaf, leaf


Make = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def gradient(call: Callable[..., torch.Tensor], make: Make, scale: float) -> torch.Tensor:
    """The gradient of the tensor that the prompt was made of."""
    torch.manual_seed(3)
    leaf, prompt = make()
    (call(torch.randn(4, 8), prompt) * scale).backward()
    assert leaf.grad is not None
    return leaf.grad / scale


def assert_equal_to_autocast(
    model: nn.Module, converted: nn.Module, make: Make, precision: str
) -> None:
    dtype = DTYPES[precision]

    def eager(*args: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return model(*args)

    want = gradient(eager, make, 2.0**16 if precision == "fp16" else 1.0)
    assert torch.equal(gradient(converted, make, 1.0), want)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("capture", ["dynamo", "export"])
@pytest.mark.parametrize("makes", [(a_leaf, no_leaf, a_view), (no_leaf, a_leaf), (a_view, a_leaf)])
def test_gradients_of_a_prompt_meet_where_autocast_lets_them(
    precision: str, capture: str, makes: tuple[Make, ...]
) -> None:
    model = Prompted(breaks=capture == "dynamo")
    converted = mpgraph.convert(model, precision, policy="autocast-cpu", capture=capture)
    for make in makes:
        assert_equal_to_autocast(model, converted, make, precision)


def test_a_call_that_dynamo_must_not_trace_runs_in_python() -> None:
    class Marks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cache = torch.zeros(4, 8)
            if not torch.compiler.is_compiling():  # as transformers' caches do
                torch._dynamo.mark_static_address(cache)
            return self.linear(cache.add_(self.linear(x)))

    model, x = Marks(), torch.randn(4, 8)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu", capture="dynamo")
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
    assert torch.equal(converted(x), want)


def test_the_copy_of_an_input_does_not_outlive_the_call() -> None:
    model = mpgraph.convert(Prompted(breaks=True), "bf16", capture="dynamo")
    prompt = torch.randn(8, 8, requires_grad=True)
    model(torch.randn(4, 8), prompt)
    assert id(prompt) not in {key for key, _ in state_of(model).weights._copies}


def test_an_input_written_to_between_two_graphs_is_copied_again() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            h = torch.mm(self.linear(x), prompt)
            torch._dynamo.graph_break()
            with torch.no_grad():
                prompt.mul_(2)
            torch._dynamo.graph_break()
            return h + torch.mm(x, prompt)

    model = Writes()
    x, prompt = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)
    twin = prompt.detach().clone().requires_grad_()
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu", capture="dynamo")
    got = converted(x, prompt)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        want = model(x, twin)
    assert torch.equal(got, want)
