"""The mpgraph command: what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mpgraph.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]

MODEL = """
    import torch
    from torch import nn
    import mpgraph

    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8)

    def converted():
        model, x = plain()
        return mpgraph.convert(model, "bf16"), (x,)

    def named():
        class Named(nn.Linear):
            def forward(self, features):
                return super().forward(features)
        return Named(8, 4), {"features": torch.randn(2, 8)}

    def alone():
        return nn.Linear(2, 2)

    number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a user's file in it."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODEL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


def run(capsys, *arguments):
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_export_then_inspect_the_file(here, capsys):
    pytest.importorskip("onnxruntime")
    code, out, _ = run(capsys, "export", "mine.py:plain", "m.onnx", "--precision", "bf16")
    assert code == 0
    assert out.startswith("m.onnx · bf16 · for cpu, opset 18\n")
    assert "gives the bits of the exported graph in torch" in out
    assert "the model was in training mode" in out
    code, out, _ = run(capsys, "inspect", "m.onnx")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("m.onnx · ")
    assert lines[0].endswith(" · ai.onnx 18")
    assert "  takes  input: fp32[batch, 8]" in lines
    assert "  precision: bf16" in lines
    assert not any("opset" in line for line in lines)  # once is enough
    row = next(line for line in lines if line.startswith("Gemm"))
    assert row.split() == ["Gemm", "2"]
    assert lines[-2] == "casts: 7 bf16 → fp32, 3 fp32 → bf16"
    assert lines[-1] == "weights: 424 bytes bf16"


def test_a_reader_that_stops_is_no_error(here):
    """As ``head`` does."""
    pytest.importorskip("onnxruntime")
    assert main(["export", "mine.py:plain", "model.onnx", "--precision", "bf16"]) == 0
    code = "import sys; from mpgraph.cli import main; sys.exit(main(['inspect', 'model.onnx']))"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_inspect_a_file_as_json(here, capsys):
    pytest.importorskip("onnxruntime")
    run(capsys, "export", "mine:converted", "m.onnx", "--external-data", "--no-verify")
    code, out, _ = run(capsys, "inspect", "m.onnx", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["opsets"] == {"": 18}
    assert found["operators"]["Gemm"] == {"fp32": 2}
    assert found["weights"] == {"bf16": 424}
    assert found["file_bytes"] == sum(path.stat().st_size for path in here.glob("m.onnx*"))


def test_export_as_json_with_options(here, capsys):
    pytest.importorskip("onnxruntime")
    code, out, _ = run(
        capsys, "export", "mine:named", "m.onnx", "--precision", "fp16", "--target", "portable",
        "--opset", "20", "--weights", "fp32", "--fixed-sizes", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert report["inputs"] == ["features: fp32[2, 8]"]
    assert (report["target"], report["opset"]) == ("portable", 20)


def test_inspect_a_model(here, capsys):
    code, out, _ = run(capsys, "inspect", "mine:plain", "--precision", "bf16")
    assert code == 0
    assert out.startswith("Sequential · bf16 · policy default")
    code, out, _ = run(capsys, "inspect", "mine:converted", "--json")
    assert code == 0
    assert json.loads(out)["graphs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "missing.onnx"], "there is no file 'missing.onnx'"),
        (["inspect", "mine.py"], "expected module:function or file.py:function, found 'mine.py'"),
        (["inspect", "nowhere:f"], "there is no module 'nowhere' here"),
        (["inspect", "nowhere.py:f"], "there is no file 'nowhere.py'"),
        (["inspect", "mine:missing"], "mine has no function 'missing'"),
        (["inspect", "mine:number"], "mine has no function 'number'"),
        (["inspect", "mine:alone"], "mine:alone must return (model, inputs), found Linear"),
        (["inspect", "mine:converted", "--precision", "fp16"], "leave --precision out"),
        (["export", "mine:converted", "no/m.onnx"], "the folder 'no' does not exist"),
        (["export", "mine:converted", "m.onnx", "--target", "tpu"], "unknown target 'tpu'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(here, capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("mpgraph: error: ")
    assert message in err


def test_a_file_that_is_not_onnx_is_refused(here, capsys):
    pytest.importorskip("onnx")
    (here / "text.onnx").write_text("hello, this is no model")
    code, _, err = run(capsys, "inspect", "text.onnx")
    assert code == 1
    assert "'text.onnx' is not an ONNX file" in err


def test_a_module_with_a_broken_import_shows_its_own_error(here):
    (here / "broken.py").write_text("import not_installed_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        main(["inspect", "broken:f"])


def test_without_a_command_help_is_printed(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    for command in COMMANDS:
        assert f"\n    {command} " in out


def test_help_needs_no_torch():
    check = (
        "import sys; from mpgraph.cli import _parser; _parser(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
