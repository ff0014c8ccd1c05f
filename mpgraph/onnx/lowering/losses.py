"""Margin losses over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten
NONE, MEAN = range(2)


def _spread(grad: Tensor, like: Tensor, reduction: int) -> Tensor:
    """The gradient of a loss, for every element of its rows."""
    if reduction == NONE:
        return grad.reshape(-1, 1) / like.shape[1]
    return grad / (like.shape[1] * (like.shape[0] if reduction == MEAN else 1))


def _multi_margin_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    p: float,
    margin: float,
    weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Tensor:
    rows, classes = x.reshape(-1, x.shape[-1]), target.reshape(-1, 1)
    is_target = torch.arange(x.shape[-1]) == classes
    over = margin - rows.gather(1, classes) + rows
    share = torch.where((over > 0) & ~is_target, 1.0 if p == 1 else 2 * over, 0.0)
    if weight is not None:
        share = share * weight[classes]
    share = torch.where(is_target, -share.sum(1, keepdim=True), share)
    return (share * _spread(grad, rows, reduction)).reshape(x.shape)


def _targets(target: Tensor) -> Tensor:
    """Which numbers of a row are targets: those before the first -1."""
    return (target < 0).to(torch.int64).cumsum(1) == 0


def _multilabel_margin(x: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    rows, targets = x.reshape(-1, x.shape[-1]), target.reshape(-1, x.shape[-1])
    counts = _targets(targets)
    classes = targets.clamp(min=0)
    hits = torch.zeros(rows.shape, dtype=torch.int64).scatter_add(
        1, classes, counts.to(torch.int64)
    )
    is_target = (hits > 0).to(x.dtype)
    over = 1 - rows.gather(1, classes).unsqueeze(2) + rows.unsqueeze(1)  # [row, target, class]
    pairs = counts.unsqueeze(2) & (is_target == 0).unsqueeze(1)
    loss = torch.where(pairs, over.clamp(min=0), 0.0).sum((1, 2)) / rows.shape[1]
    if reduction != NONE:
        loss = loss.mean() if reduction == MEAN else loss.sum()
    elif x.dim() == 1:
        loss = loss.squeeze(0)
    return loss, is_target.reshape(x.shape)


def _multilabel_margin_backward(
    grad: Tensor, x: Tensor, target: Tensor, reduction: int, is_target: Tensor
) -> Tensor:
    rows, targets = x.reshape(-1, x.shape[-1]), target.reshape(-1, x.shape[-1])
    counts, classes = _targets(targets), targets.clamp(min=0)
    over = 1 - rows.gather(1, classes).unsqueeze(2) + rows.unsqueeze(1)
    others = (is_target.reshape(rows.shape) == 0).unsqueeze(1)
    hit = (counts.unsqueeze(2) & others & (over > 0)).to(x.dtype)
    found = hit.sum(1).scatter_add(1, classes, -hit.sum(2))
    return (found * _spread(grad, rows, reduction)).reshape(x.shape)


_MARGIN = "aten/src/ATen/native/LossMultiMargin.cpp"
_MULTILABEL = "aten/src/ATen/native/LossMultiLabelMargin.cpp"

ROWS = (
    Row(
        (aten.multi_margin_loss_backward.default,), _multi_margin_backward,
        "p * w[y] * over**(p - 1) / classes where over = margin - x[y] + x > 0; for y, less the "
        "sum of that", _MARGIN,
    ),
    Row(
        (aten.multilabel_margin_loss_forward.default,), _multilabel_margin,
        "sum over targets t and other classes c of max(0, 1 - x[t] + x[c]), / classes",
        _MULTILABEL,
    ),
    Row(
        (aten.multilabel_margin_loss_backward.default,), _multilabel_margin_backward,
        "for each of those pairs above 0: 1 / classes for c, -1 / classes for t", _MULTILABEL,
    ),
)  # fmt: skip
