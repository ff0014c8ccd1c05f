"""Backward of resizing, as one product per axis with a constant matrix.

Every mode of ``interpolate`` is linear in the picture and a product over axes, so the matrix of an
axis is what the operator itself makes of unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten
Matrix = Callable[[int, int, Any, Any], Tensor]


def _linear(size: int, out: int, align: Any, scale: Any) -> Tensor:
    return aten.upsample_linear1d(torch.eye(size)[None], [out], bool(align), scale)[0]  # type: ignore[no-any-return]


def _nearest(size: int, out: int, align: Any, scale: Any) -> Tensor:
    return aten.upsample_nearest1d(torch.eye(size)[None], [out], scale)[0]  # type: ignore[no-any-return]


def _nearest_exact(size: int, out: int, align: Any, scale: Any) -> Tensor:
    return aten._upsample_nearest_exact1d(torch.eye(size)[None], [out], scale)[0]  # type: ignore[no-any-return]


def _of_pictures(resize: Any) -> Matrix:
    """Of an operator on pictures: the unit vectors are its lines."""

    def matrix(size: int, out: int, align: Any, scale: Any) -> Tensor:
        picture = torch.eye(size)[None, None]
        return resize(picture, [size, out], bool(align), None, scale)[0, 0]  # type: ignore[no-any-return]

    return matrix


_bilinear_aa = _of_pictures(aten._upsample_bilinear2d_aa)
_bicubic_aa = _of_pictures(aten._upsample_bicubic2d_aa)


def _along(x: Tensor, place: int, weights: Tensor) -> Tensor:
    return (x.transpose(-1, place) @ weights).transpose(-1, place)


def _forward(matrix: Matrix, *, corners: bool = True) -> Callable[..., Any]:
    """What onnxruntime's Resize does not do: factors that the sizes alone do not tell.

    With antialiasing it is not exact where ``corners`` are aligned, either.
    """

    def forward(x: Tensor, output_size: Sequence[int], align: bool, *scales: Any) -> Any:
        places = range(2, x.dim())
        axes = [*zip(places, output_size, scales or [None] * len(places), strict=True)]
        exact = all(scale is None or x.shape[place] * scale == out for place, out, scale in axes)
        if exact and not (align and corners):
            return NotImplemented
        for place, out, scale in axes:
            with _disable_current_modes():
                weights = matrix(x.shape[place], out, align, scale).to(x.dtype)
            x = _along(x, place, weights)
        return x

    return forward


def _backward(matrix: Matrix, *, aligns: bool) -> Callable[..., Tensor]:
    def backward(
        grad: Tensor, output_size: Sequence[int], input_size: Sequence[int], *rest: Any
    ) -> Tensor:
        align, scales = (rest[0], rest[1:]) if aligns else (False, rest)
        rank = len(output_size)
        scales = tuple(scales) + (None,) * (rank - len(scales))
        for axis in range(rank):
            with _disable_current_modes():
                weights = matrix(input_size[2 + axis], output_size[axis], align, scales[axis])
                weights = weights.T.contiguous().to(grad.dtype)
            grad = _along(grad, 2 + axis, weights)
        return grad

    return backward


_FORMULA = "one matrix product per axis with what the operator makes of unit vectors"
_SOURCE = "aten/src/ATen/native/cpu/UpSampleKernel.cpp: linear, and a product over axes"


def _row(matrix: Matrix, *targets: Any, aligns: bool = True) -> Row:
    return Row(targets, _backward(matrix, aligns=aligns), _FORMULA, _SOURCE)


ROWS = (
    Row((aten.upsample_linear1d.default,), _forward(_linear, corners=False), _FORMULA, _SOURCE),
    Row((aten._upsample_bilinear2d_aa.default,), _forward(_bilinear_aa), _FORMULA, _SOURCE),
    Row((aten._upsample_bicubic2d_aa.default,), _forward(_bicubic_aa), _FORMULA, _SOURCE),
    _row(
        _linear,
        aten.upsample_linear1d_backward.default,
        aten.upsample_bilinear2d_backward.default,
        aten.upsample_trilinear3d_backward.default,
    ),
    _row(_of_pictures(aten.upsample_bicubic2d), aten.upsample_bicubic2d_backward.default),
    _row(_bilinear_aa, aten._upsample_bilinear2d_aa_backward.default),
    _row(_bicubic_aa, aten._upsample_bicubic2d_aa_backward.default),
    _row(
        _nearest,
        aten.upsample_nearest1d_backward.default,
        aten.upsample_nearest2d_backward.default,
        aten.upsample_nearest3d_backward.default,
        aligns=False,
    ),
    _row(
        _nearest_exact,
        aten._upsample_nearest_exact1d_backward.default,
        aten._upsample_nearest_exact2d_backward.default,
        aten._upsample_nearest_exact3d_backward.default,
        aligns=False,
    ),
)
