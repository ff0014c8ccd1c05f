from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from mpgraph import ir
from mpgraph.errors import PolicyError
from mpgraph.graph_text import text
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.passes.open_composites import open_composites
from mpgraph.pipeline import NeedsStaticShapes, run_passes
from mpgraph.policy import Policy

from .graphs import (
    assert_same,
    bf16,
    check_graph,
    context_of,
    graph_of,
    results_and_grads,
    special,
    targets,
)


def check(function, *inputs, edits, **options):
    """Opened under no autocast, the graph computes the same bits."""
    context = context_of(**{"preset": "autocast-cpu", "compute": None, **options})
    gm = graph_of(function, *inputs)
    return check_graph(open_composites, gm, *inputs, edits=edits, context=context)


def x_and_y():
    return special(2, 3).requires_grad_(), special(3, 2).requires_grad_()


def einsum(x, y):
    return torch.einsum("ab,bc->ac", x, y).sin()


def test_an_operator_that_hides_a_matrix_product_is_opened():
    gm = check(einsum, *x_and_y(), edits=1)
    assert "aten.bmm.default" in targets(gm)
    assert "aten.einsum.default" not in targets(gm)


def test_the_text_of_an_opened_operator():
    gm = check(lambda x, y: torch.tensordot(x, y, 1), *x_and_y(), edits=1)
    assert text(gm) == "\n".join(
        [
            "%x: fp32[2, 3] = input",
            "%y: fp32[3, 2] = input",
            "%permute: fp32[2, 3] = permute(%x, [0, -1])",
            "%reshape: fp32[2, 3] = reshape(%permute, [2, 3])",
            "%permute_1: fp32[3, 2] = permute(%y, [0, 1])",
            "%reshape_1: fp32[3, 2] = reshape(%permute_1, [3, 2])",
            "%mm: fp32[2, 2] = mm(%reshape, %reshape_1)",
            "%reshape_2: fp32[2, 2] = reshape(%mm, [2, 2])",
            "return %reshape_2",
        ]
    )


def test_what_an_operator_was_opened_from_is_kept():
    gm = check(einsum, *x_and_y(), edits=1)
    (bmm,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    assert bmm.meta["opened"] == "aten.einsum.default"
    assert bmm.meta["captured"] is bmm.meta["val"]


def test_an_opened_operator_stays_in_its_region():
    gm = graph_of(einsum, *x_and_y())
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)
    node.meta.update(region=ir.Region(False, None), grad=False, module_path="a.b")
    run_passes(gm, [open_composites], context_of(preset="autocast-cpu"))
    for inner in gm.graph.nodes:
        if inner.meta.get("opened"):
            assert inner.meta["region"] == ir.Region(False, None)
            assert inner.meta["grad"] is False
            assert inner.meta["module_path"] == "a.b"
            assert ir.dtype_of(inner) is torch.float32


def test_composites_that_hide_only_views_stay():
    def f(x, y):
        # The last two have no row.
        return x.reshape(3, 2), y.flatten(), x.T, *torch.hsplit(x, 3), *torch.vsplit(x, 2)

    check(f, *x_and_y(), edits=0)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: F.linear(x, x), lambda x, y: x @ y, lambda x, y: F.softmax(x, -1),
        lambda x, y: F.layer_norm(x, [3]), lambda x, y: F.mse_loss(x, x),
    ],
    ids=["linear", "matmul", "softmax", "layer_norm", "mse_loss"],
)  # fmt: skip
def test_composites_with_a_row_of_their_own_stay(f):
    check(f, *x_and_y(), edits=0)


def test_operators_inside_operators_are_opened_too():
    # A triplet loss with its own distance: a composite that calls cdist-like composites.
    def f(x, y):
        return torch.einsum("ab,bc,cd->ad", x, y, x)

    gm = check(f, *x_and_y(), edits=None)
    assert targets(gm).count("aten.bmm.default") == 2


def test_operators_that_yield_no_floating_point_values_stay():
    integers = torch.arange(4).view(2, 2)
    check(lambda i: torch.einsum("ab,bc->ac", i, i), integers, edits=0)


def test_an_override_counts_as_a_row():
    policy = Policy("autocast-cpu").pin(op="aten.einsum.default", run="fp32")
    gm = check(einsum, *x_and_y(), edits=0, policy={"overrides": policy.overrides})
    assert "aten.einsum.default" in targets(gm)


def test_several_results_are_put_back_in_place():
    def f(x, h, w, u):
        out, last = torch.ops.aten.rnn_tanh.input(x, h, [w, u], False, 1, 0.0, True, False, True)
        return out.sin(), last.cos()

    inputs = torch.randn(2, 4, 3), torch.randn(1, 2, 5), torch.randn(5, 3), torch.randn(5, 5)
    gm = check(f, *[x.requires_grad_() for x in inputs], edits=None)
    assert "aten.rnn_tanh.input" not in targets(gm)


def test_what_needs_numbers_for_its_sizes_says_so(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a size is needed\nand more")

    monkeypatch.setattr(sys.modules["mpgraph.passes.open_composites"], "make_fx", fails)
    gm = graph_of(einsum, *x_and_y())
    with pytest.raises(
        NeedsStaticShapes, match=r"^aten.einsum.default \(einsum\): a size is needed$"
    ):
        run_passes(gm, [open_composites], context_of(preset="autocast-cpu"))
    assert not issubclass(NeedsStaticShapes, PolicyError)


def test_branches_are_entered_and_compute_what_autocast_computes():
    def f(x, y, flag):
        def one(x, y):
            return (torch.einsum("ab,bc->ac", x, y).sin(),)

        def other(x, y):
            return (torch.tensordot(x, y, 1).cos(),)

        return torch.ops.higher_order.cond(flag, one, other, (x, y))

    context = context_of(preset="autocast-cpu", strict=True)
    for flag in (True, False):
        values = torch.randn(2, 3), torch.randn(3, 2), torch.tensor(flag)
        gm = graph_of(f, *values, context=context)
        reports = run_passes(gm, DEFAULT_PASSES, context)
        assert [r.edits for r in reports if r.name == "open_composites"] == [2]

        def eager(*inputs):
            with torch.autocast("cpu", bf16):
                return f(*inputs)

        assert_same(results_and_grads(gm, values), results_and_grads(eager, values))
