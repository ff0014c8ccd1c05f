"""As little is traced for evaluation as will do, and what is not traced is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph.onnx import forward_trace
from mpgraph.runtime import OnnxTrainer

pytest.importorskip("onnxruntime")


class Two(nn.Module):
    """Returns two tensors; the loss need not read both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Of unlike arguments, so that it shows if they are confused."""
        return {"y": self.layer(x) + shift, "z": self.other(x)}


def plain(model: nn.Module, shift: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """The batch is in another order than the arguments, and has one tensor more."""
    return (model(x, shift)["y"] - target).square().mean()


def asking(model: nn.Module, shift: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Half as much in evaluation."""
    return (model(x, shift)["y"] - target).square().mean() * (1.0 if model.training else 0.5)


def writing(model: nn.Module, shift: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """What the model has returned is written to."""
    return (model(x, shift)["y"].mul_(2.0) - target).square().mean()


def writing_first(model: nn.Module, shift: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """What the model is given is written to."""
    x = x.clone()
    return (model(x.mul_(2.0), shift)["y"] - target).square().mean()


def computing_first(model: nn.Module, shift: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """What the model is given is computed from the batch."""
    return (model(x + 1.0, shift)["y"] - target).square().mean()


def twice(model: nn.Module, shift: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Two calls."""
    return (model(x, shift)["y"] - model(x + 1.0, shift)["z"] - target).square().mean()


def fixing(model: nn.Module, shift: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """In evaluation, the loss holds for one size of the batch alone."""
    assert model.training or x.shape[0] == 5
    return (model(x, shift)["y"] - target).square().mean()


def another_in_evaluation(model: nn.Module, shift: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """In evaluation, the model is called with something else."""
    given = (x, shift) if model.training else (x, target)
    return (model(*given)["y"] - target).square().mean()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"shift": torch.randn(5, 3), "x": torch.randn(5, 4), "target": torch.randn(5, 3)}


def exported(
    model: nn.Module, loss: Callable[..., Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> int:
    """How many traces there were in evaluation mode."""
    traces = []
    trace = forward_trace.trace_results

    def counted(*args: Any) -> Any:
        traces.append(args)
        return trace(*args)

    monkeypatch.setattr(forward_trace, "trace_results", counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, optimizer, loss, precision="fp32", compile=False)
    step.export_onnx(folder, example_inputs=tuple(batch().values()))
    return len(traces)


def assert_predicts(folder: Path, model: nn.Module) -> None:
    """As the model does, for a batch of another size."""
    arguments = {"x": torch.randn(3, 4), "shift": torch.randn(3, 3)}
    trainer = OnnxTrainer(folder, threads=1)
    found = trainer.predict(**{name: value.numpy() for name, value in arguments.items()})
    for name, expected in model(**arguments).items():
        torch.testing.assert_close(torch.from_numpy(found[name]), expected.detach())


def test_one_trace_answers_two_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two()
    assert exported(model, asking, tmp_path, monkeypatch) == 1
    assert_predicts(tmp_path, model)


def test_nothing_is_traced_again_where_nothing_asks_for_the_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Two()
    assert exported(model, plain, tmp_path, monkeypatch) == 0
    assert_predicts(tmp_path, model)
    arrays = {name: value.numpy() for name, value in batch().items()}
    found = OnnxTrainer(tmp_path, threads=1).evaluate([arrays])["loss"]
    assert found == pytest.approx(plain(model, **batch()).item(), rel=1e-6)


class Asking(Two):
    """Another thing in evaluation."""

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Shifted in training alone."""
        return super().forward(x, shift if self.training else torch.zeros_like(shift))


class AskingTable(Two):
    """The same, asked in another way."""

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Shifted in training alone."""
        return super().forward(x, shift if vars(self)["training"] else torch.zeros_like(shift))


class Told(Two):
    """Told of the mode."""

    scale = 1.0

    def train(self, mode: bool = True) -> Told:
        """Three times as much in evaluation."""
        self.scale = 1.0 if mode else 3.0
        return super().train(mode)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Scaled."""
        return super().forward(self.scale * x, shift)


class ToldByEval(Told):
    """Told of evaluation by ``eval()`` alone."""

    train = nn.Module.train

    def eval(self) -> ToldByEval:
        """Three times as much."""
        self.scale = 3.0
        return super().eval()


class Dropping(Two):
    """Asks in a module of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Dropped in training alone."""
        return super().forward(self.dropout(x), shift)


@pytest.mark.parametrize("kind", [Asking, AskingTable, Told, ToldByEval, Dropping])
def test_a_model_that_knows_its_mode_is_traced_in_evaluation(
    kind: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kind()
    assert exported(model, plain, tmp_path, monkeypatch) == 1
    assert_predicts(tmp_path, model.eval())


MORE = {
    writing: 1, writing_first: 1, computing_first: 1, twice: 1, fixing: 2, another_in_evaluation: 2
}  # fmt: skip


@pytest.mark.parametrize("loss", MORE)
def test_a_loss_that_does_more_than_call_the_model(
    loss: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Two()
    assert exported(model, loss, tmp_path, monkeypatch) == MORE[loss]
    assert_predicts(tmp_path, model)


def test_hooks_around_the_model_are_part_of_what_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Two()
    model.register_forward_hook(lambda _, __, result: {k: v * 3.0 for k, v in result.items()})
    assert exported(model, plain, tmp_path, monkeypatch) == 1
    assert_predicts(tmp_path, model)


class Noisy(nn.Linear):
    """Draws in evaluation too, as a variational autoencoder does."""

    def forward(self, x: Tensor) -> Tensor:
        """With noise in the dtype of the layer."""
        y = super().forward(x)
        return y + torch.randn_like(y) + torch.rand_like(y) + y[torch.randperm(y.shape[0])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_drawn_in_evaluation_is_drawn_by_the_runtime(
    precision: str, tmp_path: Path
) -> None:
    """In every precision; of a step in training, by its own counter."""
    model = Noisy(4, 3)
    step = mpgraph.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: model(x).float().square().mean(),
        precision=precision,
        compile=False,
    )
    step.export_onnx(tmp_path, example_inputs=(torch.randn(5, 4),))
    x = torch.randn(7, 4).numpy()
    first, second = (OnnxTrainer(tmp_path, threads=1) for _ in range(2))
    assert first.evaluate([{"x": x}])["loss"] != first.evaluate([{"x": x}])["loss"]
    assert first.step(x=x)["loss"] == second.step(x=x)["loss"]
