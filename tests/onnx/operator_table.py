"""docs/onnx-operators.md: what the survey runs, and what is written in other operators.

``python -m tests.onnx.operator_table`` writes it; a test holds it to the survey.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mpgraph.onnx import lowering
from mpgraph.onnx.lowering.row import Row as Lowering

from . import survey_cases, survey_layers, survey_losses, survey_tensors
from .survey_row import Row

FILE = Path(__file__).parents[2] / "docs" / "onnx-operators.md"
PARTS: dict[str, tuple[Row, ...]] = {
    "Operators and layers": survey_cases.ROWS,
    "More of the layers of torch.nn": survey_layers.ROWS,
    "Losses": survey_losses.ROWS,
    "More operators on tensors": survey_tensors.ROWS,
}
_HEAD = """\
# Operators of exported files

Written by `python -m tests.onnx.operator_table` from the survey that `tests/onnx/test_lowering.py`
runs: every call below, forward and backward, in one or several shapes, in onnxruntime on the CPU.
In fp32 results and gradients equal those of torch, within 1e-5 of the largest element; in fp16 and
bf16 those of the same graph run by torch, within two units of the dtype (quantiles, `inv`, `vander`
and `logdet` as a policy widens them). Calls in *italics* take the size of their first dimension
from the example batch; all others were exported with one size, and run with another.

Inference files take the same calls: `tests/onnx/test_inference_survey.py` exports each with
`mpgraph.export_onnx`, by the same translator and the same rows.

What is not here may work as well: torch.onnx translates most operators. What it does not translate
is an error that names the operator, the node and the line.
"""
_ROWS = """\
## Written in other operators

What ONNX lacks, or torch.onnx translates to something else: `mpgraph/onnx/lowering/`.

| operator of torch (`aten`) | computed as | source |
|---|---|---|
"""


def text() -> str:
    """The document."""
    parts = [_HEAD, *(_part(title, rows) for title, rows in PARTS.items())]
    rows = sorted(lowering.ROWS, key=lambda row: str(row.targets[0]))
    return "\n".join(parts) + "\n" + _ROWS + "".join(map(_line, rows))


def _part(title: str, rows: tuple[Row, ...]) -> str:
    return f"## {title}\n\n" + ", ".join(map(_name, rows)) + ".\n"


def _name(row: Row) -> str:
    name = row.name.replace("_", "\\_")
    name = re.sub(r", ", " and ", name)  # commas are between the calls
    return f"*{name}*" if row.fixed else name


def _line(row: Lowering) -> str:
    targets = ", ".join(f"`{name}`" for name in _targets(row))
    return f"| {targets} | {_cell(row.formula)} | {_cell(row.source)} |\n"


def _targets(row: Lowering) -> Iterator[str]:
    for target in row.targets:
        yield str(target).removeprefix("aten.").removesuffix(".default")


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
