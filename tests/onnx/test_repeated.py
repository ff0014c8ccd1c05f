"""A translation is written once for nodes that are alike, and copied for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mpgraph.onnx import repeated
from mpgraph.onnx.translate import translate

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The operators of what has been "written", and of what has been "copied"."""
    found: dict[str, list[str]] = {"written": [], "copied": []}
    write, copy = repeated._to_repeat, repeated._copied

    def noted(taken: Any, nodes: Any, returned: Any) -> Any:
        found["written"] += [node.op_type for node in nodes]
        return write(taken, nodes, returned)

    def noted_copy(written: Any, taken: Any, recorder: Any) -> Any:
        found["copied"] += [node.op_type for node in written.nodes]
        return copy(written, taken, recorder)

    monkeypatch.setattr(repeated, "_to_repeat", noted)
    monkeypatch.setattr(repeated, "_copied", noted_copy)
    return found


def run(function: Any, *values: Tensor) -> list[Tensor]:
    """What the translated function computes in onnxruntime."""
    with FakeTensorMode() as mode:
        gm = make_fx(function)(*map(mode.from_tensor, values))
    inputs = [f"input_{i}" for i in range(len(values))]
    outputs = [f"output_{i}" for i in range(len(gm.graph.output_node().args[0]))]
    model = translate(gm, inputs, outputs)
    import onnx_ir

    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {name: value.numpy() for name, value in zip(inputs, values, strict=True)}
    return [torch.from_numpy(value) for value in session.run(outputs, feeds)]


def assert_runs(function: Any, *values: Tensor) -> None:
    """As in torch."""
    for found, expected in zip(run(function, *values), function(*values), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_equal_layers_are_written_once(names: dict[str, list[str]]) -> None:
    def layers(x: Tensor) -> list[Tensor]:
        for _ in range(5):
            x = torch.nn.functional.gelu(x.softmax(-1).view(2, 3, 2).permute(1, 0, 2).reshape(3, 4))
        return [x]

    assert_runs(layers, torch.randn(3, 4))
    assert names["written"].count("Softmax") == 1
    assert names["copied"].count("Softmax") == 4
    assert "Constant" in names["written"]
    assert "Constant" not in names["copied"]


def test_what_a_translation_looks_at_tells_nodes_apart() -> None:
    def pairs(x: Tensor, y: Tensor) -> list[Tensor]:
        n, cube = x.to(torch.int64), x.view(1, 3, 3)
        return [
            x - y, y - x, x - x, x - 1.5, x - 2.5, x.transpose(-1, -2), cube.transpose(-1, -2),
            torch.div(x, y, rounding_mode="floor"), torch.div(n - 7, n + 9, rounding_mode="floor"),
            torch.split(x, 2)[1], torch.split(x, [1, 2])[1], torch.where(x > 0, x, y),
            torch.where(x > 0, y, x), x.amax(0, True), x.amax(0, False), x.sum(0), x.sum(1),
        ]  # fmt: skip

    assert_runs(pairs, torch.randn(3, 3), torch.randn(3, 3))


def test_a_zero_below_zero_stays_one() -> None:
    # torch.onnx shares constants that are equal, onnx_ir shares nodes; as numbers, these are.
    def zeros(x: Tensor) -> list[Tensor]:
        found = [torch.nn.functional.leaky_relu(x, zero) for zero in (0.0, -0.0)]
        found += [x * zero for zero in (0.0, -0.0)]
        return [*found, *(torch.full_like(x, zero) for zero in (0.0, -0.0))]

    x = torch.tensor([-1.5, 2.0])
    for found, expected in zip(run(zeros, x), zeros(x), strict=True):
        torch.testing.assert_close(1 / found, 1 / expected)


def test_several_results_are_copied(names: dict[str, list[str]]) -> None:
    def halves(x: Tensor, y: Tensor) -> list[Tensor]:
        values = [*x.sort(), *y.sort(), *torch.topk(x, 2), *torch.topk(y, 2)]
        return [value + 1 for value in values]

    assert_runs(halves, torch.randn(4), torch.randn(4))
    assert names["copied"].count("TopK") == 2


def test_what_a_translation_says_of_its_results_is_copied() -> None:
    import onnx_ir
    from onnxscript import evaluator, opset18
    from torch.onnx._internal.exporter._building import OpRecorder
    from torch.onnx._internal.exporter._tensors import SymbolicTensor

    def rounded(x: Any) -> Any:
        result = opset18.Cast(x, to=onnx_ir.DataType.INT64)
        result.dtype = onnx_ir.DataType.INT64
        return result

    function = repeated._Repeated(rounded)
    with evaluator.default_as(OpRecorder(opset18, {})):
        first, second = (function(SymbolicTensor(opset18, name)) for name in "ab")
    assert first is not second
    assert first.dtype == second.dtype == onnx_ir.DataType.INT64
    assert second.producer().attributes["to"].value == onnx_ir.DataType.INT64


def test_graphs_inside_of_nodes_are_not_copied() -> None:
    import onnx_ir

    (value,) = onnx_ir.node("Identity", [onnx_ir.val("x")]).outputs
    body = onnx_ir.AttrGraph("then_branch", onnx_ir.Graph([], [], nodes=[]))
    plain = onnx_ir.Node("", "If", [value])
    holding = onnx_ir.Node("", "If", [value], [body])
    assert repeated._to_repeat([value], [plain], plain.outputs[0]) is not None
    assert repeated._to_repeat([value], [holding], holding.outputs[0]) is None
