"""Where an exported file is to run, and what runs there in 16 bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.onnx import target_rows as rows
from mpgraph.pipeline import PassContext

HALVES = frozenset({torch.float16, torch.bfloat16})
OPSETS = (18, 23)


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime, an opset, and what runs there in 16 bit.

    Attributes:
        name: "cpu", "cuda", "portable" or "web".
        provider: The execution provider of onnxruntime that runs it.
        opset: The version of the ai.onnx operators that the file uses.
        native: For each 16-bit dtype, the ONNX operators that run in it and round as it does.
        since: Operators that do so from a later opset on.
        piece: How many elements of an update are computed at a time, at most; 0 for all.
        io: The floating-point dtypes that a file's inputs and outputs may have.
        reason: Why, for people.
    """

    name: str
    provider: str
    opset: int
    native: Mapping[torch.dtype, frozenset[str]]
    io: frozenset[torch.dtype]
    reason: str
    since: Mapping[torch.dtype, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    piece: int = 0

    def runs(self, operator: str, dtype: torch.dtype) -> bool:
        """Whether an ONNX operator runs in this 16-bit dtype, and rounds as it does."""
        first = self.since.get(dtype, {}).get(operator)
        return operator in self.native[dtype] or (first is not None and self.opset >= first)

    def takes(self, node: fx.Node) -> bool:
        """Whether an ATen node runs as it is; true of every node without 16-bit values."""
        halves = half_dtypes(node)
        if not halves or not ir.is_operator(node):
            return True
        name = short_operator(node)
        if name in rows.CASTS or name in rows.SIZES:
            return True
        operators = rows.MOVES.get(name) or _computed(name, node)
        return bool(operators) and all(self.runs(o, d) for o in operators for d in halves)


@dataclasses.dataclass(frozen=True)
class TargetContext(PassContext):
    """What the passes that prepare a graph for ONNX may know."""

    target: Target = dataclasses.field(default_factory=lambda: TARGETS["cpu"])


_FP32 = frozenset({torch.float32})
# 512 KiB in fp32: what an update keeps of a piece is in a core's second cache, or near it.
_PIECE = 128 * 1024
TARGETS: dict[str, Target] = {
    "cpu": Target(
        "cpu", "CPUExecutionProvider", 18, rows.CPU, _FP32 | HALVES,
        "has kernels for 16-bit data movement alone; computes in fp32 between casts",
        piece=_PIECE,
    ),
    "cuda": Target(
        "cuda", "CUDAExecutionProvider", 22, rows.CUDA, _FP32 | HALVES,
        "has 16-bit kernels for most operators",
        rows.CUDA_SINCE,
    ),
    "portable": Target(
        "portable", "CPUExecutionProvider", 18, rows.CASTS_ONLY, _FP32,
        "runs wherever a cast to 16 bit and back runs",
    ),
    "web": Target(
        "web", "CPUExecutionProvider", 18, rows.CASTS_ONLY, _FP32,
        "JavaScript has no bf16 array, and an fp16 one in new browsers only",
    ),
}  # fmt: skip


def target_of(name: str, opset: int | None = None) -> Target:
    """The target of this name, at an opset of its own or the one asked for.

    Raises:
        ExportError: There is no such target, or the opset is not supported.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; use one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    if opset is None:
        return target
    first, last = OPSETS
    if isinstance(opset, bool) or not isinstance(opset, int) or not first <= opset <= last:
        raise ExportError(f"opset must be a number from {first} to {last}, found {opset!r}")
    return dataclasses.replace(target, opset=opset)


def half_dtypes(node: fx.Node) -> set[torch.dtype]:
    """The 16-bit dtypes among what a node reads and yields."""
    values = [argument.meta.get("val") for argument in ir.argument_nodes(node)]
    return {dtype for value in (*values, node.meta.get("val")) for dtype in _halves(value)}


def _halves(value: object) -> set[torch.dtype]:
    if isinstance(value, torch.Tensor):
        return {value.dtype} & HALVES
    if isinstance(value, (list, tuple)):
        return {dtype for item in value for dtype in _halves(item)}
    return set()


def short_operator(node: fx.Node) -> str:
    """``add`` for ``aten.add.Tensor``; ``view.dtype`` where the overload is another operator."""
    schema = cast(OpOverload, node.target)._schema
    name = schema.name.rpartition("::")[2]
    full = f"{name}.{schema.overload_name}"
    return full if full in rows.BITWISE else name


def is_exact(node: fx.Node) -> bool:
    """Whether the node, run in fp32 on its 16-bit inputs, yields values of that 16-bit dtype."""
    dtypes = {d for n in ir.argument_nodes(node) if (d := ir.dtype_of(n)) and d.is_floating_point}
    return (
        short_operator(node) in rows.EXACT
        and dtypes == half_dtypes(node)
        and len(dtypes) == 1
        and all(_is_exact_number(value, *dtypes) for value in node.args)
    )


def _computed(name: str, node: fx.Node) -> tuple[str, ...]:
    operator = rows.COMPUTES.get(name)
    return (operator,) if operator and _rounds_once(name, node) else ()


def _rounds_once(name: str, node: fx.Node) -> bool:
    """Whether the node is that one ONNX operator, with nothing rounded besides its result.

    ``add(x, y, alpha=2)`` and ``div(x, y, rounding_mode="floor")`` become two; a transposed
    convolution is another operator; ``mul(x, 0.1)`` would round 0.1 to 16 bit, which ATen keeps
    in fp32.
    """
    if any(value not in (None, 1) for value in node.kwargs.values()):
        return False
    if name == "convolution" and node.args[6]:
        return False
    dtypes = {d for n in ir.argument_nodes(node) if (d := ir.dtype_of(n)) is not None}
    return len(dtypes) == 1 and all(_is_exact_number(value, *dtypes) for value in node.args)


def _is_exact_number(value: object, dtype: torch.dtype) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(torch.tensor(value, dtype=dtype)) == value
    return True
