from __future__ import annotations

import dataclasses
import textwrap

import pytest
import torch
from torch.nn import functional as F

from mpgraph import ops
from mpgraph.errors import VerificationError
from mpgraph.graph_text import text
from mpgraph.passes.scale_backward import scale_backward
from mpgraph.pipeline import run_passes
from mpgraph.verify import verify

from .graphs import assert_same, aten, cast, context_of, f16, f32, graph_of, targets
from .scaling import LOWER, WIDEN, context, leaf, numbers, run, weight


def check(function, *inputs, edits, expect=None, **options):
    """The graph's values and true gradients are what they were, whatever the scale."""
    gm = graph_of(function, *inputs)
    want = run(gm, inputs, 1.0)
    (report,) = run_passes(gm, [scale_backward], context(**options))
    assert report.edits == edits, text(gm)
    if expect is not None:
        assert text(gm) == textwrap.dedent(expect).strip(), text(gm)
    for scale in (1.0, 64.0):
        outputs, grads = run(gm, inputs, scale)
        narrowed = [y.to(w.dtype) for y, w in zip(outputs, want[0], strict=True)]
        assert_same((narrowed, grads), want)
    return gm


def test_casts_into_fp16_lower_and_casts_out_of_it_widen():
    check(
        lambda x, w: cast(F.linear(cast(x, f16), cast(w, f16)), f32).sin(),
        leaf(2, 3),
        weight(3, 3),
        edits=3,
        expect="""
            %x: fp32[2, 3] = input
            %p_w: fp32[3, 3] = input
            %loss_scale: fp32[] = input
            %x_fp16: fp16[2, 3] = mpgraph.lower(%x, fp16, %loss_scale)
            %p_w_fp16: fp16[3, 3] = mpgraph.lower(%p_w, fp16, %loss_scale)
            %linear: fp16[2, 3] = linear(%x_fp16, %p_w_fp16)
            %linear_fp32: fp32[2, 3] = mpgraph.widen(%linear, fp32, %loss_scale)
            %sin: fp32[2, 3] = sin(%linear_fp32)
            return %sin
        """,
    )


def test_the_models_own_casts_count_too():
    gm = check(lambda x: x.half().relu().float(), leaf(4), edits=2)
    assert targets(gm) == [LOWER, "aten.relu.default", WIDEN]


def test_an_addition_that_widens_by_itself_gets_a_scaled_cast():
    check(
        lambda x, y: cast(x, f16).relu() + y,
        leaf(4),
        leaf(4),
        edits=2,
        expect="""
            %x: fp32[4] = input
            %y: fp32[4] = input
            %loss_scale: fp32[] = input
            %x_fp16: fp16[4] = mpgraph.lower(%x, fp16, %loss_scale)
            %relu: fp16[4] = relu(%x_fp16)
            %relu_fp32: fp32[4] = mpgraph.widen(%relu, fp32, %loss_scale)
            %add: fp32[4] = add.Tensor(%relu_fp32, %y)
            return %add
        """,
    )


@pytest.mark.parametrize(
    "mix",
    [
        lambda h, y: h * y,
        lambda h, y: y - h,
        lambda h, y: torch.where(y > 0, h, y),
        lambda h, y: torch.maximum(h, y),
        lambda h, y: y.clone().add_(h),
        lambda h, y: y.clone().copy_(h),
        lambda h, y: y.clone().mul_(h[0]),
        lambda h, y: y.clone().masked_fill_(y > 0, h[0]),
    ],
)
def test_every_mix_of_dtypes_keeps_its_gradients(mix):
    gm = check(lambda x, y: mix(cast(x, f16), y), leaf(4), leaf(4), edits=2)
    assert targets(gm).count(WIDEN) == 1


def test_an_operator_in_place_that_rounds_in_its_backward_pass_is_computed_first():
    check(
        lambda x, y: y.clone().addcmul_(cast(x, f16), cast(x, f16)),
        leaf(4),
        leaf(4),
        edits=5,
        expect="""
            %x: fp32[4] = input
            %y: fp32[4] = input
            %loss_scale: fp32[] = input
            %clone: fp32[4] = clone(%y)
            %x_fp16: fp16[4] = mpgraph.lower(%x, fp16, %loss_scale)
            %x_fp16_1: fp16[4] = mpgraph.lower(%x, fp16, %loss_scale)
            %clone_fp32: fp32[4] = mpgraph.lower(%clone, fp32, %loss_scale)
            %addcmul: fp32[4] = addcmul(%clone_fp32, %x_fp16, %x_fp16_1)
            %addcmul_fp32: fp32[4] = mpgraph.widen(%addcmul, fp32, %loss_scale)
            %addcmul_: fp32[4] = copy_(%clone, %addcmul_fp32)
            return %addcmul_
        """,
    )


def test_an_operator_of_both_dtypes_computes_with_scaled_gradients():
    gm = check(
        lambda x, w, b: cast(F.layer_norm(cast(x, f16), [4], w, b), f32),
        torch.tensor([[1.0, -1, 1, -1], [2, 0, 2, 0]]).requires_grad_(),
        weight(4),
        weight(4),
        edits=4,
    )
    assert targets(gm) == [LOWER, LOWER, LOWER, "aten.layer_norm.default", WIDEN]


def test_an_operator_that_widens_its_result_is_left_unscaled():
    check(
        lambda x: torch.sum(cast(x, f16), -1, dtype=f32),
        leaf(2, 4),
        edits=2,
        expect="""
            %x: fp32[2, 4] = input
            %loss_scale: fp32[] = input
            %x_fp16: fp16[2, 4] = mpgraph.lower(%x, fp16, %loss_scale)
            %sum_1: fp32[2] = sum.dim_IntList(%x_fp16, [-1], dtype=fp32)
            %sum_1_fp32: fp32[2] = mpgraph.widen(%sum_1, fp32, %loss_scale)
            return %sum_1_fp32
        """,
    )


def test_a_number_in_fp32_that_stays_narrow_lets_its_gradient_out():
    # torch keeps fp16 for a tensor times a number without dimensions.
    gm = check(lambda x, a: cast(cast(x, f16) * a, f32), leaf(4), weight(), edits=3)
    assert targets(gm).count(LOWER) == 2


def test_several_results_in_fp32_are_each_unscaled():
    gm = check(
        lambda x, w, b: aten.native_layer_norm(cast(x, f16), [4], w, b, 1e-5)[:2],
        torch.tensor([[1.0, -1, 1, -1], [2, 0, 2, 0]]).requires_grad_(),
        weight(4),
        weight(4),
        edits=5,
    )
    assert targets(gm).count(WIDEN) == 2


def test_results_leave_in_fp32():
    check(
        lambda x: (cast(x, f16).relu(), x.sin()),
        leaf(4),
        edits=2,
        expect="""
            %x: fp32[4] = input
            %loss_scale: fp32[] = input
            %x_fp16: fp16[4] = mpgraph.lower(%x, fp16, %loss_scale)
            %relu: fp16[4] = relu(%x_fp16)
            %sin: fp32[4] = sin(%x)
            %relu_fp32: fp32[4] = mpgraph.widen(%relu, fp32, %loss_scale)
            return (%relu_fp32, %sin)
        """,
    )


def test_a_result_that_is_returned_twice_is_widened_once():
    gm = check(lambda x: (cast(x, f16).relu(),) * 2, leaf(4), edits=2)
    assert targets(gm).count(WIDEN) == 1


def test_results_without_gradients_leave_in_fp32_too():
    gm = check(lambda x: cast(x, f16).relu(), numbers(4), edits=1, grad=False)
    assert targets(gm) == ["aten.to.dtype", "aten.relu.default", "aten.to.dtype"]


def test_what_is_assigned_and_has_no_gradient_keeps_its_dtype():
    gm = graph_of(lambda x: (x.sin(), cast(x, f16).detach()), leaf(4))
    gm.meta["results"] = 1
    (report,) = run_passes(gm, [scale_backward], context())
    assert report.edits == 1  # the cast before detach
    assert gm.graph.output_node().args[0][1].meta["val"].dtype is f16


def test_an_fp16_input_is_the_callers_to_scale():
    gm = check(lambda h: cast(h.sin(), f32), leaf(4, dtype=f16), edits=1)
    (h, scale) = [n.meta["slot"] for n in gm.graph.find_nodes(op="placeholder")]
    assert h.scaled
    assert scale.kind == "scale"


def test_an_fp16_input_without_a_gradient_is_left_alone():
    gm = graph_of(lambda h: (h, h.sin()), numbers(4, dtype=f16))
    (h,) = gm.graph.find_nodes(op="placeholder")
    h.meta["differentiable"] = False
    run_passes(gm, [scale_backward], context())
    assert not h.meta["slot"].scaled
    returned, sine = gm.graph.output_node().args[0]
    assert returned is h  # the caller's own tensor, not a copy
    assert sine.meta["val"].dtype is f32


def test_what_was_written_into_a_buffer_keeps_its_gradient():
    def f(x):
        buffer = torch.zeros(2, 4, dtype=f16)
        buffer[0].copy_(cast(x, f16))
        return cast(buffer, f32) * 2

    gm = check(f, leaf(4), edits=2)
    assert targets(gm).count(WIDEN) == 1


def test_casts_without_gradients_stay_plain():
    def f(x, y):
        with torch.no_grad():
            mask = cast(cast(x, f16).relu(), f32)
        return y * mask + cast(cast(y.detach(), f16), f32)

    gm = check(f, leaf(4), leaf(4), edits=0)
    assert targets(gm).count("aten.to.dtype") == 4


def test_casts_of_inputs_that_need_no_gradient_stay_plain():
    gm = graph_of(lambda x: cast(cast(x, f16), f32), numbers(4))
    (x,) = gm.graph.find_nodes(op="placeholder")
    x.meta["requires_grad"] = False
    assert run_passes(gm, [scale_backward], context())[0].edits == 0


def test_factories_take_nothing_but_a_shape():
    def f(x):
        h = cast(x, f16)
        return cast(h, f32) * torch.ones_like(h, dtype=f32)

    check(f, leaf(4), edits=2)


def test_a_branch_computes_with_scaled_gradients():
    def branch(v):
        return (cast(cast(v, f16).sin(), f32),)

    gm = graph_of(
        lambda x, flag: torch.ops.higher_order.cond(flag, branch, branch, (x,))[0],
        leaf(4),
        torch.tensor(True),
    )
    (report,) = run_passes(gm, [scale_backward], context())
    assert report.edits == 2
    assert targets(gm)[0] == LOWER
    assert targets(gm)[-1] == WIDEN


def test_other_precisions_are_left_alone():
    gm = graph_of(lambda x: cast(cast(x, f16), f32), leaf(4))
    assert run_passes(gm, [scale_backward], context_of())[0].edits == 0


def test_bodies_are_left_to_the_graph_around_them():
    gm = graph_of(lambda x: cast(cast(x, f16), f32), leaf(4))
    gm.meta["body"] = True
    assert run_passes(gm, [scale_backward], context())[0].edits == 0


# --- Every broken border is found ----------------------------------------------------------------


def scaled_graph(function, *inputs):
    gm = graph_of(function, *inputs)
    run_passes(gm, [scale_backward], context())
    return gm


def unscale_first(gm, target):
    """Turn the first scaled cast back into a plain one."""
    node = next(n for n in gm.graph.nodes if n.target is target)
    node.target, node.args = aten.to.dtype, node.args[:2]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (ops.LOWER, "yields fp16, but its gradient is not scaled"),
        (ops.WIDEN, "takes values with scaled and with true gradients"),
    ],
)
def test_a_plain_cast_at_the_border_is_found(target, message):
    gm = scaled_graph(lambda x, y: cast(cast(x, f16).relu(), f32) + y, leaf(4), leaf(4))
    verify(gm, decided=True, scaled=True)
    unscale_first(gm, target)
    with pytest.raises(VerificationError, match=message):
        verify(gm, scaled=True)


def test_a_scaled_result_is_found():
    gm = scaled_graph(lambda x: cast(cast(x, f16).relu(), f32), leaf(4))
    unscale_first(gm, ops.WIDEN)
    with pytest.raises(VerificationError, match="returns %relu_fp32, whose gradient is scaled"):
        verify(gm, scaled=True)


def test_scaling_twice_is_found():
    gm = scaled_graph(lambda x: cast(cast(x, f16).relu(), f32), leaf(4))
    lower = next(n for n in gm.graph.nodes if n.target is ops.LOWER)
    (relu,) = lower.users
    with gm.graph.inserting_before(relu):
        again = gm.graph.call_function(ops.LOWER, (lower, f16, lower.args[2]))
    again.meta = dict(lower.meta)
    relu.args = (again,)
    with pytest.raises(VerificationError, match="lowers a value whose gradient is scaled already"):
        verify(gm, scaled=True)


def test_unscaling_twice_is_found():
    gm = scaled_graph(lambda x: cast(cast(x, f16).relu(), f32), leaf(4))
    widen = next(n for n in gm.graph.nodes if n.target is ops.WIDEN)
    with gm.graph.inserting_after(widen):
        again = gm.graph.call_function(ops.WIDEN, (widen, f32, widen.args[2]))
    again.meta = dict(widen.meta)
    gm.graph.output_node().args = (again,)
    with pytest.raises(VerificationError, match="widens a value whose gradient is not scaled"):
        verify(gm, scaled=True)


def test_an_fp16_input_that_nobody_unscales_is_found():

    gm = scaled_graph(lambda h: cast(h.sin(), f32), leaf(4, dtype=f16))
    (h, _) = gm.graph.find_nodes(op="placeholder")
    h.meta["slot"] = dataclasses.replace(h.meta["slot"], scaled=False)
    with pytest.raises(VerificationError, match="yields fp16, but its gradient is not scaled"):
        verify(gm, scaled=True)
