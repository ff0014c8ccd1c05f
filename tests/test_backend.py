"""torch.compile(model, backend="mpgraph")."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph import backend

bf16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    backend.entries.clear()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.breaks = breaks
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x))).mean((2, 3))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(h).softmax(-1)


def compiled(model, inner="aot_eager", **options):
    return torch.compile(model, backend="mpgraph", options={"inner": inner, **options})


def train(call, model, x):
    model.zero_grad()
    y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["default", "autocast-cpu", mpgraph.Policy("lean")])
@pytest.mark.parametrize("breaks", [False, True])
def test_it_trains_with_the_numbers_of_the_converted_model(policy, breaks):
    torch.manual_seed(0)
    model, x = Model(breaks), torch.randn(4, 3, 8, 8)
    plain = mpgraph.convert(copy.deepcopy(model), "bf16", policy=policy, capture="dynamo")
    call = compiled(model, policy=policy)
    for batch in (x, x[:3], x[:2]):
        found, wanted = train(call, model, batch), train(plain, plain, batch)
        assert_equal(found, wanted)
    assert len({e.label for e in backend.entries}) >= 2 + breaks


def test_inductor_is_what_compiles_it_unless_told_otherwise():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 3, 8, 8)
    plain = mpgraph.convert(copy.deepcopy(model), "bf16")
    call = torch.compile(model, backend="mpgraph", fullgraph=True)
    with torch.autocast("cpu", bf16):  # changes nothing
        found = train(call, model, x)
    for one, other in zip(found, train(plain, plain, x), strict=True):
        near = 0.02 * max(1e-3, float(other.abs().max()))
        torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=near)


def test_explain_works_on_it():
    model, x = Model(breaks=True), torch.randn(4, 3, 8, 8)
    other = nn.Linear(2, 2)
    call = compiled(model, policy=mpgraph.Policy().pin(module="head", run="fp32"))
    call(x)
    for subject in (model, call):
        report = mpgraph.explain(subject)
        assert [graph.engine for graph in report.graphs] == ["backend", "backend"]
        runs = {node.name: node.runs_in for node in report.nodes}
        assert runs["conv2d"] == "bf16"
        assert runs["linear"] == "fp32"
        assert "Model · bf16" in str(report)
    with pytest.raises(mpgraph.MPGraphError, match="convert"):
        mpgraph.explain(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "no loss scale"),
        ({"precision": "bf16-true"}, "changes no parameters"),
        ({"precision": "bf17"}, "bf17"),
        ({"policy": "defualt"}, "defualt"),
        ({"presicion": "bf16"}, "presicion"),
    ],
)
def test_bad_options_are_refused(options, message):
    call = torch.compile(Model(), backend="mpgraph", options=options)
    with pytest.raises(Exception, match=message):
        call(torch.randn(4, 3, 8, 8))


def test_fp32_changes_nothing():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 3, 8, 8)
    plain = copy.deepcopy(model)
    assert_equal(train(compiled(model, precision="fp32"), model, x), train(plain, plain, x))
