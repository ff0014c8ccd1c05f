"""Sums, means and maxima of bags of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from mpgraph.errors import ExportError
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten
SUM, MEAN, MAX = range(3)
Bags = tuple[Tensor, Tensor, Tensor, Tensor]


def _bag_of(indices: Tensor, offsets: Tensor) -> Tensor:
    """For every index, the bag that it is in."""
    places = torch.arange(indices.shape[0])
    return (places.unsqueeze(1) >= offsets.unsqueeze(0)).to(torch.int64).sum(1) - 1


def _counted(indices: Tensor, padding: int) -> Tensor:
    """1 for every index that counts, 0 for padding."""
    return (indices != padding).to(torch.int64)


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Bags:
    offsets = offsets[:-1] if include_last_offset else offsets
    bags, count = _bag_of(indices, offsets), offsets.shape[0]
    counted = _counted(indices, padding_idx)
    sizes = torch.zeros(count, dtype=torch.int64).scatter_add(0, bags, counted)
    rows = weight[indices]
    if mode == MAX:
        values, largest = _largest(rows, indices, bags, count, counted)
        return values, bags, sizes, largest
    rows = rows * counted.unsqueeze(1).to(rows.dtype)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    values = torch.zeros(count, rows.shape[1], dtype=rows.dtype)
    values = values.scatter_add(0, bags.unsqueeze(1).expand(rows.shape), rows)
    if mode == MEAN:
        values = values / sizes.clamp(min=1).unsqueeze(1).to(rows.dtype)
    return values, bags, sizes, sizes


def _largest(
    rows: Tensor, indices: Tensor, bags: Tensor, count: int, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest of every bag and column, and whose row it is; 0 for an empty bag."""
    member = bags.unsqueeze(0) == torch.arange(count).unsqueeze(1)  # [bag, index]
    member = member & (counted.unsqueeze(0) > 0)
    wide = torch.where(member.unsqueeze(-1), rows.unsqueeze(0), -torch.inf)
    values, places = wide.max(1)
    is_empty = values == -torch.inf
    return torch.where(is_empty, 0.0, values), torch.where(is_empty, -1, indices[places])


def _backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    bags: Tensor,
    sizes: Tensor,
    largest: Tensor,
    count: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Tensor | None,
    padding_idx: int = -1,
) -> Tensor:
    if scale_grad_by_freq:
        raise ExportError(
            "embedding_bag(scale_grad_by_freq=True) cannot be exported: torch divides the gradient "
            "of an index by how often another one occurs (EmbeddingBag.cpp). Scale it yourself, or "
            "use F.embedding(scale_grad_by_freq=True)."
        )
    # torch's forward does without the bags where it only sums, and its backward finds them again.
    bags = _bag_of(indices, offsets)
    found = torch.zeros(count, grad.shape[1], dtype=grad.dtype)
    if mode == MAX:
        kept = (largest >= 0).to(grad.dtype)
        return found.scatter_add(0, largest.clamp(min=0), grad * kept)
    if mode == MEAN:
        grad = grad / sizes.clamp(min=1).unsqueeze(1).to(grad.dtype)
    rows = grad[bags] * _counted(indices, padding_idx).unsqueeze(1).to(grad.dtype)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    return found.scatter_add(0, indices.unsqueeze(1).expand(rows.shape), rows)


def _weights_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    bags: Tensor,
    mode: int,
    padding_idx: int = -1,
) -> Tensor:
    shares = (grad[_bag_of(indices, offsets)] * weight[indices]).sum(1)
    return shares * _counted(indices, padding_idx).to(shares.dtype)


_SOURCE = "aten/src/ATen/native/EmbeddingBag.cpp"

ROWS = (
    Row(
        (aten._embedding_bag.default, aten._embedding_bag_forward_only.default),
        _embedding_bag, "scatter-add of the rows to sum(place >= offset) - 1", _SOURCE,
    ),
    Row(
        (aten._embedding_bag_backward.default,), _backward,
        "scatter-add of each bag's gradient to the rows that are in it", _SOURCE,
    ),
    Row(
        (aten._embedding_bag_per_sample_weights_backward.default,), _weights_backward,
        "the product of each row with the gradient of its bag", _SOURCE,
    ),
)  # fmt: skip
