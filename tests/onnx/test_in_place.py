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
    "a transpose is a result too, and may be made anew for it": (
        "(float[2, 2] n, float[2, 2] t) { t = Transpose(p)  h = MatMul(x, t)  n = Sub(p, h) }",
        False,
    ),
    "a Scan over the rows": (
        "(float[2, 2] n) { n = Scan <num_scan_inputs = 2, body = rows (float[2] a, float[2] b)"
        " => (float[2] c) { h = Mul(a, b)  c = Sub(a, h) }> (p, x) }", True,
    ),
    "a Scan over the rows, one of which is summed after it is written": (
        "(float[2, 2] n, float[2, 1] y) { n, y = Scan <num_scan_inputs = 2, body = rows"
        " (float[2] a, float[2] b) => (float[2] c, float[1] d)"
        " { c = Mul(a, b)  d = ReduceSum(a) }> (p, x) }", False,
    ),
    "a Scan over the rows, the next value of which is no element-wise result": (
        "(float[2, 2] n) { n = Scan <num_scan_inputs = 1, body = rows (float[2] a)"
        " => (float[2] c) { c = Softmax(a) }> (p) }", False,
    ),
    "a Scan that makes the rows in another order": (
        "(float[2, 2] n) { n = Scan <num_scan_inputs = 2, scan_output_directions = [1],"
        " body = rows (float[2] a, float[2] b) => (float[2] c) { c = Mul(a, b) }> (p, x) }", False,
    ),
    "a Scan that reads each row by two names": (
        "(float[2, 2] n) { n = Scan <num_scan_inputs = 2, body = rows (float[2] a, float[2] b)"
        " => (float[2] c) { c = Mul(a, b) }> (p, p) }", False,
    ),
    "a Scan that reads all of it for each row": (
        "(float[2, 2] n) { n = Scan <num_scan_inputs = 2, body = rows (float[2] a, float[2] b)"
        " => (float[2] c) { h = MatMul(p, b)  c = Sub(a, h) }> (p, x) }", False,
    ),
    "a Scan that reads a transpose too": (
        "(float[2, 2] n) { t = Transpose(p)  n = Scan <num_scan_inputs = 2, body = rows"
        " (float[2] a, float[2] b) => (float[2] c) { c = Sub(a, b) }> (p, t) }", False,
    ),
    "a Scan that another reader may run after": (
        "(float[2, 2] n, float[2, 2] y) { y = MatMul(x, p)  n = Scan <num_scan_inputs = 2,"
        " body = rows (float[2] a, float[2] b) => (float[2] c) { c = Sub(a, b) }> (p, x) }", False,
    ),
    "a Scan that captures what its body needs of another reader": (
        "(float[2, 2] n) { y = MatMul(x, p)  s = ReduceSum <keepdims = 0> (y)"
        " n = Scan <num_scan_inputs = 1, body = rows (float[2] a) => (float[2] c)"
        " { c = Mul(a, s) }> (p) }", True,
    ),
    "a Scan that carries the state from row to row": (
        "(float[2, 2] n, float[2, 2] y) { n, y = Scan <num_scan_inputs = 1, body = rows"
        " (float[2, 2] a, float[2] b) => (float[2, 2] c, float[2] d)"
        " { c = Add(a, a)  d = Mul(b, b) }> (p, x) }", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_only_what_is_proved_is_written_over(body: str) -> None:
    text, expected = BODIES[body]
    model = onnx_ir.from_proto(parser.parse_model(f"{_HEAD} => {text}"))
    assert in_place(model, {"p": "n"}) == (frozenset({"p"}) if expected else frozenset())
