"""The rule of the loss scale: GradScaler's, with a floor, a ceiling and hysteresis."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import mpgraph
from mpgraph.loss_scale import LossScale

WIDE = {"min_scale": 2.0**-126, "max_scale": 2.0**127}


def walk(scale: LossScale, found: list[bool]) -> list[tuple[float, int]]:
    """Scale and growth counter after every step."""
    seen = []
    for overflow in found:
        scale = scale.next(torch.tensor(float(overflow)))
        seen.append((scale.scale.item(), int(scale.growth_tracker.item())))
    return seen


def grad_scaler_walk(found: list[bool], **rule: Any) -> list[tuple[float, int]]:
    """The same walk by torch's own scaler, with gradients that are finite or not."""
    scaler = torch.amp.GradScaler("cpu", **rule)
    scaler.scale(torch.ones(()))
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    seen = []
    for overflow in found:
        parameter.grad = torch.tensor([float("inf") if overflow else 1.0])
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return seen


def model_walk(rule: LossScale, found: list[bool]) -> list[tuple[float, int]]:
    """The rule once more, in plain Python."""
    scale, finite, left = rule.init_scale, 0, rule.hysteresis
    seen = []
    for overflow in found:
        if overflow:
            finite, left = 0, max(left - 1, 0)
            if left == 0:
                scale = max(scale * rule.backoff_factor, rule.min_scale)
        else:
            finite, left = finite + 1, rule.hysteresis
            if finite == rule.growth_interval:
                scale, finite = min(scale * rule.growth_factor, rule.max_scale), 0
        seen.append((scale, finite))
    return seen


@settings(max_examples=40, deadline=None)
@given(
    found=st.lists(st.booleans(), max_size=60),
    interval=st.integers(1, 5),
    start=st.sampled_from([2.0**16, 1.0, 2.0**100]),
)
def test_equals_grad_scaler_on_any_walk(found, interval, start):
    rule = {"init_scale": start, "growth_interval": interval}
    assert walk(LossScale(**rule, **WIDE), found) == grad_scaler_walk(found, **rule)


def test_equals_grad_scaler_over_ten_thousand_steps():
    generator = random.Random(0)
    found = [generator.random() < 0.04 for _ in range(10_000)]
    rule = {"growth_interval": 17}
    got = walk(LossScale(**rule, **WIDE), found)
    assert got == grad_scaler_walk(found, **rule)
    assert 2.0**-120 < min(got)[0] < 2.0**8 < 2.0**18 < max(got)[0] < 2.0**120  # it wanders


def test_a_growth_beyond_float32_is_dropped():
    rule = {"init_scale": 2.0**126, "growth_interval": 1}
    assert walk(LossScale(**rule, **WIDE), [False] * 4) == grad_scaler_walk([False] * 4, **rule)


@settings(max_examples=60, deadline=None)
@given(
    found=st.lists(st.booleans(), max_size=60),
    hysteresis=st.integers(1, 4),
    interval=st.integers(1, 4),
)
def test_floor_ceiling_and_hysteresis_follow_the_rule(found, hysteresis, interval):
    rule = LossScale(
        init_scale=4.0,
        min_scale=1.0,
        max_scale=16.0,
        hysteresis=hysteresis,
        growth_interval=interval,
    )
    assert walk(rule, found) == model_walk(rule, found)


def test_a_static_scale_stays():
    scale = LossScale(init_scale=8.0, dynamic=False)
    assert walk(scale, [True, False, True]) == [(8.0, 0)] * 3


def test_next_leaves_the_value_as_it_was():
    scale = LossScale(init_scale=8.0, growth_interval=1)
    kept = scale.scale
    assert scale.next(torch.tensor(0.0)).scale.item() == 16.0
    assert scale.next(torch.tensor(1.0)).scale.item() == 4.0
    assert scale.scale is kept
    assert kept.item() == 8.0


def test_next_waits_for_no_value(monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("a host sync")

    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    LossScale(hysteresis=2).next(torch.ones(())).next(torch.zeros(()))


@pytest.mark.parametrize(
    "name", ["init_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"]
)
@pytest.mark.parametrize("value", [3.0, 0.0, -2.0, float("inf"), float("nan")])
def test_only_powers_of_two_are_taken_and_the_error_says_why(name, value):
    with pytest.raises(mpgraph.PrecisionError, match=rf"{name} must be a power of two.*is exact"):
        LossScale(**{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"growth_factor": 0.5}, "growth_factor must be above 1.*dynamic=False"),
        ({"backoff_factor": 1.0}, "backoff_factor below"),
        ({"growth_interval": 0}, "growth_interval must be an integer from 1"),
        ({"hysteresis": 0}, "hysteresis must be an integer from 1"),
        ({"init_scale": 2.0**25}, "must lie between min_scale and max_scale"),
        ({"init_scale": 2.0**-15}, "must lie between min_scale and max_scale"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message):
    with pytest.raises(mpgraph.PrecisionError, match=message):
        LossScale(**change)


def other() -> LossScale:
    """A value of which no field has its default: a field that is left out shows up."""
    return LossScale(
        init_scale=2.0,
        growth_factor=4.0,
        backoff_factor=0.25,
        growth_interval=7,
        hysteresis=3,
        min_scale=0.5,
        max_scale=8.0,
        dynamic=False,
        scale=torch.tensor(4.0),
        growth_tracker=torch.tensor(5, dtype=torch.int32),
        hysteresis_tracker=torch.tensor(2, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    "round_trip",
    [
        lambda value: pytree.tree_unflatten(*pytree.tree_flatten(value)),
        lambda value: LossScale.from_state_dict(value.state_dict(), "cpu"),
        lambda value: pickle.loads(pickle.dumps(value)),
        copy.deepcopy,
        lambda value: value.to("cpu"),
    ],
    ids=["pytree", "state_dict", "pickle", "deepcopy", "to"],
)
def test_every_field_survives(round_trip):
    value = other()
    defaults = dataclasses.asdict(LossScale())
    got = dataclasses.asdict(round_trip(value))
    for name, want in dataclasses.asdict(value).items():
        assert want != defaults[name], f"{name} has its default here: the test would not notice"
        assert got[name] == want
        assert type(got[name]) is type(want)


def test_the_leaves_are_the_tensors():
    leaves, _ = pytree.tree_flatten(other())
    assert [leaf.item() for leaf in leaves] == [4.0, 5, 2]


def test_a_tree_map_may_put_anything_in_the_tensors_place():
    assert pytree.tree_map(lambda t: str(t.item()), other()).scale == "4.0"


@pytest.mark.parametrize("hysteresis", [1, 3])
def test_the_rule_in_a_graph_is_the_rule(hysteresis: int) -> None:
    """As operators that a step's graph holds, over a random walk, floor and ceiling included."""
    value = mpgraph.LossScale(
        init_scale=16.0, growth_interval=3, hysteresis=hysteresis, min_scale=1.0, max_scale=64.0
    )
    tensors = [value.scale, value.growth_tracker, value.hysteresis_tracker]
    generator = torch.Generator().manual_seed(0)
    for probability in (0.1, 0.5, 0.9) * 100:
        found = torch.rand((), generator=generator).lt(probability).float()
        value, tensors = value.next(found), value.moved(found, *tensors)
        assert value.scale == tensors[0]
        assert value.growth_tracker == tensors[1]
