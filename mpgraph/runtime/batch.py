"""A batch as a graph takes it: names, dtypes and sizes checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mpgraph.runtime.errors import BatchError
from mpgraph.runtime.manifest import Tensor

Arrays = dict[str, np.ndarray[Any, Any]]


def checked(given: Mapping[str, Any], expected: Sequence[Tensor]) -> Arrays:
    """The arrays of a batch, in memory as a graph reads them.

    What is no array (a number, a list) becomes one of the right dtype; an array must have it.

    Raises:
        BatchError: A name, a dtype or a size is wrong: says which, and what was expected.
    """
    _check_names(given, expected)
    sizes: dict[str, tuple[int, str]] = {}
    return {tensor.name: _checked(tensor, given[tensor.name], sizes) for tensor in expected}


def _check_names(given: Mapping[str, Any], expected: Iterable[Tensor]) -> None:
    names = [tensor.name for tensor in expected]
    missing = [name for name in names if name not in given]
    unknown = [name for name in given if name not in names]
    if missing or unknown:
        parts = [f"{', '.join(missing)} missing"] * bool(missing)
        parts += [f"{', '.join(unknown)} unknown"] * bool(unknown)
        raise BatchError(f"the batch has to hold {', '.join(names)}; {' and '.join(parts)}.")


def _checked(tensor: Tensor, value: Any, sizes: dict[str, tuple[int, str]]) -> np.ndarray[Any, Any]:
    if isinstance(value, np.ndarray) and value.dtype != tensor.dtype:
        raise BatchError(
            f"{tensor.name} has dtype {value.dtype}, expected {tensor.dtype}. Convert it where it "
            f"is made: {tensor.name}.astype({tensor.dtype!r})."
        )
    array = np.ascontiguousarray(value, dtype=tensor.dtype)
    if np.ndim(value) == 0:
        array = array.reshape(())
    if array.ndim != len(tensor.shape):
        raise BatchError(_wrong_shape(tensor, array))
    for size, expected in zip(array.shape, tensor.shape, strict=True):
        if isinstance(expected, int):
            if size != expected:
                raise BatchError(_wrong_shape(tensor, array))
        elif expected.isidentifier():
            known, where = sizes.setdefault(expected, (size, tensor.name))
            if known != size:
                raise BatchError(
                    f"{tensor.name} has {size} rows and {where} has {known}; both are the "
                    f"{expected} size, so they must be equal."
                )
    return array


def _wrong_shape(tensor: Tensor, array: np.ndarray[Any, Any]) -> str:
    expected = ", ".join(map(str, tensor.shape))
    return f"{tensor.name} has shape {list(array.shape)}, expected [{expected}]."
