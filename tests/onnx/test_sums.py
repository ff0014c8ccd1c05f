"""Sums at places that repeat: onnxruntime adds one after the other, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpgraph
from mpgraph.onnx.lowering.scattering import _index_put
from mpgraph.runtime import OnnxTrainer

ONNX = pytest.importorskip("onnx")

CASES: dict[str, tuple[tuple[int, ...], list[Any], tuple[int, ...]]] = {
    "first": ((5, 3), [(2, 4)], (2, 4, 3)),
    "last": ((5, 3), [None, (4,)], (5, 4)),
    "in the middle": ((5, 3, 4), [None, (2, 2)], (5, 2, 2, 4)),
    "two side by side": ((5, 3, 4), [(6,), (6,)], (6, 4)),
    "two side by side, later": ((5, 3, 4), [None, (6,), (6,)], (5, 6)),
    "two apart": ((5, 3, 4), [(6,), None, (6,)], (6, 3)),
    "two that broadcast": ((5, 3, 4), [(2, 1), (1, 3)], (2, 3, 4)),
    "values that broadcast": ((5, 3), [(4,)], (3,)),
    "one value": ((5, 3), [None, (4,)], ()),
    "all": ((5, 3), [(7,), (7,)], (7,)),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_equal_those_of_torch(name: str) -> None:
    """To the bit: in the same order."""
    shape, indices, values = CASES[name]
    torch.manual_seed(0)
    x, given = torch.randn(shape, dtype=torch.float64), torch.randn(values, dtype=torch.float64)
    places = [
        None if size is None else torch.randint(-shape[dim], shape[dim], size)
        for dim, size in enumerate(indices)
    ]
    expected = torch.ops.aten.index_put(x, places, given, True)
    torch.testing.assert_close(_index_put(x, places, given, True), expected, rtol=1e-14, atol=0)


def test_what_is_put_once_or_where_a_mask_is_true_is_not_added() -> None:
    x, mask = torch.zeros(3), torch.tensor([True, False, True])
    assert _index_put(x, [torch.tensor([1])], torch.ones(1)) is NotImplemented
    assert _index_put(x, [mask], torch.ones(2), True) is NotImplemented


class Tokens(nn.Module):
    """Looks up few tokens many times, in an embedding, by index and by index_select."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 256)
        self.places = nn.Parameter(torch.randn(8, 256))
        self.kinds = nn.Parameter(torch.randn(8, 256))
        self.bags = nn.EmbeddingBag(8, 256, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        """A number for every row."""
        hidden = self.words(x) * self.places[x] + self.kinds.index_select(0, x.flatten()).view(
            *x.shape, 256
        )
        return hidden.mean((1, 2)) + self.bags(x).mean(-1)


def _exported(model: nn.Module, loss: Callable[..., Any], batch: Any, folder: Path) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = mpgraph.TrainStep(model, optimizer, loss, precision="fp32", compile=False)
    step.export_onnx(folder, example_inputs=batch, verify=False, inference=False)


def test_steps_that_look_tokens_up_are_the_same_on_several_threads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, 8, (16, 128)), torch.randn(16)
    _exported(Tokens(), lambda model, x, y: F.mse_loss(model(x), y), (x, y), tmp_path)
    found = []
    for threads in (1, *[2] * 10):
        trainer = OnnxTrainer(tmp_path, threads=threads, verify=False)
        trainer.step(x=x.numpy(), y=y.numpy())
        found.append(trainer.state_dict())
    for state in found[1:]:
        for name, value in state.items():
            np.testing.assert_allclose(value, found[0][name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_no_exported_step_adds_by_scatter_nd(tmp_path: Path) -> None:
    x, y = torch.randint(0, 8, (4, 5)), torch.randn(4)
    _exported(Tokens(), lambda model, x, y: F.mse_loss(model(x), y), (x, y), tmp_path)
    nodes = ONNX.load(tmp_path / "train_step.onnx").graph.node
    adding = [n for n in nodes if n.op_type == "ScatterND" and b"add" in str(n).encode()]
    assert adding == []
