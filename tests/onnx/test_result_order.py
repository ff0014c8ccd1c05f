"""Results in an order that lets onnxruntime give gradients back early."""

from __future__ import annotations

import onnx_ir
from onnx import checker, parser

from mpgraph.onnx.result_order import order_results

_TEXT = """<ir_version: 9, opset_import: ["" : 18]>
step (float[2, 2] x, float[2, 2] v, float[2, 2] w) => (float[2, 2] n, float[2, 2] m, float l) {
    h = MatMul(x, v)
    y = MatMul(h, w)
    l = ReduceSum <keepdims = 0> (y)
    a = MatMul(h, y)
    g = MatMul(y, w)
    b = MatMul(x, g)
    k = Neg(b)
    n = Add(v, k)
    m = Sub(w, a)
}"""


def _ordered() -> list[str]:
    """The operators' results, the first six marked as no part of the update."""
    model = onnx_ir.from_proto(parser.parse_model(_TEXT))
    for node in list(model.graph)[:6]:
        node.metadata_props["part"] = "backward"
    order_results(model.graph)
    checker.check_model(onnx_ir.to_proto(model))
    return [node.outputs[0].name for node in model.graph]


def test_what_can_be_made_first_comes_last() -> None:
    """The loss, then the head, then the layer under it: onnxruntime goes from the end."""
    assert _ordered() == ["h", "y", "a", "g", "b", "k", "n", "m", "l"]
