"""Operators that torchlib does not translate, or translates to something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

aten = torch.ops.aten
Translation = Callable[..., Any]


def translations(opset: int, known: Callable[[Any], Translation]) -> Mapping[Any, Translation]:
    """By operator: a function that writes ONNX nodes.

    Args:
        opset: The version of the ai.onnx operators.
        known: torchlib's translation of an operator.
    """
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{opset}")
    floor_divide = known(aten.floor_divide.default)
    div_mode = known(aten.div.Tensor_mode)

    def sym_numel(x: Any) -> Any:
        return op.Size(x)

    def divide(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
        # torchlib divides integers in float32, which is wrong above 2**24.
        if x.dtype is None or not x.dtype.is_integer() or rounding_mode is None:
            return div_mode(x, y, rounding_mode=rounding_mode)
        y = op.CastLike(y, x)
        return op.Div(x, y) if rounding_mode == "trunc" else floor_divide(x, y)

    def prod(x: Any, dims: Any = None, output_dtype: Any = None) -> Any:
        axes = op.Constant(value_ints=[int(d) for d in dims]) if dims is not None else None
        return op.ReduceProd(x, axes, keepdims=0)

    prims = torch.ops.prims
    return {
        prims.prod.default: prod,
        aten.sym_numel.default: sym_numel,
        aten.div.Tensor_mode: divide,
        aten.div.Scalar_mode: divide,
    }
