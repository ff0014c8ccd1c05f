from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mpgraph.graph_text import text
from mpgraph.passes.assign_dtypes import assign_dtypes
from mpgraph.passes.insert_casts import insert_casts
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.pipeline import run_passes
from mpgraph.policy import Policy

from .graphs import (
    assert_same,
    bf16,
    casts,
    context_of,
    f32,
    f64,
    graph_of,
    parameter,
    results_and_grads,
)


def decided(function, *inputs, **options):
    context = context_of(**options)
    gm = graph_of(function, *inputs, context=context)
    run_passes(gm, [assign_dtypes], context)
    return gm, context


def check(function, *inputs, edits, expect=None, **options):
    gm, context = decided(function, *inputs, **options)
    (report,) = run_passes(gm, [insert_casts], context)
    assert edits is None or report.edits == edits, text(gm)
    if expect:
        assert text(gm) == "\n".join(line.strip() for line in expect.strip().splitlines())
    return gm


def test_every_input_of_a_decided_operator_is_cast():
    check(
        lambda x, w: F.linear(x, w),
        torch.randn(2, 3),
        parameter(3, 3),
        edits=2,
        expect="""
            %x: fp32[2, 3] = input
            %p_w: fp32[3, 3] = input
            %x_bf16: bf16[2, 3] = to.dtype(%x, bf16)
            %p_w_bf16: bf16[3, 3] = to.dtype(%p_w, bf16)
            %linear: bf16[2, 3] = linear(%x_bf16, %p_w_bf16)
            return %linear
        """,
    )


def test_every_use_gets_a_cast_of_its_own():
    gm = check(lambda x: torch.mm(x, x), torch.randn(3, 3), edits=2)
    assert len(casts(gm)) == 2


def test_an_input_that_has_the_dtype_is_left_alone():
    gm = check(lambda x, w: F.linear(x, w), torch.ones(2, 3).to(bf16), parameter(3, 3), edits=1)
    assert [n.args[0].name for n in casts(gm)] == ["p_w"]


def test_integers_and_float64_are_left_alone():
    check(lambda x: x.exp(), torch.ones(3, dtype=f64), edits=0)
    check(lambda i: i.sum(), torch.ones(3, dtype=torch.int64), edits=0)


def test_values_in_lists_are_cast():
    gm = check(
        lambda a, b: torch.cat([a, b]), torch.ones(2), torch.ones(2).to(bf16), edits=1,
        preset="autocast-cpu",
    )  # fmt: skip
    (cast,) = casts(gm)
    assert cast.args == (cast.args[0], f32)


def test_a_dtype_argument_is_set_instead_of_a_cast():
    check(
        lambda x: x.to(bf16).softmax(-1),
        torch.randn(2, 3),
        edits=1,
        expect="""
            %x: fp32[2, 3] = input
            %to: bf16[2, 3] = to.dtype(%x, bf16)
            %softmax: fp32[2, 3] = softmax.int(%to, -1, dtype=fp32)
            return %softmax
        """,
    )


def test_a_dtype_argument_that_changes_nothing_is_not_set():
    check(lambda x: x.softmax(-1), torch.randn(2, 3), edits=0)


def test_undecided_operators_are_left_alone():
    gm = graph_of(lambda x, w: F.linear(x, w), torch.ones(2, 3), parameter(3, 3))
    (report,) = run_passes(gm, [insert_casts], context_of())
    assert report.edits == 0


def test_running_statistics_are_never_cast():
    def f(x, w, mean, var):
        return F.batch_norm(F.linear(x, w), mean, var, training=True)

    mean, var = torch.zeros(3), torch.ones(3)
    gm = check(f, torch.randn(4, 3), parameter(3, 3), mean, var, edits=3)
    assert {n.args[0].name for n in casts(gm)} == {"x", "p_w", "linear"}


def test_the_results_are_those_of_autocast():
    def f(x, w):
        h = F.linear(x, w)
        return F.mse_loss(h, x), torch.cat([h, x]), h * 2 + x

    x, w = torch.randn(4, 3), torch.nn.Parameter(torch.randn(3, 3))
    gm, context = decided(f, x, w, preset="autocast-cpu")
    run_passes(gm, [insert_casts], context)

    def eager(*inputs):
        with torch.autocast("cpu", bf16):
            return f(*inputs)

    assert_same(results_and_grads(gm, [x, w]), results_and_grads(eager, [x, w]))


def test_ids_are_never_cast():
    gm = check(
        lambda i, w: F.embedding(i, w), torch.tensor([0, 1]), parameter(3, 3), edits=1,
        preset="lean",
    )  # fmt: skip
    assert [n.args[0].name for n in casts(gm)] == ["p_w"]


def test_running_statistics_are_not_cast_whatever_the_policy_asks_for():
    def f(x, mean, var):
        return F.batch_norm(x, mean, var, training=True)

    policy = Policy("default").pin(op="aten.batch_norm.default", run="bf16")
    mean, var = torch.zeros(3), torch.ones(3)
    overrides = {"overrides": policy.overrides}
    gm = check(f, torch.randn(4, 3).to(bf16), mean, var, edits=None, policy=overrides)
    assert {n.args[0].name for n in casts(gm)} <= {"x"}


def norms(x):
    """Both overloads that take no dtype, with and without what has a default."""
    y = torch.mm(x, x)
    aten = torch.ops.aten.norm
    rows = aten.ScalarOpt_dim(y, 2, [1]) + aten.ScalarOpt_dim(y, 3, [1], True).sum()
    return aten.Scalar(y) + aten.Scalar(y, 1) + rows


@pytest.mark.parametrize("preset", ["default", "autocast-cuda"])
def test_norm_becomes_the_overload_with_a_dtype(preset):
    gm, context = decided(norms, parameter(3, 3), preset=preset)
    run_passes(gm, [insert_casts, remove_dead], context)
    norm = torch.ops.aten.norm
    targets = [node.target for node in gm.graph.nodes if "norm" in str(node.target)]
    assert (
        sorted(map(str, targets))
        == [str(norm.ScalarOpt_dim_dtype)] * 2 + [str(norm.ScalarOpt_dtype)] * 2
    )
    x = torch.randn(3, 3, requires_grad=True)
    y = torch.mm(x.to(bf16), x.to(bf16))
    rows = norm.ScalarOpt_dim_dtype(y, 2, [1], False, dtype=f32)
    rows = rows + norm.ScalarOpt_dim_dtype(y, 3, [1], True, dtype=f32).sum()
    expected = norm.ScalarOpt_dtype(y, 2, dtype=f32) + norm.ScalarOpt_dtype(y, 1, dtype=f32) + rows
    got = gm(x)
    got = got[0] if isinstance(got, tuple) else got
    assert torch.equal(got, expected)
    ours = torch.autograd.grad(got.sum(), x)[0]
    assert torch.equal(ours, torch.autograd.grad(expected.sum(), x)[0])


def test_norm_of_float64_stays_float64():
    gm = check(lambda x: torch.ops.aten.norm.Scalar(x), torch.randn(3, dtype=f64), edits=0)
    assert gm(torch.ones(4, dtype=f64)).dtype is f64
