"""A graph as a program of torch.export."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mpgraph.onnx.program import as_program


def test_a_graph_may_begin_with_several_tensors_that_it_holds() -> None:
    """As that of a BERT does, whose positions and kinds of tokens are buffers."""
    held = {"first": torch.tensor([1.0, 2.0]), "second": torch.tensor([3.0, 4.0])}
    graph = fx.Graph()
    first, second = (graph.get_attr(name) for name in held)
    x = graph.placeholder("x")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, first))
    total = graph.call_function(torch.ops.aten.add.Tensor, (product, second))
    graph.output((total,))
    with FakeTensorMode() as mode:
        for node in (first, second, x, product, total):
            node.meta["val"] = mode.from_tensor(torch.ones(2))
    program = as_program(fx.GraphModule(held, graph))
    assert torch.equal(program.module()(torch.tensor([5.0, 6.0]))[0], torch.tensor([8.0, 16.0]))
