"""An update is traced for one parameter of each kind; the others do the same."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mpgraph.onnx import alike_update
from mpgraph.onnx.alike_update import trace_alike_update
from mpgraph.onnx.first_state import with_state
from mpgraph.passes.tensor_numbers import tensor_numbers
from mpgraph.pipeline import run_passes
from mpgraph.policy import Policy
from mpgraph.step.joint import StepContext, mark
from mpgraph.step.trace_update import trace_update


def model():
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2))


def given(optimizer, names):
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {names[id(p)]: mode.from_tensor(p.detach()) for p in parameters}, mode


def both(make):
    net = model()
    names = {id(p): name for name, p in net.named_parameters()}
    optimizer = with_state(make(net.parameters()))
    context = StepContext(Policy(), None)
    alike = trace_alike_update(optimizer, names, *given(optimizer, names), context)
    whole = trace_update(optimizer, names, *given(optimizer, names))
    for update in (alike, whole):
        mark(update.graph_module.graph, "update")
        run_passes(update.graph_module, (tensor_numbers,), context)
    return net, optimizer, alike, whole


def run(update, optimizer):
    """The new values, from gradients and numbers that differ from parameter to parameter."""
    values = []
    for node in update.graph_module.graph.find_nodes(op="placeholder"):
        slot = node.meta["slot"]
        if slot.kind == "gradient":
            generator = torch.Generator().manual_seed(len(slot.name) + ord(slot.name[0]))
            values.append(torch.randn(node.meta["val"].shape, generator=generator))
        elif slot.like is not None:
            values.append(torch.tensor(slot.read(), dtype=slot.like.dtype))
        else:
            values.append(copy.deepcopy(slot.read()))
    with torch.no_grad():
        return update.graph_module(*values)


MAKES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "groups": lambda p: torch.optim.Adam([{"params": [q], "lr": 0.1 * i} for i, q in enumerate(p)]),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_new_values_equal_those_of_a_whole_trace_to_the_bit(make):
    _, optimizer, alike, whole = both(make)
    found, expected = run(alike, optimizer), run(whole, optimizer)
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_one_parameter_of_each_kind_is_traced(monkeypatch):
    traced = []

    def noted(optimizer, names, gradients, mode):
        traced.append(list(gradients))
        return trace_update(optimizer, names, gradients, mode)

    monkeypatch.setattr(alike_update, "trace_update", noted)
    both(MAKES["adamw"])
    assert traced == [["0.weight", "0.bias", "3.weight", "3.bias"]]


class Mixing(torch.optim.AdamW):
    """Each parameter's step depends on the others."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        total = sum(p.grad.sum() for p in parameters)
        for parameter in parameters:
            parameter.sub_(total * parameter.grad)


def test_an_optimizer_that_is_not_known_is_traced_whole():
    _, optimizer, alike, whole = both(lambda p: Mixing(p, lr=0.1))
    found, expected = run(alike, optimizer), run(whole, optimizer)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_values_that_depend_on_two_parameters_are_noticed(monkeypatch):
    monkeypatch.setattr(alike_update, "LOOPS", frozenset({Mixing}))
    _, optimizer, alike, whole = both(lambda p: Mixing(p, lr=0.1))
    found, expected = run(alike, optimizer), run(whole, optimizer)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
