"""Factorisations of small matrices and what is solved by them, one row of the matrix at a time.

Each takes as many steps as the matrix has rows, of some ten operators: good for matrices up to some
tens of rows, such as covariances, and the weights of invertible convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpgraph.errors import ExportError
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten
# Above this a graph would have thousands of nodes for one matrix.
LARGEST = 64


def _size(matrix: Tensor) -> int:
    size = matrix.shape[-1]
    if not isinstance(size, int) or size > LARGEST or matrix.shape[-2] != size:
        raise ExportError(
            f"a matrix of {matrix.shape[-2]} by {size} cannot be factorised in an exported file: "
            f"square ones of up to {LARGEST} rows can, whose size is fixed."
        )
    return size


def _batch(matrix: Tensor, given: Tensor) -> Any:
    shape: Any = torch.broadcast_shapes
    return shape(matrix.shape[:-2], given.shape[:-2])


def _swapped(step: int, pivot: Tensor, size: int) -> Tensor:
    """``[..., row]``: where each row comes from when rows ``step`` and ``pivot`` change places."""
    rows = torch.arange(size)
    return torch.where(rows == step, pivot, torch.where(rows == pivot, step, rows))


def _take_rows(matrix: Tensor, order: Tensor) -> Tensor:
    """The rows in an order of their own for each matrix."""
    return matrix.gather(-2, order.unsqueeze(-1).expand(matrix.shape))


def _lu(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss's elimination with the largest pivot: ``L - 1 + U`` and the pivots, from 1 on."""
    size, pivots = _size(matrix), []
    rows, columns = torch.arange(size).unsqueeze(1), torch.arange(size)
    for step in range(size):
        candidates = matrix[..., step].abs().narrow(-1, step, size - step)
        pivot = candidates.argmax(-1, keepdim=True) + step
        pivots.append(pivot + 1)
        matrix = _take_rows(matrix, _swapped(step, pivot, size))
        row, column = matrix[..., step : step + 1, :], matrix[..., step : step + 1]
        share = torch.where(rows > step, column / row[..., step : step + 1], 0.0)
        rest = matrix - share * torch.where(columns > step, row, 0.0)
        matrix = torch.where((columns == step) & (rows > step), share, rest)
    return matrix, torch.cat(pivots, -1).to(torch.int32)


def _solve_triangular(
    matrix: Tensor, given: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """Substitution; only the triangle is read."""
    if not left:
        turned = _solve_triangular(
            matrix.mT, given.mT, upper=not upper, unitriangular=unitriangular
        )
        return turned.mT
    size = _size(matrix)
    rows = torch.arange(size).unsqueeze(1)
    found = given.expand(_batch(matrix, given) + given.shape[-2:])
    for step in reversed(range(size)) if upper else range(size):
        column = matrix[..., step : step + 1]
        solved = found[..., step : step + 1, :]
        if not unitriangular:
            solved = solved / column[..., step : step + 1, :]
        is_open = rows < step if upper else rows > step
        found = found - torch.where(is_open, column, 0.0) * solved
        found = torch.where(rows == step, solved, found)
    return found


def _order(pivots: Tensor, size: int) -> Tensor:
    """``[..., row]``: which row of a matrix the exchanges bring to each place."""
    order = torch.arange(size).expand(pivots.shape)
    for step in range(size):
        pivot = pivots[..., step : step + 1].to(torch.int64) - 1
        order = order.gather(-1, _swapped(step, pivot, size))
    return order


def _inverse_order(order: Tensor, size: int) -> Tensor:
    is_there = order.unsqueeze(-2) == torch.arange(size).unsqueeze(-1)  # [..., row, place]
    return is_there.to(torch.int64).argmax(-1)


def _lu_solve(
    factors: Tensor, pivots: Tensor, given: Tensor, *, left: bool = True, adjoint: bool = False
) -> Tensor:
    if not left:
        return _lu_solve(factors, pivots, given.mT, adjoint=not adjoint).mT
    size = _size(factors)
    batch = _batch(factors, given)
    given = given.expand(batch + given.shape[-2:])
    order = _order(pivots, size).expand((*batch, size))
    if adjoint:
        turned = _solve_triangular(factors.mT, given, upper=False)
        turned = _solve_triangular(factors.mT, turned, upper=True, unitriangular=True)
        return _take_rows(turned, _inverse_order(order, size))
    found = _take_rows(given, order)
    found = _solve_triangular(factors, found, upper=False, unitriangular=True)
    return _solve_triangular(factors, found, upper=True)


def _no_info(matrix: Tensor) -> Tensor:
    """That it worked; a singular matrix shows in infinite or undefined numbers."""
    return torch.zeros(matrix.shape[:-2], dtype=torch.int32)


def _inverse(matrix: Tensor, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    factors, pivots = _lu(matrix)
    one = torch.eye(_size(matrix), dtype=matrix.dtype).expand(matrix.shape)
    return _lu_solve(factors, pivots, one), _no_info(matrix)


def _solve(
    matrix: Tensor, given: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors, pivots = _lu(matrix)
    is_vector = given.dim() == 1 or given.shape == matrix.shape[:-1]
    wide = given.unsqueeze(-1) if is_vector else given
    found = _lu_solve(factors, pivots, wide, left=left)
    return found.squeeze(-1) if is_vector else found, factors, pivots, _no_info(matrix)


def _sign(factors: Tensor, pivots: Tensor) -> Tensor:
    """Of the exchanges: -1 for each row that another one has replaced."""
    kept = pivots.to(torch.int64) == torch.arange(1, factors.shape[-1] + 1)
    return torch.where(kept, 1.0, -1.0).prod(-1).to(factors.dtype)


def determinant(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a matrix, as ``aten._linalg_det`` returns it, by an operator that autograd knows.

    The backward of ``_linalg_det`` solves with its factors, which are those of the transposed
    matrix if that lies otherwise in memory: a graph knows nothing of that.
    """
    factors, pivots, _ = aten.linalg_lu_factor_ex(matrix)
    diagonal = factors.diagonal(0, -2, -1)
    return diagonal.prod(-1) * _sign(factors, pivots), factors, pivots


def log_determinant(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sign and logarithm of a determinant, as ``aten._linalg_slogdet`` returns them."""
    factors, pivots, _ = aten.linalg_lu_factor_ex(matrix)
    diagonal = factors.diagonal(0, -2, -1)
    sign = diagonal.sign().prod(-1) * _sign(factors, pivots)
    return sign.detach(), diagonal.abs().log().sum(-1), factors, pivots


def _lu_factor(
    matrix: Tensor, *, pivot: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    if not pivot:
        raise ExportError("a factorisation without pivots cannot be exported.")
    return (*_lu(matrix), _no_info(matrix))


def _cholesky(
    matrix: Tensor, *, upper: bool = False, check_errors: bool = False
) -> tuple[Tensor, Tensor]:
    matrix = matrix.mT if upper else matrix
    size = _size(matrix)
    rows, columns = torch.arange(size).unsqueeze(1), torch.arange(size)
    found = torch.zeros_like(matrix)
    for step in range(size):
        column = matrix[..., step : step + 1]
        share = column / column[..., step : step + 1, :].sqrt()
        share = torch.where(rows >= step, share, 0.0)
        found = torch.where(columns == step, share, found)
        matrix = matrix - share * share.mT
    return found.mT if upper else found, _no_info(matrix)


def _lu_unpack(
    factors: Tensor, pivots: Tensor, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    size = _size(factors)
    one = torch.eye(size, dtype=factors.dtype)
    order = _order(pivots, size)
    exchanged = (order.unsqueeze(-2) == torch.arange(size).unsqueeze(-1)).to(factors.dtype)
    return exchanged, factors.tril(-1) + one, factors.triu()


def _cholesky_solve(given: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    lower = factor.mT if upper else factor
    return _solve_triangular(lower.mT, _solve_triangular(lower, given, upper=False), upper=True)


_GOLUB = "Golub and Van Loan, Matrix computations"
_PIVOTS = "Gauss's elimination with partial pivoting, unrolled over the rows"

ROWS = (
    Row((aten.linalg_lu_factor_ex.default,), _lu_factor, _PIVOTS, f"{_GOLUB}, 3.4.1"),
    Row(
        (aten.linalg_lu_solve.default,), _lu_solve,
        "the rows in the order of the pivots, then two substitutions", f"{_GOLUB}, 3.4.3",
    ),
    Row((aten.linalg_inv_ex.default,), _inverse, f"solve of 1, by {_PIVOTS}", f"{_GOLUB}, 3.4.1"),
    Row((aten._linalg_solve_ex.default,), _solve, _PIVOTS, f"{_GOLUB}, 3.4.1"),
    Row(
        (aten.linalg_solve_triangular.default,), _solve_triangular,
        "substitution, unrolled over the rows", f"{_GOLUB}, 3.1",
    ),
    Row(
        (aten.linalg_cholesky_ex.default,), _cholesky,
        "column k is what is left of it / sqrt of its pivot; the rest less its outer product",
        f"{_GOLUB}, 4.2.5",
    ),
    Row(
        (aten.cholesky_solve.default,), _cholesky_solve, "two substitutions", f"{_GOLUB}, 4.2.5",
    ),
    Row((aten._linalg_det.default,), determinant, "the product of the pivots", f"{_GOLUB}, 3.2.5"),
    Row(
        (aten._linalg_slogdet.default,), log_determinant,
        "the sum of the logarithms of the pivots", f"{_GOLUB}, 3.2.5",
    ),
    Row(
        (aten.lu_unpack.default,), _lu_unpack, "the triangles, and 1 in the order of the pivots",
        "torch.lu_unpack",
    ),
)  # fmt: skip
