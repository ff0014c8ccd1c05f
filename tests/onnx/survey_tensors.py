"""Operators on tensors that survey_cases has not: indexing, order, sums, matrices, functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .survey_row import Bools, Ints, Positive, Row, row

_LINES = ((3, 5),)


def _scatter(how: str, inside: bool = True):
    return lambda x, i, s: x.scatter_reduce(1, i, s, how, include_self=inside)


_SCATTER = ((3, 5), Ints((3, 4), 5), (3, 4))


def _spd(x: Tensor) -> Tensor:
    """A symmetric matrix with positive eigenvalues."""
    return x @ x.mT + 2 * torch.eye(x.shape[-1], dtype=x.dtype)


def _solid(x: Tensor) -> Tensor:
    """A matrix far from singular, that needs rows exchanged."""
    return (x + 3 * torch.eye(x.shape[-1], dtype=x.dtype)).flip(-2)


ROWS: tuple[Row, ...] = (
    # Lookups
    row("scatter_reduce sum", _scatter("sum"), _SCATTER),
    row("scatter_reduce mean", _scatter("mean"), _SCATTER),
    row("scatter_reduce amin", _scatter("amin"), _SCATTER),
    row("scatter_reduce prod", _scatter("prod"), (Positive((3, 5)), Ints((3, 4), 5), Positive((3, 4)))),
    row("scatter_reduce sum of others", _scatter("sum", False), _SCATTER),
    row("scatter_reduce mean of others", _scatter("mean", False), _SCATTER),
    row("scatter_reduce amax of others", _scatter("amax", False), _SCATTER),
    row("scatter_reduce prod of others", _scatter("prod", False), (Positive((3, 5)), Ints((3, 4), 5), Positive((3, 4)))),
    row("scatter of a number", lambda x, i: x.scatter(1, i, 2.0), ((3, 5), Ints((3, 4), 5))),
    row("scatter_add rows", lambda x, i, s: x.scatter_add(0, i[:, None].expand(4, 3), s), ((5, 3), Ints((4,), 5), (4, 3))),
    row("index_add weighted", lambda x, i, v: x.index_add(1, i, v, alpha=0.5), ((3, 5), Ints((4,), 5), (3, 4))),
    row("index_fill", lambda x, i: x.index_fill(1, i, 0.5), ((3, 5), Ints((2,), 5))),
    row("index_reduce mean", lambda x, i, v: x.index_reduce(0, i, v, "mean"), ((5, 3), Ints((4,), 5), (4, 3))),
    row("index_put of constants", lambda x, v: x.index_put((torch.tensor([3, 1]),), v), ((5, 3), (2, 3))),
    row("index_put by two", lambda x, i, j, v: x.index_put((i, j), v, accumulate=True), ((5, 3), Ints((4,), 5), Ints((4,), 3), (4,))),
    row("index_put by a mask", lambda x, m: torch.where(m, x, 0.0).index_put((m,), torch.tensor(1.0, dtype=x.dtype)), ((3, 5), Bools((3, 5)))),
    row("index by two neighbours", lambda x, i, j: x[:, i, j], ((2, 3, 4), Ints((6,), 3), Ints((6,), 4))),
    row("index by a matrix", lambda x, i: x[i], ((5, 3), Ints((2, 4), 5))),
    row("index negative", lambda x, i: x[:, i - 5], ((3, 5), Ints((4,), 5))),
    row("index written", lambda x, v: _written(x, v), ((3, 5), (3, 2))),
    row("masked_fill by a tensor", lambda x, m, v: x.masked_fill(m, v), ((3, 5), Bools((3, 5)), ())),
    row("take", lambda x, i: x.take(i), ((3, 5), Ints((4,), 15))),
    row("put", lambda x, i, v: x.put(i, v, accumulate=True), ((3, 5), Ints((4,), 15), (4,))),
    row("diagonal scattered", lambda x, y: torch.diagonal_scatter(x, y, 1), ((4, 5), (4,)), fixed=True),
    row("bucketize", lambda x: x * torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype)), _LINES),
    row("searchsorted", lambda x, y: y * torch.searchsorted(x.sort(-1)[0], y, right=True), ((3, 5), (3, 2))),
    # Order
    row("sort stable", lambda x: torch.sort(x, dim=-1, stable=True)[0], ((3, 7),)),
    row("msort", torch.msort, ((3, 7),)),
    row("topk unsorted", lambda x: x.topk(3, 0, sorted=False)[0].sum(0), ((7, 3),)),
    row("kthvalue kept", lambda x: x.kthvalue(2, 0, keepdim=True)[0], ((5, 3),)),
    row("nanmedian", lambda x: x.nanmedian(1)[0], ((3, 7),)),
    row("nanmedian of all", lambda x: x.nanmedian(), ((3, 7),)),
    row("mode", lambda x: (x * 2).round().mode(-1)[0] + x.mode(0)[0].sum(), ((3, 7),)),
    row("quantile", lambda x: x.quantile(0.3, 1), ((3, 7),), widened=True),
    row("quantile of several", lambda x: torch.quantile(x, torch.tensor([0.1, 0.5, 0.8], dtype=x.dtype), 0, keepdim=True), ((7, 3),), widened=True),
    row("nanquantile", lambda x: x.nanquantile(0.3, 1), ((3, 7),), widened=True),
    row("aminmax", lambda x: torch.stack(x.aminmax(dim=1)), ((3, 7),)),
    row("max of all", lambda x: x.max(), ((3, 7),)),
    row("min", lambda x: x.min(0)[0], ((3, 7),)),
    row("minimum", torch.minimum, ((3, 5), (3, 5))),
    row("fmax", lambda x, y: torch.fmax(x, y) + torch.fmin(x, 2 * y), ((3, 5), (3, 5))),
    row("clamp by tensors", lambda x, y: x.clamp(y - 1, y), ((3, 5), (3, 5))),
    row("clamp from below", lambda x: x.clamp(min=0.1) + x.clamp_max(0.3), _LINES),
    row("cummin", lambda x: x.cummin(1)[0], _LINES),
    row("argmax", lambda x: x * torch.nn.functional.one_hot(x.argmax(1), 5), _LINES, quick=True),
    # Sums
    row("sum of all", lambda x: x.sum(), _LINES),
    row("nansum", lambda x: (x / (x > 0)).nan_to_num(0).nansum(1), _LINES),
    row("nanmean", lambda x: x.nanmean(1), _LINES),
    row("cumsum reversed", lambda x: x.flip(1).cumsum(1).flip(1), _LINES),
    row("cumprod of a line", lambda x: x.cumprod(0), (Positive((5,)),), fixed=True),
    row("cumprod with zeros", lambda x: x.relu().cumprod(1), _LINES),
    row("prod with zeros", lambda x: x.relu().prod(1), ((3, 3),)),
    row("logcumsumexp of columns", lambda x: (x * 40).logcumsumexp(0), ((5, 3),)),
    row("cumulative_trapezoid", lambda x: torch.cumulative_trapezoid(x, dim=1), _LINES),
    row("var_mean", lambda x: torch.stack(torch.var_mean(x, 1)), _LINES),
    row("std_mean", lambda x: torch.stack(torch.std_mean(x, 0, correction=0)), _LINES),
    row("count_nonzero", lambda x: x * torch.count_nonzero(x > 0, 1)[:, None], _LINES),
    row("softmax of columns", lambda x: x.softmax(0), ((3, 5), ), ((2, 3, 4),)),
    row("logsumexp kept", lambda x: x.logsumexp(-1, keepdim=True), _LINES),
    # Matrices
    row("tensordot", lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 1])), ((2, 3, 4), (3, 4, 5))),
    row("kron", torch.kron, ((2, 3), (2, 2)), fixed=True),
    row("cross", lambda a, b: torch.linalg.cross(a, b, dim=1), ((4, 3), (4, 3))),
    row("chain_matmul", lambda a, b, c: torch.linalg.multi_dot([a, b, c]), ((2, 3), (3, 4), (4, 2)), fixed=True),
    row("matrix_power", lambda x: torch.linalg.matrix_power(x, 3), ((2, 3, 3),)),
    row("inner", torch.inner, ((2, 4), (3, 4))),
    row("dot", torch.dot, ((4,), (4,))),
    row("vdot", torch.vdot, ((4,), (4,))),
    row("vecdot", torch.linalg.vecdot, ((2, 4), (2, 4))),
    row("addmv", torch.addmv, ((3,), (3, 4), (4,))),
    row("addr", torch.addr, ((3, 4), (3,), (4,))),
    row("addbmm", torch.addbmm, ((3, 5), (2, 3, 4), (2, 4, 5)), fixed=True),
    row("einsum of diagonals", lambda a, b: torch.einsum("bii,bij->bj", a, b), ((2, 3, 3), (2, 3, 4))),
    row("vander", lambda x: torch.linalg.vander(x, N=4), ((3,),), widened=True),
    row("cosine_similarity of rows", lambda a, b: torch.cosine_similarity(a[:, None], b[None], dim=-1), ((3, 4), (5, 4))),
    row("cdist 1", lambda a, b: torch.cdist(a, b, p=1.0), ((2, 3, 4), (2, 5, 4))),
    row("cdist 0", lambda a, b: torch.cdist(a, b, p=0.0), ((2, 3, 4), (2, 5, 4))),
    row("cdist large", lambda a, b: torch.cdist(a, b), ((26, 4), (27, 4))),
    row("triu of batches", lambda x: x.triu(-1), ((2, 4, 5),)),
    row("tril_indices", lambda x: x[torch.tril_indices(4, 4).unbind()], ((4, 4),)),
    row("cartesian_prod", torch.cartesian_prod, ((3,), (2,))),
    row("inv", lambda x: torch.linalg.inv(_solid(x)), ((2, 3, 3),), ((7, 7),), widened=True),
    row("det", lambda x: torch.linalg.det(_solid(x)), ((2, 3, 3),), ((5, 5),)),
    row("slogdet", lambda x: torch.linalg.slogdet(_solid(x))[1], ((2, 3, 3),)),
    row("solve", lambda x, b: torch.linalg.solve(_solid(x), b), ((2, 3, 3), (2, 3, 4))),
    row("solve_triangular", lambda x, b: torch.linalg.solve_triangular(_solid(x).flip(-2).triu(), b, upper=True), ((2, 3, 3), (2, 3, 4))),
    row("cholesky", lambda x: torch.linalg.cholesky(_spd(x)), ((2, 3, 3),), ((6, 6),)),
    row("cholesky upper", lambda x: torch.linalg.cholesky(_spd(x), upper=True), ((2, 3, 3),)),
    row("cholesky_solve", lambda x, b: torch.cholesky_solve(b, torch.linalg.cholesky(_spd(x))), ((2, 3, 3), (2, 3, 4))),
    row("solve from the right", lambda x, b: torch.linalg.solve(_solid(x), b, left=False), ((2, 3, 3), (2, 4, 3))),
    row("solve of a vector", lambda x, b: torch.linalg.solve(_solid(x), b), ((3, 3), (3,)), fixed=True, quick=True),
    row("solve_triangular from the right", lambda x, b: torch.linalg.solve_triangular(x.exp().tril(), b, upper=False, left=False), ((2, 3, 3), (2, 4, 3))),
    row("logdet", lambda x: torch.logdet(_spd(x)), ((2, 3, 3),), widened=True),
    # Shapes
    row("flatten, unflatten", lambda x: x.flatten(1).unflatten(1, (4, 3)) * 2, ((2, 3, 4),)),
    row("swapaxes", lambda x: x.swapaxes(0, 2) * 2, ((2, 3, 4),)),
    row("roll of all", lambda x: x.roll(3), _LINES),
    row("rot90 twice", lambda x: x.rot90(2, (1, 2)), ((2, 3, 4),)),
    row("fliplr", lambda x: x.fliplr() + x.flipud(), _LINES),
    row("hstack", lambda x, y: torch.hstack([x, y]) * 2, ((3, 2), (3, 4))),
    row("dstack", lambda x, y: torch.dstack([x, y]), ((3, 2), (3, 2))),
    row("tensor_split", lambda x: torch.cat(x.tensor_split(3, 1)[::-1], 1), ((2, 7),)),
    row("expand_as", lambda x, y: x.expand_as(y) * y, ((3, 1), (3, 4))),
    row("broadcast_tensors", lambda x, y: torch.stack(torch.broadcast_tensors(x, y)), ((3, 1), (1, 4))),
    row("slice written", lambda x, y: _slice_written(x, y), ((3, 5), (3, 2))),
    row("pad by cat", lambda x: torch.cat([x.new_zeros(3, 1), x, x.new_ones(3, 1)], 1), _LINES, fixed=True),
    # Functions
    *(
        row(name, function, (Positive((3, 5)),))
        for name, function in {
            "lgamma": torch.lgamma, "digamma": torch.digamma, "asin": lambda x: torch.asin(x / 2),
            "acos": lambda x: torch.acos(x / 2), "asinh": torch.asinh, "acosh": lambda x: torch.acosh(x + 1),
            "atanh": lambda x: torch.atanh(x / 2), "cosh": torch.cosh, "log10": torch.log10,
            "erfinv": lambda x: torch.erfinv(x - 1), "erfcx": torch.special.erfcx, "ndtr": torch.special.ndtr,
            "log_ndtr": torch.special.log_ndtr, "log_ndtr far below": lambda x: torch.special.log_ndtr(x * 20 - 30),
            "erfcx on both sides": lambda x: torch.special.erfcx(x * 20 - 15),
            "entr": torch.special.entr, "xlog1py": lambda x: torch.special.xlog1py(x, x),
            "polygamma": lambda x: x * torch.polygamma(1, x.detach() - 0.7), "mvlgamma": lambda x: torch.mvlgamma(x + 1, 2),
            "multigammaln": lambda x: torch.special.multigammaln(x + 1, 2), "rad2deg": torch.rad2deg,
            "deg2rad": torch.deg2rad, "frac": torch.frac, "trunc": lambda x: x.trunc() * x,
            "fix": lambda x: x.fix() * x, "ceil": lambda x: x.ceil() * x, "pow -1": lambda x: x**-1,
            "pow 0.5": lambda x: x**0.5, "pow 2": lambda x: x**2, "sigmoid, log": lambda x: x.sigmoid().log(),
            "logaddexp2": lambda x: torch.logaddexp2(x, 2 * x), "floor_divide": lambda x: x * torch.floor_divide(x.detach(), 0.3),
            "heaviside": lambda x: x * torch.heaviside((x - 1).detach(), x.detach()),
            "copysign": lambda x: torch.copysign(x, x - 1), "positive": torch.positive,
            "gammaln of a sum": lambda x: torch.lgamma(x * 6) - torch.lgamma(x * 0.01),
            "fmod": lambda x: x.fmod(0.7), "true_divide": lambda x: torch.true_divide(x, 3),
            "ldexp": lambda x: torch.ldexp(x, torch.tensor(2)), "float_power": lambda x: x.float_power(1.5).to(x.dtype),
        }.items()
    ),
    row("lgamma of all", lambda x: torch.lgamma(3 * x), ((4, 50),), quick=True),
    row("digamma of all", lambda x: torch.digamma(3 * x), ((4, 10),)),
    row("lgamma of large", lambda x: torch.lgamma(x * 1000), (Positive((3, 5)),)),
    row("remainder by a tensor", lambda x, y: torch.remainder(x, y), ((3, 5), Positive((3, 5)))),
    row("fmod by a tensor", lambda x, y: torch.fmod(x, y), ((3, 5), Positive((3, 5)))),
    row("sgn", lambda x: torch.sgn(x) * x, _LINES, fixed=True),
    row("sizes as numbers", lambda x: (x * (2 / x.shape[0]) + x.shape[0]) / (x.shape[0] - 0.5) - 1 / x.shape[0], _LINES),
    row("rsub", lambda x: 2.0 - x, _LINES),
    row("lerp by a number", lambda x, y: torch.lerp(x, y, 0.3), ((3, 5), (3, 5))),
    row("comparisons", lambda x, y: x * (x > y) + y * (x <= y) + x * (x != y) + y * (x == y), ((3, 5), (3, 5))),
    row("logical", lambda x, m: x * (m & (x > 0) | ~m ^ (x < 1)), ((3, 5), Bools((3, 5)))),
    row("isfinite", lambda x: torch.where(x.isfinite() & ~x.isnan() & ~x.isinf(), x, 0.0), _LINES),
    row("all, any", lambda x, m: x * m.all(1, keepdim=True) + x * m.any(0), ((3, 5), Bools((3, 5)))),
    row("detach", lambda x: x * x.detach(), _LINES),
    row("arange", lambda x: x * torch.arange(5, dtype=x.dtype), _LINES),
    row("linspace", lambda x: x * torch.linspace(0, 1, 5, dtype=x.dtype), _LINES),
    row("full, eye", lambda x: x @ torch.eye(5, dtype=x.dtype) + torch.full((5,), 2.0, dtype=x.dtype), _LINES),
)  # fmt: skip


def _written(x: Tensor, v: Tensor) -> Tensor:
    y = x * 2
    y[:, torch.tensor([3, 0])] = v
    return y


def _slice_written(x: Tensor, v: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3] += v
    y[0, -1] = 0.5
    return y
