from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from mpgraph.capture.captured import Slot
from mpgraph.graph_text import text
from mpgraph.passes.hoist_weight_casts import hoist_weight_casts
from mpgraph.pipeline import run_passes

from .graphs import (
    assert_same,
    bf16,
    cast,
    context_of,
    graph_of,
    parameter,
    results_and_grads,
    special,
)


def check(function, *inputs, edits, **options):
    """As check_pass, but the caller makes the copies that the graph now asks for."""
    gm = graph_of(function, *inputs)
    context = context_of(**options)
    want = results_and_grads(gm, inputs)
    (report,) = run_passes(gm, [hoist_weight_casts], context)

    slots = [node.meta["slot"] for node in gm.graph.find_nodes(op="placeholder")]

    def run(*values):
        # All copies first, as the cache has them from an earlier forward pass.
        copies = {s.index: values[s.index].to(s.dtype) for s in slots if s.kind == "cast"}
        return gm(*[copies[s.index] if s.kind == "cast" else values[s.index] for s in slots])

    assert report.edits == edits
    assert_same(results_and_grads(run, inputs), want)
    return gm


def test_the_copy_becomes_an_input():
    gm = check(
        lambda x, w: F.linear(cast(x, bf16), cast(w, bf16)),
        special(2, 3).requires_grad_(),
        parameter(3, 3),
        edits=1,
    )
    assert text(gm) == "\n".join(
        [
            "%x: fp32[2, 3] = input",
            "%w_w_bf16: bf16[3, 3] = input",
            "%x_bf16: bf16[2, 3] = to.dtype(%x, bf16)",
            "%linear: bf16[2, 3] = linear(%x_bf16, %w_w_bf16)",
            "return %linear",
        ]
    )
    (copy,) = [n for n in gm.graph.find_nodes(op="placeholder") if n.name == "w_w_bf16"]
    assert copy.meta["slot"] == Slot("cast", "w", 1, bf16)


def test_a_parameter_that_is_read_in_both_dtypes_stays_an_input_too():
    def f(x, w):
        return F.linear(cast(x, bf16), cast(w, bf16)), w.sin()

    gm = check(f, torch.randn(2, 3), parameter(3, 3), edits=1)
    assert [n.name for n in gm.graph.find_nodes(op="placeholder")] == ["x", "p_w", "w_w_bf16"]


def test_a_tied_embedding_is_hoisted_though_it_is_read_first():
    def f(i, w):
        return F.linear(cast(F.embedding(i, w), bf16), cast(w, bf16))

    check(f, torch.tensor([1, 1, 0]), parameter(4, 3), edits=1)


def test_the_first_of_many_uses_is_hoisted():
    def f(x, w):
        return F.linear(cast(x, bf16), cast(w, bf16)), w.sin(), w.cos(), w.exp()

    check(f, torch.randn(2, 3), parameter(3, 3), edits=1)


@pytest.mark.parametrize(
    "earlier",
    [lambda w: (w.sin(), w.cos()), lambda w: (w * w,), lambda w: (w.nanmean(),)],
    ids=["two uses", "twice in one", "a composite"],
)
def test_three_gradients_keep_their_order(earlier):
    def f(x, w):
        return *earlier(w), F.linear(cast(x, bf16), cast(w, bf16))

    check(f, torch.randn(2, 3), parameter(3, 3), edits=0)


def test_two_casts_of_one_parameter_stay():
    def f(x, w):
        return F.linear(F.linear(cast(x, bf16), cast(w, bf16)), cast(w, bf16))

    check(f, torch.randn(2, 3), parameter(3, 3), edits=0)


def test_a_parameter_that_the_graph_writes_to_stays():
    def f(x, w):
        with torch.no_grad():
            w[0:1].clamp_(-1, 1)
        return F.linear(cast(x, bf16), cast(w, bf16))

    gm = graph_of(f, torch.randn(2, 3), parameter(3, 3))
    (report,) = run_passes(gm, [hoist_weight_casts], context_of())
    assert report.edits == 0


def test_a_cast_inside_no_grad_stays():
    def f(x, w):
        with torch.no_grad():
            return F.linear(cast(x, bf16), cast(w, bf16)), x

    check(f, torch.randn(2, 3), parameter(3, 3), edits=0)


def test_inside_no_grad_all_along_it_is_hoisted():
    w = parameter(3, 3)
    gm = graph_of(
        lambda x, w: F.linear(cast(x, bf16), cast(w, bf16)), torch.ones(2, 3), w, grad=False
    )
    (report,) = run_passes(gm, [hoist_weight_casts], context_of(grad=False))
    assert report.edits == 1


@pytest.mark.parametrize("kind", ["input", "buffer", "constant", "attribute"])
def test_only_parameters_are_hoisted(kind):
    gm = graph_of(lambda x: cast(x, bf16).sin(), torch.randn(3))
    (x,) = gm.graph.find_nodes(op="placeholder")
    x.meta["slot"] = dataclasses.replace(x.meta["slot"], kind=kind)
    (report,) = run_passes(gm, [hoist_weight_casts], context_of())
    assert report.edits == 0


def test_casts_of_the_model_stay():
    check(lambda x, w: F.linear(x.to(bf16), w.to(bf16)), torch.ones(2, 3), parameter(3, 3), edits=0)


def test_casts_inside_branches_stay():
    def f(w, flag):
        def branch(v):
            return (cast(v, bf16).sin(),)

        return torch.ops.higher_order.cond(flag, branch, branch, (w.sin(),))

    check(f, parameter(3), torch.tensor(True), edits=0)
