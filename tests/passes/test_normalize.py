from __future__ import annotations

import operator
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from mpgraph import ir
from mpgraph.graph_text import text
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.passes.normalize import normalize
from mpgraph.pipeline import run_passes

from .graphs import (
    assert_same,
    bf16,
    captured,
    check_graph,
    context_of,
    f16,
    graph_of,
    special,
    targets,
    values_for,
)


class Net(nn.Module):
    """A module from a function of the input and one weight."""

    def __init__(self, function):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))
        self.function = function

    def forward(self, *args):
        return self.function(*args, self.w)


def check(function, *inputs, edits, grad=True, context=None):
    module = Net(function)
    context = context or context_of(compute=None, grad=grad)
    gm = captured(module, *inputs, context=context, grad=grad)
    values = values_for(gm, module, *inputs)
    return check_graph(normalize, gm, *values, edits=edits, context=context)


def meta_of(gm, key):
    return {n.name: n.meta.get(key) for n in gm.graph.nodes if ir.is_operator(n)}


def test_a_no_grad_block_becomes_nodes_between_two_switches():
    def f(x, w):
        with torch.no_grad():
            teacher = (x @ w).sin()
        return x @ w * teacher

    gm = check(f, special(2, 3), edits=1)
    assert text(gm).replace("s0", "2").splitlines()[2:] == [
        "%_set_grad_enabled = _set_grad_enabled(False)",
        "%matmul: fp32[2, 3] = matmul(%x0, %p_w)",
        "%sin_1: fp32[2, 3] = sin(%matmul)",
        "%_set_grad_enabled_1 = _set_grad_enabled(True)",
        "%matmul_1: fp32[2, 3] = matmul(%x0, %p_w)",
        "%mul: fp32[2, 3] = mul.Tensor(%matmul_1, %sin_1)",
        "return (%mul,)",
    ]
    assert meta_of(gm, "grad") == {"matmul": False, "sin_1": False, "matmul_1": None, "mul": None}


def test_a_block_that_changes_nothing_needs_no_switch():
    def f(x, w):
        with torch.no_grad():
            return (x @ w).sin()

    gm = check(f, special(2, 3), edits=0, grad=False)
    assert ir.SET_GRAD not in {n.target for n in gm.graph.nodes}


def test_blocks_within_blocks():
    def f(x, w):
        with torch.no_grad():
            a = x.sin()
            with torch.enable_grad():
                b = (x @ w).cos()
            c = b.sin()
        return a, b, c, x @ w

    gm = check(f, special(2, 3), edits=2)
    assert list(meta_of(gm, "grad").values()) == [False, None, None, False, None]


def test_an_autocast_region_leaves_no_node_behind():
    def f(x, w):
        with torch.autocast("cpu", enabled=False):
            a = x @ w
        with torch.autocast("cpu", dtype=torch.float16):
            b = x @ w
        return a, b, x @ w

    module = Net(f)
    context = context_of(preset="autocast-cpu", strict=True)
    x = torch.randn(2, 3)
    gm = captured(module, x, context=context)
    (report,) = run_passes(gm, [normalize], context)
    assert report.edits == 2
    assert set(targets(gm)) == {"aten.matmul.default"}
    regions = list(meta_of(gm, "region").values())
    assert regions[:1] == [ir.Region(False, None)] or not regions[0].enabled
    assert regions[1] == ir.Region(True, f16)
    assert regions[2] is None


def test_the_innermost_region_wins():
    def f(x, w):
        with torch.autocast("cpu", enabled=False):
            a = x @ w
            with torch.autocast("cpu", dtype=bf16):
                b = a @ w
            return b.float() @ w

    module = Net(f)
    gm = captured(module, torch.randn(2, 3), context=context_of())
    run_passes(gm, [normalize], context_of())
    regions = [n.meta["region"].enabled for n in gm.graph.nodes if "matmul" in n.name]
    assert regions == [False, True, False]


def test_a_region_for_another_device_changes_nothing():
    def f(x, w):
        with torch.autocast("cuda", dtype=torch.float16):
            return x @ w

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no such device
        module = Net(f)
        gm = captured(module, torch.randn(2, 3), context=context_of())
    run_passes(gm, [normalize], context_of())
    assert meta_of(gm, "region") == {"matmul_1": None}


def test_results_that_are_no_tensors_pass_through():
    def f(x, w):
        with torch.no_grad():
            n = x.shape[0] * 2
            y = x.sin()
        return y * n, (x @ w).repeat(n, 1)

    check(f, special(2, 3), edits=1)


def test_checks_of_captured_dtypes_are_dropped():
    def f(x, w):
        return torch.ops.aten._to_copy(x.to(torch.float64), dtype=torch.float32) @ w

    module = Net(f)
    context = context_of(compute=None)
    gm = captured(module, torch.randn(2, 3), context=context)
    had = targets(gm).count("aten._assert_tensor_metadata.default")
    (report,) = run_passes(gm, [normalize], context)
    assert report.edits == had > 0
    assert "aten._assert_tensor_metadata.default" not in targets(gm)


def test_a_graph_without_regions_is_left_alone():
    check(lambda x, w: (x @ w).sin(), special(2, 3), edits=0)


class Branches(nn.Module):
    """A condition inside a region, with regions inside its branches. No parameters: see below."""

    def __init__(self, outer, inner):
        super().__init__()
        self.outer, self.inner = outer, inner

    def forward(self, x, w, flag):
        def one(x, w):
            with self.inner():
                a = x @ w
            return (a.float() + 1) @ w

        def other(x, w):
            return (x.cos() @ w) * 2

        with self.outer():
            return torch.cond(flag, one, other, (x, w))


def branches(outer, inner, context, grad=True):
    module = Branches(outer, inner)
    # Leaves without requires_grad: the derivative of cond is not traced.
    inputs = torch.randn(2, 3), torch.randn(3, 3), torch.tensor(True)
    return module, captured(module, *inputs, context=context, grad=grad), inputs


def no_grad():
    return torch.no_grad()


def island():
    return torch.autocast("cpu", enabled=False)


def other_dtype():
    return torch.autocast("cpu", dtype=f16)


def test_regions_inside_branches_are_inlined():
    context = context_of(preset="autocast-cpu", strict=True)
    _, gm, _ = branches(torch.enable_grad, island, context)
    (report,) = run_passes(gm, [normalize], context)
    assert report.edits >= 1
    body = gm.true_graph_0.graph
    assert "wrap_with_autocast" not in " ".join(str(n.target) for n in body.nodes)
    first, second = [n for n in body.nodes if str(n.target) == "aten.matmul.default"]
    assert not first.meta["region"].enabled
    assert second.meta.get("region") is None


def test_a_region_around_a_condition_reaches_into_its_branches():
    context = context_of(preset="autocast-cpu", strict=True)
    _, gm, _ = branches(island, other_dtype, context)
    run_passes(gm, [normalize], context)
    bodies = [body.graph for _, body in ir.call_graphs(gm)]
    regions = [
        n.meta["region"] for g in bodies for n in g.nodes if str(n.target) == "aten.matmul.default"
    ]
    assert [r.enabled for r in regions] == [True, False, False]
    assert regions[0].dtype is f16


def test_regions_in_and_around_branches_compute_what_autocast_computes():
    for outer, inner in [
        (island, other_dtype),
        (other_dtype, island),
        (torch.enable_grad, no_grad),
    ]:
        context = context_of(preset="autocast-cpu", strict=True)
        module, gm, inputs = branches(outer, inner, context)
        run_passes(gm, DEFAULT_PASSES, context)

        def eager(*inputs, module=module):
            with torch.autocast("cpu", bf16):
                return module(*inputs)

        for flag in (True, False):
            values = inputs[0], inputs[1], torch.tensor(flag)
            in_order = values_for(gm, module, *values)
            assert_same(gm(*in_order)[0], eager(*values))


def test_dropout_inside_no_grad_draws_the_same_numbers():
    def f(x, w):
        with torch.no_grad():
            noise = F.dropout(x, 0.5, True)
        return F.dropout(x @ w, 0.5, True) + noise

    check(f, torch.randn(8, 3), edits=1)


def test_users_that_the_capture_forgot_are_found_again():
    gm = graph_of(lambda x: x.sin().cos(), torch.ones(3))
    sin, cos = [n for n in gm.graph.nodes if ir.is_operator(n)]
    del sin.users[cos]
    run_passes(gm, [normalize], context_of())
    assert list(sin.users) == [cos]


def test_a_condition_inside_a_wrapped_region_is_inside_it():
    def f(x, flag):
        def branch(v):
            return (v.sin(),)

        return torch.ops.higher_order.cond(flag, branch, branch, (x,))

    inputs = torch.ones(3), torch.tensor(True)
    inner, gm = graph_of(f, *inputs), graph_of(lambda x, flag: (x.cos(), flag.clone()), *inputs)
    gm.add_module("inside", inner)
    x, flag = gm.graph.find_nodes(op="placeholder")
    wrap = torch.ops.higher_order.wrap_with_autocast
    with gm.graph.inserting_before(gm.graph.output_node()):
        body = gm.graph.get_attr("inside")
        call = gm.graph.call_function(wrap, ("cpu", None, False, None, body, x, flag))
        item = gm.graph.call_function(operator.getitem, (call, 0))
    value = x.meta["val"]
    call.meta = {"val": (value,), "captured": (value,)}
    item.meta = {"val": value, "captured": value}
    gm.graph.output_node().args = ((item,),)
    run_passes(gm, [normalize], context_of())
    (_, body), *_ = ir.call_graphs(gm)
    sin = next(n for n in body.graph.nodes if ir.is_operator(n))
    assert sin.meta["region"] == ir.Region(False, None)
