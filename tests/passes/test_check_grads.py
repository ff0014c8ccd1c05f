"""One flag says whether any gradient of a step is infinite or NaN."""

from __future__ import annotations

import pytest
import torch

from mpgraph.passes.check_grads import check_grads
from mpgraph.passes.clip_grads import clip_grads

from .steps import NAMES, SHAPE, context, gradients_graph, run


def test_nothing_is_checked_where_nobody_asks() -> None:
    graph = gradients_graph()
    before = str(graph)
    assert check_grads(graph, context()) == 0
    assert str(graph) == before


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("bad", [None, float("inf"), -float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("place", [0, 1])
def test_the_flag_is_one_for_every_bad_value(clipped: bool, bad: float | None, place: int) -> None:
    """3e38 is finite, and so is its norm; twice that is not."""
    graph = gradients_graph()
    known = context(check_finite=True, max_grad_norm=1.0 if clipped else None)
    clip_grads(graph, known)
    assert check_grads(graph, known) == 1
    gradients = [torch.randn(SHAPE) for _ in NAMES]
    if bad is not None:
        gradients[place][1, 2] = bad
    found = run(graph, torch.ones(()), *gradients)["found_inf"]
    is_bad = bad is not None and bad != 3e38
    is_bad |= bad == 3e38 and clipped  # its square overflows in the norm, as in guard's
    assert found.dtype is torch.float32
    assert found.item() == float(is_bad)
