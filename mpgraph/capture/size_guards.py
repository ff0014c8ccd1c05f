"""Which sizes an exported graph holds for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind


def size_guards(program: torch.export.ExportedProgram) -> Callable[[Sequence[Any]], bool]:
    """A check of the sizes of the input leaves against what the graph was traced for."""
    conditions = list(program._guards_code)
    first: dict[Any, str] = {}
    values = [
        node.meta["captured"]
        for node, spec in zip(
            program.graph.find_nodes(op="placeholder"),
            program.graph_signature.input_specs,
            strict=True,
        )
        if spec.kind is InputKind.USER_INPUT
    ]
    for index, value in enumerate(values):
        for dim, size in enumerate(value.shape):
            text = f"L['leaves'][{index}].size()[{dim}]"
            conditions.extend(_size_condition(text, size, first, program.range_constraints))
    source = " and ".join(f"({c})" for c in conditions) or "True"
    return _compile_guards(source)


def _size_condition(
    text: str, size: Any, first: dict[Any, str], ranges: dict[Any, Any]
) -> Iterator[str]:
    if isinstance(size, int):
        yield f"{text} == {size}"
        return
    expression = size.node.expr
    if expression in first:
        yield f"{text} == {first[expression]}"
        return
    first[expression] = text
    limits = ranges.get(expression)
    if limits is not None:
        yield f"{text} >= {max(int(limits.lower), 2)}"
        if limits.upper.is_finite and limits.upper < 2**31:
            yield f"{text} <= {int(limits.upper)}"
    elif len(expression.free_symbols) != 1 or expression not in expression.free_symbols:
        # A size such as 2*s0: tied to what s0 is elsewhere; the hint is the only sure value.
        yield f"{text} == {size.node.hint}"


def _compile_guards(source: str) -> Callable[[Sequence[Any]], bool]:
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    check = eval(f"lambda L: {source}", {**SYMPY_INTERP})

    def accepts(leaves: Sequence[Any]) -> bool:
        return bool(check({"leaves": leaves}))

    accepts.source = source  # type: ignore[attr-defined]
    return accepts
