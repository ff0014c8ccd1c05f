"""A number that forward takes out of a tensor is taken at every call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph.module import state_of

Use = Callable[[Any, Tensor], Tensor]
USES: dict[str, Use] = {
    "item": lambda m, x: x * m.gain.item(),
    "float": lambda m, x: x * float(m.gain),
    "int": lambda m, x: x * int(m.gain),
    "an index": lambda m, x: x[range(4)[m.index] :],
    "a branch": lambda m, x: x * 3 if m.gain else x,
    "tolist": lambda m, x: x * m.gains[0].tolist()[1],
    "numpy": lambda m, x: x * float(m.gains[0].numpy()[1]),
    "in": lambda m, x: x * 3 if 3.0 in m.gains[0] else x,
}


class Takes(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layer = nn.Linear(8, 8)
        self.gain, self.index = torch.tensor(0.0), torch.tensor(0)
        self.gains = [torch.zeros(2)]

    def forward(self, x: Tensor) -> Tensor:
        return USES[self.name](self, self.layer(x))


@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore:mpgraph")
def test_another_number_in_the_tensor_is_another_result(name: str):
    if name == "an index" and torch.__version__ < "2.12":
        pytest.skip("an internal error of Dynamo's in torch 2.11, which CaptureError reports")
    plain = Takes(name)
    model = mpgraph.convert(copy.deepcopy(plain), "bf16", policy="autocast-cpu")
    x = torch.ones(4, 8)

    def check() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            want = plain(x)
        assert torch.equal(model(x), want)

    check()
    for subject in (plain, model):
        for tensor in (subject.gain, subject.index, *subject.gains):
            tensor.fill_(3)
    check()


def test_a_tensor_that_no_number_is_taken_of_is_exported():
    class Scaled(Takes):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.gain

    model = mpgraph.convert(Scaled(""), "bf16", capture="export")
    model(torch.ones(2, 8))
    (entry,) = state_of(model).specialisations()
    assert entry.engine == "export"
