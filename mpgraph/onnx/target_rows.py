"""What runs where in 16 bit: data.

Measured on onnxruntime 1.31.1 by ``tools/probe_ort.py``, which fails where a row for a provider
that it can run is wrong. The probe puts an operator between two explicit casts, fp32 → 16 bit →
operator → fp32, and demands the rounding of the first one in the result, at every optimization
level. That is stricter than asking whether a file loads:

* The CPU provider runs an fp16 operator that it has no kernel for in fp32, between casts of its
  own. It then removes pairs of casts, and takes an explicit one next to it along: ``Where``,
  ``Pad``, ``Tile``, ``Neg``, ``Add``, ``Mul`` and the like in fp16 lose their rounding *and that
  of their neighbours*, at every level, even with optimizations disabled.
* In bf16 it refuses the file: NOT_IMPLEMENTED.

Pairs of explicit casts around fp32 operators survive every level, bit for bit.
"""

from __future__ import annotations

import torch

fp16, bf16 = torch.float16, torch.bfloat16

# ATen operators that only move data, and the ONNX operators that torch.onnx makes of them. An
# operator that is missing here costs two casts and no accuracy: moving fp32 copies of 16-bit
# values is exact too.
MOVES: dict[str, tuple[str, ...]] = {
    "alias": ("Identity",),
    "cat": ("Concat",),
    "clone": ("Identity",),
    "contiguous": ("Identity",),
    "detach": ("Identity",),
    "embedding": ("Gather",),
    "expand": ("Expand",),
    "flatten": ("Reshape",),
    "gather": ("GatherElements",),
    "index_select": ("Gather",),
    "lift_fresh_copy": ("Identity",),
    "permute": ("Transpose",),
    "reshape": ("Reshape",),
    "select": ("Gather",),
    "slice": ("Slice",),
    "squeeze": ("Squeeze",),
    "stack": ("Unsqueeze", "Concat"),
    "t": ("Transpose",),
    "transpose": ("Transpose",),
    "unsqueeze": ("Unsqueeze",),
    "view": ("Reshape",),
    "_unsafe_view": ("Reshape",),
    "constant_pad_nd": ("Pad",),
    "where": ("Where",),
    "tril": ("Trilu",),
    "triu": ("Trilu",),
}

# ATen operators that yield nothing but values that they were given, or their negation: run in fp32
# on 16-bit values they yield 16-bit values, and rounding those does nothing.
EXACT = frozenset(MOVES) | {
    "abs", "amax", "amin", "chunk", "flip", "max", "max_pool1d", "max_pool2d", "max_pool3d",
    "max_pool2d_with_indices", "maximum", "min", "minimum", "neg", "relu", "repeat", "roll",
    "split", "split_with_sizes", "unbind", "unfold",
}  # fmt: skip

# ATen operators that compute, and become one ONNX operator that rounds once, as ATen does. What
# becomes several (silu, attention) would round at each. linear is taken apart into these.
COMPUTES: dict[str, str] = {
    "abs": "Abs",
    "add": "Add",
    "addmm": "Gemm",
    "bmm": "MatMul",
    "conv1d": "Conv",
    "conv2d": "Conv",
    "conv3d": "Conv",
    "convolution": "Conv",
    "div": "Div",
    "erf": "Erf",
    "exp": "Exp",
    "matmul": "MatMul",
    "mm": "MatMul",
    "mul": "Mul",
    "neg": "Neg",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}

# Read by every runtime whatever the dtype: they yield no 16-bit value.
SIZES = frozenset({"sym_size", "sym_numel", "sym_stride", "sym_storage_offset"})

# Casts between dtypes: every provider has them all.
CASTS = frozenset({"_to_copy", "to", "convert_element_type", "lower", "widen"})

# What depends on how many bits a value has: there is no fp32 twin that yields the same. (Random
# numbers do too, but no runtime draws those of torch in any dtype.)
BITWISE: dict[str, str] = {
    "nextafter": "the next 16-bit number is not the next fp32 number",
    "view.dtype": "reads the bits of a 16-bit number as another type",
}

_MOVED = frozenset(
    {
        "Concat", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape",
        "Slice", "Split", "Squeeze", "Unsqueeze",
    }
)  # fmt: skip
_ON_CUDA = _MOVED | {"Transpose"} | {
    "Abs", "Add", "Div", "Erf", "Exp", "Expand", "Gemm", "MatMul", "Mul", "Neg", "Relu",
    "Sigmoid", "Sqrt", "Sub", "Tanh", "Tile", "Trilu", "Where",
}  # fmt: skip

# Operators that run in 16 bit as they are, from opset 18 on. Not Transpose, though there is a
# kernel: Transpose (perm 1, 0, 2) → Cast → MatMul crashes onnxruntime 1.31.1 while it optimizes.
CPU: dict[torch.dtype, frozenset[str]] = {fp16: _MOVED | {"Expand"}, bf16: _MOVED}
# Of the kernels that onnxruntime's docs/OperatorKernels.md lists for the CUDA provider.
CUDA: dict[torch.dtype, frozenset[str]] = {fp16: _ON_CUDA | {"Conv", "Pad"}, bf16: _ON_CUDA}
# Operators with a kernel from a later opset on only.
CUDA_SINCE: dict[torch.dtype, dict[str, int]] = {bf16: {"Conv": 22}}
# Nothing but casts reads or writes 16 bit: what has a cast runs it.
CASTS_ONLY: dict[torch.dtype, frozenset[str]] = {fp16: frozenset(), bf16: frozenset()}
