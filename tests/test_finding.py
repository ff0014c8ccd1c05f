"""explain, text, assert_policy and guard find the converted module inside what they are given."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import mpgraph

X = torch.ones(2, 8)


def converted() -> nn.Module:
    return mpgraph.convert(nn.Linear(8, 4), "bf16", example_inputs=(X,))


class Wrapper(nn.Module):
    """As DistributedDataParallel holds its model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


WRAPPERS = {
    "ordinary": lambda m: nn.Sequential(nn.Linear(8, 8), m),
    "wrapper": Wrapper,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "twice the same": lambda m: nn.ModuleList([m, m]),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_one_converted_module_inside_is_shown(wrap):
    inner = converted()
    model = wrap(inner)
    assert mpgraph.explain(model) == mpgraph.explain(inner)
    assert mpgraph.text(model) == mpgraph.text(inner)
    mpgraph.assert_policy(model, lower=["linear"])


@pytest.mark.parametrize("show", [mpgraph.explain, mpgraph.text])
def test_several_converted_modules_are_named(show):
    model = nn.Sequential(converted(), nn.Sequential(nn.ReLU(), converted()))
    expected = "Sequential holds 2 converted modules: '0', '1.1'. Pass one of them"
    with pytest.raises(mpgraph.MPGraphError, match=re.escape(expected)):
        show(model)
    assert show(model.get_submodule("1.1"))


@pytest.mark.parametrize("show", [mpgraph.explain, mpgraph.text])
@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper], ids=["plain", "wrapped"])
def test_before_the_first_call_there_is_nothing_to_show(show, wrap):
    model = wrap(mpgraph.convert(nn.Linear(8, 4), "bf16"))
    expected = r"^Linear was converted, but no call of it has been captured yet.*example_inputs"
    with pytest.raises(mpgraph.MPGraphError, match=expected):
        show(model)


def test_advice_for_a_model_that_was_not_converted_fits_the_caller():
    with pytest.raises(mpgraph.MPGraphError, match=r"mpgraph\.convert\(model, 'bf16'\)"):
        mpgraph.explain(nn.Linear(8, 4))
    model = nn.Linear(8, 4)
    with pytest.raises(mpgraph.MPGraphError, match=r"mpgraph\.convert\(model, 'fp16'\)"):
        mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_text_shows_a_converted_graph_module_as_rewritten():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 4)))
    model = mpgraph.convert(traced, "bf16", example_inputs=(X,))
    assert "linear: bf16" in mpgraph.text(model)


def test_text_shows_every_graph_of_a_split_call():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.second(h)

    torch._dynamo.reset()
    model = mpgraph.convert(Split(), "bf16", capture="dynamo")
    model(X)
    assert mpgraph.text(model).count(" = linear(") == 2
