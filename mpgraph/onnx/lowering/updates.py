"""What optimizers compute, in few passes over memory: a pass costs as much as the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def _lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """One product for both of torch's formulas, which differ in where they start from.

    To the bit: ``b - (b - a) * (1 - w)`` is ``b + (w - 1) * (b - a)``.
    """
    from_a = weight.abs() < 0.5
    start, part = torch.where(from_a, a, b), torch.where(from_a, weight, weight - 1)
    return start + part * (b - a)


ROWS = (
    Row(
        (aten.lerp.Tensor,), _lerp, "a + w * (b - a), and from b where |w| >= 0.5",
        "aten/src/ATen/native/Lerp.h",
    ),
)  # fmt: skip
