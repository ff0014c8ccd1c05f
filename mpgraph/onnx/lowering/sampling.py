"""Backward of sampling at the places of a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpgraph.errors import ExportError
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten
BILINEAR, NEAREST = range(2)
ZEROS, BORDER, REFLECTION = range(3)


def _source(place: Tensor, size: int, padding: int, align: bool) -> tuple[Tensor, Tensor]:
    """Where in the picture a place of the grid is, and how that moves with it."""
    slope = (size - 1) / 2 if align else size / 2
    found = (place + 1) * slope - (0.0 if align else 0.5)
    slopes = torch.full_like(found, slope)
    if padding == REFLECTION:
        found, turned = _reflected(found, size, align)
        slopes = slopes * turned
    if padding != ZEROS:
        inside = (found > 0) & (found < size - 1)
        found, slopes = found.clamp(0, size - 1), slopes * inside
    return found, slopes


def _reflected(place: Tensor, size: int, align: bool) -> tuple[Tensor, Tensor]:
    """Mirrored at both borders until it is inside, and -1 where it then runs backwards."""
    low, span = (0.0, size - 1.0) if align else (-0.5, float(size))
    if span == 0:
        return torch.zeros_like(place), torch.zeros_like(place)
    away = place - low
    sign = torch.where(away < 0, -1.0, 1.0)
    flips = (away.abs() / span).floor()
    rest = away.abs() - flips * span
    is_even = flips - 2 * (flips / 2).floor() == 0
    return torch.where(is_even, rest + low, span - rest + low), sign * torch.where(
        is_even, 1.0, -1.0
    )


def _grid_sampler_backward(
    grad: Tensor,
    x: Tensor,
    grid: Tensor,
    mode: int,
    padding: int,
    align_corners: bool,
    output_mask: Sequence[bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    if mode not in (BILINEAR, NEAREST):
        raise ExportError("grid_sample(mode='bicubic') cannot be trained in ONNX; use bilinear.")
    height, width = x.shape[2:]
    column, slope_x = _source(grid[..., 0], width, padding, align_corners)
    row, slope_y = _source(grid[..., 1], height, padding, align_corners)
    corners = _corners(column, row, mode)
    found = x.new_zeros([x.shape[0], x.shape[1], height * width])
    to_x, to_y = torch.zeros_like(column), torch.zeros_like(row)
    flat = x.flatten(2)
    for left, top, weight, by_x, by_y in corners:
        inside = (left >= 0) & (left < width) & (top >= 0) & (top < height)
        place = top.clamp(0, height - 1) * width + left.clamp(0, width - 1)
        place = place.to(torch.int64).flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        found = found.scatter_add(2, place, (grad * (weight * inside).unsqueeze(1)).flatten(2))
        value = flat.gather(2, place).view(grad.shape)
        change = (grad * value).sum(1) * inside
        to_x, to_y = to_x + change * by_x, to_y + change * by_y
    of_grid = torch.stack([to_x * slope_x, to_y * slope_y], -1)
    return found.view(x.shape), of_grid if output_mask[1] else None


def _corners(column: Tensor, row: Tensor, mode: int) -> list[tuple[Tensor, ...]]:
    """The picture's places that count: where, how much, and how that changes with x and y."""
    none = torch.zeros_like(column)
    if mode == NEAREST:
        return [(column.round(), row.round(), torch.ones_like(column), none, none)]
    left, top = column.floor(), row.floor()
    x, y = column - left, row - top
    return [
        (left, top, (1 - x) * (1 - y), y - 1, x - 1),
        (left + 1, top, x * (1 - y), 1 - y, -x),
        (left, top + 1, (1 - x) * y, -y, 1 - x),
        (left + 1, top + 1, x * y, y, x),
    ]


ROWS = (
    Row(
        (aten.grid_sampler_2d_backward.default,),
        _grid_sampler_backward,
        "scatter-add of weight * g to the corners; for the grid, sum(g * value) * change of weight",
        "aten/src/ATen/native/GridSampler.cpp, grid_sampler_2d_cpu_fallback_backward",
    ),
)
