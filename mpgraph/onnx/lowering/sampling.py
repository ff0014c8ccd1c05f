"""Sampling at the places of a grid, and its backward."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten
LINEAR, NEAREST, CUBIC = range(3)
ZEROS, BORDER, REFLECTION = range(3)
# Of the cubic convolution; torch's, as OpenCV's.
SHARPNESS = -0.75


@dataclasses.dataclass(frozen=True)
class _Tap:
    """One place along an axis that counts: where, how much, and how that changes on the way.

    Attributes:
        place: Where, a whole number.
        weight: How much.
        change: Of the weight, by the source place.
    """

    place: Tensor
    weight: Tensor
    change: Tensor


def _taps(grid: Tensor, size: int, mode: int, padding: int, align: bool) -> list[_Tap]:
    """What counts along one axis; changes are by the grid's own numbers."""
    slope = (size - 1) / 2 if align else size / 2
    source = (grid + 1) * slope - (0.0 if align else 0.5)
    if mode == CUBIC:
        taps = _cubic(source)
        return [
            _Tap(_padded(tap.place, size, padding, align)[0], tap.weight, tap.change * slope)
            for tap in taps
        ]
    source, turned = _padded(source, size, padding, align)
    taps = _nearest(source) if mode == NEAREST else _linear(source)
    return [_Tap(tap.place, tap.weight, tap.change * slope * turned) for tap in taps]


def _nearest(source: Tensor) -> list[_Tap]:
    return [_Tap(source.round(), torch.ones_like(source), torch.zeros_like(source))]


def _linear(source: Tensor) -> list[_Tap]:
    first = source.floor()
    part, one = source - first, torch.ones_like(source)
    return [_Tap(first, 1 - part, -one), _Tap(first + 1, part, one)]


def _cubic(source: Tensor) -> list[_Tap]:
    first = source.floor()
    part = source - first
    found = []
    for step in (-1, 0, 1, 2):
        away = part - step  # from -2 to 2
        weight, change = _near(away.abs()) if step in (0, 1) else _far(away.abs())
        found.append(_Tap(first + step, weight, change * (1.0 if step < 1 else -1.0)))
    return found


def _near(x: Tensor) -> tuple[Tensor, Tensor]:
    a = SHARPNESS
    return ((a + 2) * x - (a + 3)) * x * x + 1, (3 * (a + 2) * x - 2 * (a + 3)) * x


def _far(x: Tensor) -> tuple[Tensor, Tensor]:
    a = SHARPNESS
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a, (3 * a * x - 10 * a) * x + 8 * a


def _padded(place: Tensor, size: int, padding: int, align: bool) -> tuple[Tensor, Tensor]:
    """Where a place of the picture leads to, and how that moves with it: 1, 0 or -1."""
    turned = torch.ones_like(place)
    if padding == REFLECTION:
        place, turned = _reflected(place, size, align)
    if padding != ZEROS:
        inside = (place > 0) & (place < size - 1)
        place, turned = place.clamp(0, size - 1), turned * inside
    return place, turned


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
    turned = sign * torch.where(is_even, 1.0, -1.0)
    return torch.where(is_even, rest + low, span - rest + low), turned


@dataclasses.dataclass(frozen=True)
class _Corner:
    """One place of the picture that counts for each place of the grid.

    Attributes:
        place: ``[batch, channels, places]``, in the flattened picture.
        inside: ``[batch, *grid]``, whether it is in the picture.
        taps: One per axis of the picture.
    """

    place: Tensor
    inside: Tensor
    taps: tuple[_Tap, ...]

    def weight(self) -> Tensor:
        """How much it counts."""
        return math.prod((tap.weight for tap in self.taps), start=self.inside)

    def change(self, axis: int) -> Tensor:
        """How that changes along an axis of the picture."""
        factors = (tap.change if i == axis else tap.weight for i, tap in enumerate(self.taps))
        return math.prod(factors, start=self.inside)


def _corners(x: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> Iterator[_Corner]:
    sizes = x.shape[2:]
    # The grid names the last axis first.
    axes = [_taps(grid[..., -1 - i], size, mode, padding, align) for i, size in enumerate(sizes)]
    for taps in itertools.product(*axes):
        inside, place = torch.ones_like(taps[0].place), torch.zeros_like(taps[0].place)
        for tap, size in zip(taps, sizes, strict=True):
            inside = inside * ((tap.place >= 0) & (tap.place < size))
            place = place * size + tap.place.clamp(0, size - 1)
        wide = place.to(torch.int64).flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        yield _Corner(wide, inside, taps)


def _grid_sampler(x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    flat = x.flatten(2)
    shape = [x.shape[0], x.shape[1], *grid.shape[1:-1]]
    found = x.new_zeros(shape)
    for corner in _corners(x, grid, mode, padding, align_corners):
        found = found + flat.gather(2, corner.place).view(shape) * corner.weight().unsqueeze(1)
    return found


def _grid_sampler_backward(
    grad: Tensor,
    x: Tensor,
    grid: Tensor,
    mode: int,
    padding: int,
    align_corners: bool,
    output_mask: Sequence[bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    flat = x.flatten(2)
    found = torch.zeros_like(flat)
    to_grid = [torch.zeros_like(grid[..., 0]) for _ in x.shape[2:]]
    for corner in _corners(x, grid, mode, padding, align_corners):
        share = (grad * corner.weight().unsqueeze(1)).flatten(2)
        found = found.scatter_add(2, corner.place, share)
        if output_mask[1] and mode != NEAREST:
            value = (grad * flat.gather(2, corner.place).view(grad.shape)).sum(1)
            to_grid = [to + value * corner.change(i) for i, to in enumerate(to_grid)]
    of_grid = torch.stack(to_grid[::-1], -1) if output_mask[1] else None
    return found.view(x.shape), of_grid


_SOURCE = "aten/src/ATen/native/GridSampler.cpp and GridSampler.h"
_CORNERS = "the corners of a place: their weights are products over axes, of a line or a cubic"

ROWS = (
    Row(
        (aten.grid_sampler_3d.default,), _grid_sampler,
        f"sum of weight * value over {_CORNERS}", _SOURCE,
    ),
    Row(
        (aten.grid_sampler_2d_backward.default, aten.grid_sampler_3d_backward.default),
        _grid_sampler_backward,
        f"scatter-add of weight * g to {_CORNERS}; for the grid, sum(g * value) * change of weight",
        _SOURCE,
    ),
)  # fmt: skip
