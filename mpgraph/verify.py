"""The invariants of a graph between passes: a broken one is a bug in mpgraph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.errors import VerificationError
from mpgraph.gradient_flow import broken_borders
from mpgraph.infer import run_on_values


def verify(
    gm: fx.GraphModule, *, after: str = "", decided: bool = False, scaled: bool | None = None
) -> None:
    """Check a graph and its sub-graphs.

    Args:
        gm: A graph in mpgraph's form.
        after: The pass that ran last, for the message.
        decided: Casts have been inserted: every decision must hold, and every value's dtype
            must be the one that torch gives for the node's inputs.
        scaled: Gradients in fp16 have been scaled: no scaled one may meet a true one. The value
            says whether gradients are enabled where the graph runs; None skips the check.

    Raises:
        VerificationError: Names the node, what was expected and found, and the user's line.
    """
    for body in ir.all_graphs(gm):
        body.graph.lint()
        for node in body.graph.nodes:
            for problem in _problems(body.graph, node, decided):
                raise VerificationError(_message(node, problem, after))
    if scaled is not None:
        verify_scaling(gm, grad=scaled, after=after)


def verify_scaling(gm: fx.GraphModule, *, grad: bool, after: str = "") -> None:
    """Check that no scaled gradient meets a true one: such a model would train, on wrong numbers.

    This runs at every fp16 capture; the other checks, around every pass, in tests alone.

    Raises:
        VerificationError: Names the node, what meets there, and the user's line.
    """
    for node, problem in broken_borders(gm.graph, grad):
        raise VerificationError(_message(node, problem, after))


def _problems(graph: fx.Graph, node: fx.Node, decided: bool) -> Iterator[str]:
    if node.op == "call_function" and "val" not in node.meta:
        yield "has no value"
    if node.op == "call_function" and not ir.is_inserted(node) and "captured" not in node.meta:
        yield "has lost the value that it was captured with"
    if decided and ir.is_operator(node):
        yield from _broken_decisions(node)
        yield from _wrong_dtypes(node)
    if decided and ir.is_higher_order(node):
        for body, operands in ir.body_calls(graph, node):
            if operands is not None:
                yield from _broken_borders(node, body.graph, operands)


def _broken_decisions(node: fx.Node) -> Iterator[str]:
    decision: ir.Decision | None = node.meta.get("decision")
    if decision is None or decision.dtype is None:
        return
    for source in ir.eligible_inputs(node):
        found = ir.dtype_of(source)
        if found is not None and found is not decision.dtype:
            yield (
                f"should take {ir.short_name(decision.dtype)} inputs, but input %{source.name} is "
                f"{ir.short_name(found)}"
            )


def _wrong_dtypes(node: fx.Node) -> Iterator[str]:
    found = _dtypes(node.meta["val"])
    if not any(dtype.is_floating_point for dtype in found):
        return
    expected = _dtypes(run_on_values(node))
    if found != expected:
        yield f"is recorded as {_names(found)}, but torch gives {_names(expected)}"


def _broken_borders(node: fx.Node, body: fx.Graph, operands: tuple[Any, ...]) -> Iterator[str]:
    for inner, outer in zip(body.find_nodes(op="placeholder"), operands, strict=True):
        taken, given = ir.dtype_of(inner), _dtypes(outer.meta["val"] if _is_node(outer) else outer)
        if taken is not None and given != [taken]:
            yield f"gives {_names(given)} to a sub-graph that takes {ir.short_name(taken)} %{inner}"
    found = _dtypes(fx.map_arg(body.output_node().args[0], lambda n: n.meta["val"]))
    expected = _dtypes(node.meta["val"])
    # The condition of a loop yields no floating-point value, and none of the loop's results.
    if any(dtype.is_floating_point for dtype in found) and found != expected:
        yield f"yields {_names(expected)}, but its sub-graph returns {_names(found)}"


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _dtypes(value: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _names(dtypes: list[torch.dtype]) -> str:
    return ", ".join(ir.short_name(dtype) for dtype in dtypes)


def _message(node: fx.Node, problem: str, after: str) -> str:
    place = f"after pass {after!r}: " if after else ""
    line = ir.source_line(node)
    return f"{place}node %{node.name} ({node.target}) {problem}." + (
        f"\n  from: {line}" if line else ""
    )
