"""Backward of convolutions of one to three dimensions, transposed or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, those that ``output_mask`` asks for."""
    rank = weight.dim() - 2
    axes = [_per_axis(values, rank) for values in (stride, padding, dilation)]
    steps = _Steps(axes[0], axes[1], axes[2], groups)
    of_input = of_weight = of_bias = None
    if output_mask[0]:
        of_input = _input_gradient(grad, x, weight, steps, transposed)
    if output_mask[1]:
        pair = (grad, x) if transposed else (x, grad)
        of_weight = _weight_gradient(*pair, weight.shape[2:], steps)
    if output_mask[2]:
        of_bias = grad.sum([0, *range(2, grad.dim())])
    return of_input, of_weight, of_bias


class _Steps:
    """Stride, padding and dilation of each axis, and the number of groups."""

    def __init__(self, stride: Any, padding: Any, dilation: Any, groups: int) -> None:
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups


def _per_axis(values: Sequence[int], rank: int) -> list[int]:
    return [*values] * rank if len(values) == 1 else [*values]


def _input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, steps: _Steps, transposed: bool
) -> Tensor:
    given = (steps.stride, steps.padding, steps.dilation)
    if transposed:
        zeros = [0] * len(steps.stride)
        found = aten.convolution(grad, weight, None, *given, False, zeros, steps.groups)
        return _cut(found, x.shape[2:])
    # What the stride has left over at the end got no gradient; it is never more than stride - 1.
    rest = [
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, k, s, p, d in zip(
            x.shape[2:], grad.shape[2:], weight.shape[2:], *given, strict=True
        )
    ]
    return aten.convolution(grad, weight, None, *given, True, rest, steps.groups)  # type: ignore[no-any-return]


def _weight_gradient(large: Tensor, small: Tensor, kernel: Sequence[int], steps: _Steps) -> Tensor:
    """``sum(small[n, o, i] * large[n, c, i * stride + j * dilation - padding])`` over n and i."""
    channels = large.shape[1]
    if steps.groups == 1 and math.prod(kernel) <= MOST_PRODUCTS and channels >= LEAST_CHANNELS:
        return _by_products(large, small, kernel, steps)
    return _by_convolution(large, small, kernel, steps)


# Up to so many products, of so many columns, onnxruntime's CPU provider takes half the time of the
# convolution (tools/bench_onnx_train.py, resnet: 28 ms of 66 were these).
MOST_PRODUCTS, LEAST_CHANNELS = 9, 16


def _by_products(large: Tensor, small: Tensor, kernel: Sequence[int], steps: _Steps) -> Tensor:
    """One matrix product for each place j in the kernel, of ``small`` with what it meets there."""
    padding = [amount for p in reversed(steps.padding) for amount in (p, p)]
    padded = torch.nn.functional.pad(large, padding) if any(padding) else large
    padded = padded.movedim(1, -1)
    rows = small.transpose(0, 1).flatten(1)
    found = []
    for place in itertools.product(*map(range, kernel)):
        met = padded
        for axis, index in enumerate(place):
            start = index * steps.dilation[axis]
            stop = start + (small.shape[2 + axis] - 1) * steps.stride[axis] + 1
            met = aten.slice(met, 1 + axis, start, stop, steps.stride[axis])
        found.append(rows @ met.flatten(0, -2))
    return torch.stack(found, -1).reshape(rows.shape[0], large.shape[1], *kernel)


def _by_convolution(large: Tensor, small: Tensor, kernel: Sequence[int], steps: _Steps) -> Tensor:
    """A convolution whose batch is the channels of ``large`` and whose channels are the batch.

    Stride and dilation change places.
    """
    size = large.shape[2:]
    batch, channels = large.shape[:2]
    parts = channels // steps.groups
    moved = large.reshape(batch, steps.groups, parts, *size).transpose(0, 2)
    moved = moved.reshape(parts, steps.groups * batch, *size)
    found = aten.convolution(
        moved, small.transpose(0, 1), None, steps.dilation, steps.padding, steps.stride, False,
        [0] * len(size), steps.groups,
    )  # fmt: skip
    return _cut(found, kernel).transpose(0, 1)


def _cut(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first ``sizes`` elements of every axis after the second."""
    for axis, size in enumerate(sizes, 2):
        if x.shape[axis] != size:
            x = x.narrow(axis, 0, size)
    return x


ROWS = (
    Row(
        (aten.convolution_backward.default,),
        convolution_backward,
        "input: the transposed convolution of the gradient, padded at its end by what the stride "
        "leaves over; weight: a product of the gradient with what each place of the kernel meets, "
        "or the convolution of the input with the gradient, batch and channels changed, stride and "
        "dilation changed; bias: the sum over batch and space",
        "Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv:1603.07285",
    ),
)
