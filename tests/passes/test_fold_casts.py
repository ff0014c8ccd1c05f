from __future__ import annotations

import itertools

import pytest
import torch

from mpgraph.passes.fold_casts import fold_casts
from mpgraph.pipeline import run_passes

from .graphs import (
    SPECIAL,
    assert_same,
    bf16,
    cast,
    casts,
    check_pass,
    context_of,
    f16,
    f32,
    f64,
    graph_of,
    results_and_grads,
    special,
)

CHAINS = list(itertools.product([f16, bf16, f32, f64], repeat=4))


def x_of(dtype):
    return special(16, dtype=dtype).requires_grad_()


def test_widening_round_trip_disappears():
    check_pass(
        fold_casts,
        lambda x: cast(cast(x, f32), bf16).relu(),
        x_of(bf16),
        edits=1,
        expect="""
            %x: bf16[16] = input
            %relu: bf16[16] = relu(%x)
            return %relu
        """,
    )


def test_two_casts_of_which_the_first_loses_nothing_become_one():
    check_pass(
        fold_casts,
        lambda x: cast(cast(x, f32), f16).relu(),
        x_of(bf16),
        edits=1,
        expect="""
            %x: bf16[16] = input
            %x_fp16: fp16[16] = to.dtype(%x, fp16)
            %relu: fp16[16] = relu(%x_fp16)
            return %relu
        """,
    )


def test_rounding_round_trip_stays():
    # Folding this one would give the model more precision than the policy promised.
    check_pass(
        fold_casts,
        lambda x: cast(cast(x, bf16), f32).relu(),
        x_of(f32),
        edits=0,
        expect="""
            %x: fp32[16] = input
            %x_bf16: bf16[16] = to.dtype(%x, bf16)
            %x_bf16_fp32: fp32[16] = to.dtype(%x_bf16, fp32)
            %relu: fp32[16] = relu(%x_bf16_fp32)
            return %relu
        """,
    )


def test_a_cast_to_more_bits_than_the_middle_has_stays():
    # bf16 -> fp32 -> fp64 is exact forward; a gradient on the way back rounds to fp32 first.
    check_pass(fold_casts, lambda x: cast(cast(x, f32), f64).sin(), x_of(bf16), edits=0)


def test_an_outer_cast_of_the_model_stays_for_the_copy_that_it_makes():
    check_pass(fold_casts, lambda x: cast(x, f32).to(bf16).relu_(), x_of(bf16), edits=0)


def test_an_inner_cast_of_the_model_is_folded():
    check_pass(fold_casts, lambda x: cast(x.to(f32), bf16).sin(), x_of(bf16), edits=1)


def test_a_middle_value_with_another_use_stays():
    def f(x):
        middle = cast(x, f32)
        return cast(middle, bf16).sin(), middle.cos()

    check_pass(fold_casts, f, x_of(bf16), edits=0)


def three_gradients_meet(x):
    """The gradient of the cast is the last to arrive; folded, it would be the first."""
    middle = cast(x, f32)
    one, two = x.sin(), x.cos()
    return cast(middle, bf16).tan(), one, two


def test_gradients_that_meet_in_the_source_keep_their_order_where_autocast_is_to_be_met():
    check_pass(fold_casts, three_gradients_meet, x_of(bf16), edits=0, strict=True)


def test_a_value_with_a_gradient_stays_where_autocast_is_to_be_met():
    def there_and_back(x):
        return cast(cast(x, f32), bf16).relu()

    check_pass(fold_casts, there_and_back, x_of(bf16), edits=0, strict=True)
    check_pass(fold_casts, there_and_back, x_of(bf16), edits=1)


def test_elsewhere_the_source_may_have_other_uses():
    check_pass(fold_casts, three_gradients_meet, x_of(bf16), edits=1, exact=False)


def test_values_without_gradients_fold_whatever_else_reads_them():
    check_pass(
        fold_casts, three_gradients_meet, special(16, dtype=bf16), edits=1, strict=True, grad=False
    )


def test_long_chains_fold_from_the_inside():
    gm = check_pass(
        fold_casts,
        lambda x: cast(cast(cast(cast(x, f32), bf16), f64), bf16).relu(),
        x_of(bf16),
        edits=2,
    )
    assert casts(gm) == []


@pytest.mark.parametrize("start", [f16, bf16, f32, f64], ids=str)
def test_exact_for_every_chain_of_three_casts(start):
    x = torch.tensor(SPECIAL).repeat(8).to(start).requires_grad_()
    folded = 0
    for chain in CHAINS:
        if chain[0] is not start:
            continue
        gm = graph_of(lambda x, c=chain: cast(cast(cast(x, c[1]), c[2]), c[3]).mul(1.5), x)
        want = results_and_grads(gm, [x])
        (report,) = run_passes(gm, [fold_casts], context_of())
        assert_same(results_and_grads(gm, [x]), want)
        folded += report.edits
    assert folded > 0


def test_branches_are_entered():
    def f(x, flag):
        def folds(v):
            return (cast(cast(v, f32), bf16).sin(),)

        def stays(v):
            return (cast(cast(v, f16), bf16).sin(),)

        return torch.ops.higher_order.cond(flag, folds, stays, (x,))

    check_pass(fold_casts, f, special(4, dtype=bf16), torch.tensor(True), edits=1)


def test_a_lossy_first_cast_stays_even_where_this_torch_would_round_the_same():
    # On the CPU, float64 reaches 16 bit through float32 anyway; other back ends may not.
    check_pass(fold_casts, lambda x: cast(cast(x, f32), bf16).sin(), x_of(f64), edits=0)
