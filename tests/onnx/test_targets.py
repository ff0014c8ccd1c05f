"""What the table says of runtimes is what the installed one does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from mpgraph.errors import ExportError
from mpgraph.onnx import target_rows as rows
from mpgraph.onnx.targets import TARGETS, target_of

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOOL = Path(__file__).parents[2] / "tools" / "probe_ort.py"


def _tool():
    spec = importlib.util.spec_from_file_location("probe_ort", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["probe_ort"] = module
    spec.loader.exec_module(module)
    return module


probe_ort = _tool()
ENDS = (probe_ort.LEVELS[0], probe_ort.LEVELS[-1])


def test_every_row_for_the_cpu_provider_holds():
    findings = list(probe_ort.probe(TARGETS["cpu"], (18, 23), ENDS))
    assert [finding for finding in findings if finding.is_wrong] == []
    assert sum(finding.claimed for finding in findings) > 40


def test_the_probe_has_a_case_for_every_operator_of_every_row():
    claimed = {
        operator
        for target in TARGETS.values()
        for dtype in (torch.float16, torch.bfloat16)
        for operator in {*target.native[dtype], *target.since.get(dtype, {})}
    }
    assert claimed <= set(probe_ort.CASES)


def test_a_wrong_row_fails_the_probe(monkeypatch, capsys):
    monkeypatch.setitem(rows.CPU, torch.float16, rows.CPU[torch.float16] | {"Where", "Mul"})
    assert probe_ort.main(["--quick"]) == 1
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines() if "WRONG" in line] == [
        ["Where", "fp16"],
        ["Mul", "fp16"],
    ]


@pytest.mark.parametrize("level", probe_ort.LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pairs_of_explicit_casts_survive_every_optimization_level(dtype, level):
    assert probe_ort.casts_survive(dtype, "CPUExecutionProvider", level)


def test_native_fp16_of_the_cpu_provider_is_not_fp16():
    # If this fails, the provider has become better than the table: add its rows.
    found = probe_ort.measure("Mul", torch.float16, 18, "CPUExecutionProvider", ENDS)
    assert found == probe_ort.LOSES_ROUNDING


def test_targets_differ_in_what_they_run():
    cpu, cuda, portable = target_of("cpu"), target_of("cuda"), target_of("portable")
    assert cpu.runs("Gather", torch.bfloat16)
    assert not cpu.runs("Add", torch.float16)
    assert cuda.runs("Add", torch.bfloat16)
    assert not portable.runs("Gather", torch.float16)
    assert target_of("cuda", 22).runs("Conv", torch.bfloat16)
    assert not target_of("cuda", 21).runs("Conv", torch.bfloat16)


def test_unknown_targets_and_opsets_are_refused():
    with pytest.raises(ExportError, match="unknown target 'gpu'; use one of cpu, cuda"):
        target_of("gpu")
    for opset in (17, 24, True, 18.0):
        with pytest.raises(ExportError, match="opset must be a number from 18 to 23"):
            target_of("cpu", opset)
