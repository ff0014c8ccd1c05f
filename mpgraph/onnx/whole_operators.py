"""What is traced otherwise for export than torch would trace it.

torch takes some operators apart above autograd, in Python: into more operators than a row of
``lowering`` needs, each of which would be rounded in 16 bit, or into something else: they stay
whole. Others torch cannot trace, or their backward depends on what a graph does not say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from mpgraph.onnx.composites import RESIZED
from mpgraph.onnx.lowering.linear_algebra import determinant, log_determinant
from mpgraph.python_kernels import PythonKernels

aten = torch.ops.aten

# Operators whose Python decompositions are set aside, and why.
_WHOLE: dict[Any, str] = {
    aten.upsample_nearest1d.default: "one Resize would become a gather of every element",
    aten.upsample_nearest2d.default: "the same",
    aten.upsample_nearest3d.default: "the same",
    aten._upsample_nearest_exact1d.default: "the same",
    aten._upsample_nearest_exact2d.default: "the same",
    aten._upsample_nearest_exact3d.default: "the same",
    aten.upsample_bilinear2d.default: "one Resize would become four gathers, rounded one by one",
    aten.upsample_bicubic2d.default: "one Resize would become sixteen gathers, rounded one by one",
    aten.multilabel_margin_loss_forward.default: "it counts classes behind the -1 that ends a row",
    aten.dropout.default: "counter_dropout knows what the kernel does",
}

# Operators with other kernels above autograd, in operators whose backward has a row.
_REPLACED: dict[Any, Callable[..., Any]] = {
    aten._linalg_det.default: determinant,
    aten._linalg_slogdet.default: log_determinant,
    # Its own backward writes the example's size into the graph.
    aten.trace.default: lambda x: x.diagonal().sum(),
    **RESIZED,
    # Nor does its backward take a symbolic size.
    aten.affine_grid_generator.default: decomposition_table[aten.affine_grid_generator.default],
}

# What is traced without a kernel for fake values: (log_probs, targets, ...) to what it yields.
_FAKES: dict[Any, Callable[..., Any]] = {}


def _ctc_loss(mode: Any, target: Any, log_probs: Tensor, targets: Tensor, *rest: Any) -> Any:
    # How long the longest target is, is known at run time alone; it is never longer than this.
    longest = targets.shape[-1]
    steps, *batch = log_probs.shape[:-1]
    return log_probs.new_empty(batch), log_probs.new_empty([*batch, steps, 2 * longest + 1])


def _like_input(mode: Any, target: Any, grad: Tensor, x: Tensor, *rest: Any) -> Any:
    return torch.empty_like(x)


_FAKES[aten._ctc_loss.default] = _FAKES[aten._ctc_loss.Tensor] = _ctc_loss
_FAKES[aten._ctc_loss_backward.default] = _like_input
_FAKES[aten._ctc_loss_backward.Tensor] = _like_input
# On a GPU, torch asks first whether a library's own operator is to compute it.
for _name in ("_use_cudnn_ctc_loss", "_use_miopen_ctc_loss"):
    for _overload in getattr(aten, _name).overloads() if hasattr(aten, _name) else ():
        _FAKES[getattr(getattr(aten, _name), _overload)] = lambda *_: False
_FAKES[aten.multilabel_margin_loss_backward.default] = _like_input


whole_operators = PythonKernels({**dict.fromkeys(_WHOLE), **_REPLACED}, fakes=_FAKES)
"""Trace without torch's Python decompositions of these operators; several may be inside."""
