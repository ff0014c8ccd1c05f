"""Every operator that a step takes, an inference file takes too, and computes what torch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph.onnx.functional import in_plain_operators

from . import operator_table
from .survey import error, leaves, make, resized
from .survey_row import Row
from .test_lowering import NO_SYMBOLS_IN_2_11, skip_before_2_12

ROWS = tuple(row for rows in operator_table.PARTS.values() for row in rows)
# fp32 adds up in another order.
LIMIT = 1e-5
QUICK = (
    "avg_pool padding not counted", "adaptive_max_pool", "embedding_bag sum", "scatter_add", "lstm",
    "cross_entropy", "grid_sample bicubic", "multi_margin", "ctc", "solve of a vector",
    "lgamma of all", "divide by a count", "interpolate by a fraction that fp32 rounds down",
)  # fmt: skip
# Taken with fixed sizes alone, and why.
FIXED = {
    "scatter_reduce mean": "the index may be smaller than the source, in a dimension that varies",
    "scatter_reduce mean of others": "the same",
    "as_strided turned": "the strides are those of one length",
}


class Call(nn.Module):
    """One call; the parameter is there because a model without any is not converted."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.unread = function, nn.Parameter(torch.ones(()))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def in_onnxruntime(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {f"arg_{i}": value.numpy() for i, value in enumerate(inputs)}
    names = [value.name for value in session.get_inputs()]  # what nothing reads is left out
    found = session.run(None, {name: given[name] for name in names})
    return [torch.from_numpy(np.asarray(value)) for value in found]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=() if row.name in QUICK else pytest.mark.slow)
        for row in ROWS
    ],
)
def test_an_inference_file_takes_what_a_step_takes(row: Row, tmp_path: Path) -> None:
    skip_before_2_12(row, NO_SYMBOLS_IN_2_11)
    is_fixed = row.fixed or row.name in FIXED
    for shapes in row.shapes:
        torch.manual_seed(0)
        inputs = [make(spec, torch.float32) for spec in shapes]
        path = tmp_path / "call.onnx"
        mpgraph.export_onnx(
            Call(row.function).eval(), path, tuple(inputs), precision="fp32", verify=False,
            dynamic=not is_fixed,
        )  # fmt: skip
        if not is_fixed and shapes is row.shapes[0]:  # a batch of another size than exported
            rows = len(inputs[0])
            inputs = [make(resized(spec, rows, 17), torch.float32) for spec in shapes]
        found = in_onnxruntime(path, inputs)
        # torch's fused attention gives rows that are masked out other values than its plain one.
        with in_plain_operators(), torch.no_grad():
            expected = leaves(row.function(*inputs))
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert error(a, b) <= LIMIT, shapes
