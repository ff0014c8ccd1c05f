"""Gamma functions, and what belongs to the error function."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpgraph.errors import ExportError
from mpgraph.onnx.lowering.constants import constant
from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten

# Bernoulli numbers B2, B4, ... B16.
BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510)
# From here on the asymptotic series with these numbers holds to 1e-15.
LARGE = 10


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``c0 + c1 x + c2 x**2 + ...``."""
    found = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        found = found * x + _number(coefficient, x)
    return found


def _number(value: float, like: Tensor) -> Tensor:
    """A number of the dtype: torch.onnx rounds one of Python's to fp32."""
    return constant(value, like.dtype)


def _in_fp64(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, whether it has to be mirrored, and what is computed instead: a number from 0.5 on."""
    wide = x.to(torch.float64)
    is_small = wide < 0.5
    return wide, is_small, torch.where(is_small, 1 - wide, wide)


def _sine(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of pi x, but for the sign of both, exact at whole numbers."""
    rest = (x - x.round()) * _number(math.pi, x)
    return rest.sin(), rest.cos()


def _lgamma(x: Tensor) -> Tensor:
    wide, is_small, y = _in_fp64(x)
    is_low = y < LARGE
    product = torch.ones_like(y)
    for i in range(LARGE):
        product = torch.where(is_low, product * (y + i), product)
    z = torch.where(is_low, y + LARGE, y)
    terms = [b / (2 * k * (2 * k - 1)) for k, b in enumerate(BERNOULLI, 1)]
    series = _polynomial(1 / (z * z), terms) / z
    found = (
        (z - 0.5) * z.log() - z + _number(0.5 * math.log(2 * math.pi), z) + series - product.log()
    )
    mirrored = _number(math.log(math.pi), z) - _sine(wide)[0].abs().log() - found
    found = torch.where(is_small, mirrored, found)
    return torch.where(wide.isinf(), torch.inf, found).to(x.dtype)


def _digamma(x: Tensor) -> Tensor:
    wide, is_small, y = _in_fp64(x)
    is_low = y < LARGE
    below = torch.zeros_like(y)
    for i in range(LARGE):
        below = torch.where(is_low, below + 1 / (y + i), below)
    z = torch.where(is_low, y + LARGE, y)
    square = 1 / (z * z)
    terms = [b / (2 * k) for k, b in enumerate(BERNOULLI, 1)]
    found = z.log() - 0.5 / z - _polynomial(square, terms) * square - below
    sine, cosine = _sine(wide)
    found = torch.where(is_small, found - _number(math.pi, z) * cosine / sine, found)
    # A pole has two sides; torch takes that of zero by its sign.
    found = torch.where((wide == wide.round()) & (wide < 0), torch.nan, found)
    return torch.where(wide == 0, -torch.inf, found).to(x.dtype)


def _polygamma(order: int, x: Tensor) -> Tensor:
    if order == 0:
        return _digamma(x)
    if order != 1:
        raise ExportError(
            f"polygamma of order {order} cannot be exported: orders 0 and 1 can. (Training through "
            "polygamma takes the next order.)"
        )
    wide, is_small, y = _in_fp64(x)
    is_low = y < LARGE
    below = torch.zeros_like(y)
    for i in range(LARGE):
        below = torch.where(is_low, below + 1 / ((y + i) * (y + i)), below)
    z = torch.where(is_low, y + LARGE, y)
    square = 1 / (z * z)
    found = 1 / z + 0.5 * square + _polynomial(square, BERNOULLI) * square / z + below
    sine = _sine(wide)[0] / _number(math.pi, z)
    return torch.where(is_small, 1 / (sine * sine) - found, found).to(x.dtype)


_CENTRAL = (
    (0.886226899, -1.645349621, 0.914624893, -0.140543331),
    (1.0, -2.118377725, 1.442710462, -0.329097515, 0.012229801),
)
_TAIL = (
    (-1.970840454, -1.624906493, 3.429567803, 1.641345311),
    (1.0, 3.543889200, 1.637067800),
)


def _erfinv(y: Tensor) -> Tensor:
    away = y.abs()
    square = y * y
    central = y * _polynomial(square, _CENTRAL[0]) / _polynomial(square, _CENTRAL[1])
    depth = (-((1 - away) / 2).log()).sqrt()
    tail = y.sign() * _polynomial(depth, _TAIL[0]) / _polynomial(depth, _TAIL[1])
    x = torch.where(away <= 0.7, central, tail)
    for _ in range(2):
        x = x - (x.erf() - y) / (2 / math.sqrt(math.pi) * (-x * x).exp())
    return torch.where(away == 1, y * torch.inf, x)


# Of ln(erfcx(t) / u), u = 1 / (1 + t / 2), for t >= 0: to 1.2e-7 of erfcx.
_CHEBYSHEV = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398,
    1.48851587, -0.82215223, 0.17087277,
)  # fmt: skip


def _log_erfcx(t: Tensor) -> Tensor:
    """``log(exp(t**2) erfc(t))`` for t >= 0, where ``1 - erf(t)`` soon has no digits left."""
    u = 1 / (1 + t / 2)
    return u.log() + _polynomial(u, _CHEBYSHEV)


def _erfcx(x: Tensor) -> Tensor:
    above = _log_erfcx(x.abs()).exp()
    return torch.where(x < 0, 2 * (x * x).exp() - above, above)


def _log_ndtr(x: Tensor) -> Tensor:
    t = x * -math.sqrt(0.5)
    below = _log_erfcx(t.clamp(min=0)) - math.log(2) - t * t
    return torch.where(x < -1, below, ((1 + (-t).erf()) / 2).log())


_SERIES = "Abramowitz and Stegun, Handbook of mathematical functions"
_SHIFTED = "in fp64, from x + 10 by the recurrence where x is below 10, mirrored below 0.5"

ROWS = (
    Row(
        (aten.lgamma.default,), _lgamma,
        f"(x - 1/2) log x - x + log(2 pi) / 2 + sum B2k / (2k (2k - 1) x**(2k - 1)), {_SHIFTED}",
        f"{_SERIES}, 6.1.40, 6.1.15, 6.1.17",
    ),
    Row(
        (aten.digamma.default,), _digamma,
        f"log x - 1 / 2x - sum B2k / (2k x**2k), {_SHIFTED}",
        f"{_SERIES}, 6.3.18, 6.3.5, 6.3.7",
    ),
    Row(
        (aten.polygamma.default,), _polygamma,
        f"1 / x + 1 / 2x**2 + sum B2k / x**(2k + 1) for order 1, {_SHIFTED}",
        f"{_SERIES}, 6.4.12, 6.4.6, 6.4.7",
    ),
    Row(
        (aten.special_erfcx.default,), _erfcx,
        "u exp(a polynomial of u), u = 1 / (1 + x / 2), and 2 exp(x**2) - that below 0",
        "Press et al., Numerical recipes, 6.2: erfc to 1.2e-7 of its value; ONNX has Erf alone",
    ),
    Row(
        (aten.special_log_ndtr.default,), _log_ndtr,
        "log(erfcx(t) / 2) - t**2, t = -x / sqrt(2), below -1; log of ndtr above",
        "torch/_refs/special, log_ndtr",
    ),
    Row(
        (aten.erfinv.default,), _erfinv,
        "two rational functions, then two steps of Newton's method",
        "aten/src/ATen/native/Math.h, calc_erfinv",
    ),
)  # fmt: skip
