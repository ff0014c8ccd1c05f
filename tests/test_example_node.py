"""A folder trained by examples/on_device.mjs: the losses of OnnxTrainer."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph.onnx.targets import TARGETS

save_file = pytest.importorskip("safetensors.numpy").save_file

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
INSTALLED = ROOT / "build" / "node"
NPM = ("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline")


@pytest.fixture(scope="module")
def script() -> Path:
    """The example beside its packages, which npm installs once, into build/node."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with locked(INSTALLED / "lock"):
        wanted, found = EXAMPLES / "package.json", INSTALLED / "installed.json"
        if not found.exists() or found.read_text() != wanted.read_text():
            shutil.copy(wanted, INSTALLED / "package.json")
            install()
            shutil.copy(wanted, found)
        # Node looks for packages beside the script, wherever it is called from.
        return Path(shutil.copy(EXAMPLES / "on_device.mjs", INSTALLED))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Workers of pytest-xdist wait for one another: one of them installs."""
    fcntl = pytest.importorskip("fcntl")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install() -> None:
    """Skip where the registry cannot be reached."""
    try:
        done = subprocess.run(NPM, cwd=INSTALLED, capture_output=True, text=True, timeout=200)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not install onnxruntime-node within 200 s")
    if done.returncode:
        reason, *_ = done.stderr.strip().splitlines() or [f"it exited with {done.returncode}"]
        pytest.skip(f"npm could not install onnxruntime-node: {reason}")


class Net(nn.Module):
    """A frozen layer, a statistic, random numbers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 16).requires_grad_(False)
        self.norm, self.drop, self.head = nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        return self.head(self.drop(F.relu(self.norm(self.frozen(x)))))


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the examples return."""
    scores = model(x).float()
    accuracy = (scores.argmax(1) == y).float().mean()
    return {"loss": F.cross_entropy(scores, y), "accuracy": accuracy}


def export(folder: Path, precision: str, target: str) -> None:
    """A step, and rows to train with (the last batch is a small one) and to test with."""
    torch.manual_seed(0)
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    step = mpgraph.TrainStep(
        model, optimizer, loss_fn, precision=precision, compile=False, max_grad_norm=1.0
    )
    example = rows(32, 0)
    step.export_onnx(folder / "step", example_inputs=example, target=target, verify=False)
    for name, count in (("train", 32 * 12 + 5), ("test", 100)):
        x, y = rows(count, 1)
        save_file({"x": x.numpy(), "y": y.numpy()}, folder / f"{name}.safetensors")


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many rows, and which of three numbers in each is the largest."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


def trained_by(command: list[object], folder: Path, runtime: str) -> tuple[list[float], str]:
    """The losses that a program has written, and what it has printed behind its name."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    name, _, reached = done.stdout.partition(":")
    assert name == runtime
    return json.loads((folder / f"losses-{runtime}.json").read_text()), reached


CASES = [("bf16", "cpu"), ("fp16", "web"), pytest.param("fp32", "web", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("precision", "target"), CASES)
def test_javascript_trains_to_the_losses_of_python(
    script: Path, tmp_path: Path, precision: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Node's build of onnxruntime bit for bit; the one for browsers adds in another order.

    For the CPU with an update in pieces.
    """
    monkeypatch.setattr("mpgraph.onnx.chunk_updates.ELEMENTS", 48)
    cpu = dataclasses.replace(TARGETS["cpu"], piece=16)
    monkeypatch.setitem(TARGETS, "cpu", cpu)
    export(tmp_path, precision, target)
    manifest = json.loads((tmp_path / "step" / "manifest.json").read_text())
    pieces = {tensor["name"]: tensor["pieces"] for tensor in manifest["state"]}
    assert pieces["head.weight"] == ([3, 16] if target == "cpu" else [])
    python = [sys.executable, EXAMPLES / "on_device.py", tmp_path]
    expected, reached = trained_by(python, tmp_path, "onnxruntime")
    assert len(expected) == 13
    assert np.mean(expected[-4:]) < 0.8 * expected[0]
    node = trained_by(["node", script, tmp_path], tmp_path, "onnxruntime-node")
    assert node == (expected, reached)
    web, _ = trained_by(["node", script, tmp_path, "onnxruntime-web"], tmp_path, "onnxruntime-web")
    np.testing.assert_allclose(web, expected, rtol=1e-5)  # found: 1.9e-7
