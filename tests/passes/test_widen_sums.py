"""The gradient of a bias is not rounded to 16 bit on its way to float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mpgraph.graph_text import format_graph
from mpgraph.passes.widen_sums import widen_sums
from mpgraph.policy import Policy
from mpgraph.step.joint import StepContext

aten = torch.ops.aten
CONTEXT = StepContext(policy=Policy(), compute=torch.bfloat16)


def graph_of(dtype: torch.dtype, *, is_read_twice: bool = False) -> fx.Graph:
    """``to(view(sum(d)), float32)``."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode:
            node.meta = {"val": target(*values[0], **values[1]), "part": "backward"}
        return node

    d = graph.placeholder("d")
    with mode:
        d.meta = {"val": torch.zeros(6, 4, dtype=dtype)}
    summed = add(aten.sum.dim_IntList, d, [0], True)
    viewed = add(aten.view.default, summed, [4])
    wide = add(aten._to_copy.default, viewed, dtype=torch.float32)
    graph.output((wide, viewed) if is_read_twice else (wide,))
    return graph


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_float32_at_once(dtype: torch.dtype) -> None:
    graph = graph_of(dtype)
    assert widen_sums(graph, CONTEXT) == 1
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert format_graph(graph) == (
        f"%d: {short}[6, 4] = input\n"
        "%sum_dim_int_list: fp32[1, 4] = sum.dim_IntList(%d, [0], True, dtype=fp32)\n"
        "%view_default: fp32[4] = view(%sum_dim_int_list, [4])\n"
        "return (%view_default,)"
    )


def test_a_rounding_that_something_reads_stays() -> None:
    graph = graph_of(torch.bfloat16, is_read_twice=True)
    before = format_graph(graph)
    assert widen_sums(graph, CONTEXT) == 0
    assert format_graph(graph) == before


def test_a_sum_of_float32_is_left_alone() -> None:
    assert widen_sums(graph_of(torch.float32), CONTEXT) == 0


def test_one_rounding_less_is_nearer_to_the_sum() -> None:
    d = torch.randn(6, 4).to(torch.bfloat16)
    graph = graph_of(torch.bfloat16)
    rounded = fx.GraphModule({}, graph)(d)[0]
    widen_sums(graph, CONTEXT)
    (wide,) = fx.GraphModule({}, graph)(d)
    exact = d.double().sum(0)
    assert wide.dtype is torch.float32
    assert (wide - exact).abs().max() < 1e-6 < (rounded - exact).abs().max()
