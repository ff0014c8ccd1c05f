"""Maxima over windows: found through constant tables of places, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.constants import constant
from mpgraph.onnx.lowering.row import Row
from mpgraph.onnx.lowering.windows import adaptive_windows

aten = torch.ops.aten


def _to_largest(grad: Tensor, x: Tensor, indices: Tensor, rank: int) -> Tensor:
    """Add each gradient to the element that was the largest of its window."""
    outer, inner = x.shape[:-rank], x.shape[-rank:]
    flat = torch.zeros((*outer, math.prod(inner)), dtype=grad.dtype, device=grad.device)
    flat = flat.scatter_add(-1, indices.flatten(-rank), grad.flatten(-rank))
    return flat.view(x.shape)


def _backward(rank: int) -> Callable[..., Tensor]:
    # The indices come last, after what the forward was called with.
    return lambda grad, x, *call: _to_largest(grad, x, call[-1], rank)


def _adaptive(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The largest element of every window, and its place in the flattened space."""
    places = constant(_places(x.shape[-len(output_size) :], output_size))
    flat = x.flatten(-len(output_size))
    found = flat[..., places.flatten()].view(*flat.shape[:-1], *places.shape)
    value, inside = found.max(-1)
    return value, places.expand(found.shape).gather(-1, inside.unsqueeze(-1)).squeeze(-1)


def _places(sizes: Sequence[int], outputs: Sequence[int]) -> Any:
    """``[*outputs, window]``: the places of each window in the flattened space, in its order."""
    tables = [adaptive_windows(s, n).table() for s, n in zip(sizes, outputs, strict=True)]

    def places(axis: int, base: list[int]) -> Any:
        if axis == len(sizes):
            return base
        return [
            places(axis + 1, [b * sizes[axis] + i for b in base for i in window])
            for window in tables[axis]
        ]

    return places(0, [0])


_SCATTER = "scatter-add of the gradients to the places of the largest elements"
_MAX_POOL = "aten/src/ATen/native/cpu/MaxPoolKernel.cpp, cpu_max_pool_backward"
_ADAPTIVE = "aten/src/ATen/native/cpu/AdaptiveMaxPoolKernel.cpp"

ROWS = (
    Row((aten.max_pool2d_with_indices_backward.default,), _backward(2), _SCATTER, _MAX_POOL),
    Row((aten.max_pool3d_with_indices_backward.default,), _backward(3), _SCATTER, _MAX_POOL),
    Row((aten.adaptive_max_pool2d_backward.default,), _backward(2), _SCATTER, _ADAPTIVE),
    Row((aten.adaptive_max_pool3d_backward.default,), _backward(3), _SCATTER, _ADAPTIVE),
    Row(
        (aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
        _adaptive,
        "the maximum over a gather with a constant table of places, each window filled up with its "
        "last place",
        _ADAPTIVE,
    ),
)
