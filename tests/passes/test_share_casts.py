from __future__ import annotations

import torch
from torch.nn import functional as F

from mpgraph.passes.share_casts import share_casts
from mpgraph.pipeline import run_passes

from .graphs import (
    assert_same,
    bf16,
    cast,
    casts,
    check_pass,
    context_of,
    f16,
    f32,
    graph_of,
    parameter,
    results_and_grads,
    special,
)


def used_twice(x, w):
    one = F.linear(cast(x, bf16), cast(w, bf16))
    return one, F.linear(one, cast(w, bf16))


def test_a_parameter_is_cast_once():
    gm = check_pass(
        share_casts,
        used_twice,
        special(2, 3).requires_grad_(),
        parameter(3, 3),
        edits=1,
        exact=False,
        expect="""
            %x: fp32[2, 3] = input
            %p_w: fp32[3, 3] = input
            %x_bf16: bf16[2, 3] = to.dtype(%x, bf16)
            %p_w_bf16: bf16[3, 3] = to.dtype(%p_w, bf16)
            %linear: bf16[2, 3] = linear(%x_bf16, %p_w_bf16)
            %linear_1: bf16[2, 3] = linear(%linear, %p_w_bf16)
            return (%linear, %linear_1)
        """,
    )
    assert len(casts(gm)) == 2


def test_a_shared_parameter_has_the_gradients_that_autocast_gives_it():
    x, w = torch.randn(5, 3), torch.nn.Parameter(torch.randn(3, 3))
    gm = graph_of(used_twice, x, w)
    run_passes(gm, [share_casts], context_of())
    got = results_and_grads(gm, [x, w], make_cotangent=normal)

    def eager(x, w):
        with torch.autocast("cpu", bf16):
            one = F.linear(x, w)
            return one, F.linear(one, w)

    assert_same(got, results_and_grads(eager, [x, w], make_cotangent=normal))


def normal(*shape, dtype):
    return torch.randn(*shape).to(dtype)


def test_a_value_with_a_gradient_keeps_one_cast_per_use():
    # Its gradients meet in float32.
    def f(x):
        h = x.sin()
        return cast(h, bf16).cos(), cast(h, bf16).tan()

    check_pass(share_casts, f, special(6).requires_grad_(), edits=0)


def test_a_value_without_a_gradient_is_shared():
    def f(x):
        h = x.sin()
        return cast(h, bf16).cos(), cast(h, bf16).tan()

    check_pass(share_casts, f, special(6), edits=1, grad=False)


def test_what_was_detached_is_shared():
    def f(x):
        h = x.sin().detach()
        return cast(h, bf16).cos(), cast(h, bf16).tan(), x.cos()

    check_pass(share_casts, f, special(6).requires_grad_(), edits=1)


def test_casts_to_two_dtypes_stay():
    def f(w):
        return cast(w, bf16).cos(), cast(w, f16).cos()

    check_pass(share_casts, f, parameter(4), edits=0)


def test_a_write_in_between_keeps_both():
    def f(x):
        one = cast(x, bf16).cos()
        x.mul_(2)
        return one, cast(x, bf16).cos()

    check_pass(share_casts, f, special(4), edits=0, grad=False)


def test_a_write_through_a_view_keeps_both():
    def f(x):
        one = cast(x, bf16).cos()
        x[0:1].mul_(2)
        return one, cast(x, bf16).cos()

    check_pass(share_casts, f, torch.randn(4), edits=0, grad=False)


def test_after_a_write_sharing_starts_anew():
    def f(x):
        one = cast(x, bf16).cos()
        x[0:1].mul_(2)
        return one, cast(x, bf16).cos(), cast(x, bf16).tan()

    check_pass(share_casts, f, torch.randn(4), edits=1, grad=False)


def test_a_cast_made_without_gradients_is_not_used_where_there_are_some():
    def f(w):
        with torch.no_grad():
            teacher = cast(w, bf16).cos()
        return teacher, cast(w, bf16).cos()

    check_pass(share_casts, f, parameter(4), edits=0)


def test_nor_the_other_way_round():
    def f(w):
        student = cast(w, bf16).cos()
        with torch.no_grad():
            return student, cast(w, bf16).cos()

    check_pass(share_casts, f, parameter(4), edits=0)


def test_casts_of_the_model_stay():
    def f(x):
        return x.to(bf16).cos_(), x.to(bf16).tan_()

    check_pass(share_casts, f, special(4), edits=0, grad=False)


def test_branches_are_entered():
    def f(x, flag):
        def twice(v):
            return (cast(v, bf16).sin() + cast(v, bf16).cos(),)

        def once(v):
            return (cast(v, bf16).sin(),)

        return torch.ops.higher_order.cond(flag, twice, once, (x,))

    check_pass(share_casts, f, special(4), torch.tensor(True), edits=1, grad=False)


def test_in_a_branch_a_value_may_carry_a_gradient():
    def f(x, flag):
        def twice(v):
            return (cast(v, bf16).sin() + cast(v, bf16).cos(),)

        return torch.ops.higher_order.cond(flag, twice, lambda v: (cast(v, bf16).sin(),), (x,))

    check_pass(share_casts, f, special(4, dtype=f32), torch.tensor(True), edits=0)
