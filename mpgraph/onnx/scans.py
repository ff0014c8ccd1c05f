"""Recursions over time, as Scan nodes."""

from __future__ import annotations

from typing import Any

import numpy as np


def scan_of_ctc(start: Any, found: Any, skips: Any, counts: Any) -> Any:
    """:func:`mpgraph.onnx.lowering.ctc.ctc_chain` as one Scan."""
    from torch.onnx._internal.exporter._torchlib.ops import hop

    body = _ctc_body(start, found, skips, counts)
    given = (start, skips, found, counts)
    *_, states = hop.call_op("Scan", *given, _num_outputs=3, body=body, num_scan_inputs=2)
    (axis,) = hop.call_op("Constant", value_ints=[1])
    (result,) = hop.call_op("Squeeze", states, axis)
    return result


def _ctc_body(start: Any, found: Any, skips: Any, counts: Any) -> Any:
    """One step: the state and what it needs, to the next state, and that state once more."""
    import onnx_ir as ir
    from onnx_ir.tape import Tape

    state, by = _value("state", start), _value("skips", skips)
    now, is_counted = _value("now", found, inner=True), _value("counts", counts, inner=True)
    nodes = Tape()
    op = nodes.op
    none, zero = (_constant(nodes, value, start.dtype.numpy()) for value in (-np.inf, 0.0))
    first, second = (_constant(nodes, [n], np.int64) for n in (0, 1))
    last, last_but_one = (_constant(nodes, [n], np.int64) for n in (-1, -2))
    shifted = op("Pad", [state, _constant(nodes, [0, 2, 0, 0], np.int64), none])
    ways = [
        state,
        op("Slice", [shifted, second, last, second]),
        op("Add", [op("Slice", [shifted, first, last_but_one, second]), by]),
    ]
    most = op("Max", ways)
    most = op("Where", [op("Equal", [most, none]), zero, most])
    shares = op("Sum", [op("Exp", [op("Sub", [way, most])]) for way in ways])
    reached = op("Add", [op("Add", [op("Log", [shares]), most]), now])
    after = op("Where", [is_counted, reached, state])
    # onnxruntime 1.31 does not carry a state that is also an output, so that has another shape.
    each = op("Unsqueeze", [after, first])
    outputs = [after, op("Identity", [by]), each]
    for value, name in zip(outputs, ("after", "skips_after", "each"), strict=True):
        value.name, value.type = f"ctc_{name}", state.type
        value.shape = ir.Shape([1, *start.shape] if value is each else start.shape)
    return ir.Graph([state, by, now, is_counted], outputs, nodes=nodes.nodes, name="ctc_chain")


def _constant(nodes: Any, value: Any, dtype: Any) -> Any:
    import onnx_ir as ir

    return nodes.op("Constant", [], {"value": ir.tensor(np.array(value, dtype))})


def _value(name: str, like: Any, *, inner: bool = False) -> Any:
    import onnx_ir as ir

    shape = ir.Shape(like.shape[1:] if inner else like.shape)
    return ir.Value(name=f"ctc_{name}", shape=shape, type=ir.TensorType(like.dtype))
