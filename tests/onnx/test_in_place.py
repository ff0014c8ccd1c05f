"""What may be written over, and what must not."""

from __future__ import annotations

import onnx_ir
import pytest
from onnx import parser

from mpgraph.onnx.in_place import in_place

_HEAD = '<ir_version: 9, opset_import: ["" : 18]> step (float[2, 2] p, float[2, 2] x)'
# Body, and whether p may be written over.
BODIES = {
    "every reader is needed for the next value": (
        "(float[2, 2] n) { h = MatMul(x, p)  n = Sub(p, h) }", True,
    ),
    "a reader may run after the write": (
        "(float[2, 2] n, float[2, 2] y) { n = Sub(p, x)  y = MatMul(x, p) }", False,
    ),
    "a transpose is folded into a product that may run after the write": (
        "(float[2, 2] n, float[2, 2] y)"
        "{ t = Transpose(p)  h = MatMul(x, t)  n = Sub(p, h)  y = MatMul(h, t) }", False,
    ),
    "the next value is no element-wise result": (
        "(float[2, 2] n) { n = MatMul(p, x) }", False,
    ),
    "the writer reads a view": (
        "(float[2, 2] n) { t = Transpose(p)  n = Sub(p, t) }", False,
    ),
    "a selection by a flag that needs all readers": (
        "(float[2, 2] n, float[2, 2] y)"
        "{ y = MatMul(x, p)  f = IsNaN(y)  n = Where(f, p, x) }", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_only_what_is_proved_is_written_over(body: str) -> None:
    text, expected = BODIES[body]
    model = onnx_ir.from_proto(parser.parse_model(f"{_HEAD} => {text}"))
    assert in_place(model, {"p": "n"}) == (frozenset({"p"}) if expected else frozenset())
