from __future__ import annotations

import torch
from torch.nn import functional as F

from mpgraph.passes.remove_dead import remove_dead
from mpgraph.pipeline import run_passes
from mpgraph.step.slots import StepSlot

from .graphs import bf16, cast, check_pass, context_of, graph_of, special, targets


def x4():
    return special(4).requires_grad_()


def test_what_nothing_reads_disappears_with_all_that_it_read():
    def f(x, y):
        cast(y, bf16).sin().cos()
        return x.exp()

    gm = check_pass(remove_dead, f, x4(), special(4), edits=4, run=False)
    assert [n.name for n in gm.graph.nodes] == ["x", "exp", "output"]


def test_the_pass_reads_backwards_and_needs_one_run():
    def f(x):
        for _ in range(5):
            x = x.sin()
        return special(1) * 0 if x is None else torch.ones(2)

    gm = check_pass(remove_dead, f, x4(), edits=6, run=False)
    assert targets(gm) == ["aten.ones.default"]


def test_random_numbers_are_still_drawn():
    def f(x):
        F.dropout(x.sin(), 0.5, True)
        return F.dropout(x.cos(), 0.5, True)

    check_pass(remove_dead, f, x4(), edits=0)


def test_writes_stay():
    def f(x):
        y = x.sin()
        y[0:2].add_(1)
        return y.cos()

    check_pass(remove_dead, f, x4(), edits=0)


def test_running_statistics_are_still_updated():
    def f(x, mean, var):
        F.batch_norm(x, mean, var, training=True)
        return x.cos()

    gm = check_pass(remove_dead, f, torch.randn(4, 2), torch.zeros(2), torch.ones(2), edits=0)
    mean = torch.zeros(2)
    gm(torch.ones(4, 2), mean, torch.ones(2))
    assert mean.eq(0.1).all()


def test_gradient_mode_switches_stay():
    def f(x):
        with torch.no_grad():
            y = x.sin()
        return y, x.cos()

    check_pass(remove_dead, f, x4(), edits=0)


def test_assertions_stay():
    def f(x):
        torch._assert_async((x.abs() > -1).any())
        return x.sin()

    gm = check_pass(remove_dead, f, torch.ones(4), edits=0)
    assert "aten._assert_async.default" in targets(gm)


def test_control_flow_stays():
    def f(x, flag):
        def writes(v):
            return (v.sin(),)

        torch.ops.higher_order.cond(flag, writes, writes, (x,))
        return x.cos()

    gm = check_pass(remove_dead, f, x4(), torch.tensor(True), edits=1)
    assert targets(gm) == ["cond", "aten.cos.default"]


def test_branches_are_entered():
    def f(x, flag):
        def dead(v):
            v.cos().exp()
            return (v.sin(),)

        def alive(v):
            return (v.tan(),)

        return torch.ops.higher_order.cond(flag, dead, alive, (x,))

    check_pass(remove_dead, f, x4(), torch.tensor(True), edits=2)


def test_a_branch_keeps_its_inputs_though_it_reads_none():
    def f(x, flag):
        def reads(v):
            return (v.sin(),)

        def ignores(v):
            return (torch.ones(4),)

        return torch.ops.higher_order.cond(flag, reads, ignores, (x,))

    check_pass(remove_dead, f, x4(), torch.tensor(False), edits=0)


def test_tensors_of_a_steps_batch_stay():
    def f(x, y, z):
        return x.exp()

    gm = graph_of(f, x4(), special(4), special(4))
    _, y, z = gm.graph.find_nodes(op="placeholder")
    y.meta["slot"] = StepSlot("input", "y", index=1)
    z.meta["slot"] = StepSlot("constant", "z")
    run_passes(gm, [remove_dead], context_of())
    assert [n.name for n in gm.graph.find_nodes(op="placeholder")] == ["x", "y"]
