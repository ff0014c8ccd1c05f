from __future__ import annotations

import torch

from mpgraph.passes.hoist_casts import hoist_casts

from .graphs import bf16, cast, check_pass, f16, f32, special


def pair(dtype=bf16):
    return special(2, 3).requires_grad_(), special(2, 3, dtype=dtype).requires_grad_()


def joined(a, b):
    return cast(torch.cat([a, cast(b, f32)]), bf16).sin()


def test_a_16_bit_part_is_not_widened_to_be_lowered_again():
    check_pass(
        hoist_casts,
        joined,
        *pair(),
        edits=1,
        expect="""
            %a: fp32[2, 3] = input
            %b: bf16[2, 3] = input
            %b_fp32: fp32[2, 3] = to.dtype(%b, fp32)
            %a_bf16: bf16[2, 3] = to.dtype(%a, bf16)
            %cat: bf16[4, 3] = cat([%a_bf16, %b])
            %sin: bf16[4, 3] = sin(%cat)
            return %sin
        """,
    )


def test_a_join_with_a_gradient_stays_where_the_bits_of_autocast_are_kept():
    check_pass(hoist_casts, joined, *pair(), edits=0, strict=True)
    check_pass(hoist_casts, joined, *pair(), edits=1, strict=True, grad=False)


def test_stacking_is_joining_too():
    check_pass(
        hoist_casts, lambda a, b: cast(torch.stack([a, cast(b, f32)], 1), bf16), *pair(), edits=1
    )


def test_other_uses_of_the_parts_keep_the_order_of_their_gradients():
    def f(a, b):
        before = a.sin(), b.sin(), a.cos(), b.cos()
        h = cast(torch.cat([a, cast(b, f32)]), bf16).sin()
        return *before, h, h.tan(), a.exp(), b.exp(), a.tan(), b.tan()

    check_pass(hoist_casts, f, *pair(), edits=1)


def test_a_join_that_something_else_reads_stays():
    def f(a, b):
        h = torch.cat([a, cast(b, f32)])
        return cast(h, bf16).sin(), h.cos()

    check_pass(hoist_casts, f, *pair(), edits=0)


def test_parts_of_the_wide_dtype_alone_stay():
    def f(a, b):
        return cast(torch.cat([a, b]), bf16).sin()

    check_pass(hoist_casts, f, *pair(f32), edits=0)


def test_a_part_that_came_from_another_16_bit_dtype_stays():
    check_pass(hoist_casts, joined, *pair(f16), edits=0)


def test_a_value_that_is_joined_twice_stays():
    # Joined as it is, its two gradients would arrive in the other order.
    def f(a, b):
        h = cast(torch.cat([cast(b, f32), a, cast(b, f32)]), bf16)
        return h, b.sin(), b.cos()

    check_pass(hoist_casts, f, *pair(), edits=0)


def test_casts_of_the_model_stay():
    def outer(a, b):
        return torch.cat([a, cast(b, f32)]).to(bf16).sin()

    def inner(a, b):
        return cast(torch.cat([a, b.to(f32)]), bf16).sin()

    check_pass(hoist_casts, outer, *pair(), edits=0)
    check_pass(hoist_casts, inner, *pair(), edits=0)


def test_integers_among_the_parts_stay():
    # 2**24 + 1 -> float32 -> bfloat16 rounds twice.
    def f(b, i):
        return cast(torch.cat([cast(b, f32), i]), bf16).sin()

    b = special(3, dtype=bf16).requires_grad_()
    check_pass(hoist_casts, f, b, torch.tensor([2**24 + 1, 2**30 + 2**22 + 1]), edits=0)


def test_other_operators_stay():
    def f(a, b):
        return cast(torch.add(a, cast(b, f32)), bf16).sin()

    check_pass(hoist_casts, f, *pair(), edits=0)


def test_branches_are_entered():
    def f(a, b, flag):
        def moves(a, b):
            return (joined(a, b),)

        def stays(a, b):
            return (torch.cat([cast(a, bf16), b]),)

        return torch.ops.higher_order.cond(flag, moves, stays, (a, b))

    check_pass(hoist_casts, f, *pair(), torch.tensor(True), edits=1)
