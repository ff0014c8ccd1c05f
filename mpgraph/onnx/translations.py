"""Operators that torchlib does not translate, or translates to something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpgraph.onnx.extra import library
from mpgraph.onnx.lowering import ctc
from mpgraph.onnx.scans import scan_of_ctc

aten = torch.ops.aten
Translation = Callable[..., Any]
_ATTENTION = "onnxscript.function_libs.torch_lib.ops.nn"


def translations(opset: int, known: Callable[[Any], Translation]) -> Mapping[Any, Translation]:
    """By operator: a function that writes ONNX nodes.

    Args:
        opset: The version of the ai.onnx operators.
        known: torchlib's translation of an operator.
    """
    import onnxscript
    from onnx_ir import DataType

    FLOAT, BOOL = DataType.FLOAT, DataType.BOOL
    op: Any = getattr(onnxscript, f"opset{opset}")
    floor_divide = known(aten.floor_divide.default)
    div_mode = known(aten.div.Tensor_mode)

    def sym_numel(x: Any) -> Any:
        # onnxruntime has no Size of bf16 values, and a Shape of all.
        return op.ReduceProd(op.Shape(x), keepdims=0)

    def divide(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
        # torchlib divides integers in float32, which is wrong above 2**24.
        if x.dtype is None or not x.dtype.is_integer() or rounding_mode is None:
            return div_mode(x, y, rounding_mode=rounding_mode)
        y = op.CastLike(y, x)
        return op.Div(x, y) if rounding_mode == "trunc" else floor_divide(x, y)

    def by_number(target: Any, node: Translation) -> Translation:
        translated = known(target)

        def compute(x: Any, y: Any, alpha: float = 1.0) -> Any:
            # A number that depends on the size of the batch is a value of the graph.
            if isinstance(y, (int, float)):
                return translated(x, y * alpha)
            y = op.CastLike(y, x)
            return node(x, y if alpha == 1 else op.Mul(y, op.CastLike(alpha, x)))

        return compute

    # Of opset 18 for all: onnxruntime's Attention of opset 23 takes no mask that is to be repeated,
    # and yields zeros for a row that is masked by the least number, where torch has shares.
    attention = library(_ATTENTION).aten_scaled_dot_product_attention

    def attend(q: Any, k: Any, v: Any, mask: Any = None, *rest: Any, **options: Any) -> Any:
        mask = options.pop("attn_mask", mask)
        found = attention(q, k, v, mask, *rest, **options)
        if mask is None:
            return found
        # onnxruntime makes equal shares of a row that is masked out, torch zeros.
        is_open = mask if mask.dtype == BOOL else op.Not(op.IsInf(op.Cast(mask, to=FLOAT)))
        last = op.Constant(value_ints=[-1])
        is_seen = op.Cast(op.ReduceMax(op.Cast(is_open, to=FLOAT), last, keepdims=1), to=BOOL)
        return op.Where(is_seen, found, op.CastLike(0.0, found))

    def prod(x: Any, dims: Any = None, output_dtype: Any = None) -> Any:
        axes = op.Constant(value_ints=[int(d) for d in dims]) if dims is not None else None
        return op.ReduceProd(x, axes, keepdims=0)

    prims = torch.ops.prims
    return {
        prims.prod.default: prod,
        aten.sym_numel.default: sym_numel,
        aten.scaled_dot_product_attention.default: attend,
        aten.mul.Scalar: by_number(aten.mul.Scalar, op.Mul),
        aten.add.Scalar: by_number(aten.add.Scalar, op.Add),
        aten.sub.Scalar: by_number(aten.sub.Scalar, op.Sub),
        aten.div.Tensor_mode: divide,
        aten.div.Scalar_mode: divide,
        ctc.CHAIN: scan_of_ctc,
    }
