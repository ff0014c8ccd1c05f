"""docs/how-it-works.md names every pass, in the order in which it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpgraph.onnx.step_trace import EXPORT_PASSES
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.passes.legalize import legalize
from mpgraph.step.assemble import AFTER_UPDATE, BEFORE_UPDATE, LOSS
from mpgraph.step.compiled import COMPILED_PASSES

ROOT = Path(__file__).parents[1]
PIPELINES = (
    DEFAULT_PASSES,
    (*LOSS, *BEFORE_UPDATE, *AFTER_UPDATE),
    COMPILED_PASSES,
    (*EXPORT_PASSES, legalize),
)


@pytest.fixture(scope="module")
def tables() -> list[list[str]]:
    """The first column of each table of passes."""
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    _, *tables = text.split("| pass | what it does |\n|---|---|\n")
    return [re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.M) for table in tables]


def test_every_pipeline_has_its_table(tables: list[list[str]]) -> None:
    assert tables == [[step.name for step in pipeline] for pipeline in PIPELINES]


def test_every_file_in_passes_is_in_a_table(tables: list[list[str]]) -> None:
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert {name for table in tables for name in table} == files
