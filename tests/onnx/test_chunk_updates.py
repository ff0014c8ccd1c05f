"""Updates in pieces: the same bits, from files that keep less in memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from onnx import checker, parser
from torch import nn

import mpgraph
from mpgraph.onnx import chunk_updates as chunked
from mpgraph.onnx import targets
from mpgraph.onnx.chunk_updates import chunk_updates, pieces_of
from mpgraph.onnx.in_place import in_place
from mpgraph.runtime import OnnxTrainer

optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}
WEIGHTS = ("0.weight", "2.weight")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are large from 64 elements on, and pieces have 32 at most."""
    monkeypatch.setattr(chunked, "ELEMENTS", 64)
    cpu = dataclasses.replace(targets.TARGETS["cpu"], piece=32)
    monkeypatch.setitem(targets.TARGETS, "cpu", cpu)


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(x).float(), y)


def export(
    folder: Path, make: Callable[[Any], optim.Optimizer], precision: str, **options: Any
) -> OnnxTrainer:
    """A trainer of two layers with large weights, and one without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 3))
    step = mpgraph.TrainStep(
        model, make(model.parameters()), loss_fn, precision=precision, compile=False, **options
    )
    example = (torch.randn(4, 8), torch.arange(4) % 3)
    step.export_onnx(folder, example_inputs=example)
    return OnnxTrainer(folder, threads=1, verify=False)


def batch(index: int, factor: float = 1.0) -> dict[str, Any]:
    """The same batch for the same index."""
    x = np.random.default_rng(index).standard_normal((5, 8), dtype=np.float32)
    return {"x": x * np.float32(factor), "y": np.arange(5) % 3}


def assert_same_state(one: OnnxTrainer, other: OnnxTrainer) -> None:
    """Shapes and bits."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.shape == b[name].shape, name
        assert value.tobytes() == b[name].tobytes(), name


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_in_pieces_gives_the_bits_of_training_whole(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16 with a batch that overflows; in place, in turn, and after a checkpoint."""
    pieces = export(tmp_path / "pieces", OPTIMIZERS[name], precision)
    monkeypatch.setattr("mpgraph.onnx.step_export.chunk_updates", lambda *_: {})
    whole = export(tmp_path / "whole", OPTIMIZERS[name], precision)
    in_turn = OnnxTrainer(tmp_path / "pieces", in_place=False, verify=False)
    state = {tensor.name: tensor for tensor in pieces.manifest.state}
    large = [t for n, t in state.items() if n.startswith(WEIGHTS) and t.shape]
    assert {t.pieces for t in large} == {(3, 32), (6, 24)}
    assert all(t.in_place for t in large)
    assert not any(t.pieces for t in whole.manifest.state)
    for index in range(5):
        given = batch(index, 1e9 if index == 2 else 1.0)
        results = [repr(trainer.step(**given)) for trainer in (pieces, whole, in_turn)]
        assert len(set(results)) == 1
        assert ("'skipped': True" in results[0]) == (precision == "fp16" and index == 2)
    assert_same_state(pieces, whole)
    assert_same_state(in_turn, whole)
    assert repr(pieces.evaluate([batch(9)])) == repr(whole.evaluate([batch(9)]))  # may be NaN
    pieces.save(tmp_path / "checkpoint")
    again = OnnxTrainer(tmp_path / "pieces", verify=False)
    again.load(tmp_path / "checkpoint")
    for trainer in (again, whole):
        trainer.step(**batch(7))
    assert_same_state(again, whole)


@pytest.mark.usefixtures("small")
def test_what_lies_between_two_values_of_the_state_is_as_large_as_a_piece(tmp_path: Path) -> None:
    """All that is left of a weight's size: its view, its gradient, and the next state."""
    export(tmp_path, OPTIMIZERS["adamw"], "fp32")
    model = onnx_ir.load(tmp_path / "train_step.onnx")
    full = [
        value.name
        for node in model.graph
        for value in node.outputs
        if value.shape is not None and np.prod([n for n in value.shape if isinstance(n, int)]) == 96
        if node.op_type not in ("Reshape", "Transpose")
    ]
    assert len(full) == 5, full  # a product, w, and three moments
    assert {node.domain for node in model.graph.all_nodes()} == {""}


@pytest.mark.usefixtures("small")
def test_clipped_gradients_and_their_sums_are_read_in_pieces(tmp_path: Path) -> None:
    """The norm and the finite check read them whole before that."""
    trainer = export(tmp_path, OPTIMIZERS["adamw"], "fp16", max_grad_norm=1.0, accumulation_steps=2)
    model = onnx_ir.load(tmp_path / "train_step.onnx")
    scans = [node for node in model.graph if node.op_type == "Scan"]
    assert len(scans) == 2
    for index in range(4):
        assert trainer.step(**batch(index))["skipped"] is False


@pytest.mark.usefixtures("small")
def test_a_factored_moment_stays_whole(tmp_path: Path) -> None:
    """Adafactor's update has sums over rows and norms: what is behind them is in pieces."""
    trainer = export(tmp_path, lambda p: optim.Adafactor(p, lr=0.01), "fp32")
    found = [tensor.name for tensor in trainer.manifest.state if tensor.pieces]
    assert sorted(found) == [*WEIGHTS]


def test_other_targets_keep_the_update_whole(tmp_path: Path) -> None:
    """On a GPU each piece would be a launch of its own."""
    assert {name for name, target in targets.TARGETS.items() if target.piece} == {"cpu"}


_HEAD = '<ir_version: 9, opset_import: ["" : 18]> step (float[4, 8] w, float[4, 8] g, float lr)'
# Body; the names that are in pieces afterwards; those of them that may be written over.
BODIES: dict[str, tuple[str, set[str], set[str]]] = {
    "an element-wise update": (
        "(float[4, 8] n) { h = Mul(g, lr)  n = Sub(w, h) }", {"w"}, {"w"},
    ),
    "one node alone gains nothing": (
        "(float[4, 8] n) { n = Sub(w, g) }", set(), {"w"},
    ),
    "a norm in between stays outside": (
        "(float[4, 8] n) <float[1, 1] s, float[4, 8] h>"
        "{ s = ReduceSum(g)  h = Div(g, s)  k = Mul(h, lr)  n = Sub(w, k) }",
        {"w"}, {"w"},
    ),
    "a number of two dimensions would make a result of two": (
        "(float[4, 8] n) <float[1, 1] s> { s = ReduceSum(g)  h = Div(g, s)  n = Sub(w, h) }",
        set(), {"w"},
    ),
    "what is read elsewhere too is an input": (
        "(float[4, 8] n, float l)"
        "{ h = Mul(g, lr)  l = ReduceSum <keepdims = 0> (h)  k = Mul(h, lr)  n = Sub(w, k) }",
        {"w"}, {"w"},
    ),
    "a product of the old value that is needed for the next one": (
        "(float[4, 8] n) <float[4, 8] h>"
        "{ t = Transpose(w)  p = MatMul(g, t)  h = MatMul(p, g)  k = Mul(h, lr)  n = Sub(w, k) }",
        {"w"}, {"w"},
    ),
    "a product of the old value that the update waits for": (
        "(float[4, 8] n, float[4, 4] y)"
        "{ t = Transpose(w)  h = Mul(g, lr)  n = Sub(w, h)  y = MatMul(g, t) }", {"w"}, {"w"},
    ),
    "a view of the old value is a result": (
        "(float[4, 8] n, float[8, 4] t) { t = Transpose(w)  h = Mul(g, lr)  n = Sub(w, h) }",
        {"w"}, set(),
    ),
    "another Scan goes over the old value's own rows": (
        "(float[4, 8] n, float s) <float[4, 1] r>"
        "{ r = Scan <num_scan_inputs = 1, body = rows (float[8] a) => (float[1] b)"
        " { b = ReduceSum(a) }> (w)  s = ReduceSum <keepdims = 0> (r)"
        " h = Mul(g, lr)  n = Sub(w, h) }", {"w"}, {"w"},
    ),
    "a number is cast to the type of what lies in between, which it has": (
        "(float[4, 8] n) { h = Mul(g, lr)  c = CastLike(lr, h)  n = Clip(h, c) }", {"w"}, {"w"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_only_what_is_element_wise_is_computed_in_pieces(
    body: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what then may be written over; the file is a valid one."""
    monkeypatch.setattr(chunked, "ELEMENTS", 32)
    text, expected, safe = BODIES[body]
    model = onnx_ir.from_proto(parser.parse_model(f"{_HEAD} => {text}"))
    found = chunk_updates(model, {"w": "n"}, 16)
    assert set(found) == expected
    assert in_place(model, {"w": "n"}) == safe
    onnx_ir.save(model, tmp_path / "model.onnx")
    checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_an_update_that_reads_the_old_value_of_another_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An average of a weight: two Scans, and the weight is not written over."""
    monkeypatch.setattr(chunked, "ELEMENTS", 32)
    head = _HEAD.replace("step (", "step (float[4, 8] e, ")
    body = "{ h = Mul(g, lr)  n = Sub(w, h)  k = Mul(w, lr)  m = Add(e, k) }"
    text = f"{head} => (float[4, 8] n, float[4, 8] m) {body}"
    model = onnx_ir.from_proto(parser.parse_model(text))
    state = {"w": "n", "e": "m"}
    assert chunk_updates(model, state, 16) == {"w": (2, 16), "e": (2, 16)}
    assert in_place(model, state) == {"e"}
    onnx_ir.save(model, tmp_path / "model.onnx")
    checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_pieces_are_equal_and_no_larger_than_asked_for() -> None:
    """A prime number of elements has none."""
    assert pieces_of(2048 * 2048, 128 * 1024) == (32, 128 * 1024)
    assert pieces_of(1000 * 2048, 128 * 1024) == (16, 128000)
    assert pieces_of(100, 100) == (2, 50)
    assert pieces_of(262147, 128 * 1024) is None


def test_a_manifest_without_pieces_is_read(tmp_path: Path) -> None:
    """Folders of the format before go on."""
    export(tmp_path, OPTIMIZERS["momentum"], "fp32")
    path = tmp_path / "manifest.json"
    found = json.loads(path.read_text())
    for tensor in found["state"]:
        assert tensor.pop("pieces") == []
    path.write_text(json.dumps({**found, "format": 1}))
    assert OnnxTrainer(tmp_path).step(**batch(0))["skipped"] is False
