"""What the tests of passes for scaled gradients share."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mpgraph import ops

from .graphs import context_of, f16, f32

LOWER, WIDEN = "mpgraph.lower.default", "mpgraph.widen.default"


def context(**options):
    return context_of(compute=f16, scaled=True, **options)


def numbers(*shape, dtype=f32):
    """Small multiples of 1/8: sums and products of a few are exact in fp16, scaled or not."""
    return (torch.randint(-8, 9, shape) / 8).to(dtype)


def leaf(*shape, dtype=f32):
    return numbers(*shape, dtype=dtype).requires_grad_()


def weight(*shape, dtype=f32):
    return nn.Parameter(numbers(*shape, dtype=dtype))


def run(gm, inputs, scale):
    """Results and gradients of a rewritten graph, whose caller minds scaled inputs."""
    scale = torch.tensor(scale)
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    values = []
    for node in gm.graph.find_nodes(op="placeholder"):
        slot = node.meta["slot"]
        value = scale if slot.kind == "scale" else leaves[slot.index]
        if slot.kind != "scale" and value.requires_grad and value.is_leaf:
            value = ops.enter(value, scale) if slot.scaled else value.view_as(value)
        values.append(value)
    outputs = pytree.tree_leaves(gm(*values))
    return outputs, _gradients(outputs, leaves)


def _gradients(outputs, leaves):
    torch.manual_seed(2)
    yielding = [y for y in outputs if isinstance(y, torch.Tensor) and y.requires_grad]
    cotangents = [numbers(*y.shape).to(y.dtype) for y in yielding]
    wanted = [x for x in leaves if x.requires_grad]
    if not yielding or not wanted:
        return ()
    return torch.autograd.grad(yielding, wanted, cotangents, allow_unused=True)
