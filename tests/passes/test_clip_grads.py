"""Gradients of a whole step are clipped as torch clips them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpgraph.passes.clip_grads import clip_grads

from .steps import NAMES, SHAPE, context, gradients_graph, run


def test_without_a_norm_nothing_is_clipped() -> None:
    graph = gradients_graph()
    before = str(graph)
    assert clip_grads(graph, context()) == 0
    assert str(graph) == before


@pytest.mark.parametrize("size", [0.01, 1.0, 1e20, float("inf"), float("nan")])
def test_the_bits_are_those_of_clip_grad_norm(size: float) -> None:
    graph = gradients_graph()
    assert clip_grads(graph, context(max_grad_norm=1.5)) == 2
    gradients = [size * torch.randn(SHAPE) for _ in NAMES]
    found = run(graph, torch.ones(()), *[g.clone() for g in gradients])
    parameters = [nn.Parameter(torch.zeros(SHAPE)) for _ in NAMES]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = nn.utils.clip_grad_norm_(parameters, 1.5, foreach=False)
    assert torch.equal(found["norm"].nan_to_num(), norm.nan_to_num())
    for name, parameter in zip(NAMES, parameters, strict=True):
        torch.testing.assert_close(
            found["gradients"][name], parameter.grad, rtol=0, atol=0, equal_nan=True
        )
