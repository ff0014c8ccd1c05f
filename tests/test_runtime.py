"""mpgraph.runtime: what a device without torch sees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph.runtime import BatchError, FolderError, OnnxTrainer, RuntimeSupportError
from mpgraph.runtime.providers import with_options

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """A frozen layer, a batch norm, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 8)
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)
        self.frozen.requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scores."""
        return self.head(self.drop(self.norm(F.relu(self.frozen(features)))))


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss, and how often it is right."""
    scores = model(x).float()
    right = (scores.argmax(1) == y).float().mean()
    return {"loss": F.cross_entropy(scores, y), "accuracy": right}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder, the model that it was made from, and what the export said."""
    torch.manual_seed(0)
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="fp16", compile=False)
    folder = tmp_path_factory.mktemp("exported") / "step"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    said = step.export_onnx(folder, example_inputs=_torch_batch(0))
    # The export leaves everything as it was.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer.state
    assert model.training
    return folder, step.model, said


def _torch_batch(index: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(size, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def batch(index: int, size: int = 8) -> dict[str, Any]:
    """The same batch for the same index."""
    x, y = _torch_batch(index, size)
    return {"x": x.numpy(), "y": y.numpy()}


def _is_same(a: OnnxTrainer, b: OnnxTrainer) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_the_export_says_what_it_wrote(exported: Any) -> None:
    """The folder, every file with its size, and how far onnxruntime is from torch."""
    folder, _, said = exported
    title, *rows = str(said).splitlines()
    assert title == f"{folder} · fp16 · for cpu, opset 18"
    assert {row.split()[0] for row in rows} == {*(p.name for p in folder.iterdir()), "check"}
    size = (folder / "state.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB" in next(row for row in rows if "state.safetensors" in row)
    assert rows[-1].endswith(f"onnxruntime is within {said.error:.1e} of the step in torch")
    assert len(repr(said)) < len(str(folder)) + 100


def test_it_trains_and_reports(exported: Any) -> None:
    """Loss, skip, scale, and what the loss function returns besides."""
    trainer = OnnxTrainer(exported[0])
    trainer.lr = 0.05
    seen: list[int] = []
    history = trainer.fit(
        [batch(i) for i in range(30)], epochs=2, progress=False,
        callbacks=[lambda t, result: seen.append(result["step"])],
    )  # fmt: skip
    losses = [record["loss"] for record in history]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:5])
    assert set(history[0]) == {"loss", "accuracy", "skipped", "scale", "epoch", "step"}
    assert seen == [*range(1, 61)]
    assert trainer.steps == 60


def test_a_callback_ends_the_training(exported: Any) -> None:
    """The rest of the batches is left."""
    trainer = OnnxTrainer(exported[0], verify=False)
    history = trainer.fit(
        [batch(i) for i in range(9)], progress=False, callbacks=[lambda t, r: r["step"] == 4]
    )
    assert len(history) == 4


def test_a_bar_shows_the_progress(exported: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """How many batches, and the loss."""
    OnnxTrainer(exported[0], verify=False).fit([batch(i) for i in range(3)])
    printed = capsys.readouterr().out
    assert "epoch 1/1" in printed
    assert "3/3" in printed


def test_frozen_parameters_are_apart_from_the_state(exported: Any) -> None:
    """They are read, and get no gradients."""
    trainer = OnnxTrainer(exported[0], verify=False)
    assert "frozen.weight" in {tensor.name for tensor in trainer.manifest.frozen}
    assert not any(name.startswith("frozen") for name in trainer.state_dict())
    text = (exported[0] / "train_step.onnx").read_bytes()
    assert b"next.frozen" not in text


def test_evaluation_and_prediction_equal_those_of_torch(exported: Any) -> None:
    """In evaluation mode: from the state, as it is after some steps."""
    folder, model, _ = exported
    trainer = OnnxTrainer(folder, verify=False)
    for index in range(3):
        trainer.step(**batch(index))
    state = {k: torch.from_numpy(v) for k, v in trainer.state_dict().items()}
    other = mpgraph.convert(Net(), "fp16")
    other.load_state_dict(
        {**model.state_dict(), **{k: state[k] for k in state if k in other.state_dict()}}
    )
    other.eval()
    x, y = _torch_batch(7, 5)
    with torch.no_grad():
        scores, told = other(x), loss_fn(other, x, y)
    found = trainer.predict(features=x.numpy())["output"]
    np.testing.assert_allclose(found, scores.float().numpy(), rtol=2e-3, atol=1e-3)
    assert trainer.evaluate([batch(7, 5)])["loss"] == pytest.approx(float(told["loss"]), rel=2e-3)
    mixed = trainer.evaluate([batch(7, 5), batch(8, 3)])
    alone = [trainer.evaluate([batch(7, 5)]), trainer.evaluate([batch(8, 3)])]
    assert mixed["loss"] == pytest.approx((5 * alone[0]["loss"] + 3 * alone[1]["loss"]) / 8)


def test_saving_and_loading_goes_on_to_the_same_bits(exported: Any, tmp_path: Path) -> None:
    """Dropout, counters, learning rate and scale among them."""
    first, second = (OnnxTrainer(exported[0], verify=False) for _ in range(2))
    for index in range(3):
        first.step(**batch(index))
    first.lr = 0.005
    first.save(tmp_path / "at 3")
    second.load(tmp_path / "at 3")
    assert second.lr == 0.005
    assert second.steps == 3
    for index in range(3, 6):
        assert first.step(**batch(index)) == second.step(**batch(index))
    assert _is_same(first, second)


def test_a_failed_save_leaves_the_old_file(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing beside it."""
    trainer = OnnxTrainer(exported[0], verify=False)
    trainer.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    trainer.step(**batch(0))
    monkeypatch.setattr("os.replace", _fails)
    with pytest.raises(OSError, match="disk"):
        trainer.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def _fails(*_: Any) -> None:
    raise OSError("the disk is full")


def test_one_buffer_and_two_give_the_same_bits(exported: Any) -> None:
    """Where state is written over, everything has read it before."""
    one, two = OnnxTrainer(exported[0], verify=False), OnnxTrainer(exported[0], in_place=False)
    assert any(tensor.in_place for tensor in one.manifest.state)
    for index in range(20):
        assert one.step(**batch(index)) == two.step(**batch(index))
    assert _is_same(one, two)


def test_the_learning_rate_is_an_input(exported: Any) -> None:
    """With 0 and no decay, nothing moves; a number that the step lacks is refused."""
    trainer = OnnxTrainer(exported[0], verify=False)
    before = trainer.state_dict()["head.weight"]
    trainer.lr = 0.0
    trainer.step(**batch(0))
    assert np.array_equal(trainer.state_dict()["head.weight"], before)
    with pytest.raises(BatchError, match="no number 'momentum'"):
        trainer.set_number("momentum", 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "y missing"),
        ({"z": np.zeros(8)}, "z unknown"),
        ({"x": np.zeros((8, 6))}, "x has dtype float64, expected float32"),
        ({"x": np.zeros((8, 5), np.float32)}, r"x has shape \[8, 5\], expected \[batch, 6\]"),
        ({"x": np.zeros((8, 6, 1), np.float32)}, "x has shape"),
        ({"y": np.zeros(7, np.int64)}, "y has 7 rows and x has 8"),
    ],
)
def test_a_wrong_batch_is_refused(exported: Any, change: dict[str, Any], message: str) -> None:
    """By name, dtype and size; the state stays as it was."""
    trainer = OnnxTrainer(exported[0], verify=False)
    before = trainer.state_dict()
    given = {k: v for k, v in {**batch(0), **change}.items() if v is not None}
    with pytest.raises(BatchError, match=message):
        trainer.step(**given)
    assert all(np.array_equal(v, before[k]) for k, v in trainer.state_dict().items())


def test_damaged_folders_are_refused(exported: Any, tmp_path: Path) -> None:
    """Each message says what is wrong, and what to do."""
    with pytest.raises(FolderError, match=r"no exported step.*export_onnx"):
        OnnxTrainer(tmp_path)
    folder = Path(shutil.copytree(exported[0], tmp_path / "copy"))
    bits = bytearray((folder / "state.safetensors").read_bytes())
    bits[-1] ^= 1
    (folder / "state.safetensors").write_bytes(bits)
    with pytest.raises(FolderError, match=r"state\.safetensors is damaged"):
        OnnxTrainer(folder)
    (folder / "train_step.onnx").unlink()
    with pytest.raises(FolderError, match=r"train_step\.onnx is missing"):
        OnnxTrainer(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(FolderError, match="has format 99"):
        OnnxTrainer(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(FolderError, match=r"manifest\.json is damaged"):
        OnnxTrainer(folder)


def test_a_checkpoint_of_another_step_is_refused(exported: Any, tmp_path: Path) -> None:
    """It might fit, and mean something else."""
    trainer = OnnxTrainer(exported[0], verify=False)
    trainer.save(tmp_path / "state")
    changed = {**trainer.manifest.files, "train_step.onnx": "0"}
    object.__setattr__(trainer.manifest, "files", changed)
    with pytest.raises(FolderError, match="saved from another step"):
        trainer.load(tmp_path / "state")
    with pytest.raises(FolderError, match="no checkpoint"):
        trainer.load(exported[0] / "state.safetensors")


def test_a_provider_that_is_not_there_is_refused(exported: Any) -> None:
    """Not replaced by another."""
    with pytest.raises(RuntimeSupportError, match=r"has no RocmExecutionProvider.*it has"):
        OnnxTrainer(exported[0], providers=["RocmExecutionProvider"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the provider starts here")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_for_a_gpu_is_not_run_by_the_cpu_instead(precision: str, tmp_path: Path) -> None:
    """Its export cannot be checked here, which it says; nor does it train unless that is asked."""
    model = nn.Linear(3, 2)
    step = mpgraph.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: model(x).float().square().mean(), precision=precision, compile=False,
    )  # fmt: skip
    report = step.export_onnx(tmp_path, example_inputs=(torch.ones(4, 3),), target="cuda")
    assert "CUDAExecutionProvider does not run here" in str(report)
    with pytest.raises(RuntimeSupportError, match=r"does not start on this|this onnxruntime has"):
        OnnxTrainer(tmp_path, verify=False)
    if precision == "fp32":
        trainer = OnnxTrainer(tmp_path, providers=["CPUExecutionProvider"])
        assert trainer.step(x=np.ones((4, 3), np.float32))["loss"] > 0


def test_fp32_products_on_a_gpu_use_tf32_only_where_that_is_the_precision() -> None:
    assert with_options("CUDAExecutionProvider", "tf32")[1] == {"use_tf32": 1}
    for precision in ("fp32", "bf16", "fp16"):
        assert with_options("CUDAExecutionProvider", precision)[1] == {"use_tf32": 0}
    own = ("CUDAExecutionProvider", {"use_tf32": 1, "device_id": 1})
    assert with_options(own, "fp32") == own
    assert with_options("CPUExecutionProvider", "fp32") == ("CPUExecutionProvider", {})


def test_a_runtime_that_does_not_round_is_refused(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers would differ from those of the export, and overflows would go unseen."""
    monkeypatch.setattr(
        "mpgraph.runtime.sessions._ROUNDED", {"float16": np.copy, "bfloat16": np.copy}
    )
    with pytest.raises(RuntimeSupportError, match="does not round to float16"):
        OnnxTrainer(exported[0])


_WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript"):
            raise ModuleNotFoundError(name + " is not there", name=name)

sys.meta_path.insert(0, Refuse())
from mpgraph.runtime import OnnxTrainer
import numpy as np
trainer = OnnxTrainer(sys.argv[1])
rng = np.random.default_rng(0)
x = rng.standard_normal((8, 6), dtype=np.float32)
history = trainer.fit([{"x": x, "y": x[:, :3].argmax(1)}] * 3)
trainer.save(sys.argv[2])
trainer.load(sys.argv[2])
print(trainer.predict(features=x)["output"].shape, len(history))
assert not {"torch", "onnx"} & set(sys.modules)
import mpgraph
try:
    mpgraph.convert
except ImportError as error:
    print(error)
"""


def test_training_needs_no_torch(exported: Any, tmp_path: Path) -> None:
    """In a process where torch and onnx cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(exported[0]), str(tmp_path / "state")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(8, 3) 3" in done.stdout
    assert "mpgraph with its extra 'torch'" in done.stdout


def test_the_command_trains_and_goes_on(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From .npz files, with a checkpoint after each epoch."""
    from mpgraph.cli import main

    x, y = _torch_batch(3, 64)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    call = ["finetune", str(exported[0]), "--data", str(tmp_path / "data.npz"), "--json"]
    call += ["--eval-data", str(tmp_path / "data.npz"), "--save", str(tmp_path / "state")]
    assert main([*call, "--epochs", "3", "--batch-size", "16", "--lr", "0.02"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["steps"] == 12
    losses = [epoch["evaluation"]["loss"] for epoch in first["epochs"]]
    assert losses[-1] < losses[0]
    assert main([*call, "--resume", str(tmp_path / "state")]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["steps"] == 14
    assert second["epochs"][0]["evaluation"]["loss"] < losses[0]
    np.savez(tmp_path / "other.npz", x=x.numpy())
    assert main(["finetune", str(exported[0]), "--data", str(tmp_path / "other.npz")]) == 1
    assert "also needs y" in capsys.readouterr().err


def test_the_command_says_which_loss_is_which(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of training, as a mean, and that of the evaluation after it."""
    from mpgraph.cli import main

    x, y = _torch_batch(3, 64)
    data = str(tmp_path / "data.npz")
    np.savez(data, x=x.numpy(), y=y.numpy())
    call = ["finetune", str(exported[0]), "--data", data, "--eval-data", data]
    assert main([*call, "--batch-size", "16"]) == 0
    assert re.fullmatch(
        r"epoch 1: training loss \d\.\d{4} \(mean of 4 steps, 0 skipped\), "
        r"evaluation loss \d\.\d{4}, evaluation accuracy \d\.\d{4}",
        capsys.readouterr().out.splitlines()[-1],
    )


def test_the_command_verifies_a_folder(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the steps that torch took at export; a file of another model is found out."""
    from mpgraph.cli import main

    assert main(["verify", str(exported[0])]) == 0
    assert "step 3: loss" in capsys.readouterr().out
    from mpgraph.runtime.manifest import checksum, read_manifest
    from mpgraph.runtime.tensors import read_arrays, write_arrays

    folder = Path(shutil.copytree(exported[0], tmp_path / "copy"))
    arrays, _ = read_arrays(folder / "state.safetensors")
    arrays["head.weight"] = -arrays["head.weight"]
    write_arrays(folder / "state.safetensors", arrays, {})
    manifest = read_manifest(folder)
    sums = {**manifest.files, "state.safetensors": checksum(folder / "state.safetensors")}
    object.__setattr__(manifest, "files", sums)
    manifest.write(folder)
    assert main(["verify", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["loss_error"] > 0.05


def test_an_export_that_fails_its_check_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise mpgraph.ExportError("it differs")

    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="fp32", compile=False)
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr("mpgraph.onnx.step_export.check_step", fail)
    with pytest.raises(mpgraph.ExportError, match="it differs"):
        step.export_onnx(tmp_path, example_inputs=_torch_batch(0))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
