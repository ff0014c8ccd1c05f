"""Which operators write to running statistics: what they do, and what mpgraph takes them for."""

from __future__ import annotations

import pytest
import torch

from mpgraph import ir

aten = torch.ops.aten
TAIL = (True, 0.1, 1e-5)  # training, momentum, epsilon
# For each operator, its arguments around the two statistics.
CALLS = {
    aten.batch_norm.default: ((None, None), (*TAIL, False)),
    aten.instance_norm.default: ((None, None), (*TAIL, False)),
    aten.native_batch_norm.default: ((None, None), TAIL),
    aten._native_batch_norm_legit.default: ((None, None), TAIL),
    aten._batch_norm_with_update.default: ((None, None), TAIL[1:]),
    aten._batch_norm_impl_index.default: ((None, None), (*TAIL, False)),
    aten.batch_norm_update_stats.default: ((), TAIL[1:2]),
    aten._native_batch_norm_legit_functional.default: ((None, None), TAIL),
    aten._batch_norm_with_update_functional.default: ((None, None), TAIL[1:]),
    aten._native_batch_norm_legit_no_training.default: ((None, None), TAIL[1:]),
    aten._batch_norm_no_update.default: ((None, None), TAIL[1:]),
    aten.native_batch_norm_backward.default: (
        (torch.ones(4, 3, 2), None),
        (torch.zeros(3), torch.ones(3), True, 1e-5, [True, False, False]),
    ),
}


@pytest.mark.parametrize("target", CALLS, ids=str)
def test_an_operator_is_known_to_write_if_it_does(target: torch._ops.OpOverload) -> None:
    before, after = CALLS[target]
    mean, variance = torch.zeros(3), torch.ones(3)
    target(torch.randn(4, 3, 2) + 1, *before, mean, variance, *after)
    assert ir.updates_statistics(target) is bool(mean.any())
