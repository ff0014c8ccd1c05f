"""The same operators, called the way eager code calls them.

``torch.ops.aten.add.Tensor(a, b)`` finds its kernel through a schema in Python and takes one to
two microseconds longer than ``torch.add(a, b)``, which ends in the same dispatcher entry. In a
step that is bound by launching kernels this is several per cent. So a graph that is run in eager
mode is run as a copy of itself with these calls exchanged; what is read, printed and checked is
the graph of ATen operators.

Scaled casts (:mod:`mpgraph.ops`) are exchanged in the same way.

A row names an operator and the function whose argument parser picks just that overload for the
arguments that a graph holds; the test traces each one and compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mpgraph.ops import DIRECT

_aten = torch.ops.aten
_nn = torch._C._nn

FUNCTIONS: dict[OpOverload, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.sub.Tensor: torch.sub,
    _aten.mul.Tensor: torch.mul,
    _aten.div.Tensor: torch.div,
    _aten.neg.default: torch.neg,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.rsqrt.default: torch.rsqrt,
    _aten.sqrt.default: torch.sqrt,
    _aten.exp.default: torch.exp,
    _aten.log.default: torch.log,
    _aten.abs.default: torch.abs,
    _aten.cos.default: torch.cos,
    _aten.sin.default: torch.sin,
    _aten.tanh.default: torch.tanh,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.relu.default: torch.relu,
    _aten.relu_.default: torch.relu_,
    _aten.gelu.default: _nn.gelu,
    _aten.silu.default: _nn.silu,
    _aten.silu_.default: _nn.silu_,
    _aten.hardswish.default: _nn.hardswish,
    _aten.hardtanh_.default: _nn.hardtanh_,
    _aten.dropout.default: torch.dropout,
    _aten.linear.default: _nn.linear,
    _aten.matmul.default: torch.matmul,
    _aten.mm.default: torch.mm,
    _aten.bmm.default: torch.bmm,
    _aten.addmm.default: torch.addmm,
    _aten.conv1d.default: torch.conv1d,
    _aten.conv2d.default: torch.conv2d,
    _aten.conv3d.default: torch.conv3d,
    _aten.scaled_dot_product_attention.default: _nn.scaled_dot_product_attention,
    _aten.embedding.default: torch.embedding,
    _aten.batch_norm.default: torch.batch_norm,
    _aten.layer_norm.default: torch.layer_norm,
    _aten.group_norm.default: torch.group_norm,
    _aten.rms_norm.default: torch.rms_norm,
    _aten.softmax.int: torch.softmax,
    _aten.log_softmax.int: torch.log_softmax,
    _aten.mean.dim: torch.mean,
    _aten.sum.dim_IntList: torch.sum,
    _aten.adaptive_avg_pool2d.default: _nn.adaptive_avg_pool2d,
    _aten.avg_pool2d.default: _nn.avg_pool2d,
    _aten.max_pool2d.default: torch.max_pool2d,
    _aten.cat.default: torch.cat,
    _aten.stack.default: torch.stack,
    _aten.where.self: torch.where,
}

METHODS: dict[OpOverload, str] = {
    _aten.to.dtype: "to",
    _aten.view.default: "view",
    _aten.reshape.default: "reshape",
    _aten.reshape_as.default: "reshape_as",
    _aten.transpose.int: "transpose",
    _aten.permute.default: "permute",
    _aten.expand.default: "expand",
    _aten.expand_as.default: "expand_as",
    _aten.unsqueeze.default: "unsqueeze",
    _aten.squeeze.dim: "squeeze",
    _aten.flatten.using_ints: "flatten",
    _aten.contiguous.default: "contiguous",
    _aten.select.int: "select",
    _aten.unbind.int: "unbind",
    _aten.chunk.default: "chunk",
    _aten.masked_fill.Scalar: "masked_fill",
    _aten.add_.Tensor: "add_",
    _aten.mul_.Tensor: "mul_",
    _aten.sigmoid_.default: "sigmoid_",
    _aten.copy_.default: "copy_",
    _aten.sym_size.int: "size",
}


def directly(gm: fx.GraphModule) -> Callable[..., Any]:
    """A function that runs the graph of ``gm`` as it is now, with direct calls."""
    calls = {**FUNCTIONS, **DIRECT}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in calls:
            node.target = calls[node.target]
        elif node.target in METHODS and _is_for_a_method(node):
            node.op, node.target = "call_method", METHODS[node.target]
    run: Callable[..., Any] = fx.GraphModule(gm, graph).forward
    return run


def _is_for_a_method(node: fx.Node) -> bool:
    """Whether the method takes the arguments as they are: ``Tensor.to`` names its memory format."""
    is_positional = node.target is not _aten.to.dtype or len(node.args) < 5
    return isinstance(node.args[0], fx.Node) and is_positional
