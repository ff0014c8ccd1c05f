"""Arithmetic that ONNX has no operator for."""

from __future__ import annotations

import math
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


def _shrink_backward(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    return torch.where((x >= -bound) & (x <= bound), 0.0, grad)


def _spread(root: bool, mean: bool) -> Any:
    """Variance or its root, with the mean or without it."""

    def spread(
        x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
    ) -> Any:
        axes = [*dim] if dim else [*range(x.dim())]
        count = math.prod(x.shape[axis] for axis in axes)
        away = x - x.mean(axes, keepdim=True)
        count = count - (1 if correction is None else correction)
        found = (away * away).sum(axes, keepdim) / count
        found = found.sqrt() if root else found
        return (found, x.mean(axes, keepdim)) if mean else found

    return spread


def _signbit(x: Tensor) -> Tensor:
    return (x < 0) | ((x == 0) & (1 / x < 0)) if x.is_floating_point() else x < 0


def _copysign(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(_signbit(y), -x.abs(), x.abs())


def _rrelu(
    x: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Any:
    """In evaluation mode, a leaky ReLU with the mean slope."""
    if training:
        return NotImplemented
    return aten.leaky_relu(x, (lower + upper) / 2), noise


_VARIANCE = "sum(d**2) / (n - 1), or its root"
_SYMBOLIC = "torchlib takes no symbolic number of elements"

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
    Row((aten.var.correction,), _spread(False, False), _VARIANCE, _SYMBOLIC),
    Row((aten.std.correction,), _spread(True, False), _VARIANCE, _SYMBOLIC),
    Row((aten.var_mean.correction,), _spread(False, True), _VARIANCE, _SYMBOLIC),
    Row((aten.std_mean.correction,), _spread(True, True), _VARIANCE, _SYMBOLIC),
    Row((aten._is_all_true.default,), lambda x: x.all(), "all", "torch.all"),
    Row((aten._is_any_true.default,), lambda x: x.any(), "any", "torch.any"),
    Row((aten.signbit.default,), _signbit, "x < 0, or x == 0 and 1 / x < 0", "IEEE 754"),
    Row((aten.copysign.Tensor,), _copysign, "-|x| where y has its sign bit", "IEEE 754"),
    Row(
        (aten.rrelu_with_noise_functional.default,), _rrelu,
        "in evaluation mode, a leaky ReLU with the mean slope", "torch.nn.RReLU",
    ),
)  # fmt: skip
