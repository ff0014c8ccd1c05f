"""An exported step computes what the step in torch computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpgraph.onnx.functional import in_plain_operators

from .step_models import CASES
from .step_pairs import InTorch, Pair, errors, in_torch_state

QUICK = ("mlp", "cnn", "gpt")
DETERMINISTIC = [name for name, case in CASES.items() if not case.draws]


def _cases(names: list[str], quick: tuple[str, ...] = QUICK) -> list[object]:
    marks = {False: pytest.mark.slow, True: ()}
    return [pytest.param(name, marks=marks[name in quick], id=name) for name in names]


@pytest.mark.parametrize("name", _cases(DETERMINISTIC, quick=("mlp", "cnn")))
def test_fp32_steps_equal_those_of_torch(name: str, tmp_path: Path) -> None:
    """From the same state: loss, parameters, momenta (which are gradients), statistics."""
    pair = Pair(CASES[name], "fp32", tmp_path)
    for size in (4, 7, 1):  # others than it was exported with
        batch = CASES[name].batch(size)
        pair.trainer._buffers.put({k: v.numpy() for k, v in in_torch_state(pair).items()})
        with in_plain_operators():
            loss = pair.step(*batch)
        result = pair.trainer.step(**pair.named(batch))
        assert result["loss"] == pytest.approx(float(loss), rel=1e-5)
        found = errors(pair.trainer.state_dict(), in_torch_state(pair), CASES[name].zero)
        assert max(found.values()) <= 1e-5, found


# Two units of the 16-bit type, of the largest element.
UNITS = {"fp16": 2 * 2.0**-10, "bf16": 2 * 2.0**-7}


def _in_16_bit() -> Iterator[Any]:
    """Of the GPT, one precision is quick enough."""
    for name in CASES:
        for precision in ("fp16", "bf16"):
            is_quick = name in QUICK and (name, precision) != ("gpt", "bf16")
            marks = () if is_quick else pytest.mark.slow
            yield pytest.param(name, precision, marks=marks, id=f"{name}-{precision}")


@pytest.mark.parametrize(("name", "precision"), [*_in_16_bit()])
def test_16_bit_steps_equal_their_graph_in_torch(name: str, precision: str, tmp_path: Path) -> None:
    """The graph that was exported, run by torch, dropout included."""
    pair = Pair(CASES[name], precision, tmp_path)
    torch_step = InTorch(pair)
    for size in (4, 3):
        batch = CASES[name].batch(size)
        results, state = torch_step.step(batch)
        result = pair.trainer.step(**pair.named(batch))
        unit = UNITS[precision]
        assert result["loss"] == pytest.approx(float(results["loss"]), rel=unit)
        found = errors(pair.trainer.state_dict(), state, CASES[name].zero)
        assert max(found.values()) <= unit, found
        if name == "mlp":
            for key, value in pair.trainer.state_dict().items():
                assert np.array_equal(value, state[key].numpy()), key


@pytest.mark.parametrize("name", _cases([name for name in CASES if CASES[name].draws]))
def test_dropout_draws_the_same_numbers_everywhere(name: str, tmp_path: Path) -> None:
    """In fp32, where another mask would show at once; and others at every step."""
    pair = Pair(CASES[name], "fp32", tmp_path)
    torch_step, batch = InTorch(pair), CASES[name].batch(5)
    losses = []
    for _ in range(2):
        results, state = torch_step.step(batch)
        losses.append(pair.trainer.step(**pair.named(batch))["loss"])
        assert losses[-1] == pytest.approx(float(results["loss"]), rel=1e-5)
        found = errors(pair.trainer.state_dict(), state, CASES[name].zero)
        assert max(found.values()) <= 1e-5, found
    assert pair.trainer.state_dict()["random.step"] == 2
    assert pair.trainer.state_dict()["random.seed"] == 7


def _overflows(index: int) -> bool:
    return index % 29 in (3, 4, 11)


@pytest.mark.slow
def test_skips_and_scale_follow_torch_over_200_steps(tmp_path: Path) -> None:
    """found_inf, skips and scale: with overflows from outside, and a scale that grows."""
    case = CASES["mlp"]
    scale = _scale(growth_interval=7)
    pair = Pair(case, "fp16", tmp_path, scale=scale, max_grad_norm=1.0)
    skipped = {"torch": [], "onnx": []}
    scales = {"torch": [], "onnx": []}
    for index in range(200):
        x, y = case.batch(4)
        if _overflows(index):
            x = x * 1e30
        pair.step(x, y)
        skipped["torch"].append(bool(pair.step.last_step_skipped))
        scales["torch"].append(float(pair.step.settings.state.scale.value.scale))
        result = pair.trainer.step(**pair.named((x, y)))
        skipped["onnx"].append(result["skipped"])
        scales["onnx"].append(result["scale"])
    assert skipped["onnx"] == skipped["torch"]
    assert scales["onnx"] == scales["torch"]
    assert sum(skipped["onnx"]) > 20
    assert len(set(scales["onnx"])) > 3


def _scale(**options: int) -> object:
    import mpgraph

    return mpgraph.LossScale(init_scale=2.0**12, **options)


def test_a_skipped_step_changes_nothing_but_the_scale(tmp_path: Path) -> None:
    """Bit for bit; and the step after it goes on."""
    pair = Pair(CASES["mlp"], "fp16", tmp_path, torch.optim.AdamW)
    x, y = CASES["mlp"].batch(4)
    pair.trainer.step(**pair.named((x, y)))
    before = pair.trainer.state_dict()
    assert pair.trainer.step(**pair.named((x * 1e30, y)))["skipped"]
    after = pair.trainer.state_dict()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"loss_scale.growth_tracker", "loss_scale.scale"}
    assert after["loss_scale.scale"] == before["loss_scale.scale"] / 2
    assert not pair.trainer.step(**pair.named((x, y)))["skipped"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_accumulated_batches_equal_those_of_torch(precision: str, tmp_path: Path) -> None:
    """Updates at every third batch; sums and their count are state."""
    case = CASES["mlp"]
    pair = Pair(case, precision, tmp_path, accumulation_steps=3, max_grad_norm=0.5)
    for index in range(7):
        batch = case.batch(4)
        before = pair.trainer.state_dict()["0.weight"]
        pair.step(*batch)
        pair.trainer.step(**pair.named(batch))
        after = pair.trainer.state_dict()
        assert np.array_equal(before, after["0.weight"]) is (index % 3 != 2)
        expected = in_torch_state(pair)
        expected["batches"] = torch.tensor((index + 1) % 3)
        found = errors(after, expected)
        assert max(found.values()) <= (1e-5 if precision == "fp32" else UNITS["fp16"]), found
