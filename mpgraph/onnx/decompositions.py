"""Which ATen operators are taken apart before torch.onnx translates a graph, and how."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey

from mpgraph import ir
from mpgraph.onnx.lowering.arithmetic import rrelu

aten = torch.ops.aten


@functools.cache
def _registry() -> Any:
    from torch.onnx._internal.exporter import _registration

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    return _registration.ONNXRegistry.from_torchlib()


@functools.cache
def _table() -> dict[Any, Callable[..., Any]]:
    from torch.onnx._internal.exporter import _decomp

    known = set(_decomp.get_onnx_implemented_overloads(_registry()))
    table = _decomp.create_onnx_friendly_decomposition_table(known)
    return {**table, **OWN}


def decompositions(*, half_products: bool = False) -> dict[Any, Callable[..., Any]]:
    """torch.onnx's own table of what it has no translation for, and mpgraph's additions.

    Args:
        half_products: Matrix products are to run in 16 bit: ``linear`` on more than two
            dimensions becomes one product that adds the bias before it rounds, where torch.onnx
            makes a product and an addition of it.
    """
    return {**_table(), **(_FOR_HALF_PRODUCTS if half_products else {})}


def has_translation(node: fx.Node) -> bool:
    """Whether torch.onnx translates an operator."""
    target: Any = node.target
    if target is aten.lstm.input and _has_projections(node):
        return False  # torch.onnx makes an LSTM without projections of it
    return bool(_registry().get_decomps(target)) or _is_check(target)


def _has_projections(lstm: fx.Node) -> bool:
    _, _, weights, biases, layers, _, _, bidirectional, *_ = lstm.args
    return len(weights) != (4 if biases else 2) * layers * (1 + bidirectional)  # type: ignore


# Operators that may draw random numbers, and do so where this argument is true.
_DRAWN_IF = {
    "dropout": "train",
    "feature_dropout": "train",
    "native_dropout": "train",
    "scaled_dot_product_attention": "dropout_p",
    "lstm": "dropout",
    "gru": "dropout",
    "rnn_tanh": "dropout",
    "rnn_relu": "dropout",
}


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether the node draws random numbers, given its arguments."""
    if not ir.is_random(node):
        return False
    schema = node.target._schema  # type: ignore[union-attr]
    switch = _DRAWN_IF.get(schema.name.partition("::")[2])
    if switch is None:
        return True
    names = [argument.name for argument in schema.arguments]
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return bool(values.get(switch)) and values.get("train", True) is not False


def _is_check(target: Any) -> bool:
    """Checks that yield nothing, which torch.onnx leaves out."""
    return "assert" in str(target) or "constrain_range" in str(target)


def _adaptive_max_pool(x: Tensor, output_size: Sequence[int]) -> Any:
    """The largest element of each cell and its place, as aten/src/ATen/native defines cells."""
    sizes = x.shape[x.dim() - len(output_size) :]
    if not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    found = [_cell_maximum(x, cell, sizes) for cell in _cells(sizes, output_size)]
    shape = (*x.shape[: x.dim() - len(sizes)], *output_size)
    values, places = (torch.stack(parts, -1).view(shape) for parts in zip(*found, strict=True))
    return values, places


def _cells(sizes: Sequence[int], output_size: Sequence[int]) -> Iterator[tuple[range, ...]]:
    axes = [
        [range(i * size // out, -((-(i + 1) * size) // out)) for i in range(out)]
        for size, out in zip(sizes, output_size, strict=True)
    ]
    return itertools.product(*axes)


def _cell_maximum(x: Tensor, cell: Sequence[range], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    place: Any = 0
    for axis, part in enumerate(cell):
        x = aten.slice(x, x.dim() - len(cell) + axis, part.start, part.stop)
    value, index = x.flatten(x.dim() - len(cell)).max(-1)
    for axis, part in enumerate(cell):
        inner = math.prod(len(other) for other in cell[axis + 1 :])
        step = math.prod(sizes[axis + 1 :])
        place = place + (index // inner % len(part) + part.start) * step
    return value, place


def _composite(target: Any) -> Callable[..., Any]:
    """What torch itself runs for a composite operator."""

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("kernel", None)
        return target._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    return decomposed


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    product = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
    return product.reshape(*x.shape[:-1], weight.shape[0])


_FOR_HALF_PRODUCTS: dict[Any, Callable[..., Any]] = {aten.linear.default: _linear}

OWN: dict[Any, Callable[..., Any]] = {
    aten._is_all_true.default: lambda x: x.all(),
    aten._is_any_true.default: lambda x: x.any(),
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.adaptive_max_pool3d.default: _adaptive_max_pool,
    # torch.onnx takes class probabilities for class numbers.
    aten.cross_entropy_loss.default: _composite(aten.cross_entropy_loss.default),
    # Its ignore_index may be a size, which torch.onnx does not take.
    aten.nll_loss.default: _composite(aten.nll_loss.default),
    aten.nll_loss_forward.default: torch._decomp.decomposition_table[aten.nll_loss_forward.default],
    aten.rrelu_with_noise_functional.default: rrelu,
}
