"""Normalisation in training, of which ONNX has inference alone."""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp import get_decompositions

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten

_SOURCE = "torch._decomp; torchlib translates batch_norm with training=0, whatever is asked for"

_TARGETS: tuple[Any, ...] = (
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_with_update_functional.default,
    aten._batch_norm_no_update.default,
    aten.native_batch_norm_backward.default,
    aten.batch_norm_backward.default,
    aten.native_layer_norm_backward.default,
    aten.native_group_norm_backward.default,
)


def _rows() -> tuple[Row, ...]:
    found = get_decompositions(_TARGETS)
    formula = "mean and variance of the batch, then the affine map; torch's own decomposition"
    return tuple(
        Row((target,), found[target], formula, _SOURCE) for target in _TARGETS if target in found
    )


ROWS = _rows()
