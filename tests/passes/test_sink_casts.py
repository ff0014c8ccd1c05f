from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mpgraph import ir
from mpgraph.passes.sink_casts import sink_casts
from mpgraph.pipeline import run_passes

from .graphs import (
    assert_exact,
    bf16,
    cast,
    check_pass,
    context_of,
    graph_of,
    parameter,
    results_and_grads,
    special,
    targets,
)

IDS = torch.tensor([1, 1, 0])


def lookup(i, w):
    return F.embedding(i, cast(w, bf16))


def test_only_the_rows_that_are_read_get_cast():
    check_pass(
        sink_casts,
        lookup,
        IDS,
        parameter(9, 2),
        edits=1,
        exact=False,
        expect="""
            %i: i64[3] = input
            %p_w: fp32[9, 2] = input
            %embedding: fp32[3, 2] = embedding(%p_w, %i)
            %embedding_bf16: bf16[3, 2] = to.dtype(%embedding, bf16)
            return %embedding_bf16
        """,
    )


@pytest.mark.parametrize(
    "pick",
    [
        lambda w, i: F.embedding(i, w),
        lambda w, i: torch.index_select(w, 0, i),
        lambda w, i: torch.gather(w, 0, i[:, None].expand(3, 2)),
    ],
    ids=["embedding", "index_select", "gather"],
)
def test_a_gathering_operator_keeps_its_values_and_adds_gradients_in_float32(pick):
    w = torch.nn.Parameter(torch.randn(9, 2))
    gm = graph_of(lambda w: pick(cast(w, bf16), IDS), w)
    before, _ = results_and_grads(gm, [w])
    (report,) = run_passes(gm, [sink_casts], context_of())
    after, (grad,) = results_and_grads(gm, [w], make_cotangent=thirds)
    assert report.edits == 1
    assert_exact(after[0], before[0])
    third = torch.tensor(1 / 3).to(bf16).float()
    assert grad[1].eq(third + third).all()
    assert grad[0].eq(third).all()


def thirds(*shape, dtype):
    return torch.full(shape, 1 / 3).to(dtype)


def test_gradients_stay_in_16_bit_where_autocast_is_to_be_met():
    check_pass(sink_casts, lookup, IDS, parameter(9, 2), edits=0, strict=True)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "pick",
    [lambda x: x[1:3], lambda x: x[0], lambda x: x.narrow(0, 1, 2), lambda x: x[:, ::2]],
    ids=["slice", "select", "narrow", "stride"],
)
def test_picking_is_exact_forward_and_backward(pick, strict):
    def f(x):
        h = x.sin()
        return pick(cast(h, bf16)).cos(), h.tan(), h.exp()

    check_pass(sink_casts, f, special(4, 4).requires_grad_(), edits=None, strict=strict)


def test_a_cast_with_another_use_stays():
    def f(x):
        h = cast(x, bf16)
        return h[0:2].cos(), h.sin()

    check_pass(sink_casts, f, special(4).requires_grad_(), edits=0)


def test_more_rows_than_the_table_has_are_not_cast():
    ids = torch.zeros(10, dtype=torch.int64)
    check_pass(sink_casts, lookup, ids, parameter(9, 2), edits=0)


def test_as_many_rows_as_the_table_has_are():
    ids = torch.zeros(9, dtype=torch.int64)
    check_pass(sink_casts, lookup, ids, parameter(9, 2), edits=1, exact=False)


def test_a_cast_of_the_model_stays():
    check_pass(sink_casts, lambda x: x.to(bf16)[0:2].cos(), special(4).requires_grad_(), edits=0)


def test_operators_that_compute_are_left_alone():
    check_pass(sink_casts, lambda x: cast(x, bf16).view(2, 2).cos(), special(4), edits=0)


def test_a_write_to_what_was_picked_stays_out_of_the_source():
    def f(x):
        h = x.sin()
        return cast(h, bf16)[0:2].mul_(2), h.cos()

    check_pass(sink_casts, f, special(4).requires_grad_(), edits=1)


def test_the_moved_cast_stays_at_the_place_of_the_operator():
    def f(w):
        with torch.no_grad():
            picked = cast(w, bf16)[0:2]
        return picked, w.cos()

    gm = check_pass(sink_casts, f, parameter(4), edits=1)
    (moved,) = [n for n in gm.graph.nodes if ir.is_cast(n)]
    assert moved.meta["grad"] is False
    assert targets(gm)[1:3] == ["aten.slice.Tensor", "aten.to.dtype"]


def test_the_decision_says_that_the_cast_moved():
    gm = check_pass(sink_casts, lookup, IDS, parameter(9, 2), edits=1, exact=False)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    decision = node.meta["decision"]
    assert decision.dtype is None
    assert "cast after the lookup" in decision.reason


def test_branches_are_entered():
    def f(x, flag):
        def sinks(v):
            return (cast(v, bf16)[0:2].sin(),)

        def stays(v):
            h = cast(v, bf16)
            return (h[0:2].sin() + h[2:4],)

        return torch.ops.higher_order.cond(flag, sinks, stays, (x,))

    check_pass(sink_casts, f, special(4), torch.tensor(True), edits=1)
