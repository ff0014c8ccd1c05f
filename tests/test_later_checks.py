"""A loss that looks at values only to refuse them is captured, and refuses them when it runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph


def given(m, x, y, variance):
    return F.gaussian_nll_loss(m(x), y, variance)


def predicted(m, x, y, variance):
    return F.gaussian_nll_loss(m(x), y, F.softplus(m(y)), full=True)


def by_module(m, x, y, variance):
    return nn.GaussianNLLLoss(reduction="sum")(m(x), y, variance[:, :1])


def number(m, x, y, variance):
    return F.gaussian_nll_loss(m(x), y, 0.5)


def step_and_batch(loss):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    step = mpgraph.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss, precision="fp32"
    )
    return step, (torch.randn(8, 4), torch.randn(8, 4), torch.rand(8, 4) + 0.5)


@pytest.mark.parametrize("loss", [given, predicted, by_module, number])
def test_a_step_with_gaussian_nll_loss_is_that_of_the_loop(loss):
    step, batch = step_and_batch(loss)
    model = copy.deepcopy(step.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        found = step(*batch)
        expected = loss(model, *batch)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(step.model.weight, model.weight, rtol=0, atol=1e-7)


def test_a_negative_variance_stops_the_step_that_gets_it():
    step, (x, y, variance) = step_and_batch(given)
    step(x, y, variance)
    with pytest.raises(RuntimeError, match="gaussian_nll_loss refuses the values it was given"):
        step(x, y, -variance)


def test_other_questions_about_values_are_refused_as_before():
    step, batch = step_and_batch(lambda m, x, y, v: m(x).sum() if torch.any(v < 0) else m(x).mean())
    with pytest.raises(mpgraph.CaptureError, match="needs the value of a tensor"):
        step(*batch)


def test_an_exported_step_has_the_loss_without_the_check(tmp_path):
    pytest.importorskip("onnxruntime")
    step, batch = step_and_batch(given)
    expected = given(copy.deepcopy(step.model), *batch).item()
    step.export_onnx(tmp_path, example_inputs=batch, inference=False)
    trainer = mpgraph.runtime.OnnxTrainer(tmp_path)
    names = ("x", "y", "variance")
    result = trainer.step(**{n: v.numpy() for n, v in zip(names, batch, strict=True)})
    assert float(result["loss"]) == pytest.approx(expected, rel=1e-5)
