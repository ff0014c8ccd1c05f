"""Functions that cache what they make do not keep what a capture has had them make."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

import mpgraph


@functools.lru_cache(maxsize=4)
def triangle(size: int) -> dict[str, torch.Tensor]:
    return {"mask": torch.ones(size, size).tril()}


class Masked(nn.Linear):
    """Adds up what came before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x @ triangle(x.shape[1])["mask"].to(x.dtype))


def converted(model: nn.Module, x: torch.Tensor) -> Any:
    mpgraph.convert(model, "bf16")(x)


def step(model: nn.Module, x: torch.Tensor) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss: Any = lambda model, x: model(x).float().square().mean()  # noqa: E731
    mpgraph.TrainStep(model, optimizer, loss, precision="fp32", compile=False)(x)


@pytest.mark.parametrize("capture", [converted, step])
def test_a_cached_mask_has_numbers_after_a_capture(capture: Any) -> None:
    triangle.cache_clear()
    model, x = Masked(4, 2), torch.randn(3, 4)
    capture(model, x)
    assert not is_fake(model(x))
    assert torch.equal(triangle(4)["mask"], torch.ones(4, 4).tril())


def test_a_cache_of_numbers_stays() -> None:
    triangle.cache_clear()
    kept = triangle(4)
    converted(Masked(4, 2), torch.randn(3, 4))
    assert triangle(4) is kept
