"""Every invariant, broken by hand, is reported with the node and the user's line."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpgraph
from mpgraph import ir, pipeline
from mpgraph.capture import engines, lower
from mpgraph.errors import MPGraphError, VerificationError
from mpgraph.infer import run_on_values
from mpgraph.op_table import Rule
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.pipeline import run_passes
from mpgraph.verify import verify

from .passes.graphs import bf16, cast, context_of, f32, graph_of, parameter

aten = torch.ops.aten


@pytest.fixture
def gm():
    graph = graph_of(
        lambda x, w: F.linear(cast(x, bf16), cast(w, bf16)).exp(), torch.ones(2, 3), parameter(3, 3)
    )
    verify(graph, decided=True)
    return graph


def node_of(gm, name):
    return next(n for n in gm.graph.nodes if n.name == name)


def problem(gm, **options):
    with pytest.raises(VerificationError) as caught:
        verify(gm, **options)
    first, *rest = str(caught.value).splitlines()
    assert rest[-1].startswith("This is a bug in mpgraph, not in your model.")
    return first, rest[:-1]


def test_a_node_without_a_value(gm):
    del node_of(gm, "exp").meta["val"]
    assert problem(gm)[0] == "node %exp (aten.exp.default) has no value."


def test_a_node_that_lost_its_captured_value(gm):
    del node_of(gm, "exp").meta["captured"]
    text = "node %exp (aten.exp.default) has lost the value that it was captured with."
    assert problem(gm)[0] == text


def test_an_inserted_cast_was_never_captured(gm):
    assert "captured" not in node_of(gm, "x_bf16").meta
    verify(gm)


def test_a_decision_that_does_not_hold(gm):
    node_of(gm, "linear").meta["decision"] = ir.Decision(Rule.WIDEN, f32, "in the test", "test")
    verify(gm)  # not yet: casts are still to come
    assert problem(gm, decided=True)[0] == (
        "node %linear (aten.linear.default) should take fp32 inputs, but input %x_bf16 is bf16."
    )


def test_a_value_of_another_dtype_than_torch_gives(gm):
    exp = node_of(gm, "exp")
    exp.meta["val"] = ir.retype(exp.meta["val"], f32)
    verify(gm)
    assert problem(gm, decided=True)[0] == (
        "node %exp (aten.exp.default) is recorded as fp32, but torch gives bf16."
    )


def test_several_values_are_compared_in_order():
    gm = graph_of(lambda x: x.to(bf16).max(-1), torch.ones(2, 3))
    node = next(n for n in gm.graph.nodes if str(n.target) == "aten.max.dim")
    values, indices = node.meta["val"]
    node.meta["val"] = (ir.retype(values, f32), indices)
    first, _ = problem(gm, decided=True)
    assert first.endswith("is recorded as fp32, i64, but torch gives bf16, i64.")


def test_the_pass_and_the_users_line_are_named(gm):
    exp = node_of(gm, "exp")
    exp.meta["stack_trace"] = 'File "/home/me/model.py", line 12, in forward\n    return y.exp()'
    del exp.meta["val"]
    first, rest = problem(gm, after="fold_casts")
    assert first == "after pass 'fold_casts': node %exp (aten.exp.default) has no value."
    assert rest == ["  from: model.py:12: return y.exp()"]


def test_a_broken_graph_is_torchs_own_error(gm):
    exp = node_of(gm, "exp")
    exp.args = (gm.graph.output_node(),)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        verify(gm)


def test_the_error_is_an_error_of_mpgraph():
    assert issubclass(VerificationError, MPGraphError)


# --- Sub-graphs ------------------------------------------------------------------------------


@pytest.fixture
def branched():
    def f(x, w, flag):
        def one(x, w):
            return (F.linear(x, w).sin(),)

        def other(x, w):
            return (F.linear(x, w).cos(),)

        return torch.ops.higher_order.cond(flag, one, other, (x, w))

    context = context_of()
    gm = graph_of(f, torch.ones(2, 3), torch.ones(3, 3), torch.tensor(True), context=context)
    run_passes(gm, DEFAULT_PASSES, context)
    verify(gm, decided=True)
    return gm


def test_sub_graphs_are_entered(branched):
    sin = next(n for n in branched.true_graph_0.graph.nodes if n.name == "sin")
    del sin.meta["val"]
    assert problem(branched)[0] == "node %sin (aten.sin.default) has no value."


def test_a_branch_that_returns_another_dtype(branched):
    graph = branched.true_graph_0.graph
    sin = next(n for n in graph.nodes if n.name == "sin")
    output = graph.output_node()
    output.args = ((ir.add_cast(graph, sin, f32, before=output),),)
    assert problem(branched, decided=True)[0] == (
        "node %cond (cond) yields bf16, but its sub-graph returns fp32."
    )


def test_an_operand_of_another_dtype_than_the_branch_takes(branched):
    (cond,) = branched.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    x, w = cond.args[3]
    narrow = ir.add_cast(branched.graph, x, bf16, before=cond)
    cond.args = (*cond.args[:3], (narrow, w))
    inner = branched.true_graph_0.graph.find_nodes(op="placeholder")[0]
    assert problem(branched, decided=True)[0] == (
        f"node %cond (cond) gives bf16 to a sub-graph that takes fp32 %{inner.name}."
    )


def test_a_factory_of_a_symbolic_size_is_checked_too():
    class Growing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(x.shape[0], 1)

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Growing(), (torch.ones(4, 3),), dynamic_shapes=({0: batch},))
    (zeros,) = [n for n in exported.graph.nodes if "zeros" in str(n.target)]
    assert run_on_values(zeros).dtype is torch.float32


@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_every_fp16_capture_is_checked_for_scaled_gradients(monkeypatch, capture):
    monkeypatch.setattr(pipeline, "checks", [])  # as in production
    for module, name in ((engines, "DEFAULT_PASSES"), (lower, "PASSES")):
        passes = tuple(p for p in getattr(module, name) if "scale" not in p.name)
        monkeypatch.setattr(module, name, passes)
    model = mpgraph.convert(torch.nn.Linear(4, 2), "fp16", capture=capture)
    with pytest.raises(VerificationError, match=r"node %\w+ .*gradient is not scaled"):
        model(torch.ones(3, 4))
    mpgraph.convert(torch.nn.Linear(4, 2), "bf16", capture=capture)(torch.ones(3, 4))
