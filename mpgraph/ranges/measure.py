"""The range of a tensor's values."""

from __future__ import annotations

from typing import Any

import torch

from mpgraph.ranges.records import Spread


@torch.no_grad()
def measure(value: torch.Tensor, *, exponents: bool = False) -> Spread:
    """Count what is infinite, NaN and zero; find the largest; with ``exponents``, count all."""
    magnitudes = _plain(value).abs()
    if magnitudes.numel() == 0:
        return Spread(0)
    finite = magnitudes.isfinite()
    nan = magnitudes.isnan().sum()
    good = torch.where(finite, magnitudes, 0)
    numbers = (good.max(), finite.sum(), nan, (magnitudes == 0).sum())
    largest, held, nans, zeros = torch.stack([n.double() for n in numbers]).tolist()
    count = magnitudes.numel()
    return Spread(
        count, int(zeros), count - int(held) - int(nans), int(nans), largest,
        _exponents(good) if exponents else (),
    )  # fmt: skip


def _plain(value: torch.Tensor) -> torch.Tensor:
    """The values alone: of a sparse tensor those that it stores, of a distributed one our own."""
    plain: Any = value.detach()
    if plain.layout is not torch.strided:
        plain = plain.coalesce().values() if plain.layout is torch.sparse_coo else plain.values()
    if hasattr(plain, "to_local"):
        plain = plain.to_local()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain if plain.dtype is torch.float64 else plain.float()  # type: ignore[no-any-return]


def _exponents(magnitudes: torch.Tensor) -> tuple[tuple[int, int], ...]:
    values = torch.frexp(magnitudes[magnitudes > 0]).exponent - 1
    found, counts = torch.unique(values, return_counts=True)
    return tuple(zip(found.tolist(), counts.tolist(), strict=True))
