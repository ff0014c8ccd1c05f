"""Arithmetic that ONNX has no operator for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    large, small = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    ratio = small / torch.where(large == 0, 1.0, large)
    return large * (1 + ratio * ratio).sqrt()


def _weight_norm_backward(
    grad: Tensor, direction: Tensor, size: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    axes = [i for i in range(direction.dim()) if i != dim % direction.dim()]
    along = (grad * direction).sum(axes, keepdim=True)
    norms = norms.view(along.shape)
    size = size.view(along.shape)
    of_direction = size / norms * (grad - direction * along / (norms * norms))
    return of_direction, along / norms


def _cumprod(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """The product of every row of a lower triangle."""
    x = x if dtype is None else x.to(dtype)
    moved = x.transpose(dim, -1).unsqueeze(-2) if x.dim() else x.view(1, 1)
    size = moved.shape[-1]
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    found = torch.where(seen, moved, 1.0).to(x.dtype).prod(-1)
    return found.transpose(dim, -1) if x.dim() else found.view([])


def _shrink_backward(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    return torch.where((x >= -bound) & (x <= bound), 0.0, grad)


ROWS = (
    Row(
        (aten.softshrink_backward.default, aten.hardshrink_backward.default), _shrink_backward,
        "g, and 0 where |x| <= bound", "aten/src/ATen/native/cpu/Activation.cpp",
    ),
    Row(
        (aten.hypot.default,), _hypot, "max * sqrt(1 + (min / max)**2)",
        "scaled, so that a square does not overflow",
    ),
    Row(
        (aten._weight_norm_interface_backward.default,), _weight_norm_backward,
        "g / |v| * (grad - v * sum(grad * v) / |v|**2)",
        "Salimans and Kingma, Weight normalization, arXiv:1602.07868, equation 3",
    ),
    Row(
        (aten.cumprod.default,), _cumprod, "the product of every row of a lower triangle",
        "torch.cumprod; quadratic in the length",
    ),
)  # fmt: skip
