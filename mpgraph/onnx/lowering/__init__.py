"""Operators that ONNX lacks, in terms of operators that it has.

One file for each kind of operator; each has a table whose rows hold a formula and its source.
:func:`decompositions` puts them in front of torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mpgraph.onnx.lowering import (
    arithmetic,
    average_pooling,
    bags,
    convolution,
    copies,
    ctc,
    grouped,
    interpolation,
    linear_algebra,
    losses,
    max_pooling,
    ordering,
    padding,
    products,
    running,
    sampling,
    scattering,
    selections,
    special,
    training,
    updates,
)
from mpgraph.onnx.lowering.row import Row

ROWS: tuple[Row, ...] = (
    *convolution.ROWS,
    *average_pooling.ROWS,
    *max_pooling.ROWS,
    *interpolation.ROWS,
    *padding.ROWS,
    *products.ROWS,
    *bags.ROWS,
    *scattering.ROWS,
    *selections.ROWS,
    *sampling.ROWS,
    *ordering.ROWS,
    *running.ROWS,
    *arithmetic.ROWS,
    *training.ROWS,
    *updates.ROWS,
    *copies.ROWS,
    *ctc.ROWS,
    *losses.ROWS,
    *linear_algebra.ROWS,
    *special.ROWS,
)


def decompositions(opset: int) -> dict[Any, Callable[..., Any]]:
    """By operator: mpgraph's rows, then torch's decompositions of what torchlib does not know."""
    return _decompositions(opset, grouped.rows_of_libraries())


@functools.cache
def _decompositions(opset: int, more: tuple[Row, ...]) -> dict[Any, Callable[..., Any]]:
    from torch.onnx._internal.exporter import _decomp

    from mpgraph.onnx.registry import registry

    known = set(_decomp.get_onnx_implemented_overloads(registry(opset)))
    table: dict[Any, Callable[..., Any]] = _decomp.create_onnx_friendly_decomposition_table(known)
    for row in (*ROWS, *more):
        for target in row.targets:
            table[target] = row.function
    return table


def targets() -> frozenset[torch._ops.OpOverload]:
    """Every operator that has a row."""
    rows = (*ROWS, *grouped.rows_of_libraries())
    return frozenset(target for row in rows for target in row.targets)
