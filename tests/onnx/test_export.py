"""Exported inference files against torch: the same names, sizes and numbers."""

from __future__ import annotations

import builtins
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph.onnx import self_check
from mpgraph.onnx.naming import name_axes
from tests.onnx.models import MLP, MODELS, ConvNet, Recurrent, language_model

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore:mpgraph. the model is in training mode")

# In units in the last place of the 16-bit type, at the output's largest element. Files are
# compared with the exported graph in torch: node by node the same roundings, but fp32 sums in
# another order, which move a value over the border between two 16-bit numbers now and then. In
# fp32 there is no such border, and the differences add up: 1e-5 of the largest element.
UNITS = 2.0
FP32 = 1e-5


def export(tmp_path, name, precision, **options):
    torch.manual_seed(0)
    kind, call = MODELS[name]
    model, inputs = kind().eval(), call(2)
    report = mpgraph.export_onnx(
        model, tmp_path / "model.onnx", inputs, precision=precision, **options
    )
    return model, inputs, report


def session(path, level=None):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if level is not None:
        options.graph_optimization_level = level
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, *inputs, level=None, **named):
    made = session(path, level)
    names = [value.name for value in made.get_inputs()]
    feed = {**dict(zip(names, inputs, strict=False)), **named}
    return [torch.from_numpy(y) for y in made.run(None, {k: v.numpy() for k, v in feed.items()})]


def loaded(path):
    return onnx.load(str(path))


def operators(model):
    return [node.op_type for node in model.graph.node]


def initializers(model):
    return {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer}


QUICK = {("mlp", "fp32"), ("mlp", "fp16"), ("mlp", "bf16"), ("cnn", "fp16"), ("gpt", "bf16")}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=() if (name, precision) in QUICK else pytest.mark.slow)
        for name in MODELS
        for precision in ("fp32", "fp16", "bf16")
    ],
)
def test_a_file_gives_the_numbers_of_the_exported_graph(tmp_path, name, precision):
    _, _, report = export(tmp_path, name, precision)
    if precision == "fp32":
        assert report.check.error <= FP32
        assert report.casts == 0
    else:
        assert report.check.units <= UNITS
        assert report.casts > 4
    if name == "mlp" and precision != "fp32":
        assert report.check.identical


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.slow), "bf16"])
def test_a_file_takes_other_batch_and_sequence_sizes(tmp_path, precision):
    torch.manual_seed(0)
    model = mpgraph.convert(language_model().eval(), precision)
    path = tmp_path / "gpt.onnx"
    report = mpgraph.export_onnx(model, path, torch.randint(0, 50, (2, 7)))
    assert report.inputs == ("tokens: i64[batch, sequence]",)
    assert report.outputs == ("output: fp32[batch, sequence, 50]",)
    tokens = torch.randint(0, 50, (5, 11))
    with torch.no_grad():
        want = model(tokens).float()
    (got,) = run(path, tokens)
    # Against the converted model, whose attention kernel rounds inside as it likes.
    assert self_check.difference(got, want) < 8 * torch.finfo(model(tokens).dtype).eps + 2**-7


def test_fp16_overflows_in_the_file_where_it_does_in_torch_at_every_level(tmp_path):
    # The CPU provider's own fp16 would not: it computes chains in fp32.
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([3e4, 3e-4]))

        def forward(self, x):
            return x.half() * self.scale[0].half() * self.scale[1].half()

    model = mpgraph.convert(Chain(), "fp16")
    mpgraph.export_onnx(model, tmp_path / "chain.onnx", torch.randn(8))
    x = torch.tensor([1.0, 2.0, 3.0, -5.0, 1 / 3, 2.2, 0.1, 8.0])
    with torch.no_grad():
        want = model(x).float()
    assert want.isinf().sum() == 4
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"):
        (got,) = run(tmp_path / "chain.onnx", x, level=getattr(ort.GraphOptimizationLevel, level))
        assert torch.equal(got, want), level


def test_small_constants_survive(tmp_path):
    # torch.onnx.export(optimize=True) deletes both of these.
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return 1 / (x * self.weight + 1e-9), x * (1 - 1e-6)

    mpgraph.export_onnx(Small(), tmp_path / "small.onnx", torch.randn(4), precision="fp32")
    x = torch.tensor([0.0, 1.0])
    first, second = run(tmp_path / "small.onnx", x)
    assert first.tolist() == [pytest.approx(1e9), pytest.approx(1.0)]
    assert torch.equal(second, x * (1 - 1e-6))
    assert second[1] != 1


def test_batch_statistics_of_eval_mode_are_computed(tmp_path):
    # torch.onnx's own translation of batch_norm reads running statistics, which there are none of.
    model, _, _ = export(tmp_path, "batch-statistics", "fp32")
    x = torch.randn(5, 3, 8, 8) * 3 + 1
    with torch.no_grad():
        want = model(x)
    (got,) = run(tmp_path / "model.onnx", x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 3, 4)], ids=["heads", "no heads"])
@pytest.mark.parametrize("mask", ["of truth values", "of numbers"])
def test_rows_that_a_mask_leaves_nothing_of_are_zeros(tmp_path, mask, shape):
    # onnxruntime's Softmax makes equal shares of a row of -inf, where torch has NaN, and then 0.
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, mask):
            return F.scaled_dot_product_attention(self.linear(x), x, x, attn_mask=mask)

    seen = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    given = seen if mask == "of truth values" else torch.zeros(3, 3).masked_fill(~seen, -torch.inf)
    model, x = Attention().eval(), torch.randn(shape)
    mpgraph.export_onnx(model, tmp_path / "x.onnx", (x, given), precision="fp32")
    with torch.no_grad():
        want = model(x, given)
    (got,) = run(tmp_path / "x.onnx", x, given)
    assert not want[..., 1, :].any()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


ATTENTION = {
    "a row masked by the least number": lambda q, k, v, seen: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.zeros(2, 1, 3, 5).masked_fill(~seen, torch.finfo(q.dtype).min)
    ),
    "one mask for all queries": lambda q, k, v, seen: F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen[:, :, 2:]
    ),
    "one head of keys": lambda q, k, v, seen: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]),
    "groups of one head": lambda q, k, v, seen: F.scaled_dot_product_attention(
        q, k, v, enable_gqa=True
    ),
    "groups of two heads": lambda q, k, v, seen: F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True
    ),
    "a scale below zero": lambda q, k, v, seen: F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=-0.5
    ),
}


@pytest.mark.parametrize("opset", [18, 23])
def test_attention_is_torchs_at_every_opset(tmp_path, opset):
    # onnxruntime's Attention, of opset 23, refuses three of these, and has zeros for the first.
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, q, k, v, seen):
            return [attend(self.linear(q), k, v, seen) for attend in ATTENTION.values()]

    model = Attention().eval()
    q, k, v = torch.randn(2, 4, 3, 6), torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    seen = torch.rand(2, 1, 3, 5) > 0.4
    seen[0, 0, 0], seen[1, 0, 1], seen[:, 0, 2, 0] = False, False, True
    mpgraph.export_onnx(
        model, tmp_path / "x.onnx", (q, k, v, seen), precision="fp32", opset=opset, dynamic=False
    )
    with torch.no_grad():
        want = model(q, k, v, seen)
    for name, x, y in zip(ATTENTION, run(tmp_path / "x.onnx", q, k, v, seen), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_branches_are_lowered_too(tmp_path):
    # cdist has no translation of its own, and the other branch returns what it is given.
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.cond(
                x.sum() > 0,
                lambda y: y.sin() + torch.cdist(y, y).sum(),
                lambda y: y.clone(),
                (self.linear(x),),
            )

    model, x = Branches().eval(), torch.randn(3, 4).abs()
    mpgraph.export_onnx(model, tmp_path / "x.onnx", x, precision="fp32")
    for given in (x, -x):
        with torch.no_grad():
            want = model(given)
        (got,) = run(tmp_path / "x.onnx", given)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_convolution_in_three_dimensions_needs_no_bias(tmp_path):
    # torchlib's translation of it has a bias of another shape.
    model = nn.Conv3d(2, 3, 2, bias=False).eval()
    report = mpgraph.export_onnx(
        model, tmp_path / "x.onnx", torch.randn(2, 2, 4, 5, 6), precision="fp32"
    )
    assert report.check.error <= FP32


def test_a_refusal_of_a_row_names_the_node_and_the_line(tmp_path):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(65, 65)

        def forward(self, x):
            return torch.linalg.inv(self.linear(x))

    with pytest.raises(mpgraph.ExportError) as caught:
        mpgraph.export_onnx(Large(), tmp_path / "x.onnx", torch.randn(65, 65), precision="bf16")
    message = str(caught.value)
    assert message.startswith("a matrix of 65 by 65 cannot be factorised")
    assert "aten.linalg_inv_ex.default (%linalg_inv_ex)" in message
    assert "return torch.linalg.inv(self.linear(x))" in message
    assert "While executing" not in message


def test_batch_sizes_are_not_written_into_constants(tmp_path):
    _, _, _ = export(tmp_path, "cnn", "bf16")
    for batch in (1, 7):
        (got,) = run(tmp_path / "model.onnx", torch.randn(batch, 3, 16, 16))
        assert got.shape == (batch, 10)


def test_names_and_lines_lead_back_to_the_model(tmp_path):
    _, _, _ = export(tmp_path, "gpt", "bf16")
    model = loaded(tmp_path / "model.onnx")
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "blocks.0.mlp.0/MatMul" in names
    (product,) = [node for node in model.graph.node if node.name == "blocks.0.mlp.0/MatMul"]
    facts = {p.key: p.value for p in product.metadata_props}
    assert facts["mpgraph.module"] == "blocks.0.mlp.0"
    assert facts["mpgraph.line"].startswith("gpt.py:")
    assert facts["mpgraph.line"].endswith("return x + self.mlp(self.norm2(x))")
    assert "blocks.0.mlp.0.weight" in initializers(model)


def test_the_file_says_what_it_is(tmp_path):
    torch.manual_seed(0)
    policy = mpgraph.Policy().pin(module="3", run="fp32")
    path = tmp_path / "mlp.onnx"
    mpgraph.export_onnx(MLP(), path, torch.randn(2, 8), precision="bf16", policy=policy)
    model = loaded(path)
    facts = {p.key: p.value for p in model.metadata_props}
    assert facts["mpgraph.precision"] == "bf16"
    assert facts["mpgraph.policy"] == str(policy)
    assert facts["mpgraph.target"] == "cpu"
    assert facts["mpgraph.torch"] == torch.__version__
    assert model.producer_name == "mpgraph"
    assert "policy default" in model.graph.doc_string
    assert initializers(model)["3.weight"] == "FLOAT"


@pytest.mark.parametrize("target", ["cpu", "cuda", "portable", "web"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_only_standard_operators_and_what_the_target_runs(tmp_path, target, precision):
    name = "gpt" if (target, precision) == ("cuda", "bf16") else "mlp"
    _, _, report = export(tmp_path, name, precision, target=target, verify=False)
    model = loaded(tmp_path / "model.onnx")
    assert [entry.domain for entry in model.opset_import] == [""]
    assert len(model.functions) == 0
    assert report.opset == model.opset_import[0].version == (22 if target == "cuda" else 18)
    products = {kind for kind in half_operators(model) if kind in ("MatMul", "Gemm", "Add")}
    assert bool(products) == (target == "cuda")
    if target in ("portable", "web"):
        assert half_operators(model) <= {"Cast"}


def half_operators(model):
    """The kinds of the nodes that read or yield 16-bit values."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    low = {v.name for v in graph.value_info if v.type.tensor_type.elem_type in halves}
    low |= {i.name for i in graph.initializer if i.data_type in halves}
    return {n.op_type for n in graph.node if low & {*n.input, *n.output}}


@pytest.mark.parametrize(
    "opset",
    [n if n in (20, 23) else pytest.param(n, marks=pytest.mark.slow) for n in range(18, 24)],
)
def test_every_opset_loads_and_agrees(tmp_path, opset):
    _, _, report = export(tmp_path, "mlp", "bf16", opset=opset)
    assert report.check.identical
    assert loaded(tmp_path / "model.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("weights", ["16-bit", "fp32"])
def test_weights_are_stored_as_asked_and_compute_the_same(tmp_path, weights):
    _, inputs, report = export(tmp_path, "mlp", "bf16", weights=weights)
    stored = initializers(loaded(tmp_path / "model.onnx"))
    assert report.check.identical
    assert stored["0.weight"] == ("BFLOAT16" if weights == "16-bit" else "FLOAT")
    assert stored["2.weight"] == "FLOAT"  # LayerNorm runs in fp32
    assert run(tmp_path / "model.onnx", *inputs)[0].shape == (2, 4)


def test_pure_16_bit_parameters_stay_16_bit(tmp_path):
    _, _, report = export(tmp_path, "mlp", "bf16-true", weights="fp32")
    stored = initializers(loaded(tmp_path / "model.onnx"))
    assert report.check.identical
    assert set(stored.values()) == {"BFLOAT16"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_native_inputs_and_outputs_have_the_dtypes_of_the_graph(tmp_path, precision):
    model = mpgraph.convert(nn.Linear(4, 2), f"{precision}-true")
    x = torch.randn(3, 4).to(next(model.parameters()).dtype)
    path = tmp_path / "linear.onnx"
    native = mpgraph.export_onnx(model, path, x, io_dtype="native")
    assert native.inputs == (f"input: {precision}[batch, 4]",)
    # An fp16 model's results leave in fp32, converted or exported.
    leaves = "fp32" if precision == "fp16" else "bf16"
    assert native.outputs == (f"output: {leaves}[batch, 2]",)
    assert native.check.identical
    fp32 = mpgraph.export_onnx(model, path, x)
    assert fp32.inputs == ("input: fp32[batch, 4]",)
    assert fp32.outputs == ("output: fp32[batch, 2]",)
    web = mpgraph.export_onnx(model, path, x, io_dtype="native", target="web")
    assert web.inputs == ("input: fp32[batch, 4]",)


def test_names_come_from_the_signature_and_the_result(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, features, weights=None, *, offset):
            y = self.linear(features["x"]) * weights
            return {"logits": y + offset, "parts": (y, [features["z"]])}

    inputs = {
        "features": {"x": torch.randn(3, 4), "z": torch.randn(3, 1)},
        "weights": torch.randn(3, 2),
        "offset": torch.randn(3, 2),
    }
    report = mpgraph.export_onnx(Named(), tmp_path / "named.onnx", inputs, precision="bf16")
    assert [line.partition(":")[0] for line in report.inputs] == [
        "features_x", "features_z", "weights", "offset",
    ]  # fmt: skip
    assert [line.partition(":")[0] for line in report.outputs] == [
        "logits", "parts_0", "parts_1_0",
    ]  # fmt: skip
    assert report.check.identical


def test_dynamic_sizes_can_be_named_and_turned_off(tmp_path):
    path, x = tmp_path / "mlp.onnx", torch.randn(2, 8)
    fixed = mpgraph.export_onnx(MLP(), path, x, precision="bf16", dynamic=False)
    assert fixed.inputs == ("input: fp32[2, 8]",)
    named = mpgraph.export_onnx(
        MLP(), path, x, precision="bf16", dynamic={"input": {0: "requests"}}
    )
    assert named.inputs == ("input: fp32[requests, 8]",)
    assert named.outputs == ("output: fp32[requests, 4]",)
    with pytest.raises(mpgraph.ExportError, match="dynamic names 'y', but the inputs are 'input'"):
        mpgraph.export_onnx(MLP(), path, x, precision="bf16", dynamic={"y": {0: "n"}})


def test_a_size_that_the_model_fixes_is_noted(tmp_path):
    class Fixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) + torch.arange(len(x))[:, None]

    path = tmp_path / "x.onnx"
    report = mpgraph.export_onnx(Fixes(), path, torch.randn(3, 4), precision="bf16")
    assert report.notes[-1] == (
        "x: the size 3 of dimension 0 is fixed; the model computes with it as a number"
    )
    (x,) = onnx.load(path).graph.input
    assert x.type.tensor_type.shape.dim[0].dim_value == 3  # not one that is called "3"
    report = mpgraph.export_onnx(MLP(), path, torch.randn(1, 8), precision="bf16")
    assert "give an example with a larger one" in report.notes[-1]


def test_a_symbol_that_has_become_a_number_is_one_in_the_file():
    """As a name, "2" would take any size."""
    ir = pytest.importorskip("onnx_ir")
    x = ir.Value(name="x", shape=ir.Shape(["2", "s0", "2*s0", None, 3]))
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 18}), ir_version=10)
    name_axes(model, {"s0": "batch"})
    assert [getattr(n, "value", n) for n in x.shape] == [2, "batch", "2*batch", None, 3]
    name_axes(model, {})
    assert x.shape[0] == 2


def test_a_file_without_operators_is_a_file(tmp_path):
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.unread = nn.Linear(1, 1)

        def forward(self, x):
            return x.t()

    path, x = tmp_path / "x.onnx", torch.randn(3)
    mpgraph.export_onnx(Turns(), path, x, precision="bf16")
    assert torch.equal(run(path, x)[0], x)


def test_what_forward_writes_beside_its_result_is_noted(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x):
            self.total += x.sum(0)
            self.last = x
            return self.linear(x)

    model = mpgraph.convert(Counts().eval(), "bf16")
    report = mpgraph.export_onnx(model, tmp_path / "x.onnx", torch.randn(3, 4))
    assert report.notes == (
        "the file does not do what forward assigns to last",
        "the file does not do what forward writes to total",
    )
    assert report.check.identical
    assert model.total.tolist() == [0, 0, 0, 0]


def test_what_acts_on_gradients_alone_is_left_out(tmp_path):
    # Training keeps these through Dynamo; inference does not need them.
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = checkpoint(self.linear, x, use_reentrant=False)
            if y.requires_grad:
                y.register_hook(lambda grad: grad * 2)
            return Square.apply(y)

    model = mpgraph.convert(Hooked().eval(), "bf16")
    report = mpgraph.export_onnx(model, tmp_path / "x.onnx", torch.randn(3, 4))
    assert report.check.identical
    model(torch.randn(3, 4)).sum().backward()
    assert mpgraph.explain(model).graphs[0].engine == "dynamo"


def test_external_data_is_written_on_request_and_found_again(tmp_path):
    _, inputs, report = export(tmp_path, "mlp", "bf16", external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert report.file_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert run(tmp_path / "model.onnx", *inputs)[0].shape == (2, 4)


def test_large_weights_go_to_external_data_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("mpgraph.onnx.files.LARGEST_FILE", 100)
    export(tmp_path, "mlp", "bf16")
    assert (tmp_path / "model.onnx.data").exists()


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("earlier")
    monkeypatch.setattr(self_check, "difference", lambda found, wanted: 1.0)
    with pytest.raises(mpgraph.ExportError, match="computes something else"):
        export(tmp_path, "mlp", "bf16")
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_transposed_16_bit_batch_in_front_of_a_product_runs(tmp_path):
    # Were the transpose in 16 bit, onnxruntime 1.31 would crash while it optimizes the file.
    class Swaps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 12, bias=False)

        def forward(self, x):
            return self.second(self.first(x).transpose(0, 1))

    report = mpgraph.export_onnx(
        Swaps().eval(), tmp_path / "x.onnx", torch.randn(2, 7, 16), precision="bf16"
    )
    assert report.check.units <= UNITS


def test_a_crash_of_onnxruntime_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    crash = tmp_path / "crash.py"
    crash.write_text("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setattr("mpgraph.onnx.run_apart.__file__", str(crash))
    with pytest.raises(mpgraph.ExportError, match=r"onnxruntime crashes on the file \(signal 11\)"):
        export(tmp_path, "mlp", "bf16")
    assert list(tmp_path.iterdir()) == [crash]


def test_unknown_sizes_get_no_name(tmp_path):
    # "None" as a name would say that all unknown sizes are equal, and buffers be shared wrongly.
    class Finds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            pad = F.pad(self.linear(x), (1, 2), mode="circular")
            return F.pad(pad, (3, 1), mode="circular")

    report = mpgraph.export_onnx(
        Finds().eval(), tmp_path / "x.onnx", torch.randn(2, 3, 4), precision="bf16"
    )
    assert report.check.identical
    graph = loaded(tmp_path / "x.onnx").graph
    named = {d.dim_param for v in graph.value_info for d in v.type.tensor_type.shape.dim}
    assert "None" not in named


def test_a_model_in_training_mode_is_exported_in_eval_mode_and_stays_in_training(tmp_path):
    model = mpgraph.convert(ConvNet(), "bf16").train()
    model.layers[1].eval()  # frozen by its user
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="in training mode; the file holds its inference"):
        report = mpgraph.export_onnx(model, tmp_path / "cnn.onnx", torch.randn(2, 3, 16, 16))
    assert "the model was in training mode" in report.notes[0]
    assert report.check.units <= UNITS
    assert model.training
    assert not model.layers[1].training
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_results_may_be_inputs_or_the_same_twice(tmp_path):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            return x, y, y, None

    path, x = tmp_path / "same.onnx", torch.randn(2, 4)
    report = mpgraph.export_onnx(Same(), path, x, precision="bf16")
    assert [line.partition(":")[0] for line in report.outputs] == [
        "output_0", "output_1", "output_2",
    ]  # fmt: skip
    first, second, third = run(path, x)
    assert torch.equal(first, x)
    assert torch.equal(second, third)


def test_a_report_prints_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    report = mpgraph.export_onnx(MLP(), "mlp.onnx", torch.randn(2, 8), precision="bf16")
    lines = str(report).splitlines()
    assert lines[0] == "mlp.onnx · bf16 · for cpu, opset 18"
    assert lines[1].split() == ["takes", "input:", "fp32[batch,", "8]"]
    assert "casts" in lines[3]
    assert "gives the bits of the exported graph in torch" in lines[5]
    assert report.to_dict()["check"]["identical"] is True


# What is refused, each with its own words.


def test_a_model_that_is_not_converted_is_refused():
    with pytest.raises(mpgraph.MPGraphError, match="Convert it first"):
        mpgraph.export_onnx(MLP(), "x.onnx", torch.randn(2, 8))


def test_a_converted_part_of_a_model_is_named():
    model = nn.Sequential(mpgraph.convert(nn.Linear(4, 4), "bf16"), nn.ReLU())
    with pytest.raises(mpgraph.ExportError, match=r"only its part '0' is\. Export that part"):
        mpgraph.export_onnx(model, "x.onnx", torch.randn(2, 4))


def test_a_precision_for_a_converted_model_is_refused():
    with pytest.raises(mpgraph.ExportError, match="already converted"):
        mpgraph.export_onnx(
            mpgraph.convert(MLP(), "bf16"), "x.onnx", torch.randn(2, 8), precision="fp16"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tpu"}, "unknown target 'tpu'; use one of cpu, cuda, portable, web"),
        ({"opset": 17}, "opset must be a number from 18 to 23, found 17"),
        ({"opset": "20"}, "opset must be a number from 18 to 23, found '20'"),
        ({"io_dtype": "fp16"}, "io_dtype must be 'fp32' or 'native', found 'fp16'"),
        ({"weights": "8-bit"}, "weights must be '16-bit' or 'fp32', found '8-bit'"),
    ],
)
def test_an_unknown_option_is_refused(options, message):
    with pytest.raises(mpgraph.ExportError, match=message):
        mpgraph.export_onnx(MLP(), "x.onnx", torch.randn(2, 8), precision="bf16", **options)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(mpgraph.ExportError, match=r"the folder '.*missing' does not exist"):
        mpgraph.export_onnx(
            MLP(), tmp_path / "missing" / "x.onnx", torch.randn(2, 8), precision="bf16"
        )
    with pytest.raises(mpgraph.ExportError, match="is a folder; give the name of a file in it"):
        mpgraph.export_onnx(MLP(), tmp_path, torch.randn(2, 8), precision="bf16")


def test_without_the_extra_its_name_is_said(monkeypatch):
    plain = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "onnxscript":
            raise ModuleNotFoundError("No module named 'onnxscript'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", blocked)
    with pytest.raises(mpgraph.ExportError, match="mpgraph with its extra 'onnx'"):
        mpgraph.export_onnx(MLP(), "x.onnx", torch.randn(2, 8), precision="bf16")


def test_a_model_that_needs_dynamo_is_refused_with_the_reason_and_the_line(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(mpgraph.ExportError, match="cannot be one graph, and an ONNX file is one"):
        mpgraph.export_onnx(Branches(), tmp_path / "x.onnx", torch.randn(2, 4), precision="bf16")
    model = mpgraph.convert(MLP(), "bf16", capture="dynamo")
    with pytest.raises(mpgraph.ExportError, match="capture='dynamo', which splits it"):
        mpgraph.export_onnx(model, tmp_path / "x.onnx", torch.randn(2, 8))


class Untranslatable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.linalg.matrix_exp(self.linear(x))


def test_an_operator_without_translation_is_named_with_its_node_module_and_line(tmp_path):
    model = nn.Sequential(nn.Identity(), Untranslatable())
    with pytest.raises(mpgraph.ExportError) as caught:
        mpgraph.export_onnx(model, tmp_path / "x.onnx", torch.randn(4, 4), precision="bf16")
    message = str(caught.value)
    assert "aten.linalg_matrix_exp.default (%linalg_matrix_exp in module '1')" in message
    assert "test_export.py" in message
    assert "torch.linalg.matrix_exp(self.linear(x))" in message


def test_random_numbers_are_refused_with_their_line(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return F.dropout(self.linear(x), 0.5)

    with pytest.raises(mpgraph.ExportError, match=r"draws random numbers(.|\n)*F\.dropout"):
        mpgraph.export_onnx(Noisy(), tmp_path / "x.onnx", torch.randn(4, 4), precision="bf16")


@pytest.mark.parametrize("extra", [3, "text", 0.5])
def test_a_result_that_is_no_tensor_is_refused(tmp_path, extra):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return {"y": self.linear(x), "extra": extra}

    with pytest.raises(mpgraph.ExportError, match=f"returns {extra!r} as output 'extra'"):
        mpgraph.export_onnx(Returns(), tmp_path / "x.onnx", torch.randn(4, 4), precision="bf16")


def test_a_size_among_the_results_is_refused(tmp_path):
    class Size(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x), x.shape[0]

    with pytest.raises(mpgraph.ExportError, match="returns a size or a number"):
        mpgraph.export_onnx(Size(), tmp_path / "x.onnx", torch.randn(4, 4), precision="bf16")


# What fails today.


def test_an_autocast_model_through_torch_onnx_is_refused_by_onnxruntime(tmp_path):
    class Autocast(MLP):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    torch.manual_seed(0)
    x, path = torch.randn(2, 8), tmp_path / "autocast.onnx"
    torch.onnx.export(Autocast().eval(), (x,), str(path), dynamo=True, verbose=False)
    refused = why_refused(path)
    if not refused:
        pytest.skip("this onnxruntime runs what torch.onnx makes of an autocast region")
    assert "LayerNormalization" in refused or "NOT_IMPLEMENTED" in refused


def why_refused(path):
    try:
        session(path)
    except Exception as error:
        return str(error)
    return ""


def test_the_same_model_through_mpgraph_runs_to_the_bit(tmp_path):
    _, inputs, report = export(tmp_path, "mlp", "bf16")
    assert report.check.identical
    assert run(tmp_path / "model.onnx", *inputs)[0].dtype is torch.float32


@pytest.mark.slow
def test_a_recurrent_net_keeps_its_onnx_operator(tmp_path):
    report = mpgraph.export_onnx(
        Recurrent().eval(), tmp_path / "lstm.onnx", torch.randint(0, 50, (2, 7)), precision="fp32"
    )
    assert report.check.error <= FP32
    assert operators(loaded(tmp_path / "lstm.onnx")).count("LSTM") == 2
