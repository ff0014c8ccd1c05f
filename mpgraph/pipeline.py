"""What a pass is, and what runs passes: order, checks, counts, errors."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import fx

from mpgraph import ir
from mpgraph.errors import MPGraphError, VerificationError
from mpgraph.graph_text import format_graph
from mpgraph.policy import Policy

Numerics = Literal["exact", "rounds"]


class NeedsStaticShapes(Exception):
    """A pass cannot treat this node while sizes are symbolic: capture again with numbers."""

    def __init__(self, node: fx.Node, error: Exception) -> None:
        self.node, self.error = node, error
        super().__init__(f"{ir.operator_name(node)} ({node.name}): {str(error).splitlines()[0]}")


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What every pass may know besides the graph.

    Attributes:
        policy: Which operators run in which dtype.
        compute: The 16-bit dtype of the conversion; None where nothing is lowered.
        device: The device type that the model computes on: "cpu" or "cuda".
        grad: Whether gradients were enabled when the graph was captured.
        strict: Whether sharing and moving casts must leave every gradient bit as
            ``torch.autocast`` computes it.
        scaled: Whether gradients in fp16 are multiplied by a loss scale.
    """

    policy: Policy
    compute: torch.dtype | None
    device: str = "cpu"
    grad: bool = True
    strict: bool = False
    scaled: bool = False

    def autocast(self, region: ir.Region | None = None) -> contextlib.AbstractContextManager[Any]:
        """The ``torch.autocast`` state under which the model's Python sees the right dtypes."""
        dtype, enabled = self.compute, self.compute is not None
        if region is not None:
            dtype, enabled = region.dtype, region.enabled
        return torch.autocast(self.device, dtype=dtype or torch.bfloat16, enabled=enabled)


# The context is a PassContext, or for passes over a whole step its StepContext.
Run = Callable[[fx.Graph, Any], int]


@dataclasses.dataclass(frozen=True)
class GraphPass:
    """A named edit of one graph that returns how many edits it made.

    Attributes:
        run: Takes the graph and the context.
        name: The function's name: file, test and report use the same.
        numerics: "exact" if every value stays the same, "rounds" if the policy's roundings
            come in here.
        whole: Whether the pass enters sub-graphs itself, because what it decides in them
            depends on the graph around them.
    """

    run: Run
    name: str
    numerics: Numerics
    whole: bool = False

    def __call__(self, graph: fx.Graph, context: PassContext) -> int:
        """Run the pass on one graph."""
        return self.run(graph, context)


def graph_pass(*, numerics: Numerics, whole: bool = False) -> Callable[[Run], GraphPass]:
    """Declare a function as a pass."""

    def wrap(run: Run) -> GraphPass:
        return GraphPass(run, getattr(run, "__name__", "pass"), numerics, whole)

    return wrap


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass did to a graph."""

    name: str
    numerics: Numerics
    edits: int
    casts: int
    cast_bytes: int


# Set by the test suite: lint, verify and compare texts around every pass.
checks: list[Callable[[fx.GraphModule, GraphPass, PassContext], None]] = []


def run_passes(
    gm: fx.GraphModule, passes: Sequence[GraphPass], context: PassContext
) -> list[PassReport]:
    """Edit ``gm`` and its sub-graphs in place; report what each pass did.

    Raises:
        VerificationError: A pass failed on a legal graph, or broke a promise (checked in tests).
    """
    reports: list[PassReport] = []
    casts = list(count_casts(gm))
    for graph_pass in passes:
        with _held_to_its_word(gm, graph_pass, context):
            edits = _run_pass(gm, graph_pass, context)
        if checks:
            _check_claim(graph_pass, edits)
        if edits:
            casts = list(count_casts(gm))
        reports.append(
            PassReport(graph_pass.name, graph_pass.numerics, edits, len(casts), sum(casts))
        )
    for body in ir.all_graphs(gm):
        body.graph.lint()
        body.recompile()
    return reports


def _run_pass(gm: fx.GraphModule, graph_pass: GraphPass, context: PassContext) -> int:
    bodies = [gm] if graph_pass.whole else list(ir.all_graphs(gm))
    edits = 0
    for body in bodies:
        try:
            edits += graph_pass(body.graph, context)
        except (MPGraphError, NeedsStaticShapes):
            raise
        except Exception as error:
            raise VerificationError(f"pass {graph_pass.name!r} failed: {error!r}") from error
    return edits


_texts: dict[str, str] = {}


@contextlib.contextmanager
def _held_to_its_word(
    gm: fx.GraphModule, graph_pass: GraphPass, context: PassContext
) -> Iterator[None]:
    if not checks:
        yield
        return
    _texts["before"] = _all_text(gm)
    yield
    _texts["after"] = _all_text(gm)
    for check in checks:
        check(gm, graph_pass, context)


def _all_text(gm: fx.GraphModule) -> str:
    return "\n".join(format_graph(body.graph, decisions=True) for body in ir.all_graphs(gm))


def _check_claim(graph_pass: GraphPass, edits: int) -> None:
    changed = _texts["before"] != _texts["after"]
    if changed != (edits > 0):
        raise VerificationError(
            f"pass {graph_pass.name!r} reported {edits} edits, but the graph text "
            f"{'changed' if changed else 'is unchanged'}"
        )


def count_casts(gm: fx.GraphModule) -> Iterator[int]:
    """The bytes that each cast between floating dtypes reads and writes, sub-graphs included."""
    for body in ir.all_graphs(gm):
        for node in body.graph.nodes:
            if ir.is_cast(node) and ir.dtype_of(ir.cast_source(node)) is not ir.cast_target(node):
                yield cast_bytes(node)


def cast_bytes(node: fx.Node) -> int:
    """Bytes read and written by a cast, at the sizes of the captured call."""
    value: torch.Tensor = ir.cast_source(node).meta["val"]
    return element_count(value) * (value.element_size() + ir.cast_target(node).itemsize)


def element_count(value: torch.Tensor) -> int:
    """The number of elements, at the sizes of the captured call."""
    return math.prod(map(size_hint, value.shape))


def size_hint(size: Any) -> int:
    """A size as it was at capture; asking so ties no symbolic size to it."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 1
