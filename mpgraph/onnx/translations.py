"""Operators that torchlib does not translate, and that one or two ONNX operators compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

aten = torch.ops.aten


def translations(opset: int) -> Mapping[Any, Callable[..., Any]]:
    """By operator: a function that writes ONNX nodes."""
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{opset}")

    def sym_numel(x: Any) -> Any:
        return op.Size(x)

    return {aten.sym_numel.default: sym_numel}
