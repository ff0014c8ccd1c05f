"""What ``mpgraph`` makes public."""

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
    with pytest.raises(mpgraph.CallError, match=r"Linear\.forward"):
        model(torch.ones(3, 4), 1)
