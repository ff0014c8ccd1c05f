"""Each kind of node is taken apart once, and what comes out is what taking all apart gives."""

import collections
import operator

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.onnx._internal.exporter import _fx_passes

from mpgraph.onnx import lower as lowering
from mpgraph.onnx.functional import functional, retrace
from mpgraph.onnx.lowering import decompositions

f32 = torch.float32


def traced(function, *values, dynamic=False):
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, static_shapes=True)
    fakes = [mode.from_tensor(v, static_shapes=not dynamic) for v in values]
    with mode:
        gm = make_fx(lambda *given: (function(*given),), _allow_non_fake_inputs=True)(*fakes)
    return functional(gm).graph_module


def block(x, weight, bias):
    for _ in range(3):
        x = x + F.gelu(F.layer_norm(x, (8,), weight, bias)).softmax(-1)
    return x


def gradient(x, weight, bias):
    weight = weight.requires_grad_()
    return torch.autograd.grad(block(x, weight, bias).sum(), [weight])[0]


INPUTS = torch.randn(4, 8), torch.randn(8), torch.randn(8)


def counts(gm):
    return collections.Counter(
        str(n.target) for n in gm.graph.nodes if n.target is not operator.getitem
    )


def test_the_operators_are_those_of_taking_all_nodes_apart_at_once():
    gm = traced(gradient, *INPUTS)
    once = lowering.lower(gm)
    whole = retrace(gm, decompositions=decompositions(18))
    _fx_passes.insert_type_promotion_nodes(whole)
    whole.graph.eliminate_dead_code()
    assert counts(once) == counts(whole)
    torch.testing.assert_close(once(*INPUTS), gm(*INPUTS), rtol=1e-5, atol=1e-6)


def test_a_kind_of_node_is_taken_apart_once(monkeypatch):
    asked = []
    original = lowering._taken_apart

    def noted(node, inputs, table):
        asked.append(node.target)
        return original(node, inputs, table)

    monkeypatch.setattr(lowering, "_taken_apart", noted)
    gm = traced(gradient, *INPUTS)
    lowering.lower(gm)
    backward = torch.ops.aten.native_layer_norm_backward.default
    assert sum(n.target is backward for n in gm.graph.nodes) == 3
    # The last gradient is an expanded number, laid out otherwise; the two others are alike.
    assert asked.count(backward) <= 2
    assert len(asked) < len(gm.graph.nodes)


def test_a_stride_is_written_as_a_product_of_sizes():
    # In the trace of an LSTM, the stride of its first state stands for an equal number of rows.
    x = torch.randn(2, 3, 5)
    gm = traced(lambda x: x.reshape(2, -1)[0].new_ones(2 * x.stride(0)), x, dynamic=True)
    assert counts(gm)["aten.sym_stride.int"]
    lowered = lowering.lower(gm)
    assert not counts(lowered)["aten.sym_stride.int"]
    assert lowered(torch.randn(2, 7, 3))[0].shape == (42,)


def test_numbers_and_layouts_tell_kinds_apart():
    def kinds(function, *values):
        nodes = traced(function, *values).graph.nodes
        return {lowering.kind_of(n, {})[1] for n in nodes if n.op == "call_function"}

    x = torch.randn(3, 3)
    assert len(kinds(lambda x: (x + 1) * (x + 1.0), x)) == 3
    assert len(kinds(lambda x: (x + 1) * (x + True), x)) == 3
    assert len(kinds(lambda x: (x * 0.0) + (x * -0.0), x)) == 3
    assert len(kinds(lambda x: (x * x) + (x * x), x)) == 2
    assert len(kinds(lambda x, y: (x * x) + (x * y), x, x.clone())) == 3
    assert len(kinds(lambda x, y: x.relu() + y.relu(), x, torch.randn(3, 3).t())) == 3


def test_a_size_is_computed_once_and_stays_symbolic():
    gm = traced(lambda x: F.layer_norm(x, (8,)).mean(0).sum() / x.shape[0], INPUTS[0], dynamic=True)
    values = [node.meta.get("val") for node in lowering.lower(gm).graph.nodes]
    texts = [str(value.node.expr) for value in values if isinstance(value, torch.SymInt)]
    assert texts
    assert len(texts) == len(set(texts))


def test_what_only_checks_is_left_out():
    def solved(x):
        torch._assert_async(x.isfinite().all(), "rows")
        return torch.linalg.solve(x @ x.mT + torch.eye(3), x)

    x = torch.randn(2, 3, 3)
    gm = traced(solved, x)
    checks = [str(n.target) for n in gm.graph.nodes if "assert" in str(n) or "check" in str(n)]
    assert checks  # two, or one in torch 2.11
    lowered = lowering.lower(gm)
    calls = [node for node in lowered.graph.nodes if node.op == "call_function"]
    assert all(node.meta.get("val") is not None for node in calls)
    torch.testing.assert_close(lowered(x), gm(x), rtol=1e-4, atol=1e-5)


def test_promotions_are_written_out():
    gm = lowering.lower(traced(lambda i, x: i.sqrt() + x, torch.arange(3), torch.randn(3)))
    (add,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    (root,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sqrt.default)
    assert {node.meta["val"].dtype for node in (*add.args, *root.args)} == {f32}
