from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mpgraph import ir
from mpgraph.errors import PolicyError
from mpgraph.graph_text import format_graph, text
from mpgraph.op_table import Rule
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.passes.assign_dtypes import assign_dtypes
from mpgraph.pipeline import run_passes
from mpgraph.policy import Policy

from .graphs import (
    assert_same,
    bf16,
    casts,
    context_of,
    f16,
    f32,
    f64,
    graph_of,
    parameter,
    results_and_grads,
)


def decide(function, *inputs, **options):
    context = context_of(**options)
    gm = graph_of(function, *inputs, context=context)
    (report,) = run_passes(gm, [assign_dtypes], context)
    return gm, report.edits


def decision(gm, operator):
    (node,) = gm.graph.find_nodes(op="call_function", target=operator)
    return node.meta["decision"]


def dtypes(gm):
    return {n.name: ir.dtype_of(n) for n in gm.graph.nodes if n.op == "call_function"}


def test_every_operator_gets_a_dtype_and_a_reason():
    def f(x, w):
        return F.linear(x, w).relu().exp()

    gm, edits = decide(f, torch.randn(2, 3), parameter(3, 3))
    assert edits == 3
    assert format_graph(gm.graph, decisions=True) == "\n".join(
        [
            "%x: fp32[2, 3] = input",
            "%p_w: fp32[3, 3] = input",
            "%linear: bf16[2, 3] = linear(%x, %p_w)  # lower -> bf16 (preset default)",
            "%relu: bf16[2, 3] = relu(%linear)  # follow (preset default)",
            "%exp: fp32[2, 3] = exp(%relu)  # widen -> fp32 (preset default)",
            "return %exp",
        ]
    )
    assert decision(gm, torch.ops.aten.exp.default).reason == "float16 overflows above x = 11.09"


def test_the_compute_dtype_is_the_conversion_s():
    gm, _ = decide(lambda x, w: F.linear(x, w), torch.ones(2, 3), parameter(3, 3), compute=f16)
    assert dtypes(gm) == {"linear": f16}


def test_without_a_compute_dtype_nothing_is_lowered():
    gm, _ = decide(lambda x, w: F.linear(x, w), torch.ones(2, 3), parameter(3, 3), compute=None)
    assert dtypes(gm) == {"linear": f32}
    assert decision(gm, torch.ops.aten.linear.default).dtype is None


@pytest.mark.parametrize("dtype", [f64, torch.int64, torch.complex64], ids=str)
def test_dtypes_that_no_rule_may_change_are_left_alone(dtype):
    gm, _ = decide(lambda x: torch.mm(x, x), torch.ones(3, 3, dtype=dtype))
    assert dtypes(gm) == {"mm": dtype}
    assert decision(gm, torch.ops.aten.mm.default).dtype is None


def test_promotion_is_torch_s_own():
    def f(x, w):
        h = F.linear(x, w)
        return h + 1.5, h + x, h * x.sum(), h.sum() * h

    gm, _ = decide(f, torch.randn(2, 3), parameter(3, 3), preset="autocast-cpu")
    # A zero-dimensional float32 tensor does not promote a bfloat16 matrix.
    assert dtypes(gm) == {
        "linear": bf16, "add": bf16, "add_1": f32, "sum_1": f32, "mul": bf16, "sum_2": bf16,
        "mul_1": bf16,
    }  # fmt: skip


def test_the_widest_input_decides_where_the_row_says_so():
    def f(x, w):
        return torch.cat([F.linear(x, w), x])

    gm, _ = decide(f, torch.randn(2, 3), parameter(3, 3), preset="autocast-cpu")
    assert decision(gm, torch.ops.aten.cat.default).dtype is f32


def test_an_operator_that_writes_is_never_decided():
    def f(x, w):
        return F.linear(x, w).relu_().add_(x)

    gm, _ = decide(f, torch.randn(2, 3), parameter(3, 3))
    assert dtypes(gm) == {"linear": bf16, "relu_": bf16, "add_": bf16}
    assert decision(gm, torch.ops.aten.add_.Tensor).dtype is None


def test_not_even_an_override_casts_what_is_written_to():
    # The operator would write into the copy.
    policy = Policy("default").pin(op="aten.relu_.default", run="fp32")
    overrides = {"overrides": policy.overrides}
    gm, _ = decide(
        lambda x, w: F.linear(x, w).relu_(), torch.randn(2, 3), parameter(3, 3), policy=overrides
    )
    assert decision(gm, torch.ops.aten.relu_.default).dtype is None


def test_a_reduction_s_dtype_argument_is_set():
    gm, _ = decide(lambda x: x.to(bf16).sum(-1), torch.randn(2, 3))
    found = decision(gm, torch.ops.aten.sum.dim_IntList)
    assert (found.dtype, found.argument) == (None, f32)


def test_a_dtype_argument_of_the_model_stays():
    gm, _ = decide(lambda x: x.to(bf16).sum(-1, dtype=bf16), torch.randn(2, 3))
    found = decision(gm, torch.ops.aten.sum.dim_IntList)
    assert (found.dtype, found.argument) == (None, None)
    assert dtypes(gm)["sum_1"] is bf16


def test_operators_that_take_one_dtype_run_in_what_they_write_to():
    x, w, i = torch.randn(2, 3), parameter(3, 3), torch.tensor([0, 1])

    def h(x, w, i):
        return F.linear(x, w).clone().index_put_((i,), F.linear(x, w).softmax(-1).mul(2))

    gm, _ = decide(h, x, w, i)
    found = decision(gm, torch.ops.aten.index_put_.default)
    assert (found.rule, found.dtype) == (Rule.PROMOTE, bf16)
    assert "torch takes one dtype here" in found.reason


def test_several_results_get_their_dtypes():
    def f(x, w):
        values, indices = F.linear(x, w).max(-1)
        return values, indices

    gm, _ = decide(f, torch.randn(2, 3), parameter(3, 3))
    assert dtypes(gm)["getitem"] is bf16
    assert dtypes(gm)["getitem_1"] is torch.int64


def test_a_region_of_the_model_wins():
    gm = graph_of(lambda x, w: (F.linear(x, w), F.linear(x, w)), torch.ones(2, 3), parameter(3, 3))
    first, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    first.meta["region"] = ir.Region(False, None)
    second.meta["region"] = ir.Region(True, f16)
    second.meta["captured"] = ir.retype(second.meta["captured"], f16)
    run_passes(gm, [assign_dtypes], context_of())
    assert (ir.dtype_of(first), ir.dtype_of(second)) == (f32, f16)
    assert first.meta["decision"].source == "the model's own region"


def test_overrides_select_by_operator_module_and_node():
    policy = Policy("default").pin(op="aten.linear.default", run="fp32")
    gm = graph_of(lambda x, w: F.linear(x, w), torch.ones(2, 3), parameter(3, 3))
    run_passes(gm, [assign_dtypes], context_of(policy={"overrides": policy.overrides}))
    assert dtypes(gm) == {"linear": f32}
    assert decision(gm, torch.ops.aten.linear.default).source.startswith("override")


def test_what_is_unsafe_in_16_bit_is_refused_by_name():
    def f(x):
        return F.binary_cross_entropy(x, x)

    gm = graph_of(f, torch.rand(3))
    message = r"aten.binary_cross_entropy.default \(node 'binary_cross_entropy'\) may not run"
    with pytest.raises(PolicyError, match=message) as e:
        run_passes(gm, [assign_dtypes], context_of(preset="autocast-cuda"))
    assert "policy.pin(node='binary_cross_entropy', run='fp32')" in str(e.value)


def test_without_a_compute_dtype_nothing_is_refused():
    gm = graph_of(lambda x: F.binary_cross_entropy(x, x), torch.rand(3))
    run_passes(gm, [assign_dtypes], context_of(preset="autocast-cuda", compute=None))


def test_an_operator_without_a_row_is_an_error_where_the_policy_says_so():
    gm = graph_of(lambda x: torch.ops.aten._fused_dropout(x, 0.5), torch.rand(3))
    with pytest.raises(PolicyError, match="node: _fused_dropout, from "):
        run_passes(gm, [assign_dtypes], context_of(policy={"on_unknown": "error"}))


# --- Sub-graphs ------------------------------------------------------------------------------


def branches(x, w, flag):
    """A condition whose branches read a 16-bit value, a float32 value and a parameter."""

    def one(h, x, w):
        return F.linear(h, w).sin() + F.linear(x, w), h.exp()

    def other(h, x, w):
        return F.linear(x, w).cos(), h.exp() * 2

    h = F.linear(x, w).relu()
    a, b = torch.ops.higher_order.cond(flag, one, other, (h, x, w))
    return a + x, b.exp()


def inputs(flag=True):
    return torch.randn(3, 4), torch.nn.Parameter(torch.randn(4, 4)), torch.tensor(flag)


@pytest.mark.parametrize("flag", [True, False])
def test_branches_compute_what_autocast_computes(flag):
    context = context_of(preset="autocast-cpu", strict=True)
    values = inputs(flag)
    gm = graph_of(branches, *values, context=context)
    run_passes(gm, DEFAULT_PASSES[:-1], context)

    def eager(*inputs):
        with torch.autocast("cpu", bf16, cache_enabled=False):
            return branches(*inputs)

    got = results_and_grads(gm, values)
    want = results_and_grads(eager, values)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


@pytest.mark.parametrize("preset", ["default", "lean", "autocast-cpu"])
def test_both_branches_return_what_they_returned_at_capture(preset):
    context = context_of(preset=preset)
    values = inputs()
    gm = graph_of(branches, *values, context=context)
    run_passes(gm, DEFAULT_PASSES[:-1], context)
    for body in (gm.true_graph_0, gm.false_graph_0):
        results = body.graph.output_node().args[0]
        assert [ir.dtype_of(n) for n in results] == [bf16, bf16]
    (cond,) = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    assert [v.dtype for v in cond.meta["val"]] == [bf16, bf16]
    outputs, _ = results_and_grads(gm, values)
    assert all(y.isfinite().all() for y in outputs)


def test_a_branch_takes_the_dtypes_of_the_operands():
    def f(x, flag):
        def branch(v):
            return (v.sin(),)

        # At capture exp ran in bfloat16; the default policy widens it.
        return torch.ops.higher_order.cond(flag, branch, branch, (x.to(bf16).exp(),))

    gm, _ = decide(f, torch.randn(3), torch.tensor(True))
    body = gm.true_graph_0.graph
    assert [ir.dtype_of(n) for n in body.nodes if n.op != "output"] == [f32, f32]
    run_passes(gm, DEFAULT_PASSES[3:], context_of())
    assert text(gm).splitlines()[-4:] == [
        "%v_1: fp32[3] = input",
        "%sin: fp32[3] = sin(%v_1)",
        "%sin_bf16: bf16[3] = to.dtype(%sin, bf16)",
        "return (%sin_bf16,)",
    ]


@pytest.mark.parametrize("preset", ["default", "lean", "autocast-cpu"])
def test_what_a_loop_carries_keeps_its_dtype(preset):
    def f(i, h, w):
        def goes_on(i, h, w):
            return i < 3

        def body(i, h, w):
            return i + 1, F.linear(h, w).exp().clamp(max=2)

        start = F.linear(h, w).exp().clamp(max=2)
        return torch.ops.higher_order.while_loop(goes_on, body, (i, start), (w,))[1].sin()

    values = torch.tensor(0), torch.randn(3, 4), torch.randn(4, 4)
    context = context_of(preset=preset, strict=preset.startswith("autocast"), grad=False)
    gm = graph_of(f, *values, context=context, grad=False)
    run_passes(gm, DEFAULT_PASSES[:-1], context)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop)
    assert [ir.dtype_of(n) for n in node.args[2]] == [torch.int64, bf16]
    body = gm.while_loop_body_graph_0.graph
    assert [ir.dtype_of(n) for n in body.output_node().args[0]] == [torch.int64, bf16]
    with torch.no_grad(), torch.autocast("cpu", bf16):
        want = f(*values)
    with torch.no_grad():
        got = gm(*values)
    if preset == "autocast-cpu":
        assert_same(got, want)
    else:
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)
        assert any(c.graph is gm.graph for c in casts(gm))


def test_edits_inside_branches_count():
    def f(x, flag):
        def branch(v):
            return (v.to(bf16).exp(),)

        return torch.ops.higher_order.cond(flag, branch, branch, (x,))

    _, edits = decide(f, torch.randn(3), torch.tensor(True))
    assert edits == 5  # cond itself, and two operators per branch


def test_a_second_run_changes_nothing():
    context = context_of()
    gm = graph_of(branches, *inputs(), context=context)
    run_passes(gm, [assign_dtypes], context)
    (report,) = run_passes(gm, [assign_dtypes], context)
    assert report.edits == 0
