"""What torchlib translates for inference alone: torch's own decompositions instead."""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp import get_decompositions

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten

_BATCH = "torchlib translates batch_norm with training=0, whatever is asked for"
_TOTAL = "torchlib returns a total weight of 1, which the backward divides by"
_MISSING = "torchlib has no translation"

# torch._decomp's decomposition of each, and why torchlib's translation does not do.
_REASONS: dict[Any, str] = {
    aten.native_batch_norm.default: _BATCH,
    aten._native_batch_norm_legit.default: _BATCH,
    aten._native_batch_norm_legit.no_stats: _BATCH,
    aten._native_batch_norm_legit_functional.default: _BATCH,
    aten._batch_norm_with_update_functional.default: _BATCH,
    aten._batch_norm_no_update.default: _BATCH,
    aten.native_batch_norm_backward.default: _MISSING,
    aten.batch_norm_backward.default: _MISSING,
    aten.native_layer_norm_backward.default: _MISSING,
    aten.native_group_norm_backward.default: _MISSING,
    aten.nll_loss_forward.default: _TOTAL,
    aten.nll_loss2d_forward.default: _TOTAL,
}


def _rows() -> tuple[Row, ...]:
    found = get_decompositions([*_REASONS])
    return tuple(
        Row((target,), found[target], "torch's own decomposition (torch._decomp)", reason)
        for target, reason in _REASONS.items()
        if target in found
    )


ROWS = _rows()
