"""The check of an exported step refuses what is wrong, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpgraph
from mpgraph.onnx import step_check, step_export
from mpgraph.runtime import OnnxTrainer

pytest.importorskip("onnxruntime")


class Attention(nn.Module):
    """One head, in parts of their own: a bias of keys changes no weight of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mixed rows."""
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return weights @ self.value(x)


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Squares."""
    return model(x).float().square().mean()


def export(folder: Path, precision: str = "fp32") -> Any:
    model = Attention()
    step = mpgraph.TrainStep(
        model, torch.optim.AdamW(model.parameters()), loss_fn, precision=precision, compile=False
    )
    return step.export_onnx(folder, example_inputs=(torch.randn(3, 6, 8),), inference=False)


def wrong(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have onnxruntime return another value than it does."""
    run = step_check._run

    def other(session: Any, graph: Any, given: Any, pieces: Any) -> Any:
        names = [*graph.results, *(port.name for port in graph.state())]
        pairs = zip(names, run(session, graph, given, pieces), strict=True)
        return [value * factor if key == name else value for key, value in pairs]

    monkeypatch.setattr(step_check, "_run", other)


def test_a_gradient_of_rounding_noise_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the keys' bias; of all others, what is said is how far they are."""
    wrong("key.bias.exp_avg", -1.0, monkeypatch)
    assert export(tmp_path).error < 1e-4


@pytest.mark.parametrize("name", ["key.weight.exp_avg", "value.bias.exp_avg_sq", "loss"])
def test_a_value_that_is_wrong_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(name, 1.1, monkeypatch)
    with pytest.raises(mpgraph.ExportError, match=rf"differ in (next\.)?{name} by 0\.1"):
        export(tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_the_step_starts_from_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics, counters and momenta are; the check is given those of the model."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    compared: list[bool] = []

    def watched(graph: Any, given: Any) -> Any:
        before = [value.clone() for value in given]
        returned = in_torch(graph, given)
        compared.append(all(map(torch.equal, before, given)))
        return returned

    in_torch = step_check.in_torch
    for module in (step_check, step_export):
        monkeypatch.setattr(module, "in_torch", watched)
    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="fp32", compile=False)
    step.export_onnx(tmp_path, example_inputs=(torch.randn(3, 3, 6, 6),))
    assert len(compared) >= 3
    assert all(compared)


class Weighted(nn.Module):
    """A layer that is handed something it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, note: torch.Tensor) -> torch.Tensor:
        """Two numbers for each row."""
        return self.layer(x)


def test_tensors_that_nothing_reads_are_taken_all_the_same(tmp_path: Path) -> None:
    """For training, evaluation and prediction, as in torch; the others keep their places."""
    model = Weighted()
    step = mpgraph.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x, note, target: (model(x, note).float() - target).square().mean(),
        precision="bf16", compile=False,
    )  # fmt: skip
    batch = {"x": torch.randn(4, 8), "note": torch.ones(4, 2), "target": torch.randn(4, 2)}
    assert step.export_onnx(tmp_path, example_inputs=tuple(batch.values())).error < 1e-6
    arrays = {name: value.numpy() for name, value in batch.items()}
    trainer = OnnxTrainer(tmp_path, threads=1)
    expected = pytest.approx(float(step(*batch.values())), rel=1e-6)
    assert trainer.evaluate([arrays])["loss"] == expected
    assert trainer.step(**arrays)["loss"] == expected
    output = trainer.predict(x=arrays["x"], note=arrays["note"])["output"]
    expected = step.model(batch["x"], batch["note"]).float()
    torch.testing.assert_close(torch.from_numpy(output), expected)
