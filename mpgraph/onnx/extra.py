"""The libraries of the ``onnx`` extra, imported where they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from mpgraph.errors import ExportError

_FOR_EXPORT = ("onnx", "onnxscript")


def require_onnx() -> None:
    """Check that what an export needs is installed.

    Raises:
        ExportError: It is not; names the extra.
    """
    for name in _FOR_EXPORT:
        library(name)


def library(name: str) -> Any:
    """An optional library.

    Raises:
        ExportError: It is not installed; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"ONNX needs the package {name!r}, which cannot be imported ({error}). Install "
            "mpgraph with its extra 'onnx'."
        ) from error


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None
