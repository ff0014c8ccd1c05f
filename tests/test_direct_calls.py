from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import mpgraph
from mpgraph.direct_calls import FUNCTIONS, METHODS, directly

aten = torch.ops.aten
M, W, V = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)
MASK, IDS = torch.rand(4, 4) > 0.5, torch.randint(0, 4, (2, 3))
PICTURE, CUBE, ROW = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 3, 3, 3), torch.randn(2, 4, 6)
HEADS = torch.randn(2, 2, 3, 4)

# Arguments in every form in which graphs hold them. A row without samples fails with a KeyError.
SAMPLES: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    aten.add.Tensor: [((M, W), {}), ((M, 1), {}), ((M, 1.5), {}), ((M, W), {"alpha": 2})],
    aten.sub.Tensor: [((M, W), {}), ((M, 1), {}), ((M, W), {"alpha": 2})],
    aten.mul.Tensor: [((M, W), {}), ((M, 2), {}), ((M, 0.5), {})],
    aten.div.Tensor: [((M, W), {}), ((M, 2), {}), ((M, 0.5), {})],
    aten.neg.default: [((M,), {})],
    aten.pow.Tensor_Scalar: [((M, 2), {}), ((M, 0.5), {})],
    aten.gelu.default: [((M,), {}), ((M,), {"approximate": "tanh"})],
    aten.hardtanh_.default: [((M, 0.0, 6.0), {})],
    aten.dropout.default: [((M, 0.1, True), {}), ((M, 0.1, False), {})],
    aten.linear.default: [((M, W), {}), ((M, W, V), {}), ((M, W, None), {})],
    aten.matmul.default: [((M, W), {})],
    aten.mm.default: [((M, W), {})],
    aten.bmm.default: [((ROW, ROW.mT), {})],
    aten.addmm.default: [((V, M, W), {}), ((V, M, W), {"beta": 0})],
    aten.conv1d.default: [
        ((ROW, torch.randn(5, 4, 3)), {}),
        ((ROW, torch.randn(5, 4, 3), None, [1], [1]), {}),
    ],
    aten.conv2d.default: [
        ((PICTURE, torch.randn(5, 4, 3, 3)), {}),
        ((PICTURE, torch.randn(4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4), {}),
        ((PICTURE, torch.randn(5, 4, 3, 3), torch.randn(5), [2, 2], [1, 1]), {}),
    ],
    aten.conv3d.default: [((CUBE, torch.randn(5, 4, 3, 3, 3)), {})],
    aten.scaled_dot_product_attention.default: [
        ((HEADS, HEADS, HEADS), {}),
        ((HEADS, HEADS, HEADS, torch.zeros(3, 3)), {"scale": 0.5}),
        ((HEADS, HEADS, HEADS, None, 0.0, True), {"scale": 0.5}),
        ((HEADS, HEADS, HEADS), {"enable_gqa": True, "scale": None}),
    ],
    aten.embedding.default: [((M, IDS), {}), ((M, IDS, 0), {}), ((M, IDS, 0, False), {})],
    aten.batch_norm.default: [
        ((PICTURE, V, V, torch.zeros(4), torch.ones(4), True, 0.1, 1e-5, True), {}),
        ((PICTURE, None, None, None, None, True, 0.1, 1e-5, True), {}),
    ],
    aten.layer_norm.default: [
        ((M, [4], V, V, 1e-5, True), {}),
        ((M, [4]), {}),
        ((M, [4], None, None, 1e-5), {}),
    ],
    aten.group_norm.default: [((PICTURE, 2, V, V, 1e-5, True), {}), ((PICTURE, 2), {})],
    aten.rms_norm.default: [((M, [4], V), {}), ((M, [4], V, 1e-6), {}), ((M, [4]), {})],
    aten.softmax.int: [((M, -1), {}), ((M, 1, torch.float32), {})],
    aten.log_softmax.int: [((M, -1), {}), ((M, 1, torch.float32), {})],
    aten.mean.dim: [((M, [1]), {}), ((M, [-1], True), {}), ((M, [0, 1]), {"dtype": torch.float32})],
    aten.sum.dim_IntList: [((M, [1]), {}), ((M, [-1], True), {}), ((M, [0, 1]), {})],
    aten.adaptive_avg_pool2d.default: [((PICTURE, [1, 1]), {})],
    aten.avg_pool2d.default: [
        ((PICTURE, [2, 2], [2, 2], [0, 0], False, True), {}),
        ((PICTURE, [2, 2]), {}),
    ],
    aten.max_pool2d.default: [
        ((PICTURE, [2, 2], [2, 2], [1, 1]), {}),
        ((PICTURE, [2, 2], [2, 2]), {}),
    ],
    aten.cat.default: [(([M, W],), {}), (([M, W], 1), {})],
    aten.stack.default: [(([M, W],), {}), (([M, W], 1), {})],
    aten.where.self: [((MASK, M, W), {})],
    aten.to.dtype: [
        ((M, torch.bfloat16), {}),
        ((M, torch.float64), {}),
        ((M, torch.bfloat16, False, True), {}),
    ],
    aten.view.default: [((M, [2, 8]), {}), ((M, [-1]), {})],
    aten.reshape.default: [((M.T, [2, 8]), {}), ((M, [-1]), {})],
    aten.reshape_as.default: [((M, ROW[0, :2].new_zeros(2, 8)), {})],
    aten.transpose.int: [((M, 0, 1), {}), ((M, -1, -2), {})],
    aten.permute.default: [((PICTURE, [0, 2, 3, 1]), {})],
    aten.expand.default: [((V, [3, 4]), {}), ((V, [3, -1]), {})],
    aten.expand_as.default: [((V, M), {})],
    aten.unsqueeze.default: [((M, 0), {}), ((M, -1), {})],
    aten.squeeze.dim: [((M[:, None], 1), {})],
    aten.flatten.using_ints: [((PICTURE, 1), {}), ((PICTURE, 2, 3), {}), ((PICTURE,), {})],
    aten.contiguous.default: [
        ((M.T,), {}),
        ((PICTURE,), {"memory_format": torch.channels_last}),
    ],
    aten.select.int: [((M, 0, 1), {}), ((M, 1, -1), {})],
    aten.unbind.int: [((M,), {}), ((M, 1), {})],
    aten.chunk.default: [((M, 2, 1), {}), ((M, 2), {})],
    aten.masked_fill.Scalar: [((M, MASK, 0), {}), ((M, MASK, float("-inf")), {})],
    aten.add_.Tensor: [((M, W), {}), ((M, 1), {}), ((M, W), {"alpha": 2})],
    aten.mul_.Tensor: [((M, W), {}), ((M, 2), {})],
    aten.copy_.default: [((M, W), {})],
    aten.sym_size.int: [((M, 0), {})],
    **{
        op: [((torch.rand(4) + 0.5,), {})]
        for op in (
            aten.rsqrt.default, aten.sqrt.default, aten.exp.default, aten.log.default,
            aten.abs.default, aten.cos.default, aten.sin.default, aten.tanh.default,
            aten.sigmoid.default, aten.relu.default, aten.relu_.default, aten.silu.default,
            aten.silu_.default, aten.hardswish.default, aten.sigmoid_.default,
        )
    },
}  # fmt: skip
ROWS = [
    pytest.param(op, *sample, id=f"{op}-{index}")
    for op in (*FUNCTIONS, *METHODS)
    for index, sample in enumerate(SAMPLES[op])
]


def call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if op in FUNCTIONS:
        return FUNCTIONS[op](*args, **kwargs)
    return getattr(args[0], METHODS[op])(*args[1:], **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), ROWS)
def test_the_direct_call_reaches_the_same_overload(op, args, kwargs):
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return call(op, *pytree.tree_unflatten(filled, spec))

    if op is aten.sym_size.int:  # leaves no node behind where sizes are numbers
        assert run(*args[:1]) == op(*args)
        return
    gm = make_fx(run, pre_dispatch=True)(*[leaves[i].clone() for i in places])
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function" and "getitem" not in n.name]
    assert node.target is op
    torch.manual_seed(0)
    want = op(*_fresh(args), **kwargs)
    torch.manual_seed(0)
    got = call(op, _fresh(args), kwargs)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def _fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    cloned: tuple[Any, ...] = pytree.tree_map_only(torch.Tensor, torch.clone, args)
    return cloned


def test_a_converted_model_runs_direct_calls_and_shows_aten_operators():
    model = mpgraph.convert(torch.nn.Linear(4, 4), "bf16", example_inputs=(M,))
    (entry,) = model._mpgraph.specialisations()
    assert "torch._C._nn.linear" in entry.run.__self__.code
    assert any(n.target is aten.linear.default for n in entry.graph_module.graph.nodes)


def test_a_cast_with_a_memory_format_runs():
    class Packs(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float64, memory_format=torch.channels_last)

    got = mpgraph.convert(torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1), Packs()), "bf16")(PICTURE)
    assert got.dtype is torch.float64
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_names_of_nodes_stay():
    gm = make_fx(lambda x: torch.relu(x) + 1, pre_dispatch=True)(M)
    names = [node.name for node in gm.graph.nodes]
    copy = directly(gm).__self__
    assert [node.name for node in copy.graph.nodes] == names
