"""Views and copies that only torch tells apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mpgraph.errors import ExportError
from mpgraph.onnx.lowering.constants import constant
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def _squeeze(x: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    axes = {d % x.dim() for d in (range(x.dim()) if dims is None else dims) if x.dim()}
    sizes = [n for i, n in enumerate(x.shape) if not (i in axes and n == 1)]
    return x.view(sizes)


def _squeeze_one(x: Tensor, dim: int) -> Any:
    # ONNX's Squeeze refuses an axis of another size, where torch leaves it.
    return NotImplemented if x.dim() and x.shape[dim] == 1 else x.clone()


def _empty_permuted(size: Sequence[int], physical: Any, **options: Any) -> Tensor:
    return torch.zeros(size, dtype=options.get("dtype"), device=options.get("device"))


def _zeros(size: Sequence[int], **options: Any) -> Tensor:
    return torch.zeros(size, dtype=options.get("dtype"))


def _as_strided(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    if not size and x.numel() == 1:
        return x.view([])
    start = offset or 0
    if start == 0 and _lies_so(x, size, stride):
        return x.clone()
    order = dense_order(size, stride)
    if start == 0 and x.is_contiguous() and order is not None and x.numel() == math.prod(size):
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return x.reshape([size[d] for d in order]).permute(inverse).clone()
    if not x.is_contiguous():
        raise ExportError(_MEMORY)
    return x.flatten()[constant(places_of(x, size, stride, start))].view(list(size))


_MEMORY = (
    "as_strided reads and writes memory, of which an ONNX graph knows nothing: it is only "
    "translated for contiguous tensors of fixed size, and where it names all of their elements "
    "once. Use slices, unfold or reshape."
)


def dense_order(size: Sequence[int], stride: Sequence[int]) -> list[int] | None:
    """The axes as they lie in memory, the outermost first, if these strides leave no gap.

    An axis of size 1 lies anywhere.
    """
    long = [d for d in range(len(size)) if not _is(size[d], 1)]
    order: list[int] = []
    step: Any = 1
    while long:
        found = next((d for d in reversed(long) if _is(stride[d], step)), None)
        if found is None:
            return None
        long.remove(found)
        order.insert(0, found)
        step = step * size[found]
    return [d for d in range(len(size)) if d not in order] + order


def _is(size: Any, other: Any) -> bool:
    """Whether two sizes are equal for every batch; nothing is fixed by asking."""
    return statically_known_true(size == other)


def places_of(x: Tensor, size: Sequence[int], stride: Sequence[int], start: int) -> list[int]:
    """Which elements of ``x``, counted in a row, strides reach.

    Raises:
        ExportError: A size is none that is known, or they reach beyond ``x``.
    """
    if any(not isinstance(n, int) for n in (start, *size, *stride, *x.shape)):
        raise ExportError(_MEMORY)
    places = [start]
    for n, step in zip(size, stride, strict=True):
        places = [base + i * step for base in places for i in range(n)]
    if places and not 0 <= min(places) <= max(places) < x.numel():
        raise ExportError(_MEMORY)
    return places


def _lies_so(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor lies in memory as asked for; of an axis of size 1, any stride does."""
    steps = zip(x.shape, x.stride(), stride, strict=False)
    return tuple(x.shape) == tuple(size) and all(n == 1 or a == b for n, a, b in steps)


def _view(x: Tensor, size: Sequence[int]) -> Any:
    # Decompositions do not always lay their results out as the kernels do whose views these are.
    return NotImplemented if x.is_contiguous() else x.contiguous().view(size)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape)


def _new_empty_strided(x: Tensor, size: Sequence[int], stride: Any, **options: Any) -> Tensor:
    return x.new_zeros(size, dtype=options.get("dtype"))


ROWS = (
    Row(
        (aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default),
        lambda x, size, stride=None: _view(x, size), "a reshape", "torch.reshape",
    ),
    Row(
        (aten.squeeze.default, aten.squeeze.dims), _squeeze, "a view without the axes of size 1",
        "torch.squeeze; a symbolic size is not 1",
    ),
    Row((aten.squeeze.dim,), _squeeze_one, "itself, if the axis has another size", "torch.squeeze"),
    Row(
        (aten.empty_permuted.default,), _empty_permuted, "zeros", "what it holds is not defined",
    ),
    Row(
        (aten._efficientzerotensor.default,), _zeros, "zeros",
        "the gradient of a constant, of which torch stores nothing",
    ),
    Row(
        (aten.new_empty_strided.default,), _new_empty_strided, "zeros",
        "what it holds is not defined",
    ),
    Row(
        (aten.as_strided.default,), _as_strided, "a gather of offset + sum(i * stride)",
        "torch.as_strided, of contiguous memory",
    ),
    Row((aten.copy.default,), _copy, "cast and expand", "torch.Tensor.copy_"),
)  # fmt: skip
