"""The pipeline holds passes to their word, and counts what they did."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import mpgraph
from mpgraph import ir, pipeline
from mpgraph.errors import PolicyError, VerificationError
from mpgraph.graph_text import text
from mpgraph.passes import DEFAULT_PASSES
from mpgraph.passes.fold_casts import fold_casts
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.pipeline import (
    GraphPass,
    NeedsStaticShapes,
    cast_bytes,
    element_count,
    graph_pass,
    run_passes,
)

from .passes.graphs import bf16, cast, casts, context_of, f32, graph_of, parameter


@pytest.fixture
def gm():
    return graph_of(lambda x: cast(cast(x, bf16), f32).sin(), torch.ones(4, 3))


@graph_pass(numerics="exact")
def claims_too_much(graph, context):
    return 1


@graph_pass(numerics="exact")
def claims_too_little(graph, context):
    (sin,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    sin.target = torch.ops.aten.cos.default
    return 0


@graph_pass(numerics="exact")
def changes_a_keyword(graph, context):
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.default)
    node.kwargs = {"dtype": f32}
    return 0


def test_edits_that_were_not_made_are_a_lie(gm):
    message = "pass 'claims_too_much' reported 1 edits, but the graph text is unchanged"
    with pytest.raises(VerificationError, match=message):
        run_passes(gm, [claims_too_much], context_of())


def test_edits_that_were_not_reported_are_a_lie(gm):
    message = "pass 'claims_too_little' reported 0 edits, but the graph text changed"
    with pytest.raises(VerificationError, match=message):
        run_passes(gm, [claims_too_little], context_of())


def test_a_change_of_a_keyword_is_a_change():
    gm = graph_of(lambda x: x.sum(), torch.ones(3))
    with pytest.raises(VerificationError, match="but the graph text changed"):
        run_passes(gm, [changes_a_keyword], context_of())


def test_a_change_inside_a_branch_is_a_change():
    def f(x, flag):
        def branch(v):
            return (v.sin(),)

        return torch.ops.higher_order.cond(flag, branch, branch, (x,))

    gm = graph_of(f, torch.ones(3), torch.tensor(True))
    with pytest.raises(VerificationError, match="'claims_too_little' reported 0 edits"):
        run_passes(
            gm, [GraphPass(in_bodies, "claims_too_little", "exact", whole=True)], context_of()
        )


def in_bodies(graph, context):
    for _, body in ir.call_graphs(graph.owning_module):
        claims_too_little(body.graph, context)
    return 0


def test_without_checks_a_pass_is_believed(gm, monkeypatch):
    monkeypatch.setattr(pipeline, "checks", [])
    (report,) = run_passes(gm, [claims_too_much], context_of())
    assert report.edits == 1


def test_a_broken_invariant_names_the_pass(gm):
    @graph_pass(numerics="exact")
    def forgets_a_value(graph, context):
        (sin,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
        del sin.meta["val"]
        return 1

    with pytest.raises(VerificationError, match=r"after pass 'forgets_a_value': node %sin"):
        run_passes(gm, [forgets_a_value], context_of())


def test_an_error_inside_a_pass_is_a_bug_of_mpgraph_and_names_the_pass(gm):
    @graph_pass(numerics="exact")
    def divides_by_zero(graph, context):
        return 1 // 0

    with pytest.raises(
        VerificationError, match=r"pass 'divides_by_zero' failed: ZeroDivision"
    ) as e:
        run_passes(gm, [divides_by_zero], context_of())
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_an_error_meant_for_the_user_reaches_the_user(gm):
    @graph_pass(numerics="exact")
    def refuses(graph, context):
        raise PolicyError("no such operator")

    with pytest.raises(PolicyError, match=r"^no such operator$"):
        run_passes(gm, [refuses], context_of())


def test_a_request_for_static_shapes_reaches_the_capture(gm):
    @graph_pass(numerics="exact")
    def needs_numbers(graph, context):
        raise NeedsStaticShapes(next(iter(graph.nodes)), RuntimeError("a\nb"))

    with pytest.raises(NeedsStaticShapes, match=r": a$"):
        run_passes(gm, [needs_numbers], context_of())


def test_a_pass_runs_on_every_graph_and_a_whole_one_on_the_outermost():
    def f(x, flag):
        def branch(v):
            return (v.sin(),)

        return torch.ops.higher_order.cond(flag, branch, branch, (x,))

    gm = graph_of(f, torch.ones(3), torch.tensor(True))
    seen = []
    run = lambda graph, context: seen.append(graph) or 0  # noqa: E731
    run_passes(gm, [GraphPass(run, "each", "exact")], context_of())
    assert seen == [gm.graph, gm.true_graph_0.graph, gm.false_graph_0.graph]
    seen.clear()
    run_passes(gm, [GraphPass(run, "all", "exact", whole=True)], context_of())
    assert seen == [gm.graph]


def test_the_report_counts_casts_and_the_bytes_that_they_move():
    def f(x, w):
        cast(x, bf16).cos()
        return F.linear(cast(cast(x.to(bf16), f32), bf16), cast(w, bf16))

    gm = graph_of(f, torch.ones(4, 3), parameter(5, 3))
    folded, dead = run_passes(gm, [fold_casts, remove_dead], context_of())
    assert (folded.name, folded.numerics, folded.edits) == ("fold_casts", "exact", 1)
    # x to bf16 twice: 12 elements of 4 + 2 bytes; w: 15 elements.
    assert (folded.casts, folded.cast_bytes) == (3, 2 * 12 * 6 + 15 * 6)
    assert (dead.edits, dead.casts, dead.cast_bytes) == (2, 2, 12 * 6 + 15 * 6)


def test_casts_inside_branches_count():
    def f(x, flag):
        def branch(v):
            return (cast(v, bf16).sin(),)

        return torch.ops.higher_order.cond(flag, branch, branch, (x,))

    gm = graph_of(f, torch.ones(3), torch.tensor(True))
    (report,) = run_passes(gm, [remove_dead], context_of())
    assert (report.casts, report.cast_bytes) == (2, 2 * 3 * 6)


def test_a_cast_to_the_dtype_that_is_there_does_not_count():
    gm = graph_of(lambda x: cast(x, f32).sin(), torch.ones(3))
    (report,) = run_passes(gm, [remove_dead], context_of())
    assert report.casts == 0
    assert cast_bytes(casts(gm)[0]) == 24


def test_symbolic_sizes_count_as_they_were_at_capture():
    size = ShapeEnv().create_unbacked_symint()
    assert element_count(torch.empty(3, 2)) == 6

    class Fake:
        shape = (3, size)

    assert element_count(Fake()) == 3


def test_the_text_is_the_same_on_every_run():
    def f(x, w):
        return F.softmax(F.linear(x, w), -1), torch.einsum("ab,cb->ac", x, w)

    def run():
        context = context_of()
        gm = graph_of(f, torch.ones(2, 3), parameter(3, 3), context=context)
        run_passes(gm, DEFAULT_PASSES, context)
        return text(gm)

    assert run() == run()


def test_graphs_can_run_after_the_passes():
    gm = graph_of(lambda x: cast(cast(x.to(bf16), f32), bf16).sin(), torch.ones(3))
    run_passes(gm, [fold_casts], context_of())
    assert gm(torch.ones(3)).dtype is bf16


def test_a_region_chooses_the_autocast_state():
    context = context_of()

    def state():
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    with context.autocast():
        assert state() == (True, bf16)
    with context.autocast(ir.Region(True, torch.float16)):
        assert state() == (True, torch.float16)
    with context.autocast(ir.Region(False, None)):
        assert state()[0] is False
    with context_of(compute=None).autocast():
        assert state()[0] is False


def test_every_pass_is_named_like_its_function_and_file():
    for p in DEFAULT_PASSES:
        assert p.name == p.run.__name__ == p.run.__module__.rpartition(".")[2]
        assert p.run.__doc__
        assert "``" in p.run.__doc__ or "Erase" in p.run.__doc__


# --- Whole models, as files that a reviewer can read ------------------------------------------


class Block(nn.Module):
    """A tiny pre-norm transformer block with tied embeddings."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids):
        x = self.tokens(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return F.log_softmax(F.linear(x, self.tokens.weight), -1).mean()


class ConvNet(nn.Module):
    """Convolutions with batch normalisation, a residual and a pooled classifier."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, image):
        x = F.relu_(self.norm(self.one(image)))
        x = F.max_pool2d(x + self.norm2(self.two(x)), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)).softmax(-1)


MODELS = {
    "transformer": (Block, lambda: torch.arange(10).view(2, 5)),
    "conv_net": (ConvNet, lambda: torch.ones(2, 3, 6, 6)),
}


@pytest.mark.parametrize("policy", ["default", "lean", "autocast-cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_rewritten_as_in_the_file(name, policy, golden):
    make, example = MODELS[name]
    model = mpgraph.convert(make(), "bf16", policy=policy, example_inputs=(example(),))
    golden(f"{name}_{policy}", text(model))
