"""The scaled casts: exact forward and backward, to any order, in every tracer."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mpgraph import ops

f16, f32, f64 = torch.float16, torch.float32, torch.float64
inf, nan = float("inf"), float("nan")
OPERATORS = (ops.LOWER, ops.WIDEN, ops.UNSCALE, ops.SCALE)
SCALES = (2.0**-14, 1.0, 2.0**16, 2.0**24)


def every_half() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(f16)


def wide_values() -> torch.Tensor:
    values = torch.tensor([0.0, -0.0, inf, -inf, nan, 65504.0, 65520.0, 6e-8, 1e-30, -3e38])
    return torch.cat([values, torch.randn(500) * torch.logspace(-20, 20, 500)])


def assert_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit() & ~want.isnan(), want.signbit() & ~want.isnan())


def gradient(operator, x, dtype, scale, g):
    x = x.detach().requires_grad_()
    y = operator(x, dtype, scale)
    return y, torch.autograd.grad(y, x, g)[0]


@pytest.mark.parametrize("scale", SCALES)
def test_lower_rounds_and_its_gradient_is_divided(scale):
    x, g, s = torch.randn(2**16), every_half(), torch.tensor(scale)
    y, dx = gradient(ops.LOWER, x, f16, s, g)
    assert_bits(y, x.half())
    assert_bits(dx, g.float() / scale)


@pytest.mark.parametrize("scale", SCALES)
def test_widen_is_exact_and_its_gradient_is_multiplied(scale):
    g, s = wide_values(), torch.tensor(scale)
    x = every_half()[: len(g)]
    y, dx = gradient(ops.WIDEN, x, f32, s, g)
    assert_bits(y, x.float())
    assert_bits(dx, (g * scale).half())


def test_a_small_gradient_survives_in_between():
    s = torch.tensor(2.0**16)
    x = torch.ones(1, requires_grad=True)
    y = ops.WIDEN(ops.LOWER(x, f16, s) * 1, f32, s)
    (g,) = torch.autograd.grad(y, x, torch.tensor([2.0**-35]))
    assert g.item() == 2.0**-35


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_shapes_and_strides_are_kept(operator, shape):
    source, target = (f32, f16) if operator in (ops.LOWER, ops.SCALE) else (f16, f32)
    x = torch.ones(shape, dtype=source)
    assert operator(x, target, torch.tensor(4.0)).shape == x.shape
    if x.dim() == 2:
        assert operator(x.t(), target, torch.tensor(4.0)).stride() == x.t().stride()


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_with_its_own_dtype_it_copies(operator):
    x = torch.tensor([1.0, 2.0**-20], dtype=f16)
    y = operator(x, f16, torch.tensor(1.0))
    assert_bits(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_dividing_half_by_more_than_a_half_can_hold_is_right():
    x = torch.tensor([1024.0], dtype=f16)
    assert ops.UNSCALE(x, f16, torch.tensor(2.0**17)).item() == 2.0**-7
    assert ops.UNSCALE(x[0], f32, torch.tensor(2.0**17)).item() == 2.0**-7


def test_a_backward_pass_leaves_by_the_scale_it_entered_with():
    s = torch.tensor(8.0)
    x = torch.ones(2, requires_grad=True)
    y = ops.WIDEN(ops.LOWER(x, f16, s), f32, s)
    s = torch.tensor(16.0)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_a_copy_serves_several_backward_passes():
    s = torch.tensor(8.0)
    w = torch.ones(2, requires_grad=True)
    copy = ops.LOWER(w, f16, s)
    for _ in range(3):
        ops.WIDEN(copy * 2, f32, s).sum().backward()
    assert w.grad.tolist() == [6.0, 6.0]


def test_a_scale_changed_in_place_is_refused():
    s = torch.tensor(8.0)
    x = torch.ones(2, requires_grad=True)
    y = ops.LOWER(x, f16, s)
    s.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified in place.*Replace it"):
        y.sum().backward()


def block(x, w, s):
    """An fp16 region with an fp32 island, between two fp32 ends."""
    h = ops.LOWER(x, f16, s) @ ops.LOWER(w, f16, s)
    h = torch.tanh(ops.WIDEN(h, f32, s))
    return ops.WIDEN(ops.LOWER(h, f16, s) @ ops.LOWER(w, f16, s), f32, s)


def nested_gradient(function, x, w, order):
    value = function(x, w).square().mean()
    for _ in range(order):
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        value = g.square().mean() * 50
    return torch.autograd.grad(value, (x, w))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_gradients_of_gradients_are_true(order, scale):
    x, w = (torch.randn(4, 4) * 0.5 for _ in range(2))
    s = torch.tensor(scale)
    got = nested_gradient(lambda x, w: block(x, w, s), *_leaves(x, w), order)
    want = nested_gradient(
        lambda x, w: torch.tanh(x @ w) @ w, *_leaves(x.double(), w.double()), order
    )
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() < 0.02 * other.abs().max()


def _leaves(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


def penalty_gradient(function, x, w):
    (g,) = torch.autograd.grad(function(x, w).square().sum() * 2.0**-25, x, create_graph=True)
    return torch.autograd.grad(g.square().sum() * 2.0**25, w)[0]


def test_a_penalty_on_gradients_too_small_for_fp16_is_true():
    s = torch.tensor(2.0**16)
    x, w = torch.full((2, 2), 0.5), torch.full((2, 2), 0.25)
    got = penalty_gradient(
        lambda x, w: ops.WIDEN(ops.LOWER(x, f16, s) @ ops.LOWER(w, f16, s), f32, s), *_leaves(x, w)
    )
    want = penalty_gradient(torch.matmul, *_leaves(x.double(), w.double()))
    assert want.abs().max() < 2.0**-22  # in fp16, not much would be left of it
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_torch_finds_nothing_wrong_with_the_operator(operator):
    source, target = (f32, f16) if operator in (ops.LOWER, ops.SCALE) else (f16, f32)
    x = torch.randn(3, 4).to(source).requires_grad_()
    torch.library.opcheck(operator, (x, target, torch.tensor(4.0)))


def reference():
    x, w = _leaves(torch.randn(3, 3), torch.randn(3, 3))
    s = torch.tensor(16.0)
    y = block(x, w, s)
    return x, w, s, y, torch.autograd.grad(y.sum(), (x, w))


def test_compiles_without_a_graph_break():
    x, w, s, want, grads = reference()
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(x, w, s)
    assert torch.equal(got, want)
    for one, other in zip(torch.autograd.grad(got.sum(), (x, w)), grads, strict=True):
        assert torch.equal(one, other)


def test_the_direct_functions_compile_too():
    s = torch.tensor(4.0)
    x = torch.randn(3, requires_grad=True)

    def f(x):
        return ops.widen(ops.lower(x, f16, s), f32, s)

    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, f(x))


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_traces_as_one_node_per_cast(pre_dispatch):
    x, w, s, want, _ = reference()
    gm = make_fx(block, pre_dispatch=pre_dispatch)(x, w, s)
    found = [n.target for n in gm.graph.nodes if n.target in OPERATORS]
    assert found == [ops.LOWER, ops.LOWER, ops.WIDEN, ops.LOWER, ops.LOWER, ops.WIDEN]
    assert torch.equal(gm(x, w, s), want)


def test_traces_with_its_backward_pass():
    def both(x, w, s):
        return torch.autograd.grad(block(x, w, s).sum(), (x, w))

    x, w, s, _, grads = reference()
    gm = make_fx(both, tracing_mode="fake")(x, w, s)
    found = [n.target for n in gm.graph.nodes if n.target in (ops.SCALE, ops.UNSCALE)]
    assert found.count(ops.SCALE) == 2
    assert found.count(ops.UNSCALE) == 4
    for one, other in zip(gm(x, w, s), grads, strict=True):
        assert torch.equal(one, other)


def test_function_transforms_see_through_it():
    x, w, s, _, (want, _) = reference()
    got = torch.func.grad(lambda v: block(v, w, s).sum())(x.detach())
    assert torch.equal(got, want)
    rows = torch.func.vmap(torch.func.grad(lambda v: block(v[None], w, s).sum()))(x.detach())
    torch.testing.assert_close(rows, want, rtol=1e-2, atol=1e-2)


def test_without_gradients_nothing_is_recorded():
    s = torch.tensor(4.0)
    assert not ops.LOWER(torch.ones(2), f16, s).requires_grad
    with torch.no_grad():
        assert not ops.LOWER(torch.ones(2, requires_grad=True), f16, s).requires_grad
    with torch.inference_mode():
        assert ops.LOWER(torch.ones(2), f16, s).dtype is f16


# --- Sparse gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("target", [f16, f32])
@pytest.mark.parametrize("whole", [True, False])
def test_of_a_sparse_tensor_the_values_are_cast(operator, target, whole):
    indices = torch.tensor([[1, 3]] if whole else [[1, 1]])
    values = torch.tensor([[0.5, -3.0], [2.0, 1.0]], dtype=f16)
    x = torch.sparse_coo_tensor(indices, values, (5, 2), is_coalesced=whole, check_invariants=True)
    scale = torch.tensor(2.0**17)
    y = operator(x, target, scale)
    assert y.is_coalesced() == whole
    assert torch.equal(y._indices(), indices)
    assert_bits(y._values(), operator(values, target, scale))


def look_up(table, index, s):
    rows = torch.nn.functional.embedding(index, ops.LOWER(table, f16, s), sparse=True)
    return ops.WIDEN(rows.sin(), f32, s).sum()


@pytest.mark.parametrize("dtype", [f16, f32])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_embedding_may_have_sparse_gradients(compiled, dtype):
    torch.manual_seed(0)
    table = torch.randn(5, 4).to(dtype).requires_grad_()
    index, s = torch.tensor([1, 3, 1]), torch.tensor(2.0**10)
    run = torch.compile(look_up, fullgraph=True, backend="aot_eager") if compiled else look_up
    run(table, index, s).backward()
    assert table.grad.is_sparse
    assert table.grad.dtype is dtype
    exact = table.detach().double().requires_grad_()
    exact[index].sin().sum().backward()
    torch.testing.assert_close(table.grad.to_dense().double(), exact.grad, rtol=1e-2, atol=1e-2)
