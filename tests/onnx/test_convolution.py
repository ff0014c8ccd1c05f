"""The gradients of convolutions, in float64, next to torch's kernels: both ways to compute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpgraph.onnx.lowering import convolution

# Channels, their number in the result, the kernel, and what else a convolution takes.
CASES: dict[str, tuple[int, int, tuple[int, ...], dict[str, Any]]] = {
    "plain": (16, 5, (3, 3), {}),
    "padded": (16, 5, (3, 3), {"padding": (1, 1)}),
    "padded more one way": (16, 5, (3, 2), {"padding": (2, 0)}),
    "strided, a rest": (16, 5, (3, 3), {"stride": (2, 3), "padding": (1, 1)}),
    "dilated": (16, 5, (2, 3), {"dilation": (3, 2), "padding": (1, 2)}),
    "strided and dilated": (16, 5, (3, 3), {"stride": (2, 1), "dilation": (1, 2)}),
    "one by one, strided": (16, 5, (1, 1), {"stride": (2, 2)}),
    "grouped": (16, 6, (3, 3), {"groups": 2, "padding": (1, 1)}),
    "few channels": (3, 5, (3, 3), {"stride": (2, 2)}),
    "large kernel": (16, 5, (5, 5), {"padding": (2, 2)}),
    "1d": (17, 5, (4,), {"stride": (3,), "padding": (2,)}),
    "3d": (16, 5, (2, 2, 2), {"stride": (1, 2, 1), "padding": (1, 0, 1)}),
    "transposed": (
        16, 18, (3, 3),
        {"stride": (2, 2), "padding": (1, 1), "output_padding": (1, 0), "transposed": True},
    ),
}  # fmt: skip
SIZES = (9, 8, 7)


def _given(name: str) -> tuple[Any, ...]:
    channels, out, kernel, options = CASES[name]
    rank = len(kernel)
    torch.manual_seed(0)
    x = torch.randn(3, channels, *SIZES[:rank], dtype=torch.float64)
    groups, transposed = options.get("groups", 1), options.get("transposed", False)
    first = (channels, out) if transposed else (out, channels // groups)
    weight = torch.randn(*first, *kernel, dtype=torch.float64)
    steps = [
        list(options.get(key, (default,) * rank))
        for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    rest = list(options.get("output_padding", (0,) * rank))
    y = torch.ops.aten.convolution(x, weight, None, *steps, transposed, rest, groups)
    return torch.randn_like(y), x, weight, [out], *steps, transposed, rest, groups, [True] * 3


@pytest.mark.parametrize("by_products", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_torch(
    name: str, by_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "MOST_PRODUCTS", 99 if by_products else 0)
    monkeypatch.setattr(convolution, "LEAST_CHANNELS", 1)
    given = _given(name)
    expected = torch.ops.aten.convolution_backward(*given)
    for found, wanted in zip(convolution.convolution_backward(*given), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_few_places_of_many_channels_are_products(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would take longer, or are not one product: one convolution computes them."""
    called = []
    convolve = convolution._by_convolution
    monkeypatch.setattr(
        convolution, "_by_convolution", lambda *given: called.append(1) or convolve(*given)
    )
    convolution.convolution_backward(*_given(name))
    assert bool(called) is (name in ("grouped", "few channels", "large kernel"))
