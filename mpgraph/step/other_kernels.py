"""What the Python dispatcher runs while a step is traced, instead of torch's own kernels.

It is not on for all: it would draw dropout's numbers otherwise, and take resampling apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_aten = torch.ops.aten
# Running statistics are written by kernels whose schemas do not say so, and padding's kernel asks
# for the numbers of symbolic sizes. What the Python dispatcher puts in their place does neither.
_ALWAYS = frozenset(
    {
        torch.batch_norm, torch.instance_norm,
        _aten.batch_norm.default, _aten.instance_norm.default,
        F.pad, torch._C._nn.pad, torch.constant_pad_nd,
        _aten.pad.default, _aten.constant_pad_nd.default,
    }
)  # fmt: skip
_ATTENTION = frozenset({F.scaled_dot_product_attention, _aten.scaled_dot_product_attention.default})
# The products of torch 2.11 ask for these numbers too: a step's graph would hold for one size.
_OF_SYMBOLIC_SIZES = _ATTENTION | {
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
    _aten.matmul.default, F.linear, _aten.linear.default,
    torch.baddbmm, torch.Tensor.baddbmm, _aten.baddbmm.default, F.bilinear, _aten.bilinear.default,
}  # fmt: skip


def has_other_kernel(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is the Python dispatcher's to run."""
    if function in _ALWAYS:
        return True
    if function not in _OF_SYMBOLIC_SIZES or not any(map(_is_symbolic, args)):
        return False
    return function not in _ATTENTION or not (kwargs.get("dropout_p") or any(args[4:5]))


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in value.shape)
