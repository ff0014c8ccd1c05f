"""The examples run, and the documents show what runs."""

from __future__ import annotations

import doctest
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def test_ten_line_example_learns_and_reports(capsys):
    runpy.run_path(str(EXAMPLES / "train_ten_lines.py"))
    printed = capsys.readouterr().out
    loss = re.search(r"loss (\S+)", printed)
    assert loss is not None
    assert float(loss[1]) < 1.5  # guessing gives log(10) = 2.3
    assert "linear" in printed


def test_the_whole_step_learns_and_is_shown_as_it_is(capsys):
    runpy.run_path(str(EXAMPLES / "train_step.py"))
    printed = capsys.readouterr().out
    assert float(printed.rpartition("loss ")[2]) < 1.0  # guessing gives log(10) = 2.3
    document = ROOT / "docs" / "train-step.md"
    _, _, code = (EXAMPLES / "train_step.py").read_text().partition('"""\n\n')
    assert code in blocks(document, "python")
    shown = blocks(document, "text")[0]
    assert printed.rpartition("loss ")[0].split() == shown.rpartition("loss ")[0].split()


def finetuned(name: str, monkeypatch, capfd) -> dict[str, tuple[float, float]]:
    """Loss and accuracy, at first, in torch and without it, as an example prints them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    lines = re.findall(r"(.+): loss (\S+), accuracy (\S+)", capfd.readouterr().out)
    return {who: (float(loss), float(accuracy)) for who, loss, accuracy in lines}


@pytest.mark.slow
def test_digits_are_learnt_without_torch_as_well_as_with_it(monkeypatch, capfd):
    pytest.importorskip("sklearn")
    found = finetuned("finetune_digits.py", monkeypatch, capfd)
    assert found["torch"][1] > 0.97
    assert found["onnxruntime"][1] > found["torch"][1] - 0.015  # five digits


@pytest.mark.slow
def test_adapters_learn_python_without_torch_as_well_as_with_it(monkeypatch, capfd):
    pytest.importorskip("onnxruntime")
    found = finetuned("finetune_text.py", monkeypatch, capfd)
    assert found["torch"][0] < found["at first"][0] - 0.1
    assert found["onnxruntime"] == pytest.approx(found["torch"], abs=0.005)  # nothing is random


def test_readme_shows_the_ten_line_example_as_it_is():
    _, _, code = (EXAMPLES / "train_ten_lines.py").read_text().partition('"""\n\n')
    assert code in blocks(ROOT / "README.md", "python")


def test_fp16_example_skips_the_bad_step_and_learns(capsys):
    runpy.run_path(str(EXAMPLES / "train_fp16.py"))
    lines = capsys.readouterr().out.splitlines()
    (bad,) = [line for line in lines if line.startswith("step 120")]
    assert bad.endswith("skipped")
    assert float(re.search(r"loss +(\S+)", lines[-1])[1]) < 0.8  # guessing gives log(10) = 2.3
    assert any("scale 131072" in line for line in lines)  # it grew


def test_fp16_page_shows_its_example_as_it_is():
    _, _, code = (EXAMPLES / "train_fp16.py").read_text().partition('"""\n\n')
    assert code in blocks(ROOT / "docs" / "fp16.md", "python")


def test_compile_example_learns_in_one_graph(capsys):
    runpy.run_path(str(EXAMPLES / "compile.py"))
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[-2].split()[-1]) < 0.4  # guessing gives log(4) = 1.4
    assert lines[-1] == "Sequential train (x: fp32[32, 16])"


def test_compile_page_shows_its_example_as_it_is():
    _, _, code = (EXAMPLES / "compile.py").read_text().partition('"""\n\n')
    assert code in blocks(ROOT / "docs" / "compile.md", "python")


def test_export_example_runs_without_torch_and_is_shown_as_it_is(capsys, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "export_onnx.py"))
    printed = capsys.readouterr().out
    assert float(printed.rpartition("\n")[0].rpartition("\n")[2].partition("%")[0]) > 70
    assert "of the exported graph in torch" in printed
    document = ROOT / "docs" / "onnx.md"
    _, _, code = (EXAMPLES / "export_onnx.py").read_text().partition('"""\n\n')
    assert code in blocks(document, "python")
    shown = blocks(document, "text")[0]
    assert printed.splitlines()[:5] == shown.splitlines()[:5]


def test_overflow_example_finds_pins_and_trains(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "find_overflow.py"))
    printed = capsys.readouterr().out
    assert printed.startswith("loss nan, 100 of 100 steps skipped")
    assert "Forward: %mul_2 (mul.Tensor, fp16) of 3 left the range of fp16." in printed
    assert "with it the step is finite" in printed
    assert printed.endswith(" 0 of 100 steps skipped\n")
    assert [path.name for path in tmp_path.iterdir()] == ["find_overflow.png"]


def test_overflow_page_shows_its_example_as_it_is():
    _, _, code = (EXAMPLES / "find_overflow.py").read_text().partition('"""\n\n')
    assert code in blocks(ROOT / "docs" / "overflow.md", "python")


def test_demo_writes_its_table_picture_and_data(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    demo = runpy.run_path(str(EXAMPLES / "demo.py"), run_name="demo")
    small = demo["GPTConfig"](context=16, width=32, layers=1, heads=2)
    demo["main"](["--steps", "3", "--device", "cpu", "--out", str(tmp_path)], small)

    printed = capsys.readouterr().out
    assert "ms per step" in printed
    assert re.search(
        r"validation loss +fp32 +autocast bf16 +mpgraph bf16\nstep +1( +\d\.\d{4}){3}\n", printed
    )
    assert "attention" in printed  # the precision report of the first block
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "losses.json").read_text())
    losses = {loop["name"]: loop["losses"] for loop in record["loops"]}
    assert [len(values) for values in losses.values()] == [3, 3, 3]
    assert losses["mpgraph bf16"] == pytest.approx(losses["fp32"], abs=0.02)
    casts = {loop["name"]: loop["casts"] for loop in record["loops"]}
    assert casts["fp32"] == 0
    assert casts["mpgraph bf16"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.json", "losses.png"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_the_documents_is_python(document):
    for code in blocks(document, "python"):
        compile(code, document.name, "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


def test_sessions_in_the_documents_give_what_they_show():
    session = "".join(blocks(ROOT / "docs" / "precisions.md", "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, "precisions.md", None, 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 25
    assert result.failed == 0


def test_policy_file_in_the_documents_can_be_read():
    from mpgraph import Policy

    (example,) = blocks(ROOT / "docs" / "policies.md", "toml")
    assert Policy.from_toml(example) == Policy().pin(module="decoder.layers.*.mlp")
