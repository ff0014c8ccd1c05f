"""A graph moves to another device as a whole."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mpgraph.onnx.one_device import put_on


def _traced() -> fx.GraphModule:
    constant = torch.tensor([1.0, 2.0, 3.0])

    def function(x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(3, device=x.device) + torch.zeros(3, device=x.device)
        return x * places + constant.to(x.device)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return make_fx(function, _allow_non_fake_inputs=True)(mode.from_tensor(torch.ones(2, 3)))


def test_values_constants_and_what_is_made_lie_on_the_other_device() -> None:
    graph = _traced()
    put_on(graph, "meta")
    assert {n.meta["val"].device.type for n in graph.graph.nodes if "val" in n.meta} == {"meta"}
    assert graph(torch.ones(2, 3, device="meta")).device.type == "meta"


def test_a_graph_that_is_there_computes_what_it_did() -> None:
    graph, x = _traced(), torch.randn(2, 3)
    put_on(graph, "cpu")
    assert torch.equal(graph(x), _traced()(x))
