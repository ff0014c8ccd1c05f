"""calibrate: pins for what fp16 would not hold, with the evidence, and no trace on the model."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph import Override, Policy


class Net(nn.Module):
    """Layers whose values, or gradients, are much larger or smaller than the others'."""

    def __init__(self, value: float = 1.0, gradient: float = 1.0) -> None:
        super().__init__()
        self.value, self.gradient = value, gradient
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x) * self.value)
        side = self.second(x).float() * self.gradient
        return self.last(self.third(h)).float() + side.mean(1, keepdim=True)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


BATCHES = [torch.randn(6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def calibrated(model: nn.Module, **options: Any) -> Policy:
    return mpgraph.calibrate(model, BATCHES, loss_of, **options)


def test_what_fits_gets_no_pins():
    assert calibrated(Net()) == Policy()


def test_what_overflows_is_pinned_with_its_evidence():
    policy = calibrated(Net(value=1e7))
    assert policy.overrides == (Override(node="mul"),)
    (reason,) = [o.reason for o in policy.overrides]
    assert reason.startswith("mul: value up to ")
    assert reason.endswith("(3 batches)")
    model = mpgraph.convert(Net(value=1e7), "fp16", policy=policy)
    assert mpgraph.blame(model, BATCHES[0], loss_fn=lambda y: y.square().mean()).is_finite


def test_margin_decides_how_near_a_value_may_come():
    peak = max(Net(value=1e4).first(x).abs().max().item() for x in BATCHES) * 1e4
    assert 5e3 < peak < 6e4
    assert not calibrated(Net(value=1e4), margin=1.0).overrides
    assert calibrated(Net(value=1e4), margin=16.0).overrides


@pytest.mark.parametrize("gradient", [1e-13, 1e9])
def test_gradients_apart_from_the_rest_are_pinned(gradient):
    policy = calibrated(Net(gradient=gradient))
    assert policy.overrides == (Override(module="second"),)
    assert "gradient" in policy.overrides[0].reason
    assert "vanish" in policy.overrides[0].reason or gradient > 1
    assert "at scale " in policy.overrides[0].reason


def test_scale_is_in_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="mpgraph"):
        calibrated(Net())
    assert "calibrated on 3 batches: 0 pins; guard the optimizer with scale=" in caplog.text


def test_reasons_go_through_toml_and_into_explain(tmp_path):
    policy = calibrated(Net(value=1e7), policy=Policy().pin(module="last"))
    policy.save(tmp_path / "policy.toml")
    loaded = Policy.load(tmp_path / "policy.toml")
    assert loaded == policy
    assert [o.reason for o in loaded.overrides] == [o.reason for o in policy.overrides]
    assert loaded.overrides[0] == Override(module="last")
    assert "reason" not in str(policy)
    model = mpgraph.convert(Net(value=1e7), "fp16", policy=loaded, example_inputs=(BATCHES[0],))
    (node,) = [n for n in mpgraph.explain(model).nodes if n.name == "mul"]
    assert node.reason == f"the policy says fp32: {policy.overrides[1].reason}"


@pytest.mark.parametrize("convert", [False, True])
def test_calibrate_leaves_no_trace(convert):
    model: nn.Module = Net()
    if convert:
        model = mpgraph.convert(model, "bf16")
    loss_of(model, BATCHES[0]).backward()
    values = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    before = [v.clone() for v in values]
    random_state, kind = torch.get_rng_state(), type(model)
    calibrated(model)
    after = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(after, values, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(model) is kind


def test_model_that_returns_its_loss_needs_no_loss_fn():
    class WithLoss(Net):
        def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
            return {"loss": (super().forward(x) - target).square().mean()}

    batches = [{"x": x, "target": torch.zeros(6, 4)} for x in BATCHES]
    assert mpgraph.calibrate(WithLoss(value=1e7), batches).overrides == (Override(node="mul"),)
    with pytest.raises(mpgraph.MPGraphError, match="returns no loss: pass loss_fn"):
        mpgraph.calibrate(Net(), BATCHES)


def test_steps_limit_the_batches_and_a_generator_will_do():
    taken = []

    def batches() -> Any:
        for x in BATCHES:
            taken.append(x)
            yield x

    policy = mpgraph.calibrate(Net(value=1e7), batches(), loss_of, steps=2)
    assert policy.overrides[0].reason.endswith("(2 batches)")
    assert len(taken) == 2


def test_no_batch_is_an_error():
    with pytest.raises(mpgraph.MPGraphError, match="was given no batch"):
        mpgraph.calibrate(Net(), [], loss_of)


def test_progress_is_shown_if_asked_for(capsys):
    calibrated(Net(), progress=True)
    assert "3/3" in capsys.readouterr().err
    calibrated(Net())
    assert capsys.readouterr().err == ""
