"""torch.compile of a converted model, by itself and as a part of what is compiled."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph.module import state_of

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    assert nesting == 1, "a torch.autocast region was entered and never left"


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, scale=1.0):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * scale


def images(batch=4):
    return torch.randn(batch, 3, 8, 8)


def ids(batch=4, length=8):
    return torch.randint(0, 32, (batch, length))


MODELS = {"conv_net": (ConvNet, images), "transformer": (Transformer, ids)}


def pair(kind, precision, seed=0, **options):
    """Two converted models alike, and a batch for them."""
    torch.manual_seed(seed)
    make, batch = MODELS[kind]
    model = make()
    models = [mpgraph.convert(copy.deepcopy(model), precision, **options) for _ in range(2)]
    return *models, batch()


def train(call, model, *args):
    """The result, every gradient and every buffer after one backward pass."""
    model.zero_grad()
    result = call(*args)
    result.float().square().mean().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [result.detach(), *grads, *(b.clone() for b in model.buffers())]


def assert_equal(found, wanted, **near):
    for one, other in zip(found, wanted, strict=True):
        if one is None or other is None:
            assert one is other
        elif near:
            torch.testing.assert_close(one.float(), other.float(), **near)
        else:
            assert one.dtype is other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["default", "autocast-cpu"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_with_the_numbers_of_the_converted_model(kind, precision, policy, backend):
    compiled, plain, x = pair(kind, precision, policy=policy)
    call = torch.compile(compiled, fullgraph=True, backend=backend)
    for _ in range(2):
        assert_equal(train(call, compiled, x), train(plain, plain, x))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", MODELS)
def test_inductor_compiles_it_to_numbers_nearby(kind, precision):
    compiled, plain, x = pair(kind, precision)
    call = torch.compile(compiled, fullgraph=True)
    found, wanted = train(call, compiled, x), train(plain, plain, x)
    for one, other in zip(found, wanted, strict=True):
        near = 0.02 * max(1e-3, float(other.float().abs().max()))
        torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=near)
        assert one.dtype is other.dtype


def test_nothing_of_mpgraph_is_left_in_the_compiled_graph():
    seen = []

    def backend(gm, examples):
        from torch._dynamo.backends.common import aot_autograd

        def keep(inner, _):
            seen.append(inner)
            return inner.forward

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(gm, examples)

    compiled, _, x = pair("transformer", "fp16")
    train(torch.compile(compiled, fullgraph=True, backend=backend), compiled, x)
    assert len(seen) == 2
    targets = {str(n.target) for gm in seen for n in gm.graph.nodes if n.op == "call_function"}
    assert all(target.startswith(("aten.", "<built-in", "prims.")) for target in targets), targets
    copies = [
        n for gm in seen for n in gm.graph.nodes if n.target is torch.ops.aten._to_copy.default
    ]
    assert all(n.args[0].meta["val"].dtype is not n.meta["val"].dtype for n in copies)


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_eager_and_compiled_calls_mix(first):
    compiled, plain, x = pair("transformer", "bf16")
    calls = [compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager")]
    wanted = train(plain, plain, x)
    for call in calls if first == "eager" else reversed(calls):
        assert_equal(train(call, compiled, x), wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_compiled_too(copied):
    compiled, plain, x = pair("transformer", "bf16")
    compiled(x)
    other = copied(compiled)
    call = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert_equal(train(call, other, x), train(plain, plain, x))
    assert not state_of(compiled).compiled
    assert len(state_of(other).compiled) == 1


def test_the_models_own_compile_method_works():
    compiled, plain, x = pair("transformer", "fp16")
    compiled.compile(fullgraph=True, backend="aot_eager")
    assert_equal(train(compiled, compiled, x), train(plain, plain, x))
    assert state_of(compiled).compiled


def test_a_compiled_function_may_call_it():
    compiled, plain, x = pair("transformer", "bf16")
    target = ids()

    def loss_of(model):
        return lambda x: F.cross_entropy(model(x).float().flatten(0, 1), target.flatten())

    call = torch.compile(loss_of(compiled), fullgraph=True, backend="aot_eager")
    assert_equal(train(call, compiled, x), train(loss_of(plain), plain, x))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.before, self.inner = nn.Embedding(32, 32), inner

    def forward(self, ids):
        return self.inner(self.before(ids).argmax(-1)).tanh()


def test_a_part_of_a_compiled_model_may_be_converted():
    policy = mpgraph.Policy().pin(module="blocks.1.*", run="fp32")
    compiled, plain, x = pair("transformer", "bf16", policy=policy)
    torch.manual_seed(1)
    outer = Around(compiled)
    reference = Around(plain)
    reference.before.load_state_dict(outer.before.state_dict())
    call = torch.compile(outer, fullgraph=True, backend="aot_eager")
    assert_equal(train(call, compiled, x), train(reference, plain, x))
    modules = {node.module for node in mpgraph.explain(compiled).nodes}
    assert {"blocks.0.up", "blocks.1.up", "head"} <= modules
    runs = {n.module: n.runs_in for n in mpgraph.explain(compiled).nodes if n.runs_in}
    assert runs["blocks.0.up"] == "bf16"
    assert runs["blocks.1.up"] == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_is_compiled_as_often_as_the_plain_model(precision):
    compiled, _, _ = pair("transformer", precision)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    if precision == "fp16":
        mpgraph.guard(optimizer, compiled, scale=mpgraph.LossScale(growth_interval=2))
    original = Transformer()
    counts = []
    for model in (compiled, original):
        counter = CompileCounterWithBackend("aot_eager")
        call = torch.compile(model, backend=counter, fullgraph=True)
        for batch, length in [(4, 8), (4, 8), (4, 8), (6, 8), (6, 8), (5, 9), (7, 12), (7, 12)]:
            call(ids(batch, length)).float().square().mean().backward()
            if model is compiled:
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            call(ids(3, 4))
        model.train()
        call(ids(3, 4))
        counts.append(counter.frame_count)
        torch._dynamo.reset()
    assert counts[0] == counts[1], counts


def test_an_overflow_is_skipped_and_the_scale_is_the_one_of_the_forward_pass():
    compiled, _, x = pair("transformer", "fp16")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    mpgraph.guard(optimizer, compiled, scale=2.0**12)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    first = call(x).square().mean()
    expected = torch.autograd.grad(first, list(compiled.parameters()), retain_graph=True)
    state_of(compiled).scale.replace(mpgraph.LossScale(init_scale=2.0**14))
    assert_equal(torch.autograd.grad(first, list(compiled.parameters())), expected)
    assert_equal(
        torch.autograd.grad(call(x).square().mean(), list(compiled.parameters())), expected
    )
    before = [p.clone() for p in compiled.parameters()]
    (call(x).square().mean() * 1e30).backward()
    optimizer.step()
    assert optimizer.last_step_skipped
    assert float(state_of(compiled).scale.value.scale) == 2.0**13
    assert_equal(list(compiled.parameters()), before)


def test_training_without_a_guard_is_noticed():
    compiled, _, x = pair("transformer", "fp16")
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    call(x).square().mean().backward()
    with pytest.warns(UserWarning, match="trains in fp16 without a guard"):
        torch.optim.SGD(compiled.parameters(), lr=0.1).step()


def test_explain_and_text_show_what_was_compiled():
    compiled, _, x = pair("transformer", "bf16")
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
    report = mpgraph.explain(compiled)
    (graph,) = report.graphs
    assert graph.engine == "compile"
    assert graph.label == "Transformer train (ids: i64[4, 8])"
    assert "captured by compile" in str(report)
    lines = [node.line for node in report.nodes if node.module == "blocks.0.up"]
    assert lines
    assert all("test_compile.py" in line for line in lines)
    assert "%w_blocks_0_up_weight_bf16: bf16[32, 16] = input" in mpgraph.text(compiled)
    mpgraph.assert_policy(compiled, max_casts=100)


def test_an_override_that_matches_nothing_is_said():
    policy = mpgraph.Policy().pin(module="nowhere.*", run="fp32")
    compiled, _, x = pair("transformer", "bf16", policy=policy)
    with pytest.warns(UserWarning, match=r"in the compiled graph, .*nowhere"):
        torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)


def test_parameters_that_became_16_bit_are_refused():
    compiled, _, x = pair("transformer", "bf16")
    compiled.to(bf16)
    with pytest.raises(Exception, match=r"is torch\.bfloat16: it was float32"):
        torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)


# --- What Dynamo keeps of a model ---------------------------------------------------------------


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g * 3


class Special(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.one(x)
        if self.what == "function":
            h = Straight.apply(h)
        elif self.what == "checkpoint":
            h = checkpoint(lambda v: self.two(v).relu(), h, use_reentrant=False)
        elif self.what == "no_grad":
            with torch.no_grad():
                h = h + self.two(x)
        elif self.what == "region":
            with torch.autocast("cpu", enabled=False):
                h = self.two(h.float())
        return self.two(h)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("what", ["function", "checkpoint", "no_grad", "region"])
def test_what_acts_on_autograd_is_kept(what, precision):
    torch.manual_seed(0)
    model, x = Special(what), torch.randn(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = mpgraph.convert(copy.deepcopy(model), precision)
        compiled = mpgraph.convert(model, precision)
        call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        assert_equal(train(call, compiled, x), train(plain, plain, x))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls


def test_a_forward_that_changes_the_model_runs_as_it_would_without_compile():
    torch.manual_seed(0)
    model, x = Counting(), torch.randn(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = mpgraph.convert(copy.deepcopy(model), "bf16")
        compiled = mpgraph.convert(model, "bf16")
        call = torch.compile(compiled, backend="aot_eager")
        for _ in range(3):
            assert_equal(train(call, compiled, x), train(plain, plain, x))
    assert compiled.calls == plain.calls == 3


def test_a_converted_part_of_a_model_that_dynamo_captures_belongs_to_it():
    inner = mpgraph.convert(nn.Linear(8, 8), "bf16")
    outer = mpgraph.convert(nn.Sequential(inner, nn.Linear(8, 4)), "bf16", capture="dynamo")
    outer(torch.randn(2, 8))
    (graph,) = mpgraph.explain(outer).graphs
    assert [node.runs_in for node in graph.operators] == ["bf16", "bf16"]
    assert not graph.breaks


def test_blame_looks_past_the_compiled_code():
    compiled, _, x = pair("transformer", "fp16")
    compiled.compile(backend="aot_eager")
    compiled(x)
    report = mpgraph.blame(compiled, x, loss_fn=lambda out: (out * 1e30).square().mean())
    assert report.nodes


def test_inference_mode_and_no_grad():
    compiled, plain, x = pair("transformer", "bf16")
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(call(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(call(x), plain(x))


CACHED = """
import sys, torch, mpgraph
from torch import nn
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))
call = torch.compile(mpgraph.convert(model, sys.argv[1]), fullgraph=True)
call(torch.randn(8, 16)).float().square().mean().backward()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow  # two fresh processes compile with Inductor
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_second_process_finds_the_compiled_code(precision, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CACHED, precision]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert [run.split() for run in runs] == [["0", "2"], ["2", "0"]]
