"""legalize: what a runtime lacks in 16 bit runs in fp32 between casts, to the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mpgraph.errors import ExportError
from mpgraph.graph_text import text
from mpgraph.onnx.targets import TargetContext, target_of
from mpgraph.passes.legalize import legalize
from mpgraph.pipeline import run_passes
from mpgraph.policy import Policy
from tests.passes.graphs import assert_exact, aten, bf16, f16, f32, special


def functional(function, *inputs):
    """``function`` as the functional ATen graph that is exported."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        return make_fx(function)(*map(mode.from_tensor, inputs))


def legalized(function, *inputs, target="cpu", opset=None, edits=None):
    """The graph before and after, of which the latter runs on the target."""
    gm = functional(function, *inputs)
    context = TargetContext(Policy(), bf16, target=target_of(target, opset))
    before = [value.clone() for value in run(gm, *inputs)]
    (report,) = run_passes(gm, [legalize], context)
    assert edits is None or report.edits == edits
    assert all(context.target.takes(node) for node in gm.graph.nodes)
    return gm, before


def run(gm, *inputs):
    with torch.no_grad():
        results = gm(*inputs)
    return results if isinstance(results, (list, tuple)) else [results]


def assert_same(gm, before, *inputs):
    for got, want in zip(run(gm, *inputs), before, strict=True):
        assert_exact(got, want)


def test_a_product_runs_in_fp32_between_casts_and_rounds_as_before():
    x, y = special(4, 8, dtype=bf16), special(4, 8, dtype=bf16)
    gm, before = legalized(lambda x, y: x * y, x, y, edits=1)
    assert text(gm) == "\n".join(
        [
            "%x_1: bf16[4, 8] = input",
            "%y_1: bf16[4, 8] = input",
            "%y_1_fp32: fp32[4, 8] = _to_copy(%y_1, dtype=fp32)",
            "%x_1_fp32: fp32[4, 8] = _to_copy(%x_1, dtype=fp32)",
            "%mul: fp32[4, 8] = mul.Tensor(%x_1_fp32, %y_1_fp32)",
            "%mul_bf16: bf16[4, 8] = _to_copy(%mul, dtype=bf16)",
            "return %mul_bf16",
        ]
    )
    assert_same(gm, before, x, y)


def test_every_fp16_number_overflows_and_rounds_as_in_fp16():
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(f16)
    gm, before = legalized(lambda x: x * 3e4 * 3e-4 + x, x, edits=3)
    assert before[0].isinf().sum() > 2  # the chain overflows inside, and would not in fp32
    assert_same(gm, before, x)


def test_views_and_cat_stay_in_16_bit():
    x = special(4, 8, dtype=f16)
    gm, _ = legalized(lambda x: torch.cat([x.view(8, 4), x[:, 4:]]).unsqueeze(0), x, edits=0)
    assert "fp32" not in text(gm)


def test_a_value_is_cast_up_once_for_all_that_read_it():
    x = special(4, 8, dtype=bf16)
    gm, before = legalized(lambda x: x.sigmoid() + x.tanh() * x, x, edits=4)
    assert text(gm).count("_to_copy(%x_1,") == 1
    assert_same(gm, before, x)


def test_after_an_exact_operator_its_fp32_result_is_read():
    x = special(4, 8, dtype=bf16)
    gm, before = legalized(lambda x: x.relu().sigmoid(), x, edits=2)
    assert text(gm).count("dtype=bf16") == 1
    assert_same(gm, before, x)


def test_adding_a_number_is_not_exact():
    x = special(4, 8, dtype=bf16)
    gm, before = legalized(lambda x: (x + 0.1).sigmoid(), x, edits=2)
    assert text(gm).count("dtype=bf16") == 2
    assert_same(gm, before, x)


MANY = {
    "several results": lambda x: x.max(-1),
    "a list of results": lambda x: [t * 2 for t in x.split(2)],
    "a list of inputs": lambda x: torch.stack([x.exp(), x]),
    "a dtype argument": lambda x: x.float().sum(0, dtype=x.dtype),
    "a sum in fp32": lambda x: x.sum(0, dtype=f32),
    "factories": lambda x: (torch.zeros_like(x), torch.full((3,), 0.1, dtype=x.dtype)),
    "a comparison": lambda x: (x > 0.1, x == x),
    "an integer": lambda x: x.to(torch.int64),
    "the largest number of the dtype": lambda x: torch.nan_to_num(x),
    "the smallest number chosen": lambda x: torch.nan_to_num(x, 0.0, None, -2.0),
    "softmax to fp32": lambda x: aten._softmax(x.float(), -1, False),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "padding": lambda x: F.pad(x, (1, 2), value=float("-inf")),
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_the_graph_yields_the_same_bits_with(name, dtype, target):
    x = special(4, 8, dtype=dtype)
    gm, before = legalized(MANY[name], x, target=target)
    assert_same(gm, before, x)


def test_softmax_from_16_bit_to_fp32_takes_fp32():
    def half_softmax(x):
        return aten._softmax.default(x, -1, True)

    with FakeTensorMode() as mode:
        x = torch.empty(4, 8, dtype=bf16, device="cuda")
        gm = make_fx(half_softmax)(x)
    assert mode is not None
    run_passes(gm, [legalize], TargetContext(Policy(), bf16, target=target_of("cpu")))
    assert "fp32[4, 8] = _softmax(%x_1_fp32, -1, False)" in text(gm)


def test_one_rounding_for_what_becomes_several_onnx_operators():
    x = special(64, 64, dtype=bf16)
    gm, before = legalized(lambda x: F.silu(x), x, target="cuda", edits=1)
    assert_same(gm, before, x)


def test_the_cuda_target_multiplies_matrices_in_16_bit():
    x = special(4, 4, dtype=bf16)
    gm, _ = legalized(lambda x: (x @ x).relu() + x, x, target="cuda", edits=0)
    assert "fp32" not in text(gm)


def test_the_cuda_target_keeps_numbers_that_16_bit_would_round():
    x = special(4, 4, dtype=bf16)
    legalized(lambda x: x * 0.5, x, target="cuda", edits=0)
    legalized(lambda x: x * 0.1, x, target="cuda", edits=1)


@pytest.mark.parametrize(("opset", "edits"), [(21, 1), (22, 0)])
def test_a_bf16_convolution_on_cuda_needs_opset_22(opset, edits):
    x, w = torch.randn(1, 2, 8, 8).to(bf16), torch.randn(3, 2, 3, 3).to(bf16)
    legalized(lambda x, w: F.conv2d(x, w), x, w, target="cuda", opset=opset, edits=edits)


def test_what_reads_the_bits_of_a_number_is_refused_with_its_name():
    x = special(4, dtype=bf16)
    with pytest.raises(ExportError, match=r"%view.*reads the bits.*Pin its module to fp32"):
        legalized(lambda x: x.view(torch.int16), x)


def test_gradients_of_a_step_are_legalized_too():
    def step(x, w):
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            loss = F.silu(x @ w).sum(dtype=f32)
            return torch.autograd.grad(loss, w)

    x, w = torch.randn(4, 8).to(f16), torch.randn(8, 2).to(f16)
    gm, before = legalized(step, x, w)
    for got, want in zip(run(gm, x, w), before, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-10, atol=2**-10)


def test_exhaustion_of_pairs_of_special_numbers():
    numbers = (0.0, -0.0, 1 / 3, 6e4, 6e-8, float("inf"))
    x, y = torch.tensor(list(itertools.product(numbers, repeat=2))).t().to(f16)
    gm, before = legalized(lambda x, y: (x + y, x - y, x * y, x / y), x, y)
    assert_same(gm, before, x, y)
