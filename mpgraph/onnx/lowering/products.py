"""Products of vectors, and distances."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mpgraph.errors import ExportError
from mpgraph.onnx.lowering.constants import constant
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(1)).squeeze(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(0) @ y.unsqueeze(1)).view([])


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    dims: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    values = []
    for x, axes in ((a, expand_a), (b, expand_b), (c, expand_c)):
        for axis in axes:
            x = x.unsqueeze(axis)
        values.append(x)
    return (values[0] * values[1] * values[2]).sum([*dims])


def _differences(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-2) - y.unsqueeze(-3)


def _cdist(x: Tensor, y: Tensor, p: float, mode: int | None = None) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(_differences(x, y), p, -1)
    return found


def _cdist_backward(grad: Tensor, x: Tensor, y: Tensor, p: float, distance: Tensor) -> Tensor:
    return (grad.unsqueeze(-1) * _shares(_differences(x, y), distance.unsqueeze(-1), p)).sum(-2)


def _shares(apart: Tensor, found: Tensor, p: float) -> Tensor:
    """How a norm changes with each difference."""
    if p == 0:  # how many differ
        share = torch.zeros_like(apart)
    elif p == 1:
        share = apart.sign()
    elif p == float("inf"):
        share = apart.sign() * (apart.abs() == found)
    else:
        # Two equal points have no direction; torch gives 0.
        safe = torch.where(found == 0, 1.0, found)
        share = apart.sign() * apart.abs() ** (p - 1) / safe ** (p - 1)
        share = torch.where(found == 0, 0.0, share)
    return share


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each pair, in the order of pdist."""
    if not isinstance(x.shape[0], int):
        raise ExportError("pdist needs a fixed number of rows; use cdist.")
    pairs = [*itertools.combinations(range(x.shape[0]), 2)]
    return constant([i for i, _ in pairs]), constant([j for _, j in pairs])


def _pdist(x: Tensor, p: float = 2) -> Tensor:
    first, second = _pairs(x)
    found: Tensor = torch.linalg.vector_norm(x[first] - x[second], p, -1)
    return found


def _pdist_backward(grad: Tensor, x: Tensor, p: float, distance: Tensor) -> Tensor:
    first, second = _pairs(x)
    shares = _shares(x[first] - x[second], distance.unsqueeze(-1), p) * grad.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, first, shares).index_add(0, second, -shares)


_FUSED = "onnxruntime 1.31 folds a transpose into a product with a vector, and transposes nothing"

ROWS = (
    Row((aten.mv.default,), _mv, "mm with a column", _FUSED),
    Row((aten.dot.default,), _dot, "mm of a row with a column", _FUSED),
    Row(
        (aten._trilinear.default,), _trilinear, "sum(a * b * c)",
        "aten/src/ATen/native/Linear.cpp, _trilinear",
    ),
    Row(
        (aten._cdist_forward.default,), _cdist, "norm(x[:, None] - y[None])",
        "aten/src/ATen/native/cpu/DistanceOpsKernel.cpp",
    ),
    Row(
        (aten._cdist_backward.default,), _cdist_backward,
        "sum(g * sign(d) * |d|**(p - 1) / distance**(p - 1))",
        "aten/src/ATen/native/cpu/DistanceOpsKernel.cpp",
    ),
    Row(
        (aten._pdist_forward.default,), _pdist, "norm(x[i] - x[j]) for i < j",
        "aten/src/ATen/native/cpu/DistanceOpsKernel.cpp",
    ),
    Row(
        (aten._pdist_backward.default,), _pdist_backward, "as for cdist, of pairs",
        "aten/src/ATen/native/cpu/DistanceOpsKernel.cpp",
    ),
)  # fmt: skip
