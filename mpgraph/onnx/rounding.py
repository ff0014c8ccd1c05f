"""A small file by which a runtime shows that it rounds to 16 bit, and overflows, as it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What onnxruntime 1.17, the oldest that is supported, reads.
IR_VERSION = 9


def write_rounding(path: Path, opset: int) -> None:
    """From ``x`` in fp32: rounded, times 3e4, rounded, times 1e-4, rounded; for each 16-bit dtype.

    The products run in fp32 between casts, as what :mod:`mpgraph.passes.legalize` leaves does.
    """
    import onnx

    nodes: list[Any] = []
    for name, kind in (
        ("float16", onnx.TensorProto.FLOAT16),
        ("bfloat16", onnx.TensorProto.BFLOAT16),
    ):
        value = _rounded(nodes, "x", f"{name}_0", kind)
        value = _rounded(nodes, _times(nodes, value, "large"), f"{name}_1", kind)
        _rounded(nodes, _times(nodes, value, "small"), name, kind)
    make = onnx.helper.make_tensor_value_info
    fp32 = onnx.TensorProto.FLOAT
    numbers = [
        onnx.helper.make_tensor(name, fp32, [], [value])
        for name, value in (("large", 3e4), ("small", 1e-4))
    ]
    graph = onnx.helper.make_graph(
        nodes, "rounding", [make("x", fp32, ["n"])],
        [make(name, fp32, ["n"]) for name in ("float16", "bfloat16")], numbers,
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _rounded(nodes: list[Any], value: str, name: str, kind: int) -> str:
    import onnx

    nodes.append(onnx.helper.make_node("Cast", [value], [f"{name}_half"], to=kind))
    fp32 = onnx.TensorProto.FLOAT
    nodes.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=fp32))
    return name


def _times(nodes: list[Any], value: str, factor: str) -> str:
    import onnx

    nodes.append(onnx.helper.make_node("Mul", [value, factor], [f"{value}_times"]))
    return f"{value}_times"
