"""What ``mpgraph`` makes public, and under which names it speaks of a user's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mpgraph

INDEX = Path(__file__).parents[1] / "docs" / "index.md"


@pytest.mark.parametrize("name", mpgraph.__all__)
def test_every_public_name_leads_somewhere(name):
    assert getattr(mpgraph, name) is not None


@pytest.mark.parametrize("name", sorted(set(mpgraph.__all__) - {"__version__"}))
def test_every_public_name_is_in_the_index(name):
    assert f"`mpgraph.{name}`" in INDEX.read_text()


def test_the_errors_and_the_report_that_users_meet_are_public():
    model = mpgraph.convert(nn.Linear(4, 2), "bf16", example_inputs=(torch.ones(3, 4),))
    assert isinstance(mpgraph.explain(model), mpgraph.Report)
    with pytest.raises(mpgraph.CallError, match=r"^Linear\.forward"):
        model(torch.ones(3, 4), 1)


def test_a_slice_of_a_converted_model_says_that_it_was_not_converted():
    model = mpgraph.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "bf16")
    with pytest.raises(mpgraph.MPGraphError, match=r"found Sequential\. Convert it first"):
        model[:1](torch.ones(3, 4))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_a_converted_model_goes_by_the_users_class_name():
    model = mpgraph.convert(Plain(), "bf16", example_inputs=(torch.ones(3, 4),))
    assert type(model).__name__ == type(model).__qualname__ == "Plain"
    assert repr(model) == repr(Plain())
    assert mpgraph.text(model).startswith("# Plain train (x: fp32[3, 4])")
    assert mpgraph.explain(model).graphs[0].label.startswith("Plain train")
